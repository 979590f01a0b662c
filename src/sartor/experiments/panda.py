"""Tailor a Panda's dynamics model to its tracking task: collect, pretrain, label, fine-tune under each weighting, test.

The experiment of Węgrzynowski et al., Learning What Matters, section IV, on MuJoCo. Every job leaves one file in the
run folder, so an interrupted run goes on where it was. `sartor.report` reads the folder; its files are

    config.json, environment.json, timing.json, data.json    what was run, on what, how long it took, counts
    evaluations.parquet, curves.parquet                      one row for each test episode; one for each epoch
    labels.json, maps.npz                                    statistics and mean maps of the labels
    truth.json                                               labels against branches of the simulated closed loop
    traces.npz, spectrum.npz                                 tracking errors
    speed.json                                               sizes of the networks, time of a control step
    models/                                                  the models
"""

from pathlib import Path

import numpy as np

from sartor.experiments import panda_jobs as jobs
from sartor.experiments import panda_stages as stages
from sartor.experiments.jobs import Job, Monitor, Workers
from sartor.experiments.panda_config import NEEDS_LABELS, Config
from sartor.experiments.panda_gather import gather
from sartor.experiments.panda_studies import Cell, cells
from sartor.experiments.panda_truth import agreement, check, moments, truth_files
from sartor.experiments.run_folder import opened


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
    chosen = cells(config)
    with opened(out, config, monitor, command) as workers:
        _excite(config, out, workers)
        _pretrain(out, workers, {f"pretrained-{m}": (config, m) for m in range(config.models)})
        _test(out, workers, _baselines(config))
        first = [cell for cell in chosen if cell.p == config.rollouts[0]]
        for part in _parts(first):
            _compare(config, out, workers, part)
        _speed(config, out, workers, chosen)
        _truth(config, out, workers, chosen)
        _protocols(config, out, workers, chosen)
        for part in _parts([cell for cell in chosen if cell not in first]):
            _compare(config, out, workers, part)
        gather(config, out)


def _compare(config: Config, out: Path, workers: Workers, part: list[Cell]) -> None:
    """Collect, label, fine-tune and test for some of the models."""
    tests = {c.final(config): ("model", config, c.final(config), c.model == c.seed == 0) for c in part}
    if all((out / "tests" / f"{name}.json").exists() for name in tests):
        return
    _pretrain(out, workers, {cell.start: (cell.config(config), cell.model) for cell in part})
    for number in range(1, 1 + max(cell.config(config).rounds for cell in part)):
        mine = [cell for cell in part if cell.config(config).rounds >= number]
        _collect(config, out, workers, mine, number)
        _finetune(config, out, workers, mine, number)
    _test(out, workers, tests)
    gather(config, out)  # so that what there is can be looked at


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


def _speed(config: Config, out: Path, workers: Workers, chosen: list[Cell]) -> None:
    """Control steps with networks of all sizes, one after the other: they would slow each other down."""
    if config.steps < jobs.TIMED_STEPS:
        return
    for cell in [Cell(0, "stand", config.rollouts[0], 0), *(c for c in chosen if c.study == "capacity")]:
        model = out / "models" / f"{cell.start}.npz"
        workers.run("time", [Job(out / "speed" / f"{cell.start}.json", jobs.speed, (model, cell.config(config)))])


def _protocols(config: Config, out: Path, workers: Workers, chosen: list[Cell]) -> None:
    """Tests of the epochs before the last, of some weightings at the first p."""
    mine = [
        c for c in chosen if c.study == "main" and c.p == config.rollouts[0] and c.method in (config.protocols or ())
    ]
    names = [f"epochs/{cell.final(config)}-e{epoch}" for cell in mine for epoch in range(1, config.epochs)]
    _test(out, workers, {name: ("model", config, name, False) for name in names})


def _truth(config: Config, out: Path, workers: Workers, chosen: list[Cell]) -> None:
    if not config.truth:
        return
    p = config.rollouts[0]
    stand = [out / "models" / f"{Cell(m, 'stand', p, 0).final(config)}.npz" for m in range(config.models)]
    files = truth_files(out, config)
    todo = [
        Job(file, check, (model, config, moment))
        for model, of_model in zip(stand, files, strict=True)
        for file, moment in zip(of_model, moments(config), strict=True)
    ]
    workers.run("truth", todo)
    main = [cell for cell in chosen if cell.study == "main" and cell.p == p]
    todo = []
    for m in range(config.models):
        names = [f"pretrained-{m}", *(cell.final(config) for cell in main if cell.model == m)]
        files = tuple(jobs.data_of(out, f"pretrained-{m}", 1, config))
        todo.append(Job(out / "truth" / f"losses-{m}.json", agreement, (files, out / "models", names, config)))
    workers.run("losses", todo)
