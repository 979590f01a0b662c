"""Rigid-body dynamics of a tree of hinge and slide joints on a fixed base.

    M(q) q̈ + h(q, q̇) + D q̇ = τ                                                                              (D11)

All is written in spatial vectors (angular part first) at the origin of the world, so that a sum over the ancestors or
the descendants of a joint is one product with a constant matrix, and nothing but the rotations goes from joint to
joint. S_i is the axis of joint i, V_i and A_i velocity and acceleration of its link, I_i its inertia:

    V_i = Σ_{j≤i} S_j q̇_j,   A_i = A_0 + Σ_{j≤i} (S_j q̈_j + V_j × S_j q̇_j),   f_i = I_i A_i + V_i ×* I_i V_i,
    τ_i = S_i · Σ_{k≥i} f_k + (armature q̈ + D q̇)_i

References: Featherstone, Rigid Body Dynamics Algorithms, 2008, chapters 5 and 6; Singh, Russell and Wensing, Efficient
Analytical Derivatives of Rigid-Body Dynamics Using Spatial Vector Algebra, 2022, for the derivatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.models.spatial import (
    Inertia,
    Matrix,
    Spatial,
    Symmetric,
    Vector,
    add,
    cross,
    dot,
    force_cross,
    motion_cross,
    scale,
    sub,
    turn,
    vector,
)  # fmt: skip


class RigidBody(eqx.Module):
    """A robot: its joints, and one link behind each of them. Arrays are leaves, so they batch and differentiate.

    Bodies that are fixed to one another are one link. The frame of a link sits at the anchor of its joint.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    """Names of the joints, in the order of q."""
    parents: tuple[int, ...] = eqx.field(static=True)
    """The joint before each joint; -1 for the base. A parent comes before its children."""
    slides: tuple[bool, ...] = eqx.field(static=True)
    """Whether each joint slides; else it turns."""
    frames: tuple[tuple[str, int], ...] = eqx.field(static=True)
    """Name and joint of every body of the file, for `frame_positions`."""
    axes: Float[Array, "n 3"]
    """Axis of each joint in its frame, of length 1."""
    positions: Float[Array, "n 3"]
    """Origin of each frame in that of its parent, at q = 0 [m]."""
    rotations: Float[Array, "n 3 3"]
    """Rotation of each frame in that of its parent, at q = 0."""
    frame_offsets: Float[Array, "m 3"]
    """Origin of each body in the frame of its link [m]."""
    masses: Float[Array, " n"]
    """Mass of each link [kg]."""
    coms: Float[Array, "n 3"]
    """Centre of mass of each link in its frame [m]."""
    inertias: Float[Array, "n 3 3"]
    """Inertia of each link about its centre of mass, along its frame [kg m²]."""
    armatures: Float[Array, " n"]
    """Inertia of the rotors, added to the diagonal of M [kg m²]."""
    dampings: Float[Array, " n"]
    """D [N m s/rad]."""
    gravity: Float[Array, "3"]
    """Acceleration of free fall [m/s²]."""

    @property
    def nq(self) -> int:
        """Number of joints."""
        return len(self.parents)


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
    partials = _partials(body, _move(body, q, qd, qdd))
    dtau = sum(J @ d for J, d in zip(partials, tangents[1:], strict=True) if d is not None)
    perturbed, fixed = eqx.partition(body, jax.tree.map(lambda d: d is not None, tangents[0], is_leaf=_is_none))
    if jax.tree.leaves(perturbed):
        fn = lambda part: _torques(eqx.combine(part, fixed), q, qd, qdd)
        dtau = dtau + jax.jvp(fn, (perturbed,), (tangents[0],))[1]
    return inverse_dynamics(body, q, qd, qdd), dtau


def mass_matrix(body: RigidBody, q: Float[Array, " n"]) -> Float[Array, "n n"]:
    """M(q) of (D11), symmetric positive definite, armature included [kg m²]."""
    S, inertia, _, _ = _kinematics(body, q)
    reaction = _subtree(body, inertia).times(S)
    (table,) = _products(reaction, [S])
    return _table(body, table, table.T) + _eye(body) * body.armatures


