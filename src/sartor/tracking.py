"""Closed loop of MuJoCo plants: every robot follows its reference with its own MPC, all of them in one batch.

    u_t = us_0(x_t, θ_t),   θ_t = (model, z_t, reference_{t..t+N}),   z_t = context(history_t)
    x_{t+1} = plant(x_t, u_t)

As published: one real-time iteration a control step (Gauss-Newton), from the plan before, shifted; z is computed once
per step and held over the horizon; the first plan starts from the measured state and no torque.

References: Schulze et al., Context-Aware Deep Lagrangian Networks for Model Predictive Control, 2025, and its code.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.data import Log
from sartor.models.base import AbstractModel, Theta, history, rest
from sartor.mpc import MPC, Memory
from sartor.plant import Plants
from sartor.problem import Problem
from sartor.solution import RESULTS, guess
from sartor.solvers.base import AbstractSolver
from sartor.solvers.sqp import SQP

Monitor = Callable[[int, int], None]
"""monitor(done, total), called after every control step."""


class Loop(NamedTuple):
    """A closed loop between two control steps; with a leading axis, many."""

    x: Float[Array, " nx"]
    """State at the last control instant."""
    u: Float[Array, " nu"]
    """Control since then."""
    history: Float[Array, "H 3*n"]
    """History (D13) up to the last control instant."""
    memory: Memory
    """Of the MPC."""
    context: Float[Array, " nz"]
    """z, filtered."""


class Tracker(eqx.Module):
    """An MPC that follows references with a learned model."""

    problem: Problem
    """With `Theta` as its parameters; its dynamics are `ArmDynamics`."""
    model: AbstractModel
    """What it believes of the robot; for `per_plant`, every leaf has a leading axis, one for each plant."""
    dt: float = eqx.field(static=True)
    """Control step [s]."""
    solver: AbstractSolver = SQP(curvature="gauss_newton", real_time=True)
    """What is done in a control step."""
    cutoff: float = eqx.field(static=True, default=float("inf"))
    """Cut-off frequency [Hz] of a first-order low-pass filter of the context; inf for none."""
    per_plant: bool = eqx.field(static=True, default=False)
    """Whether each plant has a model of its own."""

    def begin(self, xs: Float[Array, "B nx"]) -> Loop:
        """Before the first control step, at rest."""
        return _begin(self, jnp.asarray(xs, _dtype(self)))

    def controller(self) -> "Control":
        """What does a control step. What of the tracker is not an array is looked at here, once, not at every step."""
        arrays, rest = eqx.partition(self, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        known, dtype = _same(_Known(structure, rest)), _dtype(self)

        def control(loop, xs, refs, first):
            return _control(known, leaves, loop, jnp.asarray(xs, dtype), jnp.asarray(refs, dtype), jnp.asarray(first))

        return control


class Control(Protocol):
    """One control step of all robots."""

    def __call__(
        self, loop: Loop, xs: Float[Any, "B nx"], refs: Float[Any, "B N_plus_1 nx"], first: Any
    ) -> tuple[Float[Array, "B nu"], Loop, "Step"]:
        """The controls for measured states, what to carry to the next step, and how the solves went.

        Args:
            loop: From `Tracker.begin`, or from the step before.
            xs: Measured states.
            refs: Reference over the horizon, beginning now.
            first: Whether this is the first control step, before which no interval has passed.
        """
        ...


class _Known:
    """What of a tracker is not an array. Its hash is computed once; equal ones share what has been compiled."""

    def __init__(self, structure: Any, rest: Any):
        leaves, rest_structure = jax.tree.flatten(rest)
        self.structure, self.rest = structure, rest
        self._key = structure, tuple(leaves), rest_structure
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, _Known) and self._key == other._key)

    def tracker(self, leaves: list[Array]) -> Tracker:
        """With its arrays again."""
        return eqx.combine(jax.tree.unflatten(self.structure, leaves), self.rest)


@cache
def _same(known: _Known) -> _Known:
    """One object for all that are equal: `jax.jit` compares what is not the same object at every call."""
    return known


class Step(NamedTuple):
    """How a control step went."""

    result: RESULTS
    num_inner_steps: Array
    context: Array


class Tracking(NamedTuple):
    """What a closed loop left behind."""

    logs: list[Log]
    """One for each plant."""
    failed: np.ndarray
    """(B,), control steps whose solve failed; the plan before was followed there."""
    diverged: np.ndarray
    """(B,), whether the plant went where no robot can be."""
    contexts: np.ndarray
    """(B, T, nz), contexts z."""


def track(
    plants: Plants,
    tracker: Tracker,
    refs: Float[np.ndarray, "B T_plus_N nx"],
    num_steps: int,
    *,
    dither: float | np.ndarray = 0.0,
    seed: int = 0,
    environments: Sequence[int] | None = None,
    monitor: Monitor | None = None,
) -> Tracking:
    """Run every plant along its reference, beginning at rest on its first row.

    Args:
        plants: The plants; they are reset.
        tracker: The controller.
        refs: Reference states, `num_steps` + N + 1 rows for each plant.
        num_steps: T, number of control steps.
        dither: Standard deviation of noise added to the torques [Nm], to excite what good tracking leaves at rest.
        seed: Of the noise.
        environments: Numbers of the plants for the logs; 0, 1, ... unless given.
        monitor: Called after every control step.

    Returns: the logs, with the torques that were applied (noise included).
    Fails: `ValueError` for wrong shapes; a failed solve and a plant that diverges are counted.
    """
    horizon, rng = tracker.problem.horizon, np.random.default_rng(seed)
    refs = np.asarray(refs)
    wanted = (len(plants), num_steps + horizon + 1, 2 * plants.nq)
    if refs.ndim != 3 or refs.shape[1] < wanted[1] or refs.shape[::2] != wanted[::2]:
        raise ValueError(f"refs must have shape {wanted}, (plants, steps + horizon + 1, states), not {refs.shape}.")
    x = plants.reset(np.concatenate([refs[:, 0, : plants.nq], np.zeros((len(plants), plants.nq))], 1))
    loop, xs, us, qdds, steps = tracker.begin(jnp.asarray(x)), [x], [], [], []
    control = tracker.controller()
    for t in range(num_steps):
        u, loop, step = control(loop, x, refs[:, t : t + horizon + 1], t == 0)
        u = np.asarray(u, float) + dither * rng.standard_normal((len(plants), plants.nq))
        x = plants.step(u)
        loop = loop._replace(u=jnp.asarray(plants.us, loop.u.dtype))  # as clipped, and with the noise
        for record, value in zip((xs, us, qdds), (x, plants.us, plants.qdd), strict=True):
            record.append(value)
        steps.append((np.asarray(step.result != RESULTS.successful), np.asarray(step.context)))
        if monitor is not None:
            monitor(t + 1, num_steps)
    failed, contexts = (np.stack(values, 1) for values in zip(*steps, strict=True))
    return Tracking(
        _logs(plants, (xs, us, qdds), refs[:, : num_steps + 1], environments),
        failed.sum(1),
        np.array(plants.diverged),
        contexts,
    )


def follow(
    plants: Plants, torques: Callable, refs: np.ndarray, num_steps: int, environments: Sequence[int] | None = None
) -> Tracking:
    """Run plants along their references under any controller, torques(t, xs) -> (B, nu); as `track`."""
    x = plants.reset(np.concatenate([refs[:, 0, : plants.nq], np.zeros((len(plants), plants.nq))], 1))
    xs, us, qdds = [x], [], []
    for t in range(num_steps):
        x = plants.step(torques(t, x))
        for record, value in zip((xs, us, qdds), (x, plants.us, plants.qdd), strict=True):
            record.append(value)
    logs = _logs(plants, (xs, us, qdds), refs[:, : num_steps + 1], environments)
    nothing = np.zeros((len(plants), num_steps, 0))
    return Tracking(logs, np.zeros(len(plants), int), np.array(plants.diverged), nothing)


@eqx.filter_jit
def _begin(tracker: Tracker, xs: Array) -> Loop:
    nu, horizon, length = tracker.problem.nu, tracker.problem.horizon, tracker.model.history_length

    def one(model, x):
        us = jnp.zeros((horizon, nu), x.dtype)
        start = guess(jnp.broadcast_to(x, (horizon + 1, x.shape[0])), us)
        memory, past = Memory(start, us, jnp.asarray(0), jnp.asarray(False)), rest(x[:nu], length)
        return Loop(x, us[0], past, memory, model.context(past))

    return jax.vmap(one, in_axes=(0 if tracker.per_plant else None, 0))(tracker.model, xs)


@partial(jax.jit, static_argnums=0)
def _control(
    known: _Known, leaves: list[Array], loop: Loop, xs: Array, refs: Array, first: Array
) -> tuple[Array, Loop, Step]:
    tracker = known.tracker(leaves)
    gain = 1.0 - math.exp(-2.0 * math.pi * tracker.cutoff * tracker.dt)

    def one(model, loop, x, refs):
        past = loop.history
        if model.history_length:
            newest = history(model.body, jnp.stack([loop.x, x]), loop.u[None], tracker.dt)
            past = jnp.where(first, past, jnp.concatenate([past[1:], newest]))
        z = loop.context + gain * (model.context(past) - loop.context)
        controller = MPC(tracker.problem, Theta(model, z, refs), solver=tracker.solver)
        u, memory, info = controller(x, 0, loop.memory)
        return u, Loop(x, u, past, memory, z), Step(info.result, info.num_steps, z)

    return jax.vmap(one, in_axes=(0 if tracker.per_plant else None, 0, 0, 0))(tracker.model, loop, xs, refs)


def _dtype(tracker: Tracker) -> Any:
    return tracker.model.body.masses.dtype


def _logs(plants: Plants, records: Any, refs: np.ndarray, environments: Sequence[int] | None) -> list[Log]:
    xs, us, qdds = (np.stack(record, 1) for record in records)
    numbers = range(len(plants)) if environments is None else environments
    parts = zip(xs, us, refs, numbers, qdds, strict=True)
    return [Log(x, u, r, plants.dt, int(e), a) for x, u, r, e, a in parts]
