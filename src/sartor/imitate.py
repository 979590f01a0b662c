"""Learning a controller from what an expert does: any leaves of θ, through the derivative of the MPC's solution.

    L(θ) = mean over demonstrations of  mean |(û - u(θ)) / scale|² + weight · mean |x̂ - x(θ)|²                   (D18)

with the demonstrated controls û and states x̂, and u(θ), x(θ) the plan of the MPC from the same initial state.
`identify` is the baseline that predicts the demonstrated transitions: L(θ) = mean |x̂_{k+1} - f(x̂_k, û_k, θ)|².

References: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from sartor import descent
from sartor.descent import Learned, Learning, Monitor, Optimiser
from sartor.parameters import Where, selected
from sartor.problem import Problem, rollout
from sartor.solution import Solution
from sartor.solution import guess as make_guess
from sartor.solve import solve
from sartor.solvers.base import AbstractSolver
from sartor.solvers.sqp import SQP

_DEFAULT = Learning()
_PUBLISHED = optax.rmsprop(1e-2, decay=0.5)  # one object: a new one would compile anew


class Demonstrations(NamedTuple):
    """What an expert did, B times."""

    us: Float[np.ndarray, "B M nu"]
    """The first M ≤ N controls of its plan; M = 1 for the log of a closed loop."""
    xs: Float[np.ndarray, "B M_plus_1 nx"]
    """Its states; of those behind the first, only what the loss asks for is used, and they may be NaN."""
    context: Any = None
    """What else the problem depends on in each demonstration, as its reference: a pytree with a leading axis B."""


def imitate(
    problem: Problem,
    theta: PyTree,
    demonstrations: Demonstrations,
    config: Learning = _DEFAULT,
    *,
    learn: Where | Sequence[Where] | None = None,
    validation: Demonstrations | None = None,
    optimiser: Optimiser | None = None,
    solver: AbstractSolver | None = None,
    theta_of: Callable[[PyTree, Any], PyTree] | None = None,
    states: float = 0.0,
    scales: Any = 1.0,
    nearest: bool = False,
    checkpoint: Path | None = None,
    monitor: Monitor | None = None,
    after_epoch: Callable[[int, PyTree], None] | None = None,
) -> Learned:
    """Learn leaves of θ such that the MPC does what the expert did (D18).

    Args:
        problem: The problem that the MPC solves.
        theta: Where to begin; what must stay positive or within bounds is written as `positive(...)`, `bounded(...)`.
        demonstrations: What to imitate.
        config: How long, and how.
        learn: The leaves that learn, as `lambda theta: (theta.m, theta.l)`; by default all that are floating-point.
            Several such functions take turns, as weights and goal of a cost have to (Amos et al., 2018, section 5.3).
        validation: Other demonstrations, to choose the epoch by.
        optimiser: Of optax, by default RMSprop as published (rate 1e-2, decay 0.5); or `LevenbergMarquardt()`, which
            for few parameters is faster and more exact.
        solver: Of the MPC; `SQP()` unless given.
        theta_of: theta_of(theta, context) -> parameters of the problem in a demonstration; `theta` unless given.
        states: Weight of the states in the loss; with 0 controls alone are imitated.
        scales: What errors of the controls are divided by, (nu,) or a number, as their range [unit of u].
        nearest: Begin every first solve at the demonstrated controls, so that of several local solutions the one near
            them is found; else at zero.
        checkpoint: File that keeps the state; if it exists, learning goes on from there, to the same result.
        monitor: monitor(done, total), called after every epoch.
        after_epoch: after_epoch(epoch, theta), likewise; epochs count from 1.

    Returns: θ of the epoch with the lowest validation loss (of the last one without validation), in the form of
        `theta`: `values` gives plain numbers; and the curve, with the number of failed solves, whose samples are left
        out.
    Fails: `ValueError` for wrong input, `FloatingPointError` if no solve succeeds at the start.
    """
    objective = _imitation(problem, solver, theta_of, states, scales, nearest)
    for name, data in (("demonstrations", demonstrations), ("validation", validation)):
        if data is not None:
            _check(name, problem, data, states)
    return _learn(
        objective, theta, demonstrations, config, learn, validation, optimiser, (checkpoint, monitor, after_epoch)
    )


def identify(
    problem: Problem,
    theta: PyTree,
    demonstrations: Demonstrations,
    config: Learning = _DEFAULT,
    *,
    learn: Where | Sequence[Where] | None = None,
    validation: Demonstrations | None = None,
    optimiser: Optimiser | None = None,
    theta_of: Callable[[PyTree, Any], PyTree] | None = None,
    checkpoint: Path | None = None,
    monitor: Monitor | None = None,
    after_epoch: Callable[[int, PyTree], None] | None = None,
) -> Learned:
    """System identification: learn leaves of θ such that the dynamics predict the demonstrated transitions.

    Args:
        problem: Its dynamics are used.
        theta: Where to begin.
        demonstrations: What to predict; all their states count.
        config: How long, and how.
        learn: The leaves that learn, as of `imitate`.
        validation: Other demonstrations, to choose the epoch by.
        optimiser: As of `imitate`.
        theta_of: As of `imitate`.
        checkpoint: As of `imitate`.
        monitor: As of `imitate`.
        after_epoch: As of `imitate`.

    Returns: as `imitate`, with the mean squared error of the predicted states as the loss.
    Fails: as `imitate`.
    """
    objective = _Transitions(problem, theta_of)
    for name, data in (("demonstrations", demonstrations), ("validation", validation)):
        if data is not None:
            _check(name, problem, data, states=1.0)
    return _learn(
        objective, theta, demonstrations, config, learn, validation, optimiser, (checkpoint, monitor, after_epoch)
    )


def imitation_loss(
    problem: Problem, theta: PyTree, demonstrations: Demonstrations, *, solver: AbstractSolver | None = None,
    theta_of: Callable | None = None, states: float = 0.0, scales: Any = 1.0, nearest: bool = False,
) -> Float[np.ndarray, " B"]:  # fmt: skip
    """(D18) of every demonstration.

    Args:
        problem: The problem that the MPC solves.
        theta: Its parameters.
        demonstrations: What it is compared with.
        solver: As of `imitate`.
        theta_of: As of `imitate`.
        states: As of `imitate`.
        scales: As of `imitate`.
        nearest: As of `imitate`.

    Returns: one number for each demonstration; NaN where the solve fails.
    Fails: `ValueError` for wrong input.
    """
    _check("demonstrations", problem, demonstrations, states)
    objective = _imitation(problem, solver, theta_of, states, scales, nearest)
    squares, exists = descent.evaluate(objective, theta, demonstrations)
    return np.where(exists, squares, np.nan)


def transition_loss(
    problem: Problem, theta: PyTree, demonstrations: Demonstrations, *, theta_of: Callable | None = None
) -> Float[np.ndarray, " B"]:
    """Mean |x̂_{k+1} - f(x̂_k, û_k, θ)|² of every demonstration: what `identify` learns by.

    Args:
        problem: Its dynamics are used.
        theta: Its parameters.
        demonstrations: What is predicted.
        theta_of: As of `imitate`.

    Returns: one number for each demonstration; NaN where it is not finite.
    Fails: `ValueError` for wrong input.
    """
    _check("demonstrations", problem, demonstrations, states=1.0)
    squares, exists = descent.evaluate(_Transitions(problem, theta_of), theta, demonstrations)
    return np.where(exists, squares, np.nan)


class _Imitation(eqx.Module):
    """The residual of (D18); the memory of a sample is the guess of its next solve."""

    problem: Problem
    solver: AbstractSolver
    theta_of: Callable | None = eqx.field(static=True)
    states: float = eqx.field(static=True)
    scales: tuple[float, ...] = eqx.field(static=True)
    nearest: bool = eqx.field(static=True)

    @property
    def settings(self) -> tuple:
        """What the loss depends on beside functions and arrays."""
        return self.problem.horizon, repr(self.solver), self.states, self.scales, self.nearest

    def begin(self, theta: PyTree, data: Demonstrations) -> Solution:
        """Cold guesses."""
        return jax.vmap(lambda sample: self._cold(_theta(self.theta_of, theta, sample), sample))(data)

    def residual(self, theta: PyTree, sample: Demonstrations, guess: Solution) -> tuple[Array, Array, Solution]:
        """Roots of the terms of (D18)."""
        theta = _theta(self.theta_of, theta, sample)
        sol = solve(self.problem, theta, sample.xs[0], solver=self.solver, guess=guess, throw=False)
        M = sample.us.shape[0]
        rows = [((sol.us[:M] - sample.us) / jnp.asarray(self.scales, sol.us.dtype)).ravel() / sample.us.size**0.5]
        if self.states:
            off = sol.xs[1 : M + 1] - sample.xs[1:]
            rows.append((self.states / off.size) ** 0.5 * off.ravel())
        # A guess that failed may fail again: the next visit begins cold.
        cold = self._cold(theta, sample)
        next_guess = jax.tree.map(lambda a, b: jnp.where(sol.successful, a, b), _as_guess(sol), cold)
        return jnp.concatenate(rows), sol.successful, jax.lax.stop_gradient(next_guess)

    def _cold(self, theta: PyTree, sample: Demonstrations) -> Solution:
        problem, x0 = self.problem, sample.xs[0]
        us = jnp.zeros((problem.horizon, problem.nu), x0.dtype)
        us = us.at[: sample.us.shape[0]].set(sample.us) if self.nearest else us
        us = jnp.clip(us, problem.u_min, problem.u_max).astype(x0.dtype)
        xs = rollout(problem, theta, x0, us)
        usable = jnp.all(jnp.isfinite(xs)) & (jnp.max(jnp.abs(xs)) < 1e4 * (1.0 + jnp.max(jnp.abs(x0))))
        return jax.lax.stop_gradient(make_guess(jnp.where(usable, xs, x0), us))


class _Transitions(eqx.Module):
    """Prediction errors of single steps, (M nx,), divided by √M: their squares add up to the mean over steps."""

    problem: Problem
    theta_of: Callable | None = eqx.field(static=True)

    @property
    def settings(self) -> tuple:
        """What the loss depends on beside functions and arrays."""
        return ()

    def begin(self, theta: PyTree, data: Demonstrations) -> Array:
        return jnp.zeros(data.us.shape[0])

    def residual(self, theta: PyTree, sample: Demonstrations, memory: Array) -> tuple[Array, Array, Array]:
        theta = _theta(self.theta_of, theta, sample)
        stages = (sample.xs[:-1], sample.us, jnp.arange(sample.us.shape[0]))
        predicted = jax.vmap(lambda x, u, k: self.problem.dynamics(x, u, k, theta))(*stages)
        errors = (predicted - sample.xs[1:]).ravel() / (predicted.size) ** 0.5
        return errors, jnp.all(jnp.isfinite(errors)), memory


def _imitation(problem, solver, theta_of, states, scales, nearest) -> "_Imitation":
    if not states >= 0:
        raise ValueError(f"states must be at least 0, not {states}.")
    if np.shape(scales) not in ((), (problem.nu,)):
        raise ValueError(f"scales must be a number or have shape ({problem.nu},), not {np.shape(scales)}.")
    scales = tuple(np.broadcast_to(np.asarray(scales, float), (problem.nu,)).tolist())
    if not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive, not {scales}.")
    return _Imitation(problem, SQP() if solver is None else solver, theta_of, float(states), scales, nearest)


def _learn(objective, theta, demonstrations, config, learn, validation, optimiser, watch) -> Learned:
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, theta)
    optimiser = _PUBLISHED if optimiser is None else optimiser
    return descent.minimise(
        objective, theta, demonstrations, config, optimiser, _groups(theta, learn), validation, *watch
    )


def _theta(theta_of: Callable | None, theta: PyTree, sample: Demonstrations) -> PyTree:
    return theta if theta_of is None else theta_of(theta, sample.context)


def _as_guess(sol: Solution) -> Solution:
    """What of a solution the next solve starts from, in the form of `guess`: states, controls, costates."""
    start = make_guess(sol.xs, sol.us)
    return eqx.tree_at(lambda s: s.lams, start, sol.lams)


def _groups(theta: PyTree, learn: Where | Sequence[Where] | None) -> list[PyTree]:
    """Which leaves learn, as trees of bools, one for each group."""
    groups = learn if isinstance(learn, Sequence) else [learn]
    if not groups:
        raise ValueError("learn is empty: name some leaves of theta.")
    return [selected(theta, where) for where in groups]


def _check(name: str, problem: Problem, data: Demonstrations, states: float) -> None:
    us, xs = np.asarray(data.us), np.asarray(data.xs)
    if us.ndim != 3 or us.shape[0] == 0 or us.shape[2] != problem.nu or not 1 <= us.shape[1] <= problem.horizon:
        raise ValueError(
            f"{name}.us must have shape (B, M, {problem.nu}) with B ≥ 1 and 1 ≤ M ≤ {problem.horizon}, the horizon, "
            f"not {us.shape}."
        )
    if xs.ndim != 3 or xs.shape[:2] != (us.shape[0], us.shape[1] + 1):
        raise ValueError(f"{name}.xs must have shape {(us.shape[0], us.shape[1] + 1)} + (nx,), not {xs.shape}.")
    needed = xs if states else xs[:, :1]
    for what, array in (("us", us), ("xs", needed)):
        if not np.isfinite(array).all():
            i, k, j = map(int, np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"{name}.{what}[{i}, {k}, {j}] is {array[i, k, j]}: leave that demonstration out.")
    for leaf in jax.tree.leaves(data.context):
        if np.shape(leaf)[:1] != us.shape[:1]:
            raise ValueError(f"{name}.context must have {us.shape[0]} entries along the first axis of every leaf.")
