"""What a model lacks, told by the rollouts of the plant so far: ridge regression of its errors.

    e_t = x_{t+1} - f(x_t, u_t) ≈ Σ_a slopes_a z_a + ½ Σ_ab bent_ab z_a z_b + constant,  z = (x_t, u_t) - origin  (D21)

Products tell how the Jacobian's error changes along the way. Directions that no rollout has excited keep the model's
Jacobian.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.policy_gradient import Rollout
from sartor.tuning import Change


class Sums(NamedTuple):
    """Over all transitions: of the features φ = (z, its products if they count, 1), and of φ with the errors."""

    ff: Float[Array, "n n"]
    fe: Float[Array, "n nx"]
    origin: Float[Array, " nz"]
    """Mean of the states and controls of the first rollout."""


def nothing_seen(nx: int, nu: int, dtype: Any, products: bool) -> Sums:
    """Before the first rollout."""
    nz = nx + nu
    n = nz + 1 + (nz * (nz + 1) // 2 if products else 0)
    return Sums(jnp.zeros((n, n), dtype), jnp.zeros((n, nx), dtype), jnp.zeros(nz, dtype))


def seen(sums: Sums, model: Callable, rollout: Rollout, fine: Array) -> Sums:
    """One more rollout; nothing of one that is not `fine`, or where the model is not finite."""
    xs, us = rollout.xs, rollout.us
    errors = xs[1:] - jax.vmap(model)(xs[:-1], us, jnp.arange(us.shape[0]))
    z = jnp.concatenate([xs[:-1], us], 1)
    origin = jnp.where(sums.ff[-1, -1] > 0, sums.origin, jnp.mean(z, 0))
    features = _features(z - origin, sums.ff.shape[0] > z.shape[1] + 1)
    more = Sums(sums.ff + features.T @ features, sums.fe + features.T @ errors, origin)
    fine = fine & jnp.all(jnp.isfinite(more.ff)) & jnp.all(jnp.isfinite(more.fe))
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), more, sums)


def lacking(sums: Sums, ridge: float) -> Change:
    """By ridge regression, every feature in units of its spread; nothing for `ridge` = 0."""
    ff, fe, origin = sums
    nz, nx = origin.size, fe.shape[1]
    count = jnp.maximum(ff[-1, -1], 1.0)
    mean = ff[:-1, -1] / count
    spread = ff[:-1, :-1] / count - jnp.outer(mean, mean)
    cross = fe[:-1] / count - jnp.outer(mean, fe[-1] / count)
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(spread), 0.0))
    unit = jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), 0.0)
    matrix = unit[:, None] * spread * unit + max(ridge, 1e-12) * jnp.eye(size.size, dtype=size.dtype)
    found = unit[:, None] * jnp.linalg.solve(matrix, unit[:, None] * cross)
    found = found if ridge > 0 else jnp.zeros_like(found)
    bent = jnp.zeros((nz, nz, nx), found.dtype)
    if found.shape[0] > nz:
        i, j = np.tril_indices(nz)
        bent = bent.at[i, j].add(found[nz:]).at[j, i].add(found[nz:])
    return Change(found[:nz], bent, origin)


def _features(z: Array, products: bool) -> Float[Array, "T n"]:
    i, j = np.tril_indices(z.shape[1] if products else 0)
    return jnp.concatenate([z, z[:, i] * z[:, j], jnp.ones_like(z[:, :1])], 1)
