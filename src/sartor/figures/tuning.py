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
    "gauss_newton.corrected": (ORANGE, "-"), "gauss_newton.exact": (INK, "-"), "model.exact": (INK, ":"),
    "cma_es": (PURPLE, "-"),
}  # fmt: skip


def merits(content: dict[str, Any]) -> Figure | None:
    """Lowest merit so far above the cheapest trajectory, in percent, over rollouts: median and range of the seeds."""
    rows = content.get("rows", [])
    if not rows:
        return None
    levels, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("level", "method"))
    optimum = content["optimum"]["cost"]
    fig = Figure(figsize=(2.0 + 3.6 * len(levels), 5.2))
    for ax, level in zip(fig.subplots(1, len(levels), squeeze=False, sharey=True)[0], levels, strict=True):
        for method in methods:
            mine = [r for r in rows if (r["level"], r["method"]) == (level, method)]
            if not mine:
                continue
            color, dashes = _LOOKS.get(method, (GREY, "-."))
            excess = 100.0 * (np.array([lowest(r) for r in mine]) / optimum - 1.0)
            x = mine[0]["rollouts"]
            ax.plot(x, np.median(excess, 0), dashes, color=color, lw=1.8, label=method)
            ax.fill_between(x, excess.min(0), excess.max(0), color=color, alpha=0.12, lw=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(1.0, 2e3)
        ax.set_xlabel("rollouts")
        ax.set_title(f"{level} mismatch")
    fig.axes[0].set_ylabel("lowest merit so far above the cheapest trajectory [%]")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def candidates(content: dict[str, Any]) -> Figure | None:
    """Merit of every candidate, seed 0, as the paper's Figure 2: falls, spikes and divergence."""
    rows = [r for r in content.get("rows", []) if r["seed"] == 0]
    if not rows:
        return None
    levels = list(dict.fromkeys(r["level"] for r in rows))
    shown = ("model", "zeroth", "hybrid.25", "hybrid.50", "hybrid.75", "gauss_newton.corrected")
    fig = Figure(figsize=(2.0 + 3.6 * len(levels), 4.2))
    for ax, level in zip(fig.subplots(1, len(levels), squeeze=False, sharey=True)[0], levels, strict=True):
        for row in (r for r in rows if r["level"] == level and r["method"] in shown):
            color, dashes = _LOOKS[row["method"]]
            merit = np.array([np.nan if m is None else m for m in row["merit"]])
            ax.plot(row["rollouts"], merit, dashes, color=color, lw=1.2, label=row["method"])
        ax.set_yscale("log")
        ax.set_ylim(1e3, 1e6)
        ax.set_xlabel("rollouts")
        ax.set_title(f"{level} mismatch")
    fig.axes[0].set_ylabel("merit of the candidate")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return fig


def lowest(row: dict[str, Any]) -> np.ndarray:
    """Lowest merit up to each iteration."""
    return np.minimum.accumulate([np.inf if m is None else m for m in row["merit"]])
