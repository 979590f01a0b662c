"""Truth check: what labels estimate, measured by branching the simulated closed loop.

At some moments the plants are copied, the torque of one joint is moved by ±ε for one control step, and all copies run
on under their controller. Differences of the cost that follows are the true slope and curvature of J in u_t, feedback
and plant included. The published method calls them intractable; in a simulator they are not.
"""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from sartor.experiments import panda_stages as stages
from sartor.experiments.panda_jobs import training_samples
from sartor.experiments.panda_weights import WINDOW, closed_loop_labels, weights
from sartor.files import load_arrays, save_arrays, write_json
from sartor.labels import label
from sartor.models.base import Theta
from sartor.models.store import load_model
from sartor.samples import Windows
from sartor.sensitivity import trajectory_error
from sartor.solution import RESULTS, guess
from sartor.solvers.sqp import SQP
from sartor.systems import panda
from sartor.tracking import Loop, Tracker
from sartor.train import mean_loss, rollout_loss

STEPS = WINDOW  # control steps that a branch runs on
EPS = 0.5  # [Nm]
_KINDS = ("ones", "stand", "norm", "mpc_cost", "ours", "ours_avg", "regret", "closed_loop")


class Branches(NamedTuple):
    """At one moment of all episodes."""

    slope: np.ndarray
    """(B, 7), dJ/du_t; NaN where a torque limit is nearer than ε."""
    curvature: np.ndarray
    """(B, 7), d²J/du_t²."""


def moments(config: Any) -> list[int]:
    """Control steps of the test episodes at which is branched."""
    return np.linspace(15, config.steps - STEPS - 1, config.truth).astype(int).tolist()


def truth_files(out: Path, config: Any) -> list[list[Path]]:
    """Of each pretrained model, one file for each moment."""
    return [[out / "truth" / f"model-{m}-{t}.npz" for t in moments(config)] for m in range(config.models)]


def check(output: Path, model: Path, config: Any, moment: int, monitor: Any) -> None:
    """Job: slopes and curvatures at one moment of the test episodes, and the labels there."""
    chosen = stages.runs("test", stages.TEST, config.tests, config.steps)
    robots, tracker = stages.plants(chosen.payloads), stages.controller("model", chosen.payloads, load_model(model))
    x = robots.reset(np.concatenate([chosen.refs[:, 0, :7], np.zeros((len(robots), 7))], 1))
    loop, seen, total = tracker.begin(jnp.asarray(x)), [], moment + 3 * STEPS
    found = None
    for t in range(moment + STEPS):
        if t == moment:
            found = branches(robots, tracker, loop, x, chosen.refs[:, t:], t == 0)
        refs = chosen.refs[:, t : t + panda.HORIZON + 1]
        u, loop, step = tracker.control(loop, jnp.asarray(x), jnp.asarray(refs), t == 0)
        seen.append((x, np.asarray(step.context), refs))
        x = robots.step(np.asarray(u, float))
        loop = loop._replace(u=jnp.asarray(robots.us))
        monitor(t + 1, total)
    part = [np.concatenate(values) for values in zip(*seen[moment:], strict=True)]
    labels = _label_all(tracker, part, config.curvature)
    where = {"run": np.tile(np.arange(len(robots)), STEPS), "step": np.repeat(np.arange(STEPS), len(robots))}
    by_run = lambda values: values.reshape(STEPS, len(robots), -1).swapaxes(0, 1)
    closed_loop = closed_loop_labels(labels | where, by_run(part[0]), by_run(part[2][:, 0]))
    mine = {name: value[: len(robots)] for name, value in (labels | {"S_closed_loop": closed_loop}).items()}
    assert found is not None
    save_arrays(output, **mine, **found._asdict())


def branches(robots: Any, tracker: Tracker, loop: Loop, x: np.ndarray, refs: np.ndarray, first: bool) -> Branches:
    """Run on from here, with the torque of each joint as it is, and a little more and less."""
    count, n = len(robots), 7
    which = np.tile(np.arange(count), 2 * n + 1)
    copies = robots.repeat(which)
    moved = EPS * np.concatenate([np.zeros((1, n)), np.eye(n), -np.eye(n)]).repeat(count, 0)
    loop, x, refs = jax.tree.map(lambda leaf: leaf[which], loop), x[which], refs[which]
    cost, clipped = np.zeros(len(which)), np.zeros((len(which), n), bool)
    for t in range(STEPS):
        ahead = jnp.asarray(refs[:, t : t + panda.HORIZON + 1])
        u, loop, _ = tracker.control(loop, jnp.asarray(x), ahead, first and t == 0)
        u = np.asarray(u, float) + (moved if t == 0 else 0.0)
        clipped |= (np.abs(u) > np.asarray(panda.U_MAX)) & (moved != 0) if t == 0 else False
        x = copies.step(u)
        loop = loop._replace(u=jnp.asarray(copies.us))
        cost += 0.5 * panda.DT * (np.asarray(panda.WEIGHTS) * (x - refs[:, t + 1]) ** 2).sum(1)
    J = cost.reshape(2 * n + 1, count)
    ahead, behind = J[1 : n + 1].T, J[n + 1 :].T
    there = clipped.reshape(2 * n + 1, count, n).any((0,))
    slope = np.where(there, np.nan, (ahead - behind) / (2 * EPS))
    return Branches(slope, np.where(there, np.nan, (ahead - 2 * J[0][:, None] + behind) / EPS**2))


