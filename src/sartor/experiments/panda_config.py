"""Settings of the Panda experiment and its presets."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from sartor.experiments.presets import check_least
from sartor.systems import panda
from sartor.weights import States

Study = Literal["ablation", "alone", "capacity", "recipe", "recipe_quick", "rounds"]
Weighting = Literal[
    "ones", "stand", "norm", "mpc_cost", "ours", "ours_avg", "ours_shuffled", "stand_env", "regret", "regret_env",
    "closed_loop", "closed_loop_env",
]  # fmt: skip
NEEDS_LABELS = ("ours", "ours_avg", "ours_shuffled", "regret", "regret_env", "closed_loop", "closed_loop_env")
FIRST_MOMENT = 15
"""Control step of the first moment of the truth check: by then the context knows the payload."""
WINDOW = 40
"""Control steps of the closed loop that count for one torque: its effect has died out by then."""

_SMOKE: dict[str, Any] = dict(
    models=1, seeds=1, weightings=("stand", "ours"), rollouts=(2,), steps=40, pretrain_payloads=4,
    pretrain_references=1, pretrain_epochs=2, finetune_payloads=2, kept=2, label_stride=8, epochs=1, batch=32, tests=2,
    curvature="gauss_newton", anchor=10.0, learning_rate=1e-3, workers=0,
)  # fmt: skip
_QUICK: dict[str, Any] = dict(
    models=1, seeds=1, weightings=("stand", "ours", "stand_env", "regret_env"), rollouts=(4,), steps=500,
    pretrain_payloads=60, pretrain_references=2, pretrain_epochs=30, finetune_payloads=30, kept=30, label_stride=5,
    epochs=8, batch=256, learning_rate=3e-3, tests=20, curvature="gauss_newton", anchor=10.0,
    studies=("recipe_quick",),
)  # fmt: skip
_PUBLISHED: tuple[Weighting, ...] = ("ones", "stand", "norm", "mpc_cost", "ours", "ours_avg")
_PAPER: dict[str, Any] = dict(
    models=2, seeds=5,
    weightings=(*_PUBLISHED, "ours_shuffled", "stand_env", "regret", "regret_env", "closed_loop"),
    others=(*_PUBLISHED, "ours_shuffled"),
    rollouts=(4, 1, 12), steps=500, pretrain_payloads=100, pretrain_references=2, pretrain_epochs=40,
    finetune_payloads=60, kept=30, label_stride=5, epochs=8, batch=256, learning_rate=1e-3, tests=20,
    curvature="exact", anchor=3.0,
    studies=("rounds", "recipe", "alone", "capacity", "ablation"), validation=10, protocols=("stand", "ours"), truth=4,
)  # fmt: skip
_DEFAULT: dict[str, Any] = dict(others=(), studies=(), study_seeds=1, validation=0, protocols=(), truth=0, workers=2)
_PRESETS = {"smoke": _DEFAULT | _SMOKE, "quick": _DEFAULT | _QUICK, "paper": _DEFAULT | _PAPER}
_CAN_BE_NOTHING = {*_DEFAULT, "anchor"}  # 0 and () are values of these


@dataclass(frozen=True)
class Config:
    """The Panda experiment. Numbers that are 0, what is empty and what is none come from the preset."""

    experiment: Annotated[Literal["panda"], tyro.conf.Suppress] = "panda"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes six to ten minutes, `paper` some nine hours."""
    models: int = 0
    """Pretrained models, each from another seed."""
    seeds: int = 0
    """Fine-tuning runs of each weighting and pretrained model."""
    weightings: tuple[Weighting, ...] = ()
    """Loss weights to compare; `stand` is what the others are compared with."""
    others: tuple[Weighting, ...] | None = None
    """Those of them that are compared at other p than the first; all if it is empty."""
    rollouts: tuple[int, ...] = ()
    """Lengths p of the rollouts in the loss."""
    steps: int = 0
    """Control steps of an episode; 500 are 10 s."""
    pretrain_payloads: int = 0
    """Payloads of the data for pretraining."""
    pretrain_references: int = 0
    """References for each of them."""
    pretrain_epochs: int = 0
    """Passes over those data."""
    pretrain_stride: int = 2
    """Every so many samples of them are used."""
    anchor: float | None = None
    """Weight of the inverse-dynamics loss in fine-tuning; 0 for rollouts alone, as published; none: from the preset."""
    frozen: tuple[Literal["encoder", "inertia", "potential"], ...] = ()
    """Parts of the model that fine-tuning leaves as they are."""
    pretrain_noise: float = 0.3
    """Noise on the histories in pretraining, in units of the published one."""
    pretrain_batch: int = 256
    """Samples of a gradient step in pretraining."""
    pretrain_rate: float = 3e-3
    """Learning rate of pretraining."""
    finetune_payloads: int = 0
    """Payloads of the closed-loop data for fine-tuning."""
    label_stride: int = 0
    """Every so many samples of them are labelled and used."""
    curvature: Literal["", "exact", "gauss_newton"] = ""
    """Hessian behind the labels."""
    error: Literal["defect", "trajectory"] = "defect"
    """What a prediction error is: one that propagates, or one of a single stage."""
    combine: Literal["signed", "absolute"] = "signed"
    """How joints are combined in a label: |Σ ...|, or Σ |...|."""
    sensitivity: Literal["curvature", "resolve"] = "curvature"
    """How dJ/du_0 is found: from the Hessian in the first control, or by solving with it fixed on either side."""
    eps: Literal["equal", "limits"] = "equal"
    """How far the first control is moved for that: 0.1 Nm for each joint, or 1 % of its limit."""
    tau: float = 0.0
    """Barrier of the torque limits in the labels; 0 for none."""
    states: States = "q"
    """States that count in the loss."""
    share: float = 0.0
    """Share of the uniform loss that is mixed into each weighting."""
    kept: int = 0
    """Runs of the data for pretraining that stay in the mix, since they excite what good tracking leaves at rest; -1
    for none."""
    dither: float = 0.0
    """Standard deviation of torque noise while fine-tuning data are collected, as a share of the torque limits."""
    rounds: int = 1
    """Rounds of collecting, labelling and fine-tuning; old data are kept."""
    epochs: int = 0
    """Passes over the data in fine-tuning."""
    batch: int = 0
    """Samples of a gradient step in fine-tuning."""
    learning_rate: float = 0.0
    """Learning rate of fine-tuning, the same for all weightings."""
    tests: int = 0
    """Held-out payloads, one reference each."""
    validation: int | None = None
    """Further payloads, to choose by."""
    protocols: tuple[Weighting, ...] | None = None
    """Weightings whose models of every epoch are tested, to compare ways of choosing one."""
    studies: tuple[Study, ...] | None = None
    """What else is varied, at the first of `rollouts`."""
    study_seeds: int | None = None
    """Fine-tuning runs of each variant and pretrained model; of `alone` and `recipe` as many as of the main study."""
    truth: int | None = None
    """Moments of each test episode at which labels are checked by branching the closed loop; 0 for no check."""
    damping: float = 0.0
    """Joint damping that the model knows [N m s/rad]; that of the plant is 1."""
    widths: tuple[int, ...] = (30, 20)
    """Layers of the residual's networks."""
    num_contexts: int = 10
    """Size of the context."""
    hidden: int = 24
    """Size of the encoder's LSTMs."""
    num_layers: int = 1
    """Number of LSTMs. One of 24 has no more parameters than the published five of 10, and learns far more in the same
    time."""
    workers: int | None = None
    """Processes, one for each core; 0: do all in this one, so that nothing is compiled twice; none: from the preset."""

    def __post_init__(self):
        check_least(
            self, 0, "models", "seeds", "steps", "pretrain_payloads", "pretrain_references", "pretrain_epochs",
            "anchor", "finetune_payloads", "label_stride", "epochs", "batch", "tests", "validation", "study_seeds",
            "truth", "workers", "dither", "share", "tau", "damping",
        )  # fmt: skip
        check_least(
            self, 1, "rounds", "widths", "num_contexts", "hidden", "num_layers", "pretrain_stride", "pretrain_batch"
        )
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must lie between 0 and 1, not {self.share}.")
        for name, least in (("learning_rate", 0.0), ("pretrain_rate", 1e-9)):  # 0 stands for the preset's
            if not least <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if any(not 1 <= p <= panda.HORIZON for p in self.rollouts):
            raise ValueError(f"rollouts must lie in 1..{panda.HORIZON}, the horizon of the MPC, not {self.rollouts}.")
        for name, most in (("tests", 20), ("validation", 10), ("finetune_payloads", 100), ("pretrain_payloads", 100)):
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most}, the payloads there are, not {getattr(self, name)}.")
        if self.truth and self.steps and self.steps < FIRST_MOMENT + WINDOW + 1:
            raise ValueError(f"truth needs episodes of at least {FIRST_MOMENT + WINDOW + 1} steps, not {self.steps}.")
        if self.weightings and "stand" not in self.weightings:
            raise ValueError("weightings must contain 'stand', which all others are compared with.")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        unset = lambda name: getattr(self, name) is None or name not in _CAN_BE_NOTHING and not getattr(self, name)
        missing = {name: value for name, value in _PRESETS[self.preset].items() if unset(name)}
        config = replace(self, **missing)
        matrices = [name for name in config.weightings if name.startswith("regret")]
        if self.share and matrices:
            raise ValueError(f"share mixes weights of single entries; those of {matrices} are matrices: drop them.")
        if config.truth and not set(config.weightings) & set(NEEDS_LABELS):
            raise ValueError("truth compares labels: weightings must contain one that has them, such as 'ours'.")
        return config
