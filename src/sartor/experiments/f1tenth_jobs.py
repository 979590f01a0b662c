"""Jobs of the racing experiment: drives, models, labels, fine-tuning and races."""

import time
from functools import cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sartor import racing
from sartor.experiments.f1tenth_config import Config, Trial, Weighting
from sartor.experiments.f1tenth_world import PENALTY, gentle, plant, track
from sartor.files import load_arrays, load_tree, save_arrays, save_tree, write_json
from sartor.models.vehicle import (
    SLOWEST,
    AbstractVehicle,
    Corrected,
    Kinematic,
    LinearTyre,
    SingleTrack,
    corrected,
    f1tenth,
)  # fmt: skip
from sartor.racing_labels import label_windows
from sartor.racing_training import PREDICTED, CarSamples, Drive, cut, loss_on
from sartor.solution import RESULTS
from sartor.systems import racing_car
from sartor.train import Config as Training
from sartor.train import Curve, optimise
from sartor.weights import Weights, constant, from_factors, from_labels, regret_factors

_PRETRAIN_STEPS, _PRETRAIN_STRIDE = 10, 2  # p of the rollouts in pretraining
_LONG = 20  # p above which the learning rate is another
_CAREFUL = 0.08  # margin to the walls where the MPC gathers data [m]
EPS = (0.1, 0.02)
"""ε of the labels, and by which the truth check moves controls [m/s, rad]."""
QUANTILE = 0.98
"""Where labels are clipped: single ones are a hundred times as large as most."""


def gather(output: Path, number: int, config: Config, monitor: Any) -> None:
    """A gentle drive around a training track."""
    xs, us, contact = gentle(number, config.gather, seed=number)
    _save_drive(output, xs, us, contact, number)


def pretrain(output: Path, size: int, seed: int, config: Config, monitor: Any) -> None:
    """A network on the gentle drives."""
    samples = cut(drives(output.parents[1] / "gather"), _PRETRAIN_STEPS, _PRETRAIN_STRIDE)
    weights = _weights("stand", samples, {}, _PRETRAIN_STEPS, 0)
    begin = corrected(linear(), size, jax.random.key(seed))
    model, _ = _fitted(begin, samples, weights, config.pretrain_epochs, seed, config, monitor)
    save_tree(output, model.network)


def drive(output: Path, size: int, seed: int, number: int, config: Config, monitor: Any) -> None:
    """The MPC with a pretrained model, as fast as it can."""
    ran = _race(load(output.parents[1], size, seed), number, config, config.drive, _CAREFUL)
    _save_drive(output, np.asarray(ran.measured), np.asarray(ran.us), np.asarray(ran.contact), number)


def teach(output: Path, config: Config, monitor: Any) -> None:
    """The large network, trained on all drives."""
    samples = cut(drives(output.parent / "drives"), _PRETRAIN_STEPS, config.stride)
    weights = _weights("stand", samples, {}, _PRETRAIN_STEPS, 0)
    begin = corrected(linear(), config.teacher, jax.random.key(0))
    model, _ = _fitted(begin, samples, weights, config.epochs, 0, config, monitor)
    save_tree(output, model.network)


def label(output: Path, number: int, config: Config, monitor: Any) -> None:
    """Labels of the samples of fine-tuning on a track, by the MPC of the teacher, whichever model is tuned."""
    samples = tuning_samples(output.parents[1], config)
    on = samples.take(samples.track == number)
    if not on.size:
        raise ValueError(
            f"no drive on track {number} stays clear of the walls for long enough: raise drive or drivers."
        )
    xs = np.concatenate([on.x0[:, None], on.xs], 1)[:, : config.horizon + 1]
    theta, begun = racing_car.Theta(teacher(output.parents[1], config), track(number)), time.perf_counter()
    labels = label_windows(theta, config.horizon, xs, on.us[:, : config.horizon], eps=jnp.asarray(EPS))
    rate = on.size / (time.perf_counter() - begun)
    large = {name: getattr(labels, name).astype(np.float32) for name in ("S", "du0_de", "du0_derror")}
    small = {name: getattr(labels, name) for name in ("dJ_du0", "Lambda", "ok")}
    save_arrays(output, **large, **small, rate=np.array(rate))


def tune(output: Path, trial: Trial, config: Config, monitor: Any) -> None:
    """Fine-tune, and race on the held-out tracks."""
    folder, begun = output.parents[1], time.perf_counter()
    samples, labels = labelled_samples(folder, config)
    ok = labels["ok"] & (samples.clear >= trial.p)
    samples, labels = samples.take(ok), {name: value[ok] for name, value in labels.items()}
    weights = _weights(trial.weighting, samples, labels, trial.p, trial.seed)
    begin, watch = load(folder, trial.size, trial.seed), lambda done, total: monitor(done, 2 * total)
    model, curve = _fitted(begin, samples, weights, config.epochs, trial.seed, config, watch)
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
        "linear": linear(), "kinematic": Kinematic(), "published": f1tenth(), "oracle": plant(0).vehicle,
    }  # fmt: skip
    model = known.get(kind)
    if model is None:
        model = (
            teacher(output.parents[1], config) if kind == "teacher" else load(output.parents[1], int(size), int(seed))
        )
    begun = time.perf_counter()
    rows = _tested(model, config)
    about = {"size": int(size or 0), "p": 0, "weighting": "", "seed": int(seed or 0), "method": kind, "loss": None}
    write_json(output, [{**about, "time": time.perf_counter() - begun, **row} for row in rows])


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


