"""What the report of a Panda run shows, in order, and what its words mean."""

from rich import box
from rich.table import Table

from sartor import evaluate, pairing, tables
from sartor.figures import costs, signals
from sartor.pairing import BASELINES
from sartor.report import Files, Part, Report

_GLOSSARY = tables.Grid(
    ["word", "meaning"],
    [
        ["J", "tracking cost of an episode, eq. (7) of the paper: weighted squared errors of positions and speeds"],
        ["p", "steps that the model predicts ahead in the training loss"],
        ["ones, stand, norm, mpc_cost", "errors count alike; over their standard deviation; over their range; as in "
         "the cost of the MPC"],
        ["ours", "errors count as sensitivities say: |Σ dJ/du · du/de| of the MPC at each sample, eqs. (3) to (6)"],
        ["ours_avg, ours_shuffled", "the mean of these labels over all samples; those of another sample"],
        ["regret", "Λ^½ du/de, with Λ the Hessian of the MPC's cost in its first control: a matrix weight"],
        ["closed_loop", "as ours, with the gradient of the recorded closed-loop cost for dJ/du"],
        ["..._env", "each sample also over the error of its environment (payload) before training"],
        ["nominal, pretrained", "the MPC with the robot as its maker describes it; with the model before fine-tuning"],
        ["oracle, oracle_damping", "the MPC with the true payload; with the true payload and joint damping"],
        ["anchor", "weight of an inverse-dynamics loss beside the weighted one: an anchor of 3 leaves the weighting a "
         "quarter of the loss at the beginning, see docs/panda.md"],
        ["q, qd, e.e.", "root mean square error of joint positions and speeds, and of the end effector's position"],
        ["explained by the mean map", "share of the labels' energy that does not depend on the sample"],
    ],
)  # fmt: skip


_PARTS = (
    Part(
        "bars",
        "Closed-loop cost by weighting",
        "evaluations.parquet",
        "Cost of eq. (7) in percent of stand, last epoch: geometric mean over pairs of the same run and environment, "
        "with 95 % bootstrap intervals over pretrained models, their seeds, and environments. An interval that "
        "contains 100 shows no difference. Head-room: the share of the way from stand to the controller that knows "
        "payload and damping. Velocities in J: median share of the velocity errors in the cost; much more than that of "
        "oracle_damping points to a limit cycle.",
        tables.headline,
        costs.bars,
    ),
    Part(
        "environments",
        "Environment by environment",
        "evaluations.parquet",
        "The same ratios in each held-out environment: red costs more than stand, blue less.",
        figure=costs.environments,
    ),
    Part(
        "protocols",
        "Three ways to choose the epoch",
        "evaluations.parquet",
        "Last epoch: nothing is selected. Best on validation: selected on other payloads. Top five: selected on the "
        "test metric itself, as the paper's top five are, and therefore optimistic; one choice of five epochs for all "
        "runs of a weighting. Beside them the paper's ratios of eq. (7). A dash: only the last epoch was tested.",
        tables.protocols,
        costs.protocols,
    ),
    Part(
        "traces",
        "Tracking errors",
        "traces.npz",
        "One held-out environment, the same reference for all.",
        figure=signals.traces,
        large=True,
    ),
    Part(
        "spectrum",
        "Spectrum of the velocity error",
        "spectrum.npz",
        "A peak is a limit cycle of controller, context and arm rather than a tracking error.",
        figure=signals.spectrum,
        large=True,
    ),
    Part(
        "cost_map",
        "Cost map",
        "maps.npz",
        "Mean label over the samples: how much a prediction error in a state matters, step by step.",
        figure=signals.cost_map,
    ),
    Part(
        "labels",
        "Labels",
        "labels.json",
        "If the mean map explains nearly all of a label's energy, its weights hardly depend on the sample.",
        tables.labels,
    ),
    Part(
        "truth",
        "Truth check",
        "truth.json",
        "Rank correlation of labels with what they estimate, measured by branching the simulated closed loop.",
        tables.truth,
        signals.truth,
    ),
    Part(
        "predicts",
        "Which loss predicts the closed loop",
        "truth.json",
        "Rank correlation, over checkpoints, of each loss on held-out data with the closed-loop cost.",
        tables.predicts,
        signals.predicts,
    ),
    Part(
        "capacity",
        "Size of the network",
        "evaluations.parquet",
        "Inertia and potential networks, and the encoder where it is not one LSTM of 24. Published are [30, 20] with "
        "five LSTMs of 10; the main study has [30, 20] with one of 24. Two runs are too few for an interval over "
        "trainings: read it as one over payloads.",
        tables.sizes,
        costs.capacity,
    ),
    Part(
        "studies",
        "Rounds, data, ablations",
        "evaluations.parquet",
        "Each in percent of stand of the main study at the same p on the same runs; beside it, of stand with the same "
        "variant, and of the same weighting in the main study. What is chosen is chosen on the validation payloads. "
        "Two runs are too few for an interval that counts trainings: read it as one over payloads.",
        tables.studies,
        costs.studies,
    ),
    Part(
        "curves",
        "Training curves",
        "curves.parquet",
        "Each method's validation loss under its own weighting; levels of different methods do not compare.",
        figure=signals.curves,
    ),
    Part(
        "speed",
        "Sizes and control steps",
        "speed.json",
        "Median time of a control step of one robot, Python included, on one core of the machine named above.",
        tables.records,
    ),
    Part("timing", "Where the time went", "timing.json", "Wall-clock time by phase of the run.", tables.seconds),
    Part("data", "Data", "data.json", "What was collected, and what was left out because it diverged.", tables.counts),
)


