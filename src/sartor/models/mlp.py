"""A plain residual on a nominal robot: torques from a perceptron, without the structure of mechanics.

residual = MLP(cos q, sin q, q̇, z),   z = LSTM(history)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.models.base import AbstractModel
from sartor.models.lagrangian import Encoder, check_sizes
from sartor.models.links import RigidBody
from sartor.models.network import Network


class ResidualMLP(AbstractModel):
    """Torques of a perceptron on top of a nominal robot. It can learn damping, which a `CaDeLaC` cannot, and it need
    not conserve energy."""

    body: RigidBody
    """The nominal robot; never trained."""
    encoder: Encoder
    """History to context."""
    network: Network
    """(cos q, sin q, q̇, z) to torques."""
    history_length: int = eqx.field(static=True)
    """Intervals of the history."""

    def __init__(
        self,
        body: RigidBody,
        *,
        widths: tuple[int, ...] = (30, 20),
        num_contexts: int = 10,
        hidden: int = 10,
        num_layers: int = 5,
        history_length: int = 15,
        key: Array,
    ):
        """A new model with random parameters; the arguments are those of `CaDeLaC`."""
        check_sizes(widths, num_contexts, hidden, num_layers, history_length)
        n, keys = body.nq, jax.random.split(key)
        self.body = body
        self.encoder = Encoder(3 * n, hidden, num_layers, num_contexts, keys[0])
        self.network = Network((3 * n + num_contexts, *widths, n), keys[1])
        self.history_length = history_length

    def context(self, history: Float[Array, "H 3*n"]) -> Float[Array, " nz"]:
        """z = LSTM(history)."""
        return self.encoder(history)

    def residual(self, q: Array, qd: Array, qdd: Array, z: Array) -> Float[Array, " n"]:
        """Torques of the perceptron; q̈ does not matter."""
        return self.network(jnp.concatenate([jnp.cos(q), jnp.sin(q), qd, z]))

    def residual_mass(self, q: Array, z: Array) -> Float[Array, "n n"]:
        """Zero."""
        return jnp.zeros((q.shape[0], q.shape[0]), q.dtype)
