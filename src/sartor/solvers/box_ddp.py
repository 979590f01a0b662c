"""Box-DDP: differential dynamic programming with control bounds; iLQR with Gauss-Newton curvature.

Each step goes backward along the trajectory, solving a small box-constrained quadratic program in the controls at each
stage, and then rolls the dynamics out with the resulting feedback:

    min over δu of ½ δuᵀQ_uu δu + Q_uᵀδu  s.t.  u_min ≤ u + δu ≤ u_max,   u ← u + α kff + K (x_new - x)             (D8)

Trajectories follow the dynamics at every step, so the guess counts by its controls alone.

References: Tassa, Mansard and Todorov, Control-Limited Differential Dynamic Programming, 2014; Amos et al.,
Differentiable MPC for End-to-end Planning and Control, 2018, Module 2 and Algorithm 2.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sartor import kkt
from sartor.kkt import Expansion, Point
from sartor.problem import Problem, Theta, crossed, rollout, total_cost
from sartor.riccati import eliminate
from sartor.solution import RESULTS, Rows, Solution, Stats
from sartor.solvers.base import AbstractSolver, kkt_tolerance, least_delta, next_delta

_STEP_LENGTHS = (1.0, 0.4, 0.15, 0.05, 0.01, 0.001)


class Backward(NamedTuple):
    """What the backward pass leaves behind, stacked over stages."""

    kff: Float[Array, "N nu"]
    K: Float[Array, "N nu nx"]
    P: Float[Array, "N nx nx"]
    p: Float[Array, "N nx"]
    lams: Float[Array, "N nx"]
    """Costates of the trajectory, λ_k = q_k + A_kᵀλ_{k+1}."""
    gradient: Float[Array, "N nu"]
    """∂J/∂u_k = r_k + B_kᵀλ_{k+1}."""
    slope: Float[Array, " N"]
    definite: Bool[Array, " N"]


class BoxDDPState(NamedTuple):
    """The carry of the iteration."""

    # the iterate
    us: Float[Array, "N nu"]
    xs: Float[Array, "N_plus_1 nx"]
    lams: Float[Array, "N_plus_1 nx"]  # predicted for the iterate, by the value function of the step before
    # at the iterate before the last move; a converged one does not move
    duals: Point
    kkt_norm: Float[Array, ""]
    # regularisation
    delta: Float[Array, ""]  # multiple of the identity in use
    alpha: Float[Array, ""]  # length of the last step
    stalled: Int[Array, ""]
    finite: Bool[Array, ""]
    num_steps: Int[Array, ""]


class BoxDDP(AbstractSolver):
    """Control-limited differential dynamic programming, for problems (D1) without path or terminal constraints.

    References: see the module.
    """

    curvature: Literal["exact", "gauss_newton"] = "exact"
    """Second derivatives of the dynamics ("exact", DDP) or none ("gauss_newton", iLQR). Where some Q_uu is not positive
    definite, a multiple of the identity is added, the smallest found that does."""
    tol: float = 1e-9
    """Largest entry of the KKT residual at which a solve counts as successful, or what rounding allows if that is
    more: 200·eps·(10 + max|λ|), at most 100·√eps; eps = 2e-16 in float64 and 1e-7 in float32."""
    max_steps: int = 200
    """Largest number of steps: backward passes, each with as many trials of its regularisation as it needs."""

    def __check_init__(self):
        if self.curvature not in ("exact", "gauss_newton"):
            raise ValueError(f"curvature must be 'exact' or 'gauss_newton', not {self.curvature!r}.")
        if not (self.tol > 0 and self.max_steps >= 1):
            raise ValueError("BoxDDP needs tol > 0 and max_steps ≥ 1.")

    def check(self, problem: Problem) -> None:
        if problem.constraints is not None or problem.terminal_constraints is not None:
            raise ValueError("BoxDDP takes control bounds only; use SQP() for constraints and terminal_constraints.")

    def init(self, problem: Problem, theta: Theta, x0: Array, guess: Solution, unroll: bool) -> BoxDDPState:
        xs = rollout(problem, theta, x0, guess.us)
        zero = jnp.zeros((), x0.dtype)
        duals = Point(guess.us, xs, guess.lams, guess.mus, guess.slacks)
        return BoxDDPState(
            guess.us, xs, guess.lams, duals, zero + jnp.inf, delta=zero, alpha=zero + 1.0, stalled=jnp.asarray(0),
            finite=jnp.all(jnp.isfinite(xs)), num_steps=jnp.asarray(0),
        )  # fmt: skip

    def step(self, problem: Problem, theta: Theta, x0: Array, state: BoxDDPState, unroll: bool) -> BoxDDPState:
        duals = Point(state.us, state.xs, state.lams, state.duals.mus, state.duals.slacks)
        expansion = kkt.expand(problem, theta, x0, duals, self.curvature == "exact")
        backward, delta = _definite_backward(problem, expansion, state, unroll)
        duals = _with_multipliers(problem, state, backward, expansion)
        norm = kkt.kkt_norm(kkt.expanded_residual(problem, expansion, duals))
        finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(expansion.lq.Q))
        settled = ~finite | (norm <= kkt_tolerance(self.tol, duals.lams)) & (not unroll)
        us, xs, cost, alpha = _line_search(problem, theta, state, backward, expansion.cost)
        accepted = jnp.all(backward.definite) & (alpha > 0) & ~settled
        lams = _predicted_costates(backward, expansion, xs - state.xs)
        keep = lambda new, old: jnp.where(accepted, new, old)
        progress = accepted & ((norm < 0.99 * state.kkt_norm) | (cost < expansion.cost))
        return BoxDDPState(
            keep(us, state.us), keep(xs, state.xs), jnp.where(accepted, lams, duals.lams), duals, norm,
            delta, alpha=jnp.where(accepted, alpha, 0.0),
            stalled=jnp.where(progress, 0, state.stalled + 1), finite=finite,
            num_steps=state.num_steps + jnp.where(settled, 0, 1),
        )  # fmt: skip

    def running(self, state: BoxDDPState) -> Array:
        return state.finite & (state.kkt_norm > kkt_tolerance(self.tol, state.duals.lams)) & (state.stalled < 20)

    def finish(self, problem: Problem, theta: Theta, x0: Array, state: BoxDDPState) -> Solution:
        converged = state.kkt_norm <= kkt_tolerance(self.tol, state.duals.lams)
        result = RESULTS.where(converged, RESULTS.successful, RESULTS.not_converged)
        result = RESULTS.where(crossed(problem), RESULTS.infeasible, result)
        result = RESULTS.where(state.finite, result, RESULTS.non_finite)
        stats = Stats(state.num_steps, jnp.asarray(0), state.kkt_norm)
        duals = state.duals._replace(us=state.us, xs=state.xs)
        cost = total_cost(problem, theta, state.xs, state.us)
        return Solution(**duals._asdict(), cost=cost, tau=jnp.zeros((), x0.dtype), result=result, stats=stats)


def _definite_backward(
    problem: Problem, expansion: Expansion, state: BoxDDPState, unroll: bool
) -> tuple[Backward, Array]:
    """The backward pass with the smallest regularisation found that makes every Q_uu positive definite."""
    smallest = jax.lax.stop_gradient(least_delta(expansion))
    first = next_delta(state.delta, state.alpha, smallest)
    retry = jnp.maximum(state.delta / 3.0, smallest)
    pass_with = lambda delta: _backward(problem, *jax.lax.stop_gradient((expansion, state.us)), delta)

    def again(carry):
        delta, _ = carry
        delta = jnp.where(delta < 0, first, jnp.maximum(retry, 8.0 * delta))
        return delta, pass_with(delta)

    def lacking(carry):
        delta, backward = carry
        return ~jnp.all(backward.definite) & (delta < 1e12 * smallest)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(pass_with, first))
    delta, backward = jax.lax.while_loop(lacking, again, (-jnp.ones_like(first), nothing))
    return _backward(problem, expansion, state.us, delta) if unroll else backward, delta


def _backward(problem: Problem, expansion: Expansion, us: Array, delta: Array) -> Backward:
    """The recursion from the last stage to the first, with a box QP at each."""
    lq = expansion.lq if expansion.bending is None else kkt.with_bending(expansion)

    def stage(carry, inputs):
        P, p, lam = carry
        (A, B, _, Q, R, S, q, r), low, high = inputs
        gradient, lam = r + B.T @ lam, q + A.T @ lam
        Q_x, Q_u = q + A.T @ p, r + B.T @ p
        Q_uu, Q_ux, Q_xx = R + B.T @ P @ B, S + B.T @ P @ A, Q + A.T @ P @ A
        shifted = delta * B.T
        kff, K, definite = box_qp(
            Q_uu + shifted @ B + delta * jnp.eye(low.shape[0], dtype=low.dtype),
            Q_u, Q_ux + shifted @ A, low, high,
        )  # fmt: skip
        P = Q_xx + K.T @ Q_uu @ K + K.T @ Q_ux + Q_ux.T @ K
        p = Q_x + K.T @ (Q_uu @ kff + Q_u) + Q_ux.T @ kff
        P = 0.5 * (P + P.T)
        return (P, p, lam), Backward(kff, K, P, p, lam, gradient, Q_u @ kff, definite)

    low, high = problem.bounds
    last = lq._replace(Q=lq.Q[:-1], q=lq.q[:-1])
    return jax.lax.scan(stage, (lq.Q[-1], lq.q[-1], lq.q[-1]), (last, low - us, high - us), reverse=True)[1]


def box_qp(
    H: Float[Array, "nu nu"],
    g: Float[Array, " nu"],
    G: Float[Array, "nu nx"],
    low: Float[Array, " nu"],
    high: Float[Array, " nu"],
) -> tuple[Float[Array, " nu"], Float[Array, "nu nx"], Bool[Array, ""]]:
    """Minimise ½ vᵀHv + gᵀv over low ≤ v ≤ high by projected Newton, with the feedback of the free controls.

    Returns:
        v, its derivative K = -H_ff⁻¹G_f in a state that enters the gradient as G δx (zero for clamped controls), and
        whether H is positive definite on the free controls.

    Gradients: for the active set found, which itself is held fixed.
    References: Tassa et al., 2014, section III; Bertsekas, Projected Newton Methods, 1982.
    """
    H_, g_ = jax.lax.stop_gradient((H, g))
    low_, high_ = jax.lax.stop_gradient((low, high))
    lengths = 0.5 ** jnp.arange(8, dtype=g.dtype)
    objective = lambda v: 0.5 * v @ H_ @ v + g_ @ v

    def clamped_at(v):
        gradient = H_ @ v + g_
        return (v <= low_) & (gradient > 0) | (v >= high_) & (gradient < 0)

    def optimal(v):
        gradient = H_ @ v + g_
        return jnp.all(clamped_at(v) | (jnp.abs(gradient) <= 1e-10 * (1.0 + jnp.abs(g_))))

    def newton(carry):
        v, _, count = carry
        clamped = clamped_at(v)
        step = _free_solve(H_, -(H_ @ v + g_)[:, None], clamped)[0][:, 0]
        candidates = jnp.clip(v + lengths[:, None] * step, low_, high_)
        values = jax.vmap(objective)(candidates)
        new = candidates[jnp.argmin(values)]
        improved = jnp.min(values) < objective(v)
        return jnp.where(improved, new, v), ~improved | optimal(new), count + 1

    start = jnp.clip(jnp.zeros_like(g_), low_, high_)
    v, _, _ = jax.lax.while_loop(lambda carry: ~carry[1] & (carry[2] < 20), newton, (start, optimal(start), 0))
    clamped = clamped_at(v)
    at_bound = jnp.where(clamped, jnp.where(v <= low_, low, high), 0.0)
    solved, definite = _free_solve(H, jnp.concatenate([-(g + H @ at_bound)[:, None], -G], axis=1), clamped)
    return jnp.clip(jnp.where(clamped, at_bound, solved[:, 0]), low, high), solved[:, 1:], definite


def _free_solve(H: Array, rhs: Array, clamped: Array) -> tuple[Array, Array]:
    """H_ff⁻¹ rhs_f, zero for the clamped rows; and whether H_ff is positive definite."""
    free = ~clamped
    eye = jnp.eye(H.shape[0], dtype=H.dtype)
    masked = jnp.where(free[:, None] & free[None, :], H, eye)
    halved, pivots = eliminate(masked, jnp.concatenate([jnp.where(free[:, None], rhs, 0.0), eye], axis=1))
    half, root = halved[:, : rhs.shape[1]], halved[:, rhs.shape[1] :]
    floor = 8 * jnp.finfo(H.dtype).eps * jnp.abs(jnp.diagonal(masked))
    return jnp.where(free[:, None], root.T @ half, 0.0), jnp.all(pivots > floor)


def _with_multipliers(problem: Problem, state: BoxDDPState, backward: Backward, expansion: Expansion) -> Point:
    """The iterate with costates from the adjoint recursion and bound multipliers from the gradient there."""
    gradient = backward.gradient
    at_low, at_high = state.us <= problem.u_min, state.us >= problem.u_max
    rows = expansion.rows
    slack = lambda row, bound: jnp.where(jnp.isfinite(bound), -row, 1.0)
    return Point(
        state.us, state.xs, jnp.concatenate([backward.lams, expansion.lq.q[-1:]]),
        mus=Rows(jnp.where(at_low, jnp.maximum(gradient, 0.0), 0.0),
                 jnp.where(at_high, jnp.maximum(-gradient, 0.0), 0.0), rows.path, rows.terminal),
        slacks=Rows(slack(rows.u_min, problem.u_min), slack(rows.u_max, problem.u_max), rows.path, rows.terminal),
    )  # fmt: skip


def _line_search(
    problem: Problem, theta: Theta, state: BoxDDPState, backward: Backward, old_cost: Array
) -> tuple[Array, Array, Array, Array]:
    """Roll out with all step lengths at once, and take the cheapest that falls enough; α = 0 if there is none."""
    lengths = jnp.asarray(_STEP_LENGTHS, old_cost.dtype)

    def forward(alpha):
        def advance(x, stage):
            u, x_old, kff, K, low, high, k = stage
            u = jnp.clip(u + alpha * kff + K @ (x - x_old), low, high)
            x_next = problem.dynamics(x, u, k, theta)
            return x_next, (u, x_next)

        stages = (state.us, state.xs[:-1], backward.kff, backward.K, *problem.bounds, jnp.arange(problem.horizon))
        _, (us, xs) = jax.lax.scan(advance, state.xs[0], stages)
        xs = jnp.concatenate([state.xs[:1], xs])
        return us, xs, total_cost(problem, theta, xs, us)

    us, xs, costs = jax.vmap(forward)(lengths)
    noise = 100 * jnp.finfo(old_cost.dtype).eps * (jnp.abs(old_cost) + 1.0)
    enough = costs <= old_cost + 1e-4 * lengths * jnp.sum(backward.slope) + noise
    ranked = jnp.where(enough & jnp.isfinite(costs), costs - noise * (lengths == 1.0), jnp.inf)
    best = jnp.argmin(jax.lax.stop_gradient(ranked))
    alpha = jnp.where(jnp.isfinite(ranked[best]), lengths[best], 0.0)
    return us[best], xs[best], costs[best], alpha


def _predicted_costates(backward: Backward, expansion: Expansion, dx: Array) -> Array:
    lams = jnp.einsum("kxy,ky->kx", backward.P, dx[:-1]) + backward.p
    return jnp.concatenate([lams, (expansion.lq.Q[-1] @ dx[-1] + expansion.lq.q[-1])[None]])
