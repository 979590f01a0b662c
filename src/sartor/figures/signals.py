"""What explains the costs: labels, tracking errors and their spectrum, truth check, losses."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from sartor.figures.style import BLUE, GREEN, GREY, INK, ORANGE, line, mark, name_rows, order

Columns = Mapping[str, np.ndarray]


def cost_map(maps: Mapping[str, np.ndarray]) -> Figure | None:
    """Mean label by state and step (the paper's Fig. 1), positions and velocities on their own scales."""
    shown = [m for m in order([name.removeprefix("S_") for name in maps]) if f"S_{m}" in maps][:3]
    if not shown:
        return None
    fig = Figure(figsize=(9.5, 0.5 + 2.7 * len(shown)))
    axes = fig.subplots(len(shown), 2, squeeze=False)
    for row, method in zip(axes, shown, strict=True):
        S = maps[f"S_{method}"]
        n = S.shape[1] // 2
        for ax, part, symbol, unit in ((row[0], S[:, :n], "q", "rad"), (row[1], S[:, n:], r"\dot q", "rad/s")):
            image = ax.pcolormesh(part.T, cmap="magma_r", vmin=0.0, edgecolors="white", linewidth=0.4)
            ax.set_title(f"{method}: {'positions' if symbol == 'q' else 'velocities'}")
            ax.set_xticks(np.arange(len(S)) + 0.5, [str(k + 1) for k in range(len(S))])
            ax.set_yticks(np.arange(n) + 0.5, [f"${symbol}_{i + 1}$" for i in range(n)])
            ax.invert_yaxis()
            ax.grid(False)
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0)
            fig.colorbar(image, ax=ax, label=f"mean S, per {unit}", pad=0.02, aspect=15)
    for ax in axes[-1]:
        ax.set_xlabel("step of the horizon")
    return fig


def traces(arrays: Mapping[str, np.ndarray]) -> Figure | None:
    """Tracking errors of the joints over time in one environment."""
    there = order([n[2:] for n in arrays if n.startswith("x_")])
    methods = [m for m in there if m in ("pretrained", "stand", "ours", "recipe", "oracle_damping")]
    if not methods:
        return None
    t, n = arrays["t"], arrays["reference"].shape[1] // 2
    fig = Figure(figsize=(10.0, 1.2 + 1.15 * n))
    axes = fig.subplots(n, 2, sharex=True)
    for method in methods:
        errors = arrays[f"x_{method}"] - arrays["reference"]
        for i in range(n):
            axes[i, 0].plot(t, 1e3 * errors[:, i], **line(method), lw=1.2, label=method)
            axes[i, 1].plot(t, errors[:, n + i], **line(method), lw=1.2)
    for i, (left, right) in enumerate(axes):
        left.set_ylabel(f"joint {i + 1}")
        for ax in (left, right):
            ax.margins(x=0.0)
            ax.yaxis.set_major_locator(MaxNLocator(3))
    axes[0, 0].set_title("position error [mrad]")
    axes[0, 1].set_title("velocity error [rad/s]")
    for ax in axes[-1]:
        ax.set_xlabel("time [s]")
    fig.align_ylabels(axes)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


def spectrum(arrays: Mapping[str, np.ndarray]) -> Figure | None:
    """Power of the velocity error over frequency, joint by joint: a limit cycle is a peak."""
    methods = order([name for name in arrays if name != "frequencies"])
    if not methods:
        return None
    frequencies, n = arrays["frequencies"], arrays[methods[0]].shape[1]
    shown = frequencies > 0.0
    fig = Figure(figsize=(10.0, 5.2))
    axes = fig.subplots(2, -(-(n + 1) // 2), sharex=True, sharey=True).ravel()
    for method in methods:
        power = np.column_stack([arrays[method], arrays[method].sum(1)])
        for i, ax in enumerate(axes[: n + 1]):
            ax.semilogy(frequencies[shown], power[shown, i], **line(method), lw=1.3, label=method)
            ax.set_title(f"joint {i + 1}" if i < n else "sum of all joints")
    for ax in axes[n + 1 :]:
        ax.set_axis_off()
    for ax in axes:
        ax.yaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.0)
    fig.supxlabel("frequency [Hz]", fontsize=10)
    fig.supylabel("power of the velocity error [(rad/s)²/Hz]", fontsize=10)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig


def truth(content: Mapping[str, Any]) -> Figure | None:
    """Rank correlations of labels with the true sensitivity, a panel for each quantity."""
    found = content.get("rows", [])
    if not found:
        return None
    quantities, variants = (
        list(dict.fromkeys(row["quantity"] for row in found)),
        order([row["variant"] for row in found]),
    )
    fig = Figure(figsize=(2.4 + 2.1 * max(2, len(quantities)), 1.7 + 0.36 * len(variants)))
    axes = fig.subplots(1, len(quantities), sharex=True, squeeze=False)[0]
    kinds = {
        "overall": (BLUE, "o", "overall"),
        "joints": (GREEN, "s", "joints within a sample"),
        "samples": (ORANGE, "D", "samples within a joint"),
    }
    for i, (ax, quantity) in enumerate(zip(axes, quantities, strict=True)):
        for row in (row for row in found if row["quantity"] == quantity):
            for kind, (color, marker, _) in kinds.items():
                ax.plot(row[kind], variants.index(row["variant"]), marker, ms=6, color=color)
        name_rows(ax, variants, show=i == 0)
        ax.set_title(quantity)
        _correlation_axis(ax)
    marks = [mark(marker, label, color) for color, marker, label in kinds.values()]
    fig.legend(handles=marks, loc="outside lower center", ncols=3)
    return fig


def predicts(content: Mapping[str, Any]) -> Figure | None:
    """Rank correlation, over checkpoints, of losses with the closed-loop cost."""
    found = content.get("predicts", {})
    if not found:
        return None
    names = order(list(found))
    fig = Figure(figsize=(6.0, 1.2 + 0.3 * len(names)))
    ax = fig.subplots()
    ax.barh(range(len(names)), [found[name] for name in names], height=0.6, color=GREY)
    name_rows(ax, names, show=True)
    _correlation_axis(ax)
    return fig


def curves(rows: Columns) -> Figure | None:
    """Loss over epochs, under each method's own weighting, relative to its first epoch; mean over runs."""
    main = rows["study"] == "main"
    ps = sorted(set(rows["p"][main].tolist()))
    if not ps:
        return None
    fig = Figure(figsize=(1.5 + 3.0 * len(ps), 4.2))
    axes = fig.subplots(1, len(ps), sharey=True, squeeze=False)[0]
    for ax, p in zip(axes, ps, strict=True):
        for method in order(rows["method"][main & (rows["p"] == p)].tolist()):
            epochs, losses = _mean_curve(rows, main & (rows["p"] == p) & (rows["method"] == method))
            ax.plot(epochs, losses, **line(method), lw=1.5, label=method)
        ax.set_title(f"p = {p}")
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].set_ylabel("validation loss / its first value")
    handles = {h.get_label(): h for ax in axes for h in ax.get_lines()}
    fig.legend(handles=list(handles.values()), loc="outside lower center", ncols=5)
    return fig


def _correlation_axis(ax: Axes) -> None:
    ax.axvline(0.0, color=INK, lw=0.9)
    ax.set_xlim(min(-0.1, ax.get_xlim()[0]), 1.0)
    ax.set_xlabel("rank correlation")


def _mean_curve(rows: Columns, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    epochs = np.unique(rows["epoch"][keep])
    losses = np.array([rows["validation_loss"][keep & (rows["epoch"] == e)].mean() for e in epochs])
    return epochs, losses / losses[0]
