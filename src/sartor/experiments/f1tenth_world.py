"""Tracks, plants and drives of the racing experiment.

Numbers 0, 1, ... are the tracks of the data, -1, -2, ... those of the tests; each has friction of its own.
"""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor import racing
from sartor.models.vehicle import SingleTrack, f1tenth
from sartor.racing import RacingPlant
from sartor.systems import racing_car
from sartor.systems.racing_car import Theta
from sartor.track import Track
from sartor.track_generator import generate

PENALTY = 5.0
"""Seconds that a second in contact with a wall costs."""
_FIRST_TRACK, _FIRST_TEST = 100, 300  # seeds of tracks
_SPEEDS, _HELD = (1.2, 4.5), 20  # of a gentle drive [m/s], and for how many control steps one is held


_NOISE = (0.4, 0.06)  # of its controls, a step of the noise [m/s, rad]


@cache
def track(number: int) -> Track:
    """A track by its number."""
    return generate(_FIRST_TRACK + number if number >= 0 else _FIRST_TEST - 1 - number)


@cache
def plant(number: int) -> RacingPlant:
    """The true car on it: stiffer tyres with a little less grip than those that are published, and patches."""
    published = f1tenth()
    change = lambda tyre, lateral, longitudinal: eqx.tree_at(
        lambda t: (t.lateral, t.longitudinal), tyre, (lateral, longitudinal)
    )
    front = change(published.front, (0.075, 0.62, 0.80, 0.2), (3.4, 0.75, 0.78, 0.0))
    rear = change(published.rear, (0.085, 0.60, 0.83, 3.0), (5.0, 1.5, 0.8, 5.0))
    return RacingPlant(
        SingleTrack(front=front, rear=rear), track(number), racing.patches(track(number), 0.8, number % 997)
    )


def gentle(number: int, num_steps: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, controls and contact of the plant along the centreline, at speeds that change, with slow noise."""
    low, high = _SPEEDS
    speeds = np.random.default_rng((seed, 5)).uniform(low, high, -(-num_steps // _HELD))
    speeds = jnp.asarray(np.repeat(speeds, _HELD)[:num_steps])
    xs, us, contact = _gentle(plant(number), Theta(f1tenth(), track(number)), speeds, jax.random.key(seed))
    return np.asarray(xs), np.asarray(us), np.asarray(contact)


@eqx.filter_jit
def _gentle(plant: RacingPlant, theta: Theta, speeds: Float[Array, " T"], key: Array) -> tuple[Array, Array, Array]:
    low, high = (jnp.asarray(limit) for limit in theta.limits)

    def advance(carry, at):
        state, noise = carry
        k, speed = at
        noise = 0.9 * noise + jnp.asarray(_NOISE) * jax.random.normal(jax.random.fold_in(key, k), (2,))
        u = jnp.clip(racing_car.follow(state.x, theta, speed) + noise, low, high)
        state = plant.step(state, u)
        return (state, noise), (state.x, u, racing.contact(plant.track, state.x))

    begin = racing_car.rolling(0.0, 2.0)
    steps = (jnp.arange(speeds.shape[0]), speeds)
    _, (xs, us, contact) = jax.lax.scan(advance, (plant.start(begin), jnp.zeros(2)), steps)
    return jnp.concatenate([begin[None], xs]), us, contact
