"""An expert that no learner can be: identification against imitation for a pendulum with friction in the wind.

The learner's model has neither. `sysid` fits the expert's transitions, `mpc.dx` its controls: which of them imitates
better, and which predicts better? The expert's damping acts on the rate, as the text says, or on the angle, as in the
authors' code.

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.4 (Figure 5).
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from sartor.descent import Learning
from sartor.experiments.imitation_systems import SOLVER, Damping, Theta, demonstrate, system, windy
from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.presets import check_least, filled
from sartor.experiments.run_folder import opened
from sartor.files import read_json, write_json
from sartor.imitate import identify, imitate, imitation_loss, transition_loss
from sartor.parameters import positive, values
from sartor.systems import pendulum

Method = Literal["sysid", "mpc.dx"]
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(seeds=1, epochs=4, samples=10),
    "quick": dict(seeds=3, epochs=100, samples=100),
    "paper": dict(seeds=8, epochs=250, samples=100),
}
_EVERY = 5  # epochs between two points of a curve


@dataclass(frozen=True)
class Config:
    """Imitation of an expert whose dynamics the learner cannot have. Numbers that are 0 come from the preset."""

    experiment: Annotated[Literal["unrealisable"], tyro.conf.Suppress] = "unrealisable"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` and `paper` take minutes."""
    seeds: int = 0
    """Parameters to begin with."""
    epochs: int = 0
    """Passes over the demonstrations."""
    samples: int = 0
    """Demonstrations for training."""
    held_out: int = 1024
    """Demonstrations on which both losses are measured. Published are 10; the one plan in five or so that is far
    from the expert's, whatever is learned, decides the mean, so that 10 tell nothing."""
    dampings: tuple[Damping, ...] = ("rate", "angle")
    """What the expert's damping acts on: the rate, or the angle as in the authors' code."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        check_least(self, 0, "seeds", "epochs", "samples", "workers")
        check_least(self, 1, "held_out")
        if not self.dampings:
            raise ValueError("dampings is empty: name one.")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        return filled(self, _PRESETS[self.preset])


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every trial leaves one file, and `trials.json` holds all of them.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    methods: tuple[Method, ...] = ("sysid", "mpc.dx")
    names = {(damping, method, seed): out / "trials" / f"{damping}-{method}-{seed}.json"
             for damping in config.dampings for seed in range(config.seeds) for method in methods}  # fmt: skip
    with opened(out, config, monitor, command) as workers:
        workers.run("learn", [Job(path, learn, (*trial, config)) for trial, path in names.items()])
        write_json(out / "trials.json", {"rows": [read_json(path) for path in names.values()]})


def learn(output: Path, damping: Damping, method: Method, seed: int, config: Config, monitor: Any) -> None:
    """One trial: imitation and transition loss on held-out demonstrations, as learning goes on."""
    expert, learner = windy(damping), system("pendulum")
    training, held_out = demonstrate(expert, config.samples, 0), demonstrate(expert, config.held_out, 1)
    begin = expert.true._replace(dx=pendulum.Theta(*map(positive, _start(seed))))
    points: list[tuple[int, float, float]] = []

    def look(epoch: int, theta: Theta) -> None:
        if epoch % _EVERY == 0 or epoch in (1, config.epochs):
            imitation = float(np.nanmean(imitation_loss(learner.problem, theta, held_out, solver=SOLVER)))
            points.append((epoch, imitation, float(np.mean(transition_loss(learner.problem, theta, held_out)))))

    begun = time.perf_counter()
    train = identify if method == "sysid" else partial(imitate, solver=SOLVER)
    how = Learning(config.epochs, seed=seed)
    learned = train(learner.problem, begin, training, how, learn=_dx, monitor=monitor, after_epoch=look)
    epochs, imitation, transition = zip(*points, strict=True)
    found = {name: float(value) for name, value in values(learned.theta).dx._asdict().items()}
    content = {
        "damping": damping, "method": method, "seed": seed, "found": found,
        "imitation": imitation[-1], "transition": transition[-1],
        "failed": int(learned.curve.failed.sum()), "time": time.perf_counter() - begun, "epoch": epochs,
        "imitation_curve": imitation, "transition_curve": transition,
    }  # fmt: skip
    write_json(output, content)


def _start(seed: int) -> np.ndarray:
    """(5, 1, 1) + (3, 1, 1) U(-0.5, 0.5), for g, m, l."""
    return np.array([5.0, 1.0, 1.0]) + np.array([3.0, 1.0, 1.0]) * np.random.default_rng(seed).uniform(-0.5, 0.5, 3)


def _dx(theta: Theta) -> Any:
    return theta.dx
