"""Learning cost and dynamics of a controller from its plans: eight methods on the pendulum and the cart-pole.

    nn            an LSTM that goes from the initial state to the plan
    sysid         the cost is known; dynamics from the expert's transitions
    mpc.dx        the cost is known; dynamics from its controls alone, through the derivative of the MPC
    mpc.cost      the dynamics are known; weights and goal of the cost from its controls alone
    mpc.cost.dx   both from its controls alone
    ....gn        the same by Levenberg and Marquardt's steps on all demonstrations instead of RMSprop's, from several
                  starts of which validation chooses: not published

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.3 (Figures 4 and 6).
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from sartor import descent
from sartor.descent import Learned, Learning, LevenbergMarquardt
from sartor.experiments.imitation_network import Planner, Plans
from sartor.experiments.imitation_systems import SOLVER, System, Theta, demonstrate, system
from sartor.experiments.jobs import Job, Monitor
from sartor.experiments.presets import check_least, filled
from sartor.experiments.run_folder import opened
from sartor.files import read_json, write_json
from sartor.imitate import identify, imitate, imitation_loss
from sartor.parameters import values

Method = Literal[
    "nn", "sysid", "mpc.dx", "mpc.cost", "mpc.cost.dx", "mpc.dx.gn", "mpc.cost.gn", "mpc.cost.dx.gn"
]  # fmt: skip
Name = Literal["pendulum", "cartpole"]
METHODS: tuple[Method, ...] = get_args(Method)
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(systems=("pendulum",), sizes=(10,), seeds=1, epochs=6, network_epochs=6, steps=4, starts=2),
    "quick": dict(systems=("pendulum",), sizes=(10, 100), seeds=1, epochs=200, network_epochs=200, steps=60, starts=8),
    "paper": dict(
        systems=("pendulum", "cartpole"),
        sizes=(10, 50, 100),
        seeds=4,
        epochs=1000,
        network_epochs=1000,
        steps=100,
        starts=16,
    ),
}
_STEPS_OF_PATIENCE = 15
_DAMPINGS = (1.0, 1e-2)  # of Levenberg and Marquardt, in turns: each gets stuck where the other does not
_SPREAD = 0.5  # of the starts behind the first, in the free numbers: factors of e^±0.5 of positive parameters
_EXACT = 1e-10  # a validation loss that other starts need not better
_POINTS = 100  # of a curve that is kept, the closer together the earlier
_RMSPROP, _ADAM = optax.rmsprop(1e-2, decay=0.5), optax.adam(1e-4)


@dataclass(frozen=True)
class Config:
    """Imitation of an MPC. Numbers that are 0 and what is empty come from the preset."""

    experiment: Annotated[Literal["imitation"], tyro.conf.Suppress] = "imitation"
    """Which experiment."""
    preset: Literal["smoke", "quick", "paper"] = "quick"
    """`smoke` is for tests, `quick` takes some minutes, `paper` three quarters of an hour."""
    systems: tuple[Name, ...] = ()
    """What is controlled."""
    methods: tuple[Method, ...] = METHODS
    """What learns."""
    sizes: tuple[int, ...] = ()
    """Numbers of demonstrations for training."""
    seeds: int = 0
    """Repetitions, each with other demonstrations, another order and another network."""
    epochs: int = 0
    """Passes over the demonstrations, at most."""
    network_epochs: int = 0
    """The same for `nn`."""
    steps: int = 0
    """Steps of Levenberg and Marquardt from each start, at most."""
    starts: int = 0
    """Starts of Levenberg and Marquardt's steps, at most; the first two, with other damping, are that of RMSprop."""
    patience: int = 150
    """Epochs without a lower validation loss after which a method stops."""
    held_out: int = 10
    """Demonstrations for validation, and as many for the test."""
    workers: int = 2
    """Processes, one for each core; 0: do all in this one."""

    def __post_init__(self):
        check_least(self, 0, "seeds", "epochs", "network_epochs", "steps", "starts", "patience", "workers")
        check_least(self, 1, "sizes", "held_out")
        if not self.methods:
            raise ValueError("methods is empty: name some.")

    def resolved(self) -> "Config":
        """The same with the numbers of the preset filled in."""
        return filled(self, _PRESETS[self.preset])


