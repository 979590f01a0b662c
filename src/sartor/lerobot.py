"""Logs as a LeRobotDataset v3.0 without video: a folder of Parquet and JSON files that `lerobot` opens.

One row is one transition, so that T + 1 states and T controls need no invented row:

    observation.state, observation.reference              x_k and its reference at a control instant
    action                                                u_k, held from there to the next instant
    next.observation.state, next.observation.reference    x_{k+1} and its reference
    acceleration                                          qdd_k at the beginning of the interval
    next.done                                             whether x_{k+1} is the last state of the run
    environment_index                                     the plant
    timestamp, frame_index, episode_index, index, task_index    as in every LeRobotDataset

References and accelerations are there if the logs have them. Numbers are float64, as a dynamics model needs them;
LeRobot declares the type of each feature, and its loader hands out float32 tensors all the same. To open one there:

    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    dataset = LeRobotDataset("me/logs", root="path/to/folder")  # tried with lerobot 0.4.4

References: the LeRobotDataset v3.0 documentation of Hugging Face.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sartor.data import Log, check_arrays, check_finite, listed
from sartor.files import complete, replacing_folder
from sartor.lerobot_meta import (
    DATA,
    FILE_MB,
    FILES_IN_CHUNK,
    INFO,
    NEEDED,
    STATS,
    TASKS,
    describe,
    rate,
    read_episodes,
    read_info,
    read_table,
    statistics,
    time_step,
    write_episodes,
    write_task,
)

REFERENCES = ("observation.reference", "next.observation.reference")


def write_lerobot(
    folder: str | os.PathLike, logs: Sequence[Log], *, robot: str, joints: Sequence[str], task: str
) -> None:
    """Write logs as a LeRobotDataset v3.0, whole or not at all.

    What fails, such as a write on a full disk, leaves the data that was there. If a kill hits the moment between the
    two renames at the end, the next `read_lerobot` completes them.

    Args:
        folder: Where to. A dataset that is there is replaced; any other folder with files in it is refused.
        logs: One or more runs on one robot at one control rate; references in all or in none, accelerations likewise.
        robot: Type of the robot, for people.
        joints: Name of each joint.
        task: What the robot does, in words: LeRobot's policies read it.
    """
    folder = Path(folder).resolve()
    _check_logs(folder, logs, joints)
    begins = np.cumsum([0, *(len(log.us) for log in logs)])
    rows = [_rows(log, episode, begins[episode]) for episode, log in enumerate(logs)]
    with replacing_folder(folder, INFO) as new:
        places = _write_data(new, rows)
        write_episodes(new, rows, places, task)
        write_task(new / TASKS, task)
        stats = {name: statistics(np.concatenate([part[name] for part in rows])) for name in rows[0]}
        (new / STATS).write_text(json.dumps(stats, indent=4))
        info = describe(rows, float(logs[0].dt), robot, joints)
        (new / INFO).write_text(json.dumps(info, indent=4, ensure_ascii=False), encoding="utf-8")


def read_lerobot(folder: str | os.PathLike) -> list[Log]:
    """The logs of a dataset that `write_lerobot` has written, equal to what was written.

    Args:
        folder: The dataset. LeRobot's own tools may have merged or thinned it out meanwhile.

    Fails: `ValueError` naming the file and the column, for a dataset that is torn or that holds something else.
    """
    folder = Path(folder).resolve()
    complete(folder)
    info = read_info(folder / INFO)
    logs, last, columns = [], None, {}
    for episode in read_episodes(folder, info):
        place = {"chunk_index": episode["data/chunk_index"], "file_index": episode["data/file_index"]}
        path = folder / info["data_path"].format(**place)
        if path != last:  # one file at a time: they are large
            last, columns = path, _read_data(path, info["features"])
        logs.append(_log(path, columns, episode, time_step(info)))
    return logs


def _check_logs(folder: Path, logs: Sequence[Log], joints: Sequence[str]) -> None:
    if not logs:
        raise ValueError(f"{folder}: logs is empty: there is nothing to write.")
    first = logs[0]
    for i, log in enumerate(logs):
        check_arrays(log, f"{folder}: logs[{i}]")
        if log.us.shape[1] != len(joints):
            raise ValueError(f"{folder}: logs[{i}] has {log.us.shape[1]} joints, but joints has {len(joints)} names.")
        if log.dt != first.dt:
            raise ValueError(f"{folder}: logs[{i}] has dt = {log.dt} s, logs[0] {first.dt} s: write two datasets.")
        for name in ("refs", "qdds"):
            if (getattr(log, name) is None) != (getattr(first, name) is None):
                raise ValueError(f"{folder}: {name} must be in all logs or in none, but logs[0] and logs[{i}] differ.")


def _rows(log: Log, episode: int, begin: int) -> dict[str, np.ndarray]:
    """Columns of one run, (T,) or (T, width)."""
    num = len(log.us)
    k = np.arange(num)
    xs = np.asarray(log.xs, np.float64)
    rows = {"observation.state": xs[:-1], "action": np.asarray(log.us, np.float64), "next.observation.state": xs[1:]}
    if log.refs is not None:
        refs = np.asarray(log.refs, np.float64)
        rows |= dict(zip(REFERENCES, (refs[:-1], refs[1:]), strict=True))
    if log.qdds is not None:
        rows["acceleration"] = np.asarray(log.qdds, np.float64)
    return rows | {
        "next.done": k == num - 1,
        "environment_index": np.full(num, log.environment, np.int64),
        "timestamp": (k / rate(log.dt)).astype(np.float32),
        "frame_index": k,
        "episode_index": np.full(num, episode, np.int64),
        "index": begin + k,
        "task_index": np.zeros(num, np.int64),
    }


def _write_data(new: Path, rows: list[dict[str, np.ndarray]]) -> list[dict[str, int]]:
    """Write the rows to files of a bounded size, one row group for each run; returns in which file each run is."""
    tables = [pa.table({name: _arrow(values) for name, values in part.items()}) for part in rows]
    file, size, files = 0, 0, []
    for table in tables:
        if size and size + table.nbytes > FILE_MB * 2**20:
            file, size = file + 1, 0
        size += table.nbytes
        files.append(file)
    places = [{"chunk_index": n // FILES_IN_CHUNK, "file_index": n % FILES_IN_CHUNK} for n in files]
    for number in range(file + 1):
        inside = [i for i, n in enumerate(files) if n == number]
        path = new / DATA.format(**places[inside[0]])
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, tables[0].schema, use_dictionary=False) as writer:
            for i in inside:
                writer.write_table(tables[i])
    return places


def _arrow(values: np.ndarray) -> pa.Array:
    """As LeRobot types it: a vector is a list of fixed size, but one of length 1 is a number."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return flat if values[0].size == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _read_data(path: Path, features: dict[str, Any]) -> dict[str, np.ndarray]:
    """Columns of one file, (rows, width)."""
    names = [*NEEDED, *(name for name in (*REFERENCES, "acceleration") if name in features)]
    table, columns = read_table(path, names), {}
    for name in names:
        column, (width,) = table[name].combine_chunks(), features[name]["shape"]
        kind = column.type
        values = column.flatten() if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else column
        number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
        if not number or len(values) != width * len(column):
            raise ValueError(
                f"{path}: column {name!r} holds {kind}, not {width} numbers in each row as meta/info.json says."
            )
        columns[name] = values.to_numpy(zero_copy_only=False).reshape(-1, width)
        check_finite(columns[name], [f"column {name!r}, entry {i}," for i in range(width)], str(path))
    return columns


