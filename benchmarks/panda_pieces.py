"""Where the time of a control step of the Panda goes, for `panda.py`."""

import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from panda_measure import PROBLEM, Drive, Visit, mpc_step, timed
from sartor import kkt
from sartor.models.base import Theta
from sartor.models.lagrangian import CaDeLaC
from sartor.models.rigid_body import inverse_dynamics
from sartor.plant import Plants
from sartor_solver import compile_ahead
from tables import Row
from timing import Phases, interleave


def piece_rows(model: CaDeLaC, driven: Drive, repetitions: int, limit: float) -> list[Row]:
    """Times of the parts of a control step, for all robots, and all stages where the part is there once a stage."""
    visit, whole = driven.visits[-1], driven.row["step"]
    found = parts(model, visit) | {"MuJoCo: control step": (simulated(driven.plants, visit), driven.batch)}
    timings = interleave({name: call for name, (call, _) in found.items()}, repetitions, limit)
    rows = [(name, timings[name].forward, count) for name, (_, count) in found.items()]
    rest = timings["real-time iteration"].forward - timings["linearisation"].forward
    rows += [("QP, and all else of the iteration", rest, driven.batch), ("control step", whole, driven.batch)]
    return [
        {"piece": name, "batch": driven.batch, "count": count, "seconds": seconds, "each": seconds / count,
         "share": seconds / whole}
        for name, seconds, count in rows
    ]  # fmt: skip


def parts(model: CaDeLaC, visit: Visit) -> dict[str, tuple[Callable[[], Phases], int]]:
    """Compiled parts of the step, to be timed, and how often each is evaluated in a call."""
    guess, z = visit.loop.memory.guess, visit.z
    xs, us = guess.xs[:, :-1], guess.us
    motion = xs[..., :7], xs[..., 7:], jax.random.normal(jax.random.key(0), us.shape)
    step = xs, us, guess.lams[:, 1:]
    every_stage = lambda fn: jax.vmap(jax.vmap(fn, (None, 0, 0, 0, None)), (None, 0, 0, 0, 0))
    stages = {
        "arm: inverse dynamics": (arm, motion), "arm: with its derivatives": (with_derivatives(arm), motion),
        "residual: torques": (residual, motion),
        "residual: with its derivatives": (with_derivatives(residual), motion),
        "RK4 step": (rk4_step, step), "RK4 step with its Jacobian": (with_jacobian, step),
        "RK4 step with Jacobian and contracted Hessian": (with_hessian, step),
    }  # fmt: skip
    work = {name: (every_stage(fn), (model, *data, z), us[..., 0].size) for name, (fn, data) in stages.items()}
    for name, fn in (("linearisation", linearisation), ("real-time iteration", mpc_step)):
        work[name] = fn, (model, *visit.mpc_inputs), len(z)
    return {name: (timed(compile_ahead(fn, *data).call, *data), count) for name, (fn, data, count) in work.items()}


def overhead_row(driven: Drive, repetitions: int, limit: float) -> Row:
    """A control step less the function it has compiled: what Python takes."""
    visit, tracker = driven.visits[-1], driven.tracker
    arguments = (tracker, visit.loop, visit.x, visit.refs, jnp.asarray(False))
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def control(*leaves):
        tracker, *inputs = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
        return tracker.controller()(*inputs)

    x, refs = np.asarray(visit.x), np.asarray(visit.refs)
    calls = {
        "compiled": timed(compile_ahead(control, *leaves).call, *leaves),
        "whole": timed(tracker.controller(), visit.loop, x, refs, False),
    }
    times = {name: timing.forward for name, timing in interleave(calls, 10 * repetitions, limit).items()}
    python = times["whole"] - times["compiled"]
    row = {"piece": "control step: Python", "batch": driven.batch, "count": 1, "seconds": python, "each": python}
    return row | {"share": python / times["whole"]}


def simulated(plants: Plants, visit: Visit) -> Callable[[], Phases]:
    x, u = np.asarray(visit.x), np.asarray(visit.u)

    def once() -> Phases:
        plants.reset(x)
        start = time.perf_counter()
        plants.step(u)
        return Phases(time.perf_counter() - start)

    return once


def arm(model, q, qd, qdd, z):
    return inverse_dynamics(model.body, q, qd, qdd)


def residual(model, q, qd, qdd, z):
    return model.residual(q, qd, qdd, z)


def with_derivatives(torques: Callable) -> Callable:
    """By forward mode, which takes the formulas that are written out."""

    def both(model, q, qd, qdd, z):
        twice = lambda *motion: (torques(model, *motion, z),) * 2
        return jax.jacfwd(twice, (0, 1, 2), has_aux=True)(q, qd, qdd)

    return both


def rk4_step(model, x, u, lam, z):
    return PROBLEM.dynamics(x, u, 0, Theta(model, z, None))


def with_jacobian(model, x, u, lam, z):
    return PROBLEM.dynamics.expand_step(x, u, 0, Theta(model, z, None), None)[:2]


def with_hessian(model, x, u, lam, z):
    return PROBLEM.dynamics.expand_step(x, u, 0, Theta(model, z, None), lam)


def linearisation(model, z, refs, x, guess):
    def one(z, refs, x, guess):
        point = kkt.Point(guess.us, guess.xs, guess.lams, guess.mus, guess.slacks)
        return kkt.expand(PROBLEM, Theta(model, z, refs), x, point, exact=False)

    return jax.vmap(one)(z, refs, x, guess)
