"""Closed tracks: a centreline by its arc length s, with its curvature and the free width to either side.

    z(s) = Σ_i c_i b(s/h - i),   h = length/K,   b: the cubic B-spline, periodic in s                             (D23)

for z = curvature, widths and position. A track is a pytree of arrays: those with equally many knots share what has been
compiled. Lateral offsets n are positive to the left, and so is the curvature of a left turn.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.interpolate import splev, splprep

Scalar = Float[Array, ""]
KNOTS = 200


class Track(NamedTuple):
    """A closed track."""

    length: Scalar
    """Of the centreline [m]."""
    curvature: Float[Array, " K"]
    """Coefficients of the curvature [1/m]."""
    left: Float[Array, " K"]
    """Coefficients of the free width to the left [m]."""
    right: Float[Array, " K"]
    """Coefficients of the free width to the right [m]."""
    position: Float[Array, "K 2"]
    """Coefficients of x and y [m]."""

    def at(self, coefficients: Float[Array, "K ..."], s: Scalar) -> Float[Array, "..."]:
        """The spline with these coefficients, at arc length s of any lap [m]."""
        around, f = self._around(coefficients, s)
        return _basis(f) @ around

    def curvature_at(self, s: Scalar) -> Scalar:
        """κ(s) [1/m]."""
        return self.at(self.curvature, s)

    def walls_at(self, s: Scalar) -> tuple[Scalar, Scalar]:
        """Free width to the left and to the right [m]."""
        return self.at(self.left, s), self.at(self.right, s)

    def heading_at(self, s: Scalar) -> Scalar:
        """Direction of the centreline [rad], in (-π, π]."""
        around, f = self._around(self.position, s)
        dx, dy = _basis_slope(f) @ around
        return jnp.arctan2(dy, dx)

    def place(self, s: Scalar, n: Scalar = 0.0) -> Float[Array, "2"]:  # pyright: ignore
        """x and y [m] of a point beside the centreline."""
        psi = self.heading_at(s)
        return self.at(self.position, s) + n * jnp.stack([-jnp.sin(psi), jnp.cos(psi)])

    def _around(self, coefficients: Array, s: Scalar) -> tuple[Array, Scalar]:
        """The four coefficients that count at s, and the fraction of its interval."""
        count = coefficients.shape[0]
        place = s * (count / self.length)
        knot = jnp.floor(place)
        return coefficients[(knot.astype(int) + jnp.arange(-1, 3)) % count], place - knot


def from_points(
    xy: Float[np.ndarray, "M 2"],
    left: Float[np.ndarray, " M"] | float,
    right: Float[np.ndarray, " M"] | float,
    *,
    smoothing: float = 0.02,
    car_width: float = 0.2,
    name: str = "track",
) -> Track:
    """A track from points along its centreline, in the order of driving.

    Args:
        xy: Points [m], those of one lap; the last may repeat the first.
        left: Free width to the left at each point, or everywhere [m].
        right: The same to the right.
        smoothing: Root mean square of how far the centreline may leave the points [m]; 0 goes through all of them.
        car_width: Least width of the track [m].
        name: What messages begin with.

    Fails: `ValueError` for too few points, such that are not finite, an open loop, a centreline that crosses itself, a
        track that is narrower than the car, and walls inside of the centre of a turn.
    """
    xy, *sides = _checked_points(name, xy, left, right)
    spline, ends = periodic_spline(xy, smoothing)
    s, u, length = arc_length(spline)
    even = np.interp(length * np.arange(KNOTS) / KNOTS, s, u)
    xy, curvature = shape(spline, even)
    widths = [np.interp(even, ends, np.append(w, w[:1])) for w in sides]
    _check_shape(name, xy, length, curvature, *widths, car_width=car_width)
    arrays = (length, *map(coefficients, (curvature, *widths, xy)))
    return Track(*(jnp.asarray(array, jnp.result_type(float)) for array in arrays))


def coefficients(values: Float[np.ndarray, "K ..."]) -> Float[np.ndarray, "K ..."]:
    """Coefficients of the periodic cubic spline through values at the knots: (c_{i-1} + 4 c_i + c_{i+1})/6 = z_i."""
    count = values.shape[0]
    kernel = (4.0 + 2.0 * np.cos(2.0 * np.pi * np.arange(count) / count)) / 6.0
    spectrum = np.fft.fft(values, axis=0) / kernel.reshape(-1, *(1,) * (values.ndim - 1))
    return np.real(np.fft.ifft(spectrum, axis=0))


def _basis(f: Scalar) -> Float[Array, "4"]:
    """The four B-splines that are not zero, at a fraction f of an interval."""
    g = 1.0 - f
    return jnp.stack([g**3, 3.0 * f**3 - 6.0 * f**2 + 4.0, 3.0 * g**3 - 6.0 * g**2 + 4.0, f**3]) / 6.0


def _basis_slope(f: Scalar) -> Float[Array, "4"]:
    g = 1.0 - f
    return jnp.stack([-(g**2), 3.0 * f**2 - 4.0 * f, -3.0 * g**2 + 4.0 * g, f**2]) / 2.0


def _checked_points(name: str, xy: np.ndarray, left: np.ndarray | float, right: np.ndarray | float) -> tuple:
    xy = np.asarray(xy, float)
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"{name}: points must have shape (M, 2), x and y in metres, not {xy.shape}.")
    widths = []
    for side, width in (("left", left), ("right", right)):
        width = np.asarray(width, float)
        if width.shape not in ((), xy.shape[:1]):
            raise ValueError(f"{name}: {side} must be one width, or one for each of the {len(xy)} points.")
        widths.append(np.broadcast_to(width, xy.shape[:1]))
    if not all(np.isfinite(values).all() for values in (xy, *widths)):
        raise ValueError(f"{name}: some points or widths are not finite numbers.")
    moves = np.linalg.norm(np.roll(xy, -1, 0) - xy, axis=1) > 0  # a point that is repeated says nothing
    xy, widths = xy[moves], [width[moves] for width in widths]
    if len(xy) < 12:
        raise ValueError(f"{name}: {len(xy)} different points are too few for a closed curve; give at least 12.")
    steps = np.linalg.norm(np.roll(xy, -1, 0) - xy, axis=1)
    widest, usual = int(np.argmax(steps)), float(np.median(steps))
    if steps[widest] > 5.0 * usual:
        place = "the last point to the first" if widest == len(xy) - 1 else f"point {widest} to the next"
        raise ValueError(
            f"{name}: the loop is open: from {place} it is {steps[widest]:.3g} m, where others are {usual:.3g} m apart."
            " Add what is missing, or take one lap only."
        )
    return xy, *widths


def shape(spline: Any, u: np.ndarray) -> tuple[Float[np.ndarray, "K 2"], Float[np.ndarray, " K"]]:
    """Position and curvature of a plane curve at its parameters u."""
    (x, y), (dx, dy), (ddx, ddy) = (np.array(splev(u, spline, der=order)) for order in range(3))
    return np.stack([x, y], 1), (dx * ddy - dy * ddx) / np.hypot(dx, dy) ** 3


def periodic_spline(xy: np.ndarray, smoothing: float) -> tuple:
    """Quintic, so that the curvature is smooth, over the length of the polygon; and where the points lie."""
    closed = np.concatenate([xy, xy[:1]])
    ends = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    ends /= ends[-1]
    spline = splprep(closed.T, u=ends, k=5, s=len(closed) * smoothing**2, per=True)[0]  # pyright: ignore
    return spline, ends


def arc_length(spline: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """s over u, as two columns, and the length."""
    u = np.linspace(0.0, 1.0, 20 * KNOTS + 1)
    middle = 0.5 * (u[1:] + u[:-1])
    speed = lambda at: np.linalg.norm(np.array(splev(at, spline, der=1)), axis=0)
    pieces = np.diff(u) * (speed(u[1:]) + 4.0 * speed(middle) + speed(u[:-1])) / 6.0
    s = np.concatenate([[0.0], np.cumsum(pieces)])
    return s, u, float(s[-1])


def _check_shape(name, xy, length, curvature, left, right, *, car_width) -> None:
    where = crossing(xy)
    if where is not None:
        raise ValueError(f"{name}: the centreline crosses itself near x = {where[0]:.3g} m, y = {where[1]:.3g} m.")
    narrow = int(np.argmin(left + right))
    if left[narrow] + right[narrow] < car_width:
        raise ValueError(
            f"{name}: at s = {length * narrow / KNOTS:.3g} m it is {left[narrow] + right[narrow]:.3g} m wide, less than"
            f" the car with {car_width} m."
        )
    bend = np.maximum(curvature * left, -curvature * right)
    tight = int(np.argmax(bend))
    if bend[tight] >= 0.95:
        raise ValueError(
            f"{name}: at s = {length * tight / KNOTS:.3g} m the curvature is {curvature[tight]:.3g} 1/m, and the wall"
            " lies where all directions across the track meet: smooth more, or make it narrower."
        )


def crossing(xy: Float[np.ndarray, "K 2"]) -> Float[np.ndarray, "2"] | None:
    """Where two sides of a closed polygon cross, None if nowhere."""
    a, b = xy, np.roll(xy, -1, 0)

    def side(p, q, r):  # on which side of the line through p and q the point r lies
        (px, py), (qx, qy), (rx, ry) = (np.moveaxis(at, -1, 0) for at in (p, q, r))
        return (qx - px) * (ry - py) - (qy - py) * (rx - px)

    first = side(a[:, None], b[:, None], a) * side(a[:, None], b[:, None], b) < 0  # the second's ends lie apart
    hit = np.argwhere(first & first.T)
    return None if hit.size == 0 else a[hit[0, 0]]
