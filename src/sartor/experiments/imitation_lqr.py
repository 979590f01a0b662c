"""Learning a linear model by imitating a controller: where gradients get stuck, and what does not.

    x_{k+1} = A x_k + B u_k,   |u| ≤ 1,   ℓ = ½ |x|² + ½ |u|² + pᵀ[x; u],   θ = (A, B);   3 states, 3 controls

The expert and the learner differ in A and B alone. `rmsprop` is as published; `gauss_newton` takes Levenberg and
Marquardt's steps on all samples; `starts` does so from several random models and keeps the one with the lowest loss.

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.2 (Figure 3), numbers that
the text leaves open from its code.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

from sartor.descent import Curve, Learning, LevenbergMarquardt
from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.presets import check_least, filled
from sartor.experiments.run_folder import opened
from sartor.files import read_json, write_json
from sartor.imitate import Demonstrations, imitate
from sartor.problem import Problem
from sartor.solve import solve

N_STATES = 3
HORIZON = 4  # the 5 controls of the paper less the last one, which moves no state
Method = Literal["rmsprop", "gauss_newton", "starts"]
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(seeds=2, iterations=40, steps=10, starts=2),
    "quick": dict(seeds=8, iterations=2000, steps=40, starts=12),
    "paper": dict(seeds=8, iterations=5000, steps=40, starts=12),
}
_POINTS = 300  # of a curve that is kept
RECOVERED = 1e-3  # model loss below which the true model counts as found: entries of size 1 are off by 3 %


@dataclass(frozen=True)
class Config:
    """Imitation of a linear-quadratic controller. Numbers that are 0 come from the preset."""

    experiment: Annotated[Literal["imitation-lqr"], tyro.conf.Suppress] = "imitation-lqr"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` and `paper` take minutes."""
    methods: tuple[Method, ...] = ("rmsprop", "gauss_newton", "starts")
    """How to learn."""
    seeds: int = 0
    """Models to begin with."""
    iterations: int = 0
    """Gradient steps of RMSprop."""
    steps: int = 0
    """Steps of Levenberg and Marquardt, at most."""
    starts: int = 0
    """Models that `starts` begins with."""
    samples: int = 128
    """Initial states."""
    batch: int = 32
    """Of them in a gradient step."""
    bound: float = 1.0
    """Of the controls; inf as in the authors' code."""
    states: float = 1.0
    """Weight of the states in the loss; with 0 controls alone are imitated."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        check_least(self, 0, "seeds", "iterations", "steps", "starts", "workers", "states")
        check_least(self, 1, "samples", "batch")
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, not {self.bound}.")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        return filled(self, _PRESETS[self.preset])


class Theta(NamedTuple):
    """A linear model, and the linear part of the cost, which is known."""

    A: Any  # (3, 3)
    B: Any  # (3, 3)
    p: Any  # (6,)


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every trial leaves one file, and `trials.json` holds all of them.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    names = {(method, seed): out / "trials" / f"{method}-{seed}.json" for method in config.methods
             for seed in range(config.seeds)}  # fmt: skip
    with opened(out, config, monitor, command) as workers:
        workers.run("learn", [Job(path, learn, (*trial, config)) for trial, path in names.items()])
        write_json(out / "trials.json", {"rows": [read_json(path) for path in names.values()]})


def learn(output: Path, method: Method, seed: int, config: Config, monitor: Any) -> None:
    """One trial from one random model."""
    problem, (true, data) = _problem(config.bound), _expert(config)
    begun = time.perf_counter()
    if method == "rmsprop":
        batches = max(1, config.samples // config.batch)
        how = Learning(epochs=-(-config.iterations // batches), batch=config.batch, seed=seed, restart=0)
        optimiser, starts = None, 1
    else:
        how = Learning(epochs=config.steps, patience=8, seed=seed, restart=0)
        optimiser, starts = LevenbergMarquardt(), config.starts if method == "starts" else 1
    tried = []
    for start in range(starts):
        far: list[float] = []
        keep = lambda epoch, theta, far=far: far.append(_model_loss(theta, true))
        found = imitate(
            problem, _model(1000 * (seed + 1) + start, true), data, how, learn=_A_and_B, optimiser=optimiser,
            states=config.states, after_epoch=keep,
            monitor=lambda done, total, start=start: monitor(start * total + done, starts * total),
        )  # fmt: skip
        tried.append((found.curve, far))
        if found.curve.train[-1] < 1e-20:  # nothing can be better
            break
    curve, far = min(tried, key=lambda t: t[0].train[-1])
    write_json(output, _row(method, seed, curve, far, tried, time.perf_counter() - begun))


def _row(method: str, seed: int, curve: Curve, far: list[float], tried: list, seconds: float) -> dict[str, Any]:
    epochs = np.unique(np.linspace(0, len(far) - 1, min(_POINTS, len(far))).astype(int))
    return {
        "method": method, "seed": seed, "model": far[-1], "imitation": float(curve.train[-1]), "time": seconds,
        "starts": len(tried), "epochs": sum(len(f) for _, f in tried), "failed": int(curve.failed.sum()),
        "epoch": (1 + epochs).tolist(), "model_curve": np.array(far)[epochs].tolist(),
        "imitation_curve": curve.train[epochs].tolist(),
    }  # fmt: skip


def _problem(bound: float) -> Problem:
    limits = np.full(N_STATES, bound)
    return Problem(
        dynamics=_dynamics, stage_cost=_stage_cost, terminal_cost=_terminal_cost, horizon=HORIZON, u_min=-limits,
        u_max=limits,
    )  # fmt: skip


def _dynamics(x: Array, u: Array, k: Any, theta: Theta) -> Array:
    return theta.A @ x + theta.B @ u


def _stage_cost(x: Array, u: Array, k: Any, theta: Theta) -> Float[Array, ""]:
    return _terminal_cost(x, theta) + 0.5 * u @ u + theta.p[N_STATES:] @ u


def _terminal_cost(x: Array, theta: Theta) -> Float[Array, ""]:
    return 0.5 * x @ x + theta.p[:N_STATES] @ x


def _expert(config: Config) -> tuple[Theta, Demonstrations]:
    """The true model, and the plans from random states."""
    rng = np.random.default_rng(0)
    true = _model(0, Theta(None, None, rng.standard_normal(2 * N_STATES)))
    x0s = jnp.asarray(rng.standard_normal((config.samples, N_STATES)))
    problem = _problem(config.bound)
    sols = jax.jit(jax.vmap(lambda x0: solve(problem, true, x0, throw=False)))(x0s)
    return true, Demonstrations(np.asarray(sols.us), np.asarray(sols.xs))


def _model(seed: int, known: Theta) -> Theta:
    """A = I + 0.2 N(0, I), B = N(0, I)."""
    rng = np.random.default_rng(seed)
    A = np.eye(N_STATES) + 0.2 * rng.standard_normal((N_STATES, N_STATES))
    return Theta(jnp.asarray(A), jnp.asarray(rng.standard_normal((N_STATES, N_STATES))), jnp.asarray(known.p))


def _model_loss(theta: Theta, true: Theta) -> float:
    off = jnp.concatenate([theta.A - true.A, theta.B - true.B])
    return float(jnp.mean(off**2))


def _A_and_B(theta: Theta) -> Any:
    return theta.A, theta.B
