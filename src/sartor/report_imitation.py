"""What the reports of the imitation experiments show."""

from typing import Any

import numpy as np
from rich.table import Table

from sartor import tables
from sartor.experiments.imitation_lqr import RECOVERED
from sartor.experiments.imitation_systems import system
from sartor.figures import imitation as figures
from sartor.report import Files, Part, Report
from sartor.tables import Grid

_GLOSSARY = Grid(
    ["word", "meaning"],
    [
        ["imitation loss", "mean squared difference of the plan's controls from those of the expert, (N m)² or N²"],
        ["nn", "an LSTM that goes from the initial state to the plan"],
        ["sysid", "the cost is known; dynamics from the expert's transitions, so from its states"],
        ["mpc.dx", "the cost is known; dynamics from its controls alone, through the derivative of the MPC"],
        ["mpc.cost", "the dynamics are known; weights and goal of the cost from its controls alone"],
        ["mpc.cost.dx", "both from its controls alone"],
        ["....gn", "the same by Levenberg and Marquardt's steps on all demonstrations, from several starts, of which "
         "that with the lowest validation loss counts: not published"],
        ["largest error", "of what plans depend on: of the dynamics g/l and m l² of a pendulum, all of a cart-pole; "
         "of the cost its weights relative to each other, those of cos and sin by their difference alone"],
    ],
)  # fmt: skip
_TRUE = {
    "pendulum": {"g/l": 10.0, "m l²": 1.0},
    "cartpole": {"g": 9.8, "m_cart": 1.0, "m_pole": 0.1, "l": 0.5},
}


def _identified(row: dict[str, Any]) -> dict[str, float]:
    """Relative errors of what the plans identify of the dynamics."""
    dx = row["found"]["dx"]
    found = {"g/l": dx["g"] / dx["l"], "m l²": dx["m"] * dx["l"] ** 2} if row["system"] == "pendulum" else dx
    return {name: abs(found[name] / true - 1.0) for name, true in _TRUE[row["system"]].items()}


def _cost_error(row: dict[str, Any]) -> float:
    """Largest error of what the plans identify of the quadratic cost, relative to the largest entry.

    A cost counts up to its scale, which the weight of the control fixes; and as cos² + sin² = 1 their two weights count
    by their difference.
    """
    cos = {"pendulum": 0, "cartpole": 2}[row["system"]]
    true = system(row["system"]).true
    found, expected = (
        _told(np.asarray(w), np.asarray(linear), cos)
        for w, linear in (
            (row["found"]["weights"], row["found"]["linear"]), (true.weights, np.sqrt(true.weights) * true.goal),
        )
    )  # fmt: skip
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def _told(weights: np.ndarray, linear: np.ndarray, cos: int) -> np.ndarray:
    difference = weights[cos] - weights[cos + 1]
    return np.array([difference, *np.delete(weights, [cos, cos + 1]), *linear]) / weights[-1]


def _losses(content: dict[str, Any]) -> Grid:
    """One line for each method and amount of data."""
    header = ["system", "method", "demonstrations", "train", "validation", "test", "test: all seeds",
              "largest error: dynamics", "largest error: cost", "failed solves", "starts", "epochs",
              "time [s]"]  # fmt: skip
    rows, body = content.get("rows", []), []
    for key in dict.fromkeys((r["system"], r["method"], r["size"]) for r in rows):
        mine = [r for r in rows if (r["system"], r["method"], r["size"]) == key]
        median = lambda name, mine=mine: f"{np.median([r[name] for r in mine]):.2e}"
        learns = "dx" in key[1] or key[1] == "sysid"
        worst = max((max(_identified(r).values()) for r in mine), default=np.nan) if learns else np.nan
        body.append([
            key[0], key[1], str(key[2]), median("train"), median("validation"), median("test"),
            " ".join(f"{r['test']:.1e}" for r in mine), f"{worst:.1e}" if np.isfinite(worst) else "–",
            f"{max(_cost_error(r) for r in mine):.1e}" if "mpc.cost" in key[1] else "–",
            str(sum(r["failed"] for r in mine)), " ".join(str(r["starts"]) for r in mine),
            f"{np.median([r['epochs'] for r in mine]):.0f}", f"{np.median([r['time'] for r in mine]):.0f}",
        ])  # fmt: skip
    return Grid(header, body)


