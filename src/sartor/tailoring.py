"""From a robot file and logs of its closed loop to labels and a tailored model: `sartor label`, `sartor tailor`."""

# MuJoCo is compiled and has no type stubs.
# pyright: reportAttributeAccessIssue=false

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from sartor.data import Log
from sartor.files import load_arrays, read_json, replacing_file, save_arrays, write_json
from sartor.labelling import label_samples, references_ahead
from sartor.logs import Columns, read_log
from sartor.models.base import AbstractModel, ArmDynamics
from sartor.models.lagrangian import CaDeLaC
from sartor.models.links import RigidBody
from sartor.models.mjcf import from_mujoco
from sartor.models.mlp import ResidualMLP
from sartor.models.store import load_model, save_model
from sartor.problem import Problem
from sartor.samples import Windows, windows
from sartor.systems import arm
from sartor.train import Config, fit, mean_loss, rollout_loss
from sartor.weights import States, Weights, constant, explained, from_labels

Monitor = Callable[[str, float, float], None]
_PART = 512  # labels in a file: what is lost of an interrupted run


@dataclass(frozen=True)
class Task:
    """A robot, logs of it, and what its controller does."""

    robot: tyro.conf.Positional[Path]
    """MJCF or URDF file of the robot as it is known."""
    logs: tyro.conf.Positional[tuple[Path, ...]]
    """CSV or Parquet files, one for each run."""
    dt: Annotated[float, tyro.conf.arg(metavar="S")] = 0.02
    """Time between two controls [s]."""
    positions: tuple[str, ...] = ()
    """Columns of the joint positions, in the order of the robot's joints; q1 q2 ... unless given."""
    velocities: tuple[str, ...] = ()
    """Columns of the joint velocities; v1 v2 ... unless given."""
    no_velocities: bool = False
    """The logs hold no velocities: take differences of the positions."""
    torques: tuple[str, ...] = ()
    """Columns of the joint torques; tau1 tau2 ... unless given."""
    reference_positions: tuple[str, ...] = ()
    """Columns of the reference positions; r1 r2 ... unless given."""
    reference_velocities: tuple[str, ...] = ()
    """Columns of the reference velocities; differences of the positions unless given."""
    time: str = "time"
    """Column of the time."""
    time_unit: Literal["s", "ms", "ns"] = "s"
    """Its unit."""
    angle_unit: Literal["rad", "deg"] = "rad"
    """Unit of the positions, and per second of the velocities."""
    horizon: int = 12
    """Steps that the controller plans."""
    position_weight: float = 1000.0
    """Its weight of position errors."""
    velocity_weight: float = 100.0
    """Its weight of velocity errors."""
    torque_weight: float = 0.2
    """Its weight of torques."""
    torque_limits: tuple[float, ...] = ()
    """Largest torques, one for each joint; the control ranges of the robot's motors unless given."""
    model: Path | None = None
    """Model file to start from; a new one unless given."""
    kind: Literal["cadelac", "mlp"] = "cadelac"
    """Kind of a new model."""
    stride: int = 1
    """Use every so many control steps."""
    curvature: Literal["exact", "gauss_newton"] = "exact"
    """Hessian behind the labels."""
    seed: int = 0
    """Of a new model, and of the order of the samples."""
    out: Path = Path("tailored")
    """Folder for the results; what is there of an interrupted run is used."""


@dataclass(frozen=True)
class Tailor(Task):
    """Label logs of a robot and train its model under the labels, for the task of its controller."""

    steps: int = 4
    """Length of the rollouts in the loss."""
    states: States = "both"
    """Which states count."""
    epochs: int = 20
    """Passes over the data."""
    batch: int = 256
    """Samples of a gradient step."""
    learning_rate: float = 1e-3
    """Of Adam, at the beginning."""
    anchor: float = 10.0
    """Weight of the inverse-dynamics loss beside that of the rollouts."""


@dataclass(frozen=True)
class Label(Task):
    """Label logs of a robot: how much errors of the predicted states matter to its controller."""


class Labelled(eqx.Module):
    """Samples with their labels."""

    model: AbstractModel
    samples: Windows
    S: np.ndarray
    """(B, N, nx)."""
    failed: int
    """Samples without a label; they are not among the others."""


