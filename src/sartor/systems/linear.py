"""Random linear systems with bounded controls: a convex problem with bounds active at most stages.

    x_{k+1} = A x_k + B u_k,   |u| ≤ 1,   ℓ = ½ |x|² + ½ 0.1 |u|²,   ℓ_N = ½ |x|²     (all without unit)

A and B have independent normal entries, A scaled to a spectral radius of U(0.9, 1.1), B to a standard
deviation of 0.1: half of the systems are unstable, and weak controls reach their bounds. Every θ = (A, B) is
one system.

Source: our choice, after the LQR problems of Amos et al., Differentiable MPC for End-to-end Planning and
Control, 2018, section 5.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.problem import Problem

State = Float[Array, " nx"]
Control = Float[Array, " nu"]
Scalar = Float[Array, ""]

NX, NU = 8, 4
DT = 1.0
STATES = tuple(f"x{i} [-]" for i in range(NX))
CONTROLS = tuple(f"u{i} [-]" for i in range(NU))
PENALTY = 0.1


class Theta(NamedTuple):
    """A system."""

    A: Any  # (nx, nx)
    B: Any  # (nx, nu)


def sample(key: Array, dtype: Any = None, *, nx: int = NX, nu: int = NU) -> Theta:
    """Draw a system."""
    key_a, key_b, key_radius = jax.random.split(key, 3)
    A = jax.random.normal(key_a, (nx, nx), dtype) / nx**0.5
    B = 0.1 * jax.random.normal(key_b, (nx, nu), dtype)
    radius = jnp.linalg.norm(jnp.linalg.matrix_power(A, 64)) ** (1 / 64)  # Gelfand's formula
    return Theta(A * jax.random.uniform(key_radius, (), dtype, 0.9, 1.1) / radius, B)


def default_theta(dtype: Any = None) -> Theta:
    """One fixed system of the family."""
    return sample(jax.random.key(0), dtype)


def dynamics(x: State, u: Control, k: Any, theta: Theta) -> State:
    """A x + B u."""
    return theta.A @ x + theta.B @ u


plant_step = dynamics  # the true system


def stage_cost(x: State, u: Control, k: Any, theta: Theta) -> Scalar:
    """ℓ(x, u)."""
    return terminal_cost(x, theta) + 0.5 * PENALTY * jnp.sum(u**2)


def terminal_cost(x: State, theta: Theta) -> Scalar:
    """ℓ_N(x)."""
    return 0.5 * jnp.sum(x**2)


def problem(horizon: int = 20, *, nu: int = NU, u_max: float = 1.0) -> Problem:
    """The optimal control problem over `horizon` stages, with `nu` controls |u| ≤ `u_max`."""
    return Problem(
        dynamics=dynamics,
        stage_cost=stage_cost,
        terminal_cost=terminal_cost,
        horizon=horizon,
        u_min=[-u_max] * nu,
        u_max=[u_max] * nu,
    )


def goal(theta: Theta) -> State:
    """The origin."""
    return jnp.zeros(theta.A.shape[0], theta.A.dtype)


def sample_x0(key: Array, dtype: Any = None, *, nx: int = NX, scale: float = 5.0) -> State:
    """Normal with standard deviation `scale`."""
    return scale * jax.random.normal(key, (nx,), dtype)
