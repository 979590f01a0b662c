"""What the report of the racing car shows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from sartor import tables
from sartor.experiments.f1tenth_world import PENALTY
from sartor.figures import racing as figures
from sartor.figures.races import ALONE, Races, sweep
from sartor.figures.style import order
from sartor.pairing import Arm
from sartor.racing_labels import PHASES
from sartor.report import Files, Part, Report
from sartor.systems.racing_car import DT, STATES
from sartor.tables import Grid

_FEW = 5  # seeds below which an interval is too narrow
_RACED = ["worst track [%]", "J [s]", "first lap [s]", "contact [s]", "contacts", "failed solves", "drives"]
_GLOSSARY = Grid(
    ["word", "meaning"],
    [
        ["J", f"seconds for the length of a lap at the mean speed of the drive, and {PENALTY:g} s for every second of "
         "contact with a wall on that length; infinite for a car that never moved"],
        ["units", "hidden units of the network that corrects the model with linear tyres"],
        ["p", "control steps that the model predicts ahead in the training loss"],
        ["ones, stand, norm", "errors count alike; over their standard deviation; over their range"],
        ["ours", "errors count as the sensitivities of the MPC say: S = |Σ |dJ/du| · du/de| at each sample"],
        ["ours_trajectory", "the same for errors of the predicted trajectory, as a rollout has them, instead of errors "
         "of the dynamics"],
        ["ours_avg, ours_shuffled", "the mean of these labels over all samples; those of another sample"],
        ["regret, regret_avg", "Λ^½ du/de, with Λ the Hessian of the MPC's cost in its first control: a matrix weight; "
         "the diagonal of its mean over all samples, each error by itself"],
        ["pretrained", "the network before fine-tuning"],
        ["teacher", "a large network, trained on the same drives under stand; its MPC has given the labels"],
        ["linear, kinematic, published", "no network: linear tyres; wheels that do not slip; the published tyres, "
         "which are not those of the plant"],
        ["oracle", "the tyres of the plant, without what else it has: lag of loads, patches of friction, delay"],
        ["a drive", f"so many control steps of {DT} s on a held-out track, from a rolling start"],
        ["usual error", "of a state: root mean square error of the prediction of one control step"],
        ["weight", "S times the usual error, by state and time ahead; its square is the energy of a label"],
        ["straight, entry, apex, exit", "by the curvature of the centreline: below 0.3 1/m; rising; within 0.3 m of "
         "its largest size; falling"],
        ["explained", "share of the energy of the labels that does not depend on the sample, or on the phase alone"],
        ["effective samples", "share of the samples that a loss with these weights is made of (Kish): 100 if all count "
         "alike"],
    ],
)  # fmt: skip


def _summary(content: Mapping[str, Any]) -> Grid:
    """One line for each model that is raced once, and for each size and method."""
    races, body = Races.of(content), []
    p, middle = races.main, races.arm("stand", races.middle, races.main)
    for method in (name for name in ALONE if races.of_arm(Arm(name))):
        body.append([method, "–", *_line(races, Arm(method), middle)])
    for size in sorted(races.sizes):
        for method in races.methods(size, p):
            body.append([method, str(size), *_line(races, races.arm(method, size, p), races.arm("stand", size, p))])
    return Grid(["method", "units", "J [% of stand]", *_RACED], body)


def _rollouts(content: Mapping[str, Any]) -> Grid:
    """The middle size with each p, against `stand` with that p and with the first."""
    races, body = Races.of(content), []
    first = races.arm("stand", races.middle, races.main)
    for p in sorted(races.rollouts):
        for arm in (races.arm(method, races.middle, p) for method in races.methods(races.middle, p)):
            if arm.p:
                cells = _line(races, arm, races.arm("stand", races.middle, p))
                body.append([arm.method, str(p), cells[0], tables.percent(races.ratio(arm, first)), *cells[1:]])
    first_p = f"of stand, p = {races.main} [%]"
    return Grid(["method", "p", "J [% of stand, same p]", first_p, *_RACED], body)


def _line(races: Races, arm: Arm, base: Arm) -> list[str]:
    """Ratio, worst track, and means of a drive."""
    rows, by_track = races.of_arm(arm), races.by_track(arm, base)
    mean = lambda name: float(np.mean([r[name] for r in rows]))
    laps = [r["lap"] for r in rows if r["lap"] is not None]
    fewer = f" ({len(laps)} of {len(rows)})" if 0 < len(laps) < len(rows) else ""
    worst = max(by_track, key=lambda track: by_track[track], default=None) if arm != base else None
    return [
        tables.percent(races.ratio(arm, base)),
        "–" if worst is None else f"{_number(100 * by_track[worst], 1)} ({worst})",
        _number(races.level(arm), 2), f"{np.mean(laps):.2f}{fewer}" if laps else "–",
        f"{mean('contact'):.2f}", f"{mean('contacts'):.1f}", f"{mean('failed'):.1f}", str(len(rows)),
    ]  # fmt: skip


def _smallest(content: Mapping[str, Any]) -> Grid:
    """The smallest network of each method with a J no higher than the largest of `stand`, and all sizes beside it."""
    races = Races.of(content)
    sizes, p = sorted(races.sizes), races.main
    largest = races.arm("stand", sizes[-1] if sizes else 0, p)
    body = []
    for method in order([method for size in sizes for method in races.methods(size, p)]):
        found = {size: races.ratio(races.arm(method, size, p), largest) for size in sizes}
        enough = [size for size, ratio in found.items() if ratio is not None and ratio.value <= 1.0]
        if any(found.values()):
            body.append([method, str(enough[0]) if enough else "none", *map(tables.percent, found.values())])
    return Grid(["method", "smallest [units]", *(f"{size} units [%]" for size in sizes)], body)


def _tracks(content: Mapping[str, Any]) -> Grid:
    """J of `stand` in seconds, and of the others in percent of it, on each track."""
    races = Races.of(content)
    size, p = races.middle, races.main
    stand = races.arm("stand", size, p)
    methods = [m for m in (*ALONE, *races.methods(size, p)) if m != "stand"]
    found = {m: races.by_track(races.arm(m, size, p), stand) for m in methods}
    found = {m: ratios for m, ratios in found.items() if ratios}
    body = [
        [str(track), f"{seconds:.2f}", *(_number(100 * ratios.get(track, np.nan), 1) for ratios in found.values())]
        for track, seconds in sorted(races.by_track(stand).items())
    ]
    return Grid(["held-out track", "stand [s]", *(f"{m} [%]" for m in found)], body)


def _phases(content: Mapping[str, Any]) -> Grid:
    """Shares of the states in each phase, mean over tracks; only states with at least 1 % anywhere."""
    rows = [r for r in content.get("rows", []) if r["samples"]]
    models = dict.fromkeys(r["model"] for r in rows)
    found = {}
    for model, phase in ((model, phase) for model in models for phase in PHASES):
        mine = [r for r in rows if (r["model"], r["phase"]) == (model, phase)]
        if mine:
            found[model, phase] = sum(r["samples"] for r in mine), np.mean([r["shares"] for r in mine], 0)
    largest = np.max([shares for _, shares in found.values()], 0) if found else np.zeros(0)
    shown = np.flatnonzero(largest >= 0.01)
    body = [[*key, str(n), *(f"{100 * shares[i]:.1f}" for i in shown)] for key, (n, shares) in found.items()]
    names = [name.split(" [")[0] for name in content.get("states", STATES)]
    return Grid(["model", "phase", "samples", *(f"{names[i]} [%]" for i in shown)], body)


def _explained(content: Mapping[str, Any]) -> Grid:
    """How little of the labels depends on the sample, mean over tracks."""
    rows, body = content.get("explained", []), []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        total = lambda name, mine=mine: str(sum(r[name] for r in mine))
        mean = lambda name, mine=mine: float(np.mean([r[name] for r in mine]))
        shares = [_number(100 * mean(name), 1) for name in ("mean", "phase", "effective")]
        fixed = [_number(100 * value, 0) for value in np.mean([r["fixed"] for r in mine], 0)]
        rate = _number(mean("rate"), 0)
        body.append([model, str(len(mine)), total("labels"), total("failed"), *shares, *fixed, rate])
    header = ["model", "tracks", "labels", "failed", "by the mean map [%]", "by that of each phase [%]",
              "effective samples [%]", "wheel speed at a bound [%]", "steering at a bound [%]",
              "labels/s, with compiling"]  # fmt: skip
    return Grid(header, body)


def _truth(content: Mapping[str, Any]) -> Grid:
    """Rank correlations of labels with what branching shows."""
    kinds = ("overall", "steps", "samples")
    body = [
        [r["variant"], r["quantity"], *(_number(r[kind], 2) for kind in kinds), str(r["n"])]
        for r in content.get("rows", [])
    ]
    header = ["label", "true quantity", "overall", "steps and states within a sample", "samples within one of them"]
    return Grid([*header, "n"], body)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _headline(files: Files) -> Table:
    out = tables.for_terminal(_summary(files.get("trials.json", {})), (0, 1, 2, 3, 4, 6))
    out.caption, out.caption_justify = _footnote(files), "left"
    return out


def _footnote(files: Files) -> str:
    """What the numbers are means over."""
    races = Races.of(files.get("trials.json", {}))
    if not races.rows:
        return "No races yet: trials.json is missing."
    seeds, tracks = (len({r[name] for r in races.rows}) for name in ("seed", "test"))
    counts = f"{seeds} seed{'s' * (seeds != 1)} and {tracks} held-out track{'s' * (tracks != 1)}"
    few = " With so few the intervals are too narrow." if min(seeds, tracks) < _FEW else ""
    base = f" Models without a size are compared with stand of {races.middle} units." if races.middle else ""
    same = " All seeds have the same drives and labels."
    return f"Intervals: 95 %, over {counts}.{few}{same}{base}"


REPORT = Report(
    "f1tenth",
    "Racing a car whose model gets the tyres wrong",
    (
        Part(
            "summary", "Races on held-out tracks", "trials.json",
            "J of the same seeds and tracks in percent of stand of the same size at the first p: geometric mean, with "
            "a 95 % bootstrap interval over seeds and tracks; an interval that contains 100 shows no difference. "
            "Models without a size are compared with stand of the middle one. Worst track: the largest geometric "
            "mean over seeds, and the number of that track. Laps, contact, contacts and failed solves are means of a "
            "drive; a lap from a rolling start, where there was one.",
            _summary, sweep,
        ),
        Part(
            "smallest", "The smallest network that will do", "trials.json",
            "J in percent of the largest network under stand, and the smallest network with at most 100.",
            _smallest,
        ),
        Part(
            "tracks", "Track by track", "trials.json",
            "The middle size at the first p: J in percent of stand, geometric mean over seeds.", _tracks,
        ),
        Part(
            "rollouts", "Length of the rollouts in the loss", "trials.json",
            "The middle size with each p, against stand with the same p and with the first. Samples that are clear of "
            "walls for longer rollouts are fewer.", _rollouts,
        ),
        Part(
            "maps", "What matters where", "maps.npz",
            "A lap of the MPC with the published tyres on a held-out track (the paper's Fig. 3). Of each phase the "
            "moment with the median energy; below, the weight of an error of each state over the horizon. One scale "
            "for all: a step of the colour is a factor, and the lightest is a thousandth of the darkest, or less.",
            figure=figures.maps,
        ),
        Part(
            "lap", "What matters along a lap", "maps.npz",
            "The share of each state in the energy of the label, summed over the horizon, and above it how large that "
            "energy is: its root. Thin lines part the phases; gaps have no label.",
            figure=figures.lap,
        ),
        Part(
            "phases", "What matters in each phase", "phases.json",
            "Share of each state in the energy of a label, mean over the labels of a phase and over tracks; states "
            "below 1 % everywhere are left out.",
            _phases,
        ),
        Part(
            "explained", "How much depends on the sample", "phases.json",
            "Share of the energy of the labels, clipped as in training, that their mean over all samples explains, and "
            "their mean in each phase. What is left changes from sample to sample. With few effective samples, "
            "training by the labels is training on few of the data.",
            _explained,
        ),
        Part(
            "truth", "Truth check", "truth.json",
            "Rank correlation of labels with what they estimate, measured by branching the plant: one control is moved "
            "for one step, and the closed loop of the published tyres drives on. Estimate and truth of S share the "
            "sensitivity of the control to errors; what is put to the test is the slope of the cost, the first row.",
            _truth,
        ),
        Part("timing", "Where the time went", "timing.json", "Wall-clock time by phase of the run.", tables.seconds),
    ),
    _GLOSSARY,
    _headline,
    _footnote,
    "One lap on a held-out track in real time: left the car and the plan of its MPC, right the weight of an error of "
    "each state over that plan.",
)  # fmt: skip
