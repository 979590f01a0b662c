"""CaDeLaC: a Lagrangian residual on a nominal robot that knows its payload from the past.

    L_res = ½ q̇ᵀ H(q, z) q̇ - P(q, z),   H = L Lᵀ,   diag L > 0.1,   z = LSTM(history)
    residual = H q̈ + Ḣ q̇ - ∂/∂q (½ q̇ᵀ H q̇) + ∂P/∂q                                                        (D14)

so whatever the networks say, the residual is that of a mechanical system: inertia positive definite, energy conserved.

References: Schulze, Peters and Arenz, Context-Aware Deep Lagrangian Networks for Model Predictive Control, 2025 (the
sizes and initial values are those of its authors' code); Lutter, Ritter and Peters, Deep Lagrangian Networks, 2019.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.models.base import AbstractModel
from sartor.models.links import RigidBody
from sartor.models.network import Expansion, Network, entries_of, expand_network
from sartor.models.torque_derivatives import TorqueHessian


class Encoder(eqx.Module):
    """z = W h + b with h the last output of a stack of LSTMs over the history."""

    cells: tuple[eqx.nn.LSTMCell, ...]
    """From the first layer, which sees the history, to the last."""
    readout: eqx.nn.Linear
    """From the last output to z."""

    def __init__(self, num_inputs: int, hidden: int, num_layers: int, num_contexts: int, key: Array):
        keys = jax.random.split(key, num_layers + 1)
        sizes = [num_inputs] + [hidden] * (num_layers - 1)
        self.cells = tuple(eqx.nn.LSTMCell(size, hidden, key=k) for size, k in zip(sizes, keys[1:], strict=True))
        self.readout = eqx.nn.Linear(hidden, num_contexts, key=keys[0])

    def __call__(self, history: Float[Array, "H 3*n"]) -> Float[Array, " nz"]:
        """z of a history."""
        zero = jnp.zeros(self.cells[0].hidden_size, history.dtype)

        def advance(states, row):
            new = []
            for cell, state in zip(self.cells, states, strict=True):
                new.append(cell(row, state))
                row = new[-1][0]
            return tuple(new), None

        states, _ = jax.lax.scan(advance, tuple((zero, zero) for _ in self.cells), history)
        return self.readout(states[-1][0])


def check_sizes(widths: tuple[int, ...], num_contexts: int, hidden: int, num_layers: int, history_length: int) -> None:
    """Raise a `ValueError` for sizes that no model can have."""
    sizes = {"widths": min(widths, default=1), "num_contexts": num_contexts, "hidden": hidden}
    for name, value in {**sizes, "num_layers": num_layers, "history_length": history_length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")


class CaDeLaC(AbstractModel):
    """A Lagrangian residual (D14) on a nominal robot; the sizes published are the defaults.

    References: see the module.
    """

    body: RigidBody
    """The nominal robot; never trained."""
    encoder: Encoder
    """History to context."""
    inertia: Network
    """(cos q, sin q, z) to the entries of L: the diagonal, then row by row what is below it."""
    potential: Network
    """(cos q, sin q, z) to P."""
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
        """A new model with random parameters.

        Args:
            body: The nominal robot.
            widths: Of the tanh layers of both networks.
            num_contexts: Size of z.
            hidden: Size of the LSTMs.
            num_layers: Number of LSTMs on top of each other.
            history_length: Number of past intervals that the LSTM sees.
            key: Random key of the initial parameters.
        """
        check_sizes(widths, num_contexts, hidden, num_layers, history_length)
        n, keys = body.nq, jax.random.split(key, 3)
        self.body = body
        self.encoder = Encoder(3 * n, hidden, num_layers, num_contexts, keys[0])
        self.inertia = Network((2 * n + num_contexts, *widths, n * (n + 1) // 2), keys[1])
        self.potential = Network((2 * n + num_contexts, *widths, 1), keys[2])
        self.history_length = history_length

    def context(self, history: Float[Array, "H 3*n"]) -> Float[Array, " nz"]:
        """z = LSTM(history)."""
        return self.encoder(history)

    def residual_mass(self, q: Float[Array, " n"], z: Float[Array, " nz"]) -> Float[Array, "n n"]:
        """H(q, z)."""
        L = self._factor(q, z)
        return L @ L.T

    def residual(self, q: Array, qd: Array, qdd: Array, z: Array) -> Float[Array, " n"]:
        """The equation of motion (D14) of the residual."""
        return _residual(q, qd, qdd, (self.inertia, self.potential, z))

    def power(self, q: Array, qd: Array, qdd: Array, z: Array, sigma: Array) -> Float[Array, ""]:
        """σᵀ residual, without the derivatives that are written out: those would be computed and transposed."""
        return sigma @ _plain_residual(q, qd, qdd, (self.inertia, self.potential, z))

    def residual_jacobian(self, q: Array, qd: Array, qdd: Array, z: Array) -> tuple[Array, Array]:
        """Jacobians of the residual in q and q̇, by the formulas of (D14)."""
        by_q, by_qd, _ = _partials(q, qd, qdd, (self.inertia, self.potential, z))
        return by_q.T, by_qd.T

    def residual_hessian(self, q: Array, qd: Array, qdd: Array, z: Array, sigma: Array) -> TorqueHessian:
        """Second derivatives of σᵀ residual, by the formulas of (D14)."""
        return _second_partials(q, qd, qdd, sigma, (self.inertia, self.potential, z))

    def _factor(self, q: Array, z: Array) -> Array:
        """L."""
        return _lower(entries_of(self.inertia(_features(q, z)), q.shape[0]))


@eqx.filter_custom_jvp
def _residual(q: Array, qd: Array, qdd: Array, networks: tuple) -> Array:
    """(D14); its derivatives in q, q̇, q̈ are written out, which is several times cheaper than differentiating it."""
    return _plain_residual(q, qd, qdd, networks)


def _plain_residual(q: Array, qd: Array, qdd: Array, networks: tuple) -> Array:
    inertia, potential, z = networks
    n = q.shape[0]
    l, l_dot = jax.jvp(lambda q: entries_of(inertia(_features(q, z)), n), (q,), (qd,))
    v = _transposed_times(l, qd)  # ½ q̇ᵀ H q̇ = ½ |v|²
    momentum_rate = _times(l, _transposed_times(l, qdd) + _transposed_times(l_dot, qd)) + _times(l_dot, v)
    slope = _row(qd) * _column(v)  # of ½ |v|² in the entries of L

    def lagrangian(q):
        a = _features(q, z)
        return entries_of(inertia(a), n) @ slope - potential(a)[0]

    return momentum_rate - jax.grad(lagrangian)(q)


@_residual.def_jvp
def _residual_jvp(primals, tangents):
    q, qd, qdd, networks = primals
    partials = _partials(q, qd, qdd, networks)
    tangent = sum(d @ J for J, d in zip(partials, tangents[:3], strict=True) if d is not None)
    perturbed, fixed = eqx.partition(networks, jax.tree.map(lambda d: d is not None, tangents[3], is_leaf=_is_none))
    if jax.tree.leaves(perturbed):
        fn = lambda part: _plain_residual(q, qd, qdd, eqx.combine(part, fixed))
        tangent = tangent + jax.jvp(fn, (perturbed,), (tangents[3],))[1]
    return _residual(q, qd, qdd, networks), tangent


def _partials(q: Array, qd: Array, qdd: Array, networks: tuple) -> tuple[Array, Array, Array]:
    """Derivatives of (D14) in q, q̇, q̈, transposed: row k is ∂/∂q_k. With l the entries of L and Lᵀq̇ = v,

    ∂(H q̇)/∂q_k = L_k v + L (L_kᵀ q̇),   L_k = ∂L/∂q_k.
    """
    inertia, potential, z = networks
    net, energy = expand_network(inertia.layers, q, qd, z, split=q.shape[0]), expand_network(potential.layers, q, qd, z)
    l, J, E = net.value, net.jacobian, net.rate
    l_dot = qd @ J
    v, J_qd = _transposed_times(l, qd), _transposed_times(J, qd)
    force = _transposed_times(l, qdd) + _transposed_times(l_dot, qd)
    pull = _transposed_times(J, qdd) + _transposed_times(E, qd)
    moved = _moved(net, qd)
    # Sums of L x over several pairs (L, x): only the entries of each.
    forced = _row_sums(J * _column(force) + l * _column(pull) + E * _column(v) + l_dot * _column(J_qd))
    L, L_dot = _lower(l), _lower(l_dot)
    H_dot = L_dot @ L.T
    return forced - _energy_hessian(net, energy, qd), H_dot + H_dot.T + moved - moved.T, L @ L.T


def _second_partials(q: Array, qd: Array, qdd: Array, sigma: Array, networks: tuple) -> TorqueHessian:
    """Second derivatives of σᵀ times (D14). With T(a, b) = aᵀH b and D_v the derivative in q along a fixed v,

        σᵀ residual = T(σ, q̈) + D_q̇ T(σ, q̇) - D_σ (½ T(q̇, q̇) - P),

    so that forms T and their first two derivatives in q, differentiated along q̇ and along σ, are all there is.
    """
    inertia, potential, z = networks
    expand = lambda q: expand_network(inertia.layers, q, qd, z, split=q.shape[0])

    def along_qd(q):
        net = expand(q)
        rest = _form_hessian(net, sigma, qdd), net.value, sigma @ net.jacobian
        return (_form_hessian(net, sigma, qd), _moved(net, sigma)), rest

    def along_sigma(q):
        net, energy = expand(q), expand_network(potential.layers, q, qd, z)
        return _energy_hessian(net, energy, qd), _moved(net, qd)

    (form, moved), (form_rate, moved_rate), rest = jax.jvp(along_qd, (q,), (qd,), has_aux=True)
    _, (energy_slope, moved_slope) = jax.jvp(along_sigma, (q,), (sigma,))
    pull, l, l_sigma = rest
    H_sigma = _lower(l) @ _lower(l_sigma).T
    return TorqueHessian(
        q_q=pull + form_rate - energy_slope,
        q_qd=moved_rate + form - moved_slope,
        q_qdd=moved,
        qd_qd=moved + moved.T - H_sigma - H_sigma.T,
    )


def _energy_hessian(net: Expansion, energy: Expansion, qd: Array) -> Float[Array, "n n"]:
    """Second derivatives of ½ q̇ᵀH q̇ - P in q."""
    return 0.5 * _form_hessian(net, qd, qd) - energy.hessian(jnp.ones(1, qd.dtype))


def _form_hessian(net: Expansion, a: Array, b: Array) -> Float[Array, "n n"]:
    """Second derivatives of aᵀH b in q."""
    l, J = net.value, net.jacobian
    slope = _row(a) * _column(_transposed_times(l, b)) + _row(b) * _column(_transposed_times(l, a))
    mixed = _transposed_times(J, a) @ _transposed_times(J, b).T
    return net.hessian(slope) + mixed + mixed.T


def _moved(net: Expansion, a: Array) -> Float[Array, "n n"]:
    """Row k: ∂H/∂q_k a."""
    l, J = net.value, net.jacobian
    return _row_sums(J * _column(_transposed_times(l, a)) + l * _column(_transposed_times(J, a)))


def _lower(entries: Array) -> Array:
    """L (n, n) from its entries (m,)."""
    rows, columns = _places(entries.shape[0])
    return (entries[:, None] * jnp.asarray(rows, entries.dtype)).T @ jnp.asarray(columns, entries.dtype)


def _times(entries: Array, x: Array) -> Array:
    """L x."""
    return _row_sums(entries * _column(x))


def _transposed_times(entries: Array, x: Array) -> Array:
    """Lᵀ x."""
    return entries * _row(x) @ jnp.asarray(_places(entries.shape[-1])[1], entries.dtype)


def _row_sums(entries: Array) -> Array:
    return entries @ jnp.asarray(_places(entries.shape[-1])[0], entries.dtype)


def _row(x: Array) -> Array:
    """x_i for each entry L_ij."""
    n = x.shape[-1]
    return x @ jnp.asarray(_places(n * (n + 1) // 2)[0].T, x.dtype)


def _column(x: Array) -> Array:
    """x_j for each entry L_ij."""
    n = x.shape[-1]
    return x @ jnp.asarray(_places(n * (n + 1) // 2)[1].T, x.dtype)


def _features(q: Array, z: Array) -> Array:
    return jnp.concatenate([jnp.cos(q), jnp.sin(q), z])


def _places(m: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each of the m entries of L, as 0/1 matrices (m, n)."""
    n = int(np.sqrt(2 * m))
    one_hot = lambda part: np.eye(n)[np.concatenate([np.arange(n), part])]
    rows, columns = np.tril_indices(n, -1)
    return one_hot(rows), one_hot(columns)


def _is_none(leaf: Any) -> bool:
    return leaf is None
