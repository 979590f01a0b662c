"""The Panda of the experiment, on one core: real-time steps, labels, where their time goes, and acados beside it.

    python benchmarks/panda.py --quick

prints tables and writes them, with all the numbers, to benchmarks/results.
"""

import os
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import tyro

from run import bind_to_one_core, describe, file_name, setting, write, write_numbers

PACKAGES = ("sartor", "jax", "jaxlib", "numpy", "mujoco", "comma-deps-acados", "casadi")


@dataclass(frozen=True)
class Config:
    """Measure the control step and the labels of the Panda experiment; tables go to benchmarks/results."""

    batches: tuple[int, ...] = (1, 16, 64)
    """Robots that are controlled, or samples that are labelled, together."""
    peer_batches: tuple[int, ...] = (1, 16)
    """Of these, those that are compared with acados, which takes one robot after another."""
    piece_batch: int = 16
    """Of these, the one for which the parts of a control step are timed, and from whose closed loop samples come."""
    curvatures: tuple[Literal["exact", "gauss_newton"], ...] = ("exact", "gauss_newton")
    """Of the labels."""
    methods: tuple[Literal["curvature", "resolve"], ...] = ("curvature", "resolve")
    """Of the labels' action sensitivity."""
    acados: bool = True
    """Generate and compile acados' solver (minutes), if acados is installed."""
    num_steps: int = 80
    """Control steps of a closed loop."""
    repetitions: int = 7
    """Repetitions of everything but closed loops, of which the median counts."""
    timeout: float = 30.0
    """Limit [s] on the repetitions of one measurement; a call that takes longer is not repeated."""
    quick: bool = False
    """A smoke test: batch 1, few repetitions, and one kind of label."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the results."""


def main(config: Config) -> None:
    bind_to_one_core()
    if config.quick:
        few = {"batches": (1,), "peer_batches": (1,), "piece_batch": 1, "num_steps": 48, "repetitions": 2}
        config = replace(config, **few, timeout=5.0, curvatures=("exact",), methods=("curvature",))
    if not {*config.peer_batches, config.piece_batch} <= set(config.batches):
        sys.exit("--peer-batches and --piece-batch must be among --batches.")
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=220)
    description, load = describe(PACKAGES), os.getloadavg()
    measured = measure(config, console.log)
    description["load_average"] = [load[0], os.getloadavg()[0]]
    stem = config.output / file_name(description, *["panda"] + ["quick"] * config.quick)
    write(stem, preamble(config, description), tables(measured), console)
    write_numbers(stem, asdict(config), description, measured, console)


def measure(config: Config, say: Any) -> dict[str, list[dict]]:
    """Rows of all tables."""
    import panda_measure as m
    import panda_pieces as pieces

    model, drives = m.random_model(), {}
    for batch in config.batches:
        say(f"closed loop, batch {batch}")
        drives[batch] = m.drive(model, batch, config.num_steps)
    main_drive, limits = drives[config.piece_batch], (config.repetitions, config.timeout)
    out: dict[str, list[dict]] = {"step": [driven.row for driven in drives.values()]}
    if not config.quick:
        say("control steps with networks of other sizes")
        out["sizes"] = m.size_rows(config.num_steps)
    say("parts of a control step")
    out["pieces"] = pieces.piece_rows(model, main_drive, *limits)
    out["pieces"].append(pieces.overhead_row(drives[min(drives)], *limits))
    out["labels"], kinds = [], list(product(config.curvatures, config.methods))
    for batch in config.batches:
        say(f"labels, batch {batch}")
        out["labels"] += m.label_rows(model, main_drive.visits, batch, kinds, *limits)
    say("labels, all samples")
    out["labels"] += [m.samples_row(model, main_drive, curvature, *limits) for curvature in config.curvatures]
    peer = make_peer(model, say) if config.acados else None
    say("steps beside acados")
    out["peer"] = m.peer_rows(model, [drives[batch] for batch in config.peer_batches], peer)
    return out


def make_peer(model: Any, say: Any) -> Any:
    """acados with this model; None where it is not installed."""
    from peers import PeerUnavailable
    from peers.acados_panda import real_time_iteration

    say("acados: generation and compilation")
    try:
        return real_time_iteration(model)
    except PeerUnavailable as error:
        say(f"acados skipped: {error}")
        return None


# --- report --------------------------------------------------------------------------------------


