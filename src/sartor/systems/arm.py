"""Any robot arm that follows a reference in its joints.

    J = Σ_k dt/2 [(x_k - r_k)ᵀQ(x_k - r_k) + u_kᵀR u_k] + ½ (x_N - r_N)ᵀQ(x_N - r_N),   u_min ≤ u_k ≤ u_max

with x = [q, q̇], diagonal Q and R, and `theta.reference` the rows r_0 to r_N.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.problem import Problem

State = Float[Array, " nx"]
Control = Float[Array, " nu"]
Scalar = Float[Array, ""]


class Theta(Protocol):
    """What the cost needs of θ; all else in it belongs to the dynamics."""

    @property
    def reference(self) -> Float[Array, "N_plus_1 nx"]:
        """States [q, q̇] to be at, stages 0 to N."""
        ...


class Cost(eqx.Module):
    """The cost of following a reference; equal for equal numbers, so that compiled code is reused."""

    Q: tuple[float, ...] = eqx.field(static=True)
    """Weights of [q, q̇]."""
    R: tuple[float, ...] = eqx.field(static=True)
    """Weights of the controls."""
    dt: float = eqx.field(static=True)
    """Time step [s]."""
    horizon: int = eqx.field(static=True)
    """N."""

    def __call__(self, x: State, u: Control, k: Any, theta: Theta) -> Scalar:
        """ℓ(x, u, k, θ)."""
        effort = jnp.sum(jnp.asarray(self.R, x.dtype) * u**2)
        return 0.5 * self.dt * (self._error(x, theta.reference[k]) + effort)

    def terminal(self, x: State, theta: Theta) -> Scalar:
        """ℓ_N(x, θ)."""
        if theta.reference.shape != (self.horizon + 1, len(self.Q)):  # JAX would take the last row there is
            shape = (self.horizon + 1, len(self.Q))
            raise ValueError(f"theta.reference must have shape {shape}, not {theta.reference.shape}.")
        return 0.5 * self._error(x, theta.reference[self.horizon])

    def _error(self, x: State, r: State) -> Scalar:
        return jnp.sum(jnp.asarray(self.Q, x.dtype) * (x - r) ** 2)


def problem(
    dynamics: Callable, *, Q: Sequence[float], R: Sequence[float], u_min: Any, u_max: Any, dt: float, horizon: int
) -> Problem:
    """The optimal control problem over `horizon` stages.

    Args:
        dynamics: dynamics(x, u, k, theta) -> x_next, the model, such as `ArmDynamics(dt)`.
        Q: Weights of [q, q̇], (2n,).
        R: Weights of the controls, (n,).
        u_min: Lower limits of the controls [Nm or N], (n,).
        u_max: Upper limits.
        dt: Time step [s].
        horizon: N; theta.reference has N + 1 rows.

    Fails: `ValueError` for weights of the wrong number or sign.
    """
    n = len(R)
    for name, values, count in (("Q", Q, 2 * n), ("R", R, n)):
        if len(values) != count or min(values) < 0:
            raise ValueError(f"{name} must hold {count} weights ≥ 0, not {tuple(values)}.")
    cost = Cost(tuple(map(float, Q)), tuple(map(float, R)), float(dt), horizon)
    return Problem(
        dynamics=dynamics, stage_cost=cost, terminal_cost=cost.terminal, horizon=horizon, u_min=u_min, u_max=u_max
    )
