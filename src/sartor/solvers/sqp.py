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
from sartor.problem import Problem, Theta, crossed, penalty, total_cost
from sartor.solution import RESULTS, Rows, Solution, Stats
from sartor.solvers.active_set import ActiveSet, solve_bounded
from sartor.solvers.base import AbstractSolver, kkt_tolerance, least_delta, next_delta
from sartor.solvers.qp import Interior, QPState, Rules, center, pack, solve_qp, unpack

_RHO_START, _RHO_END = 1e3, 1e9
_PATIENCE = 20  # steps without progress


class SQPState(NamedTuple):
    """The carry of the SQP iteration."""

    # the iterate
    point: Point
    kkt_norm: Float[Array, ""]  # at the point before the last move; a converged point does not move
    # globalisation
    delta: Float[Array, ""]  # multiple of the identity added to the Hessian in the last QP
    alpha: Float[Array, ""]  # its step length
    rho: Float[Array, ""]  # penalty of hard path rows
    omega: Float[Array, "N_plus_1 nx"]  # penalties of the defects
    stalled: Int[Array, ""]  # steps in a row without progress
    left: Float[Array, ""]  # largest violation of a hard path row in the last QP
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
    """Hessian of the QPs: of the Lagrangian, or of the cost alone. Where it is not positive definite on the feasible
    directions, a multiple of the identity is added, the smallest found that does."""
    tau: float = 0.0
    """Barrier: the solution satisfies μt = τ for every inequality, and is smooth in all parameters if τ > 0."""
    tol: float = 1e-9
    """Largest entry of the KKT residual at which a solve counts as successful, or what rounding allows if that is
    more: 200·eps·(10 + max|λ|), at most 100·√eps; eps = 2e-16 in float64 and 1e-7 in float32."""
    max_steps: int = 100
    """Largest number of QPs."""
    max_inner_steps: int = 40
    """Largest number of interior-point steps in one QP."""
    line_search: bool = True
    """Whether steps are shortened until (D6) falls. Without, a step is cheaper, and a solve that begins near its
    solution gets there as well; one that does not converge is reported as always."""
    real_time: bool = False
    """One full step from the (shifted) guess: the real-time iteration. Not a solution; `stats.kkt_norm`, the residual
    of the guess, says how far from one the step began. `successful` says that the QP was solved, and its hard rows
    hold."""

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
        largest = jnp.max(jnp.concatenate([point.mus.path.ravel(), point.mus.terminal]), initial=0.0)
        rho = jax.lax.stop_gradient(jnp.clip(10.0 * largest, _RHO_START, _RHO_END))
        return SQPState(
            point, zero + jnp.inf, delta=zero, alpha=zero + 1.0, rho=rho, omega=jnp.zeros_like(point.xs),
            stalled=jnp.asarray(0), left=zero, finite=yes, solved=yes,
            num_steps=jnp.asarray(0), num_inner_steps=jnp.asarray(0),
        )  # fmt: skip

    def step(self, problem: Problem, theta: Theta, x0: Array, state: SQPState, unroll: bool) -> SQPState:
        expansion = kkt.expand(problem, theta, x0, state.point, self.curvature == "exact")
        norm = kkt.kkt_norm(kkt.expanded_residual(problem, expansion, state.point, self._tau_end(x0)))
        norm = jax.lax.stop_gradient(norm)
        finite = _all_finite(expansion)
        stops = not (unroll or self.real_time)
        settled = ~finite | (norm <= kkt_tolerance(self.tol, state.point.lams)) & stops
        rules = _rules(problem, expansion.rows, state.rho)
        start = self._warm_start(expansion, norm, rules, state.point)
        tau = jnp.maximum(jnp.minimum(1e-2 * jnp.minimum(norm, norm**2), 1e-4), self._tau_end(x0))
        tau = jnp.full_like(tau, self._tau_end(x0)) if self.real_time else tau  # there is no later QP to make up for it
        deltas = _deltas(expansion, state)
        if unroll or self.tau > 0:
            qp = solve_qp(expansion, rules, start, tau, deltas, self.max_inner_steps, unroll, settled)
        else:
            quick, found = _without_rows(problem, expansion, state.point, deltas[0], settled)
            qp = solve_qp(expansion, rules, start, tau, deltas, self.max_inner_steps, unroll, settled | found)
            qp = jax.tree.map(lambda a, b: jnp.where(found, a, b), _as_interior(expansion, rules, quick, qp), qp)
        omega = jnp.maximum(jnp.abs(qp.point.lams), 0.5 * (state.omega + jnp.abs(qp.point.lams)))
        merit = Merit(problem, theta, x0, rules, omega)
        alpha, us, xs = self._line_search(merit, expansion, state.point, qp, tau, unroll)
        alpha = jnp.where(qp.regular & ~settled, alpha, 0.0)
        moving = jnp.max(jnp.abs(us - state.point.us)) > 1e-6 * (1.0 + jnp.max(jnp.abs(us)))
        hard = ~jnp.isfinite(pack(kkt.soft_terms(problem, expansion.rows)[0])) & ~rules.hard
        left = jnp.max(jnp.where(hard, qp.point.violations, 0.0))
        violated = (left > 1e-9) & (left > 0.1 * jnp.max(jnp.where(hard, pack(expansion.rows), 0.0)))
        return SQPState(
            _move(problem, state.point, qp.point, us, xs, alpha),
            norm,
            delta=jax.lax.stop_gradient(qp.delta),
            alpha=alpha,
            rho=jnp.where(violated & (alpha > 0), jnp.minimum(10.0 * state.rho, _RHO_END), state.rho),
            omega=omega,
            stalled=jnp.where((norm < 0.99 * state.kkt_norm) | moving, 0, state.stalled + 1),
            left=left,
            finite=finite,
            solved=qp.done,
            num_steps=state.num_steps + jnp.where(settled, 0, 1),
            num_inner_steps=state.num_inner_steps + jnp.where(settled, 0, qp.num_steps),
        )

    def running(self, state: SQPState) -> Array:
        if self.real_time:
            return state.finite & (state.num_steps == 0)
        return state.finite & (state.kkt_norm > kkt_tolerance(self.tol, state.point.lams)) & (state.stalled < _PATIENCE)

    def finish(self, problem: Problem, theta: Theta, x0: Array, state: SQPState) -> Solution:
        point = state.point
        converged = state.kkt_norm <= kkt_tolerance(self.tol, state.point.lams)
        hard = ~jnp.isfinite(pack(kkt.soft_terms(problem, point.mus)[0]))
        violated = jnp.max(jnp.where(hard, pack(kkt.rows(problem, theta, point.xs, point.us)), 0.0)) > 1e-6
        given_up = (state.rho >= _RHO_END) | (state.stalled >= _PATIENCE)
        if self.real_time:
            converged, violated, given_up = state.solved & (state.left <= 1e-6), state.left > 1e-6, state.solved
        result = RESULTS.where(converged, RESULTS.successful, RESULTS.not_converged)
        result = RESULTS.where(~converged & violated & given_up | crossed(problem), RESULTS.infeasible, result)
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
        self, merit: "Merit", expansion: Expansion, point: Point, qp: QPState, tau: Array, unroll: bool
    ) -> tuple[Array, Array, Array]:
        """The largest α in 1, ½, ¼, ... at which (D6) falls as it should, and the trajectory there; 0 if there is none.

        Two trajectories are tried at each α: the straight step, and the rollout of its controls with the feedback of
        the QP, which takes the curvature of the dynamics out of the step (a second-order correction).
        """
        whole = point.us + qp.point.us, point.xs + qp.point.xs
        if self.real_time or not self.line_search:
            return jnp.ones_like(qp.delta), *whole
        old, slope = merit.at(expansion), merit.slope(expansion, qp.point)
        noise = 100 * jnp.finfo(old.dtype).eps * (jnp.abs(old) + 1.0 + jnp.max(merit.rules.linear, initial=0.0))
        # An interior solution of the QP costs up to the sum of its products μt more than the solution.
        noise = noise + 3.0 * merit.rules.exist.size * tau

        def attempt(search):
            alpha, _, us, xs = search
            alpha = 0.5 * alpha
            straight = point.us + alpha * qp.point.us, point.xs + alpha * qp.point.xs
            rolled = merit.rollout(*straight, qp.K)
            us, xs = (jnp.stack(pair) for pair in zip(straight, rolled, strict=True))
            values = jax.vmap(merit.value)(us, xs)
            values = jnp.where(jnp.isfinite(values), values, jnp.inf)
            best = jnp.argmin(values + jnp.asarray([0.0, noise]))  # within rounding, the straight step is Newton's own
            return alpha, values[best] <= old + 1e-4 * alpha * slope + noise, us[best], xs[best]

        begin = (jnp.full_like(old, 2.0), slope > noise, point.us, point.xs)
        begin = jax.lax.stop_gradient(begin)
        alpha, _, us, xs = jax.lax.while_loop(lambda search: ~search[1] & (search[0] > 1e-8), attempt, begin)
        alpha = jax.lax.stop_gradient(jnp.where((alpha > 1e-8) & (slope <= noise), alpha, 0.0))
        if unroll:
            return alpha, point.us + alpha * qp.point.us, point.xs + alpha * qp.point.xs
        return alpha, us, xs


