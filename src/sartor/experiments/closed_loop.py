"""One system in closed loop with its MPC: does it reach its goal, do solves fail, how long do they take?"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from sartor import files
from sartor.experiments.presets import check_least, filled
from sartor.experiments.run_folder import environment
from sartor.mpc import MPC, Episode, LoopState, Step, advance, begin, episode
from sartor.problem import Softening
from sartor.solution import RESULTS
from sartor.solvers.sqp import SQP
from sartor.systems import SYSTEMS, System

Monitor = Callable[[str, int, int], None]
"""monitor(phase, done, total), called as the run proceeds."""

_REASONS = ("successful", "not_converged", "infeasible", "non_finite", "singular")
_SMOKE = {"num_steps": 12, "horizon": 8}
_FULL = {
    "pendulum": {"num_steps": 100, "horizon": 20},
    "cartpole": {"num_steps": 100, "horizon": 25},
    "quadrotor": {"num_steps": 100, "horizon": 20},
}
_CHECKPOINT_EVERY = 2.0  # [s]


@dataclass(frozen=True)
class Config:
    """A closed loop."""

    system: Annotated[Literal["pendulum", "cartpole", "quadrotor"], tyro.conf.Suppress] = "pendulum"
    """Which system."""
    preset: Literal["smoke", "full"] = "full"
    """Where `num_steps` and `horizon` come from unless they are given: `smoke` takes seconds."""
    num_steps: int = 0
    """Number of control steps; 0: as the preset says."""
    horizon: int = 0
    """Horizon of the MPC, in stages; 0: as the preset says."""
    real_time: bool = False
    """One SQP step per control step (the real-time iteration) instead of solving until converged."""
    disturbance: float = 0.0
    """Standard deviation of the noise added to every state at every control step, in the state's unit."""
    seed: int = 0
    """Seed of the initial state and of the noise."""
    precision: Literal["float64", "float32"] = "float64"
    """Floating-point numbers of the plant and of the solver."""
    chunk: int = 1
    """Control steps per call into compiled code. Solve times are means over a chunk."""

    def __post_init__(self):
        check_least(self, 0, "num_steps", "horizon", "disturbance")
        check_least(self, 1, "chunk")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        return filled(self, _SMOKE if self.preset == "smoke" else _FULL[self.system])


class Loop(NamedTuple):
    """Everything that a closed loop consists of, from a `Config`."""

    system: System
    plant: Callable
    controller: MPC
    x0: Array
    disturbance: Callable | None
    key: Array | None

    def begin(self) -> LoopState:
        """Before the first control step, with the cold solve done."""
        return begin(self.controller, self.x0)

    def advance(self, state: LoopState, num_steps: int) -> tuple[LoopState, Step]:
        """The next control steps."""
        return advance(self.plant, self.controller, state, num_steps, self.disturbance, self.key)


class Progress(NamedTuple):
    """A run between two chunks."""

    state: LoopState
    steps: list[Step]  # one for each chunk so far
    times: list[np.ndarray]  # wall time of each control step in each of them [s]

    @property
    def num_steps(self) -> int:
        """Control steps so far."""
        return sum(map(len, self.times))


def run(config: Config, out: Path, monitor: Monitor = lambda phase, done, total: None) -> dict[str, Any]:
    """Run the closed loop and write `config.json`, `episode.npz` and `metrics.json` into `out`.

    If `out` holds the checkpoint of an interrupted run of the same config, it goes on from there; apart from
    times, the outcome is the same as without the interruption.

    Returns:
        The metrics.

    Fails: `ValueError` for a config that cannot run, or a folder with a run of another config. Whatever else
        ends it early (Ctrl-C included) leaves a checkpoint behind.
    """
    config = config.resolved()
    loop = build(config)
    _claim(config, out)
    started = time.perf_counter()
    monitor("compile", 0, 1)
    progress = _restore(loop, out / "checkpoint.npz")
    compiled = _compile(loop, progress.state, _chunk_sizes(config, progress.num_steps))
    compile_time = time.perf_counter() - started
    monitor("compile", 1, 1)
    progress = _simulate(progress, compiled, config, out, monitor)
    ep = episode(loop.x0, jax.tree.map(jnp.asarray, _join(progress.steps)), loop.system.DT)
    times = _join(progress.times)
    metrics = summary(loop, ep, times) | {"compile_time": compile_time, **environment()}
    files.save_arrays(out / "episode.npz", **_arrays(ep), times=times)
    files.write_json(out / "metrics.json", metrics)
    (out / "checkpoint.npz").unlink(missing_ok=True)
    return metrics


