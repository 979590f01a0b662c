"""Implicit differentiation at a solution: the KKT matrix once, then any number of right-hand sides.

With the residual r(z, θ) of `kkt.residual`, zero at the solution, dz = -(∂r/∂z)⁻¹ (∂r/∂θ) dθ. Complementarity is
eliminated row by row, which leaves a symmetric system on the stage structure:

    [H  Fᵀ  Gᵀ] [dz]      H: Hessian of the Lagrangian, F: dynamics, G: active rows,
    [F  0   0 ] [dλ] = b   W = 0 for a row that is active, 1/quadratic for a soft one that is violated,            (D7)
    [G  0  -W ] [dμ]       W = slack/multiplier of every row for a barrier τ > 0.
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from sartor import kkt
from sartor.kkt import LQ, Jacobian, Point, Residual
from sartor.problem import Problem, Theta, cast
from sartor.riccati import Factors, Trajectory, apply_kkt, factor, solve_kkt
from sartor.solution import RESULTS, Rows, Solution, SolveError

Curvature = Literal["exact", "gauss_newton"]


class Direction(NamedTuple):
    """A vector of (D7)."""

    us: Float[Array, "N nu"]
    xs: Float[Array, "N_plus_1 nx"]
    lams: Float[Array, "N_plus_1 nx"]
    mus: Rows


class Linearisation(NamedTuple):
    """The matrix of (D7) at a solution, factorised."""

    lq: LQ
    jacobian: Jacobian
    active: Rows
    """Whether a row takes part in (D7)."""
    compliance: Rows
    """W."""
    row_scale: Rows
    """1/(∂r/∂h) of the row residual r."""
    given_scale: Rows
    """1/s of a violated row with a linear penalty alone, whose multiplier no trajectory changes; else 0."""
    relaxation: Rows
    """Slack over multiplier of the active rows: 0 unless there is a barrier."""
    factors: Factors
    stiffness: Rows
    """Weight 1/(W + small) with which the active rows enter the Riccati recursion; refinement removes the small."""
    converged: Bool[Array, ""]
    """Whether the KKT residual at the point is that of a solution."""
    regular: Bool[Array, ""]
    """Whether the derivative exists: converged, a strict minimiser, independent active rows, strict complementarity."""


def linearise(problem: Problem, theta: Theta, sol: Solution, curvature: Curvature = "exact") -> Linearisation:
    """Factorise the KKT matrix (D7) at a solution.

    Args:
        problem: The problem solved.
        theta: Its parameters.
        sol: Its solution, from `solve`.
        curvature: "exact", or "gauss_newton" to drop second derivatives of dynamics and constraints, as Amos et al.
            (2018) do; then derivatives are approximate unless both are linear.

    Fails: never raises; `regular` is False where no derivative exists or the solve had failed.
    """
    if curvature not in ("exact", "gauss_newton"):
        raise ValueError(f"curvature must be 'exact' or 'gauss_newton', not {curvature!r}.")
    sol, problem = sanitised(sol), cast(problem, sol.us.dtype)
    point = Point(sol.us, sol.xs, sol.lams, sol.mus, sol.slacks)
    expansion = kkt.expand(problem, theta, sol.xs[0], point, curvature == "exact")
    lq, jacobian = kkt.with_bending(expansion) if curvature == "exact" else expansion.lq, expansion.jacobian
    active, compliance, row_scale, given_scale, relaxation, strict = _active_rows(problem, expansion.rows, sol)
    small = float(jnp.finfo(sol.us.dtype).eps) ** 0.5
    hessian = jnp.maximum(jnp.max(jnp.abs(lq.Q)), jnp.max(jnp.abs(lq.R))) + small
    one = jnp.ones((), sol.us.dtype)
    path = jnp.sum(jacobian.x**2, -1) + jnp.sum(jacobian.u**2, -1)
    squares = Rows(u_min=one, u_max=one, path=path, terminal=jnp.sum(jacobian.terminal**2, -1))
    stiffness = jax.tree.map(
        lambda on, w, square: jnp.where(on, 1.0 / (w + small * (square + small) / hessian), 0.0),
        active, compliance, squares,
    )  # fmt: skip
    factors = factor(kkt.add_row_curvature(lq, jacobian, stiffness))
    norm = kkt.kkt_norm(kkt.expanded_residual(problem, expansion, point, sol.tau))
    converged = sol.successful & (norm <= 1e3 * small)
    regular = factors.regular & strict & converged
    lin = Linearisation(
        lq, jacobian, active, compliance, row_scale, given_scale, relaxation, factors, stiffness, converged, regular
    )
    return lin._replace(regular=regular & _independent_rows(lin))


def apply(lin: Linearisation, d: Direction) -> Direction:
    """The symmetric matrix of (D7) times d."""
    z = apply_kkt(lin.lq, Trajectory(d.us, d.xs, d.lams))
    masked = jax.tree.map(lambda on, mu: jnp.where(on, mu, 0.0), lin.active, d.mus)
    row_us, row_xs = kkt.rows_cotangent(lin.jacobian, masked)
    ahead = kkt.rows_tangent(lin.jacobian, d.us, d.xs)
    rows = jax.tree.map(
        lambda on, row, w, mu: jnp.where(on, row - w * mu, -mu), lin.active, ahead, lin.compliance, d.mus
    )
    return Direction(z.us + row_us, z.xs + row_xs, z.lams, rows)


def solve_linearised(lin: Linearisation, rhs: Direction) -> Direction:
    """Solve (D7) by the factorisation at hand, with up to three steps of iterative refinement.

    Gradients: linear in `rhs` and, through `apply`, right in the matrix too.
    Fails: NaN where `lin.regular` is False and `rhs` is not zero. A zero right-hand side gives zero, so that a failed
    sample whose cotangent is masked out does not spoil the gradient of a batch.
    """

    # One vector, since the transpose rule of JAX's linear solve wants every leaf of the right-hand side perturbed.
    flat, unravel = ravel_pytree(rhs)

    def solve(_, b: Array) -> Array:
        d, _ = ravel_pytree(_refined_solve(lin, unravel(b)))
        return jnp.where(lin.regular, d, jnp.where(jnp.any(b != 0), jnp.nan, 0.0))

    matrix = lambda d: ravel_pytree(apply(lin, unravel(d)))[0]
    return unravel(jax.lax.custom_linear_solve(matrix, flat, solve, symmetric=True))


def right_hand_side(lin: Linearisation, r: Residual) -> Direction:
    """That of (D7) for a tangent `r` of the residual at fixed z."""
    shifts, given = _row_tangents(lin, r)
    row_us, row_xs = kkt.rows_cotangent(lin.jacobian, given)
    rows = jax.tree.map(lambda on, shift, mu: jnp.where(on, -shift, -mu), lin.active, shifts, given)
    return Direction(-r.us - row_us, -r.xs - row_xs, -r.lams, rows)


def solution_tangent(lin: Linearisation, r: Residual) -> Point:
    """Tangent of the solution for a tangent `r` of the residual at fixed z: dz = -(∂r/∂z)⁻¹ r."""
    d = solve_linearised(lin, right_hand_side(lin, r))
    shifts, _ = _row_tangents(lin, r)
    free = jax.tree.map(lambda mu, g: jnp.where(g == 0, 1.0, 0.0), d.mus, lin.given_scale)
    slacks = jax.tree.map(
        lambda on, mu, ratio, row, shift, free: jnp.where(on, -ratio * mu, -free * (row + shift)),
        lin.active, d.mus, lin.relaxation, kkt.rows_tangent(lin.jacobian, d.us, d.xs), shifts, free,
    )  # fmt: skip
    return Point(d.us, d.xs, d.lams, d.mus, slacks)


def _row_tangents(lin: Linearisation, r: Residual) -> tuple[Rows, Rows]:
    """How far rows move, and the multipliers of those that have a given one."""
    return jax.tree.map(jnp.multiply, r.rows, lin.row_scale), jax.tree.map(jnp.multiply, r.rows, lin.given_scale)


def error_sensitivity(
    problem: Problem, theta: Theta, sol: Solution, curvature: Curvature = "exact"
) -> Float[Array, "nu N nx"]:
    """du_0/de: how the first control answers to a defect of the prediction, x_{k+1} = f(x_k, u_k, k, θ) + e_{k+1}.

    Entry [j, k, i] is ∂u_0[j]/∂e_{k+1}[i], in units of control j over units of state i. The defect enters only the
    dynamics rows of (D7), so one adjoint solve for each control gives all of it.

    Args:
        problem: The problem solved.
        theta: Its parameters.
        sol: Its solution.
        curvature: See `linearise`.

    Returns: (nu, N, nx). For errors of the trajectory instead of defects see `trajectory_error`.
    Fails: raises `SolveError` where no derivative exists; inside `jit` or `vmap` it returns NaN, and `regularity`
        gives the reason.
    References: Węgrzynowski et al., Learning What Matters, eq. (4) and section III-A.
    """
    du0_de, status = _error_sensitivity(problem, theta, sol, curvature)
    refuse(status)
    return du0_de


def first_control_adjoint(lin: Linearisation) -> Direction:
    """The columns of the inverse of (D7) that belong to u_0, stacked along a new first axis (nu, ...)."""
    nu = lin.lq.r.shape[1]
    zero = Direction(*jax.tree.map(jnp.zeros_like, (lin.lq.r, lin.lq.q, lin.lq.q, lin.compliance)))
    return jax.vmap(lambda v: solve_linearised(lin, zero._replace(us=zero.us.at[0].set(v))))(
        jnp.eye(nu, dtype=zero.us.dtype)
    )


def trajectory_error(A: Float[Array, "N nx nx"], defect: Float[Array, "... N nx"]) -> Float[Array, "... N nx"]:
    """Sensitivity to an error ê of the predicted trajectory from that to a defect e of its dynamics.

    If the prediction seen at stage k is off by ê_k but the error does not propagate, then e_{k+1} = ê_{k+1} - A_k ê_k,
    so g_k ← g_k - A_kᵀ g_{k+1} for k < N, and g_N stays. What the error does to A_k itself is left out, which is exact
    for linear dynamics.

    Args:
        A: State Jacobians of the dynamics at the solution.
        defect: Sensitivity to the defects e_1 to e_N, from `error_sensitivity`.

    Returns: the same shape and units, for ê_1 to ê_N.
    References: Węgrzynowski et al., Learning What Matters, eq. (4), with e read as x̂ - x; (D9).
    """
    ahead = jnp.einsum("kyx,...ky->...kx", A[1:], defect[..., 1:, :])
    return defect.at[..., :-1, :].add(-ahead)


def action_hessian(problem: Problem, lin: Linearisation, sol: Solution) -> Float[Array, "nu nu"]:
    """Λ = R_0 + B_0ᵀP_1B_0, the Hessian of the optimal cost in u_0 when u_0 is chosen and the rest is optimised.

    Active rows of the later stages are kept; bounds and hard rows of stage 0 do not count.
    """
    B, G = lin.lq.B[0], lin.jacobian.u[0]
    soft = jnp.isfinite(kkt.soft_terms(problem, sol.mus)[0].path[0])
    # A soft row that is held at its kink has a jump of the slope there, and no curvature.
    D = jnp.where(soft & (lin.compliance.path[0] > 0), lin.stiffness.path[0], 0.0)
    return lin.lq.R[0] + B.T @ lin.factors.P[1] @ B + G.T @ (D[:, None] * G)


@eqx.filter_jit
def regularity(problem: Problem, theta: Theta, sol: Solution, curvature: Curvature = "exact") -> RESULTS:
    """Whether the solution can be differentiated: its own status, or `singular` where the KKT matrix is."""
    return reason(sol, linearise(problem, theta, sol, curvature))


def refuse(status: RESULTS) -> None:
    """Raise, outside of transformations, where there is no derivative to give."""
    failed = status != RESULTS.successful
    if not isinstance(failed, Tracer) and bool(jnp.any(failed)):
        raise SolveError(f"No derivative at this solution. {RESULTS[status] if failed.ndim == 0 else ''}")


def reason(sol: Solution, lin: Linearisation) -> RESULTS:
    """The status of a derivative: that of the solve, `not_converged` where that stopped early, or `singular`."""
    status = RESULTS.where(lin.regular, RESULTS.successful, RESULTS.singular)
    status = RESULTS.where(lin.converged, status, RESULTS.not_converged)
    return RESULTS.where(sol.successful, status, sol.result)


@eqx.filter_jit
def _error_sensitivity(problem, theta, sol, curvature) -> tuple[Array, RESULTS]:
    lin = linearise(problem, theta, sol, curvature)
    return -first_control_adjoint(lin).lams[:, 1:], reason(sol, lin)


def _active_rows(problem: Problem, h: Rows, sol: Solution) -> tuple[Rows, Rows, Rows, Rows, Rows, Bool[Array, ""]]:
    """`active`, `compliance`, `row_scale`, `given_scale`, `relaxation` of a `Linearisation`; strict complementarity."""
    smooth = sol.tau > 0
    edge = 10.0 * float(jnp.finfo(sol.us.dtype).eps) ** 0.375

    def one(h, mu, t, linear, quadratic, exist):
        soft = jnp.isfinite(linear)
        linear, quadratic = jnp.where(soft, linear, 0.0), jnp.where(soft, quadratic, 0.0)
        with_nu = soft & (linear > 0)
        s = jnp.where(soft, h + t, 0.0)
        nu = jnp.where(with_nu, linear + quadratic * s - mu, 0.0)
        slope = jnp.where(with_nu, nu + quadratic * s, jnp.where(soft, -quadratic, 1.0))
        violated = soft & (~with_nu | (s > nu))
        given = exist & ~smooth & violated & (quadratic == 0)
        active = exist & (smooth | (mu > t)) & ~given
        inverse = jnp.where(quadratic > 0, 1.0 / jnp.where(quadratic > 0, quadratic, 1.0), 0.0)
        ratio = jnp.where(active & smooth, t / jnp.where(mu == 0, 1.0, mu), 0.0)
        yielding = jnp.where(with_nu, s / jnp.where(slope == 0, 1.0, slope), jnp.where(soft, inverse, 0.0))
        compliance = jnp.where(smooth, ratio + yielding, jnp.where(violated, inverse, 0.0))
        row_scale = jnp.where(given | (slope == 0), 0.0, 1.0 / jnp.where(slope == 0, 1.0, slope))
        given_scale = jnp.where(given, 1.0 / jnp.where(s == 0, 1.0, s), 0.0)
        decided = (jnp.maximum(mu, t) > edge) & (~with_nu | (jnp.maximum(s, nu) > edge))
        return (
            active,
            jnp.where(active, compliance, 0.0),
            row_scale,
            given_scale,
            ratio,
            decided | smooth | ~exist,
        )

    exist = jax.tree.map(lambda on, row: jnp.broadcast_to(on, row.shape), kkt.bounded(problem), h)
    columns = jax.tree.map(one, h, sol.mus, sol.slacks, *kkt.soft_terms(problem, h), exist)
    per_field = [[getattr(columns, name)[i] for name in ("u_min", "u_max", "path", "terminal")] for i in range(6)]
    *fields, decided = (Rows(*values) for values in per_field)
    strict = jnp.all(jnp.stack([jnp.all(leaf) for leaf in jax.tree.leaves(decided)]))
    active, compliance, row_scale, given_scale, relaxation = fields
    return active, compliance, row_scale, given_scale, relaxation, strict


def _refined_solve(lin: Linearisation, b: Direction) -> Direction:
    largest = lambda tree: jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)]))
    enough = 100 * jnp.finfo(b.us.dtype).eps * largest(b)

    def refine(state):
        d, rest, count = state
        d = jax.tree.map(jnp.add, d, _approximate_inverse(lin, rest))
        return d, jax.tree.map(jnp.subtract, b, apply(lin, d)), count + 1

    start = jax.tree.map(jnp.zeros_like, b), b, 0
    return jax.lax.while_loop(lambda state: (state[2] < 4) & (largest(state[1]) > enough), refine, start)[0]


def _approximate_inverse(lin: Linearisation, b: Direction) -> Direction:
    """Riccati solve with active rows as stiff springs instead of equations."""
    pull = jax.tree.map(jnp.multiply, lin.stiffness, b.mus)
    row_us, row_xs = kkt.rows_cotangent(lin.jacobian, pull)
    z = solve_kkt(lin.factors, Trajectory(b.us + row_us, b.xs + row_xs, b.lams))
    ahead = kkt.rows_tangent(lin.jacobian, z.us, z.xs)
    mus = jax.tree.map(lambda on, D, row, b: jnp.where(on, D * (row - b), -b), lin.active, lin.stiffness, ahead, b.mus)
    return Direction(z.us, z.xs, z.lams, mus)


def _independent_rows(lin: Linearisation) -> Bool[Array, ""]:
    """Whether the active path rows are linearly independent, by solving (D7) for a generic right-hand side."""
    if lin.active.path.size + lin.active.terminal.size == 0:
        return jnp.asarray(True)
    generic = lambda row: jnp.cos(1.7 * jnp.arange(1, row.size + 1, dtype=lin.lq.q.dtype)).reshape(row.shape)
    nothing = jnp.zeros_like(lin.lq.q)
    b = Direction(jnp.zeros_like(lin.lq.r), nothing, nothing, jax.tree.map(generic, lin.active))
    lin = jax.lax.stop_gradient(lin)  # a choice
    rest = jax.tree.map(jnp.subtract, b, apply(lin, _refined_solve(lin, b)))
    worst = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(rest)]))
    return worst < 100 * float(jnp.finfo(worst.dtype).eps) ** 0.5


def sanitised(sol: Solution) -> Solution:
    """Zeros for what is not finite in a failed solution: NaN times a zero cotangent would still be NaN."""
    clean = lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0.0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf
    return jax.tree.map(clean, sol)