class Merit(NamedTuple):
    """The penalty function (D6)."""

    problem: Problem
    theta: Theta
    x0: Array
    rules: Rules
    omega: Array

    def value(self, us: Array, xs: Array) -> Float[Array, ""]:
        """φ of a trajectory."""
        problem, theta = self.problem, self.theta
        gap = jnp.sum(self.omega * jnp.abs(kkt.dynamics_gap(problem, theta, self.x0, xs, us)))
        rows = self.elastic(kkt.rows(problem, theta, xs, us))
        return total_cost(kkt.without_rows(problem), theta, xs, us) + rows + gap

    def at(self, expansion: Expansion) -> Float[Array, ""]:
        """φ at the point of an expansion."""
        return expansion.cost + self.elastic(expansion.rows) + self.gap(expansion)

    def slope(self, expansion: Expansion, step: Interior) -> Float[Array, ""]:
        """An upper bound of the directional derivative of φ along a solution of the QP."""
        ahead = jax.tree.map(jnp.add, expansion.rows, kkt.rows_tangent(expansion.jacobian, step.us, step.xs))
        rows = self.elastic(ahead) - self.elastic(expansion.rows)
        return jnp.sum(expansion.lq.q * step.xs) + jnp.sum(expansion.lq.r * step.us) + rows - self.gap(expansion)

    def gap(self, expansion: Expansion) -> Float[Array, ""]:
        """Weighted defects of the dynamics."""
        return jnp.sum(self.omega * jnp.abs(jnp.concatenate([expansion.x0_gap[None], expansion.lq.c])))

    def elastic(self, h: Rows) -> Float[Array, ""]:
        """Penalties of the soft and hard path rows."""
        return jnp.sum(jnp.where(self.rules.hard, 0.0, penalty(pack(h), self.rules.linear, self.rules.quadratic)))

    def rollout(self, us: Array, xs: Array, K: Array) -> tuple[Array, Array]:
        """The trajectory that follows the dynamics around a step that does not."""
        problem = self.problem

        def advance(x, stage):
            u, x_step, K, low, high, k = stage
            u = jnp.clip(u + K @ (x - x_step), low, high)
            x_next = problem.dynamics(x, u, k, self.theta)
            return x_next, (u, x_next)

        stages = (us, xs[:-1], K, *problem.bounds, jnp.arange(problem.horizon))
        _, (us, x_next) = jax.lax.scan(advance, self.x0, stages)
        return us, jnp.concatenate([self.x0[None], x_next])


