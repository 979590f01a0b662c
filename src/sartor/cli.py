"""The command line: `sartor run`, `report`, `list` for experiments; `label` and `tailor` for your own robot."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sartor import tailoring
from sartor.experiments import (
    closed_loop,
    f1tenth,
    imitation,
    imitation_lqr,
    panda,
    quadcopter_tuning,
    solver_cost,
    unrealisable,
)

_EXPERIMENTS = {
    "panda": "Tailor a Panda's dynamics model to its tracking task, under several weightings (six to ten minutes).",
    "imitation": "Learn cost and dynamics of a pendulum's and a cart-pole's MPC from its plans, by eight methods.",
    "imitation-lqr": "Learn a linear model by imitation: where gradients get stuck, and what does not.",
    "unrealisable": "Imitate an expert whose dynamics no learner can have: identification against imitation.",
    "quadcopter-tuning": "Tune a quadcopter's MPC in closed loop, on a plant that its model gets wrong.",
    "f1tenth": "A racing car: what matters where on the track, and a model with a small network tailored to it.",
    "solver-cost": "Time and memory of a derivative: implicit against through all iterations, and mpc.pytorch.",
    "pendulum": "Swing-up of a pendulum with a weak motor, in closed loop.",
    "cartpole": "Swing-up of a pole on a cart, in closed loop.",
    "quadrotor": "Flight to a goal with bounded thrusts and velocity, in closed loop.",
}


def _closed_loop(system: Any) -> Any:
    default = closed_loop.Config(system)
    return tyro.conf.subcommand(system, default=default, description=_EXPERIMENTS[system])


Experiment = (
    Annotated[panda.Config, tyro.conf.subcommand("panda", description=_EXPERIMENTS["panda"])]
    | Annotated[imitation.Config, tyro.conf.subcommand("imitation", description=_EXPERIMENTS["imitation"])]
    | Annotated[imitation_lqr.Config, tyro.conf.subcommand("imitation-lqr", description=_EXPERIMENTS["imitation-lqr"])]
    | Annotated[unrealisable.Config, tyro.conf.subcommand("unrealisable", description=_EXPERIMENTS["unrealisable"])]
    | Annotated[
        quadcopter_tuning.Config,
        tyro.conf.subcommand("quadcopter-tuning", description=_EXPERIMENTS["quadcopter-tuning"]),
    ]
    | Annotated[f1tenth.Config, tyro.conf.subcommand("f1tenth", description=_EXPERIMENTS["f1tenth"])]
    | Annotated[solver_cost.Config, tyro.conf.subcommand("solver-cost", description=_EXPERIMENTS["solver-cost"])]
    | Annotated[closed_loop.Config, _closed_loop("pendulum")]
    | Annotated[closed_loop.Config, _closed_loop("cartpole")]
    | Annotated[closed_loop.Config, _closed_loop("quadrotor")]
)

_WORTH_KEEPING = 0.1  # compile time [s] from which on compiled code is kept
_OF_FOLDERS = {
    "panda": panda, "imitation": imitation, "imitation-lqr": imitation_lqr, "unrealisable": unrealisable,
    "quadcopter-tuning": quadcopter_tuning, "f1tenth": f1tenth, "solver-cost": solver_cost,
}  # fmt: skip
"""Experiments with a page as their report, by name."""


@dataclass(frozen=True)
class Run:
    """Run an experiment; it writes its numbers and a figure into a folder."""

    experiment: Experiment
    """What to run."""
    out: Path | None = None
    """Folder for the results; `runs/<experiment>-<time>` unless given."""
    resume: Path | None = None
    """Folder of an interrupted run to be finished; its own config counts, the other options do not."""


@dataclass(frozen=True)
class Report:
    """Show the tables of runs, and draw their figures anew."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs."""
    markdown: Path | None = None
    """Write the tables of all of them to this file as well, and their figures, and the small files that these are made
    from, into a folder beside it."""


@dataclass(frozen=True)
class List:
    """List the experiments."""


def main(args: list[str] | None = None) -> None:
    """Entry point of the `sartor` command."""
    command = tyro.cli(
        Run | Report | List | tailoring.Label | tailoring.Tailor,
        prog="sartor",
        description="Tailor learned dynamics models to the task that their controller performs.",
        args=args,
        config=(
            tyro.conf.CascadeSubcommandArgs,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
        ),
    )
    console = Console()
    try:
        if isinstance(command, Run):
            _run(command, console)
        elif isinstance(command, Report):
            if not command.folders:
                raise ValueError("no run folder is given.")
            for folder in command.folders:
                _report(folder, console)
            if command.markdown is not None:
                _write_markdown(command, command.markdown, console)
        elif isinstance(command, tailoring.Task):
            _tailor(command, console)
        else:
            _list(console)
    except BrokenProcessPool:
        console.print(
            "[red]error:[/red] a worker process has ended, killed perhaps for want of memory: what is finished"
        )
        console.print("is kept, and --resume goes on from there; --workers 1 needs half the memory.")
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print("[red]error:[/red]", escape(str(error)), soft_wrap=True)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            console.print("What was finished is kept: the same command goes on from there.", soft_wrap=True)
        sys.exit(2)


def _run(command: Run, console: Console) -> None:
    config = command.experiment if command.resume is None else _stored(command.resume)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = command.resume or command.out or Path("runs") / f"{_name(config)}-{stamp}"
    if command.resume is None or not _finished(config, out):
        _run_with_progress(config, out, console)
    _report(out, console)


