"""Logs of one's own: round trips, resampling against known signals, and errors that name file, column and rows."""

import errno

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.data import Log
from sartor.logs import Columns, read_log, write_log
from test_data import run

COLUMNS = Columns("t", ["q0", "q1"], ["v0", "v1"], ["u0", "u1"])
REFERENCES = Columns("t", ["q0", "q1"], ["v0", "v1"], ["u0", "u1"], ["rq0", "rq1"], ["rv0", "rv1"])


def table(t, q=None, v=None, u=None):
    """Two joints that swing; whatever is given instead."""
    t = np.asarray(t, float)
    swing = lambda w: np.sin(w * t)
    q = [swing(2.0), swing(3.0)] if q is None else q
    v = [2 * np.cos(2 * t), 3 * np.cos(3 * t)] if v is None else v
    u = [np.zeros_like(t), np.ones_like(t)] if u is None else u
    return {"t": t, "q0": q[0], "q1": q[1], "v0": v[0], "v1": v[1], "u0": u[0], "u1": u[1]}


def save(path, columns):
    (pq.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv)(pa.table(columns), path)
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@settings(deadline=None, max_examples=15)
@given(num=st.integers(1, 60), dt=st.sampled_from([0.02, 0.001, 1 / 30, 0.0123456789]), seed=st.integers(0, 1000))
def test_round_trip(tmp_path_factory, ending, num, dt, seed):
    path = tmp_path_factory.mktemp("logs") / f"log.{ending}"
    log = run(2, num, dt, seed)
    write_log(path, log, REFERENCES)
    back = read_log(path, REFERENCES, dt)
    for name in ("xs", "us", "refs", "dt"):
        assert np.array_equal(getattr(back, name), getattr(log, name)), name
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert read_log(path, COLUMNS, dt).refs is None


@pytest.mark.parametrize("time", ["s", "ms", "ns"])
@pytest.mark.parametrize("angle", ["rad", "deg"])
def test_units_come_back(tmp_path, time, angle):
    columns = Columns("t", ["q0", "q1"], ["v0", "v1"], ["u0", "u1"], time_unit=time, angle_unit=angle)
    log = run(2, 100)
    write_log(tmp_path / "log.csv", log, columns)
    stored = pyarrow.csv.read_csv(tmp_path / "log.csv")
    assert np.isclose(stored["t"][1].as_py(), {"s": 0.02, "ms": 20, "ns": 2e7}[time])
    assert np.isclose(stored["v1"][7].as_py(), log.xs[7, 3] * {"rad": 1, "deg": 180 / np.pi}[angle])
    back = read_log(tmp_path / "log.csv", columns, 0.02)
    np.testing.assert_allclose(back.xs, log.xs, rtol=1e-14, atol=1e-15)
    assert np.array_equal(back.us, log.us)


@settings(deadline=None, max_examples=25)
@given(
    rate=st.sampled_from([50, 60, 200, 333, 1000]), dt=st.sampled_from([0.02, 0.025, 0.04]), seed=st.integers(0, 1000)
)
def test_resampling_of_known_signals(tmp_path_factory, rate, dt, seed):
    """At uneven times: linear velocities exactly, quadratic positions to h²/8, held torques by their impulse."""
    draw, path = np.random.default_rng(seed), tmp_path_factory.mktemp("logs") / "log.parquet"
    t = (np.arange(3 * rate) + np.concatenate([[0], draw.uniform(-0.2, 0.2, 3 * rate - 1)])) / rate
    a, b = draw.uniform(0.5, 2, 2), draw.uniform(-1, 1, 2)
    u = draw.normal(size=(2, len(t)))
    position = lambda t: a[:, None] * t**2 / 2 + b[:, None] * t
    velocity = lambda t: a[:, None] * t + b[:, None]
    save(path, table(t, position(t), velocity(t), u))
    log = read_log(path, COLUMNS, dt)
    grid = dt * np.arange(len(log.xs))
    assert t[-1] - dt < grid[-1] <= t[-1] + 1e-6
    np.testing.assert_allclose(log.xs[:, 2:].T, velocity(grid), atol=1e-12)
    assert np.abs(log.xs[:, :2].T - position(grid)).max() <= a.max() * (1.4 / rate) ** 2 / 8 + 1e-12
    for k in draw.integers(0, len(log.us), 5):
        fine = np.arange(k * dt, (k + 1) * dt, dt / 20000) + dt / 40000
        held = u[:, np.searchsorted(t, fine, side="right") - 1]
        np.testing.assert_allclose(log.us[k], held.mean(axis=1), atol=5e-3)


