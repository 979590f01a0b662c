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

from sartor.experiments import panda_stages as stages
from sartor.experiments.panda_config import FIRST_MOMENT, WINDOW, Config
from sartor.experiments.panda_jobs import training_samples
from sartor.experiments.panda_weights import closed_loop_labels, weights
from sartor.files import load_arrays, save_arrays, write_json
from sartor.labelling import label_states
from sartor.models.store import load_model
from sartor.samples import Windows
from sartor.solvers.sqp import SQP
from sartor.systems import panda
from sartor.tracking import Control, Loop, Tracker
from sartor.train import mean_loss, rollout_loss
from sartor.truth import Ranks, along, diagonal_regret, ranks

STEPS = WINDOW  # control steps that a branch runs on
EPS = 0.5  # [Nm]
BARRIER = 1e-3  # τ of one variant of the labels
_KINDS = ("ones", "stand", "norm", "mpc_cost", "ours", "ours_avg", "regret", "closed_loop")


class Branches(NamedTuple):
    """At one moment of all episodes."""

    slope: np.ndarray
    """(B, 7), dJ/du_t; where a torque limit is nearer than ε, from the other side alone."""
    curvature: np.ndarray
    """(B, 7), d²J/du_t²; NaN where a torque limit is nearer than ε."""


def moments(config: Config) -> list[int]:
    """Control steps of the test episodes at which is branched."""
    return np.linspace(FIRST_MOMENT, config.steps - STEPS - 1, config.truth or 0).astype(int).tolist()


def truth_files(out: Path, config: Config) -> list[list[Path]]:
    """Of each pretrained model, one file for each moment."""
    return [[out / "truth" / f"model-{m}-{t}.npz" for t in moments(config)] for m in range(config.models)]


def check(output: Path, model: Path, config: Config, moment: int, monitor: Any) -> None:
    """Job: slopes and curvatures at one moment of the test episodes, and the labels there."""
    chosen = stages.runs("test", stages.TEST, config.tests, config.steps)
    robots, tracker = stages.plants(chosen.payloads), stages.controller("model", chosen.payloads, load_model(model))
    x = robots.reset(np.concatenate([chosen.refs[:, 0, :7], np.zeros((len(robots), 7))], 1))
    loop, seen, total = tracker.begin(jnp.asarray(x)), [], moment + 3 * STEPS
    found, control = None, tracker.controller()
    for t in range(moment + STEPS):
        if t == moment:
            found = branches(robots, control, loop, x, chosen.refs[:, t:], t == 0)
        refs = chosen.refs[:, t : t + panda.HORIZON + 1]
        u, loop, step = control(loop, x, refs, t == 0)
        seen.append((x, np.asarray(step.context), refs))
        x = robots.step(np.asarray(u, float))
        loop = loop._replace(u=jnp.asarray(robots.us))
        monitor(t + 1, total)
    part = [np.concatenate(values) for values in zip(*seen[moment:], strict=True)]
    labels = _label_all(tracker, part, config.curvature)
    here = [value[: len(robots)] for value in part]
    variants = {
        "S_gauss_newton": _label_all(tracker, here, "gauss_newton")["S"],
        "S_barrier": _label_all(tracker, here, config.curvature, BARRIER)["S"],
    }
    where = {"run": np.tile(np.arange(len(robots)), STEPS), "step": np.repeat(np.arange(STEPS), len(robots))}
    by_run = lambda values: values.reshape(STEPS, len(robots), -1).swapaxes(0, 1)
    closed_loop = closed_loop_labels(labels | where, by_run(part[0]), by_run(part[2][:, 0]))
    mine = {name: value[: len(robots)] for name, value in (labels | {"S_closed_loop": closed_loop}).items()}
    assert found is not None
    save_arrays(output, **mine, **variants, **found._asdict())


