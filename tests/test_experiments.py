"""The Panda experiment end to end on its smoke preset: every file that the report reads, and resuming."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from sartor import report
from sartor.experiments import panda
from sartor.experiments.panda_studies import VARIANTS
from sartor.lerobot import read_lerobot
from sartor.report_panda import REPORT


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("panda")
    phases = {}
    panda.run(
        panda.Config(preset="smoke", workers=0), out, lambda phase, done, total: phases.update({phase: done / total})
    )
    return out, phases


def test_every_phase_reaches_its_end(finished):
    _, phases = finished
    assert set(phases) == {"collect", "pretrain", "drive", "label", "fine-tune", "test"}
    assert all(share == 1.0 for share in phases.values())


def test_evaluations_hold_every_arm_and_environment(finished):
    out, _ = finished
    rows = pq.read_table(out / "evaluations.parquet").to_pylist()
    config = panda.Config(preset="smoke").resolved()
    methods = {row["method"] for row in rows}
    assert methods == {"nominal", "oracle", "oracle_damping", "pretrained", *config.weightings}
    assert len(rows) == len(methods) * config.tests
    assert all(row["J"] > 0 and row["failed"] == 0 for row in rows)


def test_labels_are_counted_and_explained(finished):
    out, _ = finished
    labels = json.loads((out / "labels.json").read_text())["0"]
    assert labels["ours"]["failed"] == 0 and labels["ours"]["samples"] > 0
    assert 0.0 < labels["ours"]["explained"] <= 1.0


def test_the_tailored_model_and_the_logs_are_handed_over(finished):
    out, _ = finished
    assert (out / "tailored.npz").read_bytes() == (out / "models" / "ours-p2-m0-s0-r1.npz").read_bytes()
    config = panda.Config(preset="smoke").resolved()
    for name, runs in (("excitation", config.pretrain_payloads), ("pretrained-0", config.finetune_payloads)):
        assert len(read_lerobot(out / "dataset" / name)) == runs


def test_report_is_one_page(finished):
    out, _ = finished
    page = report.page(REPORT, out)
    assert "stand" in page.read_text() and "http" not in page.read_text().split("<body>")[-1].replace("http-equiv", "")


def test_a_finished_run_does_nothing_again_and_a_torn_one_gives_the_same_numbers(finished):
    out, _ = finished
    costs = lambda: pq.read_table(out / "evaluations.parquet").select(["method", "environment", "J", "q_rmse"])
    before = costs()
    for lost in ("models/ours-p2-m0-s0-r1.npz", "tests/ours-p2-m0-s0-r1.json", "evaluations.parquet"):
        (out / lost).unlink()
    others = {path: path.stat().st_mtime_ns for path in (out / "models").glob("pretrained-*.npz")}
    panda.run(panda.Config(preset="smoke", workers=0), out)
    assert costs().equals(before)
    assert all(path.stat().st_mtime_ns == then for path, then in others.items())


def test_another_run_in_the_same_folder_is_refused(finished):
    out, _ = finished
    with pytest.raises(ValueError, match="other settings .*seeds"):
        panda.run(panda.Config(preset="smoke", seeds=2, workers=0), out)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rollouts": (13,)}, "rollouts must lie in 1..12"),
        ({"tests": 21}, "tests must be at most 20"),
        ({"weightings": ("ours",)}, "must contain 'stand'"),
        ({"seeds": -1}, "seeds must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate must lie between 0 and 1"),
        ({"share": 2.0}, "share must lie between 0 and 1"),
        ({"widths": (0, 8)}, "widths must be at least 1"),
        ({"share": 0.5}, "share mixes weights of single entries; those of .*regret"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        panda.Config(**fields).resolved()


@pytest.mark.slow  # minutes of compiling, several times
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_numbers(finished, tmp_path):
    start = [sys.executable, "-c", "from sartor.cli import main; main()", "run", "panda"]
    for wanted in ("parts/excite-0.npz", "models/pretrained-0.npz", "labels/*.npz", "tests/stand*.json"):
        how = (
            ["--resume", str(tmp_path)]
            if (tmp_path / "config.json").exists()
            else ["--preset", "smoke", "--workers", "2", "--out", str(tmp_path)]
        )
        with subprocess.Popen([*start, *how], stdout=subprocess.DEVNULL, start_new_session=True) as run:
            while run.poll() is None and not list(tmp_path.glob(wanted)):
                time.sleep(0.1)
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    subprocess.run([*start, "--resume", str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    costs = lambda out: pq.read_table(out / "evaluations.parquet").to_pydict()
    killed, whole = costs(tmp_path), costs(finished[0])
    assert killed["method"] == whole["method"] and killed["environment"] == whole["environment"]
    np.testing.assert_allclose(killed["J"], whole["J"], rtol=1e-6)


@pytest.mark.slow  # some minutes of compiling
def test_rounds_protocols_and_the_truth_check(tmp_path, monkeypatch):
    few = [variant for variant in VARIANTS["rounds"] if variant[0] in ("two rounds", "two rounds, dither")]
    monkeypatch.setitem(VARIANTS, "rounds", few)
    config = panda.Config(
        preset="smoke", workers=2, validation=1, truth=1, protocols=("stand",), studies=("rounds",), study_seeds=1,
        epochs=2, steps=80, weightings=("stand", "ours", "stand_env", "regret_env", "closed_loop"),
    )  # fmt: skip
    panda.run(config, tmp_path)
    rows = pq.read_table(tmp_path / "evaluations.parquet").to_pylist()
    assert {row["split"] for row in rows} == {"test", "validation"}
    assert {row["variant"] for row in rows if row["study"] == "rounds"} == {"two rounds", "two rounds, dither"}
    epochs = {row["epoch"] for row in rows if row["method"] == "stand" and row["study"] == "main"}
    assert epochs == {1, 2}
    truth = json.loads((tmp_path / "truth.json").read_text())
    assert {"stand", "ours", "regret"} <= set(truth["predicts"])
    assert all(-1.0 <= row[kind] <= 1.0 for row in truth["rows"] for kind in ("overall", "joints"))
    text = report.page(REPORT, tmp_path).read_text()
    assert "Truth check" in text and "two rounds" in text
