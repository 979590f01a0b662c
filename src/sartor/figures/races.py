"""Races on held-out tracks: what each model cost, and the sweep over sizes of the network."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sartor import evaluate, pairing
from sartor.evaluate import Interval
from sartor.figures.style import INK, MUSTARD, line, order
from sartor.pairing import Arm

ALONE = ("linear", "kinematic", "published", "oracle", "teacher")
"""Models that are raced once, without a seed and whatever the size."""
_SWEPT = {
    "pretrained": "o",
    "stand": "o",
    "ours": "o",
    "ours_trajectory": "s",
    "ours_avg": "s",
    "ours_shuffled": "v",
    "regret": "o",
    "regret_avg": "s",
}


class Races(NamedTuple):
    """The rows of `trials.json`, and the same as `sartor.pairing` knows them: a seed is a model, a size a variant."""

    rows: list[dict[str, Any]]
    table: dict[str, np.ndarray]
    sizes: list[int]
    """Hidden units of the networks, as in the settings."""
    rollouts: list[int]
    """Lengths p, the first that of all sizes."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Races":
        """A car that never moved costs infinitely much."""
        rows = content.get("rows", [])
        found: dict[str, list] = {name: [r[name] for r in rows] for name in ("method", "p")}
        found |= {"environment": [r["test"] for r in rows], "variant": [str(r["size"] or "") for r in rows]}
        found |= {"model": [r["seed"] if r["size"] else -1 for r in rows]}
        found |= {"seed": [r["seed"] if r["p"] else -1 for r in rows]}
        found |= {"J": [np.inf if r["J"] is None else r["J"] for r in rows]}
        same = {"study": "main", "split": "test", "epoch": 0, "last": True}
        table = {name: np.array(values) for name, values in found.items()}
        table |= {name: np.full(len(rows), value) for name, value in same.items()}
        distinct = lambda key: list(dict.fromkeys(r[key] for r in rows if r[key]))
        return cls(rows, table, distinct("size"), distinct("p"))

    @property
    def middle(self) -> int:
        """The size that the lengths of rollouts are compared at; 0 if there is none."""
        return self.sizes[len(self.sizes) // 2] if self.sizes else 0

    @property
    def main(self) -> int:
        """The p of all sizes; 0 if nothing is fine-tuned."""
        return self.rollouts[0] if self.rollouts else 0

    def methods(self, size: int, p: int) -> list[str]:
        """Fine-tuned with a size and p, and `pretrained` of that size, in order."""
        mine = [r for r in self.rows if r["size"] == size and size and r["p"] in (0, p)]
        return order([r["method"] for r in mine])

    def arm(self, method: str, size: int, p: int) -> Arm:
        """What was raced; models that do not depend on size or p are the same for all."""
        if method in ALONE:
            return Arm(method)
        return Arm(method, 0 if method == "pretrained" else p, variant=str(size))

    def of_arm(self, arm: Arm) -> list[dict[str, Any]]:
        """Its rows."""
        return [r for r in self.rows if (r["method"], r["p"], str(r["size"] or "")) == (arm.method, arm.p, arm.variant)]

    def ratio(self, arm: Arm, base: Arm) -> Interval | None:
        """J of one to that of the other, geometric mean over seeds and tracks; None without common drives."""
        try:
            return evaluate.ratio(self.table, arm, base)
        except pairing.MissingEpisodes:
            return None

    def by_track(self, arm: Arm, base: Arm | None = None) -> dict[int, float]:
        """Geometric mean over seeds of J / J_base, or of J [s], on each held-out track."""
        try:
            found = pairing.pairs(self.table, *([arm] if base is None else [arm, base]))
        except pairing.MissingEpisodes:
            return {}
        with np.errstate(invalid="ignore", divide="ignore"):  # of cars that never moved
            logs = np.log(found.values[0]) - (0.0 if base is None else np.log(found.values[1]))
            return dict(zip(found.environments, np.exp(logs.mean(0)).tolist(), strict=True))

    def level(self, arm: Arm) -> float:
        """Geometric mean of J over seeds and tracks [s]; NaN if there is none."""
        found = list(self.by_track(arm).values())
        return float(np.exp(np.mean(np.log(found)))) if found else np.nan


def sweep(content: Mapping[str, Any]) -> Figure | None:
    """J over the size of the network, in seconds, and in percent of `stand` of the same size with intervals."""
    races = Races.of(content)
    sizes, p = sorted(races.sizes), races.main
    there = {method for size in sizes for method in races.methods(size, p)}
    methods = [method for method in _SWEPT if method in there]
    if not methods:
        return None
    fig = Figure(figsize=(10.0, 4.4))
    left, right = fig.subplots(1, 2)
    _levels(left, races, sizes, methods)
    compared = [method for method in methods if method not in ("pretrained", "stand")]
    for i, method in enumerate(compared):
        _ratios(right, races, sizes, method, 0.07 * (i - 0.5 * (len(compared) - 1)))
    right.axhline(100.0, **line("stand"), lw=1.4)
    left.set(title="seconds a lap, contact included", ylabel="J [s]")
    right.set(title="against stand of the same size", ylabel="J [% of stand], 95 % interval")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlabel("hidden units of the network")
        ax.grid(False, axis="x")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return fig


def _levels(ax: Axes, races: Races, sizes: list[int], methods: list[str]) -> None:
    for method in methods:
        values = [races.level(races.arm(method, size, races.main)) for size in sizes]
        values = np.where(np.isfinite(values), values, np.nan)
        ax.plot(sizes, values, marker=_SWEPT[method], ms=5, lw=1.6, label=method, **line(method))
    for name, color, dashes in (("published", MUSTARD, "--"), ("oracle", INK, ":")):
        value = races.level(Arm(name))
        if np.isfinite(value):
            ax.axhline(value, color=color, ls=dashes, lw=1.4, label=name)


def _ratios(ax: Axes, races: Races, sizes: list[int], method: str, shift: float) -> None:
    """Points with intervals, moved aside by so many doublings of the size."""
    found = {n: races.ratio(*(races.arm(m, n, races.main) for m in (method, "stand"))) for n in sizes}
    shown = [(n * 2.0**shift, f) for n, f in found.items() if f is not None and np.isfinite(f.high)]
    if shown:
        x, color = [at for at, _ in shown], line(method)["color"]
        values = 100.0 * np.array([(f.value, f.low, f.high) for _, f in shown])
        ax.vlines(x, values[:, 1], values[:, 2], color=color, lw=1.4)
        ax.plot(x, values[:, 0], marker=_SWEPT[method], ms=5, lw=1.2, **line(method))
