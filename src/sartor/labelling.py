"""Labels of all samples of some logs, a chunk at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.data import Log
from sartor.labels import label_solution
from sartor.models.base import AbstractModel, ArmDynamics, Theta
from sartor.problem import Problem
from sartor.samples import Windows
from sartor.sensitivity import trajectory_error
from sartor.solution import RESULTS, guess
from sartor.solve import solve
from sartor.solvers.base import AbstractSolver
from sartor.solvers.sqp import SQP

SOLVER = SQP(curvature="gauss_newton", tol=1e-5, max_steps=30, line_search=False)
"""Solves begin near their solutions: full steps get there. Labels are within 1e-6 of those of a tighter one."""
_CHUNK = 512  # samples that are solved together: their solves wait for the slowest of them
_GROUP = 16  # samples that are differentiated together: more do not fit the caches of a core


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

    Returns: arrays over the samples: S, du0_de, du0_derror (that to an error of the trajectory), du0_dx0, dJ_du0,
        Lambda, A and B (Jacobians of the model at the first stage), and ok, False where there is no label.
    Fails: `ValueError` for samples at another rate than the problem's; a failed solve is not ok, and its label NaN.
    """
    if "error" in options:
        raise ValueError("label_samples gives both readings of an error, du0_de and du0_derror: leave out error.")
    if isinstance(problem.dynamics, ArmDynamics) and problem.dynamics.dt != samples.dt[0]:
        raise ValueError(f"samples are {samples.dt[0]} s apart, but the problem's steps take {problem.dynamics.dt} s.")
    parts, horizon, chunk = [], problem.horizon, _chunk(samples.size)
    for start in range(0, samples.size, chunk):
        which = np.arange(start, start + chunk) % samples.size  # the last chunk is filled up: one shape compiles once
        some = samples.take(which)
        arrays = (some.x0, some.us[:, :horizon], some.xs[:, :horizon], some.history.astype(float), refs[which])
        found = _labels(problem, model, solver, tuple(map(jnp.asarray, arrays)), **options)
        parts.append(jax.tree.map(_narrow, found))
        if monitor is not None:
            monitor(min(start + chunk, samples.size), samples.size)
    return {name: np.concatenate([part[name] for part in parts])[: samples.size] for name in parts[0]}


def references_ahead(logs: Sequence[Log], samples: Windows, horizon: int) -> Float[np.ndarray, "B N_plus_1 nx"]:
    """Reference over the horizon of each sample, from the logs that the samples are windows of.

    Fails: `ValueError` for a log without reference.
    """
    for i, log in enumerate(logs):
        if log.refs is None:
            raise ValueError(f"logs[{i}] has no reference: a label says what matters to following one.")
    ahead = np.arange(horizon + 1)
    return np.stack([np.asarray(logs[r].refs)[t + ahead] for r, t in zip(samples.run, samples.step, strict=True)])


def _chunk(size: int) -> int:
    """Samples in each of several equal chunks, in whole groups."""
    num_chunks = -(-size // _CHUNK)
    return -(-size // (num_chunks * _GROUP)) * _GROUP


@eqx.filter_jit
def _labels(problem: Problem, model: Any, solver: Any, arrays: tuple, **options: Any) -> dict[str, Array]:
    def solved(x0, us, xs, past, refs):
        theta = Theta(model, model.context(past), refs)
        start = guess(jnp.concatenate([x0[None], xs]), us)
        return theta.context, solve(problem, theta, x0, solver=solver, guess=start, throw=False)

    def labelled(context, sol, refs):
        found = label_solution(problem, Theta(model, context, refs), sol, solver=solver, **options)
        return {
            "S": found.S, "du0_de": found.du0_de, "du0_derror": trajectory_error(found.A, found.du0_de),
            "du0_dx0": found.du0_dx0, "dJ_du0": found.dJ_du0, "Lambda": found.Lambda, "A": found.A[0],
            "B": found.B[0], "ok": found.result == RESULTS.successful,
        }  # fmt: skip

    contexts, sols = jax.vmap(solved)(*arrays)
    return jax.lax.map(lambda sample: labelled(*sample), (contexts, sols, arrays[-1]), batch_size=_GROUP)


def _narrow(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.float32) if leaf.dtype == float else leaf