def _log(path: Path, columns: dict[str, np.ndarray], episode: dict[str, Any], dt: float) -> Log:
    """The run of an episode, if it is there whole."""
    number, length = episode["episode_index"], episode["length"]
    inside = columns["episode_index"][:, 0] == number
    part = {name: values[inside] for name, values in columns.items()}
    if length < 1 or not np.array_equal(part["frame_index"][:, 0], np.arange(length)):
        raise ValueError(
            f"{path}: column 'frame_index' does not count from 0 to {length - 1} in episode {number}, of which"
            f" {inside.sum()} rows are there: the dataset is torn."
        )
    doubles = lambda name: part[name].astype(np.float64)
    whole = lambda now, after: np.concatenate([doubles(now), doubles(after)[-1:]])
    for now, after in (("observation.state", "next.observation.state"), REFERENCES):
        if now in part and not np.array_equal(part[after][:-1], part[now][1:]):
            breaks = np.flatnonzero((part[after][:-1] != part[now][1:]).any(axis=1))
            raise ValueError(
                f"{path}: column {after!r} is not what {now!r} holds a row later, at {listed(breaks)} of episode"
                f" {number}: frames were dropped or changed."
            )
    environments = np.unique(part["environment_index"])
    if len(environments) > 1:
        raise ValueError(f"{path}: column 'environment_index' changes within episode {number}: {environments}.")
    refs = whole(*REFERENCES) if REFERENCES[0] in part else None
    qdds = doubles("acceleration") if "acceleration" in part else None
    xs = whole("observation.state", "next.observation.state")
    return Log(xs, doubles("action"), refs, dt, int(environments[0]), qdds)
