"""What a model lacks, told by the rollouts of the plant so far: ridge regression of its errors.

    e_t = x_{t+1} - f(x_t, u_t) ≈ A x_t + B u_t + constant                                                       (D21)

Directions that no rollout has excited keep the model's Jacobian.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.policy_gradient import Rollout
from sartor.tuning import Change


class Sums(NamedTuple):
    """Over all transitions: of z = (x, u, 1), and of z with the errors."""

    zz: Float[Array, "n n"]
    ze: Float[Array, "n nx"]


def nothing_seen(nx: int, nu: int, dtype: Any) -> Sums:
    """Before the first rollout."""
    n = nx + nu + 1
    return Sums(jnp.zeros((n, n), dtype), jnp.zeros((n, nx), dtype))


def seen(sums: Sums, model: Callable, rollout: Rollout, fine: Array) -> Sums:
    """One more rollout; nothing of one that is not `fine`."""
    xs, us = jnp.where(fine, rollout.xs, 0.0), jnp.where(fine, rollout.us, 0.0)
    errors = xs[1:] - jax.vmap(model)(xs[:-1], us, jnp.arange(us.shape[0]))
    z = jnp.concatenate([xs[:-1], us, jnp.ones_like(us[:, :1])], 1)
    weight = jnp.where(fine, 1.0, 0.0)
    return Sums(sums.zz + weight * z.T @ z, sums.ze + weight * z.T @ errors)


def lacking(sums: Sums, ridge: float) -> Change:
    """A and B by ridge regression on states and controls, each in units of its spread; nothing for `ridge` = 0."""
    zz, ze = sums
    nx = ze.shape[1]
    count = jnp.maximum(zz[-1, -1], 1.0)
    mean = zz[:-1, -1] / count
    spread = zz[:-1, :-1] / count - jnp.outer(mean, mean)
    cross = ze[:-1] / count - jnp.outer(mean, ze[-1] / count)
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(spread), 0.0))
    unit = jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), 0.0)
    matrix = unit[:, None] * spread * unit + max(ridge, 1e-12) * jnp.eye(size.size, dtype=size.dtype)
    slopes = unit[:, None] * jnp.linalg.solve(matrix, unit[:, None] * cross)
    slopes = slopes if ridge > 0 else jnp.zeros_like(slopes)
    return Change(slopes[:nx].T, slopes[nx:].T)
