"""The price of a derivative: implicit, from one factorisation at the solution, against through all iterations.

Swing-up of a pendulum by box-DDP with Gauss-Newton curvature (the paper's box-iLQR), gradient of Σ|u|² in (g, m, l) of
every sample: time of the solve, time that the gradient adds, and memory, against iterations, horizon and batch. Where
mpc.pytorch is installed it stands beside them.

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.1 (Figure 2).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.presets import check_least, filled
from sartor.experiments.run_folder import opened
from sartor.files import read_json, write_json
from sartor.solve import solve
from sartor.solvers.box_ddp import BoxDDP
from sartor.systems import pendulum

Derivative = Literal["implicit", "unroll", "mpc.pytorch"]
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(iterations=(2, 4), horizons=(5,), batches=(2,), repeats=2),
    "quick": dict(iterations=(1, 4, 16), horizons=(10, 20, 40), batches=(1, 32, 128), repeats=5),
    "paper": dict(iterations=(1, 2, 4, 8, 16, 32, 64), horizons=(10, 20, 40, 80), batches=(1, 8, 32, 128), repeats=15),
}
_ITERATIONS, _HORIZON, _BATCH = 10, 20, 32  # where they are not varied


@dataclass(frozen=True)
class Config:
    """What a derivative costs. Numbers that are 0 and what is empty come from the preset."""

    experiment: Annotated[Literal["solver-cost"], tyro.conf.Suppress] = "solver-cost"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` and `paper` take minutes."""
    iterations: tuple[int, ...] = ()
    """Largest numbers of iterations; at the others there are 10."""
    horizons: tuple[int, ...] = ()
    """Numbers of stages; at the others there are 20."""
    batches: tuple[int, ...] = ()
    """Numbers of samples solved together; at the others there are 32."""
    repeats: int = 0
    """Measurements, of which the median counts."""
    peer: bool = True
    """Whether mpc.pytorch is measured as well, if it is installed."""
    workers: int = 1
    """1: times are taken in a process with one thread; 0: in this one."""

    def __post_init__(self):
        if self.workers not in (0, 1):
            raise ValueError(f"workers must be 0 or 1, not {self.workers}: two would slow each other down.")
        check_least(self, 1, "iterations", "horizons", "batches")
        check_least(self, 0, "repeats")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        return filled(self, _PRESETS[self.preset])


class Case(NamedTuple):
    """One measurement."""

    varied: Literal["iterations", "horizon", "batch"]
    derivative: Derivative
    iterations: int = _ITERATIONS
    horizon: int = _HORIZON
    batch: int = _BATCH

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.derivative}-{self.iterations}-{self.horizon}-{self.batch}"


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every case leaves one file, and `cases.json` holds all of them.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    kinds: tuple[Derivative, ...] = ("implicit", "unroll", "mpc.pytorch") if _peer(config) else ("implicit", "unroll")
    cases = [Case("iterations", kind, iterations=n) for n in config.iterations for kind in kinds]
    cases += [Case("horizon", kind, horizon=n) for n in config.horizons for kind in kinds]
    cases += [Case("batch", kind, batch=n) for n in config.batches for kind in kinds]
    files = [out / "cases" / f"{case.name}.json" for case in cases]
    with opened(out, config, monitor, command) as workers:
        different = dict(zip(files, cases, strict=True))  # where two sweeps meet there is one case
        workers.run("measure", [Job(file, measure, (case, config.repeats)) for file, case in different.items()])
        rows = [case._asdict() | read_json(file) for file, case in zip(files, cases, strict=True)]
        write_json(out / "cases.json", {"rows": rows})


def measure(output: Path, case: Case, repeats: int, monitor: Any) -> None:
    """Medians of the time of a solve, and of one with its gradient [s]; memory beside inputs and outputs [bytes]."""
    rng = np.random.default_rng(0)
    angle, rate = rng.uniform(-np.pi, np.pi, case.batch), rng.uniform(-1.0, 1.0, case.batch)
    x0s = np.stack([np.cos(angle), np.sin(angle), rate], 1)
    thetas = np.tile([10.0, 1.0, 1.0], (case.batch, 1)) * rng.uniform(0.9, 1.1, (case.batch, 3))
    if case.derivative == "mpc.pytorch":
        from sartor.experiments.mpc_pytorch import timed

        found = timed(x0s, thetas, case.iterations, case.horizon, repeats)
    else:
        found = _timed(case, jnp.asarray(x0s), jnp.asarray(thetas), repeats)
    write_json(output, found)


def _timed(case: Case, x0s: Array, thetas: Array, repeats: int) -> dict[str, float]:
    problem = pendulum.problem(case.horizon)
    solver = BoxDDP(curvature="gauss_newton", max_steps=case.iterations)
    derivative: Any = case.derivative

    def loss(theta, x0):
        sol = solve(problem, pendulum.Theta(*theta), x0, solver=solver, derivative=derivative, throw=False)
        return jnp.sum(sol.us**2)

    content, compiled = {}, {}
    for name, fn in (("solve", loss), ("both", jax.value_and_grad(loss))):
        begun = time.perf_counter()
        compiled[name] = jax.jit(jax.vmap(fn)).lower(thetas, x0s).compile()
        content[f"compile_{name}"] = time.perf_counter() - begun
        analysis = compiled[name].memory_analysis()
        content[f"memory_{name}"] = float(analysis.temp_size_in_bytes) if analysis is not None else float("nan")
    # In turns: what else the machine does meanwhile then slows both alike.
    times = np.array([[_seconds(fn, thetas, x0s) for fn in compiled.values()] for _ in range(repeats + 1)])[1:]
    content["solve"] = float(np.median(times[:, 0]))
    content["both"] = content["solve"] + float(np.median(times[:, 1] - times[:, 0]))
    return content


def _seconds(fn: Callable, *args: Any) -> float:
    """That a call takes."""
    begun = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - begun


def _peer(config: Config) -> bool:
    if not config.peer:
        return False
    try:
        import sartor.experiments.mpc_pytorch  # noqa: F401
    except ImportError:
        return False
    return True
