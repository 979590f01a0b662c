"""Run folders of closed loops to a table and a figure; reads files only."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from rich.table import Table

from sartor.figures.style import ALARM, COLORS, GRID, INK


class Run(NamedTuple):
    """A finished run."""

    config: dict[str, Any]
    metrics: dict[str, Any]
    episode: dict[str, np.ndarray]


def load(folder: Path) -> Run:
    """Read a run folder. Fails: `ValueError` if the run has not finished."""
    missing = [n for n in ("config.json", "metrics.json", "episode.npz") if not (folder / n).exists()]
    if missing:
        raise ValueError(f"{folder} holds no finished run: {', '.join(missing)} missing.")
    with np.load(folder / "episode.npz") as file:
        episode = dict(file)
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    return Run(config, metrics, episode)


def table(folder: Path) -> Table:
    """The metrics of a run, for people."""
    config, m, _ = load(folder)
    mode = "real-time iteration" if config["real_time"] else "solved until converged"
    out = Table(title=f"{config['system']}: closed loop, {mode}", title_justify="left", show_header=False)
    out.add_column(style="bold")
    out.add_column(justify="right")
    failures = ", ".join(f"{name}: {count}" for name, count in m["failures"].items())
    out.add_row("control steps", f"{m['num_steps']} ({m['num_steps'] * m['dt']:.2f} s)")
    out.add_row("horizon", f"{config['horizon']} ({config['horizon'] * m['dt']:.2f} s)")
    out.add_row("cost", f"{m['cost']:.6g}")
    out.add_row("distance to the goal at the end", f"{m['final_error']:.3g}")
    out.add_row("failed solves", f"{m['failed_share']:.1%}" + (f" ({failures})" if failures else ""))
    out.add_row("solver steps: median, max", f"{m['median_steps']:g}, {m['max_steps']}")
    out.add_row("KKT residual: max", f"{m['max_kkt_norm']:.1e}")
    out.add_row("time per control step: median, 99 %", f"{1e3 * m['median_time']:.2f}, {1e3 * m['p99_time']:.2f} ms")
    out.add_row("compile and cold start", f"{m['compile_time']:.1f} s")
    out.add_row("device", m["device"])
    return out


def figure(folder: Path) -> Path:
    """Draw states, controls with bounds, and what the solver did, over time; returns the path of the file."""
    config, metrics, ep = load(folder)
    states, controls = _by_unit(metrics["states"]), _by_unit(metrics["controls"])
    rows = max(len(states), len(controls) + 2)
    fig = Figure(figsize=(11.0, 1.0 + 1.75 * rows), layout="constrained")
    columns = fig.add_gridspec(1, 2)
    left, right = _column(fig, columns[0], len(states)), _column(fig, columns[1], len(controls) + 2)
    times = metrics["dt"] * np.arange(len(ep["xs"]))
    for ax, (unit, indices) in zip(left, states.items(), strict=True):
        _lines(ax, times, ep["xs"], metrics["states"], indices, unit)
    for ax, (unit, indices) in zip(right, controls.items(), strict=False):
        _lines(
            ax,
            times,
            np.concatenate([ep["us"], ep["us"][-1:]]),
            metrics["controls"],
            indices,
            unit,
            steps=True,
        )
        _bounds(ax, [metrics[name][i] for name in ("u_min", "u_max") for i in indices])
    _residuals(right[-2], times[:-1], ep)
    _solver_steps(right[-1], times[:-1], metrics["dt"], ep)
    for axes in (left, right):
        _tidy(fig, axes)
    fig.suptitle(f"{config['system']} in closed loop", x=0.01, ha="left", weight="bold", color=INK)
    fig.savefig(folder / "episode.png", dpi=150)
    return folder / "episode.png"


def _column(fig: Figure, place: SubplotSpec, count: int) -> list[Axes]:
    """Axes one below the other, with one time axis."""
    grid = place.subgridspec(count, 1)
    first = fig.add_subplot(grid[0])
    axes = [first, *(fig.add_subplot(grid[i], sharex=first) for i in range(1, count))]
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    return axes


def _by_unit(names: list[str]) -> dict[str, list[int]]:
    """Indices of the names "symbol [unit]" that share a unit, in order."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name[name.index("[") + 1 : -1], []).append(i)
    return groups


def _lines(
    ax: Axes,
    times: np.ndarray,
    values: np.ndarray,
    names: list[str],
    indices: list[int],
    unit: str,
    steps: bool = False,
) -> None:
    for color, i in zip(COLORS, indices, strict=False):
        label, where = names[i].split(" [")[0], "steps-post" if steps else "default"
        ax.plot(times, values[:, i], color=color, lw=1.6, label=label, drawstyle=where)
    ax.set_ylabel(f"[{unit}]" if unit != "-" else "")
    ax.legend(loc="upper right", ncols=len(indices), fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.0)
    ax.margins(y=0.25)


def _bounds(ax: Axes, bounds: list[float]) -> None:
    for bound in {b for b in bounds if np.isfinite(b)}:
        ax.axhline(bound, color=INK, lw=0.9, ls=(0, (4, 3)))


def _residuals(ax: Axes, times: np.ndarray, ep: dict[str, np.ndarray]) -> None:
    norms = np.maximum(ep["kkt_norms"], 1e-17)
    failed = ep["results"] != "successful"
    ax.semilogy(times, norms, ".", ms=4, color=COLORS[0], label="KKT residual")
    if failed.any():
        shown = np.where(np.isfinite(norms), norms, 1.0)
        ax.semilogy(times[failed], shown[failed], "x", ms=6, color=ALARM, label="solve failed")
    ax.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
    ax.margins(y=0.25)


def _solver_steps(ax: Axes, times: np.ndarray, dt: float, ep: dict[str, np.ndarray]) -> None:
    ax.bar(times, ep["num_steps"], width=0.8 * dt, color=COLORS[5], label="solver steps")
    ax.legend(loc="upper right", fontsize=8, frameon=False)
    ax.margins(y=0.25)


def _tidy(fig: Figure, axes: list[Axes]) -> None:
    for ax in axes:
        ax.grid(color=GRID, lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK, labelsize=8)
        ax.margins(x=0.01)
    axes[-1].set_xlabel("time [s]")
    fig.align_ylabels(axes)
