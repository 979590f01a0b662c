"""`sartor run` from end to end on the smallest settings, and a run that is interrupted and resumed."""

import io
import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from sartor import cli, report_closed_loop
from sartor.experiments import closed_loop


@pytest.fixture(scope="module", autouse=True)
def compiled_code(tmp_path_factory):
    """A cache for compiled code, so that each test here does not compile the same again."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "sartor" / "jax"
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


ARGS = ["run", "pendulum", "--preset", "smoke", "--num-steps", "6", "--disturbance", "0.01"]
CONFIG = closed_loop.Config("pendulum", preset="smoke", num_steps=6, disturbance=0.01)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_code):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    cli.main([*ARGS, "--out", str(folder)])
    return folder


def test_a_run_writes_its_numbers_and_a_figure(finished, compiled_code):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "metrics.json", "episode.npz", "episode.png"}
    config, metrics = (json.loads((finished / f"{name}.json").read_text()) for name in ("config", "metrics"))
    assert config["horizon"] == 8 and config["num_steps"] == metrics["num_steps"] == 6
    assert metrics["failed_share"] == 0.0 and metrics["failures"] == {}
    assert 0.0 < metrics["median_time"] <= metrics["p99_time"]
    with np.load(finished / "episode.npz") as ep:
        assert ep["xs"].shape == (7, 3) and ep["us"].shape == (6, 1) and ep["times"].shape == (6,)
        assert set(ep["results"]) == {"successful"}
        np.testing.assert_allclose(ep["costs"].sum(), metrics["cost"])
    assert any(compiled_code.iterdir())


def test_an_interrupted_run_resumes_to_the_same_result(finished, tmp_path, capsys):
    def interrupt(phase, done, total):
        if (phase, done) == ("simulate", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        closed_loop.run(CONFIG, tmp_path, interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "checkpoint.npz"}
    cli.main(["run", "pendulum", "--resume", str(tmp_path)])
    assert "6/6" in capsys.readouterr().out
    assert not (tmp_path / "checkpoint.npz").exists()
    with np.load(finished / "episode.npz") as whole, np.load(tmp_path / "episode.npz") as resumed:
        for name in set(whole.files) - {"times"}:
            np.testing.assert_array_equal(whole[name], resumed[name])


def test_resuming_a_finished_run_and_report_only_read(finished, capsys):
    before = (finished / "episode.npz").stat().st_mtime_ns
    cli.main(["run", "pendulum", "--resume", str(finished)])
    cli.main(["report", str(finished)])
    assert capsys.readouterr().out.count("failed solves") == 2
    assert (finished / "episode.npz").stat().st_mtime_ns == before


def test_list_names_the_experiments(capsys):
    cli.main(["list"])
    assert {"pendulum", "cartpole", "quadrotor"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "args, message",
    [
        (["report", "nowhere"], "holds no finished run"),
        (["run", "pendulum", "--resume", "nowhere"], "there is no config.json"),
        (["run", "pendulum", "--chunk", "0"], "chunk must be at least 1"),
    ],
)
def test_wrong_input_ends_with_a_message(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_a_folder_of_another_config_is_refused(finished):
    with pytest.raises(ValueError, match="another config"):
        closed_loop.run(closed_loop.Config("pendulum", preset="smoke"), finished)


def test_figure_of_a_run_with_failures_that_are_not_finite(finished, tmp_path):
    for path in finished.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with np.load(tmp_path / "episode.npz") as file:
        ep = dict(file)
    ep["results"] = np.array(["non_finite", *ep["results"][1:]])
    ep["kkt_norms"][0] = np.nan
    np.savez(tmp_path / "episode.npz", **ep)
    assert report_closed_loop.figure(tmp_path).stat().st_size > 10_000


def test_a_phase_that_comes_again_is_timed_anew(monkeypatch):
    console = Console(file=io.StringIO())
    shown = cli._progress(console)
    monkeypatch.setattr(cli, "_progress", lambda console: shown)
    monkeypatch.setattr(cli, "_configure_jax", lambda hurry: None)
    with cli._monitored(console) as monitor:
        monitor("test", 2, 2)
        before = shown.tasks[0].start_time
        monitor("test", 0, 3)
        assert shown.tasks[0].start_time > before and shown.tasks[0].total == 3
        again = shown.tasks[0].start_time
        monitor("test", 1, 3)
        assert shown.tasks[0].start_time == again and shown.tasks[0].completed == 1
