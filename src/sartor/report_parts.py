"""What the report of a Panda run shows, in order, and what its words mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sartor import tables
from sartor.figures import costs, signals


class Part(NamedTuple):
    """A section of the report: a table, a figure, or both, from one file."""

    name: str
    title: str
    source: str
    text: str
    grid: Callable[[Any], tables.Grid] | None = None
    figure: Callable[[Any], Any] | None = None


GLOSSARY = tables.Grid(
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


PARTS = (
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
    ),
    Part(
        "spectrum",
        "Spectrum of the velocity error",
        "spectrum.npz",
        "A peak is a limit cycle of controller, context and arm rather than a tracking error.",
        figure=signals.spectrum,
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
        "Cost of smaller and larger networks in percent of stand with the networks of the main study.",
        figure=costs.capacity,
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
"""The sections of the report, in order."""
