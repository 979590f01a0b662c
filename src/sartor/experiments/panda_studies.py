"""What the Panda experiment compares beside the weighting: one thing is changed at a time, all else stays."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from sartor.experiments.panda_config import Config

_BOTH = ("stand", "ours")
_ALL = ("stand", "ours", "ones", "norm", "mpc_cost", "ours_avg", "ours_shuffled")
_RECIPE = {"rounds": 2, "finetune_payloads": 100}
_CONTROL = ("one round, 100 payloads, as many gradient steps as two", {"finetune_payloads": 100, "epochs": 22})
VARIANTS: dict[str, list[tuple[str, tuple[str, ...], dict[str, Any]]]] = {
    "ablation": [
        ("trajectory error", ("ours",), {"error": "trajectory"}),
        ("sum of magnitudes", ("ours",), {"combine": "absolute"}),
        ("Gauss-Newton", ("ours",), {"curvature": "gauss_newton"}),
        ("first control fixed", ("ours",), {"sensitivity": "resolve"}),
        ("eps by torque limit", ("ours",), {"eps": "limits"}),
        ("barrier 0.001", ("ours",), {"tau": 1e-3}),
        ("half mixed", ("ours",), {"share": 0.5}),
        ("velocities", _BOTH, {"states": "qd"}),
        ("positions and velocities", _BOTH, {"states": "both"}),
        ("half the payloads", _BOTH, {"finetune_payloads": 30}),
        ("100 payloads", _BOTH, {"finetune_payloads": 100}),
        ("no excitation kept", _BOTH, {"kept": -1}),
        ("no anchor", _BOTH, {"anchor": 0.0}),
        ("anchor of 1", _BOTH, {"anchor": 1.0}),
        ("anchor of 10", _BOTH, {"anchor": 10.0}),
        ("learning rate of 0.0003", _ALL, {"learning_rate": 3e-4}),
        ("learning rate of 0.003", _ALL, {"learning_rate": 3e-3}),
        ("damping known", _BOTH, {"damping": 1.0}),
        ("context of 2", _BOTH, {"num_contexts": 2}),
    ],
    "alone": [
        (
            "rollouts alone, inertia as pretrained",
            _ALL,
            {"anchor": 0.0, "frozen": ("inertia",)},
        ),
    ],
    "capacity": [
        ("[8, 8], LSTM of 8", _BOTH, {"widths": (8, 8), "hidden": 8}),
        ("[8, 8]", _BOTH, {"widths": (8, 8)}),
        ("[16, 12]", _BOTH, {"widths": (16, 12)}),
        ("5 LSTMs of 10", _BOTH, {"hidden": 10, "num_layers": 5}),
        ("[60, 40]", _BOTH, {"widths": (60, 40)}),
        ("[16, 12], recipe", ("stand_env",), {"widths": (16, 12), **_RECIPE}),
        ("[8, 8], recipe", ("stand_env",), {"widths": (8, 8), **_RECIPE}),
        ("[8, 8], LSTM of 8, recipe", ("stand_env",), {"widths": (8, 8), "hidden": 8, **_RECIPE}),
    ],
    "recipe": [("two rounds, 100 payloads", ("stand_env",), _RECIPE), (_CONTROL[0], ("stand_env",), _CONTROL[1])],
    "recipe_quick": [("two rounds", ("stand_env",), {"rounds": 2})],
    "rounds": [
        ("two rounds", ("stand", "ours", "stand_env", "regret"), {"rounds": 2}),
        ("one round, as many gradient steps as two", ("stand",), {"epochs": 21}),
        ("two rounds, dither", ("stand",), {"rounds": 2, "dither": 0.02}),
        ("two rounds, 100 payloads", ("stand", "regret"), _RECIPE),
        ("two rounds, 100 payloads, anchor of 1", ("stand",), {**_RECIPE, "anchor": 1.0}),
        ("two rounds, 100 payloads, learning rate of 0.003", ("stand_env",), {**_RECIPE, "learning_rate": 3e-3}),
        (_CONTROL[0], ("stand",), _CONTROL[1]),
    ],
}
"""By study: a name, the weightings, and the fields of the configuration that differ. In `alone` the weights act on the
whole loss, as published; what else keeps the closed loop stable is that the inertia stays as pretrained. The recipe
joins what had the lowest costs on the validation payloads of `rounds`: two rounds, 100 payloads, and of the weightings
with two rounds `stand_env`; beside it one round with as many gradient steps, to tell its own loop from more training.
`recipe_quick` is the same with as little data as there is."""
_OF_ALL_SEEDS = ("alone", "recipe")
OF_MODEL = ("widths", "num_contexts", "hidden", "num_layers", "damping")
OF_LABELS = ("curvature", "tau", "sensitivity")


class Cell(NamedTuple):
    """One fine-tuned model."""

    model: int
    method: str
    p: int
    seed: int
    study: str = "main"
    variant: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-p{self.p}-m{self.model}-s{self.seed}{suffix(self.variant)}"

    def config(self, config: Config) -> Any:
        """The configuration with what is different for this model."""
        return replace(config, **overrides(self))

    def final(self, config: Config) -> str:
        """Name of the model of the last round."""
        return f"{self.name}-r{self.config(config).rounds}"

    @property
    def start(self) -> str:
        """Name of the pretrained model that it starts from."""
        return f"pretrained-{self.model}{_first_with(self, OF_MODEL)}"

    @property
    def labels(self) -> str:
        """Folder of its labels."""
        return f"labels{_first_with(self, OF_LABELS)}"


def cells(config: Config) -> list[Cell]:
    """All models to be fine-tuned: those of the first p, the studies, then those of the other p."""
    first, *rest = (list(_main(config, p)) for p in config.rollouts)
    return [*first, *_studies(config), *(cell for of_p in rest for cell in of_p)]


def overrides(cell: Cell) -> dict[str, Any]:
    """Fields of the configuration that differ for a cell."""
    return next((changed for name, _, changed in VARIANTS.get(cell.study, []) if name == cell.variant), {})


def _first_with(cell: Cell, names: tuple[str, ...]) -> str:
    """Suffix of the first variant of the study with the same values of some fields; variants with them share files."""
    of_names = lambda changed: {name: changed[name] for name in names if name in changed}
    mine = of_names(overrides(cell))
    variants = VARIANTS.get(cell.study, []) if mine else []
    return next((suffix(name) for name, _, changed in variants if of_names(changed) == mine), "")


def suffix(variant: str) -> str:
    """A variant in the name of a file."""
    return "-" + re.sub(r"[^a-z0-9]+", "_", variant.lower()).strip("_") if variant else ""


def _main(config: Config, p: int) -> Iterator[Cell]:
    methods = [m for m in config.weightings if p == config.rollouts[0] or not config.others or m in config.others]
    for seed in range(config.seeds):
        for model in range(config.models):
            for method in methods:
                yield Cell(model, method, p, seed)


def _studies(config: Config) -> Iterator[Cell]:
    for study in config.studies or ():
        for seed in range(config.seeds if study in _OF_ALL_SEEDS else min(config.study_seeds or 0, config.seeds)):
            for variant, methods, _ in VARIANTS[study]:
                for model in range(config.models):
                    for method in methods:
                        yield Cell(model, method, config.rollouts[0], seed, study, variant)
