"""The racing car, on one core: real-time steps of three horizons, and the labels of a lap in one call.

    python benchmarks/racing.py --quick

prints tables and writes them, with all the numbers, to benchmarks/results.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from run import bind_to_one_core, describe, file_name, setting, write, write_numbers

PACKAGES = ("sartor", "jax", "jaxlib", "numpy")


@dataclass(frozen=True)
class Config:
    """Measure the control step and the labels of the racing experiment; tables go to benchmarks/results."""

    horizons: tuple[int, ...] = (20, 40, 80)
    """N of the MPC."""
    label_horizons: tuple[int, ...] = (40, 80)
    """N of the labels."""
    num_steps: int = 300
    """Control steps of a closed loop, some 10 s."""
    repetitions: int = 3
    """Of the labels of a drive, of which the median counts."""
    quick: bool = False
    """A smoke test."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the results."""


def main(config: Config) -> None:
    bind_to_one_core()
    if config.quick:
        config = replace(config, horizons=(20,), label_horizons=(20,), num_steps=60, repetitions=1)
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=220)
    description, load = describe(PACKAGES), os.getloadavg()
    measured = measure(config, console.log)
    description["load_average"] = [load[0], os.getloadavg()[0]]
    stem = config.output / file_name(description, *["racing"] + ["quick"] * config.quick)
    write(stem, preamble(config, description), tables(measured), console)
    write_numbers(stem, asdict(config), description, measured, console)


def measure(config: Config, say: Any) -> dict[str, list[dict]]:
    """Rows of both tables."""
    import jax

    from sartor.models.vehicle import LinearTyre, SingleTrack, corrected, f1tenth

    jax.config.update("jax_enable_x64", True)
    linear = SingleTrack(front=LinearTyre(), rear=LinearTyre())
    vehicles = {"published tyres": f1tenth(), "linear tyres and 8 units": corrected(linear, 8, jax.random.key(0))}
    step, labels = [], []
    for name, vehicle in vehicles.items():
        for horizon in config.horizons:
            say(f"closed loop, {name}, N = {horizon}")
            step.append({"vehicle": name, "horizon": horizon} | step_row(vehicle, horizon, config.num_steps))
    for horizon in config.label_horizons:
        say(f"labels, N = {horizon}")
        labels.append({"horizon": horizon} | label_row(vehicles["published tyres"], horizon, config))
    return {"step": step, "labels": labels}


def step_row(vehicle: Any, horizon: int, num_steps: int) -> dict[str, Any]:
    """A control step of the MPC, measured one by one along a closed loop on a plant with the published tyres."""
    import equinox as eqx
    import jax
    import numpy as np

    from sartor import RESULTS
    from sartor.models.vehicle import f1tenth
    from sartor.racing import RacingPlant, patches
    from sartor.systems import racing_car as car
    from sartor.track_generator import named

    track = named("fin")
    plant, driver = (
        RacingPlant(f1tenth(), track, patches(track, 0.8, 0)),
        car.controller(car.Theta(vehicle, track), horizon),
    )
    begin, control = eqx.filter_jit(lambda driver, x: driver.init(x)), eqx.filter_jit(lambda driver, *at: driver(*at))
    move, state, times, failed = eqx.filter_jit(lambda plant, *at: plant.step(*at)), plant.start(car.rolling()), [], 0
    started = time.perf_counter(), time.process_time()
    memory = jax.block_until_ready(begin(driver, state.x))
    jax.block_until_ready(control(driver, state.x, 0, memory))
    first = time.perf_counter() - started[0], time.process_time() - started[1]
    for _ in range(num_steps):
        before = time.perf_counter()
        u, memory, info = jax.block_until_ready(control(driver, state.x, 0, memory))
        times.append(time.perf_counter() - before)
        failed += int(info.result != RESULTS.successful)
        state = move(plant, state, u)
    return {
        "step": float(np.median(times)), "step_99": float(np.quantile(times, 0.99)), "first": first[0],
        "first_cpu": first[1], "failed": failed / num_steps, "distance": float(state.x[0]),
    }  # fmt: skip


def label_row(vehicle: Any, horizon: int, config: Config) -> dict[str, Any]:
    """All labels of a drive in one call."""
    import jax
    import numpy as np

    from sartor import racing
    from sartor.racing_labels import label_drive
    from sartor.systems import racing_car as car
    from sartor.track_generator import named

    track = named("fin")
    plant, theta = racing.RacingPlant(vehicle, track, racing.patches(track, 0.8, 0)), car.Theta(vehicle, track)
    ran = racing.race(plant, car.controller(theta, horizon), car.rolling(), config.num_steps, jax.random.key(0))
    xs, us = np.asarray(ran.xs), np.asarray(ran.us)

    def labelled() -> tuple[Any, float]:
        before = time.perf_counter()
        labels = label_drive(theta, horizon, xs, us)
        return labels, time.perf_counter() - before

    labels, first = labelled()
    times = [labelled()[1] for _ in range(config.repetitions)]
    seconds = float(np.median(times))
    return {
        "labels": len(labels.ok), "seconds": seconds, "rate": len(labels.ok) / seconds, "first": first,
        "failed": float(1.0 - labels.ok.mean()),
    }  # fmt: skip


# --- report --------------------------------------------------------------------------------------


def tables(measured: dict[str, list[dict]]) -> list:
    import tables as t

    step = [
        t.text("model", "vehicle"), t.number("N", "horizon", "d"), t.number("step [ms]", "step", ".3g", 1e3),
        t.number("99 % [ms]", "step_99", ".3g", 1e3), t.number("failed", "failed", ".1%"),
        t.number("first call [s]", "first", ".3g"), t.number("as CPU time [s]", "first_cpu", ".3g"),
        t.number("distance [m]", "distance", ".3g"),
    ]  # fmt: skip
    labels = [
        t.number("N", "horizon", "d"), t.number("labels", "labels", "d"), t.number("all of them [s]", "seconds", ".3g"),
        t.number("labels a second", "rate", ".3g"), t.number("failed", "failed", ".1%"),
        t.number("first call [s]", "first", ".3g"),
    ]  # fmt: skip
    return [
        t.Table("Real-time step in closed loop", STEP_NOTE, step, measured["step"]),
        t.Table("Labels of a drive in one call", LABEL_NOTE, labels, measured["labels"]),
    ]


STEP_NOTE = (
    "One real-time iteration from the shifted plan, exact curvature, soft walls; a plant with load transfer, patches of"
    " friction and delay on track `fin`. First call: tracing and compiling of guess and step, and both."
)
LABEL_NOTE = (
    "`label_drive`: converged solves from the executed trajectory, and the labels, one by one. First call: with"
    " compiling."
)


def preamble(config: Config, description: dict) -> str:
    before, after = description["load_average"]
    return f"""# Racing car benchmarks on {description["device"]}

{setting(description)}

Everything ran on one core. 9 states, 2 controls, steps of 0.033 s; a closed loop of {config.num_steps} control steps.

What to distrust: the load average of the machine was {before:.1f} before and {after:.1f} after, and load from others \
lengthens all times.
"""


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
