"""sartor against mpc.pytorch, acados and CasADi: the same problems, one process, one command.

    python benchmarks/run.py --quick

prints tables and writes them, with all the numbers, to benchmarks/results.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

ProblemName = Literal["pendulum", "cartpole", "linear", "unstable_linear", "quadrotor", "unroll", "compile"]
PeerName = Literal["mpc_auto_diff", "mpc_analytic", "acados", "fatrop", "ipopt"]
PACKAGES = ("sartor", "jax", "jaxlib", "numpy", "mpc", "torch", "comma-deps-acados", "casadi")


@dataclass(frozen=True)
class Config:
    """Measure sartor against other solvers, and write the tables to benchmarks/results."""

    only: tuple[ProblemName, ...] = get_args(ProblemName)
    """What to measure: problems, the backward pass against the iterations, compile time against the horizon."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Peers; those that are not installed are skipped."""
    solvers: tuple[Literal["SQP", "BoxDDP"], ...] = ("SQP", "BoxDDP")
    """sartor's solvers for the problems with bounds on the controls."""
    fatrop_jit: bool = True
    """Have gcc compile the functions of CasADi's fatrop: faster, at up to half a minute of set-up."""
    batches: tuple[int, ...] = (1, 32, 128)
    """Batch sizes; up to 4096 make sense on an accelerator."""
    max_peer_batch: int = 128
    """Peers are not asked for larger batches than this."""
    repetitions: int = 7
    """Repetitions, of which the median counts."""
    timeout: float = 8.0
    """Limit [s] on the repetitions of one measurement; a call that takes longer is not repeated."""
    inner_steps: tuple[int, ...] = (8, 12, 40)
    """Limits on the interior-point steps of sartor's real-time iteration."""
    horizons: tuple[int, ...] = (20, 40, 80, 160)
    """Horizons of the compile times."""
    quick: bool = False
    """A smoke test: batches 1 and 8, few repetitions, one solver, and only the pendulum and the quadrotor."""
    one_core: bool = True
    """Bind the whole process to one core, as ratios to peers that use one thread need. With --no-one-core sartor and
    mpc.pytorch take all cores; acados and CasADi use one thread in any case."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the results."""


def main(config: Config) -> None:
    if config.one_core:
        bind_to_one_core()
    if config.quick:
        config = quick(config)
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=220)
    description = describe()
    load = os.getloadavg()
    measured = measure(config, console.log)
    description["load_average"] = [load[0], os.getloadavg()[0]]
    report(config, description, measured, console)


def bind_to_one_core() -> None:
    """Restart the program on one core, before anything has started threads."""
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("This system cannot bind a process to a core: use --no-one-core.")
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        os.sched_setaffinity(0, {min(cores)})
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | threads)


def quick(config: Config) -> Config:
    """The smoke test; what was chosen on the command line stays."""
    chosen, default = asdict(config), asdict(Config())
    few: dict[str, Any] = {
        "only": ("pendulum", "quadrotor"), "solvers": ("BoxDDP",), "batches": (1, 8), "repetitions": 3,
        "timeout": 4.0, "horizons": (20, 80), "inner_steps": (12,), "fatrop_jit": False,
        "peers": ("mpc_analytic", "acados", "fatrop", "ipopt"),
    }  # fmt: skip
    return Config(**(chosen | {key: value for key, value in few.items() if chosen[key] == default[key]}))


def measure(config: Config, say: Any) -> dict[str, list[dict]]:
    """Rows of all tables."""
    import measure as m

    out: dict[str, list[dict]] = {"box": [], "cold": [], "real_time": [], "unroll": [], "compile": []}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in (name for name in config.only if name in m.BOX_PROBLEMS):
        peers = list(m.make_peers(config.peers, m.BOX_PROBLEMS[name](), threads, config.fatrop_jit, say))
        for batch in config.batches:
            say(f"{name}, batch {batch}")
            some = peers if batch <= config.max_peer_batch else []
            out["box"] += m.box_rows(name, batch, config.solvers, some, config.repetitions, config.timeout)
    if "quadrotor" in config.only:
        measure_quadrotor(config, threads, say, out)
    for solver in config.solvers if "unroll" in config.only else ():
        say(f"backward pass against iterations, {solver}")
        points = 2 if config.quick else 4
        out["unroll"] += m.unroll_rows(solver, points, 16, config.repetitions, config.timeout)
    for solver in config.solvers if "compile" in config.only else ():
        say(f"compile time against the horizon, {solver}")
        out["compile"] += m.compile_rows(solver, config.horizons)
    return out


