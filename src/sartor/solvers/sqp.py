"""Sequential quadratic programming: an interior-point QP at each step, on states and controls together.

The states are variables, so a guess need not follow the dynamics. Each step expands (D1) into (D5), solves that, and
moves along the solution as far as an exact penalty function falls:

    φ = J + Σ ω·|defects| + ρ Σ max(h, 0) of the hard rows                                                          (D6)

Hard path rows are kept as soft ones with the penalty ρ: every QP is feasible then, the penalty is exact as long as ρ
exceeds their multipliers, and rows that stay violated however large ρ becomes are what makes a problem infeasible.

References: Nocedal and Wright, Numerical Optimization, 2006, chapter 18; Powell, A Fast Algorithm for Nonlinearly
Constrained Optimization Calculations, 1978 (the weights ω); Diehl et al., Real-Time Optimization and Nonlinear Model
Predictive Control, 2002 (the real-time iteration).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sartor import kkt
from sartor.kkt import Expansion, Point
from sartor.problem import Problem, Theta, penalty, total_cost
from sartor.solution import RESULTS, Rows, Solution, Stats
from sartor.solvers.base import AbstractSolver, kkt_tolerance
from sartor.solvers.qp import Interior, Rules, center, pack, solve_qp, unpack

_RHO_START, _RHO_END = 1e3, 1e9


class SQPState(NamedTuple):
    """The carry of the SQP iteration."""

    # the iterate
    point: Point
    kkt_norm: Float[Array, ""]  # at the point before the last move; a converged point does not move
    # globalisation
    delta: Float[Array, ""]  # multiple of the identity added to the Hessian
    rho: Float[Array, ""]  # penalty of hard path rows
    omega: Float[Array, "N+1 nx"]  # penalties of the defects
    stalled: Int[Array, ""]  # steps in a row without progress
    # bookkeeping
    finite: Bool[Array, ""]
    solved: Bool[Array, ""]  # whether the last QP was solved
    num_steps: Int[Array, ""]
    num_inner_steps: Int[Array, ""]


class SQP(AbstractSolver):
    """Sequential quadratic programming with an interior-point QP, for every problem (D1).

    References: see the module.
    """

    curvature: Literal["exact", "gauss_newton"] = "exact"
    """Hessian of the QPs: of the Lagrangian, or of the cost alone. With "exact", a step at which it is not positive
    definite on the feasible directions uses that of the cost, regularised as it must be."""
    tau: float = 0.0
    """Barrier: the solution satisfies μt = τ for every inequality, and is smooth in all parameters if τ > 0."""
    tol: float = 1e-8
    """Largest entry of the KKT residual at which a solve counts as successful; float32 adds a rounding floor."""
    max_steps: int = 100
    """Largest number of QPs."""
    max_inner_steps: int = 40
    """Largest number of interior-point steps in one QP."""
    real_time: bool = False
    """One full step from the (shifted) guess: the real-time iteration. Not a solution; `stats.kkt_norm` says how far
    from one. The status is `successful` if the QP was solved."""

    def __check_init__(self):
        if self.curvature not in ("exact", "gauss_newton"):
            raise ValueError(f"curvature must be 'exact' or 'gauss_newton', not {self.curvature!r}.")
        if not (self.tau >= 0 and self.tol > 0 and self.max_steps >= 1 and self.max_inner_steps >= 1):
            raise ValueError("SQP needs tau ≥ 0, tol > 0, max_steps ≥ 1 and max_inner_steps ≥ 1.")

    def check(self, problem: Problem) -> None:
        pass

    def init(self, problem: Problem, theta: Theta, x0: Array, guess: Solution, unroll: bool) -> SQPState:
        point = Point(guess.us, guess.xs, guess.lams, guess.mus, guess.slacks)
        zero, yes = jnp.zeros((), x0.dtype), jnp.asarray(True)
        return SQPState(
            point, zero + jnp.inf, delta=zero, rho=zero + _RHO_START, omega=jnp.zeros_like(point.xs),
            stalled=jnp.asarray(0), finite=yes, solved=yes, num_steps=jnp.asarray(0), num_inner_steps=jnp.asarray(0),
        )  # fmt: skip

    def step(self, problem: Problem, theta: Theta, x0: Array, state: SQPState, unroll: bool) -> SQPState:
        expansion = kkt.expand(problem, theta, x0, state.point, self.curvature == "exact")
        norm = kkt.kkt_norm(kkt.expanded_residual(problem, expansion, state.point, self._tau_end(x0)))
        finite = _all_finite(expansion)
        rules = _rules(problem, expansion.rows, state.rho)
        start = self._warm_start(expansion, norm, rules, state.point)
        tau = jnp.clip(1e-2 * jnp.minimum(norm, norm**2), self._tau_end(x0), 1e-4)
        qp = solve_qp(expansion, rules, start, tau, state.delta, self.max_inner_steps, unroll)
        omega = jnp.maximum(jnp.abs(qp.point.lams), 0.5 * (state.omega + jnp.abs(qp.point.lams)))
        alpha = self._line_search(problem, theta, x0, expansion, rules, state.point, qp.point, omega)
        settled = ~finite | (norm <= kkt_tolerance(self.tol, norm.dtype)) & ~unroll
        alpha = jax.lax.stop_gradient(jnp.where(qp.regular & ~settled, alpha, 0.0))
        violated = jnp.max(qp.point.violations, initial=0.0) > 1e-9
        return SQPState(
            _move(problem, state.point, qp.point, alpha),
            norm,
            delta=_next_delta(state.delta, alpha, expansion),
            rho=jnp.where(violated & (alpha > 0), jnp.minimum(10.0 * state.rho, _RHO_END), state.rho),
            omega=omega,
            stalled=jnp.where((alpha > 0) & (norm < 0.99 * state.kkt_norm), 0, state.stalled + 1),
            finite=finite,
            solved=qp.done,
            num_steps=state.num_steps + jnp.where(settled, 0, 1),
            num_inner_steps=state.num_inner_steps + jnp.where(settled, 0, qp.num_steps),
        )

    def running(self, state: SQPState) -> Array:
        return state.finite & (state.kkt_norm > kkt_tolerance(self.tol, state.kkt_norm.dtype)) & (state.stalled < 30)

    def finish(self, problem: Problem, theta: Theta, x0: Array, state: SQPState) -> Solution:
        point = state.point
        converged = state.kkt_norm <= kkt_tolerance(self.tol, state.kkt_norm.dtype)
        hard = ~jnp.isfinite(pack(kkt.soft_terms(problem, point.mus)[0]))
        violated = jnp.max(jnp.where(hard, pack(kkt.rows(problem, theta, point.xs, point.us)), 0.0)) > 1e-6
        result = RESULTS.where(converged, RESULTS.successful, RESULTS.not_converged)
        result = RESULTS.where(~converged & violated, RESULTS.infeasible, result)
        result = RESULTS.where(state.solved, RESULTS.successful, result) if self.real_time else result
        result = RESULTS.where(state.finite, result, RESULTS.non_finite)
        stats = Stats(state.num_steps, state.num_inner_steps, state.kkt_norm)
        cost = total_cost(problem, theta, point.xs, point.us)
        return Solution(**point._asdict(), cost=cost, tau=jnp.asarray(self.tau, x0.dtype), result=result, stats=stats)

    def _tau_end(self, like: Array) -> float:
        return max(self.tau, float(jnp.finfo(like.dtype).eps) ** 0.75)

    def _warm_start(self, expansion: Expansion, norm: Array, rules: Rules, point: Point) -> Interior:
        """An interior point around the old multipliers, the closer to the boundary the smaller the residual."""
        tau = jnp.clip(0.1 * norm**2, self._tau_end(norm), 1.0)
        inside = center(rules, pack(expansion.rows), pack(point.mus), tau)
        return Interior(jnp.zeros_like(point.us), jnp.zeros_like(point.xs), point.lams, *inside)

    def _line_search(
        self,
        problem: Problem,
        theta: Theta,
        x0: Array,
        expansion: Expansion,
        rules: Rules,
        point: Point,
        solved: Interior,
        omega: Array,
    ) -> Array:
        """The largest α in 1, ½, ¼, ... at which (D6) falls as it should; 0 if there is none."""
        if self.real_time:
            return jnp.ones((), x0.dtype)
        lq = expansion.lq
        bare = kkt.without_rows(problem)

        def elastic(h: Rows) -> Array:
            return jnp.sum(jnp.where(rules.hard, 0.0, penalty(pack(h), rules.linear, rules.quadratic)))

        def merit(us, xs):
            gap = jnp.abs(kkt.dynamics_gap(problem, theta, x0, xs, us))
            return total_cost(bare, theta, xs, us) + elastic(kkt.rows(problem, theta, xs, us)) + jnp.sum(omega * gap)

        gap = jnp.sum(omega * jnp.abs(jnp.concatenate([expansion.x0_gap[None], lq.c])))
        ahead = jax.tree.map(jnp.add, expansion.rows, kkt.rows_tangent(expansion.jacobian, solved.us, solved.xs))
        before = elastic(expansion.rows)
        old = expansion.cost + before + gap
        slope = jnp.sum(lq.q * solved.xs) + jnp.sum(lq.r * solved.us) + elastic(ahead) - before - gap
        noise = 100 * jnp.finfo(x0.dtype).eps * (jnp.abs(old) + 1.0)

        def too_long(alpha):
            new = merit(point.us + alpha * solved.us, point.xs + alpha * solved.xs)
            return ~(new <= old + 1e-4 * alpha * slope + noise) & (alpha > 1e-8)

        start = jax.lax.stop_gradient(jnp.where(slope <= noise, 1.0, 0.0))
        alpha = jax.lax.while_loop(too_long, lambda alpha: 0.5 * alpha, start)
        return jnp.where(alpha > 1e-8, alpha, 0.0)


def _move(problem: Problem, point: Point, solved: Interior, alpha: Array) -> Point:
    blend = lambda old, new: jnp.where(alpha > 0, old + alpha * (new - old), old)
    us = blend(point.us, point.us + solved.us)
    return Point(
        jnp.clip(us, problem.u_min, problem.u_max),
        blend(point.xs, point.xs + solved.xs),
        blend(point.lams, solved.lams),
        jax.tree.map(blend, point.mus, unpack(solved.mus, point.mus)),
        jax.tree.map(blend, point.slacks, unpack(solved.slacks, point.slacks)),
    )


def _next_delta(delta: Array, alpha: Array, expansion: Expansion) -> Array:
    """More regularisation after a step that failed or was cut short, less after a full one."""
    scale = jnp.max(jnp.abs(jnp.diagonal(expansion.lq.Q, axis1=1, axis2=2))) + 1e-6
    more = jnp.clip(10.0 * delta, 1e-4 * scale, 1e6 * scale)
    less = jnp.where(delta > 1e-5 * scale, 0.1 * delta, 0.0)
    return jax.lax.stop_gradient(jnp.where(alpha < 0.05, more, jnp.where(alpha > 0.5, less, delta)))


def _rules(problem: Problem, rows: Rows, rho: Array) -> Rules:
    exist = kkt.bounded(problem)
    num_bounds = rows.u_min.size + rows.u_max.size
    flat_exist = pack(jax.tree.map(lambda on, row: jnp.broadcast_to(on, row.shape), exist, rows))
    linear, quadratic = (pack(value) for value in kkt.soft_terms(problem, rows))
    soft = jnp.isfinite(linear)
    bound = jnp.arange(linear.size) < num_bounds
    return Rules(
        flat_exist, bound, linear=jnp.where(bound, 0.0, jnp.where(soft, linear, rho)),
        quadratic=jnp.where(soft & ~bound, quadratic, 0.0),
    )  # fmt: skip


def _all_finite(tree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
