"""The links of a robot, and how they move: a tree of hinge and slide joints on a fixed base.

All is written in spatial vectors (angular part first) at the origin of the world, so that a sum over the ancestors or
the descendants of a joint is one product with a constant matrix, and nothing but the rotations goes from joint to
joint. S_i is the axis of joint i, V_i and A_i velocity and acceleration of its link, I_i its inertia:

    V_i = Σ_{j≤i} S_j q̇_j,   A_i = A_0 + Σ_{j≤i} (S_j q̈_j + V_j × S_j q̇_j),   f_i = I_i A_i + V_i ×* I_i V_i

References: Featherstone, Rigid Body Dynamics Algorithms, 2008, chapters 5 and 6.
"""

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


class Motion(NamedTuple):
    """Axes, inertias, velocities and accelerations of the links; those of the link before each joint have `0`."""

    S: Spatial
    inertia: Inertia
    V: Spatial
    V0: Spatial
    A: Spatial
    A0: Spatial


def kinematics(body: RigidBody, q: Array) -> tuple[Spatial, Inertia, Matrix, Vector]:
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
    p = path_sums(body, turn(R0, add(vector(body.positions), scale(slide, along))))
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


def move(body: RigidBody, q: Array, qd: Array, qdd: Array) -> Motion:
    """The motion of all links; gravity is an acceleration of the base."""
    S, inertia, _, _ = kinematics(body, q)
    Sqd = scale(qd, S)
    V = path_sums(body, Sqd)
    own = add(scale(qdd, S), motion_cross(V, Sqd))
    A = path_sums(body, own)
    A = A._replace(v=Vector(*(a - g for a, g in zip(A.v, body.gravity.astype(q.dtype), strict=True))))
    return Motion(S, inertia, V, sub(V, Sqd), A, sub(A, own))


def momenta_and_forces(motion: Motion) -> tuple[Spatial, Spatial]:
    """Momentum and rate of momentum of each link."""
    momentum = motion.inertia.times(motion.V)
    return momentum, add(motion.inertia.times(motion.A), force_cross(motion.V, momentum))


def path_sums(body: RigidBody, X: Any) -> Any:
    """Sum over each joint and those before it."""
    return _product(X, ancestors(body).T)


def subtree_sums(body: RigidBody, X: Any) -> Any:
    """Sum over each joint and those behind it."""
    return _product(X, ancestors(body))


def ancestors(body: RigidBody) -> np.ndarray:
    """Row i, column j: whether joint j is i or lies between i and the base."""
    table = np.eye(body.nq, dtype=bool)
    for i, parent in enumerate(body.parents):
        if parent >= 0:
            table[i] |= table[parent]
    return table


def stack_components(X: Any) -> Array:
    """Components first, (c, n)."""
    return jnp.stack(jax.tree.leaves(X))


def products(a: Any, bs: list) -> list[Array]:
    """a_i · b_j at row i, column j, for each b."""
    n = jax.tree.leaves(a)[0].shape[0]
    rows = zip(*(jax.tree.leaves(b) for b in bs), strict=True)
    right = jnp.stack([x for row in rows for x in row]).reshape(-1, len(bs) * n)
    table = stack_components(a).T @ right
    return [table[:, k * n : (k + 1) * n] for k in range(len(bs))]


def table_of(body: RigidBody, lower: Array, upper: Array) -> Array:
    """`lower` where the joint of the column is that of the row or before it, `upper` where it is behind."""
    below = ancestors(body)
    return jnp.where(below, lower, jnp.where(below.T, upper, 0.0))


def eye(body: RigidBody) -> Array:
    """The identity (n, n), in the precision of the robot."""
    return jnp.asarray(np.eye(body.nq), body.armatures.dtype)


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


def _product(X: Any, matrix: np.ndarray) -> Any:
    """All components times one constant matrix, from the right."""
    constant = jnp.asarray(matrix, jax.tree.leaves(X)[0].dtype)
    if len(jax.tree.leaves(X)) < 9:  # XLA fuses a short stack, which is slower than a product for each component
        return jax.tree.map(lambda x: x @ constant, X)
    sums = stack_components(X) @ constant
    return jax.tree.unflatten(jax.tree.structure(X), [sums[i] for i in range(sums.shape[0])])
