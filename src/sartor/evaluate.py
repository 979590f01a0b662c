"""Statistics of closed-loop evaluations: what an episode cost, and how sure a difference between two models is.

The cost of an episode of T control steps is the paper's, with the weights of the controller and none on the controls,

    J = 1/T Σ_{t=0}^{T} (q_t − q_t^ref)ᵀ Q_q (q_t − q_t^ref) + (q̇_t − q̇_t^ref)ᵀ Q_q̇ (q̇_t − q̇_t^ref)          (7)

Two models are compared on pairs: the same run r = (pretrained model, fine-tuning seed) and the same environment e,

    ratio = exp( mean_{r,e} (log J[r, e] − log J_base[r, e]) )

so that all environments count alike, however much they cost; a mean over environments is decided by the few whose
payload cannot be held. The interval is that of a bootstrap that draws pretrained models, of each as many of its seeds,
and, crossed with these runs, environments, all with replacement: it speaks about new payloads and new trainings. With
few of either (below five models, say) it is too narrow.

References: Węgrzynowski et al., Learning What Matters, equation (7); A. B. Owen, The pigeonhole bootstrap, 2007.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sartor.pairing import BASELINES, Arm, Pairs, Protocol, Split, Table, Where, costs, pairs

UNSTABLE_SPEED = 0.5
"""Mean |q̇ − q̇_ref| over joints and steps above which an episode counts as unstable [rad/s]: an arm that stands still
while the reference moves has about as much."""
UNSTABLE_RATIO = 3.0
"""A fine-tuned model's episode counts as unstable, too, if it costs more than so many times what the pretrained model
does: one joint that oscillates hardly moves a mean over joints."""
Statistic = Literal["geometric", "mean", "median"]
_SAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int
    """Number of pairs of episodes behind it."""
    dropped: int
    """Number of episodes left out because they have no partner."""


def episode_metrics(
    xs: np.ndarray,
    us: np.ndarray,
    refs: np.ndarray,
    u_max: np.ndarray,
    Q: np.ndarray,
    ee_error: np.ndarray | None = None,
) -> dict[str, Any]:
    """What one episode cost, with names as in the columns of the evaluations.

    Args:
        xs: States (T+1, 2 n) = [q, q̇], in [rad, rad/s].
        us: Controls (T, n), in [Nm].
        refs: Reference (T+1, 2 n).
        u_max: Torque limits (n,); a torque of at least 99.9 % of its limit counts as saturated.
        Q: Diagonal of the state weights (2 n,).
        ee_error: Distance of the end effector from its reference (T+1,) in [m].

    Returns: `J`, `J_q`, `J_qd` (eq. 7 and its parts), `q_rmse` [rad], `qd_rmse` [rad/s] (over joints and steps),
    `ee_rmse` [m], `saturated` (share of steps with some torque at its limit), `unstable` (a state is not finite, or
    mean |q̇ − q̇_ref| exceeds `UNSTABLE_SPEED`). Costs and errors of an episode that is not finite are infinite.
    """
    T, n = us.shape
    for name, array, shape in (("xs", xs, (T + 1, 2 * n)), ("refs", refs, (T + 1, 2 * n)), ("Q", Q, (2 * n,))):
        if np.shape(array) != shape:
            raise ValueError(f"{name} has shape {np.shape(array)}; with us {us.shape} it must have {shape}.")
    finite = bool(np.isfinite(xs).all() and np.isfinite(us).all())
    errors = xs - refs if finite else np.full(xs.shape, np.inf)
    J_q, J_qd = ((Q[part] * errors[:, part] ** 2).sum() / T for part in (slice(0, n), slice(n, None)))
    ee_error = np.full(1, np.nan) if ee_error is None else np.asarray(ee_error)
    return {
        "J": float(J_q + J_qd),
        "J_q": float(J_q),
        "J_qd": float(J_qd),
        "q_rmse": float(np.sqrt((errors[:, :n] ** 2).mean())),
        "qd_rmse": float(np.sqrt((errors[:, n:] ** 2).mean())),
        "ee_rmse": float(np.sqrt((ee_error**2).mean())) if finite else np.inf,
        "saturated": float((np.abs(us) >= 0.999 * u_max).any(1).mean()),
        "unstable": not finite or bool(np.abs(errors[:, n:]).mean() > UNSTABLE_SPEED),
    }


def mark_unstable(rows: list[dict[str, Any]]) -> None:
    """Set `unstable` of the fine-tuned models' rows that cost `UNSTABLE_RATIO` times as much as the pretrained model.

    Args:
        rows: Rows of the evaluations, with those of the `pretrained` baseline.
    """
    before = {(row["model"], row["environment"]): row["J"] for row in rows if row["method"] == "pretrained"}
    for row in rows:
        known = before.get((row["model"], row["environment"]), np.inf)
        if row["method"] not in BASELINES and row["J"] > UNSTABLE_RATIO * known:
            row["unstable"] = True


def ratio(
    table: Table,
    arm: Arm,
    baseline: str | Arm = "stand",
    *,
    where: Where = "all",
    protocol: Protocol = "last",
    statistic: Statistic = "geometric",
    column: str = "J",
    split: Split = "test",
) -> Interval:
    """Cost of an arm relative to a baseline, with a bootstrap interval over runs and environments.

        geometric:  exp( mean_{r,e} log(J / J_base) )       the headline
        mean:       mean_{r,e} J / mean_{r,e} J_base        eq. (7) averaged over environments, as the paper does
        median:     median_{r,e} J / median_{r,e} J_base

    Args:
        table: The evaluations.
        arm: What is compared.
        baseline: With what; a name stands for that method with all else equal, or for one of `BASELINES`.
        where: All environments, or those where torque limits are, or are not, reached (`saturated_environments`).
        protocol: Which epochs count, see `costs`.
        statistic: Which ratio.
        column: What is compared; positive.
        split: Test environments, or those to choose by.

    Fails: `MissingEpisodes` if there are no pairs, `ValueError` if a cost is not positive. An infinite cost stays one.
    """
    both = pairs(table, arm, _named(arm, baseline), where=where, protocol=protocol, column=column, split=split)
    if not (both.values > 0.0).all():
        raise ValueError(f"{column} of {arm} or of its baseline is zero, negative or NaN: there is no ratio.")
    return _bootstrap(_STATISTICS[statistic], both)


def headroom(
    table: Table,
    arm: Arm,
    baseline: str | Arm = "stand",
    *,
    where: Where = "all",
    protocol: Protocol = "last",
) -> Interval:
    """Share of the way from the baseline to the controller that knows payload and damping that an arm goes,

        log(J_base / J) / log(J_base / J_oracle)    in geometric means;

    NaN where that controller is not better than the baseline. Arguments as in `ratio`.
    """
    three = (arm, _named(arm, baseline), Arm("oracle_damping"))
    return _bootstrap(_headroom, pairs(table, *three, where=where, protocol=protocol))


def minimum_detectable(interval: Interval) -> float:
    """The smallest relative change that the interval of a ratio could tell from none: √(high / low) − 1."""
    with np.errstate(invalid="ignore", divide="ignore"):  # of infinite costs
        return float(np.sqrt(np.divide(interval.high, interval.low)) - 1.0)


def summary(table: Table, arm: Arm, protocol: Protocol = "last") -> dict[str, float]:
    """Means over the test episodes of an arm.

    But `J_median` and `velocity_share`, the part of the velocities in J, are medians; `failed`, `unstable` and
    `episodes` are counts.
    """
    values = {}
    for column in ("J", "J_qd", "q_rmse", "qd_rmse", "ee_rmse", "saturated", "unstable", "failed"):
        of_runs = costs(table, arm, protocol=protocol, column=column).values()
        values[column] = np.array([v for of_run in of_runs for v in of_run.values()])
    counts = {name: values[name].sum() for name in ("unstable", "failed")}
    means = {name: float(v.mean()) for name, v in values.items()}
    with np.errstate(invalid="ignore"):  # of infinite costs
        share = float(np.median(values["J_qd"] / values["J"]))
    others = {"J_median": float(np.median(values["J"])), "velocity_share": share, "episodes": len(values["J"])}
    return means | counts | others


def _named(arm: Arm, baseline: str | Arm) -> Arm:
    if isinstance(baseline, Arm):
        return baseline
    return Arm(baseline) if baseline in BASELINES else arm._replace(method=baseline)


def _headroom(J: np.ndarray, J_base: np.ndarray, J_oracle: np.ndarray) -> np.ndarray:
    gain, room = (np.log(J_base / other).mean((-2, -1)) for other in (J, J_oracle))
    return np.where(room > 0.0, gain / np.where(room > 0.0, room, 1.0), np.nan)


def _bootstrap(statistic: Callable[..., Any], data: Pairs) -> Interval:
    """A statistic of matrices (..., runs, environments), and its interval; the draws are the same on every call."""
    rng = np.random.default_rng(0)
    runs, environments = len(data.runs), len(data.environments)
    i = _draw_runs(data.runs, rng)[:, :, None]
    j = rng.integers(environments, size=(_SAMPLES, 1, environments))
    with np.errstate(invalid="ignore", divide="ignore"):  # of infinite costs
        value = float(statistic(*data.values))
        draws = statistic(*(matrix[i, j] for matrix in data.values))
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")  # no interpolation: draws may be infinite
    return Interval(value, float(low), float(high), runs * environments, data.dropped)


def _draw_runs(runs: list[tuple[int, int]], rng: np.random.Generator) -> np.ndarray:
    """Places in `runs`, (draws, runs): pretrained models with replacement, and for each as many of its seeds."""
    of_model = [np.flatnonzero([model == m for model, _ in runs]) for m in sorted({model for model, _ in runs})]
    slot = np.concatenate([np.full(len(mine), i) for i, mine in enumerate(of_model)])
    drawn = rng.integers(len(of_model), size=(_SAMPLES, len(of_model)))[:, slot]
    counts = np.array([len(mine) for mine in of_model])
    table = np.array([np.resize(mine, counts.max()) for mine in of_model])
    return table[drawn, (rng.random(drawn.shape) * counts[drawn]).astype(int)]


_STATISTICS: dict[Statistic, Callable[..., Any]] = {
    "geometric": lambda J, J_base: np.exp(np.log(J / J_base).mean((-2, -1))),
    "mean": lambda J, J_base: J.mean((-2, -1)) / J_base.mean((-2, -1)),
    "median": lambda J, J_base: np.median(J, (-2, -1)) / np.median(J_base, (-2, -1)),
}
