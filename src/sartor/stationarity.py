"""Whether tuning is at its end: an averaged gradient of the measured merit, with a radius of confidence.

    ḡ = 1/M Σ_i d + n (s_i - d·v_i) v_i,   s_i = (F(θ + δ v_i) - F(θ))/δ,   v_i uniform on the unit sphere         (D22)

has the mean ∇F_δ(θ), the gradient of F averaged over a ball of radius δ, whatever the model-based direction d is: a
good one makes it vary less. As ∇F_δ lies in the Goldstein subdifferential of F, |ḡ| + radius ≤ ε says that θ is
(δ, ε)-stationary: no descent faster than ε within a distance δ.

References: Zuliani, Balta, Lygeros, 2026, Lemma 3; Lin, Zheng, Jordan, Gradient-Free Methods for Deterministic and
Stochastic Nonsmooth Nonconvex Optimization, 2022 (the subdifferential); Satterthwaite, An Approximate Distribution of
Estimates of Variance Components, 1946 (the radius).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy.stats import chi2

from sartor.bench import Bench, bench
from sartor.mpc import MPC
from sartor.parameters import Where
from sartor.policy_gradient import cost_gradient, feedback
from sartor.tuning import Objective


class Certificate(NamedTuple):
    """What is known of the gradient."""

    gradient: Float[np.ndarray, " n"]
    """ḡ, in the order of the leaves."""
    norm: float
    """|ḡ|."""
    radius: float
    """|ḡ - ∇F_δ| is at most this with the confidence asked for."""
    rollouts: int


def stationarity(
    controller: MPC,
    plant: Callable,
    objective: Objective,
    x0: Float[Array, " nx"],
    num_steps: int,
    *,
    learn: Where | None = None,
    samples: int = 100,
    distance: float = 1e-3,
    confidence: float = 0.95,
    model: Callable | None = None,
    seed: int = 0,
) -> Certificate:
    """The gradient of a closed loop's merit by (D22), with a radius of confidence.

    Args:
        controller: The MPC with θ, as tuned.
        plant: As of `tune`, in JAX.
        objective: As of `tune`.
        x0: As of `tune`.
        num_steps: As of `tune`.
        learn: As of `tune`.
        samples: M, runs of the plant beside the one at θ.
        distance: δ.
        confidence: That the radius is large enough, for so many samples that their mean is normal.
        model: As of `tune`.
        seed: Of the directions.

    Fails: `ValueError` for wrong input, `FloatingPointError` if a rollout is not finite.
    """
    if not (samples >= 2 and distance > 0 and 0 < confidence < 1):
        raise ValueError(
            f"samples must be at least 2, distance positive and confidence within (0, 1), not {samples}, {distance}, "
            f"{confidence}."
        )
    tried = bench(controller, plant, objective, x0, num_steps, learn)
    v = np.random.default_rng(seed).standard_normal((samples, tried.flat(tried.theta).size))
    v = jnp.asarray(v / np.linalg.norm(v, axis=1, keepdims=True))
    direction, slopes = map(np.asarray, _measured(tried, v, distance, model))
    if not np.isfinite(slopes).all():
        raise FloatingPointError("a rollout of the plant is not finite: take a smaller distance.")
    estimates = direction + v.shape[1] * (slopes - v @ direction)[:, None] * v
    mean = np.asarray(estimates.mean(0))
    return Certificate(mean, float(np.linalg.norm(mean)), _radius(np.asarray(estimates), confidence), samples + 1)


@eqx.filter_jit
def _measured(tried: Bench, v: Array, distance: float, model: Callable | None) -> tuple[Array, Array]:
    """d and all s_i."""
    theta, flat = tried.theta, tried.flat(tried.theta)
    rollout, score = tried.run(theta)
    build = lambda flat: tried.build(tried.at(theta, flat))
    slopes = jax.grad(tried.objective.merit, (0, 1))(rollout.xs, rollout.us)
    direction = cost_gradient(build, flat, rollout, feedback(build(flat), rollout, model), slopes)
    there = jax.lax.map(lambda v: tried.run(tried.at(theta, flat + distance * v))[1].merit, v)
    return ravel_pytree(direction)[0], (there - score.merit) / distance


def _radius(estimates: np.ndarray, confidence: float) -> float:
    """Quantile of |mean - expectation|, whose square is a sum of weighted χ²: one χ² of equal mean and variance."""
    off = estimates - estimates.mean(0)
    gram = off @ off.T / (len(off) - 1)  # its eigenvalues are those of the covariance
    trace, squares = np.trace(gram), np.sum(gram**2)
    if trace == 0:
        return 0.0
    return float(np.sqrt(squares / trace * chi2.ppf(confidence, trace**2 / squares) / len(off)))
