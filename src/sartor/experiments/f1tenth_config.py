"""Settings of the racing experiment, and its fine-tunings."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from sartor.experiments.presets import check_least, filled

Weighting = Literal[
    "ones", "stand", "norm", "ours", "ours_trajectory", "ours_avg", "ours_shuffled", "regret", "regret_avg"
]
WEIGHTINGS: tuple[Weighting, ...] = Weighting.__args__
CHIEF: tuple[Weighting, ...] = ("stand", "ours", "ours_avg")
"""Those that are compared at all sizes and lengths of rollouts."""
BEGIN = 60
"""Control steps that a drive takes to come to speed."""
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        tracks=1, tests=1, seeds=1, drivers=1, sizes=(4,), teacher=6, rollouts=(4,), weightings=("stand", "ours"),
        horizon=20, gather=120, drive=150, steps=90, stride=20, pretrain_epochs=2, epochs=1, map_horizon=20,
        map_steps=90, truth=2,
    ),
    "quick": dict(
        tracks=4, tests=4, seeds=1, drivers=1, sizes=(8,), teacher=32, rollouts=(20,),
        weightings=("stand", "ours", "ours_avg", "ours_shuffled"), horizon=40, gather=2400, drive=1200, steps=450,
        stride=6, pretrain_epochs=100, epochs=60, map_horizon=80, map_steps=480, truth=20,
    ),
    "paper": dict(
        tracks=4, tests=6, seeds=5, drivers=2, sizes=(4, 8, 16), teacher=64, rollouts=(20, 4, 40),
        weightings=WEIGHTINGS, horizon=40, gather=2400, drive=1800, steps=750, stride=6, pretrain_epochs=150,
        epochs=100, map_horizon=80, map_steps=480, truth=30,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The racing car. Numbers that are 0 and what is empty come from the preset."""

    experiment: Annotated[Literal["f1tenth"], tyro.conf.Suppress] = "f1tenth"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes minutes, `paper` hours."""
    tracks: int = 0
    """Tracks of the data."""
    tests: int = 0
    """Held-out tracks, each with friction of its own."""
    seeds: int = 0
    """Networks to begin with, and orders of the samples."""
    drivers: int = 0
    """Seeds whose pretrained networks drive for the data, those of every size."""
    sizes: tuple[int, ...] = ()
    """Hidden units of the networks."""
    teacher: int = 0
    """Hidden units of the network, trained on all drives, whose MPC gives the labels."""
    rollouts: tuple[int, ...] = ()
    """Lengths p of the rollouts in the loss; sizes but the middle one are compared at the first alone."""
    weightings: tuple[Weighting, ...] = ()
    """Loss weights to compare, all of them at the middle size and the first p, the chief ones elsewhere; `stand` is
    what the others are compared with."""
    horizon: int = 0
    """Of the MPC, in steps of 0.033 s."""
    gather: int = 0
    """Control steps of a gentle drive."""
    drive: int = 0
    """Control steps of a drive by the MPC on a track of the data."""
    steps: int = 0
    """Control steps of a race."""
    stride: int = 0
    """Control steps between the beginnings of two samples of a drive."""
    map_horizon: int = 0
    """Of the MPC whose labels are mapped along a lap."""
    map_steps: int = 0
    """Control steps of its drive."""
    truth: int = 0
    """Moments on each held-out track at which the plant is branched."""
    pretrain_epochs: int = 0
    """Passes over the gentle drives."""
    epochs: int = 0
    """Passes over the others, of fine-tuning and of the teacher."""
    learning_rate: float = 2e-2
    """Of Adam."""
    long_learning_rate: float = 2e-3
    """The same for rollouts of more than 20 steps, which run away with larger steps."""
    batch: int = 256
    """Samples of a gradient step."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        names = ("tracks", "tests", "seeds", "drivers", "sizes", "teacher", "rollouts", "horizon", "gather", "drive",
                 "steps", "stride", "workers", "pretrain_epochs", "epochs", "map_horizon", "map_steps",
                 "truth")  # fmt: skip
        check_least(self, 0, *names)
        check_least(self, 1, "batch")
        for name in ("sizes", "rollouts"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be at least 1, not {min(getattr(self, name))}.")
        for name in ("learning_rate", "long_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")

    @property
    def middle(self) -> int:
        """The size that lengths of rollouts, and all weightings, are compared at."""
        return self.sizes[len(self.sizes) // 2]

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        config = filled(self, _PRESETS[self.preset])
        if self.drivers > config.seeds:
            raise ValueError(f"drivers must be at most seeds, {config.seeds}, not {self.drivers}.")
        if max(config.rollouts) > config.horizon:
            raise ValueError(
                f"rollouts must be at most horizon, {config.horizon}, which labels have, not {max(config.rollouts)}."
            )
        config = replace(config, drivers=min(config.drivers, config.seeds))
        for name in ("drive", "steps"):
            if getattr(config, name) <= config.horizon + BEGIN:
                raise ValueError(f"{name} must be more than {config.horizon + BEGIN}: a start of {BEGIN}, the horizon.")
        if config.map_steps <= config.map_horizon + BEGIN:
            raise ValueError(f"map_steps must be more than {config.map_horizon + BEGIN}, a start and map_horizon.")
        return config


class Trial(NamedTuple):
    """One fine-tuning."""

    size: int
    p: int
    weighting: Weighting
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.size}-{self.p}-{self.weighting}-{self.seed}"
