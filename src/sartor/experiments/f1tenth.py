"""The racing car: a small network corrects a model with linear tyres, fine-tuned under several weightings.

    gather    the plant drives gently around the training tracks, at changing speeds and with noise
    pretrain  a network of each size, on rollouts of those drives with standardised errors
    drive     the MPC with the pretrained model drives as fast as it can, on the same tracks
    label     these drives, with the MPC's sensitivities, for each size
    tune      fine-tune under a weighting, and race on tracks and friction that no training has seen

Weightings: `ones`, `stand` (1/standard deviation), `norm` (1/range), `ours` (the sensitivities), `ours_avg` (their mean
over samples), `ours_shuffled` (each sample has the label of another), `regret` (errors that change the first control).
"""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from sartor import racing
from sartor.experiments.f1tenth_world import PENALTY, gentle, plant, track
from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.presets import check_least, filled
from sartor.experiments.run_folder import opened
from sartor.files import load_arrays, load_tree, read_json, save_arrays, save_tree, write_json
from sartor.models.vehicle import AbstractVehicle, Corrected, Kinematic, LinearTyre, SingleTrack, corrected, f1tenth
from sartor.racing_labels import label_windows
from sartor.racing_training import PREDICTED, CarSamples, Drive, cut, loss_on
from sartor.solution import RESULTS
from sartor.systems import racing_car
from sartor.train import Config as Training
from sartor.train import optimise
from sartor.weights import Weights, constant, from_factors, from_labels

