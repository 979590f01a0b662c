"""What matters where on the track: labels of a drive, and the phases of a lap."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.labels import check_options, label
from sartor.sensitivity import trajectory_error
from sartor.solution import RESULTS, guess
from sartor.solvers.base import AbstractSolver
from sartor.solvers.sqp import SQP
from sartor.systems.racing_car import Theta, problem
from sartor.track import Track

Phase = Literal["straight", "entry", "apex", "exit"]
PHASES: tuple[Phase, ...] = Phase.__args__
SOLVER = SQP(max_steps=60)
_BATCH = 64  # labels of one call
_STRAIGHT = 0.3  # [1/m]


class DriveLabels(NamedTuple):
    """Labels along a drive; the first axis is that of control steps."""

    S: np.ndarray
    """(T, N, 9), weights of the errors (D9); NaN where refused."""
    du0_de: np.ndarray
    """(T, 2, N, 9), to errors of the dynamics, which go on through the prediction."""
    du0_derror: np.ndarray
    """(T, 2, N, 9), to errors of the predicted trajectory, as a rollout has them."""
    Lambda: np.ndarray
    """(T, 2, 2)."""
    dJ_du0: np.ndarray
    """(T, 2)."""
    ok: np.ndarray
    """(T,), whether there is a label."""


def label_drive(
    theta: Theta,
    horizon: int,
    xs: Float[np.ndarray, "T_plus_1 9"],
    us: Float[np.ndarray, "T 2"],
    *,
    solver: AbstractSolver = SOLVER,
    **options: Any,
) -> DriveLabels:
    """Labels of the first T + 1 - N states of a drive, in batches.

    Args:
        theta: Parameters of the controller, with the model that is labelled.
        horizon: N.
        xs: States that were measured.
        us: Controls between them.
        solver: Solves begin at the executed trajectory and end when they have converged.
        options: Of `sartor.label`.

    Fails: `ValueError` for a drive shorter than the horizon and for options that `label` refuses; a failed solve is not
        ok.
    """
    count = len(us) - horizon + 1
    if count < 1:
        raise ValueError(f"a drive of {len(us)} control steps has no label with a horizon of {horizon}.")
    ahead = np.arange(count)[:, None] + np.arange(horizon + 1)
    return label_windows(theta, horizon, np.asarray(xs)[ahead], np.asarray(us)[ahead[:, :-1]], solver=solver, **options)


def label_windows(
    theta: Theta,
    horizon: int,
    xs: Float[np.ndarray, "B N_plus_1 9"],
    us: Float[np.ndarray, "B N 2"],
    *,
    solver: AbstractSolver = SOLVER,
    **options: Any,
) -> DriveLabels:
    """The same for B pieces of drives as long as the horizon, each labelled at its beginning.

    Fails: `ValueError` without any piece, else as `label_drive`.
    """
    check_options(problem(horizon, theta.limits), **options)
    if not len(us):
        raise ValueError("there is nothing to label: us holds no piece of a drive.")
    dtype, found = jnp.result_type(float), []
    for begin in range(0, len(us), _BATCH):
        # The last batch is filled up with its first piece: one shape compiles once, whatever the drive.
        which = np.arange(begin, begin + _BATCH)
        which = np.where(which < len(us), which, begin)
        states, controls = (jnp.asarray(pieces[which], dtype) for pieces in (xs, us))
        found.append([np.asarray(leaf) for leaf in _labels(theta, horizon, states, controls, solver, options)])
    return DriveLabels(*(np.concatenate(column)[: len(us)] for column in zip(*found, strict=True)))


@eqx.filter_jit
def _labels(theta: Theta, horizon: int, xs: Array, us: Array, solver: AbstractSolver, options: dict) -> tuple:
    def one(xs, us):
        found = label(problem(horizon, theta.limits), theta, xs[0], solver=solver, guess=guess(xs, us), **options)
        derror = trajectory_error(found.A, found.du0_de)
        return found.S, found.du0_de, derror, found.Lambda, found.dJ_du0, found.result == RESULTS.successful

    # On a processor one by one: a group takes as many steps as its worst piece, and some pieces never converge.
    alone = jax.default_backend() == "cpu"
    return jax.lax.map(lambda piece: one(*piece), (xs, us), batch_size=None if alone else len(us))


def phases(track: Track, s: Float[np.ndarray, " T"]) -> np.ndarray:
    """The `Phase` of a lap at each place: nearly no curvature is a straight; within 0.3 m of where the size of the
    curvature is largest is the apex of a turn; before it the entry, after it the exit."""
    curvature = jax.vmap(lambda s: jnp.abs(track.curvature_at(s)))
    around = np.asarray(s)[:, None] + np.linspace(-0.3, 0.3, 13)
    size = np.asarray(curvature(jnp.asarray(around.ravel()))).reshape(around.shape)
    here, apex = size[:, 6], ~np.isin(size.argmax(1), (0, 12))
    turning = np.where(apex, "apex", np.where(size[:, -1] > size[:, 0], "entry", "exit"))
    return np.where(here < _STRAIGHT, "straight", turning)


def shares(S: Float[np.ndarray, "T N 9"], phase: np.ndarray, sizes: Float[np.ndarray, "9"]) -> dict[Phase, np.ndarray]:
    """Share of each state in a label's Σ (S · size)², with errors of a usual size [its unit]: the mean over the labels
    of each phase, so that no single large label speaks for all."""
    energy = np.sum((S * sizes) ** 2, 1)
    share = energy / np.maximum(energy.sum(1, keepdims=True), 1e-300)
    return {name: share[phase == name].mean(0) for name in PHASES if np.any(phase == name)}