class Trial(NamedTuple):
    """One training."""

    system: Name
    method: Method
    size: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.system}-{self.method}-{self.size}-{self.seed}"


def run(config: Config, out: Path, monitor: Monitor | None = None, command: str = "") -> None:
    """Run the experiment, or finish it; every trial leaves one file, and `trials.json` holds all of them.

    Fails: `ValueError` if the folder holds another run.
    """
    config = config.resolved()
    trials = [
        Trial(s, m, size, seed)
        for s in config.systems for seed in range(config.seeds) for size in config.sizes for m in config.methods
    ]  # fmt: skip
    with opened(out, config, monitor, command) as workers:
        workers.run("learn", [Job(out / "trials" / f"{trial.name}.json", learn, (trial, config)) for trial in trials])
        rows = [read_json(out / "trials" / f"{trial.name}.json") for trial in trials]
        write_json(out / "trials.json", {"rows": rows})


def learn(output: Path, trial: Trial, config: Config, monitor: Any) -> None:
    """One trial: its losses, what it found, and how long it took."""
    here = system(trial.system)
    seed = 1000 * trial.seed
    training = demonstrate(here, trial.size, seed)
    validation, test = demonstrate(here, config.held_out, seed + 1), demonstrate(here, config.held_out, seed + 2)
    begun = time.perf_counter()
    how = _network if trial.method == "nn" else _parameters
    losses, curve, found = how(output, here, trial, config, (training, validation, test), monitor)
    epochs = np.unique(np.geomspace(1, len(curve.train), _POINTS).astype(int)) - 1
    content = {
        **trial._asdict(), "time": time.perf_counter() - begun, "epochs": len(curve.train), **found,
        "failed": int(curve.failed.sum()), "epoch": (1 + epochs).tolist(),
        **{f"{k}_curve": [float(f"{v:.6g}") for v in getattr(curve, k)[epochs]] for k in ("train", "validation")},
        **losses,
    }  # fmt: skip
    write_json(output, content)
    output.with_suffix(".npz").unlink(missing_ok=True)


def _parameters(output: Path, here: System, trial: Trial, config: Config, data: tuple, monitor: Any) -> tuple:
    """The methods that know the form of the controller."""
    if trial.method.endswith(".gn"):
        learned, starts = _from_starts(here, trial, config, data, monitor)
    else:
        learned, starts = _by_gradients(output, here, trial, config, data, monitor), 1
    found = {
        name: imitation_loss(here.problem, learned.theta, some, solver=SOLVER)
        for name, some in zip(("train", "validation", "test"), data, strict=True)
    }
    losses = {name: float(np.nanmean(loss)) for name, loss in found.items()}
    losses["failed_test"] = int(np.isnan(found["test"]).sum())
    return losses, learned.curve, {"starts": starts, "found": _found(learned.theta)}


def _by_gradients(output: Path, here: System, trial: Trial, config: Config, data: tuple, monitor: Any) -> Learned:
    """As published: RMSprop, weights and goal in turns."""
    training, validation, _ = data
    begin, groups = {
        "sysid": (here.true._replace(dx=here.start.dx), [_dx]),
        "mpc.dx": (here.true._replace(dx=here.start.dx), [_dx]),
        "mpc.cost": (here.start._replace(dx=here.true.dx), [_weights, _goal]),
        "mpc.cost.dx": (here.start, [_dx_and_weights, _dx_and_goal]),
    }[trial.method]
    learn = identify if trial.method == "sysid" else partial(imitate, solver=SOLVER)
    return learn(
        here.problem, begin, training, Learning(config.epochs, patience=config.patience, seed=trial.seed), learn=groups,
        validation=validation, optimiser=_RMSPROP, checkpoint=output.with_suffix(".npz"), monitor=monitor,
    )  # fmt: skip