def run_label(task: Task, monitor: Monitor) -> Labelled:
    """Label all samples of the logs, and write `labels.parquet`.

    Fails: `ValueError` for wrong files, columns or numbers.
    """
    if not task.logs:
        raise ValueError("logs is empty: give CSV or Parquet files of the robot's closed loop.")
    mj_model = mujoco.MjModel.from_xml_path(str(task.robot))
    body = from_mujoco(mj_model)
    problem = _problem(task, body.nq, _limits(task, mj_model))
    logs = [
        read_log(path, _columns(task, body.nq), task.dt)._replace(environment=i) for i, path in enumerate(task.logs)
    ]
    model = _start(task, body)
    samples = windows(logs, model, task.horizon, stride=task.stride)
    found = _labels(task, problem, model, logs, samples, monitor)
    ok = found["ok"]
    table = {"run": samples.run, "step": samples.step, "ok": ok, "S": list(found["S"].reshape(len(ok), -1))}
    with replacing_file(task.out / "labels.parquet") as new:
        pq.write_table(pa.table(table), new)
    if not ok.any():
        raise ValueError("no sample has a label: does the controller's problem fit the logs (weights, limits, dt)?")
    return Labelled(model, samples.take(ok), found["S"][ok], int((~ok).sum()))


def run_tailor(task: Tailor, monitor: Monitor) -> tuple[Labelled, dict[str, tuple[float, float]]]:
    """Label, train, write `model.npz`; returns the labels, and losses before and after on a tenth held out.

    Fails: `ValueError` as `run_label`, or for a `steps` beyond the horizon.
    """
    if not 1 <= task.steps <= task.horizon:
        raise ValueError(f"steps must lie in 1..{task.horizon}, the horizon, not {task.steps}.")
    config = Config(task.epochs, task.batch, task.learning_rate, seed=task.seed, anchor=task.anchor)
    labelled = run_label(task, monitor)
    samples, count = labelled.samples, labelled.samples.size
    held_out = np.arange(count) >= count - max(1, count // 10)  # the end of the last log
    seen = np.arange(count) < np.flatnonzero(held_out)[0] - -(-task.steps // task.stride)  # rollouts end before it
    if not seen.any():
        raise ValueError(f"the logs give {count} samples with a label, too few to train on: give more or longer ones.")
    std = samples.xs.std((0, 1))
    standard = np.where(std > 0, 1.0 / np.where(std > 0, std, 1.0), 0.0)  # a joint that stands still does not count
    kinds: dict[str, Weights] = {
        "labels": from_labels(labelled.S, task.steps, task.states),
        "1/standard deviation": constant(standard, count, task.steps, task.states),
    }
    take = lambda weights, which: jax.tree.map(lambda leaf: leaf[which], weights)
    checkpoint = task.out / f"train-{hashlib.sha256(repr(task).encode()).hexdigest()[:8]}.checkpoint"
    trained, _ = fit(
        labelled.model, samples.take(seen), take(kinds["labels"], seen), config,
        checkpoint=checkpoint, monitor=lambda done, total: monitor("train", done, total),
    )  # fmt: skip
    save_model(task.out / "model.npz", trained)
    checkpoint.unlink(missing_ok=True)
    data = {name: (samples.take(held_out), take(weights, held_out)) for name, weights in kinds.items()}
    loss = eqx.Partial(rollout_loss, task.dt)
    return labelled, {n: (mean_loss(loss, labelled.model, d), mean_loss(loss, trained, d)) for n, d in data.items()}


def summary(labelled: Labelled) -> dict[str, float]:
    """Numbers of a label set: samples, failed, and the share of their energy that the mean map explains."""
    counts = {"samples": float(labelled.samples.size), "failed": float(labelled.failed)}
    return counts | {"explained by the mean map": explained(labelled.S)}


def _labels(
    task: Task, problem: Problem, model: AbstractModel, logs: list[Log], samples: Windows, monitor: Monitor
) -> dict[str, np.ndarray]:
    refs = references_ahead(logs, samples, task.horizon)
    _claim(task)  # not before: what was refused for a typing error must not hold the folder
    parts = []
    for which in np.array_split(np.arange(samples.size), -(-samples.size // _PART)):  # of one size: compiled once
        start = which[0]
        file = task.out / "labels" / f"{start:07d}-{which[-1]:07d}.npz"
        if not file.exists():
            some = samples.take(which)
            tell = lambda done, total, start=start: monitor("label", start + done, samples.size)
            found = label_samples(problem, model, some, refs[which], monitor=tell, curvature=task.curvature)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_arrays(file, S=found["S"], ok=found["ok"])
        parts.append(load_arrays(file))
    return {name: np.concatenate([part[name] for part in parts]) for name in ("S", "ok")}


def _claim(task: Task) -> None:
    """Refuse a folder whose labels are of other files or settings."""
    files = [path for path in (task.robot, *task.logs, task.model) if path is not None]
    mine = {field.name: str(getattr(task, field.name)) for field in fields(Task) if field.name != "out"}
    mine |= {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    path = task.out / "task.json"
    if path.exists():
        stored = read_json(path)
        different = [name for name in {**mine, **stored} if mine.get(name) != stored.get(name)]
        if different:
            raise ValueError(f"{task.out} holds results of other settings or files ({', '.join(different)}): choose"
                             " another folder by out.")  # fmt: skip
        return
    task.out.mkdir(parents=True, exist_ok=True)
    write_json(path, mine)


def _columns(task: Task, n: int) -> Columns:
    if task.no_velocities and task.velocities:
        raise ValueError("velocities names columns, but no_velocities says that there are none: leave out one of them.")
    named = lambda given, letter: given or tuple(f"{letter}{i + 1}" for i in range(n))
    velocities = None if task.no_velocities else named(task.velocities, "v")
    return Columns(
        task.time, named(task.positions, "q"), velocities, named(task.torques, "tau"),
        named(task.reference_positions, "r"), task.reference_velocities or None, task.time_unit, task.angle_unit,
    )  # fmt: skip


def _limits(task: Task, mj_model: mujoco.MjModel) -> np.ndarray:
    if task.torque_limits:
        limits = np.asarray(task.torque_limits, float)
        if limits.shape != (mj_model.nv,) or not np.all(limits > 0):
            raise ValueError(f"torque_limits must hold {mj_model.nv} positive numbers, not {task.torque_limits}.")
        return np.stack([-limits, limits])
    limits = np.full((2, mj_model.nv), np.nan)
    for i in range(mj_model.nu):
        joint = mj_model.actuator_trnid[i, 0]
        if mj_model.actuator_ctrllimited[i] and mj_model.actuator_trntype[i] == int(mujoco.mjtTrn.mjTRN_JOINT):
            limits[:, mj_model.jnt_dofadr[joint]] = _motor_range(task.robot, mj_model, i, joint)
    if np.isnan(limits).any():
        missing = ", ".join(mj_model.joint(j).name or str(j) for j in np.flatnonzero(np.isnan(limits[0])))
        raise ValueError(f"{task.robot} has no motor with a control range for {missing}: give torque_limits.")
    return limits


def _motor_range(robot: Path, m: mujoco.MjModel, i: int, joint: int) -> tuple[float, float]:
    """Torques that a motor can give its joint, with the limits of its force and of the joint's."""
    name = m.joint(joint).name or str(joint)
    if not m.actuator_gaintype[i] == m.actuator_biastype[i] == 0:
        raise ValueError(f"{robot}: an actuator of {name!r} is no torque motor: give torque_limits.")
    forces = [m.actuator_ctrlrange[i] * m.actuator_gainprm[i, 0]]
    forces += [m.actuator_forcerange[i]] if m.actuator_forcelimited[i] else []
    torques = [m.actuator_gear[i, 0] * force for force in forces]
    torques += [m.jnt_actfrcrange[joint]] if m.jnt_actfrclimited[joint] else []
    low, high = max(min(t) for t in torques), min(max(t) for t in torques)
    if not low < high:
        raise ValueError(f"{robot}: the motor of {name!r} can give {low:g} to {high:g}: give torque_limits.")
    return low, high


def _problem(task: Task, n: int, limits: np.ndarray) -> Problem:
    Q, R = [task.position_weight] * n + [task.velocity_weight] * n, [task.torque_weight] * n
    u_min, u_max = limits
    return arm.problem(ArmDynamics(task.dt), Q=Q, R=R, u_min=u_min, u_max=u_max, dt=task.dt, horizon=task.horizon)


def _start(task: Task, body: RigidBody) -> AbstractModel:
    """The model that is labelled: given, or new; the seed says which."""
    if task.model is None:
        kind = {"cadelac": CaDeLaC, "mlp": ResidualMLP}[task.kind]
        return kind(body, hidden=24, num_layers=1, key=jax.random.key(task.seed))  # learns more than the published five
    model = load_model(task.model, body=body)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float) if eqx.is_inexact_array(leaf) else leaf, model)
