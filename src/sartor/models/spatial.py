"""Spatial vectors and inertias of all links of a robot at once, by components, at the origin of the world.

References: Featherstone, Rigid Body Dynamics Algorithms, 2008, chapter 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Vector(NamedTuple):
    """A vector of each link, by components: arrays over the links compile to much faster code than arrays (n, 3)."""

    x: Float[Array, " n"]
    y: Float[Array, " n"]
    z: Float[Array, " n"]


Matrix = tuple[Vector, ...]  # (3, 3), by columns


class Spatial(NamedTuple):
    """Angular and linear part of a motion, or moment and force."""

    w: Vector
    v: Vector


class Symmetric(NamedTuple):
    """Symmetric matrices (3, 3)."""

    xx: Float[Array, " n"]
    yy: Float[Array, " n"]
    zz: Float[Array, " n"]
    xy: Float[Array, " n"]
    xz: Float[Array, " n"]
    yz: Float[Array, " n"]

    def times(self, a: Vector) -> Vector:
        """The product with a vector."""
        return Vector(
            self.xx * a.x + self.xy * a.y + self.xz * a.z,
            self.xy * a.x + self.yy * a.y + self.yz * a.z,
            self.xz * a.x + self.yz * a.y + self.zz * a.z,
        )


class Inertia(NamedTuple):
    """Spatial inertias at the origin of the world: mass, first moment m c, second moment."""

    m: Float[Array, " n"]
    h: Vector
    I: Symmetric

    def times(self, X: Spatial) -> Spatial:
        """Momentum of a velocity, force of an acceleration."""
        moment = add(self.I.times(X.w), cross(self.h, X.v))
        return Spatial(moment, add(scale(self.m, X.v), cross(X.w, self.h)))


def vector(a: Array) -> Vector:
    """Rows (n, 3) by components."""
    return Vector(a[:, 0], a[:, 1], a[:, 2])


def add(first: Any, *others: Any) -> Any:
    """Sum, component by component."""
    return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), first, *others)


def sub(a: Any, b: Any) -> Any:
    """Difference, component by component."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: Array | float, X: Any) -> Any:
    """A number for each link times all components."""
    return jax.tree.map(lambda x: factor * x, X)


def dot(a: Spatial, b: Spatial) -> Array:
    """Power of a force along a motion, link by link."""
    return add(*(x * y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def cross(a: Vector, b: Vector) -> Vector:
    """a × b."""
    return Vector(a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x)


def turn(R: Any, a: Vector) -> Vector:
    """R a, from the columns of R."""
    return add(*(scale(component, column) for component, column in zip(a, R, strict=True)))


def motion_cross(V: Spatial, X: Spatial) -> Spatial:
    """V × X of motions."""
    return Spatial(cross(V.w, X.w), add(cross(V.w, X.v), cross(V.v, X.w)))


def force_cross(V: Spatial, f: Spatial) -> Spatial:
    """V ×* f of a motion and a force."""
    return Spatial(add(cross(V.w, f.w), cross(V.v, f.v)), cross(V.w, f.v))