def tables(measured: dict[str, list[dict]]) -> list:
    import tables as t

    step = [
        t.number("batch", "batch", "d"), t.number("step [ms]", "step", ".3g", 1e3),
        t.number("90 % [ms]", "step_90", ".3g", 1e3), t.number("step and robot [ms]", "per_robot", ".3g", 1e3),
        t.number("steps", "steps", "d"), t.number("first call [s]", "first", ".3g"),
        t.number("as CPU time [s]", "first_cpu", ".3g"), t.number("failed", "failed", ".1%"),
        t.number("|q - reference|, max [rad]", "far", ".2g"),
    ]  # fmt: skip
    labels = [
        t.text("curvature", "curvature"), t.text("method", "method"), t.number("batch", "batch", "d"),
        t.number("labels a second", "rate", ".3g"), t.number("batch [ms]", "seconds", ".3g", 1e3),
        t.number("failed", "failed", ".1%"), t.number("first call [s]", "first", ".3g"),
        t.number("as CPU time [s]", "first_cpu", ".3g"), t.number("repetitions", "repetitions", "d"),
    ]  # fmt: skip
    pieces = [
        t.text("part", "piece"), t.number("batch", "batch", "d"), t.number("evaluations", "count", "d"),
        t.number("together [ms]", "seconds", ".3g", 1e3), t.number("each [µs]", "each", ".3g", 1e6),
        t.number("of a control step", "share", ".1%"),
    ]  # fmt: skip
    peer = [
        t.number("batch", "batch", "d"), t.number("sartor, step and robot [ms]", "sartor", ".3g", 1e3),
        t.number("acados [ms]", "acados", ".3g", 1e3), t.number("feedback alone [ms]", "feedback", ".3g", 1e3),
        t.number("sartor / acados", "ratio", ".3g"), t.number("|u0 - acados|, max [Nm]", "gap", ".0e"),
        t.number("steps", "steps", "d"), t.number("sartor: first call [s]", "first", ".3g"),
        t.number("as CPU time [s]", "first_cpu", ".3g"), t.number("acados: set-up [s]", "setup", ".3g"),
    ]  # fmt: skip
    sizes = [
        t.text("networks", "widths"), t.text("LSTMs", "encoder"), t.number("parameters", "parameters", "d"),
        t.number("of them in the MPC", "in_mpc", "d"), t.number("step [ms]", "step", ".3g", 1e3),
        t.number("90 % [ms]", "step_90", ".3g", 1e3), t.number("first call [s]", "first", ".3g"),
    ]  # fmt: skip
    found = [
        t.Table("Real-time step in closed loop", STEP_NOTE, step, measured["step"]),
        t.Table("Real-time step of one robot by size of the networks", SIZE_NOTE, sizes, measured.get("sizes", [])),
        t.Table("Labels", LABEL_NOTE, labels, measured["labels"]),
        t.Table("Where the time of a control step goes", PIECE_NOTE, pieces, measured["pieces"]),
        t.Table("One real-time iteration beside acados", PEER_NOTE, peer, measured["peer"]),
    ]
    return [table for table in found if table.rows]


STEP_NOTE = (
    "A control step of `Tracker`: history, context, one Gauss-Newton real-time iteration from the shifted plan, shift;"
    " along a closed loop with MuJoCo robots of different payloads. First call: tracing, compiling and one step."
)
SIZE_NOTE = "As above, batch 1, with random parameters."
LABEL_NOTE = (
    "`sartor.labels.label` under `jax.vmap`: a converged Gauss-Newton solve from the executed trajectory, and the"
    " label. The last rows are `label_samples` on the logs of the closed loop: solves in large batches, which wait less"
    " for the slowest, labels in small ones. Failed: samples without a label. First call: tracing and compiling."
)
PIECE_NOTE = (
    "Medians, all evaluations in one call: for all robots and stages, or for all robots. The parts do not add up: an"
    " RK4 step contains four evaluations of the arm and the residual, the linearisation the Jacobians of RK4 and the"
    " derivatives of the cost, the control step all but the contracted Hessian and MuJoCo, which are given for"
    " comparison. QP: the whole iteration less its linearisation, so residuals and status are in it. MuJoCo: 10"
    " timesteps. Python: a control step less the compiled function in it, both timed in turn."
)
PEER_NOTE = (
    "The same steps of the closed loops, from the same warm starts and contexts, in turn. acados: SQP_RTI with"
    " Gauss-Newton, RK4, dynamics and sensitivities by CasADi's automatic differentiation; one robot after another;"
    " preparation and feedback together. The parameters of the networks are constants of its code, arguments of ours."
    " Ours without history, context and shift."
)


def preamble(config: Config, description: dict) -> str:
    before, after = description["load_average"]
    return f"""# Panda benchmarks on {description["device"]}

{setting(description)}

Everything ran on one core. N = 12 stages of 0.02 s, 14 states, 7 torques; CaDeLaC of the published size with random \
parameters. Medians of up to {config.repetitions} repetitions after a warm-up, or of the steps of a closed loop; a \
call longer than {config.timeout:g} s is not repeated.

What to distrust: the load average of the machine was {before:.1f} before and {after:.1f} after, and load from others \
lengthens all times, the compile times most and ratios least; first calls share what was traced before them; acados is \
the wheel of 2022, compiled for a generic processor.
"""


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
