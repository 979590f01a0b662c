"""Logs of your own: plain Parquet and CSV with named columns, converted to SI units and to the control rate.

    x_k = x(t_0 + k·dt)                                       states: linear between the rows
    u_k = 1/dt ∫ u(t) dt  over  [t_0 + k·dt, t_0 + (k+1)·dt)    controls: each row holds until the next

Where the rows lie at the control rate already they are taken as they are. A log that is faster than the control rate
gives the mean control of each interval: the constant one with the same impulse.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sartor.data import Log, check_arrays, check_finite, check_velocities, listed
from sartor.files import replacing_file

SECONDS = {"s": 1.0, "ms": 1e-3, "ns": 1e-9}
RADIANS = {"rad": 1.0, "deg": np.pi / 180}


@dataclass(frozen=True)
class Columns:
    """The columns of a log, and the units of the file. Joints in one order throughout."""

    time: str
    """Time stamps, from any beginning."""
    positions: Sequence[str]
    """Joint positions."""
    velocities: Sequence[str] | None
    """Joint velocities. None if not logged: they are then central differences of the positions at the rate of the log,
    which turn an error of ±e in the positions into one of about ±e/step in the velocities. Filter before if that is
    too much."""
    torques: Sequence[str]
    """Joint torques or forces [Nm or N]."""
    reference_positions: Sequence[str] | None = None
    """Reference positions, None if unknown."""
    reference_velocities: Sequence[str] | None = None
    """Reference velocities; None: central differences of the reference positions, if those are given."""
    time_unit: Literal["s", "ms", "ns"] = "s"
    """Unit of the time stamps. Columns of Parquet's own type for instants bring theirs along."""
    angle_unit: Literal["rad", "deg"] = "rad"
    """Unit of all positions, and per second of all velocities. Leave "rad" for sliding joints in m and m/s."""

    def __post_init__(self):
        for unit, known in (("time_unit", SECONDS), ("angle_unit", RADIANS)):
            if getattr(self, unit) not in known:
                raise ValueError(f"{unit} must be one of {', '.join(known)}, not {getattr(self, unit)!r}.")
        for field in ("positions", "velocities", "torques", "reference_positions", "reference_velocities"):
            names = getattr(self, field)
            if isinstance(names, str):
                raise ValueError(f"{field} must be a sequence of column names, not the text {names!r}.")
            if names is None and field not in ("positions", "torques"):
                continue
            if names is None or len(names) != len(self.positions) or not names:
                raise ValueError(f"{field} must name one column for each joint, {len(self.positions)}, not {names}.")
            object.__setattr__(self, field, tuple(names))
        if self.reference_velocities and not self.reference_positions:
            raise ValueError("reference_velocities need reference_positions beside them.")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"Columns uses {', '.join(twice)} more than once: every quantity has its own column.")

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that the log must have."""
        parts = (self.velocities, self.torques, self.reference_positions, self.reference_velocities)
        return (self.time, *self.positions, *(name for part in parts for name in part or ()))


def read_log(path: str | os.PathLike, columns: Columns, dt: float, *, max_gap: float | None = None) -> Log:
    """Read a log, check it, and bring it to the control rate.

    Args:
        path: A `.parquet` or `.csv` file with a header; columns that are not named are ignored.
        columns: What is where, in which units.
        dt: Time between two controls in [s].
        max_gap: Longest time between two rows that may be bridged in [s]; default 3 dt.

    Returns: the log, of environment 0; `log._replace(environment=i)` for another.
    Fails: `ValueError` that names the file, the column and the rows (counting from 0): a missing column, values that
        are missing or not finite, time that does not increase, gaps, a log that is too short or slower than the control
        rate, velocities that are not the derivatives of the positions.
    """
    path = Path(path)
    if not (np.isfinite(dt) and dt > 0):
        raise ValueError(f"dt must be positive and finite [s], not {dt}.")
    table = _table(path)
    _check_names(path, table.column_names, columns)
    times = _times(path, table, columns)
    scale = RADIANS[columns.angle_unit]
    q, u = scale * _values(path, table, columns.positions), _values(path, table, columns.torques)
    if columns.velocities is None:
        qd = _derivative(times, q)
    else:
        qd = scale * _values(path, table, columns.velocities)
        # Before the gaps: a wrong unit of time looks like gaps everywhere, and here it has a name.
        check_velocities(times, q, qd, columns.positions, columns.velocities, str(path))
    _check_rate(path, times, columns, dt, 3 * dt if max_gap is None else max_gap)
    refs = _references(path, table, columns, times)
    grid = dt * np.arange(int(np.floor(times[-1] / dt + 1e-6)) + 1)
    states = lambda values: None if values is None else _states(times, values, grid)
    return Log(_states(times, np.hstack([q, qd]), grid), _controls(times, u, grid), states(refs), dt)


def write_log(path: str | os.PathLike, log: Log, columns: Columns) -> None:
    """Write a log as `.parquet` or `.csv`, whole or not at all; `read_log` with the same columns gives it back.

    One row for each of the T + 1 control instants; the last repeats the last control, which reading ignores. References
    are written if `columns` names them; the environment and accelerations are not.

    Args:
        path: The file; one that is there is replaced.
        log: The log.
        columns: Names and units.
    """
    path = Path(path)
    check_arrays(log, str(path))
    nq = log.us.shape[1]
    if nq != len(columns.positions):
        raise ValueError(f"{path}: the log has {nq} joints, columns names {len(columns.positions)}.")
    if columns.reference_positions and log.refs is None:
        raise ValueError(f"{path}: columns names references, but the log has none: leave them out of columns.")
    times = log.dt * np.arange(len(log.xs)) / SECONDS[columns.time_unit]
    values = {columns.time: np.rint(times).astype(np.int64) if columns.time_unit == "ns" else times}
    for states, positions, velocities in (
        (log.xs, columns.positions, columns.velocities),
        (log.refs, columns.reference_positions, columns.reference_velocities),
    ):
        for names, begin in ((positions, 0), (velocities, nq)):
            for i, name in enumerate(names or ()):
                values[name] = np.asarray(states)[:, begin + i] / RADIANS[columns.angle_unit]
    held = np.concatenate([log.us, log.us[-1:]])
    values |= {name: held[:, i] for i, name in enumerate(columns.torques)}
    table = pa.table({name: values[name] for name in columns.names})
    with replacing_file(path) as new:
        (pq.write_table if _is_parquet(path) else pyarrow.csv.write_csv)(table, new)


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise ValueError(f"{path}: a log is a .parquet or a .csv file, not {path.suffix or 'without an ending'}.")
    return path.suffix.lower() == ".parquet"


def _table(path: Path) -> pa.Table:
    read = pq.read_table if _is_parquet(path) else pyarrow.csv.read_csv
    try:
        return read(path)
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: empty, torn, or not a {path.suffix} file: {error}") from error


def _check_names(path: Path, there: Sequence[str], columns: Columns) -> None:
    twice = [name for name in columns.names if there.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: more than one column is called {', '.join(map(repr, twice))}: rename them.")
    plain = {name.strip().lower(): name for name in there}
    missing = []
    for name in columns.names:
        if name not in there:
            near = difflib.get_close_matches(name.strip().lower(), plain, n=2, cutoff=0.7)
            missing.append(repr(name) + (f" (near: {', '.join(repr(plain[n]) for n in near)})" if near else ""))
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}. There are: {', '.join(map(repr, there))}.")


def _column(path: Path, table: pa.Table, name: str) -> np.ndarray:
    """A column as float64."""
    column = table[name]
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        text = [i for i, value in enumerate(column.to_pylist()) if isinstance(value, str) and not _is_number(value)]
        first = f", such as {column[text[0]].as_py()!r} in row {text[0]}" if text else ""
        raise ValueError(f"{path}: column {name!r} holds {column.type}{first}, not numbers.")
    values = column.cast(pa.float64()).to_numpy()
    check_finite(values, [f"column {name!r}"], str(path))
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(path: Path, table: pa.Table, names: Sequence[str]) -> np.ndarray:
    """(rows, columns)."""
    return np.stack([_column(path, table, name) for name in names], axis=1)


def _times(path: Path, table: pa.Table, columns: Columns) -> np.ndarray:
    """Times since the first row in [s], increasing."""
    column, unit = table[columns.time], columns.time_unit
    if len(column) < 2:
        raise ValueError(f"{path}: only {len(column)} rows: a log needs at least two.")
    if pa.types.is_timestamp(column.type):
        column, unit = column.cast(pa.timestamp("ns")).cast(pa.int64()), "ns"
    if pa.types.is_integer(column.type) and not column.null_count:
        stamps = column.cast(pa.int64()).to_numpy()  # nanoseconds since 1970 do not fit into a float
    else:
        stamps = _column(path, table, columns.time)
    back = np.flatnonzero(np.diff(stamps) <= 0) + 1
    if back.size:
        raise ValueError(
            f"{path}: time {columns.time!r} does not increase at {listed(back)} ({stamps[back[0] - 1]} then"
            f" {stamps[back[0]]}): drop doubled rows, sort the others, or split the log where the clock was set."
        )
    return (stamps - stamps[0]) * SECONDS[unit]


def _check_rate(path: Path, times: np.ndarray, columns: Columns, dt: float, max_gap: float) -> None:
    steps = np.diff(times)
    middle = np.median(steps)
    stated = f"with time_unit={columns.time_unit!r}"
    if middle > 1.5 * dt:
        raise ValueError(
            f"{path}: the log is slower than the control rate: {middle:.4g} s between its rows ({stated}), dt = {dt} s."
            " Is the unit of time right? If so choose a dt of at least that: rows in between would be invented."
        )
    gaps = np.flatnonzero(steps > max_gap)
    if gaps.size:
        raise ValueError(
            f"{path}: time {columns.time!r} has gaps longer than {max_gap:.4g} s after {listed(gaps)}; the first begins"
            f" at {times[gaps[0]]:.4g} s and takes {steps[gaps[0]]:.4g} s. Split the log there, or raise max_gap."
        )
    if times[-1] < dt * (1 - 1e-6):
        raise ValueError(
            f"{path}: {len(times)} rows span {times[-1]:.4g} s ({stated}), less than one control step of {dt} s."
            " Is the unit of time right?"
        )


def _references(path: Path, table: pa.Table, columns: Columns, times: np.ndarray) -> np.ndarray | None:
    """Reference states at the rows."""
    if columns.reference_positions is None:
        return None
    scale = RADIANS[columns.angle_unit]
    q = scale * _values(path, table, columns.reference_positions)
    if columns.reference_velocities is None:
        return np.hstack([q, _derivative(times, q)])
    return np.hstack([q, scale * _values(path, table, columns.reference_velocities)])


def _derivative(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Central differences, of second order at the ends too."""
    return np.gradient(values, times, axis=0, edge_order=2 if len(times) > 2 else 1)


def _on_grid(times: np.ndarray, grid: np.ndarray) -> bool:
    return len(times) >= len(grid) and bool(np.all(np.abs(times[: len(grid)] - grid) <= 1e-6 * grid[1]))


def _states(times: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    if _on_grid(times, grid):
        return values[: len(grid)]
    return np.stack([np.interp(grid, times, column) for column in values.T], axis=1)


def _controls(times: np.ndarray, u: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Mean of each control interval. The integral of a held signal is linear between its rows."""
    if _on_grid(times, grid):
        return u[: len(grid) - 1]
    impulse = np.concatenate([np.zeros((1, u.shape[1])), np.cumsum(np.diff(times)[:, None] * u[:-1], axis=0)])
    return np.diff(np.stack([np.interp(grid, times, column) for column in impulse.T], axis=1), axis=0) / grid[1]
