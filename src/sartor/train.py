"""Training: the weighted loss of rollouts, and the loop that minimises it.

    loss(θ) = mean over samples of the weighted errors (D15) of  x̂_0 = x_t,  x̂_{k+1} = RK4(x̂_k, u_{t+k}, z_t; θ)

with z_t from the history at t and held, as the controller holds it.

References: Węgrzynowski et al., Learning What Matters, eq. (1).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from sartor.files import load_tree, save_tree
from sartor.models.base import AbstractModel, ArmDynamics, Theta, trainable
from sartor.samples import TorqueSamples, Windows
from sartor.weights import Weights

M = TypeVar("M", bound=eqx.Module)
Monitor = Callable[[int, int], None]
"""monitor(done, total), called as training proceeds."""


@dataclass(frozen=True)
class Config:
    """How to train."""

    epochs: int = 6
    """Passes over the data."""
    batch: int = 256
    """Samples of a gradient step."""
    learning_rate: float = 1e-3
    """Of Adam, at the beginning; it falls to zero along a cosine."""
    weight_decay: float = 0.0
    """Of AdamW."""
    seed: int = 0
    """Of the order of the samples and of the noise, which do not depend on the weights."""
    anchor: float = 0.0
    """Weight of the inverse-dynamics loss beside that of the rollouts, both relative to their values at the start, the
    former joint by joint.
    Rollouts alone shrink what torques are predicted to do wherever the context errs, as any regression on noisy
    inputs does: the inertia grows, and the controller becomes unstable. With torques as output there is no such bias.
    """
    noise: tuple[float, ...] = ()
    """Standard deviations (3n,) of noise on every row of the histories, fresh in every step; () for none. It keeps the
    context from following single rows, through which the controller would otherwise feed back on itself."""
    frozen: tuple[str, ...] = ()
    """Fields of the model that stay as they are, as "inertia" of a `CaDeLaC`."""

    def __post_init__(self):
        for name, value in (("epochs", self.epochs), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}.")


class Curve(NamedTuple):
    """Loss after every epoch, relative to that before training."""

    train: list[float]
    """Mean over the gradient steps of the epoch."""
    validation: list[float]
    """On the validation samples; empty without any."""


def rollout_errors(
    model: AbstractModel, dt: float, x0: Array, us: Array, xs: Array, past: Array
) -> Float[Array, "p nx"]:
    """x̂ - x of one sample along its p controls."""
    theta = Theta(model, model.context(past), None)
    step = ArmDynamics(dt, reverse=True)

    def advance(x, u):
        x = step(x, u, 0, theta)
        return x, x

    return jax.lax.scan(advance, x0, us)[1] - xs


def rollout_loss(dt: float, model: AbstractModel, batch: tuple[Windows, Weights]) -> Float[Array, " B"]:
    """Weighted loss (D15) of each sample of a batch; p is that of the weights."""
    sample, weights = batch
    num_steps = jax.tree.leaves(weights)[0].shape[-2]
    ahead: Any = (sample.x0, sample.us[:, :num_steps], sample.xs[:, :num_steps], sample.history)
    errors = jax.vmap(partial(rollout_errors, model, dt))(*ahead)
    return weights.loss(errors)


def inverse_errors(dt: float, model: AbstractModel, batch: tuple[Windows, Weights]) -> Float[Array, "B n"]:
    """u - torque(q̄, q̇̄, q̈, z) over the first interval of each sample, with q̄, q̇̄, q̈ as in (D13)."""
    sample, _ = batch
    n = model.body.nq

    def error(x, u, x_next, past):
        middle, qdd = 0.5 * (x + x_next), (x_next[n:] - x[n:]) / dt
        return u - model.torque(middle[:n], middle[n:], qdd, model.context(past))

    ahead: Any = (sample.x0, sample.us[:, 0], sample.xs[:, 0], sample.history)
    return jax.vmap(error)(*ahead)


def _anchored_loss(
    dt: float, size: Array, sizes: Array, model: AbstractModel, batch: tuple[Windows, Weights]
) -> Float[Array, " B"]:
    return rollout_loss(dt, model, batch) / size + jnp.sum(inverse_errors(dt, model, batch) ** 2 / sizes, -1)


def fit(
    model: AbstractModel,
    samples: Windows,
    weights: Weights,
    config: Config,
    *,
    validation: tuple[Windows, Weights] | None = None,
    checkpoint: Path | None = None,
    monitor: Monitor | None = None,
    after_epoch: Callable[[int, AbstractModel], None] | None = None,
) -> tuple[AbstractModel, Curve]:
    """Train a model on rollouts under some weights.

    Args:
        model: Where training starts; its nominal robot stays as it is.
        samples: Training data.
        weights: Their weights, one for each sample.
        config: How to train.
        validation: Other samples with their weights, for the curve only.
        checkpoint: File that keeps the state after every epoch; if it exists, training goes on from there, to the
            same result as without the interruption.
        monitor: Called after every gradient step.
        after_epoch: after_epoch(epoch, model), called after every epoch, counted from 1.

    Returns: the model, and the curve of its loss relative to that of the model at the start.
    Fails: `ValueError` for weights that do not fit the samples or `frozen` fields that the model does not have,
        `FloatingPointError` if the loss is not finite.
    """
    num_samples = jax.tree.leaves(weights)[0].shape[0]
    if num_samples != samples.size:
        raise ValueError(f"weights are those of {num_samples} samples, but there are {samples.size}.")
    num_steps = jax.tree.leaves(weights)[0].shape[-2]
    if num_steps > samples.us.shape[1]:
        raise ValueError(f"weights have {num_steps} steps, but the samples only {samples.us.shape[1]}: cut longer.")
    trainable(model, config.frozen)  # refuses unknown names before anything is computed
    dt = float(samples.dt[0])
    loss = eqx.Partial(rollout_loss, dt)
    if config.anchor > 0.0:
        data = (samples, weights)
        squares = np.mean(losses(eqx.Partial(inverse_errors, dt), model, data) ** 2, 0)
        sizes = jnp.asarray(squares * len(squares) / config.anchor, _dtype(model))
        size = jnp.asarray(mean_loss(loss, model, data), _dtype(model))
        loss = eqx.Partial(_anchored_loss, dt, size, sizes)
    return optimise(loss, model, (samples, weights), config, validation, checkpoint, monitor, after_epoch)


def torque_loss(variances: tuple[float, ...], model: AbstractModel, batch: TorqueSamples) -> Float[Array, " B"]:
    """Σ_j (residual_j - target_j)²/variance_j of each sample of a batch.

    References: Schulze et al., Context-Aware Deep Lagrangian Networks for Model Predictive Control, 2025, and its code.
    """

    def error(q, qd, qdd, target, past):
        return model.residual(q, qd, qdd, model.context(past)) - target

    return jnp.sum(jax.vmap(error)(*batch) ** 2 / jnp.asarray(variances, batch.target.dtype), -1)


def pretrain(
    model: AbstractModel, samples: TorqueSamples, config: Config, *, validation: TorqueSamples | None = None,
    checkpoint: Path | None = None, monitor: Monitor | None = None,
) -> tuple[AbstractModel, Curve]:  # fmt: skip
    """Train the residual of a model on torques that are known, as a simulator knows those of a payload.

    The loss is `torque_loss` with the variance of each torque over the samples. Else as `fit`.

    Fails: `ValueError` if a target does not vary, else as `fit`.
    """
    variances = np.var(samples.target, 0)
    if not np.all(variances > 0):
        raise ValueError(f"target has no variance for the joints {np.flatnonzero(variances == 0).tolist()}: there is"
                         " nothing to learn from; excite them.")  # fmt: skip
    loss = eqx.Partial(torque_loss, tuple(variances.tolist()))
    return optimise(loss, model, samples, config, validation, checkpoint, monitor)


def optimise(
    loss: Callable, model: M, data: PyTree, config: Config, validation: PyTree | None = None,
    checkpoint: Path | None = None, monitor: Monitor | None = None,
    after_epoch: Callable[[int, M], None] | None = None,
) -> tuple[M, Curve]:  # fmt: skip
    """Minimise the mean of loss(model, batch) -> (B,) over data whose leaves have samples along their first axis.

    The loss is divided by its value at the start. Else as `fit`.
    """
    data = jax.tree.map(lambda leaf: np.asarray(leaf, _dtype(model)) if _floating(leaf) else np.asarray(leaf), data)
    num_samples = len(jax.tree.leaves(data)[0])
    batch = min(config.batch, num_samples)
    num_steps = num_samples // batch
    optimiser = _optimiser(config.learning_rate, config.weight_decay, config.epochs * num_steps)
    free, fixed = eqx.partition(model, trainable(model, config.frozen))
    begin = mean_loss(loss, model, data)
    if not (np.isfinite(begin) and begin > 0):
        raise FloatingPointError(f"the loss is {begin} before training: look for samples without errors or weights, or"
                                 " that are not finite.")  # fmt: skip
    scale = jnp.asarray(1.0 / begin, _dtype(model))  # an array: as a number it would be compiled in
    mark = _fingerprint(config, begin, model, data)
    state = (free, optimiser.init(free), jnp.zeros((2, config.epochs)))
    epoch, state = _resume(checkpoint, mark, state)
    while epoch < config.epochs:
        order = np.random.default_rng((config.seed, epoch)).permutation(num_samples)
        free, opt_state, curve = state
        total = 0.0
        for i in range(num_steps):
            chosen = _noisy(_take(data, order[i * batch : (i + 1) * batch]), config, (epoch, i))
            free, opt_state, value = _step(loss, optimiser, free, fixed, opt_state, chosen, scale)
            total += float(value)
            if monitor is not None:
                monitor(epoch * num_steps + i + 1, config.epochs * num_steps)
        if not np.isfinite(total):
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch + 1}: lower learning_rate ({config.learning_rate}), and look"
                " for samples that no model can follow."
            )
        trained = eqx.combine(free, fixed)
        held_out = np.nan if validation is None else scale * mean_loss(loss, trained, validation)
        curve = curve.at[:, epoch].set(jnp.asarray([total / num_steps, held_out]))
        state, epoch = (free, opt_state, curve), epoch + 1
        if after_epoch is not None:  # before the checkpoint: an interruption between them repeats it
            after_epoch(epoch, trained)
        if checkpoint is not None:
            save_tree(checkpoint, (mark, np.asarray(epoch), *state))
    train, held_out = np.asarray(state[2]).tolist()
    return eqx.combine(state[0], fixed), Curve(train, [] if validation is None else held_out)


def mean_loss(loss: Callable, model: eqx.Module, data: PyTree, batch: int = 512) -> float:
    """Mean of loss(model, batch) over all data."""
    return float(np.mean(losses(loss, model, data, batch)))


def losses(loss: Callable, model: eqx.Module, data: PyTree, batch: int = 512) -> Float[np.ndarray, "B ..."]:
    """loss(model, ...) of each sample, a number or an array, computed in batches."""
    data = jax.tree.map(lambda leaf: np.asarray(leaf, _dtype(model)) if _floating(leaf) else np.asarray(leaf), data)
    num_samples = len(jax.tree.leaves(data)[0])
    batch = min(batch, num_samples)
    values = []
    for start in range(0, num_samples, batch):
        # The last batch is filled up with the first sample: one shape compiles once.
        which = np.arange(start, start + batch) * (np.arange(start, start + batch) < num_samples)
        values.append(_losses(loss, model, _take(data, which)))
    return np.concatenate(values)[:num_samples]


@eqx.filter_jit
def _losses(loss: Callable, model: eqx.Module, batch: PyTree) -> Array:
    return loss(model, batch)


@eqx.filter_jit(donate="none")
def _step(loss, optimiser, free, fixed, opt_state, batch, scale):
    def objective(free):
        return scale * jnp.mean(loss(eqx.combine(free, fixed), batch))

    value, gradient = eqx.filter_value_and_grad(objective)(free)
    updates, opt_state = optimiser.update(gradient, opt_state, free)
    return eqx.apply_updates(free, updates), opt_state, value


@cache  # the same functions for the same numbers: `_step` does not compile anew for every training
def _optimiser(learning_rate: float, weight_decay: float, num_steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(schedule, weight_decay=weight_decay))


def _fingerprint(config: Config, begin: float, model: eqx.Module, data: PyTree) -> np.ndarray:
    """Of all that training depends on; the loss before it stands for the loss function."""
    digest = hashlib.sha256(repr((config, begin)).encode())
    for leaf in jax.tree.leaves((eqx.filter(model, eqx.is_array), data)):
        digest.update(np.asarray(leaf).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _resume(checkpoint: Path | None, mark: np.ndarray, state: PyTree) -> tuple[int, PyTree]:
    if checkpoint is None or not checkpoint.exists():
        return 0, state
    stored_mark, epoch, *stored = load_tree(checkpoint, (mark, np.asarray(0), *state))
    if not np.array_equal(stored_mark, mark):
        raise ValueError(f"{checkpoint} is of training from another model, or with other data or settings: delete it.")
    return int(epoch), tuple(stored)


def _take(data: PyTree, which: np.ndarray) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[which], data)


def _noisy(batch: Any, config: Config, step: tuple[int, int]) -> Any:
    """A batch of samples, or of samples with weights, with noise on its histories."""
    if not config.noise:
        return batch
    if not hasattr(batch, "history"):
        return (_noisy(batch[0], config, step), *batch[1:])
    rng = np.random.default_rng((config.seed, *step, 1))
    noise = rng.standard_normal(batch.history.shape, np.float32) * np.asarray(config.noise, np.float32)
    return batch._replace(history=batch.history + noise.astype(batch.history.dtype))


def _floating(leaf: Any) -> bool:
    return np.issubdtype(np.asarray(leaf).dtype, np.floating)


def _dtype(model: eqx.Module) -> Any:
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))[0].dtype
