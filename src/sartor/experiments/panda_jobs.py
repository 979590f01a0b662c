"""The jobs of the Panda experiment: each makes one file of the run folder from others."""

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sartor.data import Log
from sartor.experiments import panda_stages as stages
from sartor.experiments.panda_config import NEEDS_LABELS, Config
from sartor.experiments.panda_studies import Cell
from sartor.experiments.panda_weights import closed_loop_labels, weights
from sartor.files import load_arrays, save_arrays, write_json
from sartor.models.base import trainable
from sartor.models.store import load_model, save_model
from sartor.samples import Windows, windows
from sartor.systems import panda
from sartor.train import Config as Training

TIMED_STEPS = 120
Part = tuple[Path, np.ndarray]
"""A file, and which runs it holds."""


def driven(out: Path, source: str, number: int, payloads: int) -> list[Part]:
    """Files of the closed loops that a model drives in a round, some ten at a time: less than a minute of work."""
    parts = [np.arange(first, min(first + 10, payloads)) for first in range(0, payloads, 10)]
    return [(out / "data" / f"{source}-{number}-{part[0]}_{part[-1]}.npz", part) for part in parts]


def kept(out: Path, source: str, number: int, count: int) -> list[Part]:
    """Files of the data for pretraining that are kept beside those of the first round."""
    parts = [np.arange(first, min(first + 10, count)) for first in range(0, count if number == 1 else 0, 10)]
    return [(out / "data" / f"{source}-{number}-kept{part[0]}_{part[-1]}of{count}.npz", part) for part in parts]


def data_of(out: Path, source: str, number: int, config: Config) -> list[Path]:
    """All files of data of a round."""
    parts = driven(out, source, number, config.finetune_payloads) + kept(out, source, number, config.kept)
    return [file for file, _ in parts]


def pretrain(output: Path, files: list[Path], config: Config, seed: int, monitor: Any) -> None:
    """Pretrain one model."""
    stages.pretrained(output, logs_of(tuple(files)), config, seed, monitor)


def keep(output: Path, files: list[Path], part: np.ndarray, count: int, monitor: Any) -> None:
    """Some of `count` runs of the data for pretraining, spread over the payloads."""
    stored = [load_arrays(file) for file in files]
    whole = {name: np.concatenate([part[name] for part in stored]) for name in stored[0]}
    chosen = np.linspace(0, len(whole["xs"]) - 1, count).astype(int)[part]
    save_arrays(output, **{name: value[chosen] for name, value in whole.items()})


def drive(output: Path, chosen: stages.Runs, model: Path, config: Config, seed: int, monitor: Any) -> None:
    """Closed loop for fine-tuning data."""
    noise = config.dither * np.asarray(panda.U_MAX)
    stages.collect(output, chosen, model, config.steps, noise, 1000 * seed + chosen.payloads[0], monitor)


def label(output: Path, file: Path, model: Path, config: Config, monitor: Any) -> None:
    """Labels of the runs of one file."""
    options = {"curvature": config.curvature, "method": config.sensitivity}
    stages.labelled(output, stages.load_logs(file), model, config.label_stride, config.tau, options, monitor)


def finetune(output: Path, start: Path, files: tuple[Path, ...], cell: Cell, config: Config, monitor: Any) -> None:
    """Fine-tune one model; those of all epochs are kept for `config.protocols`."""
    model, needed = load_model(start), cell.method in NEEDS_LABELS
    samples, labels, held_out = training_samples(files, start, config.label_stride, cell.labels if needed else "")
    loss_weights = lambda which: weights(
        cell.method, samples.take(which), {name: value[which] for name, value in labels.items()}, model, cell.p,
        config, cell.seed,
    )  # fmt: skip
    training = Training(
        config.epochs,
        config.batch,
        config.learning_rate,
        seed=cell.seed,
        anchor=config.anchor or 0.0,
        frozen=config.frozen,
    )
    validation = (samples.take(held_out), loss_weights(held_out)) if held_out.any() else None

    def after_epoch(epoch: int, model: Any) -> None:
        path = output.parent / "epochs" / f"{output.stem}-e{epoch}.npz"
        path.parent.mkdir(exist_ok=True)
        save_model(path, stages.as_type(model, float))

    keep_epochs = after_epoch if cell.study == "main" and cell.method in (config.protocols or ()) else None
    stages.tailored(
        output, start, samples.take(~held_out), loss_weights(~held_out), validation, training, monitor, keep_epochs
    )


