"""Tuning on a plant that the model gets wrong: merit against rollouts."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sartor.figures.style import BLUE, GREEN, GREY, INK, MUSTARD, ORANGE, PURPLE

_LOOKS = {
    "model": (BLUE, "-"), "zeroth": (GREY, "-"), "hybrid.25": (MUSTARD, "-"), "hybrid.50": (MUSTARD, "--"),
    "hybrid.75": (MUSTARD, ":"), "alpha": (PURPLE, ":"), "inverse_variance": (PURPLE, "--"),
    "control_variate": (GREEN, ":"), "control_variate.monotone": (GREEN, "-"), "control_variate.scaled": (GREEN, "--"),
    "reidentified": (BLUE, ":"), "reidentified.monotone": (BLUE, "--"), "gauss_newton": (ORANGE, ":"),
    "gauss_newton.constant": (ORANGE, "--"), "gauss_newton.corrected": (ORANGE, "-"), "gauss_newton.exact": (INK, "-"),
    "gauss_newton.unkicked": (ORANGE, "-."), "model.exact": (INK, ":"),
    "cma_es": (PURPLE, "-"),
}  # fmt: skip


def merits(content: dict[str, Any]) -> Figure | None:
    """Lowest merit so far above the cheapest trajectory, in percent, over rollouts: median and range of the seeds."""
    rows = [r for r in content.get("rows", []) if r["data"] == 0]
    if not rows:
        return None
    levels, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("level", "method"))
    optimum = content["optimum"]["cost"]
    fig, axes = _by_level(levels, 5.2, "lowest merit so far above the cheapest trajectory [%]", (0.4, 2e3))
    for level, method in ((level, method) for level in levels for method in methods):
        mine = [r for r in rows if (r["level"], r["method"]) == (level, method)]
        if not mine:
            continue
        color, dashes = _LOOKS[method]
        x = max((r["rollouts"] for r in mine), key=len)
        excess = 100.0 * (np.array([_continued(lowest(r), len(x)) for r in mine]) / optimum - 1.0)
        axes[level].plot(x, np.median(excess, 0), dashes, color=color, lw=1.8, label=method)
        axes[level].fill_between(x, excess.min(0), excess.max(0), color=color, alpha=0.12, lw=0)
    _key(fig, 5)
    return fig


def candidates(content: dict[str, Any]) -> Figure | None:
    """Merit of every candidate, seed 0, as the paper's Figure 2: falls, spikes and divergence."""
    rows = [r for r in content.get("rows", []) if r["seed"] == r["data"] == 0]
    if not rows:
        return None
    levels = list(dict.fromkeys(r["level"] for r in rows))
    shown = ("model", "zeroth", "hybrid.25", "hybrid.50", "hybrid.75", "gauss_newton.corrected")
    fig, axes = _by_level(levels, 4.2, "merit of the candidate", (1e3, 1e6))
    for row in (r for r in rows if r["method"] in shown):
        color, dashes = _LOOKS[row["method"]]
        merit = np.array([np.nan if m is None else m for m in row["merit"]])
        axes[row["level"]].plot(row["rollouts"], merit, dashes, color=color, lw=1.2, label=row["method"])
    _key(fig, 6)
    return fig


def lowest(row: dict[str, Any]) -> np.ndarray:
    """Lowest merit up to each iteration."""
    return np.minimum.accumulate([np.inf if m is None else m for m in row["merit"]])


def _by_level(levels: list[str], height: float, quantity: str, limits: tuple[float, float]) -> tuple[Figure, dict]:
    """Axes beside each other, over rollouts, logarithmic upwards."""
    fig = Figure(figsize=(2.0 + 3.6 * len(levels), height))
    axes = dict(zip(levels, fig.subplots(1, len(levels), squeeze=False, sharey=True)[0], strict=True))
    for level, ax in axes.items():
        ax.set(xscale="log", yscale="log", ylim=limits, xlabel="rollouts", title=f"{level} mismatch")
    axes[levels[0]].set_ylabel(quantity)
    return fig, axes


def _key(fig: Figure, columns: int) -> None:
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _continued(values: np.ndarray, length: int) -> np.ndarray:
    """Of a tuning that has ended early, the last value from there on."""
    return np.concatenate([values, np.full(length - len(values), values[-1])])