def _label_all(tracker: Tracker, points: list[np.ndarray], curvature: str) -> dict[str, np.ndarray]:
    """Labels at some states, contexts and references, a chunk at a time."""
    size, chunk, parts = len(points[0]), 16, []
    for start in range(0, size, chunk):
        which = np.arange(start, start + chunk) % size
        some = _labels(tracker, [jnp.asarray(point[which]) for point in points], curvature)
        parts.append(jax.tree.map(np.asarray, some))
    return {name: np.concatenate([part[name] for part in parts])[:size] for name in parts[0]}


@eqx.filter_jit
def _labels(tracker: Tracker, points: list, curvature: Any) -> dict[str, jax.Array]:
    def one(x, z, r):
        start = guess(r.at[0].set(x), jnp.zeros((panda.HORIZON, 7)))
        solver = SQP(curvature="gauss_newton", tol=1e-7)
        found = label(tracker.problem, Theta(tracker.model, z, r), x, solver=solver, guess=start, curvature=curvature)
        return {
            "S": found.S, "du0_de": found.du0_de, "du0_derror": trajectory_error(found.A, found.du0_de),
            "du0_dx0": found.du0_dx0, "dJ_du0": found.dJ_du0,
            "Lambda": found.Lambda, "A": found.A[0], "B": found.B[0], "ok": found.result == RESULTS.successful,
        }  # fmt: skip

    return jax.vmap(one)(*points)


def correlations(files: list[list[Path]]) -> list[dict[str, Any]]:
    """Rank correlations of labels with the truth, mean over pretrained models, each with its files."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for of_model in files:
        parts = [load_arrays(file) for file in of_model]
        data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ok = data["ok"] & np.isfinite(data["slope"]).all(1)
        for key, (estimate, true) in _compared({name: value[ok] for name, value in data.items()}).items():
            rows.setdefault(key, []).append(_ranks(estimate, true))
    mean = lambda found, key: float(np.mean([row[key] for row in found]))
    return [
        {"variant": variant, "quantity": quantity, "n": sum(row["n"] for row in found)}
        | {key: mean(found, key) for key in ("overall", "joints", "samples")}
        for (variant, quantity), found in rows.items()
    ]


def _compared(data: dict[str, np.ndarray]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Estimates of labels and what they estimate, (B, 7), for errors of the first step's positions."""
    slope, curvature, sensitivity = data["slope"], data["curvature"], data["du0_de"][:, :, 0, :7]
    diagonal = np.diagonal(data["Lambda"], axis1=1, axis2=2)
    effective = 0.5 * sum(np.abs(slope + sign * 0.1 * curvature) for sign in (-1, 1))
    S_true = np.abs(np.einsum("bj,bjx->bx", slope, sensitivity))
    S, terms = data["S"][:, 0, :7], data["dJ_du0"][:, :, None] * sensitivity
    by_trajectory = np.einsum("bj,bjx->bx", data["dJ_du0"], data["du0_derror"][:, :, 0, :7])
    shuffled = S[np.random.default_rng(0).permutation(len(S))]
    estimates = {
        "ours": S, "ours, sum of magnitudes": np.abs(terms).sum(1), "ours, trajectory error": np.abs(by_trajectory),
        "ours_avg": np.broadcast_to(S.mean(0), S.shape), "ours_shuffled": shuffled,
        "closed_loop": data["S_closed_loop"][:, 0, :7],
    }  # fmt: skip
    return {
        ("Λ, diagonal", "curvature"): (diagonal, curvature),
        ("ours: |dJ/du|", "|slope|"): (data["dJ_du0"], np.abs(slope)),
        ("ours: |dJ/du|", "effective slope"): (data["dJ_du0"], effective),
        ("regret, diagonal of Λ", "regret, true curvature"): (
            _regret(sensitivity, diagonal), _regret(sensitivity, np.maximum(curvature, 0.0))
        ),
    } | {(name, "S of eq. 4"): (estimate, S_true) for name, estimate in estimates.items()}  # fmt: skip


def _regret(sensitivity: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """√(Σ_i curvature_i (du_0[i]/de)²): branches move one joint at a time and so tell no more than the diagonal."""
    return np.sqrt(np.einsum("bix,bi->bx", sensitivity**2, curvature))


def _ranks(estimate: np.ndarray, true: np.ndarray) -> dict[str, float]:
    def rank(a: np.ndarray, b: np.ndarray) -> float:
        return np.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.asarray(spearmanr(a, b))[0])

    def mean(estimate: np.ndarray, true: np.ndarray) -> float:
        ranks = np.array([rank(a, b) for a, b in zip(estimate, true, strict=True)])
        return float(ranks[np.isfinite(ranks)].mean()) if np.isfinite(ranks).any() else np.nan

    overall = rank(estimate.ravel(), true.ravel())
    return {
        "overall": overall, "joints": mean(estimate, true), "samples": mean(estimate.T, true.T), "n": len(estimate)
    }  # fmt: skip


def agreement(output: Path, files: tuple[Path, ...], models: Path, names: list[str], config: Any, monitor: Any) -> None:
    """Job: every loss of some models on the data held out from fine-tuning."""
    start, p = models / f"{names[0]}.npz", config.rollouts[0]
    samples, labels, held_out = training_samples(files, start, config.label_stride, "labels")
    samples, labels = samples.take(held_out), {name: value[held_out] for name, value in labels.items()}
    before = load_model(start)
    losses = {kind: weights(kind, samples, labels, before, p, config) for kind in _KINDS}
    found = {}
    for i, name in enumerate(names):
        model = stages.as_type(load_model(models / f"{name}.npz"), jnp.float32)
        found[name] = {kind: _loss(model, samples, w) for kind, w in losses.items()}
        monitor(i + 1, len(names))
    write_json(output, found)


def _loss(model: Any, samples: Windows, loss_weights: Any) -> float:
    return mean_loss(eqx.Partial(rollout_loss, panda.DT), model, (samples, loss_weights))
