"""The tables of a Panda run: the contents of its files in, texts out."""

import html
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from sartor import evaluate, pairing
from sartor.evaluate import Interval
from sartor.figures.costs import RECIPES, headline_p, tuned
from sartor.figures.style import PROTOCOLS, order
from sartor.pairing import BASELINES, Arm

PUBLISHED_SIZE = "5 LSTMs of 10"
"""Variant of the capacity study with the sizes that are published."""
WHERE: tuple[pairing.Where, ...] = ("all", "unsaturated", "saturated")


class Grid(NamedTuple):
    """A table of texts; the first column is the name of the row."""

    header: list[str]
    rows: list[list[str]]


class Row(NamedTuple):
    """What the headline says about one arm; a ratio that cannot be had is None."""

    arm: Arm
    ratios: list[Interval | None]
    """To `stand` over all, unsaturated and saturated environments."""
    headroom: Interval | None
    summary: dict[str, float]


def rows_of(rows: pairing.Table) -> list[Row]:
    """Baselines first, then by p, the order of methods as everywhere; then the recipe."""
    methods = [arm.method for arm in pairing.arms(rows) if arm.method in BASELINES]
    tailored = tuned(rows)
    stand = Arm("stand", headline_p(rows)) if tailored else None
    recipe = [arm for study in RECIPES for of_p in tuned(rows, study).values() for arm in of_p]
    arms = [*map(Arm, order(methods)), *(arm for of_p in tailored.values() for arm in of_p), *recipe]
    base = lambda arm: stand if arm.method in BASELINES or arm in recipe else "stand"
    return [row for arm in arms if (row := _row(rows, arm, base(arm))) is not None]


def _row(rows: pairing.Table, arm: Arm, stand: Arm | str | None) -> Row | None:
    summary = attempt(evaluate.summary, rows, arm)
    ratios = [attempt(evaluate.ratio, rows, arm, stand, where=w) if stand else None for w in WHERE]
    headroom = attempt(evaluate.headroom, rows, arm, stand) if arm.method not in BASELINES and stand else None
    return None if summary is None else Row(arm, ratios, headroom, summary)


def headline(rows: pairing.Table) -> Grid:
    """The comparison that counts: each weighting against `stand`, and what its episodes were like."""
    header = ["weighting", "p", "all", "unsaturated", "saturated", "head-room closed", "J mean", "J median", "q [mrad]",
              "qd [rad/s]", "e.e. [mm]", "torque at limit", "velocities in J", "unstable", "failed solves"]  # fmt: skip
    body = []
    for arm, ratios, headroom, s in rows_of(rows):
        body.append([
            ", ".join(filter(None, (arm.method, arm.variant))), str(arm.p or ""), *map(percent, ratios),
            percent(headroom), f"{s['J']:.4g}",
            f"{s['J_median']:.3g}", f"{1e3 * s['q_rmse']:.2f}", f"{s['qd_rmse']:.3f}", f"{1e3 * s['ee_rmse']:.2f}",
            f"{s['saturated']:.1%}", f"{s['velocity_share']:.0%}", f"{s['unstable']:.0f} of {s['episodes']}",
            f"{s['failed']:.0f}",
        ])  # fmt: skip
    return Grid(header, body)


def protocols(rows: pairing.Table) -> Grid:
    """Three protocols, and the paper's two statistics of eq. (7)."""
    header = ["weighting", "p", *PROTOCOLS.values(), "mean J, last", "mean J, top five", "median J, last"]
    others = (("last", "mean"), ("top_five", "mean"), ("last", "median"))
    body = []
    for arm in (arm for arms in tuned(rows).values() for arm in arms if arm.method != "stand"):
        ratios = [attempt(evaluate.ratio, rows, arm, protocol=name) for name in PROTOCOLS]
        ratios += [attempt(evaluate.ratio, rows, arm, protocol=name, statistic=kind) for name, kind in others]
        if any(ratios):
            body.append([arm.method, str(arm.p), *map(percent, ratios)])
    return Grid(header, body)


def studies(rows: pairing.Table) -> Grid:
    """What was varied beside the weighting, against `stand` of the main study, of the variant, and itself unvaried."""
    header = ["study", "weighting", "variant", "p", "validation: of stand", "test: of stand", "unsaturated",
              "head-room closed", "of stand, this variant", "unsaturated", "of the weighting, main", "J median",
              "unstable", "runs"]  # fmt: skip
    body = []
    for study in (s for s in dict.fromkeys(rows["study"].tolist()) if s not in ("main", "capacity")):
        for arm in (arm for arms in tuned(rows, study).values() for arm in arms):
            s, stand = attempt(evaluate.summary, rows, arm), Arm("stand", arm.p)
            if s is None:
                continue
            against = [(stand, {"split": "validation"}), (stand, {}), (stand, {"where": "unsaturated"})]
            against += [(arm._replace(method="stand"), view) for view in ({}, {"where": "unsaturated"})]
            against.append((Arm(arm.method, arm.p), {}))
            ratios = [attempt(evaluate.ratio, rows, arm, base, **options) for base, options in against]
            if arm.method == "stand":
                ratios[3:] = [None, None, None]
            ratios.insert(3, attempt(evaluate.headroom, rows, arm, stand))
            runs = len(pairing.costs(rows, arm))
            numbers = [f"{s['J_median']:.3g}", f"{s['unstable']:.0f} of {s['episodes']}", str(runs)]
            body.append([study, arm.method, arm.variant, str(arm.p), *map(percent, ratios), *numbers])
    return Grid(header, body)


