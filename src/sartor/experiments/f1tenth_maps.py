"""What the labels of the racing experiment see: a map of a lap, the phases of a lap, and the truth by branching."""

import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sartor import racing
from sartor.experiments import f1tenth_jobs as jobs
from sartor.experiments.f1tenth_config import BEGIN, Config
from sartor.experiments.f1tenth_world import plant, track
from sartor.files import load_arrays, save_arrays, write_json
from sartor.models.vehicle import AbstractVehicle, f1tenth
from sartor.racing_labels import PHASES, SOLVER, label_drive, label_windows, phases, shares
from sartor.racing_training import PREDICTED, CarSamples, rollout_errors
from sartor.solution import guess
from sartor.solve import solve
from sartor.systems import racing_car
from sartor.systems.racing_car import Theta
from sartor.track import Track
from sartor.truth import along, diagonal_regret, ranks
from sartor.weights import effective, explained, from_labels

STEPS_ON = 60  # control steps of a branch, 2 s
_SHOWN = 0  # track of the maps: the first held-out one
_NOTHING = 1e-6  # sensitivity of a control that lies on a bound [its unit per unit of a state]
_POINTS = 200  # of a line of the track


def lap_map(output: Path, config: Config, monitor: Any) -> None:
    """One flying lap on a held-out track under the published tyres, with labels at every control step."""
    number = -1 - _SHOWN
    here, theta = track(number), Theta(f1tenth(), track(number))
    driver = racing_car.controller(theta, config.map_horizon)
    ran = racing.race(plant(number), driver, racing_car.rolling(0.0, 2.0), config.map_steps, jax.random.key(1))
    xs, us, N = np.asarray(ran.xs), np.asarray(ran.us), config.map_horizon
    end = min(BEGIN + int(np.sum(xs[BEGIN:, 0] < xs[BEGIN, 0] + float(here.length))), len(us) - N + 1)
    begun = time.perf_counter()
    labels = label_drive(theta, N, xs[BEGIN : end + N], us[BEGIN : end + N - 1], eps=jnp.asarray(jobs.EPS))
    rate = len(labels.ok) / (time.perf_counter() - begun)
    monitor(2, 3)
    ahead = np.arange(BEGIN, end)[:, None] + np.arange(N + 1)
    plans = _plans(theta, N, jnp.asarray(xs[ahead]), jnp.asarray(us[ahead[:, :-1]]))
    x, sides = xs[BEGIN:end], _lines(here)
    save_arrays(
        output, xs=xs[BEGIN : end + 1], xy=_places(here, x), plan=_places(here, np.asarray(plans)).astype(np.float32),
        heading=np.asarray(jax.vmap(here.heading_at)(jnp.asarray(x[:, 0]))) + x[:, 2], S=labels.S.astype(np.float32),
        ok=labels.ok, du0_de=labels.du0_de.astype(np.float32), rate=np.array(rate), phase=phases(here, x[:, 0]),
        size=_sizes(output.parent, config), **sides,
    )  # fmt: skip


def lap_phases(output: Path, config: Config, monitor: Any) -> None:
    """Which state matters in which phase, under the teacher on the drives, and under the published tyres."""
    out, p = output.parent, config.rollouts[0]
    (samples, labels), lap = jobs.labelled_samples(out, config), load_arrays(out / "maps.npz")
    rates = {i: float(load_arrays(out / "labels" / f"{i}.npz")["rate"]) for i in range(config.tracks)}
    sizes, rows, means = lap["size"], [], []
    for number in range(config.tracks):
        mine = samples.track == number
        about = {"model": f"teacher, {config.teacher} units", "track": number, "rate": rates[number]}
        phase = phases(track(number), samples.x0[mine, 0])
        S, du0_de, ok = (labels[name][mine] for name in ("S", "du0_de", "ok"))
        _tell(about, S, du0_de, ok, phase, sizes, p, rows, means)
    about = {"model": f"published tyres, N = {config.map_horizon}", "track": -1 - _SHOWN, "rate": float(lap["rate"])}
    _tell(about, lap["S"], lap["du0_de"], lap["ok"], lap["phase"], sizes, p, rows, means)
    write_json(output, {"states": racing_car.STATES, "rows": rows, "explained": means})


def _tell(about, S, du0_de, ok, phase, sizes, num_steps, rows, means) -> None:
    rate = about.pop("rate")
    kept, phase = S[ok], phase[ok]
    if not len(kept):
        return
    rows += [
        {**about, "phase": name, "samples": int(np.sum(phase == name)), "shares": share.tolist()}
        for name, share in shares(kept, phase, sizes).items()
    ]
    W = np.asarray(from_labels(kept, num_steps, PREDICTED, quantile=jobs.QUANTILE).W)
    fixed = (np.abs(du0_de[ok]).max((2, 3)) < _NOTHING).mean(0)
    means.append({
        **about, "labels": len(ok), "failed": int(np.sum(~ok)), "mean": explained(W), "phase": _explained_by(W, phase),
        "effective": effective(W), "rate": rate, "fixed": fixed.tolist(),
    })  # fmt: skip


def film(output: Path, config: Config, monitor: Any) -> None:
    """The map as a moving picture."""
    from sartor.figures.racing import clip  # here: matplotlib takes a second that other commands save

    clip(load_arrays(output.parent / "maps.npz"), output)


