"""The measurements of `panda.py`: every function that ends in `rows` returns rows for one of its tables."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import sartor
from sartor.data import Log
from sartor.experiments import panda_stages as stages
from sartor.labelling import SOLVER as LABEL_SOLVER
from sartor.labelling import label_samples, references_ahead
from sartor.labels import label
from sartor.models.base import ArmDynamics, Theta
from sartor.models.lagrangian import CaDeLaC
from sartor.models.mjcf import from_mujoco
from sartor.plant import Plants
from sartor.samples import windows
from sartor.solution import RESULTS
from sartor.systems import panda
from sartor.tracking import Loop, Tracker
from sartor_solver import compile_ahead
from tables import Row
from timing import Phases, interleave

PROBLEM = panda.problem(ArmDynamics(panda.DT))
REAL_TIME = sartor.SQP(curvature="gauss_newton", real_time=True)
SIZES = (((30, 20), 10, 5), ((60, 40), 24, 1), ((30, 20), 24, 1), ((16, 12), 24, 1), ((8, 8), 24, 1), ((8, 8), 8, 1))
"""Networks that are compared: widths, size and number of the encoder's LSTMs; the published ones first."""
SETTLING = 5  # control steps that do not count: the first plan starts from no torque


class Visit(NamedTuple):
    """One control step of a closed loop: what the controller met, and what it did; the first axis is the robots."""

    loop: Loop
    x: jax.Array
    refs: jax.Array
    z: jax.Array
    u: jax.Array

    @property
    def mpc_inputs(self) -> tuple:
        """Arguments of `mpc_step` behind the model."""
        return self.z, self.refs, self.x, self.loop.memory.guess


class Drive(NamedTuple):
    """A closed loop that has been driven."""

    row: Row
    tracker: Tracker
    plants: Plants
    visits: list[Visit]
    """Without those of the settling."""

    @property
    def batch(self) -> int:
        return len(self.plants)


def random_model(**sizes: Any) -> CaDeLaC:
    """CaDeLaC with random parameters, of the published size unless others are given; its inertia is some 0.02 kg m², as
    that of small payloads."""
    model = CaDeLaC(from_mujoco(panda.mj_model(damping=0.0)), key=jax.random.key(0), **sizes)
    last = model.inertia.layers[-1]
    small = 0.1 * last.weight, last.bias.at[: model.body.nq].set(-3.0)
    return eqx.tree_at(lambda m: (m.inertia.layers[-1].weight, m.inertia.layers[-1].bias), model, small)


# --- real-time step ------------------------------------------------------------------------------


def drive(model: CaDeLaC, batch: int, num_steps: int) -> Drive:
    """Closed loops of robots with different payloads along different references, every control step timed."""
    chosen = stages.runs("test", 0, batch, num_steps)
    plants, tracker = stages.plants(chosen.payloads), stages.controller("model", chosen.payloads, model)
    tracker = replace(tracker, solver=REAL_TIME)
    refs = chosen.refs
    x = plants.reset(np.concatenate([refs[:, 0, :7], np.zeros((batch, 7))], 1))
    loop, visits, seconds, failed, far, cpu = tracker.begin(jnp.asarray(x)), [], [], 0, 0.0, time.process_time()
    control = tracker.controller()
    for t in range(num_steps):
        ahead = refs[:, t : t + PROBLEM.horizon + 1]
        start = time.perf_counter()
        u, after, step = jax.block_until_ready(control(loop, x, ahead, t == 0))
        seconds.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu if t == 0 else cpu
        visits.append(Visit(loop, jnp.asarray(x), jnp.asarray(ahead), step.context, u))
        failed += int(np.sum(np.asarray(step.result != RESULTS.successful)))
        x = plants.step(np.asarray(u))
        loop = after._replace(u=jnp.asarray(plants.us))
        far = max(far, float(np.max(np.abs(x - refs[:, t + 1])[:, :7])))
    warm = np.array(seconds[SETTLING:])
    row = {
        "batch": batch, "step": float(np.median(warm)), "step_90": float(np.quantile(warm, 0.9)),
        "per_robot": float(np.median(warm)) / batch, "first": seconds[0], "first_cpu": cpu, "steps": len(warm),
        "failed": failed / (batch * num_steps), "far": far,
    }  # fmt: skip
    return Drive(row, tracker, plants, visits[SETTLING:])


def size_rows(num_steps: int) -> list[Row]:
    """The control step of one robot with networks of several sizes."""
    rows = []
    for widths, hidden, num_layers in SIZES:
        model = random_model(widths=widths, hidden=hidden, num_layers=num_layers)
        counts = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (
            (model.encoder, model.inertia, model.potential), (model.inertia, model.potential))]  # fmt: skip
        names = {"widths": str(list(widths)), "encoder": f"{num_layers} x {hidden}"}
        rows.append(names | {"parameters": counts[0], "in_mpc": counts[1]} | drive(model, 1, num_steps).row)
    return rows


def mpc_step(model: CaDeLaC, z: Any, refs: Any, x: Any, guess: Any) -> sartor.Solution:
    """One real-time iteration for each robot, without the history, the context and the shift."""

    def one(z, refs, x, guess):
        return sartor.solve(PROBLEM, Theta(model, z, refs), x, solver=REAL_TIME, guess=guess, throw=False)

    return jax.vmap(one)(z, refs, x, guess)