def _from_starts(here: System, trial: Trial, config: Config, data: tuple, monitor: Any) -> tuple[Learned, int]:
    """Levenberg and Marquardt's steps from several starts, until one is exact: the one that validation
    prefers, and their number. The first two begin where RMSprop does."""
    training, validation, _ = data
    begin, leaves = {
        "mpc.dx.gn": (here.true._replace(dx=here.start.dx), _dx),
        "mpc.cost.gn": (here.start._replace(dx=here.true.dx), _cost),
        "mpc.cost.dx.gn": (here.start, _cost_and_dx),
    }[trial.method]
    rng = np.random.default_rng(trial.seed)
    move = lambda part: jax.tree.map(lambda leaf: leaf + _SPREAD * rng.standard_normal(np.shape(leaf)), part)
    found: list[Learned] = []
    for start in range(config.starts):
        try:
            learned = imitate(
                here.problem, eqx.tree_at(leaves, begin, replace_fn=move) if start > 1 else begin, training,
                Learning(config.steps, patience=_STEPS_OF_PATIENCE, restart=0), learn=leaves, validation=validation,
                optimiser=LevenbergMarquardt(_DAMPINGS[start % 2]), solver=SOLVER,
                monitor=lambda done, total, start=start: monitor(start * total + done, config.starts * total),
            )  # fmt: skip
        except FloatingPointError:  # no solve succeeds at this start
            continue
        found.append(learned)
        if _lowest(learned) < _EXACT:
            return learned, start + 1
    if not found:
        raise FloatingPointError(f"no solve succeeds at any of {config.starts} starts: give more of them.")
    return min(found, key=_lowest), config.starts


def _lowest(learned: Learned) -> float:
    """Validation loss, among the epochs with the fewest failed solves."""
    failed, losses = learned.curve.failed_validation, learned.curve.validation
    return float(np.min(losses[failed == failed.min()]))


def _network(output: Path, here: System, trial: Trial, config: Config, data: tuple, monitor: Any) -> tuple:
    """The LSTM."""
    single = lambda some: jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), some)
    training, validation, test = map(single, data)
    network = Planner(len(here.start.goal) - 1, key=jax.random.key(trial.seed))
    how = Learning(config.network_epochs, patience=config.patience, seed=trial.seed, restart=0)
    learned = descent.minimise(
        Plans(), network, training, how, _ADAM, [descent.every(network)], validation,
        checkpoint=output.with_suffix(".npz"), monitor=monitor,
    )  # fmt: skip
    losses = {
        name: float(np.mean(descent.evaluate(Plans(), learned.theta, some)[0]))
        for name, some in (("train", training), ("validation", validation), ("test", test))
    }
    return losses, learned.curve, {"starts": 1, "found": {}}


def _found(theta: Theta) -> dict[str, Any]:
    theta = values(theta)
    as_list = lambda value: np.asarray(value).tolist()
    return {
        "dx": {name: as_list(value) for name, value in theta.dx._asdict().items()},
        "weights": as_list(theta.weights),
        "linear": as_list(jnp.sqrt(theta.weights) * theta.goal),
    }


def _dx(theta: Theta) -> Any:
    return theta.dx


def _weights(theta: Theta) -> Any:
    return theta.weights


def _goal(theta: Theta) -> Any:
    return theta.goal


def _cost(theta: Theta) -> Any:
    return theta.weights, theta.goal


def _cost_and_dx(theta: Theta) -> Any:
    return theta.dx, theta.weights, theta.goal


def _dx_and_weights(theta: Theta) -> Any:
    return theta.dx, theta.weights


def _dx_and_goal(theta: Theta) -> Any:
    return theta.dx, theta.goal