def sizes(rows: pairing.Table) -> Grid:
    """Networks of all sizes against `stand` with the published size, and with that of the main study."""
    header = ["networks", "weighting", "of stand, published size: validation", "test", "unsaturated",
              "of stand, main study: validation", "test", "unsaturated", "unstable", "runs"]  # fmt: skip
    arms, body = [arm for of_p in tuned(rows, "capacity").values() for arm in of_p], []
    for arm in arms:
        published, main = Arm("stand", arm.p, "capacity", PUBLISHED_SIZE), Arm("stand", arm.p)
        views = ({"split": "validation"}, {}, {"where": "unsaturated"})
        ratios = [attempt(evaluate.ratio, rows, arm, base, **view) for base in (published, main) for view in views]
        s = attempt(evaluate.summary, rows, arm)
        if s is not None and any(ratios):
            counts = [f"{s['unstable']:.0f} of {s['episodes']}", str(len(pairing.costs(rows, arm)))]
            body.append([arm.variant, arm.method, *map(percent, ratios), *counts])
    return Grid(header, body)


def labels(content: dict[str, Any]) -> Grid:
    """How many labels, how fast, and how little of them depends on the sample."""
    header = ["label", "model", "samples", "failed", "explained by the mean map", "labels/s and core",
              "rank correlation with ours", "variation by joint"]  # fmt: skip
    body = []
    for model, variants in content.items():
        for variant in order(list(variants)):
            v = variants[variant]
            cv = " ".join(f"{c:.2f}" for c in v.get("cv", []))
            explained, rate = f"{v['explained']:.1%}", _number(v.get("rate"), 0)
            rank = _number(v.get("rank"), 2)
            body.append([variant, model, f"{v['samples']}", f"{v['failed']}", explained, rate, rank, cv])
    return Grid(header, body)


def truth(content: dict[str, Any]) -> Grid:
    """Rank correlations of labels with what they estimate."""
    header = [
        "label",
        "true quantity",
        "overall",
        "steps and joints within a sample",
        "samples within one of them",
        "n",
    ]
    body = [
        [r["variant"], r["quantity"], *(_number(r[k], 2) for k in ("overall", "joints", "samples")), str(r["n"])]
        for r in content.get("rows", [])
    ]
    return Grid(header, body)


def predicts(content: dict[str, Any]) -> Grid:
    """Rank correlation of each loss with the closed-loop cost."""
    found = content.get("predicts", {})
    return Grid(["loss", "rank correlation"], [[name, _number(found[name], 2)] for name in order(list(found))])


def records(content: dict[str, Any]) -> Grid:
    """Benchmark rows, with the columns that they have."""
    header = list(dict.fromkeys(key for row in content.get("rows", []) for key in row))
    return Grid(header, [[_text(row.get(key, "")) for key in header] for row in content.get("rows", [])])


def seconds(content: dict[str, float]) -> Grid:
    """Time by phase."""
    total = sum(content.values())
    return Grid(
        ["phase", "s", "share"], [[k, f"{v:.1f}", f"{v / total:.0%}"] for k, v in content.items()] if total else []
    )


def counts(content: dict[str, Any]) -> Grid:
    """Numbers by name, one level of groups flattened."""
    flat = {}
    for name, value in content.items():
        flat |= {f"{name}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return Grid(["data", "count"], [[name, _text(value)] for name, value in flat.items()])


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """None for what the evaluations do not hold (yet)."""
    try:
        return function(*args, **options)
    except pairing.MissingEpisodes:
        return None


def percent(found: Interval | None) -> str:
    """A ratio in percent and its interval; a dash if there is none."""
    if found is None or np.isnan(found.value):
        return "–"
    value, low, high = map(_short, (found.value, found.low, found.high))
    return value if low == high == value else f"{value} [{low}, {high}]"


def half_width(found: Interval | None) -> str:
    """A ratio in percent and, below, half the width of its interval."""
    if found is None or np.isnan(found.value):
        return "–"
    return f"{_short(found.value)}\n±{_short(0.5 * (found.high - found.low))}"


def _short(share: float) -> str:
    return f"{100 * share:.1f}" if abs(share) < 10.0 else f"{100 * share:.0f}"


def for_terminal(grid: Grid, which: Iterable[int]) -> Table:
    """Chosen columns, the first two of them words."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i in which:
        out.add_column(escape(grid.header[i]), justify="left" if i < 2 else "right", overflow="fold")
    for row in grid.rows:
        out.add_row(*(escape(row[i]) for i in which))
    return out


def as_html(grid: Grid) -> str:
    """One HTML table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in grid.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def as_markdown(grid: Grid) -> list[str]:
    """The lines of a Markdown table."""
    lines = [grid.header, ["---", *["---:"] * (len(grid.header) - 1)], *grid.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
