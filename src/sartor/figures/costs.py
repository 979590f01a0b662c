"""Closed-loop costs: who tracks better than `stand`, where, and how sure that is."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sartor import evaluate, pairing
from sartor.figures.style import BLUE, COLORS, GREEN, INK, ORANGE, PROTOCOLS, line, mark, name_rows, order
from sartor.pairing import Arm

Columns = Mapping[str, np.ndarray]
RECIPES = ("recipe", "recipe_quick")
"""Studies that are shown beside the main one."""
_MODEL_MARKERS = "osD^v"
_INFINITE = 1e6  # percent that stand for an infinite cost
_FAR = 150.0  # percent of `stand` beyond which a number stands at the edge: one bad method must not hide the others


def tuned(rows: Columns, study: str = "main") -> dict[int, list[Arm]]:
    """Fine-tuned arms of a study by rollout length p, methods in order."""
    found = [arm for arm in pairing.arms(rows, study) if arm.p > 0]
    ranks = {method: i for i, method in enumerate(order([arm.method for arm in found]))}
    ps = sorted({arm.p for arm in found})
    return {p: sorted((a for a in found if a.p == p), key=lambda a: ranks[a.method]) for p in ps}


def headline_p(rows: Columns) -> int:
    """The rollout length that figures with room for only one show: 4, or the nearest to it."""
    return min(tuned(rows), key=lambda p: abs(p - 4))


def bars(rows: Columns) -> Figure | None:
    """Cost relative to `stand` by weighting and p (the paper's Fig. 2), with intervals and every run as a mark.

    The recipe stands below the weightings of its p.
    """
    recipes = [arm for study in RECIPES for of_p in tuned(rows, study).values() for arm in of_p]
    panels = {p: [*arms, *(arm for arm in recipes if arm.p == p)] for p, arms in tuned(rows).items()}
    panels = {p: [arm for arm in arms if _has(rows, arm, Arm("stand", p))] for p, arms in panels.items()}
    panels = {p: arms for p, arms in panels.items() if arms}
    if not panels:
        return None
    shown = [arm for arms in panels.values() for arm in arms]
    names = order([arm.method for arm in shown if not arm.variant])
    names += list(dict.fromkeys(_name(arm) for arm in shown if arm.variant))
    fig, axes = _panels(len(panels), len(names))
    for ax, (p, arms) in zip(axes, panels.items(), strict=True):
        for arm in arms:
            y = names.index(_name(arm))
            _bar(ax, y, evaluate.ratio(rows, arm, Arm("stand", p)), line(arm.method)["color"])
            _runs(ax, y, rows, arm)
        ax.set_title(f"p = {p}")
    _percent_axes(axes, names)
    models = sorted({run[0] for arms in panels.values() for run in pairing.costs(rows, arms[0])})
    marks = [mark(_MODEL_MARKERS[i % 5], f"one seed, pretrained model {m}", fill="white") for i, m in enumerate(models)]
    fig.legend(handles=[*marks, Line2D([], [], color=INK, label="95 % interval")], loc="outside lower center", ncols=4)
    return fig


def environments(rows: Columns) -> Figure | None:
    """Cost relative to `stand` in every environment, over runs, as a heat map; saturated environments are marked."""
    p = headline_p(rows)
    arms = [arm for arm in tuned(rows)[p] if arm.method != "stand" and _has(rows, arm)]
    if not arms:
        return None
    found = [pairing.pairs(rows, arm, arm._replace(method="stand")) for arm in arms]
    columns = sorted(set.intersection(*(set(each.environments) for each in found)))
    percent = np.array([_by_environment(each, columns) for each in found])
    fig = Figure(figsize=(max(6.0, 2.2 + 0.5 * len(columns)), 1.7 + 0.34 * len(arms)))
    ax = fig.subplots()
    reach = float(np.clip(np.nanquantile(np.abs(percent - 100.0), 0.9), 20.0, 60.0))
    norm = TwoSlopeNorm(100.0, 100.0 - reach, 100.0 + reach)
    image = ax.pcolormesh(percent, cmap="RdBu_r", norm=norm, edgecolors="white", linewidth=0.5)
    for (i, j), value in np.ndenumerate(percent):
        dark = abs(norm(value) - 0.5) > 0.28
        ax.text(j + 0.5, i + 0.5, _short(value), ha="center", va="center", fontsize=8, color="w" if dark else INK)
    marked = _saturated(rows)
    ax.set_xticks(np.arange(len(columns)) + 0.5, [f"{e}{'*' if e in marked else ''}" for e in columns])
    ax.set_yticks(np.arange(len(arms)) + 0.5, [arm.method for arm in arms])
    ax.invert_yaxis()
    ax.grid(False)
    ax.set_xlabel("environment (* saturated)" if marked else "environment")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(f"p = {p}, geometric mean over runs")
    fig.colorbar(image, ax=ax, label="cost, % of stand", pad=0.01, extend="both")
    return fig


def protocols(rows: Columns) -> Figure | None:
    """The same comparison under three protocols of choosing epochs."""
    panels = {p: [a for a in arms if a.method != "stand"] for p, arms in tuned(rows).items()}
    panels = {p: [a for a in arms if any(_has(rows, a, protocol=n) for n in PROTOCOLS)] for p, arms in panels.items()}
    panels = {p: arms for p, arms in panels.items() if arms}
    if not panels:
        return None
    methods = order([arm.method for arms in panels.values() for arm in arms])
    fig, axes = _panels(len(panels), len(methods), height=0.5)
    looks = dict(zip(PROTOCOLS, ((BLUE, "o", -0.22), (GREEN, "s", 0.0), (ORANGE, "D", 0.22)), strict=True))
    for ax, (p, arms) in zip(axes, panels.items(), strict=True):
        for arm in arms:
            for name, (color, marker, offset) in looks.items():
                if _has(rows, arm, protocol=name):
                    _point(
                        ax, methods.index(arm.method) + offset, evaluate.ratio(rows, arm, protocol=name), color, marker
                    )
        ax.set_title(f"p = {p}")
    _percent_axes(axes, methods)
    marks = [mark(marker, PROTOCOLS[name], color) for name, (color, marker, _) in looks.items()]
    fig.legend(handles=marks, loc="outside lower center", ncols=3)
    return fig


def capacity(rows: Columns) -> Figure | None:
    """Cost of other sizes of the networks, relative to `stand` with those of the main study."""
    p = headline_p(rows)
    arms = [arm for arm in tuned(rows, "capacity").get(p, []) if _has(rows, arm, Arm("stand", p))]
    if not arms:
        return None
    sizes = list(dict.fromkeys(arm.variant for arm in arms))
    fig = Figure(figsize=(7.0, 4.0))
    ax = fig.subplots()
    methods = order([arm.method for arm in arms])
    for i, method in enumerate(methods):
        mine = [arm for arm in arms if arm.method == method]
        x = np.array([sizes.index(arm.variant) for arm in mine]) + 0.06 * (i - 0.5 * (len(methods) - 1))
        found = [evaluate.ratio(rows, arm, Arm("stand", p)) for arm in mine]
        value, low, high = np.minimum(100.0 * np.array([(f.value, f.low, f.high) for f in found]).T, _INFINITE)
        color = line(method)["color"]
        ax.vlines(x, low, high, color=color, lw=1.4)
        ax.plot(x, value, "o", color=color, ms=5, label=method)
    ax.axhline(100.0, color=INK, lw=0.9)
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_xlabel("networks: hidden layers of inertia and potential, encoder")
    ax.set_ylabel("cost, % of stand as in the main study")
    fig.legend(loc="outside lower center", ncols=5)
    return fig


def studies(rows: Columns) -> Figure | None:
    """Ablations, rounds and amounts of data, each relative to `stand` of the main study."""
    p = headline_p(rows)
    names = [s for s in dict.fromkeys(rows["study"].tolist()) if s not in ("main", "capacity", *RECIPES)]
    arms = [arm for s in names for arm in tuned(rows, s).get(p, []) if _has(rows, arm, Arm("stand", p))]
    if not arms:
        return None
    labels = [f"{arm.study}: {arm.method}{', ' + arm.variant if arm.variant else ''}" for arm in arms]
    fig, (ax,) = _panels(1, len(arms))
    for y, arm in enumerate(arms):
        found = evaluate.ratio(rows, arm, Arm("stand", p))
        _point(ax, y, found, COLORS[names.index(arm.study) % len(COLORS)], "o")
    ax.set_title(f"p = {p}")
    _percent_axes([ax], labels)
    return fig


def _has(rows: Columns, arm: Arm, baseline: str | Arm = "stand", protocol: pairing.Protocol = "last") -> bool:
    """Whether there is anything to compare: a run that is not finished lacks rows."""
    try:
        base = baseline if isinstance(baseline, Arm) else arm._replace(method=baseline)
        values, of_base = pairing.pairs(rows, arm, base, protocol=protocol).values
        return bool(np.isfinite(of_base).all() and not np.isnan(values).any())
    except pairing.MissingEpisodes:
        return False


def _name(arm: Arm) -> str:
    """On an axis."""
    return fill(f"{arm.method}, {arm.variant}", 36) if arm.variant else arm.method


def _saturated(rows: Columns) -> set[int]:
    try:
        return pairing.saturated_environments(rows)
    except pairing.MissingEpisodes:
        return set()


def _by_environment(each: pairing.Pairs, environments: list[int]) -> np.ndarray:
    percent = _percent(each, 0)
    return percent[[each.environments.index(e) for e in environments]]


def _percent(each: pairing.Pairs, axis: int) -> np.ndarray:
    """Geometric means; one with a cost that is infinite stands far off the figure."""
    return np.minimum(100.0 * np.exp(np.log(each.values[0] / each.values[1]).mean(axis)), _INFINITE)


def _short(percent: float) -> str:
    return f"{percent:.0f}" if percent < _INFINITE else "∞"


def _panels(count: int, methods: int, height: float = 0.36) -> tuple[Figure, Sequence[Axes]]:
    fig = Figure(figsize=(2.6 + 2.9 * max(count, 2 if methods else 1), 1.8 + height * methods))
    return fig, fig.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]


def _bar(ax: Axes, y: float, found: evaluate.Interval, color: str) -> None:
    ax.barh(y, min(100.0 * (found.value - 1.0), _INFINITE), left=100.0, height=0.62, color=color, alpha=0.45)
    _point(ax, y, found, color, "|")


def _point(ax: Axes, y: float, found: evaluate.Interval, color: str, marker: str) -> None:
    value, low, high = (min(100.0 * x, _INFINITE) for x in (found.value, found.low, found.high))
    ax.hlines(y, low, high, color=INK if marker == "|" else color, lw=1.5)
    ax.plot(value, y, marker, ms=6, color=color)
    if value > _FAR:
        ax.text(_FAR, y, f"{_short(value)} → ", ha="right", va="center", fontsize=9, clip_on=True)


def _runs(ax: Axes, y: float, rows: Columns, arm: Arm) -> None:
    """One mark for each run: geometric mean over environments."""
    each = pairing.pairs(rows, arm, Arm("stand", arm.p))
    percent = _percent(each, 1)
    models = sorted({model for model, _ in each.runs})
    for (model, _), value, shift in zip(each.runs, percent, np.linspace(-0.2, 0.2, len(percent)), strict=True):
        marker = _MODEL_MARKERS[models.index(model) % 5]
        ax.plot(value, y + shift, marker, ms=3.6, color=INK, mfc="white", mew=0.8)


def _percent_axes(axes: Sequence[Axes], names: list[str]) -> None:
    low, high = min(ax.dataLim.x0 for ax in axes), min(max(ax.dataLim.x1 for ax in axes), _FAR)
    low, high = min(low, 98.0), max(high, 102.0)
    for i, ax in enumerate(axes):
        ax.axvline(100.0, color=INK, lw=0.9)
        ax.set_xlabel("cost, % of stand")
        ax.set_xlim(low - 0.05 * (high - low), _FAR if high == _FAR else high + 0.05 * (high - low))
        name_rows(ax, names, show=i == 0)