def _move(problem: Problem, point: Point, solved: Interior, us: Array, xs: Array, alpha: Array) -> Point:
    moved = alpha > 0
    blend = lambda old, new: jnp.where(moved, old + alpha * (new - old), old)
    return Point(
        jnp.clip(jnp.where(moved, us, point.us), problem.u_min, problem.u_max),
        jnp.where(moved, xs, point.xs),
        blend(point.lams, solved.lams),
        jax.tree.map(blend, point.mus, unpack(solved.mus, point.mus)),
        jax.tree.map(blend, point.slacks, unpack(solved.slacks, point.slacks)),
    )


def _without_rows(
    problem: Problem, expansion: Expansion, point: Point, delta: Array, skip: Array
) -> tuple[ActiveSet, Array]:
    """The solution of the QP by the active-set method if no row but bounds is active in it, and whether that is so.

    It is not tried where the multipliers of the guess say otherwise.
    """
    active = jax.tree.map(jnp.greater, point.mus, point.slacks)
    skip = skip | jnp.any(active.path) | jnp.any(active.terminal)
    quick = solve_bounded(expansion, kkt.bounded(problem), delta, active.u_min, active.u_max, skip)
    ahead = jax.tree.map(jnp.add, expansion.rows, kkt.rows_tangent(expansion.jacobian, quick.z.us, quick.z.xs))
    return quick, quick.settled & quick.regular & jnp.all(ahead.path <= 0) & jnp.all(ahead.terminal <= 0)


def _as_interior(expansion: Expansion, rules: Rules, quick: ActiveSet, like: QPState) -> QPState:
    """The solution of the active-set method in the form of the interior-point method's."""
    us, xs, lams = quick.z
    ahead = pack(expansion.rows) + pack(kkt.rows_tangent(expansion.jacobian, us, xs))
    slacks = jnp.where(rules.exist, jnp.maximum(-ahead, 0.0), 1.0)
    path, terminal = jnp.zeros_like(expansion.rows.path), jnp.zeros_like(expansion.rows.terminal)
    held = pack(Rows(quick.low, quick.high, path > 0, terminal > 0))
    mus = pack(Rows(quick.mu_low, quick.mu_high, path, terminal))
    nothing = jnp.zeros_like(mus)
    point = Interior(us, xs, lams, mus, jnp.where(held, 0.0, slacks), nothing, nothing)
    return like._replace(point=point, K=quick.K, regular=quick.regular, done=quick.settled, num_steps=quick.num_steps)


def _deltas(expansion: Expansion, state: SQPState) -> tuple[Array, Array]:
    """Regularisation to begin a QP with, and to try if that is too little; `next_delta` has the rule."""
    smallest = least_delta(expansion)
    begin = next_delta(state.delta, state.alpha, smallest)
    return jax.lax.stop_gradient((begin, jnp.maximum(state.delta / 3.0, smallest)))


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
