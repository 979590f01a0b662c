"""Loss weights: from labels and the statistics of the data to how much each error of a prediction counts.

    loss of a sample = Σ_{k,i} (W_{k,i} e_{k,i})²   or   Σ_m (Σ_{k,i} F_{m,k,i} e_{k,i})²                        (D15)

for the errors e (p, nx) of a rollout of p steps. Weights are scaled to a mean square of 1, so that learning rates mean
the same for all of them.

References: Węgrzynowski et al., Learning What Matters, eq. (1) and section IV-A.
"""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

States = Literal["q", "qd", "both"] | tuple[bool, ...]
"""Which states count: positions, velocities, both of a robot, or for each state whether it does."""


class Elementwise(eqx.Module):
    """Σ (W e)²: every entry of the error counts by itself."""

    W: Float[Array, "*B p nx"]
    """In 1/units of the state, up to a common scale."""

    def loss(self, errors: Float[Array, "*B p nx"]) -> Float[Array, "*B"]:
        """Loss of each sample."""
        return jnp.sum((self.W * errors) ** 2, (-2, -1))


class Factor(eqx.Module):
    """Σ_m (F_m · e)²: errors that compensate each other do not count, such as those of a regret (D10)."""

    F: Float[Array, "*B m p nx"]
    """Rows of a root of the weight matrix."""

    def loss(self, errors: Float[Array, "*B p nx"]) -> Float[Array, "*B"]:
        """Loss of each sample."""
        return jnp.sum(jnp.sum(self.F * errors[..., None, :, :], (-2, -1)) ** 2, -1)


Weights = Elementwise | Factor


def constant(per_state: Float[np.ndarray, " nx"], num_samples: int, num_steps: int, states: States) -> Elementwise:
    """The same weight of each state for all samples and steps, scaled to a mean square of 1.

    Args:
        per_state: Such as 1/standard deviation of each state.
        num_samples: B.
        num_steps: p.
        states: Which states count.
    """
    per_state = np.asarray(per_state, float)
    if per_state.ndim != 1 or not np.all(np.isfinite(per_state)) or np.any(per_state < 0):
        raise ValueError(f"per_state must be a vector of finite numbers ≥ 0, not {per_state}: does a state not vary?")
    return from_labels(np.broadcast_to(per_state, (num_samples, num_steps, per_state.shape[0])), num_steps, states)


def from_labels(
    S: Float[np.ndarray, "B N nx"], num_steps: int, states: States, *, quantile: float = 0.999
) -> Elementwise:
    """Labels as weights: clipped at a quantile and scaled to a mean square of 1 over the entries that count.

    Args:
        S: Labels ≥ 0, finite.
        num_steps: p ≤ N, the steps that a rollout has.
        states: Which states count.
        quantile: Where to clip, so that no single sample rules.
    """
    mask = used(S.shape[-1], states)
    W = _finite("S", _first_steps("S", S, num_steps))[..., mask]
    W = np.minimum(W, np.quantile(W, quantile))
    whole = np.zeros((*W.shape[:2], S.shape[-1]))
    whole[:, :, mask] = W / _rms(W)
    return Elementwise(jnp.asarray(whole))


def from_factors(
    F: Float[np.ndarray, "B m N nx"], num_steps: int, states: States, *, quantile: float = 0.999
) -> Factor:
    """The same for factors, whose size is that of all entries of a sample.

    Args:
        F: Such as Λ^{1/2} du_0/de.
        num_steps: p ≤ N.
        states: Which states count.
        quantile: Samples with larger factors are scaled down to it.
    """
    F = _finite("F", _first_steps("F", F, num_steps)) * used(F.shape[-1], states)
    size = np.sqrt(np.sum(F**2, (1, 2, 3)))
    F = F * np.minimum(1.0, np.quantile(size, quantile) / np.maximum(size, 1e-300))[:, None, None, None]
    per_entry = F.shape[1] / np.mean(used(F.shape[-1], states))  # rows share an entry, and not all entries count
    return Factor(jnp.asarray(F / (np.sqrt(per_entry) * _rms(F))))


