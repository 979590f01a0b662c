"""Random tracks like those of a laboratory: some 18 m long, turns to both sides, one of them narrow, and a straight.

A lap begins in the middle of the longest straight.

Random points around a centre are joined by a periodic spline, and what does not look like the published tracks is drawn
again: largest curvature 1.2 to 2.2 1/m, mean of its size 0.45 to 0.65 1/m, a turn to the other side of at least
0.7 1/m, 2.5 m that are nearly straight, and walls that keep apart.

Source of these statistics: four tracks of the code of Węgrzynowski et al., Learning What Matters.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sartor.track import KNOTS, Track, arc_length, coefficients, crossing, periodic_spline, shape

NAMED = {"kite": 2, "boot": 9, "fin": 15, "anvil": 17}
"""Seeds of the tracks that have a name."""
_TRIES = 20_000
_STRAIGHT = 0.2  # [1/m]


def named(name: str) -> Track:
    """A track by its name, one of `NAMED`."""
    if name not in NAMED:
        raise ValueError(f"there is no track {name!r}; those with a name are {sorted(NAMED)}.")
    return generate(NAMED[name])


def generate(seed: int, *, length: float = 18.0, half_width: float = 0.28) -> Track:
    """A track by its seed; half of them turn left in total.

    Args:
        seed: Of the points.
        length: Of the centreline [m]; the curvatures above are those of 18 m.
        half_width: Free width to either side [m].

    Fails: `ValueError` if none is found that is wide enough.
    """
    rng = np.random.default_rng((seed, 23))
    for _ in range(_TRIES):
        xy, curvature = _drawn(rng)
        if _like_a_laboratory(xy, curvature, half_width * 18.0 / length):
            break
    else:
        raise ValueError(f"no track of half-width {half_width} m fits into {length} m: make it narrower or longer.")
    begin = -_longest(np.abs(curvature) < _STRAIGHT)[1]
    xy, curvature, scale = np.roll(xy, begin, 0), np.roll(curvature, begin), length / 18.0
    width = coefficients(np.full(KNOTS, half_width))
    arrays = (length, coefficients(curvature / scale), width, width, coefficients(scale * xy))
    return Track(*(jnp.asarray(array, jnp.result_type(float)) for array in arrays))


def _drawn(rng: np.random.Generator) -> tuple[Float[np.ndarray, "K 2"], Float[np.ndarray, " K"]]:
    """Centreline of 18 m and its curvature, at equal distances."""
    count = rng.integers(7, 11)
    angle = 2.0 * np.pi * (np.arange(count) + rng.uniform(-0.35, 0.35, count)) / count
    radius = rng.uniform(0.3, 1.0, count)
    points = radius[:, None] * np.stack([np.cos(angle), rng.uniform(0.6, 1.0) * np.sin(angle)], 1)
    spline, _ = periodic_spline(points[:: rng.choice([-1, 1])], 0.0)
    s, u, length = arc_length(spline)
    even = np.interp(length * np.arange(KNOTS) / KNOTS, s, u)
    xy, curvature = shape(spline, even)
    return 18.0 / length * xy, length / 18.0 * curvature


def _like_a_laboratory(xy: np.ndarray, curvature: np.ndarray, half_width: float) -> bool:
    size, turn = np.abs(curvature), np.sign(curvature.sum())
    if not (1.2 <= size.max() <= 2.2 and 0.45 <= size.mean() <= 0.65 and (-turn * curvature).max() >= 0.7):
        return False
    return _longest(size < _STRAIGHT)[0] * 18.0 / KNOTS >= 2.5 and crossing(xy) is None and _apart(xy, half_width)


def _longest(on: np.ndarray) -> tuple[int, int]:
    """Length and middle of the longest run of True around a circle."""
    off = np.flatnonzero(~on)
    if off.size == 0:
        return on.size, 0
    runs = np.diff(np.append(off, off[0] + on.size)) - 1
    longest = int(np.argmax(runs))
    return int(runs[longest]), int(off[longest] + 1 + runs[longest] // 2) % on.size


def _apart(xy: np.ndarray, half_width: float) -> bool:
    """Whether parts of the track that do not follow each other keep their walls apart."""
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    steps = np.abs(np.arange(KNOTS)[:, None] - np.arange(KNOTS)[None])
    along = np.minimum(steps, KNOTS - steps) * 18.0 / KNOTS
    wall = 2.0 * half_width + 0.1
    return bool(np.all(distance[along > np.pi / 2 * wall] > wall))
