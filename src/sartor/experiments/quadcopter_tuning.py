"""Tuning the MPC of a quadcopter whose linear model is wrong: published ways, and better ones.

    model, zeroth, hybrid.25 .50 .75    as published: schedule, step sizes, no step is refused
    alpha, inverse_variance,            other estimators of the gradient with the same steps
    control_variate
    control_variate.monotone, .scaled   steps that do not lower the measured merit are refused; parameters in units of
                                        their size
    reidentified(.monotone)             the model is fitted anew to all rollouts so far, by ridge regression, and steps
                                        follow its gradient
    gauss_newton                        steps of Gauss and Newton with an exact penalty
    gauss_newton.constant               the same, with Jacobians that ridge regression corrects by constant matrices
    gauss_newton.corrected              the same, corrected by matrices that change along the way: ours
    gauss_newton.unkicked               that without steps at random
    gauss_newton.exact, model.exact     with the plant's own Jacobians, as bounds
    cma_es                              without any derivative

Source: Zuliani, Balta, Lygeros, Policy Optimization for Unknown Systems using Differentiable MPC, 2026, section 5.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from sartor import estimators
from sartor.bench import Bench, bench
from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.presets import check_least, filled
from sartor.experiments.quadcopter_models import LEVELS, Level, Mismatch, identified
from sartor.experiments.run_folder import opened
from sartor.files import read_json, write_json
from sartor.mpc import MPC
from sartor.policy_gradient import roll_out
from sartor.problem import Problem
from sartor.solution import guess
from sartor.solve import solve
from sartor.solvers.sqp import SQP
from sartor.systems import quadcopter
from sartor.systems.quadcopter import Theta
from sartor.tune import Curve, tune
from sartor.tuning import AbstractMethod, Descent, GaussNewton, Objective, Score

Method = Literal[
    "model", "zeroth", "hybrid.25", "hybrid.50", "hybrid.75", "alpha", "inverse_variance", "control_variate",
    "control_variate.monotone", "control_variate.scaled", "reidentified", "reidentified.monotone", "gauss_newton",
    "gauss_newton.constant", "gauss_newton.corrected", "gauss_newton.unkicked", "gauss_newton.exact", "model.exact",
    "cma_es",
]  # fmt: skip
METHODS: tuple[Method, ...] = Method.__args__
_ALWAYS_THE_SAME: tuple[Method, ...] = (
    "model", "reidentified", "reidentified.monotone", "gauss_newton.unkicked", "model.exact",
)  # fmt: skip
_ON_OTHER_DATA: tuple[Method, ...] = (
    "model", "hybrid.25", "control_variate.monotone", "gauss_newton.constant", "gauss_newton.corrected",
    "gauss_newton.exact",
)  # fmt: skip
_FIRST_OTHER = 11  # seed of data; none of those used here has been left out
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        levels=("small",), methods=("hybrid.25", "gauss_newton.corrected"), seeds=1, others=1, iterations=2,
        newton_iterations=3,
    ),
    "quick": dict(
        levels=("comparable", "large"), seeds=1, others=0, iterations=100, newton_iterations=40,
        methods=("model", "zeroth", "hybrid.25", "control_variate.monotone", "gauss_newton.corrected",
                 "gauss_newton.exact"),
    ),
    "paper": dict(levels=tuple(LEVELS), methods=METHODS, seeds=10, others=5, iterations=300, newton_iterations=60),
}  # fmt: skip
_RIDGE, _RIDGE_WITH_PRODUCTS = 1e-2, 1e-4
_HOPELESS = 2  # rollouts without a solve in a row
_POPULATION = 17  # of CMA-ES: its default for 94 parameters


@dataclass(frozen=True)
class Config:
    """Tuning an MPC on a plant that its model gets wrong. Numbers that are 0 and what is empty come from the preset."""

    experiment: Annotated[Literal["quadcopter-tuning"], tyro.conf.Suppress] = "quadcopter-tuning"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes minutes, `paper` hours."""
    levels: tuple[Level, ...] = ()
    """How wrong the model is."""
    methods: tuple[Method, ...] = ()
    """How to tune."""
    seeds: int = 0
    """Of random directions; methods without any run once."""
    others: int = 0
    """Models from other data of the same kind, on which the chief methods run once each."""
    iterations: int = 0
    """Iterations of descent; CMA-ES has twice as many rollouts."""
    newton_iterations: int = 0
    """Iterations of Gauss and Newton's steps."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        check_least(self, 0, "seeds", "iterations", "others", "newton_iterations", "workers")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        return filled(self, _PRESETS[self.preset])


class Trial(NamedTuple):
    """One tuning."""

    level: Level
    method: Method
    seed: int
    data: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.level}-{self.method}-{self.seed}-{self.data}"

    @property
    def mismatch(self) -> Mismatch:
        """The declared model of the level, or one from other data."""
        declared = LEVELS[self.level]
        return declared._replace(seed=_FIRST_OTHER + self.data - 1) if self.data else declared


class Recipe(NamedTuple):
    """A method, and the options of `tune` that go with it."""

    method: AbstractMethod
    options: dict[str, Any] = {}


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every trial leaves one file, and `trials.json` holds all of them.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    trials = _trials(config)
    files = [out / "trials" / f"{trial.name}.json" for trial in trials]
    with opened(out, config, monitor, command) as workers:
        workers.run("bound", [Job(out / "bound.json", bound, ())])
        workers.run("tune", [Job(file, tuned, (trial, config)) for file, trial in zip(files, trials, strict=True)])
        optimum = read_json(out / "bound.json")
        rows = [read_json(file) for file in files]
        write_json(out / "trials.json", {"optimum": optimum, "rows": rows}, indent=None)  # long lists of numbers


def tuned(output: Path, trial: Trial, config: Config, monitor: Any) -> None:
    """One trial: merit and violation of every candidate, against rollouts."""
    start = _controller(trial.mismatch)
    begun = time.perf_counter()
    if trial.method == "cma_es":
        merit, violation, taken, rollouts = _evolved(start, trial.seed, 2 * config.iterations, monitor)
    else:
        recipe = _recipes()[trial.method]
        newton = isinstance(recipe.method, GaussNewton)
        checkpoint = output.with_suffix(".npz")
        found = tune(
            start, plant, OBJECTIVE, jnp.asarray(quadcopter.X0), quadcopter.NUM_STEPS, recipe.method,
            iterations=config.newton_iterations if newton else config.iterations, learn=_cost, seed=trial.seed,
            checkpoint=checkpoint, monitor=monitor, after_iteration=_lost, **recipe.options,
        )  # fmt: skip
        merit, violation, taken, rollouts = (
            found.curve.merit, found.curve.violation, found.curve.taken, found.curve.rollouts
        )  # fmt: skip
        checkpoint.unlink(missing_ok=True)
    content = {
        **trial._asdict(), "time": time.perf_counter() - begun, "rollouts": np.asarray(rollouts, int).tolist(),
        "taken": np.asarray(taken, int).tolist(), "merit": _rounded(merit), "violation": _rounded(violation),
    }  # fmt: skip
    write_json(output, content)


def bound(output: Path, monitor: Any) -> None:
    """The cheapest trajectory of the plant that keeps all limits, sought from the first closed loop."""
    problem = Problem(
        dynamics=lambda x, u, k, theta: quadcopter.plant_step(x, u),
        stage_cost=lambda x, u, k, theta: quadcopter.stage_cost(x, u),
        terminal_cost=lambda x, theta: quadcopter.final_cost(x, theta),
        horizon=quadcopter.NUM_STEPS, u_min=[0.0] * 4, u_max=[quadcopter.U_MAX] * 4,
        constraints=lambda x, u, k, theta: jnp.where(k > 0, quadcopter.rows(x), -1.0),
        terminal_constraints=lambda x, theta: quadcopter.rows(x),
    )  # fmt: skip
    start = roll_out(plant, _controller(LEVELS["small"]), jnp.asarray(quadcopter.X0), quadcopter.NUM_STEPS)
    sol = solve(problem, _terminal_weight(), jnp.asarray(quadcopter.X0), guess=guess(start.xs, start.us), throw=False)
    write_json(output, {"cost": float(sol.cost), "successful": bool(sol.successful)})


def plant(x: Array, u: Array, k: Any) -> Array:
    """The true system."""
    return quadcopter.plant_step(x, u)


def cost(xs: Array, us: Array) -> Array:
    """C, with the terminal weight of the true system, so that it is the same for all models."""
    return quadcopter.closed_loop_cost(xs, us, jnp.asarray(_terminal_weight()))


OBJECTIVE = Objective(cost, quadcopter.closed_loop_rows, 1e4)


def _rate(k: Any) -> Any:
    """α_k, as published."""
    return 2e-4 * jnp.log(k + 2.0) / (k + 1.0) ** 0.8


def _lost(k: int, theta: Any, curve: Curve) -> bool:
    """Whether no solve has succeeded at the last candidates taken: the loop has diverged, and nothing leads back."""
    unsolved = (curve.failed == quadcopter.NUM_STEPS) & (curve.taken > 0)
    return k >= _HOPELESS and bool(np.all(unsolved[-_HOPELESS:]))


def _refitted(theta: Theta, change: Any) -> Theta:
    """The MPC with a corrected model."""
    return theta._replace(A=theta.A + change.A, B=theta.B + change.B)


@cache
def _recipes() -> dict[Method, Recipe]:
    published = lambda estimator: Descent(estimator, _rate, monotone=False)
    e, exact = estimators, {"model": plant}
    again = {"ridge": _RIDGE, "refit": _refitted}
    sizes = jnp.abs(_flat(_controller(LEVELS["small"]))) + 0.1
    return {
        "model": Recipe(published(e.Model())),
        "zeroth": Recipe(published(e.Zeroth())),
        "hybrid.25": Recipe(published(e.Hybrid(0.25))),
        "hybrid.50": Recipe(published(e.Hybrid(0.5))),
        "hybrid.75": Recipe(published(e.Hybrid(0.75))),
        "alpha": Recipe(published(e.Alpha())),
        "inverse_variance": Recipe(published(e.InverseVariance())),
        "control_variate": Recipe(published(e.ControlVariate())),
        "control_variate.monotone": Recipe(Descent(e.ControlVariate(), float(_rate(0)))),
        "control_variate.scaled": Recipe(Descent(e.ControlVariate(), float(_rate(0)), scales=sizes)),
        "reidentified": Recipe(published(e.Model()), again),
        "reidentified.monotone": Recipe(Descent(e.Model(), float(_rate(0))), again),
        "gauss_newton": Recipe(GaussNewton()),
        "gauss_newton.constant": Recipe(GaussNewton(), {"ridge": _RIDGE}),
        "gauss_newton.corrected": Recipe(GaussNewton(), {"ridge": _RIDGE_WITH_PRODUCTS, "products": True}),
        "gauss_newton.unkicked": Recipe(GaussNewton(patience=0), {"ridge": _RIDGE_WITH_PRODUCTS, "products": True}),
        "gauss_newton.exact": Recipe(GaussNewton(), exact),
        "model.exact": Recipe(published(e.Model()), exact),
    }


def _evolved(start: MPC, seed: int, rollouts: int, monitor: Callable) -> tuple[list, list, list, list]:
    """CMA-ES in units of the parameters' sizes, one rollout a candidate."""
    import cma  # here, as it takes a second that all other commands save

    driven = bench(start, plant, OBJECTIVE, jnp.asarray(quadcopter.X0), quadcopter.NUM_STEPS, _cost)
    flat = np.asarray(driven.flat(driven.theta))
    sizes = np.abs(flat) + 0.1

    search = cma.CMAEvolutionStrategy(
        np.zeros(flat.size), 0.1, {"seed": seed + 1, "popsize": _POPULATION, "verbose": -9}
    )
    merits, violations, taken = [], [], []
    while len(merits) < rollouts:
        candidates, values = search.ask(), []
        for candidate in candidates:
            score = _measured(driven, jnp.asarray(flat + sizes * candidate))
            merit = float(score.merit)
            taken.append(merit < min(merits, default=np.inf))
            merits.append(merit)
            violations.append(float(score.violation))
            values.append(min(merit, 1e12))
        search.tell(candidates, values)
        monitor(min(len(merits), rollouts), rollouts)
    return merits, violations, taken, list(range(1, len(merits) + 1))


