"""The metadata of a LeRobotDataset v3.0: meta/info.json, stats.json, tasks.parquet and episodes/.

References: the LeRobotDataset v3.0 documentation of Hugging Face.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA, EPISODES = f"data/{FILE}", f"meta/episodes/{FILE}"
FILES_IN_CHUNK = 1000
FILE_MB = 100
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
EPISODE_COLUMNS = ("episode_index", "length", "data/chunk_index", "data/file_index")
NEEDED = (
    "observation.state", "action", "next.observation.state", "environment_index", "episode_index", "frame_index",
)  # fmt: skip
FOREIGN = "this is not a dataset that write_lerobot has written"


def rate(dt: float) -> int | float:
    """Rows per second; LeRobot wants an integer where there is one."""
    return round(1 / dt) if abs(round(1 / dt) * dt - 1) < 1e-9 else 1 / dt


def describe(rows: list[dict[str, np.ndarray]], dt: float, robot: str, joints: Sequence[str]) -> dict[str, Any]:
    """meta/info.json: what the columns are, and where."""
    of_joints = lambda *kinds: [f"{joint}.{kind}" for kind in kinds for joint in joints]
    names = {"action": of_joints("effort"), "acceleration": of_joints("acc")}
    features: dict[str, Any] = {
        name: {
            "dtype": str(values.dtype),
            "shape": [values[0].size],
            "names": names.get(name, of_joints("pos", "vel")) if values.ndim == 2 else None,
        }
        for name, values in rows[0].items()
    }
    features["timestamp"]["info"] = {"dt": dt}  # 1/fps may differ from it in the last bit
    return {
        "codebase_version": "v3.0",
        "robot_type": robot,
        "total_episodes": len(rows),
        "total_frames": sum(len(part["index"]) for part in rows),
        "total_tasks": 1,
        "chunks_size": FILES_IN_CHUNK,
        "data_files_size_in_mb": FILE_MB,
        "video_files_size_in_mb": 200,
        "fps": rate(dt),
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": DATA,
        "video_path": None,
        "features": features,
    }


def statistics(values: np.ndarray) -> dict[str, list]:
    """What LeRobot's normalisation wants to know of a column; for its numbers too lists, of length 1."""
    values = values.reshape(len(values), -1)
    numbers = values.astype(np.float64)
    stats = {"min": values.min(0), "max": values.max(0), "mean": numbers.mean(0), "std": numbers.std(0)}
    stats["count"] = np.array([len(values)])
    stats |= {f"q{round(100 * q):02d}": np.quantile(numbers, q, axis=0) for q in QUANTILES}
    return {name: value.tolist() for name, value in stats.items()}


def write_episodes(new: Path, rows: list[dict[str, np.ndarray]], places: list[dict[str, int]], task: str) -> None:
    """One row for each run: where it is, and its statistics."""
    episodes = []
    for episode, (part, place) in enumerate(zip(rows, places, strict=True)):
        begin, num = int(part["index"][0]), len(part["index"])
        episodes.append(
            {"episode_index": episode, "tasks": [task], "length": num}
            | {f"data/{key}": value for key, value in place.items()}
            | {"dataset_from_index": begin, "dataset_to_index": begin + num}
            | {f"stats/{name}/{key}": value for name in part for key, value in statistics(part[name]).items()}
            | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        )
    path = new / EPISODES.format(chunk_index=0, file_index=0)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), path)


def write_task(path: Path, task: str) -> None:
    """The one task. LeRobot reads it with pandas, which looks up in the metadata that the rows are called by task."""
    common = {"metadata": None}
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"} | common,
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"} | common,
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    table = pa.table({"task_index": [0], "task": [task]}).replace_schema_metadata({"pandas": json.dumps(pandas)})
    pq.write_table(table, path)


def read_info(path: Path) -> dict[str, Any]:
    """meta/info.json, if it is that of logs."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: the folder is no LeRobotDataset, or a torn one.") from None
    except ValueError as error:
        raise ValueError(f"{path}: torn or not JSON: {error}.") from error
    missing = [key for key in ("codebase_version", "total_frames", "data_path", "fps", "features") if key not in info]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing: {FOREIGN}.")
    if not str(info["codebase_version"]).startswith("v3."):
        raise ValueError(f"{path}: codebase_version is {info['codebase_version']}, not v3: convert it with lerobot.")
    features = info["features"]
    for name in NEEDED:
        if name not in features:
            raise ValueError(f"{path}: feature {name!r} is missing: {FOREIGN}. There are: {', '.join(features)}.")
    nq = features["action"]["shape"][0]
    for name in ("observation.state", "next.observation.state"):
        shape = features[name]["shape"]
        if shape != [2 * nq]:
            raise ValueError(
                f"{path}: feature {name!r} has shape {shape}, but with {nq} entries of 'action' it must be"
                f" [{2 * nq}], positions and velocities: {FOREIGN}."
            )
    return info


def time_step(info: dict[str, Any]) -> float:
    """dt [s], as written where that is known."""
    dt = info["features"].get("timestamp", {}).get("info", {}).get("dt", 1 / info["fps"])
    return dt if abs(dt * info["fps"] - 1) < 1e-6 else 1 / info["fps"]


def read_episodes(folder: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    """Where each run is, in order."""
    files = sorted((folder / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{folder / 'meta/episodes'} has no Parquet file: the dataset is torn.")
    episodes = [row for file in files for row in read_table(file, EPISODE_COLUMNS).to_pylist()]
    num_rows = sum(row["length"] for row in episodes)
    if num_rows != info["total_frames"]:
        raise ValueError(
            f"{files[0]}: column 'length' adds up to {num_rows} rows, but total_frames in meta/info.json is"
            f" {info['total_frames']}: the dataset is torn."
        )
    return sorted(episodes, key=lambda row: row["episode_index"])


def read_table(path: Path, names: Sequence[str]) -> pa.Table:
    """The named columns of a Parquet file."""
    try:
        there = pq.read_schema(path).names
        missing = [name for name in names if name not in there]
        if not missing:
            return pq.read_table(path, columns=list(names))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: the dataset is torn.") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: torn, or not a Parquet file: {error}") from error
    raise ValueError(f"{path}: column {', '.join(map(repr, missing))} is missing: the dataset is torn.")
