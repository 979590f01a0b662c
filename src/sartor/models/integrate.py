"""From a differential equation x' = ode(x, u, θ) to a step x_{k+1} = f(x_k, u_k, k, θ)."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

RK4_PLACES = (0.0, 0.5, 0.5, 1.0)
"""Where the stages of RK4 are evaluated, in units of dt along the stage before."""
RK4_WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
"""Weights of the stages in the step."""


def rk4(ode: Callable, dt: float) -> Callable:
    """One step of the classical Runge-Kutta method, the control constant over it.

        x_{k+1} = x_k + dt/6 (s_1 + 2 s_2 + 2 s_3 + s_4),
        s_1 = ode(x_k, u_k, θ),   s_2 = ode(x_k + dt/2 s_1, u_k, θ),   s_3 = ode(x_k + dt/2 s_2, u_k, θ),
        s_4 = ode(x_k + dt s_3, u_k, θ)

    Args:
        ode: ode(x, u, theta) -> dx/dt, (nx,).
        dt: Time step in [s].

    Returns:
        f(x, u, k, theta) -> x_next. Two with the same `ode` and `dt` are equal: nothing compiles twice.

    References: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, 1993, section II.1.
    """
    return eqx.Partial(_rk4_step, ode, dt)


def held(theta: PyTree, anchor: Array) -> PyTree:
    """`theta`, to be used in a loop at a state that changes.

    XLA moves what stays the same out of a loop, several times over if it is written so, and then no longer sees what
    the remaining expressions share. A barrier behind the state (one for each leaf, so that only leaves with tangents
    get any) keeps all in the loop; the values are the same.
    """
    anchor = jax.lax.stop_gradient(anchor)
    hold = lambda leaf: jax.lax.optimization_barrier((leaf, anchor))[0] if eqx.is_array(leaf) else leaf
    return jax.tree.map(hold, theta)


def _rk4_step(ode: Callable, dt: float, x: Array, u: Array, k: int | Array, theta: PyTree) -> Array:
    del k

    def stage(carry, coefficients):
        x_next, s = carry
        place, weight = coefficients
        at = x + place * dt * s
        s = ode(at, u, held(theta, at))
        return (x_next + weight * dt * s, s), None

    places, weights = jnp.asarray(RK4_PLACES, x.dtype), jnp.asarray(RK4_WEIGHTS, x.dtype)
    # A loop, so that the user's function and its derivatives are compiled once rather than four times.
    return jax.lax.scan(stage, (x, jnp.zeros_like(x)), (places, weights))[0][0]
