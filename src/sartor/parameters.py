"""Parameters that are positive or bounded: written as a free number behind a transform, so that no step leaves them.

positive:  value = exp(raw)                                    a step of 0.01 in raw changes the value by 1 %
bounded:   value = low + (high - low) σ(raw),  σ(raw) = 1/(1 + e^-raw)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

Where = Callable[[PyTree], Any]
"""where(theta) -> a leaf or several, as `equinox.tree_at` takes it."""


class Positive(eqx.Module):
    """A parameter above zero; `positive` makes one."""

    raw: Float[Array, "*shape"]
    """log of the value."""

    @property
    def value(self) -> Float[Array, "*shape"]:
        """exp(raw)."""
        return jnp.exp(self.raw)


class Bounded(eqx.Module):
    """A parameter between two numbers; `bounded` makes one."""

    raw: Float[Array, "*shape"]
    """logit of where the value lies between the bounds."""
    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    @property
    def value(self) -> Float[Array, "*shape"]:
        """low + (high - low) σ(raw)."""
        return self.low + (self.high - self.low) * jax.nn.sigmoid(self.raw)


def positive(value: Any) -> Positive:
    """A positive parameter, for θ.

    Args:
        value: Where it begins: a number or an array, all above zero.

    Returns: the parameter; `values` gives the number back.
    Fails: `ValueError` for a value that is not positive.
    """
    value = _floating(value)
    if not np.all(np.asarray(value) > 0):
        raise ValueError(f"value must be positive, not {value}.")
    return Positive(jnp.log(value))


def bounded(value: Any, low: float, high: float) -> Bounded:
    """A parameter that stays between two numbers, for θ.

    Args:
        value: Where it begins: a number or an array, all inside.
        low: Lower bound, excluded.
        high: Upper bound, excluded.

    Returns: the parameter; `values` gives the number back.
    Fails: `ValueError` for a value outside, or bounds that are not finite or not in order.
    """
    value = _floating(value)
    if not (low < high and np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"low and high must be finite, low below high, not {low} and {high}.")
    if not np.all((np.asarray(value) > low) & (np.asarray(value) < high)):
        raise ValueError(f"value must lie between low = {low} and high = {high}, not at {value}.")
    share = (value - low) / (high - low)
    return Bounded(jnp.log(share) - jnp.log1p(-share), float(low), float(high))


def values(theta: PyTree) -> PyTree:
    """Plain numbers and arrays in the places of `positive` and `bounded` parameters.

    Args:
        theta: Any pytree.

    Returns: the same tree otherwise.
    Gradients: of the transforms.
    """
    wrapped = lambda leaf: isinstance(leaf, Positive | Bounded)
    return jax.tree.map(lambda leaf: leaf.value if wrapped(leaf) else leaf, theta, is_leaf=wrapped)


def selected(theta: PyTree, where: Where | None) -> PyTree:
    """Which leaves learn, as a tree of bools; all floating-point arrays without `where`."""
    if where is None:
        every = jax.tree.map(eqx.is_inexact_array, theta)
        if not any(jax.tree.leaves(every)):
            raise ValueError("theta has no floating-point leaves to learn.")
        return every
    chosen = jax.tree.leaves(where(theta))
    if not chosen or not all(map(eqx.is_inexact_array, chosen)):
        raise ValueError("learn must name floating-point leaves of theta, as lambda theta: (theta.m, theta.l).")
    none = jax.tree.map(lambda _: False, theta)
    return eqx.tree_at(where, none, replace_fn=lambda part: jax.tree.map(lambda _: True, part))


def _floating(value: Any) -> Array:
    value = jnp.asarray(value)
    return value.astype(jnp.result_type(value, float))
