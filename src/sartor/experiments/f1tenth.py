"""The racing car: a small network corrects a model with linear tyres, fine-tuned under several weightings.

    gather    the plant drives gently around the training tracks, at changing speeds and with noise
    pretrain  a network of each size, on rollouts of those drives with standardised errors
    drive     the MPC with pretrained models drives as fast as it can, on the same tracks
    teach     a large network, on these drives
    label     these drives, with the sensitivities of the MPC with that network
    map       what the labels see along a lap, and what branching the plant says of them
    tune      fine-tune under a weighting, and race on tracks and friction that no training has seen

Weightings: `ones`, `stand` (1/standard deviation), `norm` (1/range), `ours` (the sensitivities to errors of the
dynamics), `ours_trajectory` (to errors of the predicted trajectory), `ours_avg` (the mean of `ours` over samples),
`ours_shuffled` (each sample has the label of another), `regret` (errors that change the first control, a matrix),
`regret_avg` (the diagonal of its mean over samples: each error by itself).
"""

from pathlib import Path

from sartor.experiments import f1tenth_jobs as jobs
from sartor.experiments import f1tenth_maps as maps
from sartor.experiments.f1tenth_config import CHIEF, Config, Trial
from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.run_folder import opened
from sartor.files import read_json, write_json


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every stage and trial leaves its file, and `trials.json` holds all races.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    models = [(size, seed) for seed in range(config.seeds) for size in config.sizes]
    trials = _trials(config)
    files = [out / "trials" / f"{trial.name}.json" for trial in trials]
    baselines = [out / "baselines" / f"{name}.json" for name in _baselines(config)]
    stage = lambda name, job, keys: [Job(out / name / f"{'-'.join(map(str, k))}.npz", job, (*k, config)) for k in keys]
    with opened(out, config, monitor, command) as workers:
        tracks, tests = ([(i,) for i in range(n)] for n in (config.tracks, config.tests))
        drivers = [(size, seed) for size, seed in models if seed < config.drivers]
        workers.run("gather", stage("gather", jobs.gather, tracks))
        workers.run("pretrain", stage("pretrained", jobs.pretrain, models))
        workers.run("drive", stage("drives", jobs.drive, [(*key, i) for key in drivers for (i,) in tracks]))
        workers.run("teach", [Job(out / "teacher.npz", jobs.teach, (config,))])
        workers.run("label", stage("labels", jobs.label, tracks))
        branches = stage("truth", maps.branched, tests)
        workers.run("map", [Job(out / "maps.npz", maps.lap_map, (config,)), *branches])
        workers.run("phases", [Job(out / "phases.json", maps.lap_phases, (config,))])
        workers.run("truth", [Job(out / "truth.json", maps.truth, ([job.output for job in branches], config))])
        workers.run("clip", [Job(out / "clip.webp", maps.film, (config,))])
        names = zip(baselines, _baselines(config), strict=True)
        workers.run("baselines", [Job(file, jobs.baseline, (name, config)) for file, name in names])
        workers.run("tune", [Job(file, jobs.tune, (trial, config)) for file, trial in zip(files, trials, strict=True)])
        rows = [row for file in (*baselines, *files) for row in read_json(file)]
        write_json(out / "trials.json", {"rows": rows})


def _trials(config: Config) -> list[Trial]:
    """Seed by seed: each size at the first p, and the middle size at the others."""
    main, *others = config.rollouts
    kinds = [(size, main) for size in config.sizes] + [(config.middle, p) for p in others]
    return [
        Trial(*kind, weighting, seed)
        for seed in range(config.seeds) for kind in kinds for weighting in config.weightings
        if weighting in CHIEF or kind == (config.middle, main)
    ]  # fmt: skip


def _baselines(config: Config) -> list[str]:
    models = [f"pretrained-{size}-{seed}" for seed in range(config.seeds) for size in config.sizes]
    return ["linear", "kinematic", "published", "oracle", "teacher", *models]
