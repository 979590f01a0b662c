"""`sartor label` and `sartor tailor`: a robot file and a log in, labels and a better model out."""

import errno
from pathlib import Path

import jax
import mujoco
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sartor import cli, tailoring
from sartor.logs import Columns, write_log
from sartor.models.base import Nominal
from sartor.models.mjcf import from_mujoco
from sartor.models.store import load_model, save_model
from sartor.plant import Plants
from sartor.tracking import follow

DT = 0.02
ARM = """<mujoco><option timestep="0.002" gravity="0 0 0"/><worldbody><body><joint name="a" axis="0 1 0" damping="{d}"/>
<geom type="capsule" size="0.03" fromto="0 0 0 0.4 0 0" mass="1"/><body pos="0.4 0 0"><joint name="b" axis="0 1 0"
damping="{d}"/><geom type="capsule" size="0.03" fromto="0 0 0 0.3 0 0" mass="1"/></body></body></worldbody><actuator>
<motor joint="a" ctrlrange="-30 30"/><motor joint="b" ctrlrange="-20 20"/></actuator></mujoco>"""  # fmt: skip
COLUMNS = Columns("time", ("q1", "q2"), ("v1", "v2"), ("tau1", "tau2"), ("r1", "r2"), ("w1", "w2"))


@pytest.fixture(scope="module", autouse=True)
def no_cache_is_left():
    """The commands keep compiled code in a folder; other tests have their own."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The robot without damping, and a log of the one with it under a PD controller."""
    folder = tmp_path_factory.mktemp("arm")
    (folder / "arm.xml").write_text(ARM.format(d=0))
    t = DT * np.arange(161)[:, None] * np.array([2.0, 3.0])
    refs = np.concatenate([np.sin(t) ** 2, np.array([2.0, 3.0]) * np.sin(2 * t)], 1)[None]
    pd = lambda t, xs: 40.0 * (refs[:, t, :2] - xs[:, :2]) + 4.0 * (refs[:, t, 2:] - xs[:, 2:])
    plants = Plants([mujoco.MjModel.from_xml_string(ARM.format(d=1.0))], DT)
    write_log(folder / "log.csv", follow(plants, pd, refs, 160).logs[0], COLUMNS)
    return folder


def command(files, verb, *more):
    return [verb, str(files / "arm.xml"), str(files / "log.csv"), "--out", str(files / "out"), "--kind", "mlp",
            "--horizon", "3", "--curvature", "gauss_newton", *more]  # fmt: skip


def test_a_log_becomes_labels_and_a_better_model(files, capsys):
    cli.main(command(files, "label"))
    printed = capsys.readouterr().out
    assert "mean label" in printed and "explained by the mean map" in printed and "failed 0" in printed
    labels = pq.read_table(files / "out" / "labels.parquet").to_pydict()
    assert all(labels["ok"]) and np.shape(labels["S"])[1] == 3 * 4 and np.min(labels["S"]) >= 0
    before = {path: path.stat().st_mtime_ns for path in (files / "out" / "labels").iterdir()}

    more = ("--steps", "2", "--epochs", "30", "--batch", "64", "--learning-rate", "3e-3")
    cli.main(command(files, "tailor", *more))
    printed = capsys.readouterr().out.replace("\n", " ")
    assert {path: path.stat().st_mtime_ns for path in before} == before  # labelled once
    losses = [float(text.split()[0]) for text in printed.split("weighted by labels: ")[1].split("before, ")]
    assert losses[1] < 0.6 * losses[0]
    assert load_model(files / "out" / "model.npz").body.names == ("a", "b")


