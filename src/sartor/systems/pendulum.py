"""Swing-up of a pendulum with a weak motor.

    x = [cos φ, sin φ, ω],  φ = 0 upright, ω in [rad/s];   u = torque in [Nm], |u| ≤ 2
    ω⁺ = ω + dt (3g/(2l) sin φ + 3u/(m l²)),   φ⁺ = atan2(sin φ, cos φ) + dt ω⁺     (semi-implicit Euler)
    ℓ = ½ xᵀdiag(1, 1, 0.1)x - cos φ + ½ 0.001 u²,   ℓ_N the same without u

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.3, and its code.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.problem import Problem

State = Float[Array, "3"]
Control = Float[Array, "1"]
Scalar = Float[Array, ""]

DT = 0.05  # [s]
STATES = ("cos φ [-]", "sin φ [-]", "ω [rad/s]")
CONTROLS = ("torque [Nm]",)
WEIGHTS = (1.0, 1.0, 0.1)
PENALTY = 0.001


class Theta(NamedTuple):
    """Parameters of the dynamics; `Theta(*p)` from a vector (3,)."""

    g: Any  # gravity [m/s²]
    m: Any  # mass [kg]
    l: Any  # length [m]


def default_theta(dtype: Any = None) -> Theta:
    """The true parameters: g = 10, m = 1, l = 1."""
    return Theta(*jnp.asarray([10.0, 1.0, 1.0], dtype))


def dynamics(x: State, u: Control, k: Any, theta: Theta, dt: float = DT) -> State:
    """The step above."""
    rate = x[2] + dt * (1.5 * theta.g / theta.l * x[1] + 3.0 * u[0] / (theta.m * theta.l**2))
    angle = jnp.arctan2(x[1], x[0]) + dt * rate
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), rate])


plant_step = dynamics  # the true system


def stage_cost(x: State, u: Control, k: Any, theta: Theta) -> Scalar:
    """ℓ(x, u)."""
    return terminal_cost(x, theta) + 0.5 * PENALTY * u[0] ** 2


def terminal_cost(x: State, theta: Theta) -> Scalar:
    """ℓ_N(x)."""
    return 0.5 * jnp.sum(jnp.asarray(WEIGHTS, x.dtype) * x**2) - WEIGHTS[0] * x[0]


def problem(horizon: int = 20, *, dt: float = DT, u_max: float = 2.0) -> Problem:
    """The optimal control problem over `horizon` stages of `dt` [s], with |torque| ≤ `u_max` [Nm]."""
    return Problem(
        dynamics=eqx.Partial(dynamics, dt=dt),
        stage_cost=stage_cost,
        terminal_cost=terminal_cost,
        horizon=horizon,
        u_min=[-u_max],
        u_max=[u_max],
    )


def goal(theta: Theta) -> State:
    """Upright and at rest."""
    return jnp.asarray([1.0, 0.0, 0.0], jnp.result_type(theta.g))


def sample_x0(key: Array, dtype: Any = None) -> State:
    """φ ~ U(-π, π), ω ~ U(-1, 1) rad/s."""
    angle, rate = jax.random.uniform(key, (2,), dtype, -1.0, 1.0)
    return jnp.stack([jnp.cos(jnp.pi * angle), jnp.sin(jnp.pi * angle), rate])