def build(config: Config) -> Loop:
    """System, plant and controller of a resolved config."""
    if config.precision == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError('precision is float64: call jax.config.update("jax_enable_x64", True) first.')
    dtype = jnp.dtype(config.precision)
    system = SYSTEMS[config.system]
    theta = system.default_theta(dtype)
    soft = {"softening": Softening(linear=100.0, quadratic=100.0)} if config.system == "quadrotor" else {}
    solver = SQP(real_time=True, max_steps=1) if config.real_time else SQP()
    controller = MPC(system.problem(config.horizon, **soft), theta, solver=solver)
    key_x0, key = jax.random.split(jax.random.key(config.seed))
    plant = eqx.Partial(system.plant_step, theta=theta)
    x0 = system.sample_x0(key_x0, dtype)
    if config.disturbance == 0.0:
        return Loop(system, plant, controller, x0, None, None)
    return Loop(system, plant, controller, x0, eqx.Partial(_gaussian, config.disturbance), key)


def _gaussian(std: float, key: Array, x: Array, u: Array, k: Array) -> Array:
    return std * jax.random.normal(key, x.shape, x.dtype)


def _claim(config: Config, out: Path) -> None:
    """Make the folder that of this config."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    if path.exists() and files.read_json(path) != asdict(config):
        raise ValueError(f"{out} holds a run of another config: choose another folder.")
    files.write_json(path, asdict(config))


def _restore(loop: Loop, path: Path) -> Progress:
    """From the checkpoint if there is one, else from the start."""
    if not path.exists():
        return Progress(loop.begin(), [], [])
    state = eqx.filter_eval_shape(loop.begin)
    _, steps = eqx.filter_eval_shape(loop.advance, state, 1)
    state, steps, times = files.load_tree(path, (state, steps, 0))
    return Progress(state, [steps], [np.asarray(times)])


def _save(progress: Progress, path: Path) -> None:
    if progress.steps:
        files.save_tree(path, (progress.state, _join(progress.steps), _join(progress.times)))


def _join(chunks: list) -> Any:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


def _chunk_sizes(config: Config, done: int) -> list[int]:
    """Control steps of each chunk that is still to come; the last one may be shorter."""
    full, rest = divmod(config.num_steps - done, config.chunk)
    return [config.chunk] * full + [rest] * (rest > 0)


def _compile(loop: Loop, state: LoopState, sizes: list[int]) -> dict[int, Callable]:
    """Compiled code for each size of a chunk; each is called once here, as a first call takes longer."""

    def compile(size: int) -> Callable:
        before, after = (loop.plant, loop.controller), (size, loop.disturbance, loop.key)
        jitted: Any = eqx.filter_jit(advance)
        code = jitted.lower(*before, state, *after).compile()
        jax.block_until_ready(code(*before, state, *after))
        return lambda state: code(*before, state, *after)

    return {size: compile(size) for size in set(sizes)}


def _simulate(
    progress: Progress, compiled: dict[int, Callable], config: Config, out: Path, monitor: Monitor
) -> Progress:
    """All chunks still to come, with a checkpoint every few seconds and at whatever ends them early."""
    saved = time.perf_counter()
    try:
        for size in _chunk_sizes(config, progress.num_steps):
            started = time.perf_counter()
            state, steps = jax.block_until_ready(compiled[size](progress.state))
            now = time.perf_counter()
            times = np.full(size, (now - started) / size)
            progress = Progress(state, [*progress.steps, jax.device_get(steps)], [*progress.times, times])
            if now - saved > _CHECKPOINT_EVERY:
                _save(progress, out / "checkpoint.npz")
                saved = now
            monitor("simulate", progress.num_steps, config.num_steps)
    except BaseException:
        _save(progress, out / "checkpoint.npz")
        raise
    return progress


def summary(loop: Loop, ep: Episode, times: np.ndarray) -> dict[str, Any]:
    """Metrics of an episode whose control steps took `times` [s], and what a report needs to know."""
    problem, system = loop.controller.problem, loop.system
    error = ep.xs[-1] - system.goal(loop.controller.theta)
    names, counts = np.unique(_reasons(ep.results), return_counts=True)
    failures = {str(name): int(n) for name, n in zip(names, counts, strict=True) if name != "successful"}
    return {
        "num_steps": len(ep.us),
        "dt": ep.dt,
        "cost": float(jnp.sum(ep.costs)),
        "final_error": float(jnp.linalg.norm(error)),
        "failed_share": float(jnp.mean(ep.results != RESULTS.successful)),
        "failures": failures,
        "median_steps": float(np.median(ep.num_steps)),
        "max_steps": int(np.max(ep.num_steps)),
        "median_time": float(np.median(times)),
        "p99_time": float(np.percentile(times, 99)),
        "max_kkt_norm": float(jnp.max(ep.kkt_norms)),
        "states": list(system.STATES),
        "controls": list(system.CONTROLS),
        "u_min": problem.u_min.tolist(),
        "u_max": problem.u_max.tolist(),
    }


def _arrays(ep: Episode) -> dict[str, np.ndarray]:
    """An episode as plain arrays; `results` as names."""
    fields = ("xs", "us", "costs", "num_steps", "kkt_norms")
    return {name: np.asarray(getattr(ep, name)) for name in fields} | {"results": _reasons(ep.results)}


def _reasons(results: RESULTS) -> np.ndarray:
    names = np.empty(np.shape(results == RESULTS.successful), "<U16")
    for name in _REASONS:
        names[np.asarray(results == getattr(RESULTS, name))] = name
    return names
