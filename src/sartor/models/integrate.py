"""From a differential equation x' = ode(x, u, θ) to a step x_{k+1} = f(x_k, u_k, k, θ)."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, PyTree


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


def _rk4_step(ode: Callable, dt: float, x: Array, u: Array, k: int | Array, theta: PyTree) -> Array:
    del k
    s1 = ode(x, u, theta)
    s2 = ode(x + 0.5 * dt * s1, u, theta)
    s3 = ode(x + 0.5 * dt * s2, u, theta)
    s4 = ode(x + dt * s3, u, theta)
    return x + dt / 6.0 * (s1 + 2.0 * s2 + 2.0 * s3 + s4)
