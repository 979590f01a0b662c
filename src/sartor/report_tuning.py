"""What the report of the tuning experiment shows."""

from typing import Any

import numpy as np

from sartor import tables
from sartor.experiments.quadcopter_models import IDENTIFICATION_ROLLOUTS
from sartor.figures import tuning as figures
from sartor.figures.tuning import lowest
from sartor.report import Part, Report
from sartor.tables import Grid


def _summary(content: dict[str, Any]) -> Grid:
    """One line for each level and method."""
    header = ["mismatch", "method", "seeds", "lowest merit: mean", "sd", "above the cheapest trajectory [%]",
              "above exact [%]", "violation there: worst", "last merit: median", "last violation: worst",
              "rollouts to the hybrid's lowest", "seeds that diverge", "refused", "s a rollout"]  # fmt: skip
    rows, body = [r for r in content.get("rows", []) if r["data"] == 0], []
    if not rows:
        return Grid(header, body)
    optimum = content["optimum"]["cost"]
    for level, method in dict.fromkeys((r["level"], r["method"]) for r in rows):
        of = lambda name, level=level: [r for r in rows if (r["level"], r["method"]) == (level, name)]
        mine, exact, hybrid = of(method), of("gauss_newton.exact"), of("hybrid.25")
        best = np.array([lowest(r)[-1] for r in mine])
        last = [_last(r) for r in mine]
        goal = np.median([lowest(r)[-1] for r in hybrid]) if hybrid else np.nan
        reached = [_first(r, goal) for r in mine]
        found = [n for n in reached if n is not None]
        times = f"{np.median(found) + IDENTIFICATION_ROLLOUTS:.0f} ({len(found)} of {len(mine)})" if found else "never"
        bound = np.mean([lowest(r)[-1] for r in exact]) if exact else np.nan
        body.append([
            level, method, str(len(mine)), f"{best.mean():.1f}", f"{best.std(ddof=1):.1f}" if len(best) > 1 else "–",
            f"{100 * (best.mean() / optimum - 1):.2f}", f"{100 * (best.mean() / bound - 1):+.2f}",
            f"{max(_violation(r) for r in mine):.1g}",
            f"{np.median([m for m, _ in last]):.4g}", f"{max(v for _, v in last):.2g}", times,
            str(sum(_diverges(r) for r in mine)), f"{sum(len(r['taken']) - sum(r['taken']) for r in mine)}",
            f"{np.median([r['time'] / r['rollouts'][-1] for r in mine]):.2f}",
        ])  # fmt: skip
    return Grid(header, body)


def _other_data(content: dict[str, Any]) -> Grid:
    """The chief methods on models from other data."""
    header = ["mismatch", "method", "models", "lowest merit: mean", "sd", "worst", "above the cheapest trajectory [%]",
              "seeds that diverge"]  # fmt: skip
    rows, body = [r for r in content.get("rows", []) if r["data"] > 0], []
    for level, method in dict.fromkeys((r["level"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["level"], r["method"]) == (level, method)]
        best = np.array([lowest(r)[-1] for r in mine])
        body.append([
            level, method, str(len(mine)), f"{best.mean():.1f}", f"{best.std(ddof=1):.1f}" if len(best) > 1 else "–",
            f"{best.max():.1f}", f"{100 * (best.mean() / content['optimum']['cost'] - 1):.2f}",
            str(sum(_diverges(r) for r in mine)),
        ])  # fmt: skip
    return Grid(header, body)


def _violation(row: dict[str, Any]) -> float:
    """Where the merit is lowest."""
    return row["violation"][int(lowest(row).argmin())]


def _last(row: dict[str, Any]) -> tuple[float, float]:
    """Merit and violation of the candidate that was taken last."""
    k = int(np.flatnonzero(row["taken"])[-1])
    return (np.inf if row["merit"][k] is None else row["merit"][k]), row["violation"][k] or 0.0


def _first(row: dict[str, Any], goal: float) -> int | None:
    """Rollouts until the merit is as low as `goal`."""
    there = np.flatnonzero(lowest(row) <= goal)
    return row["rollouts"][there[0]] if there.size else None


def _diverges(row: dict[str, Any]) -> bool:
    """Whether the θ that is taken last is far worse than the one to begin with."""
    return _last(row)[0] > 3.0 * row["merit"][0]


REPORT = Report(
    "quadcopter-tuning",
    "Tuning a quadcopter's MPC on a plant that its model gets wrong",
    (
        Part(
            "summary", "What each way reaches, and for how many rollouts", "trials.json",
            f"Merit: C + 1e4 times the sum of violations. Rollouts count {IDENTIFICATION_ROLLOUTS} for the data of the "
            "model. Methods without random directions run once.",
            _summary, figures.merits,
        ),
        Part(
            "candidates", "Every candidate", "trials.json",
            "Merit of each candidate with seed 0, taken or refused (the paper's Fig. 2).", figure=figures.candidates,
        ),
        Part(
            "others", "Models from other data", "trials.json",
            "The same on models identified from other data of the same kind, once each.", _other_data,
        ),
        Part("timing", "Where the time went", "timing.json", "Wall-clock time by phase of the run.", tables.seconds),
    ),
    Grid(
        ["word", "meaning"],
        [
            ["rollout", "one run of the plant: 200 control steps, 20 s"],
            ["merit", "what is minimised: closed-loop cost C + 1e4 Σ max(h, 0)"],
            ["model, zeroth, hybrid", "as published: model-based gradient, slope along a random direction, a mixture"],
            ["alpha, inverse_variance, control_variate", "other mixtures, published steps; the last is unbiased"],
            ["....monotone", "steps that do not lower the measured merit are refused"],
            ["....scaled", "monotone, and parameters in units of their size"],
            ["reidentified", "the MPC's model is fitted to all rollouts so far, and the gradient is that model's"],
            ["gauss_newton", "steps of Gauss and Newton on the model, limits by an exact penalty, monotone"],
            ["gauss_newton.constant", "its Jacobians corrected by constants: ridge regression on the rollouts so far"],
            ["gauss_newton.corrected", "the same, by corrections that change along the way: ours"],
            ["....unkicked", "ours without steps at random"],
            ["....exact", "with the Jacobians of the plant, which nobody has: a bound"],
            ["cma_es", "evolution strategy, without derivatives"],
            ["diverges", "the parameters taken last are three times worse than those to begin with"],
        ],
    ),
    lambda files: tables.for_terminal(_summary(files.get("trials.json", {})), (0, 1, 3, 4, 5, 7, 10)),
)  # fmt: skip
