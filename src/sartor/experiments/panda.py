"""Tailor a Panda's dynamics model to its tracking task: collect, pretrain, label, fine-tune under each weighting, test.

The experiment of Węgrzynowski et al., Learning What Matters, section IV, on MuJoCo. Every job leaves one file in the
run folder, so an interrupted run goes on where it was. `report_panda` reads the folder; its files are

    config.json, environment.json, timing.json, data.json    what was run, on what, how long it took, counts
    evaluations.parquet, curves.parquet                      one row for each test episode; one for each epoch
    labels.json, maps.npz                                    statistics and mean maps of the labels
    truth.json                                               labels against branches of the simulated closed loop
    traces.npz, spectrum.npz                                 tracking errors
    models/                                                  the models
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from sartor.experiments import panda_jobs as jobs
from sartor.experiments import panda_stages as stages
from sartor.experiments.jobs import Job, Workers
from sartor.experiments.panda_gather import gather
from sartor.experiments.panda_studies import Cell, Study, cells
from sartor.experiments.panda_truth import agreement, check
from sartor.experiments.panda_weights import NEEDS_LABELS, Weighting
from sartor.experiments.run_folder import environment
from sartor.files import read_json, write_json
from sartor.systems import panda
from sartor.weights import States

Monitor = Callable[[str, float, float], None]

_SMOKE: dict[str, Any] = dict(
    models=1, seeds=1, weightings=("stand", "ours"), rollouts=(2,), steps=40, pretrain_payloads=4,
    pretrain_references=1, pretrain_epochs=2, finetune_payloads=2, kept=2, label_stride=8, epochs=1, batch=32, tests=2,
    curvature="gauss_newton", anchor=10.0,
)  # fmt: skip
_QUICK: dict[str, Any] = dict(
    models=1, seeds=1, weightings=("stand", "ours", "stand_env", "regret_env"), rollouts=(4,), steps=500,
    pretrain_payloads=60, pretrain_references=2, pretrain_epochs=30, finetune_payloads=30, kept=30, label_stride=5,
    epochs=8,
    batch=256, tests=20, curvature="gauss_newton", anchor=10.0,
)  # fmt: skip
_PAPER: dict[str, Any] = dict(
    models=2, seeds=5,
    weightings=("ones", "stand", "norm", "mpc_cost", "ours", "ours_avg", "ours_shuffled", "stand_env", "regret",
                "regret_env", "closed_loop"),
    rollouts=(4, 1, 12), steps=500, pretrain_payloads=100, pretrain_references=2, pretrain_epochs=40,
    finetune_payloads=60, kept=30, label_stride=5, epochs=8, batch=256, tests=20, curvature="exact", anchor=3.0,
    studies=("rounds", "capacity", "ablation"), study_seeds=2, validation=10, protocols=("stand", "ours"), truth=4,
)  # fmt: skip
_PRESETS = {"smoke": _SMOKE, "quick": _QUICK, "paper": _PAPER}


@dataclass(frozen=True)
class Config:
    """The Panda experiment. Fields that are 0, empty or "" come from the preset."""

    experiment: Annotated[Literal["panda"], tyro.conf.Suppress] = "panda"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes some eleven minutes, `paper` many hours: it has not been run to its end."""
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
    anchor: float | None = None
    """Weight of the inverse-dynamics loss in fine-tuning; 0 for rollouts alone, as published; none: from the preset."""
    frozen: tuple[Literal["encoder", "inertia", "potential"], ...] = ()
    """Parts of the model that fine-tuning leaves as they are."""
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
    error: Literal["defect", "trajectory"] = "defect"
    """What a prediction error is: one that propagates, or one of a single stage."""
    combine: Literal["signed", "absolute"] = "signed"
    """How joints are combined in a label: |Σ ...|, or Σ |...|."""
    sensitivity: Literal["curvature", "resolve"] = "curvature"
    """How dJ/du_0 is found: from the Hessian in the first control, or by solving with it fixed on either side."""
    eps: Literal["equal", "limits"] = "equal"
    """How far the first control is moved for that: 0.1 Nm for each joint, or 1 % of its limit."""
    tau: float = 0.0
    """Barrier of the torque limits in the labels; 0 for none."""
    states: States = "q"
    """States that count in the loss."""
    share: float = 0.0
    """Share of the uniform loss that is mixed into each weighting."""
    kept: int = 0
    """Runs of the data for pretraining that stay in the mix, since they excite what good tracking leaves at rest; -1
    for none."""
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
    validation: int = 0
    """Further payloads, to choose by."""
    protocols: tuple[Weighting, ...] = ()
    """Weightings whose models of every epoch are tested, to compare ways of choosing one."""
    studies: tuple[Study, ...] = ()
    """What else is varied, at the first of `rollouts`."""
    study_seeds: int = 0
    """Fine-tuning runs of each variant and pretrained model."""
    truth: int = 0
    """Moments of each test episode at which labels are checked by branching the closed loop; 0 for no check."""
    damping: float = 0.0
    """Joint damping that the model knows [N m s/rad]; that of the plant is 1."""
    widths: tuple[int, ...] = (30, 20)
    """Layers of the residual's networks."""
    num_contexts: int = 10
    """Size of the context."""
    hidden: int = 24
    """Size of the encoder's LSTMs."""
    num_layers: int = 1
    """Number of LSTMs. One of 24 has no more parameters than the published five of 10, and learns far more in the same
    time."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        numbers = ("models", "seeds", "steps", "epochs", "batch", "tests", "validation", "workers", "dither", "rounds")
        for name in numbers:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if any(not 1 <= p <= panda.HORIZON for p in self.rollouts):
            raise ValueError(f"rollouts must lie in 1..{panda.HORIZON}, the horizon of the MPC, not {self.rollouts}.")
        for name, most in (("tests", 20), ("validation", 10), ("finetune_payloads", 100), ("pretrain_payloads", 100)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, the payloads there are, not {getattr(self, name)}.")
        if self.truth and self.steps and self.steps < 56:
            raise ValueError(f"truth needs episodes of at least 56 steps, not {self.steps}.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}.")
        if self.weightings and "stand" not in self.weightings:
            raise ValueError("weightings must contain 'stand', which all others are compared with.")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        unset = lambda value: value is None or not isinstance(value, float) and not value
        missing = {name: value for name, value in _PRESETS[self.preset].items() if unset(getattr(self, name))}
        config = replace(self, **missing)
        matrices = [name for name in config.weightings if name.startswith("regret")]
        if self.share and matrices:
            raise ValueError(f"share mixes weights of single entries; those of {matrices} are matrices: drop them.")
        return config


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
    chosen = cells(config)
    before = _read(out / "timing.json")
    keep_times = lambda times: write_json(out / "timing.json", _add(before, times))
    with Workers(config.workers, monitor, keep_times) as workers:
        _excite(config, out, workers)
        _pretrain(out, workers, {f"pretrained-{m}": (config, m) for m in range(config.models)})
        _test(out, workers, _baselines(config))
        for part in _parts(chosen):
            _pretrain(out, workers, {cell.start: (cell.config(config), cell.model) for cell in part})
            for number in range(1, 1 + max(cell.config(config).rounds for cell in part)):
                mine = [cell for cell in part if cell.config(config).rounds >= number]
                _collect(config, out, workers, mine, number)
                _finetune(config, out, workers, mine, number)
            _test(
                out,
                workers,
                {c.final(config): ("model", config, c.final(config), c.model == c.seed == 0) for c in part},
            )
            gather(config, out)  # so that what there is can be looked at
        _protocols(config, out, workers, chosen)
        _truth(config, out, workers, chosen)
    gather(config, out)
    write_json(out / "finished.json", {"command": command})


def _parts(chosen: list[Cell]) -> list[list[Cell]]:
    """Cells of the same study, p and seed, in their order: after each part there is something to look at."""
    keys = dict.fromkeys((cell.study, cell.p, cell.seed) for cell in chosen)
    return [[cell for cell in chosen if (cell.study, cell.p, cell.seed) == key] for key in keys]


def _excite(config: Config, out: Path, workers: Workers) -> None:
    """Data for pretraining."""
    runs = stages.runs("pretrain", 0, config.pretrain_payloads, config.steps, config.pretrain_references)
    todo = []
    for i, part in enumerate(np.array_split(np.arange(len(runs.payloads)), 2)):
        some = stages.Runs([runs.payloads[j] for j in part], runs.refs[part])
        todo.append(Job(out / "parts" / f"excite-{i}.npz", stages.excite, (some, config.steps)))
    workers.run("collect", todo)


def _pretrain(out: Path, workers: Workers, starts: dict[str, tuple[Config, int]]) -> None:
    files = sorted((out / "parts").glob("excite-*.npz"))
    todo = [Job(out / "models" / f"{name}.npz", jobs.pretrain, (files, *args)) for name, args in starts.items()]
    workers.run("pretrain", todo)


def _collect(config: Config, out: Path, workers: Workers, chosen: list[Cell], number: int) -> None:
    """Closed loops of the models that drive in a round (in the first, the pretrained ones), and their labels."""
    drives: dict[Path, Job] = {}
    labels: dict[Path, Job] = {}
    for cell in chosen:
        mine = cell.config(config)
        source = f"pretrained-{cell.model}" if number == 1 else f"{cell.name}-r{number - 1}"
        model = out / "models" / f"{source}.npz"
        runs = stages.runs("finetune", 0, mine.finetune_payloads, mine.steps, offset=number)
        for file, part in jobs.driven(out, source, number, mine.finetune_payloads):
            some = stages.Runs([runs.payloads[j] for j in part], runs.refs[part])
            drives[file] = Job(file, jobs.drive, (some, model, mine, number))
        excited = sorted((out / "parts").glob("excite-*.npz"))
        for file, part in jobs.kept(out, source, number, mine.kept):
            drives[file] = Job(file, jobs.keep, (excited, part, mine.kept))
        if cell.method in NEEDS_LABELS:
            for file in jobs.data_of(out, source, number, mine):
                target = out / cell.labels / file.name
                labels[target] = Job(target, jobs.label, (file, model, mine))
    workers.run("drive", list(drives.values()))
    workers.run("label", list(labels.values()))


def _finetune(config: Config, out: Path, workers: Workers, chosen: list[Cell], number: int) -> None:
    todo = []
    for cell in chosen:
        mine = cell.config(config)
        start = cell.start if number == 1 else f"{cell.name}-r{number - 1}"
        sources = [(f"pretrained-{cell.model}", 1), *((f"{cell.name}-r{n - 1}", n) for n in range(2, number + 1))]
        files = tuple(path for source, n in sources for path in jobs.data_of(out, source, n, mine))
        output = out / "models" / f"{cell.name}-r{number}.npz"
        todo.append(Job(output, jobs.finetune, (out / "models" / f"{start}.npz", files, cell, mine)))
    workers.run("fine-tune", todo)


def _baselines(config: Config) -> dict[str, tuple]:
    known = {kind: (kind, config, None, True) for kind in ("nominal", "oracle", "oracle_damping")}
    return known | {f"pretrained-{m}": ("model", config, f"pretrained-{m}", True) for m in range(config.models)}


def _test(out: Path, workers: Workers, what: dict[str, tuple]) -> None:
    todo = []
    for name, (kind, config, model, episodes) in what.items():
        path = None if model is None else out / "models" / f"{model}.npz"
        todo.append(Job(out / "tests" / f"{name}.json", jobs.test, (kind, path, config, episodes)))
    workers.run("test", todo)


def _protocols(config: Config, out: Path, workers: Workers, chosen: list[Cell]) -> None:
    """Tests of the epochs before the last, of some weightings at the first p."""
    mine = [c for c in chosen if c.study == "main" and c.p == config.rollouts[0] and c.method in config.protocols]
    names = [f"epochs/{cell.final(config)}-e{epoch}" for cell in mine for epoch in range(1, config.epochs)]
    _test(out, workers, {name: ("model", config, name, False) for name in names})


def _truth(config: Config, out: Path, workers: Workers, chosen: list[Cell]) -> None:
    if not config.truth:
        return
    p = config.rollouts[0]
    todo = [
        Job(
            out / "truth" / f"model-{m}.npz",
            check,
            (out / "models" / f"{Cell(m, 'stand', p, 0).final(config)}.npz", config),
        )
        for m in range(config.models)
    ]
    workers.run("truth", todo)
    main = [cell for cell in chosen if cell.study == "main" and cell.p == p]
    todo = []
    for m in range(config.models):
        names = [f"pretrained-{m}", *(cell.final(config) for cell in main if cell.model == m)]
        files = tuple(jobs.data_of(out, f"pretrained-{m}", 1, config))
        todo.append(Job(out / "truth" / f"losses-{m}.json", agreement, (files, out / "models", names, config)))
    workers.run("losses", todo)


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
