"""Tuning an MPC in closed loop, on a plant that its model gets wrong: any leaves of θ, and the plant is only run.

    min over θ:  F(θ) = C(x, u) + penalty · Σ max(h(x, u), 0),   x_{t+1} = plant(x_t, u_t),   u_t = π(x_t, θ)      (D21)

An iteration runs the plant at a candidate for θ, which is taken or refused, and with most estimators once more nearby.
The derivatives are the model's at the states of the plant (D20). From the rollouts that have been paid for, ridge
regression tells by how much the Jacobians of the model are wrong.

References: Zuliani, Balta, Lygeros, Policy Optimization for Unknown Systems using Differentiable MPC, 2026; the same,
Policy Optimization with Differentiable MPC: Convergence Analysis under Uncertainty, 2026 (re-identification).
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from sartor.bench import Bench, bench
from sartor.correction import Sums, lacking, nothing_seen, seen
from sartor.files import load_tree, save_tree
from sartor.mpc import MPC
from sartor.parameters import Where
from sartor.policy_gradient import Rollout, feedback
from sartor.tuning import AbstractMethod, Change, GaussNewton, Now, Objective, Score

Monitor = Callable[[int, int], None]
_SAVE_EVERY = 10.0  # [s]


class Curve(NamedTuple):
    """One entry for each iteration; with several seeds, a leading axis."""

    merit: Any
    """F at the candidate."""
    cost: Any
    """C at the candidate."""
    violation: Any
    """Σ max(h, 0) at the candidate."""
    taken: Any
    """Whether it took the place of θ."""
    failed: Any
    """Control steps whose solve failed."""
    rollouts: Any
    """Runs of the plant up to here, those nearby included."""


class Tuned(NamedTuple):
    """What came out."""

    theta: PyTree
    """Of the lowest merit."""
    last: PyTree
    """Of the last candidate that was taken."""
    curve: Curve


def tune(
    controller: MPC,
    plant: Callable,
    objective: Objective,
    x0: Float[Array, " nx"],
    num_steps: int,
    method: AbstractMethod | None = None,
    *,
    iterations: int = 100,
    learn: Where | None = None,
    model: Callable | None = None,
    ridge: float = 0.0,
    products: bool = False,
    project: Callable | None = None,
    refit: Callable | None = None,
    outside: bool = False,
    seed: int | Sequence[int] = 0,
    checkpoint: Path | None = None,
    monitor: Monitor | None = None,
    after_iteration: Callable[[int, PyTree, Curve], Any] | None = None,
) -> Tuned:
    """Tune leaves of θ such that the closed loop on a plant has a low cost and keeps its limits (D21).

    Args:
        controller: The MPC with θ to begin with; what must stay positive or within bounds is written as
            `positive(...)`, `bounded(...)`.
        plant: plant(x, u, k) -> x_next, only run, never differentiated. In JAX; or any function, with `outside`.
        objective: C, h and the penalty.
        x0: Initial state of every rollout, (nx,).
        num_steps: Control steps T of a rollout.
        method: How; `GaussNewton()` unless given.
        iterations: How many; one or two rollouts each.
        learn: The leaves that are tuned, as `lambda theta: (theta.Q, theta.R)`; by default all that are floating-point.
        model: model(x, u, k) -> x_next in JAX, whose Jacobians stand in for the plant's; the controller's own dynamics,
            as they are at first, unless given.
        ridge: Strength of the ridge regression that corrects these Jacobians by what the rollouts have shown, relative
            to the spread of states and controls; 0: no correction.
        products: Whether the correction may change along the way: products of states and controls count in the
            regression as well.
        project: project(theta) -> the nearest θ that is allowed, as a clip to a box. Leaves that are `positive(...)` or
            `bounded(...)` come as such.
        refit: refit(theta, change) -> θ with a model that has been corrected by `change.A`, `change.B`; needs `ridge`
            without `products`. Of the theta that it is given, what is not tuned is as it was at first, and so is what
            the change refers to.
        outside: The plant is not written in JAX: it is called with NumPy arrays, in order; at k = 0 it begins at `x0`.
        seed: Of the random directions; several seeds are computed in one batch, and results have a leading axis.
        checkpoint: File that keeps the state; if it exists, tuning goes on from there, to the same result; with other
            settings, `iterations` too, it is refused.
        monitor: monitor(done, total), called after every iteration.
        after_iteration: after_iteration(k, theta, curve), likewise, with the last θ that was taken and the curve so
            far; k counts from 1. If it returns True, tuning ends there.

    Returns: θ with the lowest merit seen, in the form of `controller.theta`, the last one taken, and the curve. Where a
        candidate's rollout is not finite, it is refused, and `curve.merit` is infinite. The tuned controller is
        `MPC(problem, sartor.values(tuned.theta))`.
    Fails: `ValueError` for wrong input, `FloatingPointError` if the first rollout or a derivative along it is not
        finite.
    """
    _check(iterations, ridge, products, refit, outside, seed)
    driven = bench(controller, plant, objective, x0, num_steps, learn, outside)
    loop = _Loop(driven, GaussNewton() if method is None else method, model, ridge, products, project, refit)
    theta = driven.theta
    seeds, several = np.asarray(seed), np.ndim(seed) > 0
    state = _begin(loop, theta)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds.size), state) if several else state
    kinds = Curve(float, float, float, bool, int, int)
    curve = Curve(*(np.zeros((*seeds.shape, iterations), kind) for kind in kinds))
    mark = _fingerprint(loop, theta, iterations, seed)
    done, ends, state, curve = _resume(checkpoint, mark, (np.asarray(0), np.asarray(False), state, curve))
    curve, saved = jax.tree.map(np.array, curve), time.monotonic()
    for k in range(int(done), int(done) if ends else iterations):
        state, row = _iterate(loop, state, jnp.asarray(k), jnp.asarray(seeds), several)
        for column, entry in zip(curve, row, strict=True):
            column[..., k] = entry
        if k == 0 and not np.isfinite(np.asarray(row.merit)).all():
            raise FloatingPointError("the first rollout of the plant is not finite: begin with θ that stabilises it.")
        if k == 0 and not _finite((state.local, state.memory)):
            raise FloatingPointError(
                "derivatives along the first rollout are not finite: look at those of model, objective and controller."
            )
        if monitor is not None:
            monitor(k + 1, iterations)
        so_far = Curve(*(column[..., : k + 1] for column in curve))
        ends = after_iteration is not None and bool(after_iteration(k + 1, state.theta, so_far))
        ends = ends or k + 1 == iterations
        if checkpoint is not None and (time.monotonic() - saved > _SAVE_EVERY or ends):
            save_tree(checkpoint, (mark, (np.asarray(k + 1), np.asarray(ends), state, curve)))
            saved = time.monotonic()
        done = k + 1
        if ends:
            break
    return Tuned(state.best, state.theta, Curve(*(column[..., : int(done)] for column in curve)))


class _State(NamedTuple):
    """Between two iterations."""

    theta: PyTree
    score: Score
    local: Any
    candidate: PyTree
    best: PyTree
    lowest: Array
    memory: Any
    sums: Sums
    rollouts: Array


class _Loop(eqx.Module):
    """What stays the same from one iteration to the next."""

    bench: Bench
    method: AbstractMethod
    model: Callable | None
    ridge: float = eqx.field(static=True)
    products: bool = eqx.field(static=True)
    project: Callable | None
    refit: Callable | None

    def surrogate(self, x: Array, u: Array, k: Any) -> Array:
        """What stands in for the plant: the given model, or that of the controller as it was at first."""
        if self.model is not None:
            return self.model(x, u, k)
        first = self.bench.build(self.bench.controller.theta)
        return first.problem.dynamics(x, u, jnp.asarray(0), first.theta_of(k))


def _begin(loop: _Loop, theta: PyTree) -> _State:
    """Before the first iteration: θ is a candidate."""
    theta = theta if loop.project is None else loop.project(theta)
    flat, x0 = loop.bench.flat(theta), loop.bench.x0
    sums = nothing_seen(x0.size, loop.bench.controller.problem.nu, x0.dtype, loop.products)
    infinite, nothing = jnp.asarray(jnp.inf, x0.dtype), jnp.zeros((), x0.dtype)
    score = Score(infinite, nothing, nothing, jnp.asarray(0))
    state = _State(theta, score, None, theta, theta, infinite, loop.method.init(flat), sums, jnp.asarray(0))
    # The first θ is always taken, so that what is known of it has to have the right form only.
    rollout, _ = eqx.filter_eval_shape(loop.bench.run, theta)
    local = eqx.filter_eval_shape(_known, loop, state, rollout, lacking(sums, loop.ridge))
    return state._replace(local=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), local))


def _iterate(loop: _Loop, state: _State, k: Array, seeds: Array, several: bool) -> tuple[_State, Curve]:
    """Run the candidate, take or refuse it, run nearby if the method asks for it, and step. The pieces are compiled one
    by one, so that both runs are the same code, and nothing is differentiated where nothing is new."""
    rollout, found = _over(several, Bench.run, loop.bench, state.candidate)
    state, taken, change = _over(several, _take, loop, state, rollout, found)
    if np.any(taken):
        state = _over(several, _look, loop, state, rollout, change, taken)
    v, slope, count = _over(several, _direction, loop, state, k, seeds), jnp.zeros_like(found.merit), 1
    nearby = loop.method.perturbation(v)
    if nearby is not None:
        _, there = _over(several, Bench.run, loop.bench, _over(several, _move, loop, state, nearby))
        slope, count = loop.method.slope(state.score.merit, there.merit), 2
    state = _over(several, _step, loop, state, found, taken, k, v, slope, change)
    state = state._replace(rollouts=state.rollouts + count)
    return state, Curve(found.merit, found.cost, found.violation, taken, found.failed, state.rollouts)


@eqx.filter_jit
def _over(several: bool, fn: Callable, first: Any, *args: Any) -> Any:
    """fn(first, *args), for all seeds at once if there are several; k is the same for all."""
    if not several:
        return fn(first, *args)
    axes = [None if isinstance(arg, Array) and arg.ndim == 0 else 0 for arg in args]
    return jax.vmap(lambda *args: fn(first, *args), axes)(*args)


def _take(loop: _Loop, state: _State, rollout: Rollout, found: Score) -> tuple[_State, Array, Change]:
    """θ is the candidate, or stays; what the rollout has shown is kept in any case."""
    taken = loop.method.takes(state.score, found, state.memory) & jnp.isfinite(found.merit)
    sums = seen(state.sums, loop.surrogate, rollout, jnp.isfinite(found.merit))
    theta, score = _where(taken, (state.candidate, found), (state.theta, state.score))
    best = _where(found.merit < state.lowest, state.candidate, state.best)
    lowest = jnp.minimum(found.merit, state.lowest)
    state = state._replace(theta=theta, score=score, best=best, lowest=lowest, sums=sums)
    return state, taken, lacking(sums, loop.ridge)


def _look(loop: _Loop, state: _State, rollout: Rollout, change: Change, taken: Array) -> _State:
    """What is known of a new θ."""
    return state._replace(local=_where(taken, _known(loop, state, rollout, change), state.local))


def _known(loop: _Loop, state: _State, rollout: Rollout, change: Change) -> Any:
    along = feedback(loop.bench.build(state.theta), rollout, loop.surrogate)
    build = lambda flat: loop.bench.build(loop.bench.at(state.theta, flat))
    return loop.method.look(loop.bench.objective, loop.bench.flat(state.theta), build, rollout, along, change)


def _direction(loop: _Loop, state: _State, k: Array, seed: Array) -> Array:
    """Uniform on the sphere."""
    flat = loop.bench.flat(state.theta)
    v = jax.random.normal(jax.random.fold_in(jax.random.key(seed), k), flat.shape, flat.dtype)
    return v / jnp.linalg.norm(v)


def _move(loop: _Loop, state: _State, by: Array) -> PyTree:
    """θ somewhere else."""
    return loop.bench.at(state.theta, loop.bench.flat(state.theta) + by)


def _step(
    loop: _Loop, state: _State, found: Score, taken: Array, k: Array, v: Array, slope: Array, change: Change
) -> _State:
    """The next candidate. If the run nearby was not finite, nor is the step: θ is run again."""
    now = Now(k, loop.bench.flat(state.theta), state.local, state.score, found, taken, v, slope, change)
    step, memory = loop.method.step(loop.bench.objective, now, state.memory)
    usable = jnp.all(jnp.isfinite(step))
    flat = now.flat + jnp.where(usable, step, 0.0)
    candidate = loop.bench.at(state.theta, flat)
    if loop.refit is not None:
        candidate = loop.refit(loop.bench.at(loop.bench.controller.theta, flat), change)
    candidate = candidate if loop.project is None else loop.project(candidate)
    return state._replace(candidate=candidate, memory=_where(usable, memory, state.memory))


def _finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


def _where(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _check(iterations, ridge, products, refit, outside, seed) -> None:
    if not iterations >= 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}.")
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, not {ridge}.")
    if refit is not None and ridge == 0:
        raise ValueError("refit needs what the rollouts have shown: give ridge, as 1e-3.")
    if products and (refit is not None or ridge == 0):
        raise ValueError("products needs ridge, as 1e-4, and no refit, which is told constant Jacobians.")
    if outside and np.ndim(seed):
        raise ValueError("a plant outside of JAX runs once at a time: give one seed.")


def _fingerprint(loop: _Loop, theta: PyTree, iterations: int, seed: Any) -> np.ndarray:
    """Of what the result depends on, functions of the user apart, which have no lasting name."""
    settings = jax.tree.map(lambda leaf: leaf if eqx.is_array_like(leaf) else "", loop.method)
    told = (
        repr(type(loop.method)),
        repr(settings),
        loop.bench.num_steps,
        loop.ridge,
        loop.products,
        iterations,
        np.asarray(seed).tolist(),
    )
    digest = hashlib.sha256(repr(told).encode())
    for leaf in jax.tree.leaves((theta, loop)):
        if eqx.is_array_like(leaf):
            digest.update(np.asarray(leaf).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _resume(checkpoint: Path | None, mark: np.ndarray, begin: tuple) -> tuple:
    if checkpoint is None or not checkpoint.exists():
        return begin
    stored_mark, stored = load_tree(checkpoint, (mark, begin))
    if not np.array_equal(stored_mark, mark):
        raise ValueError(f"{checkpoint} is of tuning something else, or with other settings: delete it.")
    return stored
