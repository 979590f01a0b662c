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

from collections.abc import Callable

# MuJoCo is compiled and has no type stubs.
# pyright: reportAttributeAccessIssue=false
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
        rotations[i] = rotations[i] if link.slide else rotations[i] @ _axis_angle(axes[i], -q0)
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


def _solver(M: Array) -> Callable:
    """b -> M⁻¹ b for a symmetric positive definite M; NaN if it is not definite.

    Gaussian elimination in a few whole-row operations for each row: in a batch of small matrices several times faster
    than one library call for each.
    """
    n = M.shape[0]
    rows, pivots = jnp.concatenate([jax.lax.stop_gradient(M), jnp.asarray(np.eye(n), M.dtype)], axis=1), []
    for i in range(n):
        pivots.append(rows[i : i + 1, i : i + 1])
        below = (np.arange(n) > i)[:, None]
        rows = jnp.where(below, rows - rows[:, i : i + 1] * (rows[i : i + 1] / pivots[i]), rows)
    root = rows[:, n:] / jnp.sqrt(jnp.concatenate(pivots))  # M⁻¹ = rootᵀ root
    solve = lambda _, b: root.T @ (root @ b)
    return lambda b: jax.lax.custom_linear_solve(lambda x: M @ x, b, solve, symmetric=True)


class _Vector(NamedTuple):
    """A vector of each link, by components: arrays over the links compile to much faster code than arrays (n, 3)."""

    x: Float[Array, " n"]
    y: Float[Array, " n"]
    z: Float[Array, " n"]


_Matrix = tuple[_Vector, ...]  # (3, 3), by columns


class _Spatial(NamedTuple):
    """Angular and linear part of a motion, or moment and force."""

    w: _Vector
    v: _Vector


class _Symmetric(NamedTuple):
    """Symmetric matrices (3, 3)."""

    xx: Float[Array, " n"]
    yy: Float[Array, " n"]
    zz: Float[Array, " n"]
    xy: Float[Array, " n"]
    xz: Float[Array, " n"]
    yz: Float[Array, " n"]

    def times(self, a: _Vector) -> _Vector:
        return _Vector(
            self.xx * a.x + self.xy * a.y + self.xz * a.z,
            self.xy * a.x + self.yy * a.y + self.yz * a.z,
            self.xz * a.x + self.yz * a.y + self.zz * a.z,
        )


class _Inertia(NamedTuple):
    """Spatial inertias at the origin of the world: mass, first moment m c, second moment."""

    m: Float[Array, " n"]
    h: _Vector
    I: _Symmetric

    def times(self, X: _Spatial) -> _Spatial:
        """Momentum of a velocity, force of an acceleration."""
        moment = _add(self.I.times(X.w), _cross(self.h, X.v))
        return _Spatial(moment, _add(_scale(self.m, X.v), _cross(X.w, self.h)))


class _Motion(NamedTuple):
    """Axes, inertias, velocities and accelerations of the links; those of the link before each joint have `0`."""

    S: _Spatial
    inertia: _Inertia
    V: _Spatial
    V0: _Spatial
    A: _Spatial
    A0: _Spatial


def _torques(body: RigidBody, q: Array, qd: Array, qdd: Array) -> Array:
    motion = _move(body, q, qd, qdd)
    passed_on = _subtree(body, _forces(motion)[1])
    return _dot(motion.S, passed_on) + body.armatures * qdd + body.dampings * qd


def _kinematics(body: RigidBody, q: Array) -> tuple[_Spatial, _Inertia, _Matrix, _Vector]:
    """S and I of the world, and rotation (its columns) and origin of each link."""
    slides = np.array(body.slides)
    angle, slide = jnp.where(slides, 0.0, q), jnp.where(slides, q, 0.0)
    axis, frame = _vector(body.axes), [_vector(body.rotations[:, :, k]) for k in range(3)]
    along = _turn(frame, axis)  # a turn leaves its axis where it is
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    R = []
    for a, column in zip(axis, frame, strict=True):
        fixed = _scale(a, along)
        R.append(_add(fixed, _scale(cos, _sub(column, fixed)), _scale(sin, _cross(along, column))))
    R, R0 = _chain(body, tuple(R))
    p = _path(body, _turn(R0, _add(_vector(body.positions), _scale(slide, along))))
    z = _turn(R0, along)
    still = jax.tree.map(jnp.zeros_like, z)
    pick = lambda a, b: jax.tree.map(lambda a, b: jnp.where(slides, a, b), a, b)
    S = _Spatial(pick(still, z), pick(z, _cross(p, z)))
    c = _add(p, _turn(R, _vector(body.coms)))
    m, h = body.masses, _scale(body.masses, c)
    spin = [_turn(R, _vector(body.inertias[:, :, k])) for k in range(3)]  # R I, then times Rᵀ
    spread = lambda i, j: sum(column[i] * turned[j] for column, turned in zip(R, spin, strict=True)) - h[i] * c[j]
    xx, yy, zz = (spread(i, i) + sum(a * b for a, b in zip(h, c, strict=True)) for i in range(3))
    inertia = (h, _Symmetric(xx, yy, zz, spread(0, 1), spread(0, 2), spread(1, 2)))
    return S, _Inertia(m, *_product(inertia, np.eye(body.nq))), R, p


