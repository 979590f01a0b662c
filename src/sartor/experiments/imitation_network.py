"""The network that imitation is compared with: an LSTM from the initial state to the plan, its own output fed back.

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.3, sizes from its code.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sartor.imitate import Demonstrations

_WIDTH = 256


class Planner(eqx.Module):
    """u_k = decode(h_k),   h_k = LSTM([embed(x_0), embed(u_{k-1})], h_{k-1}),   u_{-1} = 0."""

    state: eqx.nn.MLP
    control: eqx.nn.MLP
    cell: eqx.nn.LSTMCell
    decoder: eqx.nn.MLP

    def __init__(self, nx: int, *, nu: int = 1, key: Array):
        keys = jax.random.split(key, 4)
        embed = lambda size, key: eqx.nn.MLP(size, _WIDTH, _WIDTH, depth=2, key=key, dtype=jnp.float32)
        self.state, self.control = embed(nx, keys[0]), embed(nu, keys[1])
        self.cell = eqx.nn.LSTMCell(2 * _WIDTH, _WIDTH, key=keys[2], dtype=jnp.float32)
        self.decoder = eqx.nn.MLP(_WIDTH, nu, _WIDTH, depth=2, key=keys[3], dtype=jnp.float32)

    def __call__(self, x0: Float[Array, " nx"], num_controls: int) -> Float[Array, "N nu"]:
        """The plan."""
        embedded, zero = self.state(x0), jnp.zeros(_WIDTH, jnp.float32)

        def advance(carry, _):
            u, hidden = carry
            hidden = self.cell(jnp.concatenate([embedded, self.control(u)]), hidden)
            u = self.decoder(hidden[0])
            return (u, hidden), u

        begin = (jnp.zeros(self.decoder.out_size, jnp.float32), (zero, zero))
        return jax.lax.scan(advance, begin, length=num_controls)[1]


class Plans(eqx.Module):
    """The residual of a `Planner`: û - u, over the root of their number."""

    @property
    def settings(self) -> tuple:
        """None."""
        return ()

    def begin(self, theta: PyTree, data: Demonstrations) -> Array:
        """No memory."""
        return jnp.zeros(data.us.shape[0])

    def residual(self, theta: Planner, sample: Demonstrations, memory: Array) -> tuple[Array, Array, Array]:
        """Of one demonstration."""
        errors = theta(sample.xs[0], sample.us.shape[0]) - sample.us
        return errors.ravel() / errors.size**0.5, jnp.asarray(True), memory