Weighting = Literal["ones", "stand", "norm", "ours", "ours_avg", "ours_shuffled", "regret"]
WEIGHTINGS: tuple[Weighting, ...] = Weighting.__args__
_PRETRAIN_STEPS = 10  # p of the rollouts in pretraining
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        tracks=1, tests=1, seeds=1, sizes=(4,), rollouts=(4,), weightings=("stand", "ours"), horizon=20, gather=120,
        steps=90, stride=20, pretrain_epochs=2, epochs=1,
    ),
    "quick": dict(
        tracks=4, tests=2, seeds=1, sizes=(8,), rollouts=(20,), weightings=("stand", "ours", "ours_shuffled"),
        horizon=40, gather=1200, steps=600, stride=6, pretrain_epochs=150, epochs=20,
    ),
    "paper": dict(
        tracks=4, tests=8, seeds=5, sizes=(4, 8, 16, 32), rollouts=(20, 4, 40), weightings=WEIGHTINGS, horizon=40,
        gather=2400, steps=1200, stride=4, pretrain_epochs=300, epochs=30,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The racing car. Numbers that are 0 and what is empty come from the preset."""

    experiment: Annotated[Literal["f1tenth"], tyro.conf.Suppress] = "f1tenth"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes minutes, `paper` hours."""
    tracks: int = 0
    """Tracks of the data."""
    tests: int = 0
    """Held-out tracks, each with friction of its own."""
    seeds: int = 0
    """Networks to begin with, and orders of the samples."""
    sizes: tuple[int, ...] = ()
    """Hidden units of the networks."""
    rollouts: tuple[int, ...] = ()
    """Lengths p of the rollouts in the loss; sizes but the second are compared at the first alone."""
    weightings: tuple[Weighting, ...] = ()
    """Loss weights to compare; `stand` is what the others are compared with."""
    horizon: int = 0
    """Of the MPC, in steps of 0.033 s."""
    gather: int = 0
    """Control steps of a gentle drive."""
    steps: int = 0
    """Control steps of a drive by the MPC."""
    stride: int = 0
    """Every so many samples of those are used."""
    pretrain_epochs: int = 0
    """Passes over the gentle drives."""
    epochs: int = 0
    """Passes over the others."""
    learning_rate: float = 1e-3
    """Of fine-tuning."""
    batch: int = 64
    """Samples of a gradient step."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        names = ("tracks", "tests", "seeds", "sizes", "rollouts", "horizon", "gather", "steps", "stride", "workers",
                 "pretrain_epochs", "epochs")  # fmt: skip
        check_least(self, 0, *names)
        check_least(self, 1, "batch")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        config = filled(self, _PRESETS[self.preset])
        longest = max(max(config.rollouts), config.horizon)
        if config.steps <= longest:
            raise ValueError(f"steps must be more than {longest}, the horizon and the longest rollout.")
        return config


class Trial(NamedTuple):
    """One fine-tuning."""

    size: int
    p: int
    weighting: Weighting
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.size}-{self.p}-{self.weighting}-{self.seed}"


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every stage and trial leaves its file, and `trials.json` holds all races.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    models = [(size, seed) for seed in range(config.seeds) for size in config.sizes]
    trials = _trials(config)
    files = [out / "trials" / f"{trial.name}.json" for trial in trials]
    baselines = [out / "baselines" / f"{name}.json" for name in _baselines(config)]
    with opened(out, config, monitor, command) as workers:
        workers.run("gather", [Job(out / "gather" / f"{i}.npz", gather, (i, config)) for i in range(config.tracks)])
        workers.run("pretrain", [Job(_model(out, *m), pretrain, (*m, config)) for m in models])
        driver = config.sizes[len(config.sizes) // 2]
        drives = [Job(out / "drives" / f"{i}.npz", drive, (i, driver, config)) for i in range(config.tracks)]
        workers.run("drive", drives)
        workers.run("label", [Job(out / "labels" / f"{a}-{b}.npz", label, (a, b, config)) for a, b in models])
        workers.run("tune", [Job(file, tune, (trial, config)) for file, trial in zip(files, trials, strict=True)])
        names = zip(baselines, _baselines(config), strict=True)
        workers.run("baselines", [Job(file, baseline, (name, config)) for file, name in names])
        rows = [row for file in (*baselines, *files) for row in read_json(file)]
        write_json(out / "trials.json", {"rows": rows})


def gather(output: Path, number: int, config: Config, monitor: Any) -> None:
    """A gentle drive around a training track."""
    _save_drive(output, *gentle(number, config.gather, seed=number))


def pretrain(output: Path, size: int, seed: int, config: Config, monitor: Any) -> None:
    """A network on the gentle drives."""
    samples = cut(_drives(output.parents[1] / "gather", config), _PRETRAIN_STEPS)
    weights = _weights("stand", samples, {}, _PRETRAIN_STEPS, 0)
    training = Training(config.pretrain_epochs, config.batch, learning_rate=5e-3, seed=seed)
    begin = corrected(_linear(), size, jax.random.key(seed))
    model, _ = optimise(_loss(config.tracks), begin, (samples, weights), training, monitor=monitor)
    save_tree(output, model.network)


def drive(output: Path, number: int, size: int, config: Config, monitor: Any) -> None:
    """The MPC with a pretrained model, as fast as it can."""
    model = _load(_model(output.parents[1], size, 0), size)
    ran = _race(model, number, config, config.steps)
    _save_drive(output, *map(np.asarray, (ran.xs, ran.us, ran.contact)))


def label(output: Path, size: int, seed: int, config: Config, monitor: Any) -> None:
    """Labels of the samples of fine-tuning under a pretrained model."""
    model = _load(_model(output.parents[1], size, seed), size)
    samples = _samples(output.parents[1], config)
    found: list[Any] = [None] * samples.size
    for number in range(config.tracks):
        which = np.flatnonzero(samples.track == number)
        xs = np.concatenate([samples.x0[which, None], samples.xs[which]], 1)[:, : config.horizon + 1]
        theta = racing_car.Theta(model, track(number))
        labels = label_windows(theta, config.horizon, xs, samples.us[which, : config.horizon])
        for i, entry in zip(which, zip(*labels, strict=True), strict=True):
            found[i] = entry
        monitor(number + 1, config.tracks)
    S, du0_de, Lambda, ok = (np.array(column) for column in zip(*found, strict=True))
    save_arrays(output, S=S.astype(np.float32), du0_de=du0_de.astype(np.float32), Lambda=Lambda, ok=ok)


def tune(output: Path, trial: Trial, config: Config, monitor: Any) -> None:
    """Fine-tune, and race on the held-out tracks."""
    folder, begun = output.parents[1], time.perf_counter()
    samples, labels = _samples(folder, config), load_arrays(folder / "labels" / f"{trial.size}-{trial.seed}.npz")
    samples, labels = samples.take(labels["ok"]), {name: value[labels["ok"]] for name, value in labels.items()}
    weights = _weights(trial.weighting, samples, labels, trial.p, trial.seed)
    model = _load(_model(folder, trial.size, trial.seed), trial.size)
    training = Training(config.epochs, config.batch, learning_rate=config.learning_rate, seed=trial.seed)
    watch = lambda done, total: monitor(done, 2 * total)
    model, curve = optimise(_loss(config.tracks), model, (samples, weights), training, monitor=watch)
    save_tree(output.with_suffix(".npz"), model.network)
    rows = _tested(model, config)
    took = time.perf_counter() - begun
    content = [{**trial._asdict(), "method": trial.weighting, "loss": curve.train[-1], "time": took, **r} for r in rows]
    write_json(output, content)


def baseline(output: Path, name: str, config: Config, monitor: Any) -> None:
    """Race with a model that is not fine-tuned."""
    kind, _, number = name.partition("-")
    size, _, seed = number.partition("-")
    known: dict[str, AbstractVehicle] = {
        "linear": _linear(), "kinematic": Kinematic(), "published": f1tenth(), "oracle": plant(0).vehicle,
    }  # fmt: skip
    model = known.get(kind) or _load(_model(output.parents[1], int(size), int(seed)), int(size))
    begun = time.perf_counter()
    rows = _tested(model, config)
    about = {"size": int(size or 0), "p": 0, "weighting": "", "seed": int(seed or 0), "method": kind, "loss": None}
    write_json(output, [{**about, "time": time.perf_counter() - begun, **row} for row in rows])


def _trials(config: Config) -> list[Trial]:
    """All weightings for each size and the first p; one size for the other p."""
    main, *others = config.rollouts
    middle = config.sizes[len(config.sizes) // 2]
    kinds = [(size, main) for size in config.sizes] + [(middle, p) for p in others]
    return [Trial(*kind, w, seed) for seed in range(config.seeds) for kind in kinds for w in config.weightings]


def _baselines(config: Config) -> list[str]:
    models = [f"pretrained-{size}-{seed}" for seed in range(config.seeds) for size in config.sizes]
    return ["linear", "kinematic", "published", "oracle", *models]


def _tested(model: AbstractVehicle, config: Config) -> list[dict[str, Any]]:
    """One row for each held-out track."""
    rows = []
    for test in range(config.tests):
        ran = _race(model, -1 - test, config, config.steps)
        s, touching = np.asarray(ran.xs[:, 0]), np.asarray(ran.contact) > 0
        lap = float(racing.crossings(s, np.array([track(-1 - test).length]))[0])
        rate = float(s[-1]) / (racing_car.DT * config.steps)  # [m/s]
        seconds = racing_car.DT * float(touching.sum())
        # Time for a lap's length at the mean speed, and what contact with walls costs.
        J = float(track(-1 - test).length) * (1.0 / rate + PENALTY * seconds / float(s[-1])) if s[-1] > 1 else None
        failed = int(jnp.sum(ran.results != RESULTS.successful))
        contacts = int(np.sum(touching[1:] & ~touching[:-1]))
        rows.append({
            "test": test, "J": J, "lap": lap if np.isfinite(lap) else None, "distance": float(s[-1]),
            "contact": seconds, "contacts": contacts, "failed": failed,
        })  # fmt: skip
    return rows


def _race(model: AbstractVehicle, number: int, config: Config, steps: int) -> racing.Race:
    theta = racing_car.Theta(model, track(number))
    begin = racing_car.at_rest(0.0, 2.0)
    return racing.race(
        plant(number), racing_car.controller(theta, config.horizon), begin, steps, jax.random.key(number + 100)
    )


def _weights(
    weighting: Weighting, samples: CarSamples, labels: dict[str, np.ndarray], num_steps: int, seed: int
) -> Weights:
    x = samples.xs.reshape(-1, samples.xs.shape[-1])
    same = lambda sizes: constant(np.where(PREDICTED, sizes, 1.0), samples.size, num_steps, PREDICTED)
    if weighting == "ones":
        return same(np.ones(x.shape[1]))
    if weighting == "stand":
        return same(1.0 / np.maximum(x.std(0), 1e-9))
    if weighting == "norm":
        return same(1.0 / np.maximum(np.ptp(x, 0), 1e-9))
    if weighting == "regret":
        values, vectors = np.linalg.eigh(labels["Lambda"])
        root = np.einsum("bij,bj,bkj->bik", vectors, np.sqrt(np.maximum(values, 0.0)), vectors)
        return from_factors(np.einsum("bij,bjkx->bikx", root, labels["du0_de"]), num_steps, PREDICTED, quantile=0.98)
    S = np.asarray(labels["S"], float)
    if weighting == "ours_avg":
        S = np.broadcast_to(S.mean(0), S.shape)
    elif weighting == "ours_shuffled":
        S = S[np.random.default_rng(seed).permutation(len(S))]
    return from_labels(S, num_steps, PREDICTED, quantile=0.98)


def _linear() -> SingleTrack:
    return SingleTrack(front=LinearTyre(), rear=LinearTyre())


@cache
def _loss(tracks: int) -> Any:
    return loss_on([track(i) for i in range(tracks)])


def _model(out: Path, size: int, seed: int) -> Path:
    return out / "pretrained" / f"{size}-{seed}.npz"


def _load(path: Path, size: int) -> Corrected:
    like = corrected(_linear(), size, jax.random.key(0))
    return eqx.tree_at(lambda model: model.network, like, load_tree(path, like.network))


def _save_drive(path: Path, xs: np.ndarray, us: np.ndarray, contact: np.ndarray) -> None:
    save_arrays(path, xs=xs, us=us, clear=np.concatenate([[True], contact <= 0.0]))


def _drives(folder: Path, config: Config) -> list[Drive]:
    return [Drive(**load_arrays(folder / f"{i}.npz"), track=i) for i in range(config.tracks)]  # pyright: ignore


def _samples(out: Path, config: Config) -> CarSamples:
    """Those of fine-tuning: long enough for a label and for the longest rollout."""
    return cut(_drives(out / "drives", config), max(config.horizon, *config.rollouts), config.stride)