@eqx.filter_jit
def _measured(driven: Bench, flat: Array) -> Score:
    return driven.run(driven.at(driven.theta, flat))[1]


_SOLVER = SQP(line_search=False)  # the MPC is a quadratic program: full steps


def _controller(mismatch: Mismatch) -> MPC:
    return MPC(quadcopter.problem(), quadcopter.start(*identified(mismatch)), solver=_SOLVER)


def _trials(config: Config) -> list[Trial]:
    """All seeds on the declared models, then the other data."""
    declared = [
        Trial(level, method, seed, 0)
        for seed in range(config.seeds) for level in config.levels for method in config.methods
        if seed == 0 or method not in _ALWAYS_THE_SAME
    ]  # fmt: skip
    others = [
        Trial(level, method, 0, data)
        for data in range(1, config.others + 1) for level in config.levels for method in config.methods
        if method in _ON_OTHER_DATA
    ]  # fmt: skip
    return declared + others


@cache
def _terminal_weight() -> np.ndarray:
    return quadcopter.terminal_weight(*quadcopter.linearised())


def _cost(theta: Theta) -> Any:
    return theta.Q, theta.R, theta.P


def _flat(controller: MPC) -> Array:
    return ravel_pytree(_cost(controller.theta))[0]


def _rounded(values: Any) -> list:
    return [float(f"{v:.7g}") if np.isfinite(v) else None for v in np.asarray(values, float)]
