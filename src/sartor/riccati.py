"""The linear-quadratic subproblem (D3): factor once, solve for many right-hand sides.

The Riccati recursion eliminates the KKT matrix of (D3) stage by stage, from the last one:

    Λ = R + BᵀPB,   K = -Λ⁻¹(S + BᵀPA),   P ← Q + AᵀPA + (S + BᵀPA)ᵀK                                              (D4)

References: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, Module 1 and Algorithm 1;
Särkkä and García-Fernández, Temporal Parallelization of Dynamic Programming and LQ Optimal Control, 2023 (the
associative scan).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from sartor.kkt import LQ


class Factors(NamedTuple):
    """The factorised KKT matrix of one (D3)."""

    A_cl: Float[Array, "N nx nx"]
    """Closed loop A + BK."""
    B: Float[Array, "N nx nu"]
    K: Float[Array, "N nu nx"]
    P: Float[Array, "N_plus_1 nx nx"]
    """Value function ½ xᵀP_k x + p_kᵀx."""
    root: Float[Array, "N nu nu"]
    """Λ⁻¹ = rootᵀ root, with Λ the Hessian of the cost-to-go in u_k. Applied as two factors it is as good as a backward
    solve where Λ is stiff in some directions, as at active rows; the product would not be."""
    regular: Bool[Array, ""]
    """Whether every Λ is positive definite, so that the solution is the unique strict minimiser."""


class Trajectory(NamedTuple):
    """A solution of (D3)."""

    us: Float[Array, "N nu"]
    xs: Float[Array, "N_plus_1 nx"]
    lams: Float[Array, "N_plus_1 nx"]


def factor(lq: LQ, parallel: bool = False) -> Factors:
    """Factorise the KKT matrix of (D3) by the Riccati recursion (D4). Only A, B, Q, R, S of `lq` are read.

    Args:
        lq: The problem. Q_k need not be definite; what must be positive definite is every Λ_k.
        parallel: Use an associative scan, of depth log N instead of N and a few times the work: for long horizons on
            parallel hardware. It needs every R_k to be invertible by itself.

    Fails: never raises; `regular` is False where some Λ is not positive definite.
    """
    nu = lq.B.shape[2]
    F = jnp.concatenate([lq.B, lq.A], axis=2)
    upper, lower = jnp.concatenate([lq.R, lq.S], 2), jnp.concatenate([jnp.swapaxes(lq.S, 1, 2), lq.Q[:-1]], 2)
    stages = (F, jnp.concatenate([upper, lower], axis=1))
    if parallel:
        P = _parallel_values(lq)
        _, root, half, definite = jax.vmap(lambda P, stage: _eliminate_controls(P, stage, nu))(P[1:], stages)
    else:

        def backward(P, stage):
            P, root, half, definite = _eliminate_controls(P, stage, nu)
            return P, (P, root, half, definite)

        _, (P, root, half, definite) = jax.lax.scan(backward, lq.Q[-1], stages, reverse=True)
        P = jnp.concatenate([P, lq.Q[-1:]])
    K = -jnp.einsum("kvu,kvx->kux", root, half)
    return Factors(lq.A + lq.B @ K, lq.B, K, P, root, jnp.all(definite) & jnp.all(jnp.isfinite(P)))


def backsolve(factors: Factors, q: Array, r: Array, c: Array, x0: Array, parallel: bool = False) -> Trajectory:
    """Solve (D3) for one right-hand side with a factorisation at hand: one matrix-vector product a stage each way.

    Args:
        factors: From `factor`.
        q: Linear state cost, (N+1, nx).
        r: Linear control cost, (N, nu).
        c: Offset of the dynamics, (N, nx).
        x0: Initial state, (nx,).
        parallel: Associative scans instead of sequential ones.

    Gradients: linear in q, r, c, x0; both modes.
    """
    A_cl, B, K, P, root, _ = factors
    Pc = jnp.einsum("kxy,ky->kx", P[1:], c)
    drive = q[:-1] + jnp.einsum("kux,ku->kx", K, r) + jnp.einsum("kyx,ky->kx", A_cl, Pc)
    p = _affine_scan(jnp.swapaxes(A_cl, 1, 2), drive, q[-1], reverse=True, parallel=parallel)
    half = jnp.einsum("kvu,ku->kv", root, r + jnp.einsum("kxu,kx->ku", B, p[1:] + Pc))
    kff = -jnp.einsum("kvu,kv->ku", root, half)
    xs = _affine_scan(A_cl, jnp.einsum("kxu,ku->kx", B, kff) + c, x0, reverse=False, parallel=parallel)
    us = jnp.einsum("kux,kx->ku", K, xs[:-1]) + kff
    return Trajectory(us, xs, jnp.einsum("kxy,ky->kx", P, xs) + p)


def apply_kkt(lq: LQ, z: Trajectory) -> Trajectory:
    """The KKT matrix of (D3), symmetric, times z: gradient of its Lagrangian without the constant terms."""
    us, xs, lams = z
    Q_xs = jnp.einsum("kxy,ky->kx", lq.Q, xs)
    x_rows = jnp.einsum("kux,ku->kx", lq.S, us) + jnp.einsum("kyx,ky->kx", lq.A, lams[1:])
    dynamics = jnp.einsum("kxy,ky->kx", lq.A, xs[:-1]) + jnp.einsum("kxu,ku->kx", lq.B, us)
    return Trajectory(
        us=jnp.einsum("kuv,kv->ku", lq.R, us)
        + jnp.einsum("kux,kx->ku", lq.S, xs[:-1])
        + jnp.einsum("kxu,kx->ku", lq.B, lams[1:]),
        xs=jnp.concatenate([Q_xs[:-1] + x_rows, Q_xs[-1:]]) - lams,
        lams=jnp.concatenate([jnp.zeros_like(xs[:1]), dynamics]) - xs,
    )


def solve_kkt(factors: Factors, rhs: Trajectory, parallel: bool = False) -> Trajectory:
    """The inverse of `apply_kkt`: K z = rhs."""
    return backsolve(factors, -rhs.xs, -rhs.us, -rhs.lams[1:], -rhs.lams[0], parallel)


def lqr(lq: LQ, x0: Float[Array, " nx"], parallel: bool = False) -> Trajectory:
    """Solve the linear-quadratic regulator problem (D3) from x0.

    Args:
        lq: The problem, time-varying; `Q`, `R`, `S` symmetric as a block matrix [Q Sᵀ; S R].
        x0: Initial state.
        parallel: Use associative scans; the same answer, for long horizons on parallel hardware.

    Returns:
        us (N, nu), xs (N+1, nx) and costates lams (N+1, nx); all NaN where the minimiser is not unique and strict.

    Gradients: implicit, in every leaf of `lq` and in x0, from the factorisation of the forward pass; both modes.
    Fails: never raises for values; NaN where some Λ of (D4) is not positive definite (`factor(lq).regular`), and with
        `parallel` also where some R is singular.
    References: Amos et al., 2018, Module 1 (eqs. 6, 8, 9).
    """
    check_lq(lq, x0)
    factors = factor(jax.lax.stop_gradient(lq), parallel)
    # One vector, since the transpose rule of JAX's linear solve wants every leaf of the right-hand side perturbed.
    rhs, unravel = ravel_pytree(Trajectory(us=-lq.r, xs=-lq.q, lams=-jnp.concatenate([x0[None], lq.c])))

    def solve(_, b):
        z, _ = ravel_pytree(solve_kkt(factors, unravel(b), parallel))
        return jnp.where(factors.regular, z, jnp.nan)

    matrix = lambda z: ravel_pytree(apply_kkt(lq, unravel(z)))[0]
    return unravel(jax.lax.custom_linear_solve(matrix, rhs, solve, symmetric=True))


def check_lq(lq: LQ, x0: Array) -> None:
    """Raise unless the shapes of an LQ problem fit together."""
    if lq.B.ndim != 3:
        raise ValueError(f"lq.B must have shape (N, nx, nu), not {lq.B.shape}: stack the stages along the first axis.")
    N, nx, nu = lq.B.shape
    expected = dict(A=(N, nx, nx), B=(N, nx, nu), c=(N, nx), Q=(N + 1, nx, nx), R=(N, nu, nu), S=(N, nu, nx),
                  q=(N + 1, nx), r=(N, nu))  # fmt: skip
    for name, shape in expected.items():
        if getattr(lq, name).shape != shape:
            raise ValueError(f"lq.{name} must have shape {shape}, not {getattr(lq, name).shape}.")
    if x0.shape != (nx,):
        raise ValueError(f"x0 must have shape ({nx},), not {x0.shape}.")


def _eliminate_controls(P: Array, stage: tuple[Array, Array], nu: int) -> tuple[Array, Array, Array, Array]:
    """One stage of (D4): P_k, the root of Λ⁻¹, root (S + BᵀPA), and whether Λ is positive definite.

    Controls come first: F = [B A].
    """
    F, H = stage
    M = H + F.T @ (P @ F)
    Lambda = M[:nu, :nu]
    root, pivots = eliminate(Lambda, jnp.eye(nu, dtype=M.dtype))
    half = root @ M[:nu, nu:]
    P = M[nu:, nu:] - half.T @ half
    # A pivot is what is left of a diagonal entry once the controls before it are chosen.
    floor = 8 * jnp.finfo(M.dtype).eps * jnp.abs(jnp.diagonal(Lambda))
    return 0.5 * (P + P.T), root, half, jnp.all(pivots > floor)


def eliminate(M: Array, rhs: Array) -> tuple[Array, Array]:
    """root · rhs, with M⁻¹ = rootᵀ root for a symmetric positive definite M, by Gaussian elimination; and the pivots.

    Written as a few whole-row operations for each row, since M is small (nu × nu): in a batch this is several times
    faster than one library call for each matrix.
    """
    n = M.shape[0]
    rows, pivots = jnp.concatenate([M, rhs], axis=1), []
    for i in range(n):
        pivots.append(rows[i, i])
        below = (jnp.arange(n) > i)[:, None]
        rows = jnp.where(below, rows - rows[:, i, None] * (rows[i] / rows[i, i]), rows)
    pivots = jnp.stack(pivots)
    return rows[:, n:] / jnp.sqrt(jnp.abs(pivots))[:, None], pivots


def _affine_scan(A: Array, b: Array, z: Array, reverse: bool, parallel: bool) -> Array:
    """All z of z ← A_k z + b_k, the given one included, in the order of the stages."""
    if parallel:

        def combine(first, second):
            (A1, b1), (A2, b2) = first, second
            return A2 @ A1, jnp.einsum("...xy,...y->...x", A2, b1) + b2

        Phi, offset = jax.lax.associative_scan(combine, (A, b), reverse=reverse)
        zs = Phi @ z + offset
    else:

        def advance(z, stage):
            A, b = stage
            z = A @ z + b
            return z, z

        _, zs = jax.lax.scan(advance, z, (A, b), reverse=reverse)
    return jnp.concatenate([zs, z[None]]) if reverse else jnp.concatenate([z[None], zs])


def _parallel_values(lq: LQ) -> Array:
    """All P of (D4) by an associative scan over conditional value functions (A, C, J)."""
    nx, eye = lq.A.shape[1], jnp.eye(lq.A.shape[1], dtype=lq.A.dtype)
    R_inv = jnp.linalg.inv(lq.R)
    # Removing the cross term S makes the stage cost separable: u = v - R⁻¹ S x.
    A = lq.A - lq.B @ R_inv @ lq.S
    C = lq.B @ R_inv @ jnp.swapaxes(lq.B, 1, 2)
    J = lq.Q[:-1] - jnp.swapaxes(lq.S, 1, 2) @ R_inv @ lq.S
    zero = jnp.zeros((1, nx, nx), lq.A.dtype)
    elements = (jnp.concatenate([A, zero]), jnp.concatenate([C, zero]), jnp.concatenate([J, lq.Q[-1:]]))

    def combine(later, earlier):  # the reverse scan hands over the later stages first
        (A1, C1, J1), (A2, C2, J2) = earlier, later
        gain = jnp.linalg.solve(eye + C1 @ J2, jnp.concatenate([A1, C1], axis=-1))
        A1_bar, C1_bar = gain[..., :nx], gain[..., nx:]
        A2_T = jnp.swapaxes(A2, -1, -2)
        return A2 @ A1_bar, A2 @ C1_bar @ A2_T + C2, jnp.swapaxes(A1, -1, -2) @ J2 @ A1_bar + J1

    P = jax.lax.associative_scan(combine, elements, reverse=True)[2]
    return 0.5 * (P + jnp.swapaxes(P, 1, 2))