def _headline(files: Files) -> Table:
    grid = _losses(files.get("trials.json", {}))
    return tables.for_terminal(grid, (0, 1, 2, 5, 7, 8, 12))


def _lqr(content: dict[str, Any]) -> Grid:
    """One line for each way to learn."""
    header = ["method", "true model found", "models to begin with", "model loss: all", "imitation loss: median",
              "epochs: median", "failed solves", "time [s]: median"]  # fmt: skip
    rows, body = content.get("rows", []), []
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        median = lambda name, mine=mine: np.median([r[name] for r in mine])
        found = sum(r["model"] < RECOVERED for r in mine)
        body.append([
            method, f"{found} of {len(mine)}", str(max(r["starts"] for r in mine)),
            " ".join(f"{r['model']:.0e}" for r in mine), f"{median('imitation'):.1e}", f"{median('epochs'):.0f}",
            str(sum(r["failed"] for r in mine)), f"{median('time'):.0f}",
        ])  # fmt: skip
    return Grid(header, body)


def _unrealisable(content: dict[str, Any]) -> Grid:
    """The two methods, seed by seed, and how often the one is lower, for each expert."""
    header = ["damping", "seed", "imitation: sysid", "imitation: mpc.dx", "mpc.dx / sysid", "transition: sysid",
              "transition: mpc.dx", "failed solves", "time of mpc.dx [s]"]  # fmt: skip
    by = {(r["damping"], r["method"], r["seed"]): r for r in content.get("rows", [])}
    body = []
    for damping in dict.fromkeys(key[0] for key in by):
        seeds = [seed for d, m, seed in by if (d, m) == (damping, "sysid") and (d, "mpc.dx", seed) in by]
        pairs = [(seed, by[damping, "sysid", seed], by[damping, "mpc.dx", seed]) for seed in seeds]
        for seed, a, b in pairs:
            losses = [_late(r, kind) for kind in ("imitation", "transition") for r in (a, b)]
            body.append([
                f"of the {damping}", str(seed), f"{losses[0]:.3e}", f"{losses[1]:.3e}", f"{losses[1] / losses[0]:.2f}",
                f"{losses[2]:.3e}", f"{losses[3]:.3e}", str(a["failed"] + b["failed"]), f"{b['time']:.0f}",
            ])  # fmt: skip
        cells = {}
        for kind in ("imitation", "transition"):
            late = sum(_late(b, kind) < _late(a, kind) for _, a, b in pairs)
            last = sum(b[kind] < a[kind] for _, a, b in pairs)
            cells[kind] = f"mpc.dx lower in {late} of {len(pairs)} (last epoch alone: {last})"
        body.append([f"of the {damping}", "all", "", cells["imitation"], "", "", cells["transition"], "", ""])
    return Grid(header, body)


def _late(row: dict[str, Any], kind: str) -> float:
    """Mean of a loss over the last fifth of the epochs, as RMSprop's constant rate keeps it moving by some per cent."""
    epochs, curve = np.array(row["epoch"]), np.array(row[f"{kind}_curve"])
    return float(curve[epochs > 0.8 * epochs[-1]].mean())


def _costs(content: dict[str, Any]) -> Grid:
    """One line for each case."""
    header = ["varied", "derivative", "iterations", "horizon", "batch", "solve [ms]", "gradient adds [ms]",
              "of the solve", "memory [MiB]", "compile [s]"]  # fmt: skip
    body = []
    for r in content.get("rows", []):
        added = r["both"] - r["solve"]
        memory = f"{r['memory_both'] / 2**20:.2f}" if "memory_both" in r else "–"
        seconds = f"{r['compile_both']:.1f}" if "compile_both" in r else "–"
        body.append([
            r["varied"], r["derivative"], *(str(r[k]) for k in ("iterations", "horizon", "batch")),
            f"{1e3 * r['solve']:.2f}", f"{1e3 * added:.2f}", f"{added / r['solve']:.0%}", memory, seconds,
        ])  # fmt: skip
    return Grid(header, body)


