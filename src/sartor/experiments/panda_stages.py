"""The stages of the Panda experiment; each reads files of the run folder and writes one.

Payloads 0 to 99 are for training, 100 to 119 for the test and 120 to 129 for validation. References are fresh for
each use, by seed. Runs go bad where torques saturate for long: samples with a joint further than `MAX_ERROR` from its
reference or accelerated beyond `MAX_ACCELERATION` are left out of training, and counted.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sartor.data import Log
from sartor.evaluate import episode_metrics
from sartor.experiments.panda_config import Config
from sartor.files import load_arrays, save_arrays, write_json
from sartor.kkt import LQ
from sartor.labelling import SOLVER, label_samples, references_ahead
from sartor.models.base import AbstractModel, ArmDynamics, Nominal
from sartor.models.lagrangian import CaDeLaC
from sartor.models.links import RigidBody
from sartor.models.mjcf import from_mujoco
from sartor.models.rigid_body import inverse_dynamics, mass_matrix
from sartor.models.store import load_model, save_model
from sartor.plant import Plants, end_effector
from sartor.riccati import factor
from sartor.samples import TorqueSamples, Windows, windows
from sartor.solvers.sqp import SQP
from sartor.systems import panda
from sartor.tracking import Tracker, Tracking, follow, track
from sartor.train import Config as Training
from sartor.train import fit, pretrain

CUTOFF = float("inf")  # of the context [Hz]: as published, the context is not filtered in simulation
MAX_ERROR, MAX_ACCELERATION = 0.3, 20.0  # [rad], [rad/s²]
SEEDS = {"pretrain": 1000, "finetune": 2000, "test": 3000, "validation": 4000}
TEST, VALIDATION = 100, 120  # first payloads


class Runs(NamedTuple):
    """Which payloads run along which references."""

    payloads: list[int]
    refs: np.ndarray
    """(B, num_steps + N + 1, 14)."""


def runs(use: str, first: int, count: int, num_steps: int, per_payload: int = 1, offset: int = 0) -> Runs:
    """`per_payload` references for each of `count` payloads from `first` on."""
    payloads = [first + i for i in range(count) for _ in range(per_payload)]
    drawn = panda.references(SEEDS[use] + offset, len(payloads))
    return Runs(payloads, panda.sample_reference(drawn, num_steps))


def plants(payloads: list[int]) -> Plants:
    """The true robots with these payloads, on one thread."""
    known = panda.payloads()
    return Plants([panda.mj_model(known[i]) for i in payloads], panda.DT, num_threads=1)


def nominal(damping: float = 0.0) -> RigidBody:
    """The robot as its maker describes it: no payload, and no damping unless that is given."""
    return from_mujoco(panda.mj_model(damping=damping))


def true_bodies(payloads: list[int], damping: float) -> RigidBody:
    """The robots with their payloads, stacked."""
    known = panda.payloads()
    bodies = [from_mujoco(panda.mj_model(known[i], damping=damping)) for i in payloads]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *bodies)


def excite(output: Path, chosen: Runs, num_steps: int, monitor: Any) -> None:
    """Collect for pretraining: an LQR on the true inertia, with the true bias forces compensated, without damping."""
    torques = partial(_lqr_torques, true_bodies(chosen.payloads, 0.0))
    result = follow(
        plants(chosen.payloads),
        lambda t, xs: (monitor(t, num_steps), np.asarray(torques(jnp.asarray(xs), jnp.asarray(chosen.refs[:, t]))))[1],
        chosen.refs, num_steps, chosen.payloads,
    )  # fmt: skip
    _save_logs(output, result)


@eqx.filter_jit
def _lqr_torques(bodies: RigidBody, xs: Array, refs: Array) -> Array:
    def one(body, x, r):
        q, qd = x[:7], x[7:]
        M_inv, eye = jnp.linalg.inv(mass_matrix(body, q)), jnp.eye(7)
        A = jnp.block([[eye, panda.DT * eye], [0 * eye, eye]])
        B = jnp.concatenate([0.5 * panda.DT**2 * M_inv, panda.DT * M_inv])
        spread = lambda value, n: jnp.broadcast_to(value, (n, *value.shape))
        N = 40
        zero = jnp.zeros
        lq = LQ(
            A=spread(A, N), B=spread(B, N), c=zero((N, 14)), Q=spread(100.0 * jnp.eye(14), N + 1),
            R=spread(0.05 * eye, N), S=zero((N, 7, 14)), q=zero((N + 1, 14)), r=zero((N, 7)),
        )  # fmt: skip
        return inverse_dynamics(body, q, qd, jnp.zeros(7)) + factor(lq).K[0] @ (x - r)

    return jax.vmap(one)(bodies, xs, refs)


def pretrained(output: Path, logs: list[Log], config: Config, seed: int, monitor: Any) -> None:
    """A model trained on the torques that the payloads need."""
    model = CaDeLaC(
        nominal(config.damping), widths=config.widths, num_contexts=config.num_contexts, hidden=config.hidden,
        num_layers=config.num_layers, key=jax.random.key(seed),
    )  # fmt: skip
    samples, count = torque_samples(logs, model, config.pretrain_stride)
    held_out = np.random.default_rng(0).permutation(len(samples.q)) < len(samples.q) // 10
    training = Training(
        config.pretrain_epochs, config.pretrain_batch, config.pretrain_rate, weight_decay=1e-4, seed=seed,
        noise=history_noise(config),
    )  # fmt: skip
    parts = [TorqueSamples(*(field[which] for field in samples)) for which in (~held_out, held_out)]
    checkpoint = output.with_suffix(".checkpoint")
    model, curve = pretrain(
        as_type(model, jnp.float32), parts[0], training, validation=parts[1], checkpoint=checkpoint, monitor=monitor
    )
    write_json(output.with_suffix(".json"), {"train": curve.train, "validation": curve.validation,
               "std": np.std(samples.target, 0).tolist(), "num_samples": len(samples.q),
               "left_out": count - len(samples.q)})  # fmt: skip
    save_model(output, as_type(model, jnp.float64))
    checkpoint.unlink(missing_ok=True)


def history_noise(config: Config) -> tuple[float, ...]:
    """Noise of the histories in pretraining."""
    return tuple(config.pretrain_noise * std for std in panda.HISTORY_NOISE) if config.pretrain_noise else ()


def torque_samples(logs: list[Log], model: AbstractModel, stride: int) -> tuple[TorqueSamples, int]:
    """What a payload adds to the torques at the recorded motion, with the history there; and how many there were
    before unsound ones were left out."""
    samples = windows(logs, model, 1, stride=stride)
    count = samples.size
    qdd = np.stack([np.asarray(logs[i].qdds)[t] for i, t in zip(samples.run, samples.step, strict=True)])
    keep = sound(logs, samples) & (samples.step > 0) & (np.abs(qdd) <= MAX_ACCELERATION).all(1)
    samples, qdd = samples.take(keep), qdd[keep]
    q, qd = samples.x0[:, :7], samples.x0[:, 7:]
    target = np.empty_like(q)
    body = nominal()
    for payload in np.unique(samples.environment):
        mine = samples.environment == payload
        true = from_mujoco(panda.mj_model(panda.payloads()[payload], damping=0.0))
        target[mine] = _payload_torques(true, body, *(jnp.asarray(part[mine]) for part in (q, qd, qdd)))
    return TorqueSamples(q, qd, qdd, target, samples.history), count


@eqx.filter_jit
def _payload_torques(true: RigidBody, body: RigidBody, q: Array, qd: Array, qdd: Array) -> Array:
    difference = lambda *motion: inverse_dynamics(true, *motion) - inverse_dynamics(body, *motion)
    return jax.vmap(difference)(q, qd, qdd)


def sound(logs: list[Log], samples: Windows) -> np.ndarray:
    """Which samples are near their reference throughout, (B,)."""
    far = [(np.abs(log.xs[:, :7] - np.asarray(log.refs)[:, :7]) > MAX_ERROR).any(1) for log in logs]
    ahead = samples.us.shape[1]
    return np.array([not far[i][t : t + ahead + 1].any() for i, t in zip(samples.run, samples.step, strict=True)])


def controller(kind: str, payloads: list[int], model: AbstractModel | None = None, cutoff: float = CUTOFF) -> Tracker:
    """The published MPC, with a model or with one of the baselines."""
    problem = panda.problem(ArmDynamics(panda.DT))
    if model is not None:
        return Tracker(problem, model, panda.DT, cutoff=cutoff)
    bodies = true_bodies(payloads, panda.DAMPING if kind == "oracle_damping" else 0.0)
    if kind == "nominal":  # one for each plant as well: the same code as for the oracles compiles once
        bodies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(payloads), *leaf.shape)), nominal())
    return Tracker(problem, Nominal(bodies), panda.DT, per_plant=True)


def collect(output: Path, chosen: Runs, model: Path, num_steps: int, dither: Any, seed: int, monitor: Any) -> None:
    """Collect for fine-tuning: closed loop with a model."""
    tracker = controller("model", chosen.payloads, load_model(model))
    result = track(
        plants(chosen.payloads), tracker, chosen.refs, num_steps, dither=dither, seed=seed,
        environments=chosen.payloads, monitor=monitor,
    )  # fmt: skip
    _save_logs(output, result)


def evaluate(chosen: Runs, tracker: Tracker, num_steps: int, monitor: Any) -> tuple[list[dict], Tracking]:
    """Metrics of every episode, and the episodes."""
    robots = plants(chosen.payloads)
    result = track(robots, tracker, chosen.refs, num_steps, environments=chosen.payloads, monitor=monitor)
    empty, rows = panda.mj_model(), []
    for log, failed, diverged in zip(result.logs, result.failed, result.diverged, strict=True):
        refs = np.asarray(log.refs)
        xs = np.full_like(log.xs, np.inf) if diverged else log.xs  # the plant was frozen where it left the world
        ee = [end_effector(empty, x[:, :7]) for x in (log.xs, refs)]
        row = episode_metrics(
            xs, log.us, refs, np.asarray(panda.U_MAX), np.asarray(panda.WEIGHTS),
            np.linalg.norm(ee[0] - ee[1], axis=1),
        )  # fmt: skip
        rows.append({"environment": log.environment, "failed": int(failed), **row})
    return rows, result


def tested(
    output: Path, kind: str, chosen: Runs, model: Path | None, num_steps: int, episodes: bool, monitor: Any
) -> None:
    """Evaluate a controller; the episodes are kept if asked for."""
    tracker = controller(kind, chosen.payloads, None if model is None else load_model(model))
    rows, result = evaluate(chosen, tracker, num_steps, monitor)
    if episodes:
        _save_logs(output.with_suffix(".npz"), result)
    write_json(output, rows)


def labelled(output: Path, logs: list[Log], model: Path, stride: int, tau: float, options: dict, monitor: Any) -> None:
    """Labels of all samples of some runs."""
    belief, problem = load_model(model), panda.problem(ArmDynamics(panda.DT))
    samples = windows(logs, belief, problem.horizon, stride=stride)
    refs, solver = references_ahead(logs, samples, problem.horizon), _solver(tau)
    times: list[tuple[int, float]] = []

    def timed(done: int, total: int) -> None:
        times.append((done, time.monotonic()))
        monitor(done, total)

    found = label_samples(problem, belief, samples, refs, solver=solver, monitor=timed, **options)
    (first, begun), (last, ended) = times[0], times[-1]  # the first chunk compiles
    rate = (last - first) / (ended - begun) if last > first else np.nan
    save_arrays(output, run=samples.run, step=samples.step, rate=np.asarray(rate), **found)


def _solver(tau: float) -> SQP:
    """Of the labels; with a barrier, products of multiplier and slack are to be told from τ."""
    return replace(SOLVER, tau=tau, tol=min(SOLVER.tol, 1e-3 * tau)) if tau else SOLVER


def tailored(
    output: Path, model: Path, samples: Windows, weights: Any, validation: Any, training: Training, monitor: Any,
    after_epoch: Any = None,
) -> None:  # fmt: skip
    """Fine-tune under some weights."""
    checkpoint = output.with_suffix(".checkpoint")
    start = as_type(load_model(model), jnp.float32)
    trained, curve = fit(
        start, samples, weights, training, validation=validation, checkpoint=checkpoint, monitor=monitor,
        after_epoch=after_epoch,
    )  # fmt: skip
    write_json(output.with_suffix(".json"), {"train": curve.train, "validation": curve.validation})
    save_model(output, as_type(trained, jnp.float64))
    checkpoint.unlink(missing_ok=True)


def as_type(model: AbstractModel, dtype: Any) -> AbstractModel:
    """The model in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)


def load_logs(path: Path) -> list[Log]:
    """Logs that a stage has left."""
    stored = load_arrays(path)
    fields = (stored[name] for name in ("xs", "us", "refs", "environments", "qdds"))
    return [Log(x, u, r, panda.DT, int(e), a) for x, u, r, e, a in zip(*fields, strict=True)]


def _save_logs(path: Path, result: Tracking) -> None:
    stack = lambda name: np.stack([getattr(log, name) for log in result.logs])
    arrays = {name: stack(name) for name in ("xs", "us", "refs", "qdds")}
    arrays["environments"] = np.array([log.environment for log in result.logs])
    save_arrays(path, **arrays, failed=result.failed, diverged=result.diverged)