def forward_dynamics(
    body: RigidBody, q: Float[Array, " n"], qd: Float[Array, " n"], tau: Float[Array, " n"]
) -> Float[Array, " n"]:
    """q̈ of (D11): the accelerations that torques τ cause.

    Gradients: by the implicit rule of `solve_acceleration`.
    """
    return solve_acceleration(q, qd, tau, body, inverse=inverse_dynamics, mass=mass_matrix)


def frame_positions(body: RigidBody, q: Float[Array, " n"]) -> dict[str, Float[Array, "3"]]:
    """Origin of every moving body of the file in the world [m]."""
    _, _, R, p = _kinematics(body, q)
    R, p = jnp.stack([jnp.stack(column, -1) for column in R], -1), jnp.stack(p, -1)
    return {
        name: p[link] + R[link] @ offset for (name, link), offset in zip(body.frames, body.frame_offsets, strict=True)
    }


class TorqueHessian(NamedTuple):
    """Second derivatives of σᵀτ(q, q̇, q̈) for constant σ; those that are missing are zero, as τ is linear in q̈."""

    q_q: Float[Array, "n n"]
    q_qd: Float[Array, "n n"]
    """Row i, column j: ∂²/∂q_i ∂q̇_j."""
    q_qdd: Float[Array, "n n"]
    qd_qd: Float[Array, "n n"]

    def times(self, dq: Array, dqd: Array, dqdd: Array) -> Float[Array, "m m"]:
        """Wᵀ (Hessian) W for the rows W = [dq; dqd; dqdd], (n, m) each."""
        mixed = dq.T @ (0.5 * self.q_q @ dq + self.q_qd @ dqd + self.q_qdd @ dqdd) + 0.5 * dqd.T @ self.qd_qd @ dqd
        return mixed + mixed.T


def torque_hessian(
    body: RigidBody, q: Float[Array, " n"], qd: Float[Array, " n"], qdd: Float[Array, " n"], sigma: Float[Array, " n"]
) -> TorqueHessian:
    """Second derivatives of σᵀ inverse_dynamics(body, q, q̇, q̈) for constant σ, by the analytical formulas (D16).

    Args:
        body: The robot.
        q: Positions [rad or m].
        qd: Velocities.
        qdd: Accelerations.
        sigma: σ, such as M⁻¹ times the adjoint of the accelerations.

    Returns: blocks (n, n), in units of στ over those of the two variables.
    """
    motion = _move(body, q, qd, qdd)
    V_sigma = _path(body, scale(sigma, motion.S))
    return _second_partials(body, motion, V_sigma)


@eqx.filter_custom_jvp
def solve_acceleration(
    q: Float[Array, " n"], qd: Float[Array, " n"], tau: Float[Array, " n"], body: Any, *, inverse: Any, mass: Any
) -> Float[Array, " n"]:
    """q̈ with inverse(body, q, q̇, q̈) = τ, where `inverse` is linear in q̈ with the matrix mass(body, q).

    Gradients: implicit, dq̈ = M⁻¹ (dτ - ∂inverse · (dbody, dq, dq̇)): one factorisation of M serves all of them, and
    the derivative of M is never needed. Both modes.
    """
    return _solver(mass(body, q))(tau - inverse(body, q, qd, jnp.zeros_like(q)))


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
    return qdd, _solver(mass(body, q))(rest)


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


def _solver(M: Array) -> Callable:
    """b -> M⁻¹ b."""
    root = inverse_root(M)
    solve = lambda _, b: root.T @ (root @ b)
    return lambda b: jax.lax.custom_linear_solve(lambda x: M @ x, b, solve, symmetric=True)


class _Motion(NamedTuple):
    """Axes, inertias, velocities and accelerations of the links; those of the link before each joint have `0`."""

    S: Spatial
    inertia: Inertia
    V: Spatial
    V0: Spatial
    A: Spatial
    A0: Spatial


