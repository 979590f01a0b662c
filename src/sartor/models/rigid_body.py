"""Rigid-body dynamics of a tree of hinge and slide joints on a fixed base.

    M(q) q̈ + h(q, q̇) + D q̇ = τ                                                                              (D11)
    τ_i = S_i · Σ_{k≥i} f_k + (armature q̈ + D q̇)_i

with the axes S_i and the forces f_i of `links`.

References: Featherstone, Rigid Body Dynamics Algorithms, 2008, chapters 5 and 6; for the derivatives see
`torque_derivatives`.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.models.links import RigidBody, eye, kinematics, momenta_and_forces, move, products, subtree_sums, table_of
from sartor.models.spatial import dot
from sartor.models.torque_derivatives import torque_jacobian


@eqx.filter_custom_jvp
def inverse_dynamics(
    body: RigidBody, q: Float[Array, " n"], qd: Float[Array, " n"], qdd: Float[Array, " n"]
) -> Float[Array, " n"]:
    """τ of (D11): the torques that give the accelerations q̈.

    Args:
        body: The robot.
        q: Positions [rad or m].
        qd: Velocities.
        qdd: Accelerations.

    Gradients: in every argument, `body` included; those in q, q̇, q̈ by the analytical formulas. Both modes.
    """
    return _torques(body, q, qd, qdd)


@inverse_dynamics.def_jvp
def _inverse_dynamics_jvp(primals, tangents):
    body, q, qd, qdd = primals
    partials = torque_jacobian(body, q, qd, qdd)
    dtau = sum(J @ d for J, d in zip(partials, tangents[1:], strict=True) if d is not None)
    perturbed, fixed = eqx.partition(body, jax.tree.map(lambda d: d is not None, tangents[0], is_leaf=_is_none))
    if jax.tree.leaves(perturbed):
        fn = lambda part: _torques(eqx.combine(part, fixed), q, qd, qdd)
        dtau = dtau + jax.jvp(fn, (perturbed,), (tangents[0],))[1]
    return inverse_dynamics(body, q, qd, qdd), dtau


def mass_matrix(body: RigidBody, q: Float[Array, " n"]) -> Float[Array, "n n"]:
    """M(q) of (D11), symmetric positive definite, armature included [kg m²]."""
    S, inertia, _, _ = kinematics(body, q)
    reaction = subtree_sums(body, inertia).times(S)
    (table,) = products(reaction, [S])
    return table_of(body, table, table.T) + eye(body) * body.armatures


def forward_dynamics(
    body: RigidBody, q: Float[Array, " n"], qd: Float[Array, " n"], tau: Float[Array, " n"]
) -> Float[Array, " n"]:
    """q̈ of (D11): the accelerations that torques τ cause.

    Gradients: by the implicit rule of `solve_acceleration`.
    """
    return solve_acceleration(q, qd, tau, body, inverse=inverse_dynamics, mass=mass_matrix)


def frame_positions(body: RigidBody, q: Float[Array, " n"]) -> dict[str, Float[Array, "3"]]:
    """Origin of every moving body of the file in the world [m]."""
    _, _, R, p = kinematics(body, q)
    R, p = jnp.stack([jnp.stack(column, -1) for column in R], -1), jnp.stack(p, -1)
    return {
        name: p[link] + R[link] @ offset for (name, link), offset in zip(body.frames, body.frame_offsets, strict=True)
    }


@eqx.filter_custom_jvp
def solve_acceleration(
    q: Float[Array, " n"], qd: Float[Array, " n"], tau: Float[Array, " n"], body: Any, *, inverse: Any, mass: Any
) -> Float[Array, " n"]:
    """q̈ with inverse(body, q, q̇, q̈) = τ, where `inverse` is linear in q̈ with the matrix mass(body, q).

    Gradients: implicit, dq̈ = M⁻¹ (dτ - ∂inverse · (dbody, dq, dq̇)): one factorisation of M serves all of them, and
    the derivative of M is never needed. Both modes.
    """
    return mass_solver(mass(body, q))(tau - inverse(body, q, qd, jnp.zeros_like(q)))


@solve_acceleration.def_jvp
def _solve_acceleration_jvp(primals, tangents, *, inverse, mass):
    q, qd, tau, body = primals
    dq, dqd, dtau, dbody = tangents
    qdd = solve_acceleration(q, qd, tau, body, inverse=inverse, mass=mass)
    moved = ((body, q, qd), (dbody, dq, dqd))
    perturbed, fixed = eqx.partition(moved[0], jax.tree.map(lambda d: d is not None, moved[1], is_leaf=_is_none))
    rest = jnp.zeros_like(qdd) if dtau is None else dtau
    if jax.tree.leaves(perturbed):

        def torques(part):
            body, q, qd = eqx.combine(part, fixed)
            return inverse(body, q, qd, qdd)

        rest = rest - jax.jvp(torques, (perturbed,), (moved[1],))[1]
    return qdd, mass_solver(mass(body, q))(rest)


def inverse_root(M: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """R with M⁻¹ = Rᵀ R for a symmetric positive definite M; NaN if it is not definite. Not differentiable.

    Gaussian elimination in a few whole-row operations for each row: in a batch of small matrices several times faster
    than one library call for each.
    """
    n = M.shape[0]
    rows, pivots = jnp.concatenate([jax.lax.stop_gradient(M), jnp.asarray(np.eye(n), M.dtype)], axis=1), []
    for i in range(n):
        pivots.append(rows[i : i + 1, i : i + 1])
        below = (np.arange(n) > i)[:, None]
        rows = jnp.where(below, rows - rows[:, i : i + 1] * (rows[i : i + 1] / pivots[i]), rows)
    return rows[:, n:] / jnp.sqrt(jnp.concatenate(pivots))


def mass_solver(M: Float[Array, "n n"]) -> Callable:
    """The function b -> M⁻¹ b for a symmetric positive definite M, by one factorisation. Differentiable in M and b."""
    root = inverse_root(M)
    solve = lambda _, b: root.T @ (root @ b)
    return lambda b: jax.lax.custom_linear_solve(lambda x: M @ x, b, solve, symmetric=True)


def _torques(body: RigidBody, q: Array, qd: Array, qdd: Array) -> Array:
    motion = move(body, q, qd, qdd)
    passed_on = subtree_sums(body, momenta_and_forces(motion)[1])
    return dot(motion.S, passed_on) + body.armatures * qdd + body.dampings * qd


def _is_none(leaf: Any) -> bool:
    return leaf is None
