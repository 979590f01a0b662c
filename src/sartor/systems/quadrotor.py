"""A quadrotor that flies to a goal, with a limit on its velocity.

    x = [p (3) [m], roll, pitch, yaw (φ, ϑ, ψ) [rad], v (3) [m/s], w (3) [rad/s]];  w in body axes
    u = thrusts of the four rotors in [N], 0 ≤ u ≤ 5;   one RK4 step of dt of
    p' = v,   v' = z_B Σu/m - [0, 0, g],   z_B = [cφ sϑ cψ + sφ sψ, cφ sϑ sψ - sφ cψ, cφ cϑ]
    φ' = w_1 + sφ tanϑ w_2 + cφ tanϑ w_3,   ϑ' = cφ w_2 - sφ w_3,   ψ' = (sφ w_2 + cφ w_3)/cϑ
    J w' = τ - w × (J w),   τ = [l(u_2 - u_4), l(u_3 - u_1), κ(u_1 - u_2 + u_3 - u_4)]
    ℓ = dt/2 (|x - x_goal|²_Q + 0.1 |u - u_hover|²),   ℓ_N = ½ |x - x_goal|²_Q,   |v_i| ≤ v_max for k = 1..N

Source: rigid body with Euler angles (yaw, pitch, roll), e.g. Beard and McLain, Small Unmanned Aircraft, 2012,
chapter 3; the cost and its numbers are our choice.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.models.integrate import rk4
from sartor.problem import Problem, Softening

State = Float[Array, "12"]
Control = Float[Array, "4"]
Scalar = Float[Array, ""]

DT = 0.05  # [s]
STATES = (
    "p₁ [m]", "p₂ [m]", "p₃ [m]", "roll [rad]", "pitch [rad]", "yaw [rad]",
    "v₁ [m/s]", "v₂ [m/s]", "v₃ [m/s]", "w₁ [rad/s]", "w₂ [rad/s]", "w₃ [rad/s]",
)  # fmt: skip
CONTROLS = ("thrust 1 [N]", "thrust 2 [N]", "thrust 3 [N]", "thrust 4 [N]")
GRAVITY, ARM, KAPPA = 9.81, 0.2, 0.05  # [m/s²], [m], [m]
HOVER = 2.4525  # thrust of each rotor in the cost [N], whatever the mass
WEIGHTS = (10.0, 10.0, 10.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1)
PENALTY = 0.1


class Theta(NamedTuple):
    """Parameters of the dynamics and the goal; `Theta(*p[:4], p[4:])` from a vector (7,)."""

    mass: Any  # [kg]
    Jx: Any  # moments of inertia [kg m²]
    Jy: Any
    Jz: Any
    goal: Any  # (3,), position [m]


def default_theta(dtype: Any = None) -> Theta:
    """The true parameters: 1 kg, J = diag(0.01, 0.01, 0.02) kg m², goal (1, 1, 1) m."""
    p = jnp.asarray([1.0, 0.01, 0.01, 0.02, 1.0, 1.0, 1.0], dtype)
    return Theta(*p[:4], goal=p[4:])


def ode(x: State, u: Control, theta: Theta) -> State:
    """The equations of motion above: dx/dt."""
    (roll, pitch, yaw), v, w = x[3:6], x[6:9], x[9:]
    cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (jnp.cos, jnp.sin))
    z_body = jnp.stack([cr * sp * cy + sr * sy, cr * sp * sy - sr * cy, cr * cp])
    acceleration = z_body * (jnp.sum(u) / theta.mass) - jnp.asarray([0.0, 0.0, GRAVITY], x.dtype)
    swing = sr * w[1] + cr * w[2]
    angle_rates = jnp.stack([w[0] + swing * sp / cp, cr * w[1] - sr * w[2], swing / cp])
    J = jnp.stack([theta.Jx, theta.Jy, theta.Jz])
    torque = jnp.stack([ARM * (u[1] - u[3]), ARM * (u[2] - u[0]), KAPPA * (u[0] - u[1] + u[2] - u[3])])
    return jnp.concatenate([v, angle_rates, acceleration, (torque - jnp.cross(w, J * w)) / J])


dynamics = rk4(ode, DT)
plant_step = dynamics  # the true system


def stage_cost(x: State, u: Control, k: Any, theta: Theta, dt: float = DT) -> Scalar:
    """ℓ(x, u, θ)."""
    return dt * (terminal_cost(x, theta) + 0.5 * PENALTY * jnp.sum((u - HOVER) ** 2))


def terminal_cost(x: State, theta: Theta) -> Scalar:
    """ℓ_N(x, θ)."""
    return 0.5 * jnp.sum(jnp.asarray(WEIGHTS, x.dtype) * (x - goal(theta)) ** 2)


def velocity_rows(x: State, u: Control, k: Any, theta: Theta, v_max: float) -> Float[Array, "6"]:
    """±v - v_max ≤ 0 at stages k ≥ 1: the velocity of now cannot be changed."""
    return jnp.where(k > 0, final_velocity_rows(x, theta, v_max), -v_max)


def final_velocity_rows(x: State, theta: Theta, v_max: float) -> Float[Array, "6"]:
    """±v - v_max ≤ 0."""
    return jnp.concatenate([x[6:9], -x[6:9]]) - v_max


def problem(
    horizon: int = 20, *, dt: float = DT, v_max: float | None = 1.0, softening: Softening | None = None
) -> Problem:
    """The optimal control problem over `horizon` stages of `dt` [s].

    |v_i| ≤ `v_max` [m/s]; None for no limit. The limit is hard unless `softening` says otherwise; a closed
    loop with disturbances needs it soft.
    """
    limited = v_max is not None
    return Problem(
        dynamics=rk4(ode, dt),
        stage_cost=eqx.Partial(stage_cost, dt=dt),
        terminal_cost=terminal_cost,
        horizon=horizon,
        u_min=[0.0] * 4,
        u_max=[5.0] * 4,
        softening=softening,
        constraints=eqx.Partial(velocity_rows, v_max=v_max) if limited else None,
        terminal_constraints=eqx.Partial(final_velocity_rows, v_max=v_max) if limited else None,
    )


def goal(theta: Theta) -> State:
    """At the goal, level and at rest."""
    return jnp.concatenate([theta.goal, jnp.zeros(9, theta.goal.dtype)])


def sample_x0(key: Array, dtype: Any = None) -> State:
    """Uniform: |p_i| ≤ 0.3 m, angles ≤ 0.25 rad, |v_i| ≤ 0.5 m/s, |w_i| ≤ 0.5 rad/s."""
    x = jax.random.uniform(key, (12,), dtype, -1.0, 1.0)
    return x * jnp.repeat(jnp.asarray([0.3, 0.25, 0.5, 0.5], x.dtype), 3)