def test_a_control_that_is_held_comes_back_itself(tmp_path):
    """A 1 kHz log of a 50 Hz controller, and clock jitter on a log at the control rate."""
    held = np.random.default_rng(0).normal(size=(2, 50))
    fast = table(np.arange(1001) / 1000, u=np.hstack([held.repeat(20, 1), held[:, -1:]]))
    np.testing.assert_allclose(read_log(save(tmp_path / "a.csv", fast), COLUMNS, 0.02).us, held.T, atol=1e-12)
    stamps = np.arange(51) / 50 + np.concatenate([[0], np.random.default_rng(1).uniform(-1e-4, 1e-4, 50)])
    rough = table(stamps, u=np.hstack([held, held[:, -1:]]))
    us = read_log(save(tmp_path / "b.csv", rough), COLUMNS, 0.02).us
    np.testing.assert_allclose(us, held.T[: len(us)], atol=0.05)


def test_velocities_that_are_not_logged_are_central_differences(tmp_path):
    t = np.cumsum(np.random.default_rng(0).uniform(0.005, 0.015, 300))
    q = [t**2, 1 - 3 * t]
    path = save(tmp_path / "log.parquet", table(t, q))
    bare = Columns("t", ["q0", "q1"], None, ["u0", "u1"], reference_positions=["v0", "v1"])
    log = read_log(path, bare, 0.02)
    at = t[0] + 0.02 * np.arange(len(log.xs))
    np.testing.assert_allclose(log.xs[:, 2], 2 * at, atol=1e-10)
    np.testing.assert_allclose(log.xs[:, 3], -3, atol=1e-10)
    assert log.refs is not None and log.refs.shape == log.xs.shape


def test_time_since_1970_in_nanoseconds_is_exact(tmp_path):
    ns = 1_700_000_000_123_456_789 + 20_000_000 * np.arange(60)
    columns = table((ns - ns[0]) * 1e-9) | {"t": ns}
    exact = Columns("t", ["q0", "q1"], ["v0", "v1"], ["u0", "u1"], time_unit="ns")
    log = read_log(save(tmp_path / "ns.parquet", columns), exact, 0.02)
    assert np.array_equal(log.xs[:, 0], columns["q0"]) and len(log.us) == 59
    stamped = columns | {"t": pa.array(ns).cast(pa.timestamp("ns")), "note": ["text"] * 60}
    again = read_log(save(tmp_path / "stamps.parquet", stamped), COLUMNS, 0.02)
    assert np.array_equal(again.xs, log.xs)