def _torques(body: RigidBody, q: Array, qd: Array, qdd: Array) -> Array:
    motion = _move(body, q, qd, qdd)
    passed_on = _subtree(body, _forces(motion)[1])
    return dot(motion.S, passed_on) + body.armatures * qdd + body.dampings * qd


def _kinematics(body: RigidBody, q: Array) -> tuple[Spatial, Inertia, Matrix, Vector]:
    """S and I of the world, and rotation (its columns) and origin of each link."""
    slides = np.array(body.slides)
    angle, slide = jnp.where(slides, 0.0, q), jnp.where(slides, q, 0.0)
    axis, frame = vector(body.axes), [vector(body.rotations[:, :, k]) for k in range(3)]
    along = turn(frame, axis)  # a turn leaves its axis where it is
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    R = []
    for a, column in zip(axis, frame, strict=True):
        fixed = scale(a, along)
        R.append(add(fixed, scale(cos, sub(column, fixed)), scale(sin, cross(along, column))))
    R, R0 = _chain(body, tuple(R))
    p = _path(body, turn(R0, add(vector(body.positions), scale(slide, along))))
    z = turn(R0, along)
    still = jax.tree.map(jnp.zeros_like, z)
    pick = lambda a, b: jax.tree.map(lambda a, b: jnp.where(slides, a, b), a, b)
    S = Spatial(pick(still, z), pick(z, cross(p, z)))
    c = add(p, turn(R, vector(body.coms)))
    m, h = body.masses, scale(body.masses, c)
    spin = [turn(R, vector(body.inertias[:, :, k])) for k in range(3)]  # R I, then times Rᵀ
    spread = lambda i, j: sum(column[i] * turned[j] for column, turned in zip(R, spin, strict=True)) - h[i] * c[j]
    xx, yy, zz = (spread(i, i) + sum(a * b for a, b in zip(h, c, strict=True)) for i in range(3))
    inertia = (h, Symmetric(xx, yy, zz, spread(0, 1), spread(0, 2), spread(1, 2)))
    return S, Inertia(m, *_product(inertia, np.eye(body.nq))), R, p


def _chain(body: RigidBody, R: Matrix) -> tuple[Matrix, Matrix]:
    """Rotations of the links and of their parents in the world, from those in the frame of the parent.

    As many rounds as the depth of the tree has binary digits: each doubles the number of joints that R spans.
    """
    jump = np.array(body.parents)
    while np.any(jump >= 0):
        R, before = _and_those(jump, R)
        R = tuple(turn(before, column) for column in R)
        jump = np.where(jump >= 0, jump[jump], -1)
    return _and_those(np.array(body.parents), R)


def _and_those(which: np.ndarray, R: Matrix) -> tuple[Matrix, Matrix]:
    """R, computed, and its entries of the given links; the identity for -1."""
    n = len(which)
    both = _product(R, np.concatenate([np.eye(n), which == np.arange(n)[:, None]], axis=1))
    first = jnp.asarray(which < 0, both[0].x.dtype)
    those = [[a[n:] + first if i == k else a[n:] for i, a in enumerate(column)] for k, column in enumerate(both)]
    return jax.tree.map(lambda a: a[:n], both), tuple(Vector(*column) for column in those)


def _move(body: RigidBody, q: Array, qd: Array, qdd: Array) -> _Motion:
    S, inertia, _, _ = _kinematics(body, q)
    Sqd = scale(qd, S)
    V = _path(body, Sqd)
    own = add(scale(qdd, S), motion_cross(V, Sqd))
    A = _path(body, own)
    A = A._replace(v=Vector(*(a - g for a, g in zip(A.v, body.gravity.astype(q.dtype), strict=True))))
    return _Motion(S, inertia, V, sub(V, Sqd), A, sub(A, own))


def _forces(motion: _Motion) -> tuple[Spatial, Spatial]:
    """Momentum and rate of momentum of each link."""
    momentum = motion.inertia.times(motion.V)
    return momentum, add(motion.inertia.times(motion.A), force_cross(motion.V, momentum))