def _chain(body: RigidBody, R: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Rotations of the links and of their parents in the world, from those in the frame of the parent.

    As many rounds as the depth of the tree has binary digits: each doubles the number of joints that R spans.
    """
    jump = np.array(body.parents)
    while np.any(jump >= 0):
        R, before = _and_those(jump, R)
        R = tuple(_turn(before, column) for column in R)
        jump = np.where(jump >= 0, jump[jump], -1)
    return _and_those(np.array(body.parents), R)


def _and_those(which: np.ndarray, R: _Matrix) -> tuple[_Matrix, _Matrix]:
    """R, computed, and its entries of the given links; the identity for -1."""
    n = len(which)
    both = _product(R, np.concatenate([np.eye(n), which == np.arange(n)[:, None]], axis=1))
    first = jnp.asarray(which < 0, both[0].x.dtype)
    those = [[a[n:] + first if i == k else a[n:] for i, a in enumerate(column)] for k, column in enumerate(both)]
    return jax.tree.map(lambda a: a[:n], both), tuple(_Vector(*column) for column in those)


def _move(body: RigidBody, q: Array, qd: Array, qdd: Array) -> _Motion:
    S, inertia, _, _ = _kinematics(body, q)
    Sqd = _scale(qd, S)
    V = _path(body, Sqd)
    own = _add(_scale(qdd, S), _motion_cross(V, Sqd))
    A = _path(body, own)
    A = A._replace(v=_Vector(*(a - g for a, g in zip(A.v, body.gravity.astype(q.dtype), strict=True))))
    return _Motion(S, inertia, V, _sub(V, Sqd), A, _sub(A, own))


def _forces(motion: _Motion) -> tuple[_Spatial, _Spatial]:
    """Momentum and rate of momentum of each link."""
    momentum = motion.inertia.times(motion.V)
    return momentum, _add(motion.inertia.times(motion.A), _force_cross(motion.V, momentum))


def _partials(body: RigidBody, motion: _Motion) -> tuple[Array, Array, Array]:
    """∂τ/∂q, ∂τ/∂q̇, ∂τ/∂q̈ (Singh et al., 2022), with B of a link ½((V ×*) I - I (V ×) + (I V) ×̄*) and its sum B^C."""
    S, inertia, V, V0, _, A0 = motion
    psi_dot, S_dot = _motion_cross(V0, S), _motion_cross(V, S)
    psi_ddot = _add(_motion_cross(A0, S), _motion_cross(V0, psi_dot))
    psi_mean = _add(psi_dot, S_dot)
    momentum, force = _forces(motion)
    # 2B has one block of its own, rate - momentum.w ×, and -2 momentum.v ×: all else cancels.
    inertia, rate, momentum, force = _subtree(body, (inertia, _rate(inertia, V), momentum, force))
    B_times = lambda X: _Spatial(_sub(rate.times(X.w), _cross(momentum.w, X.w)), _scale(2.0, _cross(X.w, momentum.v)))
    S_B = _add(rate.times(S.w), _cross(momentum.w, S.w), _scale(2.0, _cross(momentum.v, S.v)))
    S_I = inertia.times(S)
    q_above = _add(B_times(psi_dot), inertia.times(psi_ddot), _force_cross(S, force))
    qd_above = _add(B_times(S), inertia.times(psi_mean))
    zero = jax.tree.map(jnp.zeros_like, S.w)
    lower = _products((S_B, S_I), [(psi_dot.w, psi_ddot), (S.w, psi_mean), (zero, S)])
    upper = _products(S, [q_above, qd_above, S_I])
    dq, dqd, dqdd = (_table(body, *pair) for pair in zip(lower, upper, strict=True))
    return dq, dqd + _eye(body) * body.dampings, dqdd + _eye(body) * body.armatures


def _rate(inertia: _Inertia, V: _Spatial) -> _Symmetric:
    """Rate of the second moment of a link that moves: ω× I - I ω× - v× h× - h× v×."""
    (x, y, z), I, h, v = V.w, inertia.I, inertia.h, V.v
    hv = sum(a * b for a, b in zip(h, v, strict=True))
    return _Symmetric(
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


def _vector(a: Array) -> _Vector:
    return _Vector(a[:, 0], a[:, 1], a[:, 2])


def _add(first: Any, *others: Any) -> Any:
    return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), first, *others)


def _sub(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.subtract, a, b)


def _scale(factor: Array | float, X: Any) -> Any:
    return jax.tree.map(lambda x: factor * x, X)


def _dot(a: _Spatial, b: _Spatial) -> Array:
    return _add(*(x * y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def _cross(a: _Vector, b: _Vector) -> _Vector:
    return _Vector(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x)


def _turn(R: Any, a: _Vector) -> _Vector:
    """R a, from the columns of R."""
    return _add(*(_scale(component, column) for component, column in zip(a, R, strict=True)))


def _motion_cross(V: _Spatial, X: _Spatial) -> _Spatial:
    return _Spatial(_cross(V.w, X.w), _add(_cross(V.w, X.v), _cross(V.v, X.w)))


def _force_cross(V: _Spatial, f: _Spatial) -> _Spatial:
    return _Spatial(_add(_cross(V.w, f.w), _cross(V.v, f.v)), _cross(V.w, f.v))


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


def _axis_angle(axis: np.ndarray, angle: float) -> np.ndarray:
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
