"""Labels against the truth: rank correlations with what branching a simulated closed loop has shown."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr


class Ranks(NamedTuple):
    """Spearman's rank correlations of estimates with the truth."""

    overall: float
    """Of all entries of all samples together."""
    within: float
    """Over the entries of a sample, mean over samples."""
    across: float
    """Over the samples, mean over entries."""
    n: int
    """Samples for which both are known."""


def ranks(estimate: Float[np.ndarray, "B m"], true: Float[np.ndarray, "B m"]) -> Ranks:
    """Of the samples that have neither NaN; what does not vary has no rank and is left out of a mean."""
    known = np.isfinite(estimate).all(1) & np.isfinite(true).all(1)
    estimate, true = estimate[known], true[known]
    return Ranks(_rank(estimate.ravel(), true.ravel()), _mean(estimate, true), _mean(estimate.T, true.T), len(estimate))


def along(g: Float[np.ndarray, "B nu"], sensitivity: Float[np.ndarray, "B nu m"]) -> Float[np.ndarray, "B m"]:
    """|Σ_j g_j du_0[j]/de|, the S of eq. (4) for a slope g of the cost."""
    return np.abs(np.einsum("bj,bjx->bx", g, sensitivity))


def diagonal_regret(
    sensitivity: Float[np.ndarray, "B nu m"], curvature: Float[np.ndarray, "B nu"]
) -> Float[np.ndarray, "B m"]:
    """√(Σ_j curvature_j (du_0[j]/de)²): branches move one control at a time and so tell no more than the diagonal."""
    return np.sqrt(np.einsum("bjx,bj->bx", sensitivity**2, curvature))


def _rank(a: np.ndarray, b: np.ndarray) -> float:
    return np.nan if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 else float(np.asarray(spearmanr(a, b))[0])


def _mean(estimate: np.ndarray, true: np.ndarray) -> float:
    found = np.array([_rank(a, b) for a, b in zip(estimate, true, strict=True)])
    return float(found[np.isfinite(found)].mean()) if np.isfinite(found).any() else np.nan
