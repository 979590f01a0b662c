"""Logs of a controlled system: what one holds, and whether it can be true.

    x_k = [q_k, qd_k],   u(t) = u_k  for  k·dt ≤ t < (k + 1)·dt

A velocity is the derivative of its position, so over any stretch of a log ∫ qd dt = q(end) - q(begin). The ratio of
the two sides tells wrong units and rates, their correlation mixed-up columns.

Files: `sartor.lerobot` (datasets) and `sartor.logs` (Parquet and CSV of your own).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# ∫ qd dt over the change of q, and what it looks like.
UNITS = (
    (180 / np.pi, "the velocities look like deg/s beside positions in rad"),
    (np.pi / 180, "the positions look like degrees beside velocities in rad/s"),
    (30 / np.pi, "the velocities look like revolutions per minute"),
    (-1.0, "the velocities have the opposite sign"),
    (1e3, "the time stamps look like milliseconds taken for seconds (or microseconds for milliseconds)"),
    (1e-3, "the time stamps look like seconds taken for milliseconds (or milliseconds for microseconds)"),
    (1e6, "the time stamps look like nanoseconds taken for milliseconds (or microseconds for seconds)"),
    (1e-6, "the time stamps look like milliseconds taken for nanoseconds (or seconds for microseconds)"),
    (1e9, "the time stamps look like nanoseconds taken for seconds"),
    (1e-9, "the time stamps look like seconds taken for nanoseconds"),
)


class Log(NamedTuple):
    """One run of a controlled system, sampled at the control rate."""

    xs: np.ndarray
    """(T+1, 2*nq) states [q, qd] at the control instants, [rad, rad/s] or [m, m/s], float64."""
    us: np.ndarray
    """(T, nq) controls [Nm or N], each held until the next instant."""
    refs: np.ndarray | None
    """(T+1, 2*nq) reference states, None if unknown."""
    dt: float
    """Time between two controls in [s]."""
    environment: int = 0
    """Index of the plant (payload) that it was recorded on."""
    qdds: np.ndarray | None = None
    """(T, nq) joint accelerations at the beginning of each interval [rad/s² or m/s²], None if not recorded."""


def check(log: Log, where: str = "log") -> None:
    """Raise a `ValueError` where a log cannot be true.

    The shapes agree, all values are finite, and the velocities are the derivatives of the positions (see
    `check_velocities`). Controls may be anything finite, zero included.

    Args:
        log: The log.
        where: What the message begins with, such as the name of a file.
    """
    check_arrays(log, where)
    nq = log.us.shape[1]
    times = log.dt * np.arange(len(log.xs))
    names = [f"xs[:, {i}]" for i in range(2 * nq)]
    check_velocities(times, log.xs[:, :nq], log.xs[:, nq:], names[:nq], names[nq:], where)


def check_arrays(log: Log, where: str = "log") -> None:
    """Raise a `ValueError` unless the shapes of a log agree and its values are finite."""
    if np.ndim(log.us) != 2 or 0 in np.shape(log.us):
        raise ValueError(f"{where}: us must have shape (T, nq) with T ≥ 1 and nq ≥ 1, not {np.shape(log.us)}.")
    num, nq = log.us.shape
    wanted = {"xs": (num + 1, 2 * nq), "us": (num, nq), "refs": (num + 1, 2 * nq), "qdds": (num, nq)}
    for name, shape in wanted.items():
        if name in ("refs", "qdds") and getattr(log, name) is None:
            continue
        values = getattr(log, name)
        if np.shape(values) != shape:
            raise ValueError(
                f"{where}: {name} must have shape {shape} for us of shape {(num, nq)}, not {np.shape(values)}."
                " A run of T controls has T + 1 states [q, qd]."
            )
        check_finite(values, [f"{name}[:, {i}]" for i in range(shape[1])], where)
    if not (np.isfinite(log.dt) and log.dt > 0):
        raise ValueError(f"{where}: dt must be positive and finite [s], not {log.dt}.")
    if log.environment != int(log.environment) or log.environment < 0:
        raise ValueError(f"{where}: environment must be an index from 0 on, not {log.environment!r}.")


def check_finite(values: np.ndarray, names: Sequence[str], where: str) -> None:
    """Raise a `ValueError` naming the first column, and its rows, with a value that is missing or not finite."""
    bad = ~np.isfinite(np.asarray(values, float)).reshape(len(values), -1)
    for name, column in zip(names, bad.T, strict=True):
        if column.any():
            raise ValueError(
                f"{where}: {name} is missing or not finite in {listed(np.flatnonzero(column))}."
                " Drop those rows, or split the log there."
            )


def check_velocities(
    times: np.ndarray, q: np.ndarray, qd: np.ndarray, q_names: Sequence[str], qd_names: Sequence[str], where: str
) -> None:
    """Raise a `ValueError` where a velocity is not the derivative of its position.

    Compares the change of q with the trapezoidal integral of qd over windows of 1 to 64 samples, and judges each joint
    by the windows that agree best: short ones if the velocity is clean, long ones if it is noisy or delayed. With a
    correlation c and a ratio r of the sizes, the true factor lies between c r (all noise is the velocity's) and r/c
    (all is the position's); accepted are c ≥ 0.7 and a range that comes within 15 % of one. Joints that hardly move
    (less than 0.02 rad or m), and logs of less than 10 samples, are not judged. Positions and velocities that are wrong
    by the same factor cannot be told from right ones.

    Args:
        times: (n,), increasing [s].
        q: (n, nq) positions [rad or m].
        qd: (n, nq) velocities.
        q_names: Names of the positions for the message.
        qd_names: Names of the velocities.
        where: What the message begins with.
    """
    if len(times) < 10:
        return
    steps = np.diff(times)[:, None]
    known = steps <= 3 * np.median(steps)  # what happened in a gap is not known
    moved = np.where(known, np.diff(q, axis=0), 0.0)
    claimed = np.where(known, steps * (qd[1:] + qd[:-1]) / 2, 0.0)
    moves = (_travel(moved) >= 0.02) | (_travel(claimed) >= 0.2)  # the integral of a resting sensor drifts
    correlation, ratio = _compare(moved, claimed)
    for i in np.flatnonzero(moves).tolist():
        c, r = correlation[i, i], ratio[i, i]
        if abs(c) < 0.7:
            others = [
                j for j in np.flatnonzero(moves).tolist() if correlation[i, j] > 0.95 and 0.8 < ratio[i, j] < 1.25
            ]
            guess = f"It fits the position {q_names[others[0]]}: are" if others else "Are"
            raise ValueError(
                f"{where}: velocity {qd_names[i]} is not the derivative of position {q_names[i]} (correlation {c:.2f}"
                f" over {len(times)} rows). {guess} the columns mixed up, or is one of them a command?"
            )
        if not (r * abs(c) < 1.15 and r / abs(c) > 0.85):
            reason = next((text for factor, text in UNITS if abs(r / factor - 1) < 0.2), "a unit or the rate is wrong")
            raise ValueError(
                f"{where}: velocity {qd_names[i]} is {r:.3g} times the derivative of position {q_names[i]}, over"
                f" {len(times)} rows: {reason}. State the units that the log has, or convert it to rad or m, and s."
            )


def listed(rows: np.ndarray) -> str:
    """Rows for a message, counting from 0; of many, the first few."""
    some = ", ".join(str(row) for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {some}{more}"


def _travel(increments: np.ndarray) -> np.ndarray:
    """Range of what the increments add up to, for each joint."""
    path = np.cumsum(increments, axis=0)
    return np.maximum(path.max(axis=0), 0) - np.minimum(path.min(axis=0), 0)


def _compare(moved: np.ndarray, claimed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation and ratio of claimed[:, i] to moved[:, j] as (nq, nq), by the windows in which claim i fits best."""
    nq = moved.shape[1]
    correlation, ratio = np.zeros((nq, nq)), np.zeros((nq, nq))
    for width in (1, 4, 16, 64):
        if width > 1 and len(moved) < 20 * width:  # few windows correlate by chance
            break
        begins = np.arange(0, len(moved), width)
        a, b = np.add.reduceat(claimed, begins), np.add.reduceat(moved, begins)
        size_a, size_b = np.linalg.norm(a, axis=0)[:, None], np.linalg.norm(b, axis=0)[None]
        tiny = np.finfo(float).tiny
        new = (a.T @ b) / np.maximum(size_a * size_b, tiny)
        better = np.abs(np.diag(new)) > np.abs(np.diag(correlation))
        correlation[better] = new[better]
        ratio[better] = (np.sign(new) * size_a / np.maximum(size_b, tiny))[better]
    return correlation, ratio