def _run_with_progress(config: Any, out: Path, console: Console) -> None:
    try:
        with _monitored(console, hurry=config.preset == "smoke") as monitor:
            if isinstance(config, closed_loop.Config):
                closed_loop.run(config, out, monitor)
            else:
                _OF_FOLDERS[_name(config)].run(config, out, monitor, command=shlex.join(["sartor", *sys.argv[1:]]))
    except KeyboardInterrupt:
        console.print(f"Interrupted. Finish it with: sartor run {_name(config)} --resume", escape(str(out)))
        sys.exit(130)


def _tailor(task: tailoring.Task, console: Console) -> None:
    losses: dict[str, tuple[float, float]] = {}
    try:
        with _monitored(console) as monitor:
            if isinstance(task, tailoring.Tailor):
                labelled, losses = tailoring.run_tailor(task, monitor)
            else:
                labelled = tailoring.run_label(task, monitor)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on with what is in", escape(str(task.out)))
        sys.exit(130)
    n = labelled.S.shape[-1] // 2
    table = Table("joint", "position, 1 step", f"position, {task.horizon} steps", "velocity, 1 step",
                  title="mean label: what an error of the prediction matters", title_justify="left")  # fmt: skip
    S = labelled.S.mean(0)
    for i, name in enumerate(labelled.model.body.names):
        table.add_row(escape(name), *(f"{value:.3g}" for value in (S[0, i], S[-1, i], S[0, n + i])))
    console.print(table)
    console.print(", ".join(f"{name} {value:.4g}" for name, value in tailoring.summary(labelled).items()))
    for name, (before, after) in losses.items():
        console.print(f"loss on what was held out, weighted by {name}: {before:.4g} before, {after:.4g} after")
    console.print("results:", escape(str(task.out)), soft_wrap=True)


def _write_markdown(command: Report, markdown: Path, console: Console) -> None:
    from sartor import report

    runs = [(_report_of(_stored(folder)), folder) for folder in command.folders]
    text = report.results_markdown(runs, markdown.with_suffix(""))
    markdown.write_text(text, encoding="utf-8")
    console.print("tables:", escape(str(markdown)), soft_wrap=True)


@contextmanager
def _monitored(console: Console, hurry: bool = False) -> Iterator[Callable[[str, float, float], None]]:
    """Progress bars, one for each phase, and JAX as the commands use it."""
    _configure_jax(hurry)
    with _progress(console) as progress:
        tasks = {}

        def monitor(phase: str, done: float, total: float) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            elif progress.tasks[tasks[phase]].finished and done < total:  # a phase that comes again takes its own time
                progress.reset(tasks[phase], total=total)
            progress.update(tasks[phase], completed=done, total=total)

        yield monitor


def _name(config: Any) -> str:
    return config.system if isinstance(config, closed_loop.Config) else config.experiment


def _finished(config: Any, out: Path) -> bool:
    return (out / ("metrics.json" if isinstance(config, closed_loop.Config) else "finished.json")).exists()


def _stored(folder: Path) -> Any:
    from sartor.files import read_json

    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no finished run, nor one to resume: there is no config.json.")
    stored = read_json(folder / "config.json")
    experiment = _OF_FOLDERS.get(stored.get("experiment"), closed_loop)
    kind = experiment.Config
    known = {field.name for field in fields(kind)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
    return kind(**values)


def _configure_jax(hurry: bool) -> None:
    """float64, a compiler that is quick, and compiled code kept from one run to the next in the user's cache folder.

    In a hurry compiling counts more than the code it gives.
    """
    import jax

    if hurry:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    if jax.__version_info__[:2] == (0, 10):  # an unknown flag would end the program
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    os.environ["JAX_ENABLE_X64"] = "1"  # for worker processes; below for this one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_cache())
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(_cache()))
    # Of the many pieces of a run most take less than the second from which on JAX keeps them.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(_WORTH_KEEPING)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sartor" / "jax"


class _Rate(ProgressColumn):
    """How many are done in a second or a minute."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:.0f}/s" if task.speed >= 3 else f"{60 * task.speed:.1f}/min")


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _report(folder: Path, console: Console) -> None:
    from sartor import report, report_closed_loop

    config = _stored(folder)
    if isinstance(config, closed_loop.Config):
        console.print(report_closed_loop.table(folder))
        console.print("figure:", escape(str(report_closed_loop.figure(folder))), soft_wrap=True)
        return
    console.print(report.table(_report_of(config), folder))
    console.print("report:", escape(str(report.page(_report_of(config), folder))), soft_wrap=True)
    if (folder / "tailored.npz").exists():
        console.print("model:", escape(str(folder / "tailored.npz")), soft_wrap=True)


def _report_of(config: Any) -> Any:
    """What is shown of an experiment. Imported here: matplotlib and pyarrow take a second that most commands save."""
    from sartor import report_imitation, report_panda, report_racing, report_tuning

    all_reports = (report_panda.REPORT, *report_imitation.REPORTS, report_tuning.REPORT, report_racing.REPORT)
    reports = {report.experiment: report for report in all_reports}
    if isinstance(config, closed_loop.Config):
        raise ValueError("a closed loop has a figure, but no tables for a text: leave its folder out of --markdown.")
    return reports[config.experiment]


def _list(console: Console) -> None:
    table = Table("experiment", "what it does", title="sartor run <experiment>", title_justify="left")
    for name, text in _EXPERIMENTS.items():
        table.add_row(name, text)
    console.print(table)