def peer_rows(model: CaDeLaC, drives: list[Drive], peer: Any) -> list[Row]:
    """The same steps from the same warm starts by sartor and by acados, in turn; `peer` may be None."""
    rows = []
    for batch, visits in ((d.batch, d.visits) for d in drives):
        step = compile_ahead(mpc_step, model, *visits[0].mpc_inputs)
        ours, theirs, feedback, gap = [], [], [], 0.0
        for visit in [visits[0], *visits]:
            start = time.perf_counter()
            sol = jax.block_until_ready(step.call(model, *visit.mpc_inputs))
            ours.append(time.perf_counter() - start)
            if peer is not None:
                u0, *times = _peer_step(peer, visit)
                gap = max(gap, float(np.max(np.abs(u0 - sol.us[:, 0]))))
                theirs.append(sum(times))
                feedback.append(times[1])
        row = {"batch": batch, "sartor": float(np.median(ours[1:])) / batch, "first": step.first_seconds}
        row |= {"first_cpu": step.cpu_seconds, "steps": len(visits)}
        if peer is not None:
            row |= {"acados": float(np.median(theirs[1:])) / batch, "feedback": float(np.median(feedback[1:])) / batch}
            row |= {"ratio": row["sartor"] / row["acados"], "gap": gap, "setup": peer.setup_seconds}
        rows.append(row)
    return rows


def _peer_step(peer: Any, visit: Visit) -> tuple[np.ndarray, float, float]:
    """us[0] of all robots, one after another, and the times of preparation and feedback [s]."""
    u0s, times, guess = [], np.zeros(2), visit.loop.memory.guess
    for sample in zip(*map(np.asarray, (visit.x, visit.z, guess.xs, guess.us, visit.refs)), strict=True):
        peer.load(*sample)
        u0, *phases = peer.rti_step(sample[0])
        u0s.append(u0)
        times += phases
    return np.stack(u0s), *times.tolist()


# --- labels --------------------------------------------------------------------------------------


def label_rows(
    model: CaDeLaC, visits: list[Visit], batch: int, kinds: list[tuple[Any, Any]], repetitions: int, limit: float
) -> list[Row]:
    """Labels of samples of a closed loop, from the trajectory that was executed; `kinds` are (curvature, method)."""
    rows, calls, data = {}, {}, executed(visits, batch)
    for options in kinds:
        compiled = compile_ahead(labelling(*options), model, *data)
        ok = compiled.call(model, *data)[1]
        rows[options] = {
            "curvature": options[0].replace("_", "-"), "method": options[1], "batch": batch,
            "failed": float(np.mean(~np.asarray(ok))), "first": compiled.first_seconds,
            "first_cpu": compiled.cpu_seconds,
        }  # fmt: skip
        calls[options] = timed(compiled.call, model, *data)
    for options, timing in interleave(calls, repetitions, limit).items():
        rows[options] |= {"seconds": timing.forward, "rate": batch / timing.forward, "repetitions": timing.repetitions}
    return list(rows.values())


def samples_row(model: CaDeLaC, driven: Drive, curvature: Any, repetitions: int, limit: float) -> Row:
    """All samples of a closed loop at once, by `label_samples`, as `sartor label` and the experiment do it."""
    xs, us = (np.stack([getattr(visit, name) for visit in driven.visits], 1) for name in ("x", "u"))
    refs = np.stack([visit.refs[:, 0] for visit in driven.visits], 1)
    logs = [Log(x, u[:-1], r, panda.DT, i) for i, (x, u, r) in enumerate(zip(xs, us, refs, strict=True))]
    samples = windows(logs, model, PROBLEM.horizon)
    ahead, cpu, begun = references_ahead(logs, samples, PROBLEM.horizon), time.process_time(), time.perf_counter()
    found = label_samples(PROBLEM, model, samples, ahead, curvature=curvature)
    row = {
        "curvature": curvature.replace("_", "-"), "method": "curvature, by label_samples", "batch": samples.size,
        "failed": float(np.mean(~found["ok"])), "first": time.perf_counter() - begun,
        "first_cpu": time.process_time() - cpu,
    }  # fmt: skip
    call = timed(label_samples, PROBLEM, model, samples, ahead, curvature=curvature)
    timing = interleave({"all": call}, repetitions, limit)["all"]
    rate = samples.size / timing.forward
    return row | {"seconds": timing.forward, "rate": rate, "repetitions": timing.repetitions}


def labelling(curvature: Any, method: Any) -> Callable:
    """(model, z, refs, x0, xs, us) -> labels and whether each is one."""

    def one(model, z, refs, x0, xs, us):
        found = label(
            PROBLEM, Theta(model, z, refs), x0, solver=LABEL_SOLVER, guess=sartor.guess(xs, us),
            curvature=curvature, method=method,
        )  # fmt: skip
        return found, found.result == RESULTS.successful

    return jax.vmap(one, (None, 0, 0, 0, 0, 0))


def executed(visits: list[Visit], batch: int) -> tuple:
    """z, reference, state, and the states and controls that followed, of samples spread over a closed loop."""
    N, num_robots = PROBLEM.horizon, visits[0].x.shape[0]
    places = [(t, b) for t in range(len(visits) - N) for b in range(num_robots)]
    if batch > len(places):
        raise ValueError(f"the closed loop has {len(places)} samples, not {batch}: drive more steps.")
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, batch).astype(int)]
    xs, us, z, refs = (np.stack([getattr(v, name) for v in visits]) for name in ("x", "u", "z", "refs"))
    rows = [(z[t, b], refs[t, b], xs[t, b], xs[t : t + N + 1, b], us[t : t + N, b]) for t, b in chosen]
    return tuple(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True))


def timed(call: Callable, *inputs: Any, **options: Any) -> Callable[[], Phases]:
    """The time of a call, until its results are there."""

    def once() -> Phases:
        start = time.perf_counter()
        jax.block_until_ready(call(*inputs, **options))
        return Phases(time.perf_counter() - start)

    return once
