"""Least squares over samples: a gradient method of optax in mini-batches, or Levenberg and Marquardt's on all samples.

    L(θ) = mean over the samples whose residual exists of |r_i(θ)|²                                             (D17)

A sample may have a memory, as the warm start of a solve, that goes from one visit to the next.

References: Marquardt, An Algorithm for Least-Squares Estimation of Nonlinear Parameters, 1963.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from sartor.files import load_tree, save_tree
from sartor.parameters import values

Monitor = Callable[[int, int], None]
"""monitor(done, total), called after every epoch."""
_TRIES = 12  # dampings that a step of Levenberg and Marquardt tries
_SAVE_EVERY = 10.0  # [s]


@dataclass(frozen=True)
class LevenbergMarquardt:
    """δ = -(JᵀJ + λ D)⁻¹ Jᵀr on all samples, with the least λ tried that lowers the loss; D is the largest diagonal of
    JᵀJ so far, so that a parameter that begins to matter less is not thrown far away.

    For few parameters: an epoch costs a derivative of all residuals in each of them.

    References: Moré, The Levenberg-Marquardt Algorithm: Implementation and Theory, 1978.
    """

    damping: float = 1e-2
    """λ at the beginning; it falls by 10 after a step that was taken at once, and grows by 4 until one can be."""

    def __post_init__(self):
        if not self.damping > 0:
            raise ValueError(f"damping must be positive, not {self.damping}.")


Optimiser = optax.GradientTransformation | LevenbergMarquardt


@dataclass(frozen=True)
class Learning:
    """How to learn."""

    epochs: int = 500
    """Passes over the data, at most."""
    batch: int = 32
    """Samples of a gradient step; what does not fill a batch is left out of an epoch, other samples each time.
    `LevenbergMarquardt` takes all."""
    patience: int = 0
    """Epochs without a lower loss (on validation samples if there are any) after which to stop; 0: never."""
    turn: int = 10
    """Epochs for which each group of parameters learns before it is the next one's turn."""
    restart: int = 50
    """Epochs after which memories begin anew, as warm starts that may sit in a bad minimum; 0: never."""
    seed: int = 0
    """Of the order of the samples."""

    def __post_init__(self):
        least = {"epochs": 1, "batch": 1, "turn": 1, "patience": 0, "restart": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, not {getattr(self, name)}.")


class Curve(NamedTuple):
    """One entry for each epoch."""

    train: np.ndarray
    """Loss on the training samples: mean over the epoch's batches, each before its step."""
    validation: np.ndarray
    """Loss on the validation samples after the epoch; NaN without any."""
    failed: np.ndarray
    """Training samples without residual or without derivative, which were left out of the epoch."""
    failed_validation: np.ndarray
    """Validation samples without residual, which were left out of the loss."""


class Learned(NamedTuple):
    """What was learned."""

    theta: PyTree
    """Of the epoch with the lowest validation loss; without validation samples, of the last one."""
    curve: Curve
    """How it came about."""


class _State(NamedTuple):
    """Between two epochs."""

    theta: PyTree  # the leaves that learn
    optimiser: Any  # of each group
    memory: Any  # of training and validation samples
    best: PyTree
    lowest: Any
    fewest: Any  # validation samples that failed when the loss was lowest
    epoch: Any
    stalled: Any  # epochs since the loss was lowest
    curve: Any  # (4, epochs)


def minimise(
    objective: Any,
    theta: PyTree,
    data: PyTree,
    config: Learning,
    optimiser: Optimiser,
    groups: Sequence[PyTree],
    validation: PyTree | None = None,
    checkpoint: Path | None = None,
    monitor: Monitor | None = None,
    after_epoch: Callable[[int, PyTree], None] | None = None,
) -> Learned:
    """Minimise (D17).

    Args:
        objective: `objective.begin(theta, data) -> memory` and `objective.residual(theta, sample, memory) ->
            (r (n,), whether it exists, memory)`, the latter for one sample.
        theta: Where to begin; may hold `positive` and `bounded` parameters.
        data: Samples along the first axis of all leaves.
        config: How long.
        optimiser: How.
        groups: Which leaves learn, as trees of bools; several take turns.
        validation: Samples to choose the epoch by.
        checkpoint: File that keeps the state; if it exists, learning goes on from there, to the same result.
        monitor: Called after every epoch.
        after_epoch: after_epoch(epoch, theta), called after every epoch, counted from 1.

    Fails: `ValueError` for a checkpoint of something else, `FloatingPointError` if no sample has a residual at the
        start.
    """
    data, validation = jax.tree.map(jnp.asarray, (data, validation))
    free, fixed = eqx.partition(theta, jax.tree.map(lambda *on: any(on), *groups))
    begin = lambda theta: tuple(_begin(objective, theta, d) for d in (data, validation) if d is not None)
    memory, mark = begin(theta), _fingerprint(objective, config, optimiser, (theta, data, validation, groups))
    state = _State(
        free, [_init(optimiser, eqx.filter(free, group)) for group in groups], memory, free, jnp.asarray(np.inf),
        jnp.asarray(np.inf), jnp.asarray(0), jnp.asarray(0), np.full((4, config.epochs), np.nan),
    )  # fmt: skip
    state = _resume(checkpoint, mark, state)
    saved = time.monotonic()
    while not _over(state, config):
        epoch = int(state.epoch)
        if config.restart and epoch and epoch % config.restart == 0:
            state = state._replace(memory=begin(eqx.combine(state.theta, fixed)))
        state = _advance(objective, optimiser, groups, state, fixed, (data, validation), config)
        if monitor is not None:
            monitor(epoch + 1, config.epochs)
        if after_epoch is not None:
            after_epoch(epoch + 1, eqx.combine(state.theta, fixed))
        if checkpoint is not None and (time.monotonic() - saved > _SAVE_EVERY or _over(state, config)):
            save_tree(checkpoint, (mark, state))
            saved = time.monotonic()
    chosen = state.theta if validation is None else state.best
    return Learned(eqx.combine(chosen, fixed), Curve(*np.asarray(state.curve)[:, : int(state.epoch)]))


def every(theta: PyTree) -> PyTree:
    """All floating-point leaves, as a group."""
    return jax.tree.map(eqx.is_inexact_array, theta)


def evaluate(objective: Any, theta: PyTree, data: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """|r|² of every sample, with a new memory, and whether it exists."""
    data = jax.tree.map(jnp.asarray, data)
    squares, exists, _ = _evaluate(objective, theta, data, _begin(objective, theta, data))
    return np.asarray(squares), np.asarray(exists)


def _over(state: _State, config: Learning) -> bool:
    return int(state.epoch) >= config.epochs or 0 < config.patience <= int(state.stalled)


def _advance(objective, optimiser, groups, state, fixed, data, config) -> _State:
    """One epoch."""
    epoch = int(state.epoch)
    turn = (epoch // config.turn) % len(groups)
    free, resting = eqx.partition(state.theta, groups[turn])
    still = eqx.combine(resting, fixed)
    samples, validation = data
    now, *others = state.memory
    if isinstance(optimiser, LevenbergMarquardt):
        free, chosen, now, train, failed = _damped_step(objective, free, still, state.optimiser[turn], samples, now)
    else:
        order = _order(len(jax.tree.leaves(samples)[0]), config, epoch)
        begin = (free, state.optimiser[turn], now)
        (free, chosen, now), train, failed = _gradient_steps(objective, optimiser, begin, still, samples, order)
    optimisers = [chosen if i == turn else old for i, old in enumerate(state.optimiser)]
    theta, held_out, lost = eqx.combine(free, resting), np.nan, 0
    if validation is not None:
        squares, exists, others[0] = _evaluate(objective, eqx.combine(theta, fixed), validation, others[0])
        held_out, lost = _mean(squares, exists), int(np.sum(~np.asarray(exists)))
    failed, train, held_out = int(failed), float(train), float(held_out)
    score = train if validation is None else held_out
    if epoch == 0 and not (np.isfinite(train) and np.isfinite(score)):
        raise FloatingPointError("no sample has a residual at the start: begin at parameters for which solves succeed.")
    curve = np.array(state.curve)
    curve[:, epoch] = train, held_out, failed, lost
    # A mean over fewer samples may be lower because the hard ones are missing.
    better = lost < float(state.fewest) or (lost == float(state.fewest) and score < float(state.lowest))
    return _State(
        theta, optimisers, (now, *others), theta if better else state.best,
        jnp.asarray(score) if better else state.lowest, jnp.asarray(lost) if better else state.fewest,
        jnp.asarray(epoch + 1),
        jnp.asarray(0 if better else int(state.stalled) + 1), curve,
    )  # fmt: skip


@eqx.filter_jit
def _begin(objective: Any, theta: PyTree, data: PyTree) -> Any:
    return objective.begin(values(theta), data)


@eqx.filter_jit
def _evaluate(objective: Any, theta: PyTree, data: PyTree, memory: Any) -> tuple[Array, Array, Any]:
    residuals, exists, memory = _residuals(objective, theta, data, memory)
    return jnp.sum(residuals**2, -1), exists, memory


@eqx.filter_jit
def _gradient_steps(objective, optimiser, begin, fixed, data, order):
    def step(carry, which):
        free, opt_state, memory = carry
        take = lambda tree: jax.tree.map(lambda leaf: leaf[which], tree)

        def loss(free):
            residuals, exists, now = _residuals(objective, eqx.combine(free, fixed), take(data), take(memory))
            return _mean(jnp.sum(residuals**2, -1), exists), (now, jnp.sum(~exists))

        (value, (now, failed)), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(free)
        updates, new_state = optimiser.update(gradient, opt_state, free)
        # Without any residual there is no gradient, and nothing is learned from the batch.
        usable = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(usable, a, b), new, old)
        memory = jax.tree.map(lambda all, some: all.at[which].set(some), memory, now)
        return (keep(eqx.apply_updates(free, updates), free), keep(new_state, opt_state), memory), (value, failed)

    carry, (losses, failed) = jax.lax.scan(step, begin, order)
    return carry, jnp.nanmean(losses), jnp.sum(failed)


@eqx.filter_jit
def _damped_step(objective, free, fixed, state, data, memory):
    """A step of Levenberg and Marquardt; none if no damping lowers the loss."""
    (vector, unravel), (damping, size) = ravel_pytree(free), state

    def residuals(vector):
        found, exists, now = _residuals(objective, eqx.combine(unravel(vector), fixed), data, memory)
        return found.ravel(), (exists, now)

    r, forward, (exists, now) = jax.linearize(residuals, vector, has_aux=True)
    J = jax.vmap(forward, out_axes=1)(jnp.eye(vector.size, dtype=vector.dtype))
    usable = jnp.isfinite(jnp.sum(J, 1))  # rows of samples without derivative are left out
    J, r_used = jnp.where(usable[:, None], J, 0.0), jnp.where(usable, r, 0.0)
    H, g = J.T @ J, J.T @ r_used
    before, failed = _mean(jnp.sum(r.reshape(exists.size, -1) ** 2, -1), exists), jnp.sum(~exists)
    size = jnp.maximum(size, jnp.diagonal(H))
    D = jnp.diag(size + 1e-9 * jnp.max(size) + jnp.finfo(vector.dtype).tiny)

    def attempt(carry):
        tries, damping, *_ = carry
        trial = vector - jnp.linalg.solve(H + damping * D, g)
        r, (there, now) = residuals(trial)
        after = jnp.sum(r.reshape(exists.size, -1) ** 2, -1)
        # Of the samples that have a residual here, all must have one there: the means are over the same samples.
        lower = (_mean(jnp.where(exists, after, 0.0), exists) < before) & jnp.all(there | ~exists)
        lower = lower & jnp.all(jnp.isfinite(trial))
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(lower, a, b), new, old)
        damping = jnp.where(lower, damping, 4.0 * damping)
        return tries + 1, damping, lower, keep(trial, vector), keep(now, memory)

    start = (jnp.asarray(0), damping, jnp.asarray(False), vector, now)
    tries, damping, _, vector, now = jax.lax.while_loop(lambda c: ~c[2] & (c[0] < _TRIES), attempt, start)
    damping = jnp.where(tries == 1, jnp.maximum(0.1 * damping, 1e-12), jnp.minimum(damping, 1e6))
    return unravel(vector), (damping, size), now, before, failed


def _residuals(objective: Any, theta: PyTree, data: PyTree, memory: Any) -> tuple[Array, Array, Any]:
    """r of every sample, zero where it does not exist; whether it does; the memories."""
    theta = values(theta)
    found, exists, memory = jax.vmap(lambda sample, memory: objective.residual(theta, sample, memory))(data, memory)
    return jnp.where(exists[:, None], found, 0.0), exists, memory


def _mean(squares: Array, exists: Array) -> Array:
    """Over the samples that have a residual; NaN if none has."""
    return jnp.sum(squares) / jnp.sum(exists)


def _init(optimiser: Optimiser, free: PyTree) -> Any:
    if isinstance(optimiser, LevenbergMarquardt):
        vector, _ = ravel_pytree(free)
        return jnp.asarray(optimiser.damping, vector.dtype), jnp.zeros_like(vector)
    return optimiser.init(free)


def _order(num_samples: int, config: Learning, epoch: int) -> Array:
    """Batches of samples; those that do not fill one are left out of this epoch."""
    batch = min(config.batch, num_samples)
    order = np.random.default_rng((config.seed, epoch)).permutation(num_samples)
    return jnp.asarray(order[: num_samples // batch * batch].reshape(-1, batch))


def _fingerprint(objective: Any, config: Learning, optimiser: Optimiser, arrays: PyTree) -> np.ndarray:
    """Of what the result depends on, functions of the user apart, which have no lasting name."""
    theta, _, _, groups = arrays
    free = eqx.filter(theta, jax.tree.map(lambda *on: any(on), *groups))
    # An optimiser of optax is functions as well, but its rates are constants in what they do.
    how = optimiser
    if not isinstance(optimiser, LevenbergMarquardt):
        how = re.sub(" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(optimiser.update)(free, optimiser.init(free), free)))
    digest = hashlib.sha256(repr((type(objective).__name__, objective.settings, config, how)).encode())
    digest.update(str(jax.tree.structure(theta)).encode())
    for leaf in jax.tree.leaves((objective, arrays)):
        if eqx.is_array_like(leaf):
            digest.update(np.asarray(leaf).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _resume(checkpoint: Path | None, mark: np.ndarray, state: _State) -> _State:
    if checkpoint is None or not checkpoint.exists():
        return state
    stored_mark, stored = load_tree(checkpoint, (mark, state))
    if not np.array_equal(stored_mark, mark):
        raise ValueError(f"{checkpoint} is of learning something else, or with other data or settings: delete it.")
    return stored