def regret_factors(Lambda: Float[np.ndarray, "B nu nu"], du0_de: Float[np.ndarray, "B nu N nx"]) -> np.ndarray:
    """Λ^{1/2} du_0/de of each sample (D10), (B, nu, N, nx); directions of negative curvature do not count."""
    values, vectors = np.linalg.eigh(np.asarray(Lambda, float))
    root = np.einsum("bij,bj,bkj->bik", vectors, np.sqrt(np.maximum(values, 0.0)), vectors)
    return np.einsum("bij,bjkx->bikx", root, du0_de)


def scaled(weights: Weights, per_sample: Float[np.ndarray, " B"]) -> Weights:
    """Weights times a number for each sample, scaled back to the mean square they had."""
    size = np.asarray(per_sample, float)
    if isinstance(weights, Elementwise):
        W = np.asarray(weights.W) * size[:, None, None]
        return Elementwise(jnp.asarray(W * _rms(weights.W) / _rms(W)))
    F = np.asarray(weights.F) * size[:, None, None, None]
    return Factor(jnp.asarray(F * _rms(weights.F) / _rms(F)))


def per_environment(
    losses: Float[np.ndarray, " B"], environments: Sequence[int] | np.ndarray
) -> Float[np.ndarray, " B"]:
    """1/√(mean loss of the sample's environment): no environment counts more because it is predicted badly.

    Args:
        losses: Loss of each sample under the model before training.
        environments: Environment of each sample.
    """
    losses, environments = np.asarray(losses, float), np.asarray(environments)
    size = np.empty_like(losses)
    for e in np.unique(environments):
        size[environments == e] = 1.0 / np.sqrt(max(losses[environments == e].mean(), 1e-300))
    return size


def mix(weights: Elementwise, uniform: Elementwise, share: float) -> Elementwise:
    """Weights whose loss is (1 - share) times that of `weights` plus `share` times that of `uniform`."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1], not {share}.")
    return Elementwise(jnp.sqrt((1.0 - share) * weights.W**2 + share * uniform.W**2))


def explained(S: Float[np.ndarray, "B N nx"]) -> float:
    """Share of the energy Σ S² of labels that their mean map explains: 1 if all samples have the same label."""
    S = np.asarray(S, float)
    mean = S.mean(0)
    return float(1.0 - np.mean((S - mean) ** 2) / np.mean(S**2))


def effective(S: Float[np.ndarray, "B N nx"]) -> float:
    """Share of the samples that the loss is made of, (Σ_b e_b)²/(B Σ_b e_b²) with the energies e_b = Σ S_b²: 1 if all
    count alike, 1/B if one rules.

    References: Kish, Survey Sampling, 1965 (the effective sample size).
    """
    energy = np.sum(np.asarray(S, float) ** 2, (1, 2))
    return float(energy.sum() ** 2 / (len(energy) * np.sum(energy**2)))


def used(nx: int, states: States) -> np.ndarray:
    """Which entries of x, by default [q, q̇], count, (nx,)."""
    if isinstance(states, tuple):
        if len(states) != nx or not any(states):
            raise ValueError(f"states must say for each of {nx} states whether it counts, not {states}.")
        return np.array(states, bool)
    if states not in ("q", "qd", "both"):
        raise ValueError(f"states must be 'q', 'qd' or 'both', not {states!r}.")
    position = np.arange(nx) < nx // 2
    return {"q": position, "qd": ~position, "both": np.ones(nx, bool)}[states]


def _rms(values: np.ndarray | Array) -> float:
    size = float(np.sqrt(np.mean(np.asarray(values, float) ** 2)))
    if size == 0.0:
        raise ValueError("all weights are zero: nothing would be learned.")
    return size


def _first_steps(name: str, labels: np.ndarray, num_steps: int) -> np.ndarray:
    labels = np.asarray(labels, float)
    if not 1 <= num_steps <= labels.shape[-2]:
        raise ValueError(f"num_steps must lie between 1 and {labels.shape[-2]}, the steps of {name}, not {num_steps}.")
    return labels[..., :num_steps, :]


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    bad: np.ndarray = ~np.all(np.isfinite(values.reshape(len(values), -1)), axis=1)
    if bad.any():
        raise ValueError(f"{name} is not finite for {bad.sum()} of {bad.size} samples: leave out those that failed.")
    return values
