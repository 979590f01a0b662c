"""The KKT conditions of (D1): Lagrangian, residual, and the linear-quadratic expansion along a trajectory.

    L = Σ ℓ + ℓ_N + λ_0ᵀ(x̂ - x_0) + Σ_k λ_{k+1}ᵀ(f(x_k, u_k) - x_{k+1}) + μᵀh                                      (D2)

One residual r(z, θ), z = (us, xs, λ, μ, t), decides convergence, is what sensitivities differentiate, and is what
tests check.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sartor.problem import Problem, Theta, penalties, total_cost
from sartor.solution import Rows


class Point(NamedTuple):
    """Primal and dual variables z of (D1)."""

    us: Array  # (N, nu)
    xs: Array  # (N+1, nx)
    lams: Array  # (N+1, nx)
    mus: Rows
    slacks: Rows


class Residual(NamedTuple):
    """r(z, θ), zero at a solution."""

    us: Array  # (N, nu), ∂L/∂u_k
    xs: Array  # (N+1, nx), ∂L/∂x_k
    lams: Array  # (N+1, nx), ∂L/∂λ: x̂ - x_0 and f(x_k, u_k) - x_{k+1}
    rows: Rows  # hard rows h + t; soft rows (h + t)ν - τ, ν = linear + quadratic·(h + t) - μ
    complementarity: Rows  # μ·t - τ


class LQ(NamedTuple):
    """A linear-quadratic problem, or the expansion of (D1) around a trajectory in deviations from it.

    min  Σ_{k<N} ½ [x;u]ᵀ [Q Sᵀ; S R] [x;u] + qᵀx + rᵀu   + ½ x_Nᵀ Q_N x_N + q_Nᵀ x_N
    s.t. x_{k+1} = A_k x_k + B_k u_k + c_k                                                                      (D3)
    """

    A: Float[Array, "N nx nx"]
    B: Float[Array, "N nx nu"]
    c: Float[Array, "N nx"]
    Q: Float[Array, "N_plus_1 nx nx"]
    R: Float[Array, "N nu nu"]
    S: Float[Array, "N nu nx"]
    q: Float[Array, "N_plus_1 nx"]
    r: Float[Array, "N nu"]


class Jacobian(NamedTuple):
    """Derivatives of the path and terminal rows; those of the bounds are ∓1 and are not stored."""

    x: Float[Array, "N nh nx"]
    u: Float[Array, "N nh nu"]
    terminal: Float[Array, "nhN nx"]


class Hessian(NamedTuple):
    """Blocks of a stage Hessian [Q Sᵀ; S R]."""

    Q: Float[Array, "N_plus_1 nx nx"]
    R: Float[Array, "N nu nu"]
    S: Float[Array, "N nu nx"]


class Expansion(NamedTuple):
    """Everything a Newton-type step needs at a point."""

    lq: LQ  # with the Hessian of the cost alone (Gauss-Newton)
    bending: Hessian | None  # what dynamics and constraints add to it: Σ λ∇²f + μ∇²h
    x0_gap: Array  # (nx,), x̂ - x_0
    rows: Rows
    jacobian: Jacobian
    cost: Array  # Σ ℓ + ℓ_N, without penalties


def rows(problem: Problem, theta: Theta, xs: Array, us: Array) -> Rows:
    """All inequalities, feasible where ≤ 0: u_min - u, u - u_max, h, h_N. Infinite bounds give -1."""
    stages = jnp.arange(problem.horizon)
    return Rows(
        u_min=_finite(problem.u_min - us),
        u_max=_finite(us - problem.u_max),
        path=jax.vmap(lambda x, u, k: problem.path_rows(x, u, k, theta))(xs[:-1], us, stages),
        terminal=problem.terminal_rows(xs[-1], theta),
    )


def bounded(problem: Problem) -> Rows:
    """Which inequalities exist at all (True), an infinite bound being none; broadcastable against `Rows`."""
    low, high = problem.bounds
    return Rows(jnp.isfinite(low), jnp.isfinite(high), jnp.asarray(True), jnp.asarray(True))


def lagrangian(problem: Problem, theta: Theta, x0: Array, point: Point) -> Float[Array, ""]:
    """The Lagrangian (D2); the penalties of soft rows enter through their multipliers."""
    us, xs, lams, mus, _ = point
    value = total_cost(without_rows(problem), theta, xs, us) + jnp.sum(dynamics_gap(problem, theta, x0, xs, us) * lams)
    h = rows(problem, theta, xs, us)
    return value + sum(jnp.sum(mu * row) for mu, row in zip(jax.tree.leaves(mus), jax.tree.leaves(h), strict=True))


def without_rows(problem: Problem) -> Problem:
    """The problem without its path and terminal rows."""
    return Problem(
        dynamics=problem.dynamics, stage_cost=problem.stage_cost, terminal_cost=problem.terminal_cost,
        horizon=problem.horizon, u_min=problem.u_min, u_max=problem.u_max,
    )  # fmt: skip


def dynamics_gap(problem: Problem, theta: Theta, x0: Array, xs: Array, us: Array) -> Float[Array, "N_plus_1 nx"]:
    """Equality residuals x̂ - x_0 and f(x_k, u_k, k, θ) - x_{k+1}."""
    x_next = jax.vmap(lambda x, u, k: problem.dynamics(x, u, k, theta))(xs[:-1], us, jnp.arange(problem.horizon))
    return jnp.concatenate([x0[None], x_next]) - xs


def residual(problem: Problem, theta: Theta, x0: Array, point: Point, tau: Array | float = 0.0) -> Residual:
    """The KKT residual r(z, θ) of (D1) with barrier τ.

    Differentiable in every argument, `u_min` and `u_max` and the penalties of `problem` included.
    """
    gradient = jax.grad(lambda us, xs: lagrangian(problem, theta, x0, point._replace(us=us, xs=xs)), argnums=(0, 1))
    h = rows(problem, theta, point.xs, point.us)
    gap = dynamics_gap(problem, theta, x0, point.xs, point.us)
    stationarity_us, stationarity_xs = gradient(point.us, point.xs)
    row_residuals, products = _row_residuals(problem, h, point, tau)
    return Residual(stationarity_us, stationarity_xs, gap, row_residuals, products)


def expanded_residual(problem: Problem, expansion: Expansion, point: Point, tau: Array | float = 0.0) -> Residual:
    """The same residual, where an expansion is at hand: without another derivative of the user's functions."""
    lq = expansion.lq
    row_us, row_xs = rows_cotangent(expansion.jacobian, point.mus)
    dual_us = jnp.einsum("kxu,kx->ku", lq.B, point.lams[1:])
    dual_xs = jnp.einsum("kyx,ky->kx", lq.A, point.lams[1:])
    xs = lq.q + row_xs - point.lams + jnp.concatenate([dual_xs, jnp.zeros_like(point.xs[:1])])
    gap = jnp.concatenate([expansion.x0_gap[None], lq.c])
    row_residuals, products = _row_residuals(problem, expansion.rows, point, tau)
    return Residual(lq.r + row_us + dual_us, xs, gap, row_residuals, products)


