"""Swing-up of a pole on a cart.

    x = [p, v, cos φ, sin φ, ω],  p in [m], v in [m/s], φ = 0 upright, ω in [rad/s]
    u = force in [N], |u| ≤ 100
    a = (u + m_p l ω² sin φ)/(m_c + m_p),   α = (g sin φ - a cos φ)/(l (4/3 - m_p cos²φ/(m_c + m_p))),
    v' = a - m_p l α cos φ/(m_c + m_p),   p' = v,   φ' = ω,   ω' = α     (explicit Euler, l half the pole)
    ℓ = ½ xᵀdiag(0.1, 0.1, 1, 1, 0.1)x - cos φ + ½ 0.001 u²,   ℓ_N the same without u

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.3, and its code;
the equations of motion are those of Barto, Sutton and Anderson, 1983, without friction.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.problem import Problem

State = Float[Array, "5"]
Control = Float[Array, "1"]
Scalar = Float[Array, ""]

DT = 0.05  # [s]
STATES = ("p [m]", "v [m/s]", "cos φ [-]", "sin φ [-]", "ω [rad/s]")
CONTROLS = ("force [N]",)
WEIGHTS = (0.1, 0.1, 1.0, 1.0, 0.1)
PENALTY = 0.001


class Theta(NamedTuple):
    """Parameters of the dynamics; `Theta(*p)` from a vector (4,)."""

    g: Any  # gravity [m/s²]
    m_cart: Any  # [kg]
    m_pole: Any  # [kg]
    l: Any  # half the length of the pole [m]


def default_theta(dtype: Any = None) -> Theta:
    """The true parameters: g = 9.8, m_cart = 1, m_pole = 0.1, l = 0.5."""
    return Theta(*jnp.asarray([9.8, 1.0, 0.1, 0.5], dtype))


def dynamics(x: State, u: Control, k: Any, theta: Theta, dt: float = DT) -> State:
    """The step above."""
    p, v, cos, sin, rate = x
    m, ml = theta.m_cart + theta.m_pole, theta.m_pole * theta.l
    push = (u[0] + ml * rate**2 * sin) / m
    rate_dot = (theta.g * sin - push * cos) / (theta.l * (4.0 / 3.0 - theta.m_pole * cos**2 / m))
    v_dot = push - ml * rate_dot * cos / m
    angle = jnp.arctan2(sin, cos) + dt * rate
    return jnp.stack([p + dt * v, v + dt * v_dot, jnp.cos(angle), jnp.sin(angle), rate + dt * rate_dot])


plant_step = dynamics  # the true system


def stage_cost(x: State, u: Control, k: Any, theta: Theta) -> Scalar:
    """ℓ(x, u)."""
    return terminal_cost(x, theta) + 0.5 * PENALTY * u[0] ** 2


def terminal_cost(x: State, theta: Theta) -> Scalar:
    """ℓ_N(x)."""
    return 0.5 * jnp.sum(jnp.asarray(WEIGHTS, x.dtype) * x**2) - WEIGHTS[2] * x[2]


def problem(horizon: int = 25, *, dt: float = DT, u_max: float = 100.0) -> Problem:
    """The optimal control problem over `horizon` stages of `dt` [s], with |force| ≤ `u_max` [N]."""
    return Problem(
        dynamics=eqx.Partial(dynamics, dt=dt),
        stage_cost=stage_cost,
        terminal_cost=terminal_cost,
        horizon=horizon,
        u_min=[-u_max],
        u_max=[u_max],
    )


def goal(theta: Theta) -> State:
    """The pole upright, the cart in the middle, both at rest."""
    return jnp.asarray([0.0, 0.0, 1.0, 0.0, 0.0], jnp.result_type(theta.g))


def sample_x0(key: Array, dtype: Any = None) -> State:
    """p ~ U(-0.5, 0.5) m, v ~ U(-0.5, 0.5) m/s, φ ~ U(-π, π), ω ~ U(-1, 1) rad/s."""
    p, v, angle, rate = jax.random.uniform(key, (4,), dtype, -1.0, 1.0)
    return jnp.stack([0.5 * p, 0.5 * v, jnp.cos(jnp.pi * angle), jnp.sin(jnp.pi * angle), rate])