@pytest.mark.parametrize(
    "more, message",
    [
        (["--positions", "a", "b"], "no column"),
        (["--no-velocities", "--velocities", "v1", "v2"], "leave out one of them"),
        (["--torque-limits", "1"], "torque_limits must hold 2 positive numbers"),
        (["--dt", "0.005"], "slower"),
        (["--steps", "4"], "steps must lie in 1..3"),
        (["--stride", "0"], "stride must be at least 1"),
        (["--steps", "2", "--batch", "0"], "batch must be at least 1"),
        (["--dt", "0"], "dt must be positive"),
    ],
)
def test_wrong_input_is_named_before_anything_runs(files, tmp_path, capsys, more, message):
    verb = "tailor" if "--steps" in more else "label"
    with pytest.raises(SystemExit):
        cli.main([*command(files, verb), *more, "--out", str(tmp_path / "new")])
    assert message in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "new").exists()  # the corrected command may have the folder


ROBOTS = {
    "free base": ARM.replace('<joint name="a" axis="0 1 0" damping="{d}"/>', "<freejoint/>").replace(
        '<motor joint="a" ctrlrange="-30 30"/>', ""
    ),
    "closed loop": ARM.replace("</mujoco>", '<equality><joint joint1="a" joint2="b"/></equality></mujoco>'),
}


@pytest.mark.parametrize("kind", ["free base", "closed loop"])
def test_robots_that_are_none_of_ours_are_refused(kind, files, tmp_path, capsys):
    (tmp_path / "robot.xml").write_text(ROBOTS[kind].format(d=0))
    with pytest.raises(SystemExit):
        cli.main(["label", str(tmp_path / "robot.xml"), str(files / "log.csv"), "--torque-limits", "30", "20",
                  "--out", str(tmp_path / "new")])  # fmt: skip
    assert kind in " ".join(capsys.readouterr().out.split())


def test_a_model_of_another_robot_is_refused(files, tmp_path, capsys):
    """The same names and sizes, but a heavier link."""
    heavier = mujoco.MjModel.from_xml_string(ARM.format(d=0).replace('mass="1"', 'mass="1.3"', 1))
    save_model(tmp_path / "model.npz", Nominal(from_mujoco(heavier)))
    with pytest.raises(SystemExit):
        cli.main([*command(files, "label"), "--model", str(tmp_path / "model.npz"), "--out", str(tmp_path / "new")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "is of another robot" in printed and "masses" in printed


def test_limits_are_those_of_motor_force_and_joint():
    arm = ARM.replace('joint="a" ctrlrange="-30 30"', 'joint="a" ctrlrange="-3 4" gear="5" forcerange="-2 9"')
    arm = arm.replace('name="b" axis', 'name="b" actuatorfrcrange="-7 99" axis')
    model = mujoco.MjModel.from_xml_string(arm.format(d=0))
    task = tailoring.Label(Path("arm.xml"), ())
    np.testing.assert_allclose(tailoring._limits(task, model), [[-10.0, -7.0], [20.0, 20.0]])
    broken = mujoco.MjModel.from_xml_string(arm.replace("-7 99", "30 99").format(d=0))
    with pytest.raises(ValueError, match="motor of 'b' can give 30 to 20"):
        tailoring._limits(task, broken)


def test_messages_show_what_stands_in_brackets(files, tmp_path, capsys):
    text = (files / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(text.replace("q1", "q1 [rad]", 1))
    with pytest.raises(SystemExit):
        cli.main(["label", str(files / "arm.xml"), str(tmp_path / "log.csv"), "--out", str(tmp_path / "new")])
    assert "q1 [rad]" in " ".join(capsys.readouterr().out.split())


def test_a_full_disk_is_said_and_the_same_command_goes_on(files, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tailoring, "save_arrays", full)
    again = [*command(files, "label"), "--out", str(tmp_path / "new")]
    with pytest.raises(SystemExit):
        cli.main(again)
    printed = " ".join(capsys.readouterr().out.split())
    assert "No space left on device" in printed and "the same command goes on" in printed
    monkeypatch.undo()
    cli.main(again)
    assert "failed 0" in capsys.readouterr().out


def test_a_folder_of_other_settings_is_refused(files, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command(files, "label"), "--position-weight", "5"])
    assert "other settings or files (position_weight)" in " ".join(capsys.readouterr().out.split())