def branches(robots: Any, control: Control, loop: Loop, x: np.ndarray, refs: np.ndarray, first: bool) -> Branches:
    """Run on from here, with the torque of each joint as it is, and a little more and less."""
    count, n = len(robots), 7
    which = np.tile(np.arange(count), 2 * n + 1)
    copies = robots.repeat(which)
    moved = EPS * np.concatenate([np.zeros((1, n)), np.eye(n), -np.eye(n)]).repeat(count, 0)
    loop, x, refs = jax.tree.map(lambda leaf: leaf[which], loop), x[which], refs[which]
    cost, clipped = np.zeros(len(which)), np.zeros((len(which), n), bool)
    for t in range(STEPS):
        u, loop, _ = control(loop, x, refs[:, t : t + panda.HORIZON + 1], first and t == 0)
        u = np.asarray(u, float) + (moved if t == 0 else 0.0)
        clipped |= (np.abs(u) > np.asarray(panda.U_MAX)) & (moved != 0) if t == 0 else False
        x = copies.step(u)
        loop = loop._replace(u=jnp.asarray(copies.us))
        cost += 0.5 * panda.DT * (np.asarray(panda.WEIGHTS) * (x - refs[:, t + 1]) ** 2).sum(1)
    J, clipped = cost.reshape(2 * n + 1, count), clipped.reshape(2 * n + 1, count, n)
    now, ahead, behind = J[0][:, None], J[1 : n + 1].T, J[n + 1 :].T
    no_more, no_less = clipped[1 : n + 1].any(0), clipped[n + 1 :].any(0)
    upper, lower = np.where(no_more, now, ahead), np.where(no_less, now, behind)
    distance = EPS * (2.0 - no_more - no_less)
    curvature = np.where(no_more | no_less, np.nan, (ahead - 2 * now + behind) / EPS**2)
    return Branches((upper - lower) / np.where(distance > 0, distance, np.nan), curvature)


def _label_all(tracker: Tracker, points: list[np.ndarray], curvature: str, tau: float = 0.0) -> dict[str, np.ndarray]:
    """Labels at some states, contexts and references; the solves begin at the reference."""
    x, z, refs = points
    xs = np.concatenate([x[:, None], refs[:, 1:]], 1)
    start = xs, np.zeros((len(x), panda.HORIZON, 7))
    solver = SQP(curvature="gauss_newton", tol=1e-7, tau=tau)
    return label_states(tracker.problem, tracker.model, x, z, refs, start, solver=solver, curvature=curvature)


def correlations(files: list[list[Path]], num_steps: int) -> list[dict[str, Any]]:
    """Rank correlations of labels of the first steps with the truth, mean over models, each with its files."""
    rows: dict[tuple[str, str], list[Ranks]] = {}
    for of_model in files:
        parts = [load_arrays(file) for file in of_model]
        data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        data = {name: value[data["ok"]] for name, value in data.items()}
        for key, (estimate, true) in _compared(data, num_steps).items():
            rows.setdefault(key, []).append(ranks(estimate, true))
    mean = lambda found, key: float(np.mean([getattr(row, key) for row in found]))
    return [
        {"variant": variant, "quantity": quantity, "n": sum(row.n for row in found)}
        | {"overall": mean(found, "overall"), "joints": mean(found, "within"), "samples": mean(found, "across")}
        for (variant, quantity), found in rows.items()
    ]


def _compared(data: dict[str, np.ndarray], num_steps: int) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Estimates of labels and what they estimate, (B, entries), for errors of the positions of the first steps."""
    slope, curvature, g = data["slope"], data["curvature"], data["dJ_du0"]
    first = lambda values: values[..., :num_steps, :7].reshape(*values.shape[:-2], -1)
    du0_de, du0_derror = first(data["du0_de"]), first(data["du0_derror"])
    diagonal = np.diagonal(data["Lambda"], axis1=1, axis2=2)
    effective = 0.5 * sum(np.abs(slope + sign * 0.1 * curvature) for sign in (-1, 1))
    S, true = first(data["S"]), along(slope, du0_de)
    defect = {
        "ours": S, "ours, sum of magnitudes": np.abs(g[:, :, None] * du0_de).sum(1),
        "ours, Gauss-Newton": first(data["S_gauss_newton"]), f"ours, barrier {BARRIER}": first(data["S_barrier"]),
        "ours_avg": np.broadcast_to(S.mean(0), S.shape),
        "ours_shuffled": S[np.random.default_rng(0).permutation(len(S))],
        "closed_loop": first(data["S_closed_loop"]),
    }  # fmt: skip
    return {
        ("Λ, diagonal", "curvature"): (diagonal, curvature),
        ("ours: |dJ/du|", "|slope|"): (g, np.abs(slope)),
        ("ours: |dJ/du|", "effective slope"): (g, effective),
        ("regret, diagonal of Λ", "regret, true curvature"): (
            diagonal_regret(du0_de, diagonal), diagonal_regret(du0_de, np.maximum(curvature, 0.0))
        ),
        ("ours, trajectory error", "S of eq. 4, trajectory error"): (
            along(g, du0_derror), along(slope, du0_derror)
        ),
    } | {(name, "S of eq. 4"): (estimate, true) for name, estimate in defect.items()}  # fmt: skip


def agreement(
    output: Path, files: tuple[Path, ...], models: Path, names: list[str], config: Config, monitor: Any
) -> None:
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
