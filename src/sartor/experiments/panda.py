"""Tailor a Panda's dynamics model to its tracking task: collect, pretrain, label, fine-tune under each weighting, test.

The experiment of Węgrzynowski et al., Learning What Matters, section IV, on MuJoCo. Every job leaves one file in the
run folder, so an interrupted run goes on where it was. `report_panda` reads the folder; its files are

    config.json, environment.json, timing.json, data.json    what was run, on what, how long it took, counts
    evaluations.parquet, curves.parquet                      one row for each test episode; one for each epoch
    labels.json, maps.npz                                    statistics and mean maps of the labels
    traces.npz, spectrum.npz                                 tracking errors
    models/                                                  the models
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from sartor.data import Log
from sartor.experiments import panda_stages as stages
from sartor.experiments.jobs import Job, Workers
from sartor.experiments.panda_weights import NEEDS_LABELS, Weighting, closed_loop_labels, weights
from sartor.experiments.run_folder import environment
from sartor.files import load_arrays, read_json, replacing_file, save_arrays, write_json
from sartor.lerobot import write_lerobot
from sartor.models.store import load_model
from sartor.systems import panda
from sartor.train import Config as Training
from sartor.train import Windows, windows
from sartor.weights import States, explained

Monitor = Callable[[str, float, float], None]

_SMOKE: dict[str, Any] = dict(
    models=1, seeds=1, weightings=("stand", "ours"), rollouts=(2,), steps=40, pretrain_payloads=4,
    pretrain_references=1, pretrain_epochs=2, finetune_payloads=2, kept=2, label_stride=8, epochs=1, batch=32, tests=2,
    curvature="gauss_newton",
)  # fmt: skip
_QUICK: dict[str, Any] = dict(
    models=1, seeds=1, weightings=("stand", "ours", "stand_env", "regret_env"), rollouts=(4,), steps=500,
    pretrain_payloads=60, pretrain_references=2, pretrain_epochs=30, finetune_payloads=30, kept=30, label_stride=5,
    epochs=8,
    batch=256, tests=20, curvature="gauss_newton",
)  # fmt: skip
_PAPER: dict[str, Any] = dict(
    models=2, seeds=5,
    weightings=("ones", "stand", "norm", "mpc_cost", "ours", "ours_avg", "ours_shuffled", "stand_env", "regret",
                "regret_env", "closed_loop"),
    rollouts=(4, 1, 12), steps=500, pretrain_payloads=100, pretrain_references=2, pretrain_epochs=40,
    finetune_payloads=60, kept=30, label_stride=5, epochs=8, batch=256, tests=20, curvature="exact",
)  # fmt: skip
_PRESETS = {"smoke": _SMOKE, "quick": _QUICK, "paper": _PAPER}


@dataclass(frozen=True)
class Config:
    """The Panda experiment. Fields that are 0, empty or "" come from the preset."""

    experiment: Annotated[Literal["panda"], tyro.conf.Suppress] = "panda"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes a quarter of an hour, `paper` many hours; it has not been run yet."""
    models: int = 0
    """Pretrained models, each from another seed."""
    seeds: int = 0
    """Fine-tuning runs of each weighting and pretrained model."""
    weightings: tuple[Weighting, ...] = ()
    """Loss weights to compare; `stand` is what the others are compared with."""
    rollouts: tuple[int, ...] = ()
    """Lengths p of the rollouts in the loss."""
    steps: int = 0
    """Control steps of an episode; 500 are 10 s."""
    pretrain_payloads: int = 0
    """Payloads of the data for pretraining."""
    pretrain_references: int = 0
    """References for each of them."""
    pretrain_epochs: int = 0
    """Passes over those data."""
    pretrain_stride: int = 2
    """Every so many samples of them are used."""
    anchor: float = 20.0
    """Weight of the inverse-dynamics loss in fine-tuning; 0 for rollouts alone, as published."""
    pretrain_noise: float = 0.3
    """Noise on the histories in pretraining, in units of the published one."""
    pretrain_batch: int = 256
    """Samples of a gradient step in pretraining."""
    pretrain_rate: float = 3e-3
    """Learning rate of pretraining."""
    finetune_payloads: int = 0
    """Payloads of the closed-loop data for fine-tuning."""
    label_stride: int = 0
    """Every so many samples of them are labelled and used."""
    curvature: Literal["", "exact", "gauss_newton"] = ""
    """Hessian behind the labels."""
    states: States = "q"
    """States that count in the loss."""
    share: float = 0.0
    """Share of the uniform loss that is mixed into each weighting."""
    kept: int = 0
    """Runs of the data for pretraining that stay in the mix: they excite what good tracking leaves at rest."""
    dither: float = 0.0
    """Standard deviation of torque noise while fine-tuning data are collected, as a share of the torque limits."""
    rounds: int = 1
    """Rounds of collecting, labelling and fine-tuning; old data are kept."""
    epochs: int = 0
    """Passes over the data in fine-tuning."""
    batch: int = 0
    """Samples of a gradient step in fine-tuning."""
    learning_rate: float = 1e-3
    """Learning rate of fine-tuning, the same for all weightings."""
    tests: int = 0
    """Held-out payloads, one reference each."""
    widths: tuple[int, ...] = (30, 20)
    """Layers of the residual's networks."""
    num_contexts: int = 10
    """Size of the context."""
    hidden: int = 10
    """Size of the encoder's LSTMs."""
    num_layers: int = 5
    """Number of LSTMs."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        numbers = ("models", "seeds", "steps", "epochs", "batch", "tests", "workers", "dither", "rounds")
        for name in numbers:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if any(not 1 <= p <= panda.HORIZON for p in self.rollouts):
            raise ValueError(f"rollouts must lie in 1..{panda.HORIZON}, the horizon of the MPC, not {self.rollouts}.")
        if self.tests > 20:
            raise ValueError(f"tests must be at most 20, the published test payloads, not {self.tests}.")
        if self.weightings and "stand" not in self.weightings:
            raise ValueError("weightings must contain 'stand', which all others are compared with.")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        missing = {name: value for name, value in _PRESETS[self.preset].items() if not getattr(self, name)}
        return replace(self, **missing)


class Cell(NamedTuple):
    """One fine-tuned model."""

    model: int
    method: str
    p: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-p{self.p}-m{self.model}-s{self.seed}"


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it.

    Args:
        config: What to run.
        out: Run folder; jobs whose files are there are not done again.
        monitor: monitor(phase, done, total).
        command: The command line, for the report.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, config, command)
    with Workers(config.workers, monitor) as workers:
        _pretrain(config, out, workers)
        for number in range(1, config.rounds + 1):
            _collect_and_label(config, out, workers, number)
            _finetune(config, out, workers, number)
        _evaluate(config, out, workers)
        write_json(out / "timing.json", _add(_read(out / "timing.json"), workers.times))
    gather(config, out)


def cells(config: Config) -> list[Cell]:
    """All models to be fine-tuned."""
    return [
        Cell(model, method, p, seed)
        for p in config.rollouts
        for seed in range(config.seeds)
        for model in range(config.models)
        for method in config.weightings
    ]


def _pretrain(config: Config, out: Path, workers: Workers) -> None:
    share = lambda values, count: [part for part in np.array_split(values, count) if len(part)]
    chosen = stages.runs("pretrain", 0, config.pretrain_payloads, config.steps, config.pretrain_references)
    parts = share(np.arange(len(chosen.payloads)), max(config.workers, 1))
    files = [out / "parts" / f"excite-{i}.npz" for i in range(len(parts))]
    if not (out / "models" / f"pretrained-{config.models - 1}.npz").exists():
        jobs = [
            Job(file, stages.excite, (stages.Runs([chosen.payloads[i] for i in part], chosen.refs[part]), config.steps))
            for file, part in zip(files, parts, strict=True)
        ]
        workers.run("collect", jobs)
    jobs = [Job(out / "models" / f"pretrained-{m}.npz", pretrain_job, (files, config, m)) for m in range(config.models)]
    workers.run("pretrain", jobs)


def pretrain_job(output: Path, files: list[Path], config: Config, seed: int, monitor: Any) -> None:
    """Job: pretrain one model."""
    stages.pretrained(output, _logs(tuple(files)), config, seed, monitor)


def _collect_and_label(config: Config, out: Path, workers: Workers, number: int) -> None:
    drives, labels = [], []
    for source in _sources(config, number):
        model = out / "models" / f"{source}.npz"
        runs = stages.runs("finetune", 0, config.finetune_payloads, config.steps, offset=number)
        parts = _parts(config.finetune_payloads)
        files = [out / "data" / f"{source}-{number}-{i}.npz" for i in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            chosen = stages.Runs([runs.payloads[j] for j in part], runs.refs[part])
            drives.append(Job(file, collect_job, (chosen, model, config, number)))
        if number == 1 and config.kept:
            excited = sorted((out / "parts").glob("excite-*.npz"))
            for i, part in enumerate(_parts(config.kept)):
                files.append(out / "data" / f"{source}-1-kept{i}.npz")
                drives.append(Job(files[-1], keep_job, (excited, part, config.kept)))
        labels += [Job(out / "labels" / file.name, label_job, (file, model, config)) for file in files]
    workers.run("drive", drives)
    if _needs_labels(config):
        workers.run("label", labels)


def _parts(count: int) -> list[np.ndarray]:
    """Runs, some ten at a time: what a job takes in less than a minute."""
    return np.array_split(np.arange(count), max(1, count // 10))


def keep_job(output: Path, files: list[Path], part: np.ndarray, count: int, monitor: Any) -> None:
    """Job: some of `count` runs of the data for pretraining, spread over the payloads."""
    stored = [load_arrays(file) for file in files]
    whole = {name: np.concatenate([part[name] for part in stored]) for name in stored[0]}
    chosen = np.linspace(0, len(whole["xs"]) - 1, count).astype(int)[part]
    save_arrays(output, **{name: value[chosen] for name, value in whole.items()})


def collect_job(output: Path, chosen: Any, model: Path, config: Config, seed: int, monitor: Any) -> None:
    """Job: closed loop for fine-tuning data."""
    noise = config.dither * np.asarray(panda.U_MAX)
    stages.collect(output, chosen, model, config.steps, noise, seed, monitor)


def label_job(output: Path, file: Path, model: Path, config: Config, monitor: Any) -> None:
    """Job: labels of the runs of one file."""
    options = {"curvature": config.curvature}
    stages.labelled(output, stages.load_logs(file), model, config.label_stride, options, monitor)


def _needs_labels(config: Config) -> bool:
    return bool(set(config.weightings) & set(NEEDS_LABELS))


def _sources(config: Config, number: int) -> list[str]:
    """The models that drive in a round: the pretrained ones, then the fine-tuned ones."""
    if number == 1:
        return [f"pretrained-{m}" for m in range(config.models)]
    return [f"{cell.name}-r{number - 1}" for cell in cells(config)]


def _finetune(config: Config, out: Path, workers: Workers, number: int) -> None:
    jobs = []
    for cell in cells(config):
        start = f"pretrained-{cell.model}" if number == 1 else f"{cell.name}-r{number - 1}"
        sources = [(f"pretrained-{cell.model}", 1), *((f"{cell.name}-r{n - 1}", n) for n in range(2, number + 1))]
        files = [path for source, n in sources for path in sorted((out / "data").glob(f"{source}-{n}-*.npz"))]
        output = out / "models" / f"{cell.name}-r{number}.npz"
        jobs.append(Job(output, finetune_job, (out / "models" / f"{start}.npz", tuple(files), cell, config)))
    workers.run("fine-tune", jobs)


def finetune_job(output: Path, start: Path, files: tuple[Path, ...], cell: Cell, config: Config, monitor: Any) -> None:
    """Job: fine-tune one model."""
    model = load_model(start)
    samples, labels, held_out = _samples(files, start, config.label_stride, _needs_labels(config))
    loss_weights = lambda which: weights(
        cell.method, samples.take(which), {name: value[which] for name, value in labels.items()}, model, cell.p,
        config.states, config.share, cell.seed,
    )  # fmt: skip
    training = Training(config.epochs, config.batch, config.learning_rate, seed=cell.seed, anchor=config.anchor)
    validation = (samples.take(held_out), loss_weights(held_out)) if held_out.any() else None
    stages.tailored(output, start, samples.take(~held_out), loss_weights(~held_out), validation, training, monitor)


@lru_cache(maxsize=2)
def _samples(
    files: tuple[Path, ...], model: Path, stride: int, labels: bool
) -> tuple[Windows, dict[str, np.ndarray], np.ndarray]:
    """Sound samples of the logs with their labels, and which of them are held out for validation (a tenth of runs)."""
    logs = _logs(files)
    samples = windows(logs, load_model(model), panda.HORIZON, stride=stride)
    keep, found = stages.sound(logs, samples), {}
    if labels:
        found = _labels_of(files, logs, samples)
        keep &= found["ok"]
    held_out = samples.run % 10 == 9
    return samples.take(keep), {name: value[keep] for name, value in found.items()}, held_out[keep]


def _labels_of(files: tuple[Path, ...], logs: list[Log], samples: Windows) -> dict[str, np.ndarray]:
    parts, first = [], 0
    for file in files:
        part = load_arrays(file.parent.parent / "labels" / file.name)
        part["run"] = part["run"] + first
        first += len(stages.load_logs(file))
        parts.append(part)
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    refs = np.stack([np.asarray(logs[run].refs)[step] for run, step in zip(samples.run, samples.step, strict=True)])
    found["S_closed_loop"] = closed_loop_labels(found, samples.x0, refs)
    return found


@lru_cache(maxsize=2)
def _logs(files: tuple[Path, ...]) -> list[Log]:
    return [log for file in files for log in stages.load_logs(file)]


def _evaluate(config: Config, out: Path, workers: Workers) -> None:
    chosen = stages.runs("test", stages.TEST, config.tests, config.steps)
    models = out / "models"
    jobs = [
        Job(out / "tests" / f"{kind}.json", stages.baseline, (kind, chosen, None, config.steps))
        for kind in ("nominal", "oracle", "oracle_damping")
    ]
    names = [f"pretrained-{m}" for m in range(config.models)]
    names += [f"{cell.name}-r{config.rounds}" for cell in cells(config)]
    jobs += [
        Job(out / "tests" / f"{name}.json", stages.baseline, ("model", chosen, models / f"{name}.npz", config.steps))
        for name in names
    ]
    workers.run("test", jobs)


def gather(config: Config, out: Path) -> None:
    """Write what the report reads, from what the jobs have left."""
    tests, rows, curves = out / "tests", [], []
    common = {"study": "main", "variant": "", "split": "test", "last": True}
    for kind in ("nominal", "oracle", "oracle_damping"):
        head = {"model": -1, "method": kind, "p": 0, "seed": -1, "epoch": 0, "loss": np.nan}
        rows += [common | head | row for row in read_json(tests / f"{kind}.json")]
    for m in range(config.models):
        head = {"model": m, "method": "pretrained", "p": 0, "seed": -1, "epoch": 0, "loss": np.nan}
        rows += [common | head | row for row in read_json(tests / f"pretrained-{m}.json")]
    for cell in cells(config):
        name = f"{cell.name}-r{config.rounds}"
        curve = read_json(out / "models" / f"{name}.json")
        key = {"model": cell.model, "method": cell.method, "p": cell.p, "seed": cell.seed}
        loss = curve["validation"][-1] if curve["validation"] else np.nan
        rows += [
            common | key | {"epoch": config.epochs, "loss": loss} | row for row in read_json(tests / f"{name}.json")
        ]
        for epoch, train in enumerate(curve["train"], 1):
            held_out = curve["validation"][epoch - 1] if curve["validation"] else np.nan
            losses = {"epoch": epoch, "train_loss": train, "validation_loss": held_out}
            curves.append(key | {"study": "main", "variant": ""} | losses)
    _write_table(out / "evaluations.parquet", rows)
    _write_table(out / "curves.parquet", curves)
    _gather_labels(config, out)
    _gather_traces(config, out)
    _gather_data(config, out)


def _gather_labels(config: Config, out: Path) -> None:
    if not _needs_labels(config):
        return
    table, maps = {}, {}
    for m in range(config.models):
        files = tuple(sorted((out / "data").glob(f"pretrained-{m}-1-*.npz")))
        logs = _logs(files)
        model = load_model(out / "models" / f"pretrained-{m}.npz")
        samples = windows(logs, model, panda.HORIZON, stride=config.label_stride)
        found = _labels_of(files, logs, samples)
        ok = found["ok"] & stages.sound(logs, samples)
        table[str(m)] = {}
        for variant, S in (("ours", found["S"]), ("closed_loop", found["S_closed_loop"])):
            q = S[ok][:, :4, :7]
            table[str(m)][variant] = {
                "samples": int(ok.sum()), "failed": int((~found["ok"]).sum()), "explained": explained(q),
                "cv": (q.std((0, 1)) / q.mean((0, 1))).tolist(),
            }  # fmt: skip
            maps[f"S_{variant}"] = S[ok].mean(0)
    write_json(out / "labels.json", table)
    save_arrays(out / "maps.npz", **maps)


def _gather_traces(config: Config, out: Path) -> None:
    """Episodes of one environment, and spectra of the velocity error over all, of the first model and seed."""
    example = min(3, config.tests - 1)
    methods = {"pretrained": "pretrained-0", "oracle_damping": "oracle_damping"}
    methods |= {
        method: f"{Cell(0, method, config.rollouts[-1], 0).name}-r{config.rounds}" for method in config.weightings
    }
    traces, spectra = {}, {}
    for method, name in methods.items():
        logs = stages.load_logs(out / "tests" / f"{name}.npz")
        log = logs[example]
        traces |= {f"x_{method}": log.xs, f"u_{method}": log.us, "reference": log.refs}
        errors = np.stack([log.xs[:, 7:] - np.asarray(log.refs)[:, 7:] for log in logs])
        spectra[method] = np.median(np.abs(np.fft.rfft(errors, axis=1)) ** 2, 0)
    save_arrays(out / "traces.npz", t=panda.DT * np.arange(config.steps + 1), **traces)
    save_arrays(out / "spectrum.npz", frequencies=np.fft.rfftfreq(config.steps + 1, panda.DT), **spectra)


def _gather_data(config: Config, out: Path) -> None:
    files = tuple(sorted((out / "data").glob("pretrained-0-1-*.npz")))
    model = load_model(out / "models" / "pretrained-0.npz")
    samples = windows(_logs(files), model, panda.HORIZON, stride=config.label_stride)
    kept = int(stages.sound(_logs(files), samples).sum())
    write_json(out / "data.json", {"runs": len(_logs(files)), "samples": samples.size, "left out": samples.size - kept,
               "pretraining samples": read_json(out / "models" / "pretrained-0.json")["num_samples"]})  # fmt: skip
    folder = out / "dataset"
    if not (folder / "meta" / "info.json").exists():
        joints = [f"joint{i + 1}" for i in range(7)]
        write_lerobot(folder, _logs(files), robot="panda", joints=joints, task="follow the reference")


def _write_table(path: Path, rows: list[dict]) -> None:
    with replacing_file(path) as new:
        pq.write_table(pa.Table.from_pylist(rows), new)


def _claim(out: Path, config: Config, command: str) -> None:
    path, mine = out / "config.json", _plain(asdict(config))
    ignored = ("workers", "command")
    if path.exists():
        stored = read_json(path)
        different = [k for k in mine if k not in ignored and stored.get(k) != mine[k]]
        if different:
            raise ValueError(f"{out} holds a run with other settings ({', '.join(different)}): choose another folder.")
        return
    write_json(path, mine | {"command": command})
    write_json(out / "environment.json", environment())


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def _read(path: Path) -> dict[str, float]:
    return read_json(path) if path.exists() else {}


def _add(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {**a, **b}}