def _partials(body: RigidBody, motion: _Motion) -> tuple[Array, Array, Array]:
    """∂τ/∂q, ∂τ/∂q̇, ∂τ/∂q̈ (Singh et al., 2022), with B of a link ½((V ×*) I - I (V ×) + (I V) ×̄*) and its sum B^C."""
    S, inertia, V, V0, _, A0 = motion
    psi_dot, S_dot = motion_cross(V0, S), motion_cross(V, S)
    psi_ddot = add(motion_cross(A0, S), motion_cross(V0, psi_dot))
    psi_mean = add(psi_dot, S_dot)
    momentum, force = _forces(motion)
    # 2B has one block of its own, rate - momentum.w ×, and -2 momentum.v ×: all else cancels.
    inertia, rate, momentum, force = _subtree(body, (inertia, _rate(inertia, V), momentum, force))
    B_times = lambda X: _turning(rate, momentum, X)
    S_B = add(rate.times(S.w), cross(momentum.w, S.w), scale(2.0, cross(momentum.v, S.v)))
    S_I = inertia.times(S)
    q_above = add(B_times(psi_dot), inertia.times(psi_ddot), force_cross(S, force))
    qd_above = add(B_times(S), inertia.times(psi_mean))
    zero = jax.tree.map(jnp.zeros_like, S.w)
    lower = _products((S_B, S_I), [(psi_dot.w, psi_ddot), (S.w, psi_mean), (zero, S)])
    upper = _products(S, [q_above, qd_above, S_I])
    dq, dqd, dqdd = (_table(body, *pair) for pair in zip(lower, upper, strict=True))
    return dq, dqd + _eye(body) * body.dampings, dqdd + _eye(body) * body.armatures


def _second_partials(body: RigidBody, motion: _Motion, V_sigma: Spatial) -> TorqueHessian:
    """Second derivatives of Σ_i Vσ_i · f_i, the power of the forces f_i of the links along Vσ (D16).

    A link sees q_k, q̇_k or q̈_k of a joint k before it through one triple (δVσ, δA, δV) that is the same for all links,
    and so does a joint behind k: every entry is a product of the triple of the joint before with a triple of sums over
    the links of the joint behind.
    """
    S, inertia, V, _, A, _ = motion
    psi_dot, rho = motion_cross(V, S), motion_cross(V_sigma, S)
    psi_ddot = add(motion_cross(A, S), motion_cross(V, psi_dot))
    momentum, force = _forces(motion)
    pull = inertia.times(V_sigma)
    bent = sub(force_cross(V, pull), add(force_cross(V_sigma, momentum), inertia.times(motion_cross(V, V_sigma))))
    inertia, rate, rate_sigma, momentum, force, pull, bent = _subtree(
        body, (inertia, _rate(inertia, V), _rate(inertia, V_sigma), momentum, force, pull, bent)
    )
    B = lambda X: _turning(rate, momentum, X)
    B_sigma = lambda X: _turning(rate_sigma, pull, X)
    B_rho = add(rate.times(rho.w), cross(momentum.w, rho.w), scale(2.0, cross(momentum.v, rho.v)))  # Bᵀ ρ
    S_pull = force_cross(S, pull)
    I_S, still = inertia.times(S), jax.tree.map(jnp.zeros_like, rho.w)
    # By the joint behind: what δVσ, δA and δV of the joint before are multiplied with, for q, q̇ and q̈ behind.
    q_sigma = add(inertia.times(psi_ddot), B(psi_dot), force_cross(S, force))
    q_A = add(inertia.times(rho), S_pull)
    q_V = sub(add(scale(2.0, force_cross(psi_dot, pull)), force_cross(S, bent)), B_sigma(psi_dot))
    q_V = q_V._replace(w=add(q_V.w, B_rho))
    qd_sigma = add(scale(2.0, inertia.times(psi_dot)), B(S))
    qd_V = sub(scale(2.0, S_pull), B_sigma(S))
    zero = Spatial(still, still)
    (qq, q_qd, q_qdd), (qd_q, qd_qd, _), (qdd_q, _, _) = (
        _products(before, [(q_sigma, q_A, q_V), (qd_sigma, zero, qd_V), (I_S, zero, zero)])
        for before in ((rho, psi_ddot, psi_dot), (zero, scale(2.0, psi_dot), S), (zero, S, zero))
    )
    tables = ((qq.T, qq), (qd_q.T, q_qd), (qdd_q.T, q_qdd), (qd_qd.T, qd_qd))
    return TorqueHessian(*(_table(body, lower, upper) for lower, upper in tables))


