"""Training a car's model on drives: weighted rollouts, each on its own track.

    loss(θ) = mean over samples of the weighted errors (D15) of  x̂_0 = x_t,  x̂_{k+1} = RK4(x̂_k, u_{t+k}; θ)

References: Węgrzynowski et al., Learning What Matters, eq. (1).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.models.vehicle import AbstractVehicle
from sartor.systems.racing_car import DT, Theta, step
from sartor.track import Track
from sartor.weights import Weights

PREDICTED = (True,) * 6 + (False,) * 3
"""Which states count in a loss: friction and actuators are known."""


class Drive(NamedTuple):
    """A log of a car on a track."""

    xs: Float[np.ndarray, "T_plus_1 9"]
    """States at the control instants."""
    us: Float[np.ndarray, "T 2"]
    """Controls between them."""
    clear: np.ndarray
    """(T + 1,), whether the car touches no wall."""
    track: int
    """Number of its track."""


class CarSamples(NamedTuple):
    """Samples of training; the first axis is that of samples."""

    x0: np.ndarray
    """(B, 9)."""
    us: np.ndarray
    """(B, P, 2), the controls that followed."""
    xs: np.ndarray
    """(B, P, 9), the states that followed."""
    track: np.ndarray
    """(B,), number of the track."""
    step: np.ndarray
    """(B,), control step in its drive."""
    clear: np.ndarray
    """(B,), control steps before a wall is touched, at most P."""

    @property
    def size(self) -> int:
        """B."""
        return len(self.x0)

    def take(self, which: Any) -> "CarSamples":
        """Some of the samples."""
        return CarSamples(*(field[which] for field in self))


def cut(drives: Sequence[Drive], num_steps: int, stride: int = 1, *, clear: int | None = None) -> CarSamples:
    """All samples of so many steps, of which at least the first `clear` touch no wall, beginning at every `stride`-th.

    Args:
        drives: Logs.
        num_steps: P.
        stride: Control steps between the beginnings of two samples.
        clear: Control steps without a wall; P unless given.

    Fails: `ValueError` if there is none.
    """
    least, found = num_steps if clear is None else clear, []
    for drive in drives:
        for t in range(0, len(drive.us) - num_steps + 1, stride):
            end = t + num_steps
            touched = np.flatnonzero(~drive.clear[t : end + 1])
            free = int(touched[0]) - 1 if touched.size else num_steps
            if free >= least:
                found.append((drive.xs[t], drive.us[t:end], drive.xs[t + 1 : end + 1], drive.track, t, free))
    if not found:
        raise ValueError(f"no drive stays clear of the walls for {least} steps: drive longer, or more slowly.")
    return CarSamples(*map(np.array, zip(*found, strict=True)))


def stacked(tracks: Sequence[Track]) -> Track:
    """Tracks as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tracks)


def rollout_errors(
    vehicle: AbstractVehicle, track: Track, x0: Array, us: Array, xs: Array, dt: Any = DT
) -> Float[Array, "p 9"]:
    """x̂ - x of one sample along its p controls."""
    theta = Theta(vehicle, track, dt=dt)

    def advance(x, u):
        x = step(x, u, 0, theta)
        return x, x

    return jax.lax.scan(advance, x0, us)[1] - xs


def rollout_loss(
    tracks: Track, dt: Any, vehicle: AbstractVehicle, batch: tuple[CarSamples, Weights]
) -> Float[Array, " B"]:
    """Weighted loss (D15) of each sample of a batch, as `sartor.train.optimise` wants it; p is that of the weights."""
    sample, weights = batch
    num_steps = jax.tree.leaves(weights)[0].shape[-2]

    def errors(x0, us, xs, track):
        here = jax.tree.map(lambda leaf: leaf[track].astype(x0.dtype), tracks)
        return rollout_errors(vehicle, here, x0, us, xs, dt)

    ahead: Any = (sample.x0, sample.us[:, :num_steps], sample.xs[:, :num_steps], sample.track)
    return weights.loss(jax.vmap(errors)(*ahead))


def loss_on(tracks: Sequence[Track], dt: float = DT) -> Any:
    """`rollout_loss` on these tracks; `dt` is the control step of the drives [s]."""
    return eqx.Partial(rollout_loss, stacked(tracks), dt)