T = np.arange(200) / 50
WRONG = {
    "missing": (
        {("q1" if n == "Q1 " else n) if n != "q1" else "Q1 ": v for n, v in table(T).items()},
        r"no column 'q1' \(near: 'Q1 '.*There are: 't', 'q0', 'Q1 '",
    ),
    "gap": (table(np.concatenate([T[:50], T[60:]])), r"'t' has gaps longer than 0.06 s after row 49; .* takes 0.22 s"),
    "backwards": (table(T) | {"t": np.r_[T[:9], T[7], T[10:]]}, r"time 't' does not increase at row 9 \(0.16 then"),
    "doubled": (table(T) | {"t": np.r_[T[:9], T[8], T[10:]]}, r"does not increase at row 9"),
    "nan": (table(T) | {"u1": np.where(np.arange(200) % 90 == 3, np.nan, 1.0)}, "'u1' is missing .* rows 3, 93, 183"),
    "nan time": (table(T) | {"t": np.r_[np.nan, T[1:]]}, "column 't' is missing or not finite in row 0"),
    "null": (table(T) | {"v0": [None, *range(199)]}, "column 'v0' is missing or not finite in row 0"),
    "text": (table(T) | {"q0": [*map(str, T[:-1]), "off"]}, "'q0' holds (large_)?string, such as 'off' in row 199"),
    "short": (table(T[:1]), "only 1 rows"),
    "too short": (table(np.array([0, 0.01])), "span 0.01 s .*, less than one control step"),
    "slow": (table(np.arange(50) / 10), r"slower than the control rate: 0.1 s between .*time_unit='s'"),
    "ms": (table(T) | {"t": 1000 * T}, "velocity v0 .* position q0, over 200 rows: .*milliseconds taken for seconds"),
    "deg/s": (table(T) | {"v1": 57.3 * table(T)["v1"]}, "velocity v1 is 57.* position q1.* look like deg/s"),
    "mixed": (table(T) | {"v1": table(T)["v0"], "v0": table(T)["v1"]}, "velocity v0 .* fits the position q1"),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_file_the_column_and_the_rows(tmp_path, case, ending):
    columns, named = WRONG[case]
    path = save(tmp_path / f"my_log.{ending}", columns)
    with pytest.raises(ValueError, match=rf"my_log.{ending}: (.|\n)*{named}"):
        read_log(path, COLUMNS, 0.02)


def test_a_gap_may_be_bridged(tmp_path):
    path = save(tmp_path / "log.csv", WRONG["gap"][0])
    assert len(read_log(path, COLUMNS, 0.02, max_gap=0.25).us) == 199


def test_seconds_taken_for_milliseconds(tmp_path):
    columns = Columns("t", ["q0", "q1"], ["v0", "v1"], ["u0", "u1"], time_unit="ms")
    with pytest.raises(ValueError, match="seconds taken for milliseconds"):
        read_log(save(tmp_path / "log.csv", table(T)), columns, 0.02)


def test_files_that_are_no_logs(tmp_path):
    whole = save(tmp_path / "whole.parquet", table(T)).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "ragged.csv").write_text("t,q0\n1,2\n3")
    (tmp_path / "twice.csv").write_text("t,q0,q0,q1,v0,v1,u0,u1\n" + "1,1,1,1,1,1,1,1\n" * 3)
    for name, reason in (("torn.parquet", "torn"), ("empty.csv", "empty"), ("ragged.csv", "torn"), ("twice.csv", "q0")):
        with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
            read_log(tmp_path / name, COLUMNS, 0.02)
    with pytest.raises(ValueError, match=r"a log is a .parquet or a .csv file, not .txt"):
        read_log(tmp_path / "log.txt", COLUMNS, 0.02)
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_log(tmp_path / "nowhere.csv", COLUMNS, 0.02)
    with pytest.raises(ValueError, match="dt must be positive"):
        read_log(tmp_path / "whole.parquet", COLUMNS, 0.0)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("t", "q0", ["v"], ["u"]), "positions must be a sequence"),
        (("t", ["q0"], ["v0", "v1"], ["u0"]), "velocities must name one column for each joint, 1"),
        (("t", [], [], []), "positions must name"),
        (("t", ["q0"], ["q0"], ["u0"]), "q0 more than once"),
        (("t", ["q0"], ["v0"], ["u0"], None, ["rv0"]), "need reference_positions"),
        (("t", ["q0"], ["v0"], ["u0"], None, None, "us"), "time_unit must be one of s, ms, ns, not 'us'"),
        (("t", ["q0"], ["v0"], ["u0"], None, None, "s", "grad"), "angle_unit must be"),
    ],
)
def test_columns_that_make_no_sense(arguments, named):
    with pytest.raises(ValueError, match=named):
        Columns(*arguments)


@pytest.mark.parametrize("ending, fails", [("csv", (pyarrow.csv, "write_csv")), ("parquet", (pq, "write_table"))])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, ending, fails):
    path, log = tmp_path / f"log.{ending}", run(2, 50)
    write_log(path, log, COLUMNS)

    def full(table, where):
        where.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_log(path, run(2, 50, seed=1), COLUMNS)
    assert np.array_equal(read_log(path, COLUMNS, 0.02).xs, log.xs)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_write_says_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="the log has 3 joints, columns names 2"):
        write_log(tmp_path / "log.csv", run(3, 50), COLUMNS)
    with pytest.raises(ValueError, match="the log has none"):
        write_log(tmp_path / "log.csv", run(2, 50)._replace(refs=None), REFERENCES)
    with pytest.raises(ValueError, match="xs must have shape"):
        write_log(tmp_path / "log.csv", Log(np.zeros((3, 4)), np.zeros((3, 2)), None, 0.1), COLUMNS)