def kkt_norm(r: Residual) -> Float[Array, ""]:
    """Largest absolute entry of the residual."""
    # Empty leaves are left out: the derivative of a maximum over nothing is 0/0.
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(r) if leaf.size]))


def expand(problem: Problem, theta: Theta, x0: Array, point: Point, exact: bool) -> Expansion:
    """Linear-quadratic expansion of (D1) at `point`, in deviations from its trajectory.

    q, r are gradients of the cost alone, so multipliers of the expansion are those of (D1) itself, not increments.
    The second derivatives of dynamics and constraints are computed if `exact`, and are kept apart from those of the
    cost: see `with_bending`. Dynamics may expand themselves, by a method `expand_step(x, u, k, theta, lam)` with what
    `_expand_dynamics` returns.
    """
    nx, num_stages = point.xs.shape[1], problem.horizon

    def stage(x, u, k, lam, mu):
        def first_order(w):
            cost, gradient = jax.value_and_grad(lambda w: problem.stage_cost(w[:nx], w[nx:], k, theta))(w)
            h, dual = _with_dual(lambda w: problem.path_rows(w[:nx], w[nx:], k, theta), w, mu, exact)
            return (h, gradient, dual), (h, gradient, cost)

        x_next, F, bend = _expand_dynamics(problem, theta, x, u, k, lam if exact else None)
        (G, H, bend_rows), (h, gradient, cost) = jax.jacfwd(first_order, has_aux=True)(jnp.concatenate([x, u]))
        return (F, G, H, bend + bend_rows), (x_next, h, gradient, cost)

    def final(x):
        cost, gradient = jax.value_and_grad(problem.terminal_cost)(x, theta)
        h, dual = _with_dual(lambda x: problem.terminal_rows(x, theta), x, point.mus.terminal, exact)
        return (h, gradient, dual), (h, gradient, cost)

    (F, G, H, bend), (x_next, h, gradient, costs) = jax.vmap(stage)(
        point.xs[:-1], point.us, jnp.arange(num_stages), point.lams[1:], point.mus.path
    )
    (GN, HN, bendN), (hN, gradientN, costN) = jax.jacfwd(final, has_aux=True)(point.xs[-1])
    q, r = jnp.concatenate([gradient[:, :nx], gradientN[None]]), gradient[:, nx:]
    lq = LQ(F[:, :, :nx], F[:, :, nx:], x_next - point.xs[1:], **_blocks(H, HN, nx)._asdict(), q=q, r=r)
    bounds = _finite(problem.u_min - point.us), _finite(point.us - problem.u_max)
    return Expansion(
        lq,
        _blocks(bend, bendN, nx) if exact else None,
        x0 - point.xs[0],
        Rows(*bounds, path=h, terminal=hN),
        Jacobian(G[:, :, :nx], G[:, :, nx:], GN),
        jnp.sum(costs) + costN,
    )


