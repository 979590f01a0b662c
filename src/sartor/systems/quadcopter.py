"""A quadcopter with rotor speeds as inputs, and an MPC with a linear model whose cost is tuned in closed loop.

    x = [p (3) [m], v (3) [m/s], roll, pitch, yaw (φ, ϑ, ψ) [rad], w (3) [rad/s]],  u = rotor speeds [rad/s] in [0, 630]
    x_{k+1} = x_k + dt ode(x_k, u_k),   dt = 0.1 s;   S = Σ u_i²,   Ω = -u_1 + u_2 - u_3 + u_4
    v' = z_B k_t S/m - [0, 0, g] - k_d v/m,   z_B = [cψ sϑ cφ + sψ sφ, sψ sϑ cφ - cψ sφ, cϑ cφ]
    φ' = w_1 + sφ tanϑ w_2 + cφ tanϑ w_3,   ϑ' = cφ w_2 - sφ w_3,   ψ' = (sφ w_2 + cφ w_3)/cϑ
    w_1' = ((J_y - J_z) w_2 w_3 - J_r w_2 Ω + l k_t (u_4² - u_2²))/J_x
    w_2' = ((J_z - J_x) w_1 w_3 + J_r w_1 Ω + l k_t (u_3² - u_1²))/J_y
    w_3' = ((J_x - J_y) w_1 w_2 + k_b (-u_1² + u_2² - u_3² + u_4²))/J_z

The task is to go to `GOAL` in T = 200 steps, with |v_i| ≤ 2 m/s, angles within π/4 and rates within π/8. The MPC knows
x_{k+1} = x_ref + A (x_k - x_ref) + B (u_k - u_ref), its rows are soft, and its parameters are the weights of its cost:

    Q = diag(p_Q²) + 1e-6 I,   R = diag(p_R²) + 1e-6 I,   P = L Lᵀ + 1e-6 I,   12 + 4 + 78 numbers

Sources: Abdulkareem et al., Journal of Engineering, 2022, article 2449901 (plant); Zuliani, Balta, Lygeros, Policy
Optimization for Unknown Systems using Differentiable MPC, 2026, section 5 (task, controller).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import solve_discrete_are

from sartor.problem import Problem, Softening

State = Float[Array, "12"]
Control = Float[Array, "4"]
Scalar = Float[Array, ""]

DT = 0.1  # [s]
MASS, ARM, GRAVITY = 0.468, 0.225, 9.81  # [kg], [m], [m/s²]
INERTIA = (4.856e-3, 4.856e-3, 8.801e-3)  # [kg m²]
ROTOR_INERTIA = 3.357e-5  # [kg m²]
THRUST, TWIST, DRAG = 2.98e-6, 1.14e-7, 0.25  # k_t [N s²], k_b [N m s²], k_d [N s/m]
HOVER = float(np.sqrt(MASS * GRAVITY / (4.0 * THRUST)))  # [rad/s]
U_MAX = 630.0  # [rad/s]: 3 % more thrust than hovering needs
X0 = (-1.0, 2.0, 1.0, 0.0, 0.0, 0.0, *np.deg2rad([10.0, -10.0, 5.0]).tolist(), 0.0, 0.0, 0.0)
GOAL = (-6.0, -3.5, 0.0) + 9 * (0.0,)
LIMITS = (2.0,) * 3 + (np.pi / 4,) * 3 + (np.pi / 8,) * 3  # of |v|, angles and |w|
NUM_STEPS, HORIZON = 200, 12
STATE_WEIGHTS = (1.0,) * 6 + (0.1,) * 6  # of the closed loop's cost
CONTROL_WEIGHT = 0.01
SOFT = Softening(25.0, 25.0)
"""Of the rows of the MPC: 25 s + 25/2 s². Whether the published square has the half is not known; it changes little."""
_SMALL = 1e-6


class Theta(NamedTuple):
    """Parameters of the MPC."""

    Q: Any  # (12,), roots of the state weights
    R: Any  # (4,), roots of the control weights
    P: Any  # (78,), lower triangle L of the terminal weight, row by row
    A: Any  # (12, 12), of the model
    B: Any  # (12, 4)


def ode(x: State, u: Control) -> State:
    """The equations of motion above: dx/dt."""
    v, (roll, pitch, yaw), w = x[3:6], x[6:9], x[9:]
    (cr, sr), (cp, sp), (cy, sy) = ((jnp.cos(a), jnp.sin(a)) for a in (roll, pitch, yaw))
    Jx, Jy, Jz = INERTIA
    squares, spin = u**2, -u[0] + u[1] - u[2] + u[3]
    z_body = jnp.stack([cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr])
    gravity = jnp.asarray([0.0, 0.0, GRAVITY], x.dtype)
    acceleration = (THRUST * jnp.sum(squares) * z_body - DRAG * v) / MASS - gravity
    swing = sr * w[1] + cr * w[2]
    angle_rates = jnp.stack([w[0] + swing * sp / cp, cr * w[1] - sr * w[2], swing / cp])
    lever = ARM * THRUST
    torque = jnp.stack([
        (Jy - Jz) * w[1] * w[2] - ROTOR_INERTIA * w[1] * spin + lever * (squares[3] - squares[1]),
        (Jz - Jx) * w[0] * w[2] + ROTOR_INERTIA * w[0] * spin + lever * (squares[2] - squares[0]),
        (Jx - Jy) * w[0] * w[1] + TWIST * (-squares[0] + squares[1] - squares[2] + squares[3]),
    ])  # fmt: skip
    return jnp.concatenate([v, acceleration, angle_rates, torque / jnp.asarray(INERTIA, x.dtype)])


def plant_step(x: State, u: Control, k: Any = 0) -> State:
    """The true system."""
    return x + DT * ode(x, u)


def linearised() -> tuple[np.ndarray, np.ndarray]:
    """A and B of the true system at the goal."""
    with jax.ensure_compile_time_eval():  # numbers, also where a caller is being traced
        A, B = jax.jacfwd(plant_step, (0, 1))(jnp.asarray(GOAL), jnp.full(4, HOVER))
    return np.asarray(A), np.asarray(B)


def terminal_weight(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """P of the closed loop's cost: the cost to go of (A, B) without limits, from the algebraic Riccati equation."""
    return solve_discrete_are(A, B, np.diag(STATE_WEIGHTS), CONTROL_WEIGHT * np.eye(4))