def test(output: Path, kind: str, model: Path | None, config: Config, episodes: bool, monitor: Any) -> None:
    """Test and validation episodes of one controller; their metrics, and all of them if `episodes`."""
    chosen = stages.runs("test", stages.TEST, config.tests, config.steps)
    if config.validation:
        more = stages.runs("validation", stages.VALIDATION, config.validation, config.steps)
        chosen = stages.Runs(chosen.payloads + more.payloads, np.concatenate([chosen.refs, more.refs]))
    stages.tested(output, kind, chosen, model, config.steps, episodes, monitor)


@lru_cache(maxsize=2)
def training_samples(
    files: tuple[Path, ...], model: Path, stride: int, labels: str
) -> tuple[Windows, dict[str, np.ndarray], np.ndarray]:
    """Sound samples of the logs with their labels, and which of them are held out for validation (every tenth run).

    A sample whose label failed stays, with a label of zero: all weightings see the same samples in the same order.
    """
    logs = logs_of(files)
    samples = windows(logs, load_model(model), panda.HORIZON, stride=stride)
    keep, found = stages.sound(logs, samples), {}
    if labels:
        found = labels_of(files, labels, logs, samples)
    held_out = samples.run % 10 == min(9, samples.run.max())
    return samples.take(keep), {name: value[keep] for name, value in found.items()}, held_out[keep]


def labels_of(files: tuple[Path, ...], folder: str, logs: list[Log], samples: Windows) -> dict[str, np.ndarray]:
    """Labels of all samples, in their order; those that failed are zero."""
    parts, first = [], 0
    for file in files:
        part = load_arrays(file.parent.parent / folder / file.name)
        part.pop("rate", None)
        part["run"] = part["run"] + first
        first += len(stages.load_logs(file))
        parts.append(part)
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not np.array_equal(found["run"], samples.run) or not np.array_equal(found["step"], samples.step):
        raise ValueError(f"the labels in {folder} are of other samples than {files[0].name} and others hold.")
    found["S_closed_loop"] = closed_loop_labels(found, [log.xs for log in logs], [np.asarray(log.refs) for log in logs])
    for value in found.values():
        if value.dtype.kind == "f":
            value[~found["ok"]] = 0.0
    return found


def label_rate(files: list[Path], folder: str) -> float:
    """Labels per second on one core, without compiling; NaN where that is not known."""
    rates = [load_arrays(file.parent.parent / folder / file.name).get("rate", np.nan) for file in files]
    known = [float(rate) for rate in rates if np.isfinite(rate)]
    return float(np.median(known)) if known else np.nan


def speed(output: Path, model: Path, config: Config, monitor: Any) -> None:
    """Size of a model, and how long the MPC takes for a control step with it on this core."""
    belief, chosen = load_model(model), stages.runs("test", stages.TEST, 1, TIMED_STEPS)
    tracker, robots, times = stages.controller("model", chosen.payloads, belief), stages.plants(chosen.payloads), []
    x = robots.reset(np.concatenate([chosen.refs[:, 0, :7], np.zeros((1, 7))], 1))
    loop, control = tracker.begin(jnp.asarray(x)), tracker.controller()
    for t in range(TIMED_STEPS):
        begun = time.perf_counter()
        u, loop, _ = control(loop, x, chosen.refs[:, t : t + panda.HORIZON + 1], t == 0)
        u = np.asarray(u, float)
        times.append(time.perf_counter() - begun)
        x = robots.step(u)
        loop = loop._replace(u=jnp.asarray(robots.us))
        monitor(t + 1, TIMED_STEPS)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(belief, trainable(belief))))
    controller = sum(leaf.size for leaf in jax.tree.leaves((belief.inertia, belief.potential)))
    encoder = f"{config.num_layers} LSTM{'s' if config.num_layers > 1 else ''} of {config.hidden}"
    row = {"networks": f"{list(config.widths)}, {encoder}", "parameters": parameters, "of them in the MPC": controller}
    write_json(output, row | {"control step [ms]": 1e3 * float(np.median(times[20:]))})


@lru_cache(maxsize=2)
def logs_of(files: tuple[Path, ...]) -> list[Log]:
    """Logs of some files."""
    return [log for file in files for log in stages.load_logs(file)]
