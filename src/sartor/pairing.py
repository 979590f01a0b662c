"""Rows of evaluated episodes, chosen and paired: the same runs and environments for all that is compared.

A run is a pretrained model and a fine-tuning seed. Nothing is filled in: what has no partner is left out and counted.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

BASELINES = ("nominal", "pretrained", "oracle", "oracle_damping")
"""Methods without fine-tuning: rows with p = 0 and seed -1, and model -1 if no pretrained model is in them."""
SATURATED_SHARE = 0.02
"""An environment is saturated if the controller that knows payload and damping has a torque at its limit in at least
this share of its steps: no model can track well there."""

Table = Any  # Mapping[str, np.ndarray] or pyarrow.Table
Protocol = Literal["last", "best_validation", "top_five"]
Where = Literal["all", "saturated", "unsaturated"]
Split = Literal["test", "validation"]
Run = tuple[int, int]


class MissingEpisodes(ValueError):
    """The evaluations do not hold what was asked for; those of a run that goes on may do so later."""


class Arm(NamedTuple):
    """One thing that was evaluated: a method, and what it was trained and run with."""

    method: str
    p: int = 0
    """Length of the rollouts in the loss; 0 for the methods in `BASELINES`."""
    study: str = "main"
    variant: str = ""

    def __str__(self) -> str:
        parts = [f"p = {self.p}" if self.p else "", self.study if self.study != "main" else "", self.variant]
        return ", ".join([self.method, *filter(None, parts)])


class Pairs(NamedTuple):
    """Costs of several arms on the same runs and environments."""

    runs: list[Run]
    environments: list[int]
    values: np.ndarray
    """(arms, runs, environments)"""
    dropped: int
    """Number of episodes, over all arms, that are not among them."""


def columns(table: Table) -> dict[str, np.ndarray]:
    """The columns of a `pyarrow.Table`, or of a mapping from names to arrays."""
    names = list(table) if isinstance(table, Mapping) else table.column_names
    arrays = {name: np.asarray(table[name]) for name in names}
    return {name: a.astype(str) if a.dtype == object else a for name, a in arrays.items()}


def arms(table: Table, study: str = "main") -> list[Arm]:
    """What a study compares, in order of appearance."""
    rows = columns(table)
    keep = (rows["study"] == study) & (rows["split"] == "test")
    parts = [rows[name][keep] for name in ("method", "p", "variant")]
    # Rows of one arm mostly stand together: look at the first of each stretch only.
    new = np.any([np.r_[True, part[1:] != part[:-1]] for part in parts], axis=0)
    found = zip(*(part[new[: len(part)]].tolist() for part in parts), strict=True)
    return list(dict.fromkeys(Arm(method, p, study, variant) for method, p, variant in found))


def costs(
    table: Table, arm: Arm, *, protocol: Protocol = "last", column: str = "J", split: Split = "test"
) -> dict[Run, dict[int, float]]:
    """A column of an arm by run and environment of a split.

    Protocols: `last`, the last epoch (nothing is selected); `best_validation`, of each run the epoch with the lowest
    geometric mean of J on the validation split; `top_five`, the paper's: the mean over those five epochs whose mean J
    over runs and *test* environments is lowest. The last is optimistic: it selects on the number that it reports.

    Where only one epoch was tested there is nothing to choose, and only `last` exists.

    Fails: `MissingEpisodes` if there are no such rows, `ValueError` if an episode is there twice.
    """
    rows = columns(table)
    mine = (rows["method"] == arm.method) & (rows["study"] == arm.study) & (rows["variant"] == arm.variant)
    mine &= rows["p"] == arm.p
    names = ("model", "seed", "environment", "epoch")
    rows = {name: rows[name][mine] for name in {*names, "J", "split", "last", column}}
    chosen = (rows["seed"] < 0) | (_SELECT[protocol](rows) & (protocol == "last" or len(np.unique(rows["epoch"])) > 1))
    keep = (rows["split"] == split) & chosen
    if not keep.any():
        raise MissingEpisodes(f"the evaluations have no {split} episodes of {arm} under the protocol {protocol!r}.")
    found: dict[Run, dict[int, list[float]]] = {}
    seen = set()
    for model, seed, environment, epoch, value in zip(*(rows[n][keep].tolist() for n in (*names, column)), strict=True):
        episode = (model, seed, environment, epoch)
        if episode in seen:
            raise ValueError(f"{arm}: the episode {dict(zip(names, episode, strict=True))} is there twice; remove one.")
        seen.add(episode)
        found.setdefault((model, seed), {}).setdefault(environment, []).append(float(value))
    return {run: {e: sum(v) / len(v) for e, v in of_run.items()} for run, of_run in found.items()}


def pairs(
    table: Table, *of: Arm, where: Where = "all", protocol: Protocol = "last", column: str = "J", split: Split = "test"
) -> Pairs:
    """The values of some arms on what all of them have in common.

    An arm without seeds stands beside every seed of its pretrained model, one without a model beside all runs. Runs
    that lack environments that others have are left out whole, so that every run has the same environments.

    Fails: `MissingEpisodes` if nothing is in common.
    """
    found = [costs(table, arm, protocol=protocol, column=column, split=split) for arm in of]
    allowed = _environments(table, where, split)
    common: dict[Run, set[int]] = {}
    for run in sorted({run for each in found for run in each}):
        partners = [_partner(each, run) for each in found]
        if None not in partners:
            shared = set.intersection(*(set(p) for p in partners if p is not None))
            common[run] = shared if allowed is None else shared & allowed
    environments = sorted(max(common.values(), key=len, default=set()))
    runs = [run for run, shared in common.items() if shared >= set(environments)]
    if not environments:
        raise MissingEpisodes(
            f"{' and '.join(map(str, of))} have no {where if where != 'all' else ''} episodes in common."
        )
    values = [[[(_partner(each, run) or {})[e] for e in environments] for run in runs] for each in found]
    used = sum(len({_key(each, run) for run in runs}) for each in found) * len(environments)
    there = sum(len(v) if allowed is None else len(allowed & set(v)) for each in found for v in each.values())
    return Pairs(runs, environments, np.array(values), there - used)


def saturated_environments(table: Table, split: Split = "test") -> set[int]:
    """The environments in which `oracle_damping` saturates in at least `SATURATED_SHARE` of its steps.

    Fails: `MissingEpisodes` if it was not evaluated.
    """
    rows = columns(table)
    keep = (rows["method"] == "oracle_damping") & (rows["split"] == split)
    if not keep.any():
        raise MissingEpisodes("no episode of oracle_damping: which environments are saturated is not known.")
    environments, shares = rows["environment"][keep], rows["saturated"][keep]
    return {int(e) for e in np.unique(environments) if shares[environments == e].mean() >= SATURATED_SHARE}


def _key(found: Mapping[Run, Any], run: Run) -> Run | None:
    """The run itself, or the arm without seed, or without model, that stands for it."""
    return next((key for key in (run, (run[0], -1), (-1, -1)) if key in found), None)


def _partner(found: Mapping[Run, dict[int, float]], run: Run) -> dict[int, float] | None:
    key = _key(found, run)
    return None if key is None else found[key]


def _environments(table: Table, where: Where, split: Split) -> set[int] | None:
    if where == "all":
        return None
    saturated = saturated_environments(table, split)
    rows = columns(table)
    return saturated if where == "saturated" else set(np.unique(rows["environment"]).tolist()) - saturated


def _best_on_validation(rows: dict[str, np.ndarray]) -> np.ndarray:
    best = np.zeros(len(rows["J"]), bool)
    validation, epochs = rows["split"] == "validation", rows["epoch"]
    for model, seed in set(zip(rows["model"].tolist(), rows["seed"].tolist(), strict=True)):
        run = (rows["model"] == model) & (rows["seed"] == seed)
        scores = {e: np.log(rows["J"][run & validation & (epochs == e)]).mean() for e in set(epochs[run & validation])}
        if scores:
            best |= run & (epochs == min(scores, key=lambda e: scores[e]))
    return best


def _five_best_on_test(rows: dict[str, np.ndarray]) -> np.ndarray:
    test, epochs = rows["split"] == "test", rows["epoch"]
    found, counts = np.unique(epochs[test], return_counts=True)
    whole = found[counts == counts.max()] if len(found) else found  # half an epoch may be the cheap half
    best = sorted(whole, key=lambda e: rows["J"][test & (epochs == e)].mean())[:5]
    return np.isin(epochs, best)


_SELECT: dict[Protocol, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "last": lambda rows: rows["last"].astype(bool),
    "best_validation": _best_on_validation,
    "top_five": _five_best_on_test,
}