def _expand_dynamics(
    problem: Problem, theta: Theta, x: Array, u: Array, k: Array, lam: Array | None
) -> tuple[Array, Array, Array]:
    """The next state, its Jacobian in w = [x; u], and the Hessian of λᵀx_next in w, zero without λ."""
    w, nx = jnp.concatenate([x, u]), x.shape[0]
    own = getattr(problem.dynamics, "expand_step", None)
    if own is not None:
        return own(x, u, k, theta, lam)

    def first_order(w):
        step = lambda w: problem.dynamics(w[:nx], w[nx:], k, theta)
        x_next, dual = _with_dual(step, w, lam, lam is not None)
        return (x_next, dual), x_next

    (F, bend), x_next = jax.jacfwd(first_order, has_aux=True)(w)
    return x_next, F, bend


def with_bending(expansion: Expansion) -> LQ:
    """The LQ problem with the exact Hessian of the Lagrangian (D2)."""
    lq, bending = expansion.lq, expansion.bending
    assert bending is not None
    return lq._replace(Q=lq.Q + bending.Q, R=lq.R + bending.R, S=lq.S + bending.S)


def rows_tangent(jacobian: Jacobian, us: Array, xs: Array) -> Rows:
    """G dz: change of all rows for a change of the trajectory."""
    path = jnp.einsum("khx,kx->kh", jacobian.x, xs[:-1]) + jnp.einsum("khu,ku->kh", jacobian.u, us)
    return Rows(u_min=-us, u_max=us, path=path, terminal=jacobian.terminal @ xs[-1])


def rows_cotangent(jacobian: Jacobian, mus: Rows) -> tuple[Array, Array]:
    """Gᵀμ as (us, xs): what row multipliers add to the stationarity conditions."""
    us = mus.u_max - mus.u_min + jnp.einsum("khu,kh->ku", jacobian.u, mus.path)
    xs = jnp.einsum("khx,kh->kx", jacobian.x, mus.path)
    return us, jnp.concatenate([xs, (mus.terminal @ jacobian.terminal)[None]])


def add_row_curvature(lq: LQ, jacobian: Jacobian, D: Rows) -> LQ:
    """H + Gᵀ D G for a diagonal D ≥ 0 of the rows."""
    scaled = D.path[:, :, None] * jacobian.u
    R = lq.R + jnp.einsum("khu,khv->kuv", jacobian.u, scaled)
    R = R + (D.u_min + D.u_max)[:, :, None] * jnp.eye(lq.r.shape[1], dtype=lq.r.dtype)
    S = lq.S + jnp.einsum("khu,khx->kux", scaled, jacobian.x)
    Q = jnp.einsum("khx,kh,khy->kxy", jacobian.x, D.path, jacobian.x)
    QN = jnp.einsum("hx,h,hy->xy", jacobian.terminal, D.terminal, jacobian.terminal)
    return lq._replace(Q=lq.Q + jnp.concatenate([Q, QN[None]]), R=R, S=S)


def soft_terms(problem: Problem, like: Rows) -> tuple[Rows, Rows]:
    """Linear and quadratic penalty of every row in the shape of `like`; inf for hard rows and for all bounds."""
    num_stages, nh = like.path.shape
    linear, quadratic = penalties(problem, nh, like.terminal.shape[0], like.u_min.dtype)
    hard = jnp.full_like(like.u_min, jnp.inf)

    def split(flat):
        return Rows(hard, hard, flat[: num_stages * nh].reshape(num_stages, nh), flat[num_stages * nh :])

    return split(linear), split(quadratic)


def _row_residuals(problem: Problem, h: Rows, point: Point, tau: Array | float) -> tuple[Rows, Rows]:
    exist = bounded(problem)

    def feasibility(row, mu, t, linear, quadratic, on):
        soft = jnp.isfinite(linear)
        linear, quadratic = jnp.where(soft, linear, 0.0), jnp.where(soft, quadratic, 0.0)
        violation = row + t
        nu = linear + quadratic * violation - mu
        # Without a linear part the violation has no multiplier of its own: nu = 0 is an equation.
        softened = jnp.where(linear > 0, violation * nu - tau, -nu)
        return jnp.where(on, jnp.where(soft, softened, violation), 0.0)

    rows = jax.tree.map(feasibility, h, point.mus, point.slacks, *soft_terms(problem, h), exist)
    products = jax.tree.map(lambda mu, t, on: jnp.where(on, mu * t - tau, mu), point.mus, point.slacks, exist)
    return rows, products


def _with_dual(equations: Callable, w: Array, duals: PyTree, exact: bool) -> tuple[PyTree, Array]:
    """Values of the equations, and their Jacobian's transpose times `duals` (zero unless `exact`)."""
    if not exact:
        return equations(w), jnp.zeros_like(w)
    values, pullback = jax.vjp(equations, w)
    return values, pullback(duals)[0]


def _blocks(H: Array, HN: Array, nx: int) -> Hessian:
    return Hessian(Q=jnp.concatenate([H[:, :nx, :nx], HN[None]]), R=H[:, nx:, nx:], S=H[:, nx:, :nx])


def _finite(row: Array) -> Array:
    return jnp.where(jnp.isfinite(row), row, -1.0)
