"""Timing of several solvers side by side."""

import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Phases(NamedTuple):
    """Times of one call [s]; NaN where there is no such phase."""

    forward: float
    both: float = float("nan")
    """Forward and backward."""


class Timing(NamedTuple):
    """Medians over the repetitions [s]."""

    forward: float
    backward: float
    both: float
    repetitions: int


def interleave(calls: dict[str, Callable[[], Phases]], repetitions: int, limit: float) -> dict[str, Timing]:
    """Call everything once to warm up, then in turn, so that drift of the machine meets all of them alike.

    A call whose warm-up takes longer than `limit` [s] is not repeated, and that one time counts. The repetitions of
    a call end early when together they take longer than `limit`.
    """
    phases: dict[str, list[Phases]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for name, call in calls.items():
        start = time.perf_counter()
        first = call()
        if time.perf_counter() - start > limit:
            phases[name], spent[name] = [first], np.inf
    for _ in range(repetitions):
        for name, call in calls.items():
            if spent[name] > limit:
                continue
            start = time.perf_counter()
            phases[name].append(call())
            spent[name] += time.perf_counter() - start
    return {name: _medians(values) for name, values in phases.items()}


def _medians(values: list[Phases]) -> Timing:
    forward, both = np.array(values, dtype=float).T
    backward = np.median(both - forward)  # neighbours in time
    return Timing(float(np.median(forward)), float(backward), float(np.median(both)), len(values))


def peak_memory() -> float:
    """High-water mark of this process [MiB]."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