_TIMING = Part("timing", "Where the time went", "timing.json", "Wall-clock time by phase of the run.", tables.seconds)
IMITATION = Report(
    "imitation",
    "Imitation of an MPC: pendulum and cart-pole",
    (
        Part(
            "losses", "Imitation loss", "trials.json",
            "Medians over seeds, at the epoch with the lowest validation loss; failed solves and epochs of the start "
            "that was chosen, time of all. Every mpc method learns from controls "
            "alone; sysid sees the expert's states.",
            _losses, figures.losses,
        ),
        Part(
            "curves", "Learning curves", "trials.json",
            "Of each method the loss that it learns by: for sysid that of transitions, for all others imitation.",
            figure=figures.curves,
        ),
        _TIMING,
    ),
    _GLOSSARY,
    _headline,
)  # fmt: skip
LQR = Report(
    "imitation-lqr",
    "Imitation of a linear-quadratic controller",
    (
        Part(
            "lqr", "Model and imitation loss", "trials.json",
            f"The true model counts as found where the mean squared error of A and B is below {RECOVERED:.0e}. Each "
            "line begins with another random model; of several starts the one with the lowest loss is shown.",
            _lqr, figures.lqr,
        ),
        _TIMING,
    ),
    Grid(
        ["word", "meaning"],
        [
            ["imitation loss", "mean squared difference of controls, plus that of states"],
            ["model loss", "mean squared error of the entries of A and B"],
            ["rmsprop", "RMSprop with rate 1e-2 in mini-batches, as published"],
            ["gauss_newton", "Levenberg and Marquardt's steps on all samples, from the same models"],
            ["starts", "the same from several random models, until one has no loss; the lowest loss counts"],
        ],
    ),
    lambda files: tables.for_terminal(_lqr(files.get("trials.json", {})), (0, 1, 2, 4, 5, 7)),
)  # fmt: skip
UNREALISABLE = Report(
    "unrealisable",
    "An expert that no learner can be",
    (
        Part(
            "unrealisable", "Identification against imitation", "trials.json",
            "On held-out demonstrations of the expert with friction and wind, means over the last fifth of the epochs: "
            "RMSprop's constant rate keeps the losses moving by some per cent. The expert's damping acts on the rate, "
            "as the paper's text says, or on the angle, as in its code.",
            _unrealisable, figures.unrealisable,
        ),
        _TIMING,
    ),
    Grid(
        ["word", "meaning"],
        [
            ["imitation loss", "mean squared difference of the plan's controls from those of the expert [(N m)²]"],
            ["transition loss", "mean squared error of the predicted next state"],
            ["sysid", "learns by the transition loss"],
            ["mpc.dx", "learns by the imitation loss, through the derivative of the MPC"],
        ],
    ),
    lambda files: tables.for_terminal(_unrealisable(files.get("trials.json", {})), tuple(range(7))),
)  # fmt: skip
SOLVER_COST = Report(
    "solver-cost",
    "What a derivative costs",
    (
        Part(
            "solver_cost", "Time and memory", "cases.json",
            "Medians, one core. The implicit derivative takes the solver's own end, where it stops when it has "
            "converged; that through the iterations always takes all of them.",
            _costs, figures.solver_cost,
        ),
        _TIMING,
    ),
    Grid(
        ["word", "meaning"],
        [
            ["implicit", "from the KKT conditions at the solution, by one factorisation"],
            ["unroll", "through exactly so many iterations of the solver"],
            ["mpc.pytorch", "Amos's implementation with analytic Jacobians, its faster mode; no memory is measured"],
            ["gradient adds", "time of solve and gradient together less that of the solve alone"],
            ["memory", "beside inputs and outputs, of solve and gradient together, as the compiler plans it"],
        ],
    ),
    lambda files: tables.for_terminal(_costs(files.get("cases.json", {})), (0, 1, 2, 3, 4, 5, 6)),
)  # fmt: skip
REPORTS = (IMITATION, LQR, UNREALISABLE, SOLVER_COST)