def branched(output: Path, test: int, config: Config, monitor: Any) -> None:
    """Slopes and curvatures of the closed loop at some moments of a race of the published tyres, and the labels
    there: a car that spins, as a bad model's, has slopes of either sign."""
    number = -1 - test
    theta = Theta(f1tenth(), track(number))
    driver, begin = racing_car.controller(theta, config.horizon), racing_car.rolling(0.0, 2.0)
    steps, key = config.steps, jax.random.key(number + 100)
    ran = racing.race(plant(number), driver, begin, steps, key)
    xs, us = np.asarray(ran.xs), np.asarray(ran.us)
    at = np.linspace(BEGIN, steps - config.horizon - 1, config.truth).astype(int)
    monitor(1, 3)
    found = racing.branches(plant(number), driver, begin, steps, key, jnp.asarray(at), STEPS_ON, jnp.asarray(jobs.EPS))
    monitor(2, 3)
    ahead = at[:, None] + np.arange(config.horizon + 1)
    labels = label_windows(theta, config.horizon, xs[ahead], us[ahead[:, :-1]], eps=jnp.asarray(jobs.EPS))
    slope, curvature = (np.asarray(leaf) for leaf in found)
    save_arrays(output, slope=slope, curvature=curvature, x=xs[at], **labels._asdict())


def truth(output: Path, files: list[Path], config: Config, monitor: Any) -> None:
    """Rank correlations of labels with what branching has shown."""
    parts = [load_arrays(file) for file in files]
    data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    data = {name: value[data["ok"]] for name, value in data.items()}
    flat = lambda values: values[..., np.array(PREDICTED)].reshape(*values.shape[:-2], -1)
    S, du0_de = flat(data["S"]), flat(data["du0_de"])
    diagonal = np.diagonal(data["Lambda"], axis1=1, axis2=2)
    true = along(data["slope"], du0_de)
    compared = {
        ("|dJ/du|", "|slope|"): (data["dJ_du0"], np.abs(data["slope"])),
        ("Λ, diagonal", "curvature"): (diagonal, data["curvature"]),
        ("regret, diagonal of Λ", "regret, true curvature"): (
            diagonal_regret(du0_de, diagonal), diagonal_regret(du0_de, np.maximum(data["curvature"], 0.0))
        ),
        ("ours", "S of eq. 4"): (S, true),
        ("ours_avg", "S of eq. 4"): (np.broadcast_to(S.mean(0), S.shape), true),
        ("ours_shuffled", "S of eq. 4"): (S[np.random.default_rng(0).permutation(len(S))], true),
    }  # fmt: skip
    found = {key: ranks(*pair) for key, pair in compared.items()}
    rows = [
        {"variant": variant, "quantity": what, "n": r.n, "overall": r.overall, "steps": r.within, "samples": r.across}
        for (variant, what), r in found.items()
    ]
    write_json(output, {"rows": rows})


@eqx.filter_jit
def _plans(theta: Theta, horizon: int, xs: Array, us: Array) -> Array:
    """States of the MPC's plans (B, N+1, 9), sought near executed trajectories."""
    plan = lambda xs, us: (
        solve(
            racing_car.problem(horizon, theta.limits), theta, xs[0], solver=SOLVER, guess=guess(xs, us), throw=False
        ).xs
    )
    return jax.vmap(plan)(xs, us)


def _places(here: Track, xs: np.ndarray) -> np.ndarray:
    """x and y [m] of states (..., 9)."""
    flat = jnp.asarray(xs.reshape(-1, 9))
    return np.asarray(jax.vmap(here.place)(flat[:, 0], flat[:, 1])).reshape(*xs.shape[:-1], 2)


def _lines(here: Track) -> dict[str, np.ndarray]:
    """Centreline and walls, (K, 2) each."""
    s = jnp.linspace(0.0, here.length, _POINTS)
    left, right = jax.vmap(here.walls_at)(s)
    offsets = {"centre": jnp.zeros_like(s), "left": left, "right": -right}
    return {name: np.asarray(jax.vmap(here.place)(s, n)) for name, n in offsets.items()}


def _sizes(out: Path, config: Config) -> np.ndarray:
    """Of an error of each state: root mean square after one step, of the middle model on the drives (9,)."""
    samples, model = jobs.tuning_samples(out, config), jobs.load(out, config.middle, 0)
    squares = [
        _one_step(model, track(number), samples.take(samples.track == number)) for number in range(config.tracks)
    ]
    return np.sqrt(np.mean(np.concatenate(squares), 0))


def _one_step(model: AbstractVehicle, here: Track, samples: CarSamples) -> np.ndarray:
    errors = jax.vmap(lambda x0, us, xs: rollout_errors(model, here, x0, us, xs)[0])
    return np.asarray(errors(samples.x0, samples.us[:, :1], samples.xs[:, :1])) ** 2


def _explained_by(S: np.ndarray, phase: np.ndarray) -> float:
    """Share of the energy of labels that the mean map of each phase explains."""
    rest = sum(np.sum((S[phase == name] - S[phase == name].mean(0)) ** 2) for name in PHASES if np.any(phase == name))
    return float(1.0 - rest / np.sum(S**2))
