"""Labels of all samples of some logs, a chunk at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.data import Log
from sartor.labels import check_options, label_solution
from sartor.models.base import AbstractModel, ArmDynamics, Theta
from sartor.problem import Problem
from sartor.samples import Windows
from sartor.sensitivity import trajectory_error
from sartor.solution import RESULTS, guess
from sartor.solve import solve
from sartor.solvers.base import AbstractSolver, group_size
from sartor.solvers.sqp import SQP

SOLVER = SQP(curvature="gauss_newton", tol=1e-5, max_steps=30, line_search=False)
"""Solves begin near their solutions: full steps get there."""
_CHUNK = 512  # samples that are solved together: groups of them are filled up from all, until the last few end


def label_samples(
    problem: Problem,
    model: AbstractModel,
    samples: Windows,
    refs: Float[np.ndarray, "B N_plus_1 nx"],
    *,
    solver: AbstractSolver = SOLVER,
    monitor: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Labels of samples, with what they are made of, in single precision.

    The solves start from the executed trajectory, with the context of the sample's history, and run until they have
    converged.

    Args:
        problem: The control problem, with `Theta` as its parameters.
        model: The model that is labelled.
        samples: Samples of at least N steps.
        refs: Reference over the horizon of each, see `references_ahead`.
        solver: What solves the problems.
        monitor: monitor(done, total).
        options: Of `label`, but `error`: both readings are given.

    Returns: as `label_states`.
    Fails: `ValueError` for samples at another rate than the problem's, and for options that `label` refuses; a failed
        solve is not ok, and its label NaN.
    """
    if isinstance(problem.dynamics, ArmDynamics) and problem.dynamics.dt != samples.dt[0]:
        raise ValueError(f"samples are {samples.dt[0]} s apart, but the problem's steps take {problem.dynamics.dt} s.")
    horizon, size = problem.horizon, samples.size
    contexts = [np.asarray(_contexts(model, jnp.asarray(samples.history[which], float))) for which in _chunks(size)]
    xs = np.concatenate([samples.x0[:, None], samples.xs[:, :horizon]], 1)
    return label_states(
        problem, model, samples.x0, np.concatenate(contexts)[:size], refs, (xs, samples.us[:, :horizon]),
        solver=solver, monitor=monitor, **options,
    )  # fmt: skip


def label_states(
    problem: Problem,
    model: AbstractModel,
    x0: Float[np.ndarray, "B nx"],
    contexts: Float[np.ndarray, "B nz"],
    refs: Float[np.ndarray, "B N_plus_1 nx"],
    start: tuple[Float[np.ndarray, "B N_plus_1 nx"], Float[np.ndarray, "B N nu"]],
    *,
    solver: AbstractSolver = SOLVER,
    monitor: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Labels of measured states with their contexts and references.

    Args:
        problem: The control problem, with `Theta` as its parameters.
        model: The model that is labelled.
        x0: Measured states.
        contexts: z of each.
        refs: Reference over the horizon of each.
        start: States and controls where the solves begin.
        solver: What solves the problems.
        monitor: monitor(done, total).
        options: Of `label`, but `error`: both readings are given.

    Returns: arrays over the samples: S, du0_de, du0_derror (that to an error of the trajectory), du0_dx0, dJ_du0,
        Lambda, A and B (Jacobians of the model at the first stage), and ok, False where there is no label.
    Fails: `ValueError` for options that `label` refuses; a failed solve is not ok, and its label NaN.
    """
    if "error" in options:
        raise ValueError("both readings of an error are given, du0_de and du0_derror: leave out error.")
    check_options(problem, **options)
    size, parts = len(x0), []
    for which in _chunks(size):
        found = _labels(problem, model, solver, tuple(a[which] for a in (x0, contexts, refs, *start)), **options)
        parts.append(jax.tree.map(_narrow, found))
        if monitor is not None:
            monitor(min(len(parts) * len(which), size), size)
    return {name: np.concatenate([part[name] for part in parts])[:size] for name in parts[0]}


def references_ahead(logs: Sequence[Log], samples: Windows, horizon: int) -> Float[np.ndarray, "B N_plus_1 nx"]:
    """Reference over the horizon of each sample, from the logs that the samples are windows of.

    Fails: `ValueError` for a log without reference.
    """
    for i, log in enumerate(logs):
        if log.refs is None:
            raise ValueError(f"logs[{i}] has no reference: a label says what matters to following one.")
    ahead = np.arange(horizon + 1)
    return np.stack([np.asarray(logs[r].refs)[t + ahead] for r, t in zip(samples.run, samples.step, strict=True)])


def _chunks(size: int) -> list[np.ndarray]:
    """Samples in equal chunks of whole groups; the last is filled up with the first samples, to compile but once."""
    num_chunks, group = -(-size // _CHUNK), _group()
    chunk = -(-size // (num_chunks * group)) * group
    return [np.arange(first, first + chunk) % size for first in range(0, size, chunk)]


def _group() -> int:
    """Samples that are differentiated together."""
    return min(group_size(), _CHUNK)


@eqx.filter_jit
def _contexts(model: AbstractModel, histories: Array) -> Array:
    return jax.vmap(model.context)(histories)


@eqx.filter_jit
def _labels(problem: Problem, model: Any, solver: Any, arrays: tuple, **options: Any) -> dict[str, Array]:
    def solved(x0, z, refs, xs, us):
        return solve(problem, Theta(model, z, refs), x0, solver=solver, guess=guess(xs, us), throw=False)

    def labelled(sample):
        z, refs, sol = sample
        found = label_solution(problem, Theta(model, z, refs), sol, solver=solver, **options)
        return {
            "S": found.S, "du0_de": found.du0_de, "du0_derror": trajectory_error(found.A, found.du0_de),
            "du0_dx0": found.du0_dx0, "dJ_du0": found.dJ_du0, "Lambda": found.Lambda, "A": found.A[0],
            "B": found.B[0], "ok": found.result == RESULTS.successful,
        }  # fmt: skip

    sols = jax.vmap(solved)(*arrays)
    return jax.lax.map(labelled, (arrays[1], arrays[2], sols), batch_size=_group())


def _narrow(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.float32) if leaf.dtype == float else leaf