def _turning(rate: Symmetric, momentum: Spatial, X: Spatial) -> Spatial:
    """2B X = I(X × V) + X ×* IV + V ×* IX, summed over links with the same X."""
    return Spatial(sub(rate.times(X.w), cross(momentum.w, X.w)), scale(2.0, cross(X.w, momentum.v)))


def _rate(inertia: Inertia, V: Spatial) -> Symmetric:
    """Rate of the second moment of a link that moves: ω× I - I ω× - v× h× - h× v×."""
    (x, y, z), I, h, v = V.w, inertia.I, inertia.h, V.v
    hv = sum(a * b for a, b in zip(h, v, strict=True))
    return Symmetric(
        2.0 * (y * I.xz - z * I.xy + hv - h.x * v.x),
        2.0 * (z * I.xy - x * I.yz + hv - h.y * v.y),
        2.0 * (x * I.yz - y * I.xz + hv - h.z * v.z),
        z * (I.xx - I.yy) + y * I.yz - x * I.xz - h.x * v.y - h.y * v.x,
        y * (I.zz - I.xx) + x * I.xy - z * I.yz - h.x * v.z - h.z * v.x,
        x * (I.yy - I.zz) + z * I.xz - y * I.xy - h.y * v.z - h.z * v.y,
    )


def _products(a: Any, bs: list) -> list[Array]:
    """a_i · b_j at row i, column j, for each b."""
    n = jax.tree.leaves(a)[0].shape[0]
    rows = zip(*(jax.tree.leaves(b) for b in bs), strict=True)
    right = jnp.stack([x for row in rows for x in row]).reshape(-1, len(bs) * n)
    table = _stack(a).T @ right
    return [table[:, k * n : (k + 1) * n] for k in range(len(bs))]


def _table(body: RigidBody, lower: Array, upper: Array) -> Array:
    """`lower` where the joint of the column is that of the row or before it, `upper` where it is behind."""
    below = _ancestors(body)
    return jnp.where(below, lower, jnp.where(below.T, upper, 0.0))


def _ancestors(body: RigidBody) -> np.ndarray:
    """Row i, column j: whether joint j is i or lies between i and the base."""
    table = np.eye(body.nq, dtype=bool)
    for i, parent in enumerate(body.parents):
        if parent >= 0:
            table[i] |= table[parent]
    return table


def _path(body: RigidBody, X: Any) -> Any:
    """Sum over each joint and those before it."""
    return _product(X, _ancestors(body).T)


def _subtree(body: RigidBody, X: Any) -> Any:
    """Sum over each joint and those behind it."""
    return _product(X, _ancestors(body))


def _product(X: Any, matrix: np.ndarray) -> Any:
    """All components times one constant matrix, from the right."""
    constant = jnp.asarray(matrix, jax.tree.leaves(X)[0].dtype)
    if len(jax.tree.leaves(X)) < 9:  # XLA fuses a short stack, which is slower than a product for each component
        return jax.tree.map(lambda x: x @ constant, X)
    sums = _stack(X) @ constant
    return jax.tree.unflatten(jax.tree.structure(X), [sums[i] for i in range(sums.shape[0])])


def _stack(X: Any) -> Array:
    """Components first, (c, n)."""
    return jnp.stack(jax.tree.leaves(X))


def _eye(body: RigidBody) -> Array:
    return jnp.asarray(np.eye(body.nq), body.armatures.dtype)


def _is_none(leaf: Any) -> bool:
    return leaf is None
