"""Imitation: how well each method does what the expert does, against the data it had, and how it got there."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sartor.figures.style import BLUE, COLORS, GREEN, GREY, INK, MUSTARD, ORANGE, PURPLE

Rows = list[dict[str, Any]]
_COLORS = {"nn": GREY, "sysid": BLUE, "mpc.dx": ORANGE, "mpc.cost": GREEN, "mpc.cost.dx": PURPLE}
_SEEDS = (*COLORS, INK, "#c0392b")
_FLOOR = 1e-16  # below it a loss is rounding


def losses(content: dict[str, Any]) -> Figure | None:
    """Test loss by system and number of demonstrations (the paper's Fig. 4): every seed, and the median as a line."""
    rows: Rows = content.get("rows", [])
    if not rows:
        return None
    systems, sizes, methods = (_distinct(rows, key) for key in ("system", "size", "method"))
    fig = Figure(figsize=(1.5 + 4.2 * len(systems), 4.2))
    for ax, system in zip(fig.subplots(1, len(systems), squeeze=False)[0], systems, strict=True):
        for i, method in enumerate(methods):
            shift = 0.08 * (i - 0.5 * (len(methods) - 1))
            found = [
                [max(r["test"], _FLOOR) for r in rows if (r["system"], r["method"], r["size"]) == (system, method, n)]
                for n in sizes
            ]
            for x, values in enumerate(found):
                ax.plot([x + shift] * len(values), values, "o", ms=4, color=color(method), mfc="white")
            middle = [np.median(values) if values else np.nan for values in found]
            ax.plot(np.arange(len(sizes)) + shift, middle, line(method), lw=1.4, color=color(method), label=method)
        ax.set_yscale("log")
        ax.set_xticks(range(len(sizes)), map(str, sizes))
        ax.set_xlabel("demonstrations")
        ax.set_title(system)
    fig.axes[0].set_ylabel("test imitation loss")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def curves(content: dict[str, Any]) -> Figure | None:
    """Training (thin) and validation loss (thick) over epochs with most demonstrations (the paper's Fig. 6), seed 0."""
    rows: Rows = content.get("rows", [])
    if not rows:
        return None
    systems, size = _distinct(rows, "system"), max(_distinct(rows, "size"))
    fig = Figure(figsize=(1.5 + 4.2 * len(systems), 4.0))
    for ax, system in zip(fig.subplots(1, len(systems), squeeze=False)[0], systems, strict=True):
        for row in (r for r in rows if (r["system"], r["size"], r["seed"]) == (system, size, 0)):
            _curve(ax, row)
        ax.set_yscale("log")
        ax.set_xscale("log")
        ax.set_xlabel("epoch")
        ax.set_title(f"{system}, {size} demonstrations")
    fig.axes[0].set_ylabel("loss that the method learns by")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def lqr(content: dict[str, Any]) -> Figure | None:
    """Imitation and model loss over epochs (the paper's Fig. 3), a line for each model that learning began with."""
    rows: Rows = content.get("rows", [])
    if not rows:
        return None
    methods = _distinct(rows, "method")
    fig = Figure(figsize=(1.0 + 3.2 * len(methods), 5.6))
    axes = fig.subplots(2, len(methods), squeeze=False, sharex="col", sharey="row")
    for column, method in zip(axes.T, methods, strict=True):
        for row in (r for r in rows if r["method"] == method):
            for ax, kind in zip(column, ("imitation", "model"), strict=True):
                values = np.clip(np.array(row[f"{kind}_curve"], float), _FLOOR, 1e4)
                ax.plot(row["epoch"], values, lw=1.2, color=_SEEDS[row["seed"] % len(_SEEDS)])
                ax.set_yscale("log")
        column[0].set_title(method)
        column[1].set_xlabel("epoch")
    axes[0, 0].set_ylabel("imitation loss")
    axes[1, 0].set_ylabel("model loss")
    return fig


def unrealisable(content: dict[str, Any]) -> Figure | None:
    """Imitation and transition loss over epochs (the paper's Fig. 5): every seed, and the median as a thick line."""
    rows: Rows = content.get("rows", [])
    if not rows:
        return None
    dampings = _distinct(rows, "damping")
    fig = Figure(figsize=(9.0, 0.6 + 3.2 * len(dampings)))
    for axes, damping in zip(fig.subplots(len(dampings), 2, squeeze=False), dampings, strict=True):
        for ax, kind in zip(axes, ("imitation", "transition"), strict=True):
            for method in _distinct(rows, "method"):
                mine = [r for r in rows if (r["damping"], r["method"]) == (damping, method)]
                for row in mine:
                    ax.plot(row["epoch"], row[f"{kind}_curve"], lw=0.7, alpha=0.5, color=color(method))
                middle = np.median([r[f"{kind}_curve"] for r in mine], axis=0)
                ax.plot(mine[0]["epoch"], middle, lw=2.0, color=color(method), label=method)
            ax.set_yscale("log")
            ax.set_xlabel("epoch")
            ax.set_ylabel(f"{kind} loss, held out")
            ax.set_title(f"damping of the {damping}")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def solver_cost(content: dict[str, Any]) -> Figure | None:
    """Time of a solve (dashed) and of what the gradient adds (solid), and memory of both (the paper's Fig. 2)."""
    rows: Rows = content.get("rows", [])
    if not rows:
        return None
    varied = _distinct(rows, "varied")
    fig = Figure(figsize=(1.0 + 3.4 * len(varied), 6.0))
    axes = fig.subplots(2, len(varied), squeeze=False, sharex="col", sharey="row")
    looks = dict(zip(("implicit", "unroll", "mpc.pytorch"), (ORANGE, BLUE, GREY), strict=True))
    for (times, memory), name in zip(axes.T, varied, strict=True):
        for derivative in _distinct(rows, "derivative"):
            mine = [r for r in rows if (r["varied"], r["derivative"]) == (name, derivative)]
            x, look = [r[name] for r in mine], {"color": looks[derivative], "marker": "o", "ms": 3}
            times.plot(x, [1e3 * r["solve"] for r in mine], ls="--", label=f"{derivative}: solve", **look)
            added = [1e3 * max(r["both"] - r["solve"], 1e-6) for r in mine]
            times.plot(x, added, ls="-", label=f"{derivative}: gradient", **look)
            if all("memory_both" in r for r in mine):
                memory.plot(x, [r["memory_both"] / 2**20 for r in mine], ls="-", **look)
        for ax in (times, memory):
            ax.set_xscale("log")
            ax.set_yscale("log")
        memory.set_xlabel("largest number of iterations" if name == "iterations" else name)
    axes[0, 0].set_ylabel("time [ms]")
    axes[1, 0].set_ylabel("memory [MiB]")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def color(method: str) -> str:
    """Of a method, in all figures."""
    return _COLORS.get(method.removesuffix(".gn"), MUSTARD)


def line(method: str) -> str:
    """Dashed for Levenberg and Marquardt's steps."""
    return "--" if method.endswith(".gn") else "-"


def _curve(ax: Axes, row: dict[str, Any]) -> None:
    train, held_out = (np.maximum(np.array(row[f"{k}_curve"], float), _FLOOR) for k in ("train", "validation"))
    ax.plot(row["epoch"], train, lw=0.7, alpha=0.6, color=color(row["method"]))
    method = row["method"]
    ax.plot(row["epoch"], held_out, line(method), lw=1.6, color=color(method), label=method)


def _distinct(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
