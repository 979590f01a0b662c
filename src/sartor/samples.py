"""Samples of training, cut out of logs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from sartor.data import Log
from sartor.models.base import AbstractModel, history, rest

_AT_REST = 0.02  # [rad/s or m/s]


class Windows(NamedTuple):
    """Samples: a state with its past, and what came after. The first axis is that of samples."""

    x0: np.ndarray
    """(B, nx), measured states."""
    us: np.ndarray
    """(B, P, nu), the controls that followed."""
    xs: np.ndarray
    """(B, P, nx), the states that followed."""
    history: np.ndarray
    """(B, H, 3n), the past (D13)."""
    run: np.ndarray
    """(B,), index of the log."""
    step: np.ndarray
    """(B,), control step in the log."""
    environment: np.ndarray
    """(B,), environment of the log."""
    dt: np.ndarray
    """(B,), control step of the log [s], the same for all."""

    @property
    def size(self) -> int:
        """B."""
        return len(self.x0)

    def take(self, which: Any) -> "Windows":
        """Some of the samples."""
        return Windows(*(field[which] for field in self))


class TorqueSamples(NamedTuple):
    """Samples for pretraining. The first axis is that of samples."""

    q: np.ndarray
    """(B, n) [rad]."""
    qd: np.ndarray
    """(B, n)."""
    qdd: np.ndarray
    """(B, n)."""
    target: np.ndarray
    """(B, n), torques that the nominal robot leaves out [Nm]."""
    history: np.ndarray
    """(B, H, 3n), the past (D13)."""


def windows(logs: Sequence[Log], model: AbstractModel, num_steps: int, *, stride: int = 1) -> Windows:
    """All samples of `num_steps` steps in some logs, with their histories.

    Args:
        logs: Runs of the robot.
        model: Its nominal robot and `history_length` are used.
        num_steps: P, steps that follow each sample.
        stride: Take every so many control steps.

    Before its beginning the past of a log is taken to be at rest. One that begins in motion (faster than 0.02 rad/s or
    m/s) gives samples only from the step on where its history is whole.

    Fails: `ValueError` for a log that is too short or of another robot, or for logs with different control steps.
    """
    if not logs:
        raise ValueError("logs is empty: there is nothing to learn from.")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, not {stride}.")
    if len({log.dt for log in logs}) > 1:
        raise ValueError(f"logs have different control steps, {sorted({log.dt for log in logs})} s: resample them.")
    parts = [_windows_of(log, i, model, num_steps, stride) for i, log in enumerate(logs)]
    return Windows(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def _windows_of(log: Log, run: int, model: AbstractModel, num_steps: int, stride: int) -> Windows:
    n, length, num = model.body.nq, model.history_length, len(log.us)
    if log.us.shape[1] != n:
        raise ValueError(f"logs[{run}] has {log.us.shape[1]} joints, but the model has {n}: it is of another robot.")
    rolling = np.abs(log.xs[0, n:]).max() <= _AT_REST
    first = 0 if rolling else length
    if num < first + num_steps:
        past = "" if rolling else f" and, as the log begins in motion, {length} before it"
        raise ValueError(f"logs[{run}] has {num} control steps: a sample needs {num_steps} to follow it{past}.")
    past = np.asarray(_history(model.body, jnp.asarray(log.xs), jnp.asarray(log.us), log.dt))
    past = np.concatenate([np.asarray(rest(jnp.asarray(log.xs[0, :n]), length)), past])
    steps = np.arange(first, num - num_steps + 1, stride)
    ahead = steps[:, None] + np.arange(num_steps)
    behind = steps[:, None] + np.arange(length)
    count = len(steps)
    return Windows(
        log.xs[steps], log.us[ahead], log.xs[ahead + 1], past[behind].astype(np.float32),
        np.full(count, run), steps, np.full(count, log.environment), np.full(count, log.dt),
    )  # fmt: skip


_history = eqx.filter_jit(history)
