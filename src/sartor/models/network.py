"""Perceptrons of the joint positions, with their first and second derivatives written out layer by layer."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_DIAGONAL_SHIFT = 0.1


class Network(eqx.Module):
    """A perceptron with tanh layers and a linear last one."""

    layers: tuple[eqx.nn.Linear, ...]
    """First to last."""

    def __init__(self, sizes: tuple[int, ...], key: Array):
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = tuple(_xavier(m, n, k) for m, n, k in zip(sizes[:-1], sizes[1:], keys, strict=True))

    def __call__(self, a: Float[Array, " n_in"]) -> Float[Array, " n_out"]:
        """The output for the input a."""
        for layer in self.layers[:-1]:
            a = jnp.tanh(layer(a))
        return self.layers[-1](a)


class Expansion(NamedTuple):
    """A network of (cos q, sin q, z) to second order in q."""

    value: Float[Array, " m"]
    jacobian: Float[Array, "n m"]
    """Transposed: row k is the derivative in q_k."""
    rate: Float[Array, "n m"]
    """Derivative of the Jacobian along q̇."""
    hessian: Callable
    """hessian(c): that of c · value in q, (n, n)."""


def expand_network(layers: tuple, q: Array, qd: Array, z: Array, split: int = 0) -> Expansion:
    """Value and derivatives, layer by layer; the first `split` outputs pass the softplus of `_entries`.

    A layer t = W h + b, h' = s(t) has  J' = s' ∘ (W J)  and, along q̇,  Ė' = s'' ∘ (W J q̇) ∘ (W J) + s' ∘ (W Ė).
    Rows belong to joints, so that products with W are one product for a whole batch.
    """
    n, cos, sin = q.shape[0], jnp.cos(q), jnp.sin(q)
    h, seen = jnp.concatenate([cos, sin, z]), []
    in_cos, in_sin = layers[0].weight[:, :n].T, layers[0].weight[:, n : 2 * n].T
    J = cos[:, None] * in_sin - sin[:, None] * in_cos
    E = -qd[:, None] * (cos[:, None] * in_cos + sin[:, None] * in_sin)
    for i, layer in enumerate(layers):
        h = layer(h)
        if i > 0:
            J, E = J @ layer.weight.T, E @ layer.weight.T
        if i < len(layers) - 1:
            h = jnp.tanh(h)
            first = 1.0 - h * h
            second = -2.0 * h * first
        elif split:
            gate = jax.nn.sigmoid(h[:split])
            rest = jnp.ones_like(h[split:])
            h = entries_of(h, split)
            first = jnp.concatenate([gate, rest])
            second = jnp.concatenate([gate * (1.0 - gate), 0.0 * rest])
        else:
            first, second = jnp.ones_like(h), jnp.zeros_like(h)
        seen.append((layer.weight, J, first, second))
        J, E = first * J, second * (qd @ J) * J + first * E

    def hessian(c: Array) -> Array:
        H = jnp.zeros((n, n), q.dtype)
        for weight, before, first, second in reversed(seen):
            H = H + (c * second * before) @ before.T
            c = (c * first) @ weight
        return H - jnp.asarray(np.eye(n), q.dtype) * (c[:n] * cos + c[n : 2 * n] * sin)

    return Expansion(h, J, E, hessian)


def entries_of(y: Array, n: int) -> Array:
    """Entries of L from the output of the network: those of the diagonal are positive."""
    return jnp.concatenate([jax.nn.softplus(y[:n]) + _DIAGONAL_SHIFT, y[n:]])


def _xavier(num_in: int, num_out: int, key: Array) -> eqx.nn.Linear:
    bound = np.sqrt(6.0 / (num_in + num_out))
    linear = eqx.nn.Linear(num_in, num_out, key=key)
    weight = jax.random.uniform(key, linear.weight.shape, linear.weight.dtype, -bound, bound)
    bias = jnp.full((num_out,), 0.01, linear.weight.dtype)
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), linear, (weight, bias))