def start(A: np.ndarray, B: np.ndarray) -> Theta:
    """The MPC with the weights of the closed loop's cost."""
    L = np.linalg.cholesky(terminal_weight(A, B))
    parts = (np.sqrt(STATE_WEIGHTS), np.sqrt(CONTROL_WEIGHT) * np.ones(4), L[np.tril_indices(12)], A, B)
    return Theta(*map(jnp.asarray, parts))


def problem(horizon: int = HORIZON) -> Problem:
    """The MPC; its parameters are a `Theta`."""
    return Problem(
        dynamics=_model, stage_cost=_stage_cost, terminal_cost=_terminal_cost, horizon=horizon, u_min=[0.0] * 4,
        u_max=[U_MAX] * 4, constraints=_rows, terminal_constraints=_final_rows, softening=SOFT,
    )  # fmt: skip


def stage_cost(x: State, u: Control) -> Scalar:
    """|x - x_ref|²_Q + |u - u_ref|²_R of the closed loop."""
    error = x - jnp.asarray(GOAL, x.dtype)
    return jnp.sum(jnp.asarray(STATE_WEIGHTS, x.dtype) * error**2) + CONTROL_WEIGHT * jnp.sum((u - HOVER) ** 2)


def final_cost(x: State, P: Float[Array, "12 12"]) -> Scalar:
    """|x - x_ref|²_P."""
    error = x - jnp.asarray(GOAL, x.dtype)
    return error @ P @ error


def closed_loop_cost(xs: Float[Array, "T_plus_1 12"], us: Float[Array, "T 4"], P: Float[Array, "12 12"]) -> Scalar:
    """Σ_t |x_t - x_ref|²_Q + |u_t - u_ref|²_R + |x_T - x_ref|²_P."""
    return jnp.sum(jax.vmap(stage_cost)(xs[:-1], us)) + final_cost(xs[-1], P)


def closed_loop_rows(xs: Float[Array, "T_plus_1 12"], us: Float[Array, "T 4"]) -> Float[Array, "T_plus_1 18"]:
    """|v|, angles and |w| within `LIMITS` at every instant, where ≤ 0."""
    return jax.vmap(rows)(xs)


def _model(x: State, u: Control, k: Any, theta: Theta) -> State:
    goal = jnp.asarray(GOAL, x.dtype)
    return goal + theta.A @ (x - goal) + theta.B @ (u - HOVER)


def _stage_cost(x: State, u: Control, k: Any, theta: Theta) -> Scalar:
    dx, du = x - jnp.asarray(GOAL, x.dtype), u - HOVER
    return jnp.sum((theta.Q**2 + _SMALL) * dx**2) + jnp.sum((theta.R**2 + _SMALL) * du**2)


def _terminal_cost(x: State, theta: Theta) -> Scalar:
    dx = x - jnp.asarray(GOAL, x.dtype)
    L = jnp.zeros((12, 12), x.dtype).at[np.tril_indices(12)].set(theta.P)
    return jnp.sum((L.T @ dx) ** 2) + _SMALL * dx @ dx


def _rows(x: State, u: Control, k: Any, theta: Theta) -> Float[Array, "18"]:
    """At stages k ≥ 1: the state of now cannot be changed."""
    return jnp.where(k > 0, rows(x), -1.0)


def _final_rows(x: State, theta: Theta) -> Float[Array, "18"]:
    return rows(x)


def rows(x: State) -> Float[Array, "18"]:
    """|v|, angles and |w| within `LIMITS`, where ≤ 0."""
    limits = jnp.asarray(LIMITS, x.dtype)
    return jnp.concatenate([x[3:] - limits, -x[3:] - limits])