def _race(
    model: AbstractVehicle, number: int, config: Config, steps: int, margin: float = racing_car.MARGIN
) -> racing.Race:
    theta = racing_car.Theta(model, track(number), margin=margin)
    begin = racing_car.rolling(0.0, 2.0)
    return racing.race(
        plant(number), racing_car.controller(theta, config.horizon), begin, steps, jax.random.key(number + 100)
    )


def _weights(
    weighting: Weighting, samples: CarSamples, labels: dict[str, np.ndarray], num_steps: int, seed: int
) -> Weights:
    x = samples.xs - samples.x0[:, None] * (np.arange(9) == 0)  # a car that has driven far has no larger errors of s
    x = x.reshape(-1, x.shape[-1])
    same = lambda sizes: constant(np.where(PREDICTED, sizes, 1.0), samples.size, num_steps, PREDICTED)
    if weighting == "ones":
        return same(np.ones(x.shape[1]))
    if weighting == "stand":
        return same(1.0 / np.maximum(x.std(0), 1e-9))
    if weighting == "norm":
        return same(1.0 / np.maximum(np.ptp(x, 0), 1e-9))
    if weighting.startswith("regret"):  # of the errors of a rollout, which its loss sees
        factors = regret_factors(labels["Lambda"], labels["du0_derror"])
        regret = from_factors(factors, num_steps, PREDICTED, quantile=QUANTILE)
        if weighting == "regret":
            return regret
        # The diagonal of the mean matrix, whose square root is a weight of each error by itself.
        return _everywhere(np.sqrt(np.mean(np.sum(np.asarray(regret.F) ** 2, 1), 0)), samples.size)
    S = np.asarray(labels["S"], float)
    if weighting == "ours_trajectory":
        S = np.abs(np.einsum("bj,bjkx->bkx", labels["dJ_du0"], labels["du0_derror"]))
    elif weighting == "ours_shuffled":
        S = S[np.random.default_rng(seed).permutation(len(S))]
    own = from_labels(S, num_steps, PREDICTED, quantile=QUANTILE)
    return _everywhere(np.asarray(own.W).mean(0), samples.size) if weighting == "ours_avg" else own


def _everywhere(W: np.ndarray, size: int) -> Weights:
    """The same weights (p, 9) for all samples."""
    return from_labels(np.broadcast_to(W, (size, *W.shape)), len(W), PREDICTED, quantile=1.0)


def linear() -> SingleTrack:
    """What a user without tyre data has."""
    return SingleTrack(front=LinearTyre(), rear=LinearTyre())


def _fitted(
    begin: Corrected, samples: CarSamples, weights: Weights, epochs: int, seed: int, config: Config, monitor: Any
) -> tuple[Corrected, Curve]:
    """Trained in single precision, to drive in double."""
    long = jax.tree.leaves(weights)[0].shape[-2] > _LONG
    rate = config.long_learning_rate if long else config.learning_rate
    training = Training(epochs, config.batch, learning_rate=rate, seed=seed)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf, begin)
    model, curve = optimise(_loss(config.tracks), small, (samples, weights), training, monitor=monitor)
    return jax.tree.map(lambda leaf: leaf.astype(float) if eqx.is_array(leaf) else leaf, model), curve


@cache
def _loss(tracks: int) -> Any:
    return loss_on([track(i) for i in range(tracks)])


def load(out: Path, size: int, seed: int) -> Corrected:
    """A pretrained model of the run."""
    return _loaded(out / "pretrained" / f"{size}-{seed}.npz", size)


def teacher(out: Path, config: Config) -> Corrected:
    """The large model of the run."""
    return _loaded(out / "teacher.npz", config.teacher)


def _loaded(path: Path, size: int) -> Corrected:
    like = corrected(linear(), size, jax.random.key(0))
    return eqx.tree_at(lambda model: model.network, like, load_tree(path, like.network))


def _save_drive(path: Path, xs: np.ndarray, us: np.ndarray, contact: np.ndarray, number: int) -> None:
    """What no model is meant for is left out of training as contact is: a car that hardly rolls, or has spun."""
    driving = (xs[:, 3] > SLOWEST) & (np.abs(xs[:, 2]) < 0.5 * np.pi)
    save_arrays(path, xs=xs, us=us, clear=driving & np.concatenate([[True], contact <= 0.0]), track=np.array(number))


def drives(folder: Path) -> list[Drive]:
    """The drives in a folder, by the names of their files."""
    found = [load_arrays(path) for path in sorted(folder.glob("*.npz"))]
    return [Drive(f["xs"], f["us"], f["clear"], int(f["track"])) for f in found]


def tuning_samples(out: Path, config: Config) -> CarSamples:
    """Those of fine-tuning: as long as the horizon of a label, clear of walls for the shortest rollout."""
    return cut(drives(out / "drives"), config.horizon, config.stride, clear=min(config.rollouts))


def labelled_samples(out: Path, config: Config) -> tuple[CarSamples, dict[str, np.ndarray]]:
    """The samples of fine-tuning track by track, with their labels."""
    samples = tuning_samples(out, config)
    order = np.argsort(samples.track, kind="stable")
    parts = [load_arrays(out / "labels" / f"{number}.npz") for number in range(config.tracks)]
    names = [name for name in parts[0] if name != "rate"]
    return samples.take(order), {name: np.concatenate([part[name] for part in parts]) for name in names}
