"""Rigid-body dynamics of a tree of hinge and slide joints on a fixed base, read from a compiled MuJoCo model.

    M(q) q̈ + h(q, q̇) + D q̇ = τ                                                                              (D11)

All is written in spatial vectors (angular part first) at the origin of the world, so that a sum over the ancestors or
the descendants of a joint is one product with a constant matrix, and nothing but the rotations goes from joint to
joint. S_i is the axis of joint i, V_i and A_i velocity and acceleration of its link, I_i its inertia:

    V_i = Σ_{j≤i} S_j q̇_j,   A_i = A_0 + Σ_{j≤i} (S_j q̈_j + V_j × S_j q̇_j),   f_i = I_i A_i + V_i ×* I_i V_i,
    τ_i = S_i · Σ_{k≥i} f_k + (armature q̈ + D q̇)_i

References: Featherstone, Rigid Body Dynamics Algorithms, 2008, chapters 5 and 6; Singh, Russell and Wensing, Efficient
Analytical Derivatives of Rigid-Body Dynamics Using Spatial Vector Algebra, 2022, for the derivatives.
"""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float


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


def from_mjcf(path: str | Path) -> RigidBody:
    """The robot of an MJCF (or URDF) file. Fails: `ValueError` as `from_mujoco`, or if MuJoCo cannot read the file."""
    try:
        return from_mujoco(mujoco.MjModel.from_xml_path(str(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_mujoco(mj_model: mujoco.MjModel) -> RigidBody:
    """The robot of a compiled MuJoCo model.

    Args:
        mj_model: Fixed base; any tree of hinge and slide joints, several of one body included. Contacts, limits and
            actuators are not read.

    Fails: `ValueError` for what (D11) does not hold: a free or ball joint, equality constraints, springs, dry
        friction, gravity compensation, a fluid.
    """
    _check(mj_model)
    links: list[_Link] = []
    link_of = {0: -1}  # the last joint of every body, and where the body sits in the frame of that joint
    place_of = {0: (np.zeros(3), np.eye(3))}
    for body in range(1, mj_model.nbody):
        parent = mj_model.body_parentid[body]
        link, (p, R) = link_of[parent], place_of[parent]
        p, R = p + R @ mj_model.body_pos[body], R @ _rotation(mj_model.body_quat[body])
        for j in range(mj_model.body_jntadr[body], mj_model.body_jntadr[body] + mj_model.body_jntnum[body]):
            slide = mj_model.jnt_type[j] == int(mujoco.mjtJoint.mjJNT_SLIDE)
            anchor = np.zeros(3) if slide else mj_model.jnt_pos[j]
            links.append(_Link(mj_model.joint(j).name, link, bool(slide), mj_model.jnt_axis[j], p + R @ anchor, R))
            link, p, R = len(links) - 1, -anchor, np.eye(3)
        link_of[body], place_of[body] = link, (p, R)
    if not links:
        raise ValueError("the model has no joint: there is nothing to control.")
    masses, coms, inertias = _lump(mj_model, link_of, place_of, len(links))
    bodies = [b for b in range(1, mj_model.nbody) if link_of[b] >= 0]
    # MuJoCo's q counts from qpos0: turn every frame back by it.
    axes = np.array([link.axis for link in links])
    rotations, positions = (np.array([getattr(link, name) for link in links]) for name in ("R", "p"))
    for i, (link, q0) in enumerate(zip(links, mj_model.qpos0, strict=True)):
        positions[i] = positions[i] - link.slide * rotations[i] @ axes[i] * q0
        rotations[i] = rotations[i] if link.slide else rotations[i] @ _turn(axes[i], -q0)
    arrays = (axes, positions, rotations, [place_of[b][0] for b in bodies], masses, coms, inertias)
    return RigidBody(
        tuple(link.name for link in links),
        tuple(link.parent for link in links),
        tuple(link.slide for link in links),
        tuple((mj_model.body(b).name, link_of[b]) for b in bodies),
        *(jnp.asarray(np.array(a)) for a in (*arrays, mj_model.dof_armature, mj_model.dof_damping)),
        gravity=jnp.asarray(
            mj_model.opt.gravity * (not mj_model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_GRAVITY)
        ),
    )


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
    motion = _move(body, q, qd, qdd)
    forces = _forces(body, motion)
    tau = _own_axis(motion.S, forces.total) + body.armatures * qdd + body.dampings * qd
    partials = _partials(body, motion, forces)
    dtau = sum(J @ d for J, d in zip(partials, tangents[1:], strict=True) if d is not None)
    perturbed, fixed = eqx.partition(body, jax.tree.map(lambda d: d is not None, tangents[0], is_leaf=_is_none))
    if jax.tree.leaves(perturbed):
        fn = lambda part: _torques(eqx.combine(part, fixed), q, qd, qdd)
        dtau = dtau + jax.jvp(fn, (perturbed,), (tangents[0],))[1]
    return tau, dtau


def mass_matrix(body: RigidBody, q: Float[Array, " n"]) -> Float[Array, "n n"]:
    """M(q) of (D11), symmetric positive definite, armature included [kg m²]."""
    S, (m, h, I), _, _ = _kinematics(body, q)
    n = body.nq
    sums = _subtree(body, jnp.concatenate([m[:, None], h, I.reshape(n, 9)], -1))
    reaction = _Inertia(sums[:, 0], sums[:, 1:4], sums[:, 4:].reshape(n, 3, 3)).times(S)
    below = _ancestors(body)
    table = jnp.where(below, reaction @ S.T, jnp.where(below.T, S @ reaction.T, 0.0))
    return table + jnp.diag(body.armatures)


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
    return _accelerate(q, qd, tau, body, inverse, mass)[0]


@solve_acceleration.def_jvp
def _solve_acceleration_jvp(primals, tangents, *, inverse, mass):
    q, qd, tau, body = primals
    dq, dqd, dtau, dbody = tangents
    qdd, factor = _accelerate(q, qd, tau, body, inverse, mass)
    moved = ((body, q, qd), (dbody, dq, dqd))
    perturbed, fixed = eqx.partition(moved[0], jax.tree.map(lambda d: d is not None, moved[1], is_leaf=_is_none))
    rest = jnp.zeros_like(qdd) if dtau is None else dtau
    if jax.tree.leaves(perturbed):

        def torques(part):
            body, q, qd = eqx.combine(part, fixed)
            return inverse(body, q, qd, qdd)

        rest = rest - jax.jvp(torques, (perturbed,), (moved[1],))[1]
    return qdd, jax.scipy.linalg.cho_solve(factor, rest)


def _accelerate(q: Array, qd: Array, tau: Array, body: Any, inverse: Any, mass: Any) -> tuple[Array, Any]:
    factor = jax.scipy.linalg.cho_factor(mass(body, q), lower=True)
    return jax.scipy.linalg.cho_solve(factor, tau - inverse(body, q, qd, jnp.zeros_like(q))), factor


class _Inertia(NamedTuple):
    """Spatial inertias at the origin of the world: mass, first moment m c, second moment."""

    m: Float[Array, " n"]
    h: Float[Array, "n 3"]
    I: Float[Array, "n 3 3"]

    def times(self, X: Float[Array, "n 6"]) -> Float[Array, "n 6"]:
        """Momentum of a velocity, force of an acceleration."""
        w, v = X[:, :3], X[:, 3:]
        moment = jnp.sum(self.I * w[:, None, :], -1) + _cross(self.h, v)
        return jnp.concatenate([moment, self.m[:, None] * v + _cross(w, self.h)], -1)


class _Motion(NamedTuple):
    """Axes, velocities and accelerations of the links; those of the link before each joint have `0`."""

    S: Float[Array, "n 6"]
    inertia: _Inertia
    V: Float[Array, "n 6"]
    V0: Float[Array, "n 6"]
    A: Float[Array, "n 6"]
    A0: Float[Array, "n 6"]


class _Forces(NamedTuple):
    momentum: Float[Array, "n 6"]
    total: Float[Array, "n 6"]
    """Force that each joint passes on: the sum over its descendants."""


def _torques(body: RigidBody, q: Array, qd: Array, qdd: Array) -> Array:
    motion = _move(body, q, qd, qdd)
    return _own_axis(motion.S, _forces(body, motion).total) + body.armatures * qdd + body.dampings * qd


def _kinematics(body: RigidBody, q: Array) -> tuple[Array, _Inertia, Array, Array]:
    """S and I of the world, and rotation and origin of each link."""
    slides = np.array(body.slides)
    angle = jnp.where(slides, 0.0, q)
    K = _skew(body.axes)
    turn = (
        jnp.eye(3, dtype=q.dtype) + jnp.sin(angle)[:, None, None] * K + (1.0 - jnp.cos(angle))[:, None, None] * (K @ K)
    )
    step = jnp.einsum("nij,njk->nik", body.rotations, turn)
    along = jnp.einsum("nij,nj->ni", body.rotations, body.axes)  # a turn leaves its axis where it is
    shift = body.positions + jnp.where(slides, q, 0.0)[:, None] * along
    rotations, origins, axes = [], [], []
    for i, parent in enumerate(body.parents):
        R0, p0 = (rotations[parent], origins[parent]) if parent >= 0 else (jnp.eye(3, dtype=q.dtype), 0.0)
        rotations.append(R0 @ step[i])
        origins.append(p0 + R0 @ shift[i])
        axes.append(R0 @ along[i])
    R, p, z = jnp.stack(rotations), jnp.stack(origins), jnp.stack(axes)
    still = jnp.zeros_like(z)
    S = jnp.where(slides[:, None], jnp.concatenate([still, z], -1), jnp.concatenate([z, _cross(p, z)], -1))
    c = p + jnp.einsum("nij,nj->ni", R, body.coms)
    spin = jnp.einsum("nij,njk,nlk->nil", R, body.inertias, R)
    offset = jnp.sum(c * c, -1)[:, None, None] * jnp.eye(3, dtype=q.dtype) - c[:, :, None] * c[:, None, :]
    m = body.masses
    return S, _Inertia(m, m[:, None] * c, spin + m[:, None, None] * offset), R, p


def _move(body: RigidBody, q: Array, qd: Array, qdd: Array) -> _Motion:
    S, inertia, _, _ = _kinematics(body, q)
    Sqd = S * qd[:, None]
    V = _path(body, Sqd)
    A = _path(body, S * qdd[:, None] + _motion_cross(V, Sqd))
    A = A + jnp.concatenate([jnp.zeros(3, q.dtype), -body.gravity.astype(q.dtype)])
    return _Motion(S, inertia, V, V - Sqd, A, A - S * qdd[:, None] - _motion_cross(V, Sqd))


def _forces(body: RigidBody, motion: _Motion) -> _Forces:
    momentum = motion.inertia.times(motion.V)
    return _Forces(momentum, _subtree(body, motion.inertia.times(motion.A) + _force_cross(motion.V, momentum)))


def _partials(body: RigidBody, motion: _Motion, forces: _Forces) -> tuple[Array, Array, Array]:
    """∂τ/∂q, ∂τ/∂q̇, ∂τ/∂q̈ (Singh et al., 2022), with B of a link ½((V ×*) I - I (V ×) + (I V) ×̄*) and its sum B^C."""
    S, inertia, V, V0, _, A0 = motion
    psi_dot, S_dot = _motion_cross(V0, S), _motion_cross(V, S)
    psi_ddot = _motion_cross(A0, S) + _motion_cross(V0, psi_dot)
    n = body.nq
    # B has one block of its own, and -p × of the linear momentum p: all else cancels.
    w, v, h = _skew(V[:, :3]), _skew(V[:, 3:]), _skew(inertia.h)
    B = 0.5 * (w @ inertia.I - inertia.I @ w - v @ h - h @ v - _skew(forces.momentum[:, :3]))
    packed = [inertia.m[:, None], inertia.h, inertia.I.reshape(n, 9), B.reshape(n, 9), forces.momentum[:, 3:]]
    sums = _subtree(body, jnp.concatenate(packed, -1))
    composite = _Inertia(sums[:, 0], sums[:, 1:4], sums[:, 4:13].reshape(n, 3, 3))
    B, p = sums[:, 13:22].reshape(n, 3, 3), sums[:, 22:]
    B_times = lambda X: jnp.concatenate([jnp.sum(B * X[:, None, :3], -1), _cross(X[:, :3], p)], -1)
    S_B = jnp.sum(B * S[:, :3, None], 1) + _cross(p, S[:, 3:])
    S_I = composite.times(S)
    below = _ancestors(body)  # row i, column j: j is i or before it
    above = below.T & ~np.eye(n, dtype=bool)
    pull = _force_cross(S, forces.total)
    q_above = 2.0 * B_times(psi_dot) + composite.times(psi_ddot) + pull
    qd_above = 2.0 * B_times(S) + composite.times(psi_dot + S_dot)
    table = lambda lower, upper: jnp.where(below, lower, jnp.where(above, upper, 0.0))
    dq = table(2.0 * S_B @ psi_dot[:, :3].T + S_I @ psi_ddot.T, S @ q_above.T)
    dqd = table(2.0 * S_B @ S[:, :3].T + S_I @ (psi_dot + S_dot).T, S @ qd_above.T)
    dqdd = table(S_I @ S.T, S @ S_I.T)
    return dq, dqd + jnp.diag(body.dampings), dqdd + jnp.diag(body.armatures)


def _ancestors(body: RigidBody) -> np.ndarray:
    """Row i, column j: whether joint j is i or lies between i and the base."""
    table = np.eye(body.nq, dtype=bool)
    for i, parent in enumerate(body.parents):
        if parent >= 0:
            table[i] |= table[parent]
    return table


def _path(body: RigidBody, X: Array) -> Array:
    """Sum over each joint and those before it."""
    return jnp.asarray(_ancestors(body), X.dtype) @ X


def _subtree(body: RigidBody, X: Array) -> Array:
    """Sum over each joint and those behind it."""
    return jnp.asarray(_ancestors(body).T, X.dtype) @ X


def _own_axis(S: Array, f: Array) -> Array:
    return jnp.sum(S * f, -1)


def _cross(a: Array, b: Array) -> Array:
    a1, a2, a3, b1, b2, b3 = (x[..., i] for x in (a, b) for i in range(3))
    return jnp.stack([a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1], -1)


def _skew(a: Array) -> Array:
    x, y, z = (a[..., i] for i in range(3))
    zero = jnp.zeros_like(x)
    rows = [jnp.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return jnp.stack(rows, -2)


def _motion_cross(V: Array, X: Array) -> Array:
    w, v = V[..., :3], V[..., 3:]
    return jnp.concatenate([_cross(w, X[..., :3]), _cross(w, X[..., 3:]) + _cross(v, X[..., :3])], -1)


def _force_cross(V: Array, f: Array) -> Array:
    w, v = V[..., :3], V[..., 3:]
    return jnp.concatenate([_cross(w, f[..., :3]) + _cross(v, f[..., 3:]), _cross(w, f[..., 3:])], -1)


def _is_none(leaf: Any) -> bool:
    return leaf is None


class _Link(NamedTuple):
    name: str
    parent: int
    slide: bool
    axis: np.ndarray
    p: np.ndarray
    R: np.ndarray


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    R = np.zeros(9)
    mujoco.mju_quat2Mat(R, quaternion)
    return R.reshape(3, 3)


def _turn(axis: np.ndarray, angle: float) -> np.ndarray:
    quaternion = np.zeros(4)
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    return _rotation(quaternion)


def _lump(mj_model: mujoco.MjModel, link_of: dict, place_of: dict, n: int) -> tuple[np.ndarray, ...]:
    """Mass, centre and inertia of the bodies on each link together."""
    masses, moments, seconds = np.zeros(n), np.zeros((n, 3)), np.zeros((n, 3, 3))
    spread = lambda c: c @ c * np.eye(3) - np.outer(c, c)
    for body, link in link_of.items():
        if link < 0:
            continue
        p, R = place_of[body]
        c, axes = p + R @ mj_model.body_ipos[body], R @ _rotation(mj_model.body_iquat[body])
        m = mj_model.body_mass[body]
        masses[link] += m
        moments[link] += m * c
        seconds[link] += axes @ np.diag(mj_model.body_inertia[body]) @ axes.T + m * spread(c)
    coms = moments / np.where(masses == 0, 1.0, masses)[:, None]
    return masses, coms, np.array([I - m * spread(c) for I, m, c in zip(seconds, masses, coms, strict=True)])


def _gravity(mj_model: mujoco.MjModel) -> np.ndarray:
    off = mj_model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_GRAVITY)
    return np.zeros(3) if off else mj_model.opt.gravity


def _check(m: mujoco.MjModel) -> None:
    """Refuse what (D11) leaves out rather than be wrong about it."""
    movable = [int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)]
    other = [m.joint(j).name or str(j) for j in range(m.njnt) if m.jnt_type[j] not in movable]
    if other:
        raise ValueError(
            f"joint {other[0]!r} is neither a hinge nor a slide: a free base or a ball joint is not supported, fix the"
            " base or replace a ball by three hinges."
        )
    wrong = {
        "equality constraints (a closed loop); cut the loop": m.neq,
        "joint springs (stiffness); set it to 0 and add the springs to the residual": np.any(m.jnt_stiffness)
        or np.any(getattr(m, "jnt_stiffnesspoly", 0)),
        "damping that is not linear in the velocity; keep its first number alone": np.any(
            getattr(m, "dof_dampingpoly", 0)
        ),
        "dry friction (frictionloss); set it to 0 in the model of the controller": np.any(m.dof_frictionloss),
        "tendons with springs, dampers, friction or inertia; leave them out": any(
            np.any(getattr(m, f"tendon_{kind}", 0))
            for kind in ("stiffness", "stiffnesspoly", "damping", "dampingpoly", "frictionloss", "armature")
        ),
        "gravity compensation (gravcomp); set it to 0": np.any(m.body_gravcomp),
        "a fluid (density or viscosity of `option`); set both to 0": m.opt.density or m.opt.viscosity,
    }
    for name, there in wrong.items():
        if there:
            raise ValueError(f"the model has {name}: its dynamics would be wrong.")