def _table(files: Files) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    out.caption, out.caption_justify = f"±: half of the 95 % interval. {_footnote(files)}", "left"
    out.add_column("\nweighting", overflow="fold", min_width=max(map(len, BASELINES)))
    for name in (
        "cost, %\nof stand", "unsatu-\nrated", "satu-\nrated", "J mean\nmedian", "q mrad\nqd rad/s",
        "e.e. mm\nat limit", "unstable\nfailed",
    ):  # fmt: skip
        out.add_column(name, justify="right", overflow="fold")
    for row in tables.rows_of(files["evaluations.parquet"]) if "evaluations.parquet" in files else ():
        s, baseline = row.summary, row.arm.method in BASELINES
        out.add_row(
            row.arm.method if baseline else f"[bold]{row.arm.method}[/bold]\n[dim]{row.arm.variant or _p(row)}[/dim]",
            *map(tables.half_width, row.ratios),
            f"{s['J']:.4g}\n{s['J_median']:.3g}",
            f"{1e3 * s['q_rmse']:.1f}\n{s['qd_rmse']:.3f}",
            f"{1e3 * s['ee_rmse']:.1f}\n{s['saturated']:.1%}",
            f"{s['unstable']:.0f}/{s['episodes']}\n{s['failed']:.0f}",
            style="dim" if baseline else None,
        )
    return out


def _footnote(files: Files) -> str:
    """What the intervals can tell apart, and the rules by which episodes are counted."""
    rules = (
        f"Saturated environments: the controller that knows payload and damping reaches a torque limit in at least "
        f"{pairing.SATURATED_SHARE:.0%} of its steps. "
        f"Unstable: mean speed error above {evaluate.UNSTABLE_SPEED} rad/s, or more than {evaluate.UNSTABLE_RATIO:g} "
        f"times the cost of the pretrained model."
    )
    anchor = files["config.json"].get("anchor")
    if anchor:
        rules += f" Of the loss, the weighted part is {1 / (1 + anchor):.0%} at the beginning (anchor {anchor:g})."
    rows = files.get("evaluations.parquet")
    if rows is None:
        return "No evaluations yet: evaluations.parquet is missing."
    arms = [arm for of_p in costs.tuned(rows).values() for arm in of_p if arm.method != "stand"]
    found = {arm: tables.attempt(evaluate.ratio, rows, arm) for arm in arms}
    ratios = {arm: r for arm, r in found.items() if r is not None}
    if not ratios:
        return rules
    detectable = sorted((evaluate.minimum_detectable(r), str(arm)) for arm, r in ratios.items())
    ends = " to ".join(f"{share:.1%} ({arm})" for share, arm in dict.fromkeys((detectable[0], detectable[-1])))
    trained = {(m, s) for m, s in zip(rows["model"].tolist(), rows["seed"].tolist(), strict=True) if s >= 0}
    runs, models = len(trained), len({m for m, _ in trained})
    few = f" With {models} pretrained model{'s' if models != 1 else ''} the intervals are too narrow."
    few = few if models < 5 else ""
    dropped = sum(r.dropped for r in ratios.values())
    without = f" {dropped} episodes without partner are left out." if dropped else ""
    counted = f"{runs} training{'s' if runs != 1 else ''}; effects below {ends} cannot be told from none."
    return f"{counted}{few}{without} {rules}"


def _p(row: tables.Row) -> str:
    return f"p = {row.arm.p}"


REPORT = Report(
    "panda",
    "Panda: models tailored to tracking",
    _PARTS,
    _GLOSSARY,
    _table,
    _footnote,
    clip="The pretrained beside the tailored model, in the same environment.",
)
