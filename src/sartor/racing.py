"""Closed loop on the track: a plant that is richer than what any controller believes, and laps around it.

Beside other tyres the plant has loads that follow the accelerations with a lag, tyres that grip less for their load the
more they carry, friction that changes along the track, controls that arrive late, and walls that push back:

    F_z,f = m (g l_r - h a_x)/(l_f + l_r),   F_z,r = m (g l_f + h a_x)/(l_f + l_r)
    grip of an axle = friction(s) (1 - κ (F_z/F_z0 - 1)) (1 - κ (h a_y/(g b))²)                                  (D25)

with the height h of the centre of mass, half the distance b of the wheels of an axle, the load F_z0 at rest, and a_x,
a_y behind a first-order lag. Of the control, the first `delay` seconds of an interval still have the one before. A car
that has stood for a second is put back on the centreline, at 1 m/s.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sartor.models.integrate import rk4
from sartor.models.vehicle import GRAVITY, Motion, SingleTrack
from sartor.mpc import MPC, Memory
from sartor.problem import penalty
from sartor.solution import RESULTS
from sartor.systems import racing_car
from sartor.systems.racing_car import DT
from sartor.track import Track

_STANDS, _MARSHAL = 0.3, 0.99  # speed [m/s] of a car that stands, time until it is put back [s]
_PIECES = (2, 4)  # RK4 steps with the control before, and with that of now
_WALL, _DAMPING, _SCRUB = 2500.0, 40.0, 0.4  # spring [1/s²], damper [1/s] and friction of walls


class PlantState(NamedTuple):
    """Of the true system."""

    x: Float[Array, "9"]
    """As of `sartor.systems.racing_car`; its friction is what the controller is told."""
    pull: Float[Array, "2"]
    """a_x and a_y that the loads feel [m/s²]."""
    before: Float[Array, "2"]
    """The control before."""
    standing: Int[Array, ""]
    """Control steps for which the car has hardly moved."""


class RacingPlant(eqx.Module):
    """The true car on the true track."""

    vehicle: SingleTrack
    """With the true tyres."""
    track: Track
    """Its walls are solid."""
    friction: Float[Array, " K"]
    """Coefficients over the track, as those of `track`."""
    height: Any = 0.06
    """h [m]."""
    half_axle: Any = 0.12
    """b [m]."""
    load_sensitivity: Any = 0.2
    """κ."""
    load_lag: Any = 0.06
    """Of the loads [s]."""
    delay: Any = 0.012
    """Of the controls [s], less than a control step."""
    noise: Any = 0.0
    """Standard deviation of what is measured, a number or (9,)."""
    dt: Any = DT
    """Of a control step [s], that of the controller."""

    def __check_init__(self):
        if _known(self.dt) and not self.dt > 0.0:
            raise ValueError(f"dt must be positive, not {self.dt} s.")
        if _known(self.dt, self.delay) and not 0.0 <= self.delay < self.dt:
            raise ValueError(f"delay must lie in [0, {self.dt}) s, less than a control step, not {self.delay}.")

    def start(self, x: Float[Array, "9"]) -> PlantState:
        """Driving with what x says, unaccelerated."""
        return PlantState(x, jnp.zeros(2, x.dtype), x[7:], jnp.asarray(0))

    def step(self, state: PlantState, u: Float[Array, "2"]) -> PlantState:
        """One control step. A car that stands for a second, as one that has spun and has no reverse, is put back."""
        x, pull, before, standing = state
        first, second = _PIECES
        hs = jnp.concatenate([jnp.full(first, self.delay / first), jnp.full(second, (self.dt - self.delay) / second)])
        controls = jnp.concatenate([jnp.tile(before, (first, 1)), jnp.tile(u, (second, 1))])
        z = jnp.concatenate([x, pull])
        z, _ = jax.lax.scan(lambda z, at: (_small_step(self, z, *at), None), z, (hs.astype(x.dtype), controls))
        standing = jnp.where(z[3] < _STANDS, standing + 1, 0)
        away = standing * self.dt >= _MARSHAL - 1e-9
        anew = jnp.zeros_like(z).at[jnp.asarray([0, 3, 6, 7])].set(jnp.stack([z[0], 1.0, z[6], 1.0]))
        z = jnp.where(away, anew, z)
        return PlantState(z[:9], z[9:], jnp.where(away, z[7:9], u), jnp.where(away, 0, standing))

    def measure(self, state: PlantState, key: Array) -> Float[Array, "9"]:
        """x, with noise but on friction."""
        noise = self.noise * jax.random.normal(key, (9,), state.x.dtype)
        return state.x + noise.at[6].set(0.0)


class Race(NamedTuple):
    """A closed loop of T control steps; with a leading axis, several."""

    xs: Float[Array, "T_plus_1 9"]
    """True states."""
    measured: Float[Array, "T_plus_1 9"]
    """What the controller saw; the last it would have seen."""
    us: Float[Array, "T 2"]
    """Controls."""
    results: RESULTS
    """How the solves ended."""
    contact: Any
    """(T,), how far the car is within a wall at the end of each step [m]."""


@eqx.filter_jit
def race(plant: RacingPlant, controller: MPC, x0: Float[Array, "9"], num_steps: int, key: Array) -> Race:
    """Drive for some control steps; batch it with `jax.vmap` over arrays of plant, controller, x0 and key.

    Args:
        plant: The true system.
        controller: With `sartor.systems.racing_car.Theta` as parameters.
        x0: Where it begins.
        num_steps: T.
        key: Of the noise.

    Fails: `ValueError` for control steps of plant and controller that differ; failed solves are in `results`, and walls
        keep the car on the track.
    """
    _check_dt(plant, controller)
    carry = _begin(plant, controller, x0, key)
    (state, _), seen = jax.lax.scan(lambda c, k: _advance(plant, controller, key, c, k), carry, jnp.arange(num_steps))
    xs, measured, us, results, depth = seen
    last = plant.measure(state, jax.random.fold_in(key, num_steps))
    return Race(jnp.concatenate([x0[None], xs]), jnp.concatenate([measured, last[None]]), us, results, depth)


class Branches(NamedTuple):
    """At B moments of a closed loop."""

    slope: Float[Array, "B 2"]
    """dJ/du_t, of the cost that follows, feedback and plant included."""
    curvature: Float[Array, "B 2"]
    """d²J/du_t²; NaN where a bound of the control is nearer than the step, and the slope is one-sided."""


@eqx.filter_jit
def branches(
    plant: RacingPlant, controller: MPC, x0: Float[Array, "9"], num_steps: int, key: Array, moments: Int[Array, " B"],
    steps_on: int, size: Float[Array, "2"],
) -> Branches:  # fmt: skip
    """What a control matters to the closed loop: the plant is copied, one control moved up or down for one control
    step, and the copies drive on under the controller.

    J = Σ over the control steps that follow of the controller's stage cost and the penalty of its walls, at the states
    of the plant.

    Args:
        plant, controller, x0, num_steps, key: As of `race`.
        moments: Control steps to branch at, less than `num_steps`.
        steps_on: Control steps of a branch.
        size: By how much each control is moved [its unit].
    """
    _check_dt(plant, controller)
    low, high = (bound[0] for bound in controller.problem.bounds)
    advance = lambda carry, k: (_advance(plant, controller, key, carry, k)[0], carry)
    _, carries = jax.lax.scan(advance, _begin(plant, controller, x0, key), jnp.arange(num_steps))
    moved, soft = jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2), -jnp.eye(2)]) * size, racing_car.SOFT

    def follow(carry, t, by):
        def on(carry, k):
            x = carry[0].x
            moved = lambda u: jnp.where(k == 0, jnp.clip(u + by, low, high), u)
            carry, (_, _, u, *_) = _advance(plant, controller, key, carry, t + k, moved)
            touched = penalty(racing_car.walls(x, controller.theta), soft.linear, soft.quadratic)
            return carry, (racing_car.stage_cost(x, u, k, controller.theta) + jnp.sum(touched), u)

        _, (costs, us) = jax.lax.scan(on, carry, jnp.arange(steps_on))
        return jnp.sum(costs), us[0]

    chosen = jax.tree.map(lambda leaf: leaf[moments], carries)
    J, u = jax.vmap(lambda carry, t: jax.vmap(lambda by: follow(carry, t, by))(moved))(chosen, moments)
    far = jnp.abs(u[:, 1:] - u[:, :1])  # of each copy and control
    ahead, behind = far[:, (0, 1), (0, 1)], far[:, (2, 3), (0, 1)]
    whole = jnp.minimum(ahead, behind) > 0.99 * size
    slope = (J[:, 1:3] - J[:, 3:]) / jnp.maximum(ahead + behind, 1e-9)
    curvature = (J[:, 1:3] - 2.0 * J[:, :1] + J[:, 3:]) / size**2
    return Branches(slope, jnp.where(whole, curvature, jnp.nan))


def contact(track: Track, x: Float[Array, "9"]) -> Float[Array, ""]:
    """How far the centre of the car is beyond a wall [m]."""
    left, right = track.walls_at(x[0])
    return jnp.maximum(jnp.maximum(x[1] - left, -x[1] - right), 0.0)


def crossings(
    s: Float[np.ndarray, " T_plus_1"], distances: Float[np.ndarray, " m"], dt: float = DT
) -> Float[np.ndarray, " m"]:
    """When the car has come so far [s], between two samples along a straight line; inf where it never does."""
    ahead = np.maximum.accumulate(np.asarray(s, float))
    times = dt * np.interp(distances, ahead, np.arange(len(ahead)))
    return np.where(np.asarray(distances) <= ahead[-1], times, np.inf)


def patches(track: Track, base: float, seed: int, *, depth: float = 0.15, count: int = 3) -> Float[Array, " K"]:
    """Friction along a track: `base` with random patches that have up to `depth` less or more, a metre long or so."""
    rng, K = np.random.default_rng((seed, 31)), track.curvature.shape[0]
    s = float(track.length) * np.arange(K) / K
    friction = np.full(K, base)
    for place, size in zip(rng.uniform(0.0, float(track.length), count), rng.uniform(-1, 1, count), strict=True):
        far = (s - place + 0.5 * float(track.length)) % float(track.length) - 0.5 * float(track.length)
        friction += depth * size * np.exp(-0.5 * (far / 0.6) ** 2)
    return jnp.asarray(friction, track.curvature.dtype)


def _begin(plant: RacingPlant, controller: MPC, x0: Array, key: Array) -> tuple[PlantState, Memory]:
    start = plant.start(x0)
    return start, controller.init(plant.measure(start, jax.random.fold_in(key, 0)))


def _advance(
    plant: RacingPlant, controller: MPC, key: Array, carry: tuple[PlantState, Memory], k: Array,
    moved: Callable = lambda u: u,
) -> tuple[tuple[PlantState, Memory], tuple]:  # fmt: skip
    """One control step; `moved` changes its control."""
    state, memory = carry
    x = plant.measure(state, jax.random.fold_in(key, k))
    u, memory, info = controller(x, k, memory)
    u = moved(u)
    state = plant.step(state, u)
    return (state, memory), (state.x, x, u, info.result, contact(plant.track, state.x))


def _check_dt(plant: RacingPlant, controller: Any) -> None:
    theirs = getattr(getattr(controller, "theta", None), "dt", plant.dt)
    if _known(plant.dt, theirs) and plant.dt != theirs:
        raise ValueError(
            f"plant.dt is {plant.dt} s, and that of the controller's theta {theirs} s: make them the same."
        )


def _known(*values: Any) -> bool:
    return all(isinstance(value, float | int) for value in values)


def _small_step(plant: RacingPlant, z: Array, h: Array, u: Array) -> Array:
    return rk4(_plant_ode, 1.0)(z, (u, h), 0, plant)


def _plant_ode(z: Array, control: tuple[Array, Array], plant: RacingPlant) -> Array:
    """dz/dt of z = (x, a_x, a_y), times the step h."""
    u, h = control
    s, n, mu, vx, vy, r, _, wheel, steer = z[:9]
    ax, ay = z[9:]
    body, curvature = plant.vehicle.body, plant.track.curvature_at(s)
    motion = Motion(vx, vy, r, plant.track.at(plant.friction, s), wheel, steer)
    rates = plant.vehicle.rates_under(motion, *_grips(plant, ax, ay)) + _wall(plant.track, s, n, mu, vx, vy, r)
    progress = (vx * jnp.cos(mu) - vy * jnp.sin(mu)) / jnp.maximum(1.0 - n * curvature, 0.2)
    felt = jnp.stack([rates[0] - vy * r, rates[1] + vx * r])
    pose = jnp.stack([progress, vx * jnp.sin(mu) + vy * jnp.cos(mu), r - curvature * progress])
    actuators = jnp.stack([(u[0] - wheel) / body.wheel_lag, (u[1] - steer) / body.steer_lag])
    return h * jnp.concatenate([pose, rates, jnp.zeros_like(z[:1]), actuators, (felt - z[9:]) / plant.load_lag])


def _grips(plant: RacingPlant, ax: Array, ay: Array) -> tuple[Array, Array]:
    """Loads of the axles times what they lose by (D25) [N]."""
    body = plant.vehicle.body
    transfer = body.mass * plant.height * ax / (body.lf + body.lr)
    side = 1.0 - plant.load_sensitivity * (plant.height * ay / (GRAVITY * plant.half_axle)) ** 2

    def one(rest, load):
        load = jnp.maximum(load, 0.05 * rest)
        return load * (1.0 - plant.load_sensitivity * (load / rest - 1.0)) * side

    front, rear = body.loads
    return one(front, front - transfer), one(rear, rear + transfer)


def _wall(track: Track, s: Array, n: Array, mu: Array, vx: Array, vy: Array, r: Array) -> Array:
    """What walls add to the rates of v_x, v_y and r: a spring with damper across, friction along, and they straighten
    the car. Crude, and the same for all controllers."""
    left, right = track.walls_at(s)
    depth = jnp.maximum(n - left, 0.0) - jnp.maximum(-n - right, 0.0)
    touching = jnp.minimum(jnp.abs(depth) / 0.01, 1.0)
    outwards = vx * jnp.sin(mu) + vy * jnp.cos(mu)
    push = -_WALL * depth - touching * _DAMPING * outwards
    scrub = _SCRUB * jnp.abs(push) / jnp.maximum(jnp.hypot(vx, vy), 0.5)
    return jnp.stack([
        push * jnp.sin(mu) - scrub * vx, push * jnp.cos(mu) - scrub * vy, -touching * (40.0 * mu + 10.0 * r)
    ])  # fmt: skip
