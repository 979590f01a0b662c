"""Datasets: equal round trips, the format that LeRobot reads, writes whole or not at all, errors that name the file."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor import lerobot
from sartor.data import Log
from sartor.lerobot import read_lerobot, write_lerobot
from test_data import run

DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"


def write(folder, logs):
    joints = [f"joint{i + 1}" for i in range(logs[0].us.shape[1])]
    write_lerobot(folder, logs, robot="arm", joints=joints, task="Track the reference.")


def same(logs, others):
    """Equal in every bit."""
    return len(logs) == len(others) and all(
        (x is None and y is None) or (type(x) is type(y) and np.array_equal(x, y) and np.shape(x) == np.shape(y))
        for log, other in zip(logs, others, strict=True)
        for x, y in zip(log, other, strict=True)
    )


@settings(deadline=None, max_examples=25)
@given(
    nq=st.integers(1, 7), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), dt=st.floats(1e-4, 10.0),
    refs=st.booleans(), qdds=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_what_is_read_equals_what_was_written(tmp_path_factory, nq, lengths, dt, refs, qdds, seed):
    logs = [run(nq, num, dt, seed + i, environment=(seed + 7 * i) % 5) for i, num in enumerate(lengths)]
    logs = [log._replace(refs=log.refs if refs else None, qdds=log.qdds if qdds else None) for log in logs]
    folder = tmp_path_factory.mktemp("data") / "set"
    write(folder, logs)
    assert same(read_lerobot(folder), logs)


def test_extreme_numbers_come_back(tmp_path):
    log = Log(np.linspace(-1e100, 1e-300, 10).reshape(5, 2), np.array([[1e100], [5e-324], [-0.0], [1]]), None, 1 / 3)
    write(tmp_path / "set", [log])
    back = read_lerobot(tmp_path / "set")[0]
    assert same([back], [log]) and np.signbit(back.us[2, 0])


def test_the_metadata_is_that_of_lerobot_v3(tmp_path):
    logs = [run(2, 30, environment=3), run(2, 20, seed=1)]
    write(tmp_path / "set", logs)
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    features = info.pop("features")
    wanted = {
        "codebase_version": "v3.0", "robot_type": "arm", "total_episodes": 2, "total_frames": 50, "total_tasks": 1,
        "chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": 50,
        "splits": {"train": "0:2"}, "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }  # fmt: skip
    assert info == wanted and isinstance(info["fps"], int)
    state = ["joint1.pos", "joint2.pos", "joint1.vel", "joint2.vel"]
    assert features["observation.state"] == {"dtype": "float64", "shape": [4], "names": state}
    assert features["action"] == {"dtype": "float64", "shape": [2], "names": ["joint1.effort", "joint2.effort"]}
    integers = {"frame_index", "episode_index", "index", "task_index", "environment_index"}
    for name in integers:
        assert features[name] == {"dtype": "int64", "shape": [1], "names": None}
    assert features["next.done"]["dtype"] == "bool" and features["timestamp"]["dtype"] == "float32"
    assert not any("/" in name for name in features)
    task = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert task.to_pydict() == {"task_index": [0], "task": ["Track the reference."]}
    assert json.loads(task.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_the_rows_are_those_of_lerobot_v3(tmp_path):
    logs = [run(2, 30, environment=3), run(2, 20, seed=1)]
    write(tmp_path / "set", logs)
    table = pq.read_table(tmp_path / "set" / DATA)
    assert pq.ParquetFile(tmp_path / "set" / DATA).num_row_groups == 2
    features = json.loads((tmp_path / "set/meta/info.json").read_text())["features"]
    assert table.column_names == list(features)
    kinds = {"bool": pa.bool_(), "int64": pa.int64(), "float32": pa.float32(), "float64": pa.float64()}
    for name, feature in features.items():
        kind, (width,) = kinds[feature["dtype"]], feature["shape"]
        assert table.schema.field(name).type == (kind if width == 1 else pa.list_(kind, width))
    columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    assert np.array_equal(columns["index"], np.arange(50))
    assert np.array_equal(columns["frame_index"], np.r_[:30, :20])
    assert np.array_equal(columns["episode_index"], np.repeat([0, 1], [30, 20]))
    assert np.array_equal(columns["environment_index"], np.repeat([3, 0], [30, 20]))
    assert np.array_equal(np.flatnonzero(columns["next.done"]), [29, 49])
    np.testing.assert_allclose(columns["timestamp"], 0.02 * columns["frame_index"], rtol=1e-7)
    assert np.array_equal(columns["observation.state"][30:], logs[1].xs[:-1])
    assert np.array_equal(columns["next.observation.reference"][:30], logs[0].refs[1:])
    write(tmp_path / "set", [run(1, 5)])
    assert pq.read_schema(tmp_path / "set" / DATA).field("action").type == pa.float64()


def test_statistics(tmp_path):
    logs = [run(2, 30), run(2, 20, seed=1)]
    write(tmp_path / "set", logs)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    us = np.vstack([log.us for log in logs])
    wanted = {"min": us.min(0), "max": us.max(0), "mean": us.mean(0), "std": us.std(0), "count": [50]}
    wanted |= {f"q{q:02d}": np.percentile(us, q, axis=0) for q in (1, 10, 50, 90, 99)}
    assert list(stats["action"]) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(stats["action"][name], value, rtol=1e-12)
    assert stats["next.done"]["max"] == [True] and stats["index"]["min"] == [0]
    episodes = pq.read_table(tmp_path / "set" / EPISODES).to_pylist()
    assert [row["length"] for row in episodes] == [30, 20]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in episodes] == [(0, 30), (30, 50)]
    assert all(row["tasks"] == ["Track the reference."] for row in episodes)
    np.testing.assert_allclose(episodes[1]["stats/action/mean"], logs[1].us.mean(0))
    for kind in ("data", "meta/episodes"):
        assert all(row[f"{kind}/{part}_index"] == 0 for row in episodes for part in ("chunk", "file"))


def test_files_are_of_a_bounded_size(tmp_path, monkeypatch):
    logs = [run(2, 30, seed=i) for i in range(7)]
    monkeypatch.setattr(lerobot, "FILE_MB", 2.5 * 30 * (2 * 8 * 2 * 4 + 3 * 8) / 2**20)
    monkeypatch.setattr(lerobot, "FILES_IN_CHUNK", 2)
    write(tmp_path / "set", logs)
    files = sorted(str(file.relative_to(tmp_path / "set")) for file in (tmp_path / "set/data").rglob("*.parquet"))
    assert len(files) > 2 and files[:3] == [f"data/chunk-00{c}/file-00{f}.parquet" for c, f in ((0, 0), (0, 1), (1, 0))]
    assert same(read_lerobot(tmp_path / "set"), logs)


only = lambda folder: [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "target, name, after", [(pq.ParquetWriter, "write_table", 2), (pq, "write_table", 1), (Path, "write_text", 1),
                            (os, "fsync", 3)]
)  # fmt: skip
def test_a_disk_that_fills_leaves_the_old_data(tmp_path, monkeypatch, there, target, name, after):
    old, new = [run(2, 30)], [run(2, 30, seed=i) for i in range(1, 5)]
    if there:
        write(tmp_path / "set", old)
    real, calls = getattr(target, name), []

    def full(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "set", new)
    monkeypatch.undo()
    assert only(tmp_path) == (["set"] if there else [])
    if there:
        assert same(read_lerobot(tmp_path / "set"), old)
    write(tmp_path / "set", new)
    assert same(read_lerobot(tmp_path / "set"), new) and only(tmp_path) == ["set"]


def test_a_kill_at_any_moment_leaves_one_whole_dataset(tmp_path):
    """What a kill leaves behind: half a new folder; the old one aside; both whole and the old one not yet removed."""
    old, new = [run(2, 30)], [run(2, 30, seed=1)]
    for left in ("half", "aside", "aside alone", "not removed"):
        folder = tmp_path / left / "set"
        write(folder, old)
        write(folder.with_name("whole"), new)
        if left == "half":
            shutil.copytree(folder / "data", folder.with_name(".set.new") / "data")
        elif left == "not removed":
            folder.rename(folder.with_name(".set.old"))
            folder.with_name("whole").rename(folder)
        else:
            folder.rename(folder.with_name(".set.old"))
            if left == "aside":
                folder.with_name("whole").rename(folder.with_name(".set.new"))
        assert same(read_lerobot(folder), new if left in ("aside", "not removed") else old)
        write(folder, new)
        assert same(read_lerobot(folder), new)
        assert [name for name in only(folder.parent) if name != "whole"] == ["set"]


def test_a_write_that_fails_after_a_kill_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path / "set", [run()])
    (tmp_path / "set").rename(tmp_path / ".set.old")
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "set", [run(seed=1)])
    assert same(read_lerobot(tmp_path / "set"), [run()])


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{name} is there and has no meta/info.json"):
            write(tmp_path / name, [run()])
    assert (tmp_path / "thesis/chapter.tex").read_text() == "x" and sorted(only(tmp_path)) == ["file", "thesis"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", [run()])
    assert len(read_lerobot(tmp_path / "empty")) == 1


def change(name, edit, file=DATA):
    """Edit a column of a file of the dataset."""

    def apply(folder):
        table = pq.read_table(folder / file)
        place = table.column_names.index(name)
        changed = edit(table)
        table = table.remove_column(place) if changed is None else table.set_column(place, name, changed)
        pq.write_table(table, folder / file)

    return apply


def cut(file):
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def with_info(edit):
    def apply(folder):
        info = json.loads((folder / "meta/info.json").read_text())
        edit(info)
        (folder / "meta/info.json").write_text(json.dumps(info))

    return apply


def adding(name, row, entry, amount):
    def edit(table):
        values = np.array(table[name].to_pylist())
        values[row, entry] += amount
        return pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])

    return change(name, edit)


BROKEN = {
    "cut info": (cut("meta/info.json"), "info.json: torn"),
    "no info": (lambda folder: (folder / "meta/info.json").unlink(), "info.json is not there"),
    "cut data": (cut(DATA), "data/chunk-000/file-000.parquet: torn"),
    "no data": (lambda folder: (folder / DATA).unlink(), "data/chunk-000/file-000.parquet is not there"),
    "cut episodes": (cut(EPISODES), "episodes/chunk-000/file-000.parquet: torn"),
    "no episodes": (lambda folder: (folder / EPISODES).unlink(), "meta/episodes has no Parquet file"),
    "no column": (change("action", lambda table: None), "data/.*: column 'action' is missing"),
    "no length": (change("length", lambda table: None, EPISODES), "episodes/.*: column 'length' is missing"),
    "nan": (adding("action", 4, 1, np.nan), "data/.*: column 'action', entry 1, is missing or not finite in row 4"),
    "null": (change("frame_index", lambda table: pa.array([None, *range(49)])), "data/.*: column 'frame_index'"),
    "text": (change("action", lambda table: pa.array(["x"] * 50)), "data/.*: column 'action' holds string"),
    "width": (change("action", lambda table: table["index"]), "data/.*: column 'action' holds int64, not 2 numbers"),
    "a row less": (
        change("frame_index", lambda table: pa.array([*range(29), *range(21)])),
        "data/.*: column 'frame_index' does not count .* episode 0, of which 30 rows",
    ),
    "other state": (
        adding("observation.state", 7, 0, 1e-9),
        "'next.observation.state' is not .* at row 6 of episode 0",
    ),
    "two plants": (change("environment_index", lambda table: table["index"]), "'environment_index' changes within"),
    "frames": (with_info(lambda info: info.update(total_frames=51)), "'length' adds up to 50 rows, but .* is 51"),
    "old": (with_info(lambda info: info.update(codebase_version="v2.1")), "codebase_version is v2.1, not v3"),
    "bare": (with_info(lambda info: info.pop("features")), "info.json: features is missing"),
    "images": (with_info(lambda info: info["features"].pop("action")), "feature 'action' is missing: this is not"),
    "positions": (
        with_info(lambda info: info["features"]["observation.state"].update(shape=[2])),
        r"'observation.state' has shape \[2\], but with 2 entries of 'action' it must be \[4\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_torn_and_foreign_datasets_are_named(tmp_path, case):
    write(tmp_path / "set", [run(2, 30), run(2, 20, seed=1)])
    breaks, named = BROKEN[case]
    breaks(tmp_path / "set")
    with pytest.raises(ValueError, match=f"{tmp_path}/set/.*{named}"):
        read_lerobot(tmp_path / "set")


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    log = run(2, 20)
    for logs, named in (
        ([], "logs is empty"),
        ([log, run(3, 20)], r"logs\[1\] has 3 joints, but joints has 2"),
        ([log, log._replace(dt=0.01)], r"logs\[1\] has dt = 0.01 s, logs\[0\] 0.02 s"),
        ([log, log._replace(refs=None)], r"refs must be in all logs or in none, but logs\[0\] and logs\[1\]"),
        ([log, log._replace(us=np.full_like(log.us, np.inf))], r"logs\[1\]: us\[:, 0\] is missing or not finite"),
    ):
        with pytest.raises(ValueError, match=named):
            write_lerobot(tmp_path / "set", logs, robot="arm", joints=["a", "b"], task="t")
    assert not only(tmp_path)
