"""What the figures share: the order of methods, their colors and lines, fonts.

A method looks the same in every figure: the paper's baselines are blue, its sensitivities orange, those beyond it
green and purple, controllers without fine-tuning grey to black.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sartor.pairing import Protocol

INK, GRID, ALARM = "#1f2933", "#d9dee4", "#c0392b"
COLORS = ("#1b6ca8", "#e07b39", "#3c8d5a", "#8e5ea2", "#b8860b", "#5f6b7a")
BLUE, ORANGE, GREEN, PURPLE, MUSTARD, GREY = COLORS
METHODS = (
    "nominal", "pretrained", "oracle", "oracle_damping", "ones", "norm", "mpc_cost", "stand",
    "stand_env", "ours", "ours_trajectory", "ours_avg", "ours_shuffled", "regret", "regret_avg", "regret_env",
    "closed_loop", "closed_loop_env", "recipe",
)  # fmt: skip
"""The order in which methods are shown."""
PROTOCOLS: dict[Protocol, str] = {
    "last": "last epoch",
    "best_validation": "best on validation",
    "top_five": "top five on test (optimistic)",
}
STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.constrained_layout.use": True, "savefig.dpi": 150,
}  # fmt: skip
_LINES = {
    "nominal": (MUSTARD, "-"), "pretrained": (GREY, "-"), "oracle": (INK, ":"), "oracle_damping": (INK, "-"),
    "ones": (GREY, "--"), "norm": (BLUE, "--"), "mpc_cost": (BLUE, ":"), "stand": (BLUE, "-"),
    "stand_env": (BLUE, "-."), "ours": (ORANGE, "-"), "ours_trajectory": (MUSTARD, "-"),
    "ours_avg": (ORANGE, "--"), "ours_shuffled": (ORANGE, ":"),
    "regret": (GREEN, "-"), "regret_avg": (GREEN, ":"), "regret_env": (GREEN, "-."), "closed_loop": (PURPLE, "-"),
    "closed_loop_env": (PURPLE, "-."), "recipe": (GREEN, "--"),
}  # fmt: skip


def order(methods: Sequence[str]) -> list[str]:
    """Methods as they are shown; those that are not in `METHODS` come last, as they came."""
    known = [m for m in METHODS if m in methods]
    return known + [m for m in dict.fromkeys(methods) if m not in METHODS]


def line(method: str) -> dict[str, Any]:
    """Color and dashes of a method, as arguments of `plot`."""
    color, dashes = _LINES.get(method, (COLORS[sum(map(ord, method)) % len(COLORS)], "-."))
    return {"color": color, "ls": dashes}


def mark(marker: str, label: str, color: str = INK, fill: str | None = None) -> Line2D:
    """A mark for a legend."""
    return Line2D([], [], color=color, marker=marker, mfc=fill or color, ls="", ms=5, label=label)


def name_rows(ax: Axes, names: list[str], show: bool) -> None:
    """Names on the vertical axis, the first at the top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelleft=show)
    ax.grid(False, axis="y")


def styled() -> Any:
    """A context in which figures are drawn and saved in one style."""
    return mpl.rc_context(STYLE)