def measure_quadrotor(config: Config, threads: int, say: Any, out: dict[str, list[dict]]) -> None:
    import measure as m
    from peers import PeerUnavailable

    problem = m.problems.quadrotor()
    names = [name for name in config.peers if not name.startswith("mpc")]
    peers = list(m.make_peers(names, problem, threads, config.fatrop_jit, say))
    ours = m.quadrotor_solvers(["exact"] if config.quick else ["exact", "gauss_newton"])
    for batch in (8,) if config.quick else (1, 64):
        say(f"quadrotor, cold, batch {batch}")
        out["cold"] += m.cold_rows(batch, ours, peers, config.repetitions, config.timeout)
    say("quadrotor, real-time step")
    peer = None
    try:
        if "acados" in names:
            from peers.acados import Acados

            peer = Acados(problem, real_time=True)
    except PeerUnavailable as error:
        say(f"acados RTI skipped: {error}")
    samples = 8 if config.quick else 64
    out["real_time"] = m.real_time_rows(samples, config.inner_steps, ours[0], peer, config.repetitions)


# --- report --------------------------------------------------------------------------------------


def describe(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Device, versions, date and thread settings."""
    import jax

    device = jax.devices()[0]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform, "processor": processor(), "cores": len(cores), "cores_of_machine": os.cpu_count(),
        "python": platform.python_version(), "precision": "float64",
        "versions": {name: version(name) for name in packages},
        "threads": {name: os.environ.get(name, "unset") for name in ("OMP_NUM_THREADS", "XLA_FLAGS")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report(config: Config, description: dict, measured: dict[str, list[dict]], console: Any) -> None:
    """Print the tables; write them and the numbers. Runs that measure less than everything say so in their name."""
    less = ("quick",) if config.quick else config.only if config.only != Config().only else ()
    stem = config.output / file_name(description, *less)
    text = preamble(config, description)
    write(stem, text, tables(measured), console)
    write_numbers(stem, asdict(config), description, measured, console)


def write(stem: Path, text: str, shown: list, console: Any) -> None:
    """Print tables, and write them behind a text."""
    from tables import markdown, rich_table

    for table in shown:
        console.print(rich_table(table), "")
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.md").write_text("\n".join([text, *map(markdown, shown)]))
    console.print(f"{stem}.md")


def write_numbers(stem: Path, settings: dict, description: dict, measured: dict, console: Any) -> None:
    """Write all the numbers."""
    settings = {key: value.name if isinstance(value, Path) else value for key, value in settings.items()}
    everything = {"description": description, "settings": settings, "tables": plain(measured)}
    Path(f"{stem}.json").write_text(json.dumps(everything, indent=1) + "\n")
    console.print(f"{stem}.json")


def file_name(description: dict, *more: str) -> str:
    """Device and cores, and more."""
    parts = [description["device"]]
    if description["platform"] == "cpu":
        parts.append(f"{description['cores']} core" + "s" * (description["cores"] > 1))
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (*parts, *more))


def plain(measured: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Without trajectories, and with null for what is not a number: JSON has no NaN."""
    clean = lambda value: None if isinstance(value, float) and value != value else value
    return {
        name: [{key: clean(value) for key, value in row.items() if key not in ("xs", "us")} for row in rows]
        for name, rows in measured.items()
    }


def tables(measured: dict[str, list[dict]]) -> list:
    """The tables that have rows."""
    import tables as t
    from measure import ratio_rows

    box, cold = measured["box"], measured["cold"]
    ratio = (
        "Time of the peer / time of sartor: above 1 sartor is faster. Of sartor's solvers the fastest among those that"
        " converged most often. With 1 repetition the peer's time is that of its only call."
    )
    found = [
        t.Table("Ratios", ratio, t.RATIOS, ratio_rows(box + cold)),
        t.Table("Bounds on the controls", BOX_NOTE, t.SOLVERS, box),
        t.Table("Quadrotor with a limit on the velocity, cold start", COLD_NOTE, t.COLD, cold),
        t.Table("Quadrotor, one warm-started real-time step", REAL_TIME_NOTE, t.REAL_TIME, measured["real_time"]),
        t.Table("Backward pass against iterations, pendulum, batch 16", UNROLL_NOTE, t.UNROLL, measured["unroll"]),
        t.Table("Compile time against the horizon, pendulum, batch 1", COMPILE_NOTE, t.COMPILE, measured["compile"]),
        t.Table("Set-up, compilation and memory", SETUP_NOTE, t.SETUP, box + cold),
    ]
    return [table for table in found if table.rows]


BOX_NOTE = (
    "Backward: the derivative of sum x² + u² in the parameters (ours: solve with derivative less solve without)."
    " Residual: the largest projected gradient |u - clip(u - dJ/du)| of the rolled-out controls, computed for all by"
    " the same adjoint, zero where the KKT conditions hold. Converged: by each solver's own test. Cost gap: to the best"
    " solver of the sample, relative; a gap with a small residual is another local minimum."
)
COLD_NOTE = (
    "All start from the same guess. KKT residual: of the multipliers, ours only (the peers' multipliers are not read)."
    " Violation: of dynamics and bounds. The peers solve one sample after another; their times are those inside the"
    " solver."
)
REAL_TIME_NOTE = (
    "One Gauss-Newton step from the shifted solution, states disturbed by 0.01. u0 is compared with acados' (both pose"
    " the same QP) and with the converged optimum. acados can split the step into preparation and feedback."
)
UNROLL_NOTE = (
    "Samples that need few and many iterations; the unrolled solver takes one more than the sample needs. The implicit"
    " backward pass should not depend on the iterations."
)
COMPILE_NOTE = "Tracing and compiling; CPU time is less sensitive to other load than the time on the clock."
SETUP_NOTE = (
    "Set-up: construction, code generation and its compilation (peers). Memory: for sartor arguments, results and"
    " temporaries as the compiler plans them; for peers by how much the process's peak grew, which is 0 if something"
    " before needed more, and contains the libraries that were loaded: do not compare the two."
)


def preamble(config: Config, description: dict) -> str:
    before, after = description["load_average"]
    return f"""# Benchmarks on {description["device"]}

{setting(description)}

{thread_note(description["cores"])} Medians of up to {config.repetitions} repetitions after a warm-up, all solvers in \
turn; a call longer than {config.timeout:g} s is not repeated and its warm-up counts (1 repetition).

What to distrust: the load average of the machine was {before:.1f} before and {after:.1f} after, and load from others \
lengthens all times, the compile times most and ratios least; times of one repetition; differences between solvers \
that stopped at different residuals or in different local minima; the time of mpc.pytorch is mostly Python and would \
not scale with a faster processor's arithmetic; acados is the wheel of 2022, compiled for a generic processor; the \
gradient of mpc.pytorch leaves out second derivatives of the dynamics and costs less for it.
"""


def setting(description: dict) -> str:
    """On what was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in description["versions"].items())
    cores = f"{description['cores']} of {description['cores_of_machine']} cores"
    return f"""{description["date"]}; {description["processor"]}, {cores}; Python {description["python"]}, {versions}; \
{description["precision"]}; OMP_NUM_THREADS {description["threads"]["OMP_NUM_THREADS"]}, \
XLA_FLAGS {description["threads"]["XLA_FLAGS"]}."""


def thread_note(cores: int) -> str:
    if cores == 1:
        return "Everything ran on one core: sartor, mpc.pytorch (one thread), acados and CasADi (one thread)."
    return f"sartor and mpc.pytorch could use {cores} cores; acados and CasADi used one thread."


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
