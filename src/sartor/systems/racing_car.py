"""A racing car on a closed track, and an MPC that goes as far as it can within its horizon.

    x = [s [m], n [m], μ [rad], v_x [m/s], v_y [m/s], r [rad/s], friction, w [m/s], δ [rad]],   u = [w_ref, δ_ref]
    s' = (v_x cosμ - v_y sinμ)/(1 - n κ(s)),   n' = v_x sinμ + v_y cosμ,   μ' = r - κ(s) s'
    (v_x, v_y, r)' by the vehicle (D24),   friction' = 0,   w' = (w_ref - w)/τ_w,   δ' = (δ_ref - δ)/τ_s
    ℓ   = q_n n² + q_μ μ² + q_β (β - β_kin)² + q_σ (w - v_x)² + q_w (w_ref - w)² + q_δ (δ_ref - δ)² - q_s s
    ℓ_N = the same without controls, and q_N μ²,   β = atan(v_y/v_x),   β_kin = atan(l_r δ/(l_f + l_r))
    n within the walls less a margin, soft;   0.01 ≤ w_ref ≤ 7 m/s,   |δ_ref| ≤ 0.5 rad;   RK4 steps of 0.033 s
    (weights, margin, limits of the controls and the control step are fields of `Theta`)

Source: the controller of the code of Węgrzynowski et al., Learning What Matters (their Fig. 3); its walls are a smooth
penalty of 200 per metre, ours rows with the same slope; its β_kin has 0.15 m in place of l_r.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.models.integrate import rk4
from sartor.models.vehicle import SLOWEST, AbstractVehicle, Motion
from sartor.mpc import MPC
from sartor.problem import Problem, Softening
from sartor.solution import Solution, guess
from sartor.solvers.sqp import SQP
from sartor.track import Track

State = Float[Array, "9"]
Control = Float[Array, "2"]
Scalar = Float[Array, ""]

DT = 0.033  # of the published controller [s]
STATES = ("s [m]", "n [m]", "μ [rad]", "v_x [m/s]", "v_y [m/s]", "r [rad/s]", "friction", "w [m/s]", "δ [rad]")
CONTROLS = ("w_ref [m/s]", "δ_ref [rad]")
SOFT = Softening(200.0, 2000.0)
"""Of the walls [per m, per m²]."""
MARGIN = 0.03  # [m]


class Weights(NamedTuple):
    """Of the cost."""

    progress: Any = 1.0  # q_s [1/m]
    lateral: Any = 0.02  # q_n [1/m²]
    heading: Any = 0.002  # q_μ
    sideslip: Any = 1.0  # q_β
    slip: Any = 0.1  # q_σ [s²/m²]
    wheel: Any = 2.0  # q_w [s²/m²]
    steer: Any = 2.0  # q_δ
    final_heading: Any = 5.0  # q_N


class Limits(NamedTuple):
    """Bounds of the controls [m/s, rad]."""

    low: Any = (0.01, -0.5)
    high: Any = (7.0, 0.5)


LIMITS = Limits()
"""Those of the published controller."""


class Theta(NamedTuple):
    """Parameters of the MPC."""

    vehicle: AbstractVehicle
    track: Track
    weights: Weights = Weights()
    margin: Any = MARGIN  # that the centre of the car keeps from the walls [m]
    limits: Limits = LIMITS
    dt: Any = DT  # of a control step [s]


def ode(x: State, u: Control, theta: Theta) -> State:
    """The equations of motion above: dx/dt."""
    s, n, mu, vx, vy, r, friction, wheel, steer = x
    body, curvature = theta.vehicle.body, theta.track.curvature_at(s)
    progress = (vx * jnp.cos(mu) - vy * jnp.sin(mu)) / (1.0 - n * curvature)
    pose = jnp.stack([progress, vx * jnp.sin(mu) + vy * jnp.cos(mu), r - curvature * progress])
    rates = theta.vehicle.rates(Motion(vx, vy, r, friction, wheel, steer))
    actuators = jnp.stack([(u[0] - wheel) / body.wheel_lag, (u[1] - steer) / body.steer_lag])
    return jnp.concatenate([pose, rates, jnp.zeros_like(x[:1]), actuators])


def step(x: State, u: Control, k: Any, theta: Theta) -> State:
    """The next state."""
    return rk4(ode, theta.dt)(x, u, k, theta)


def problem(horizon: int, limits: Limits) -> Problem:
    """The MPC over so many steps; its parameters are a `Theta`.

    Args:
        horizon: N.
        limits: Pass those of the `Theta`. The problem has its bounds, and derivatives in them, from here.
    """
    return Problem(
        dynamics=step, stage_cost=stage_cost, terminal_cost=_terminal_cost, horizon=horizon, u_min=limits.low,
        u_max=limits.high, constraints=_path_rows, terminal_constraints=walls, softening=SOFT,
    )  # fmt: skip


def stage_cost(x: State, u: Control, k: Any, theta: Theta) -> Scalar:
    """ℓ."""
    q = theta.weights
    return _state_cost(x, theta) + q.wheel * (u[0] - x[7]) ** 2 + q.steer * (u[1] - x[8]) ** 2


def walls(x: State, theta: Theta) -> Float[Array, "2"]:
    """How far the car is beyond the left and the right wall, the margin included [m]."""
    left, right = theta.track.walls_at(x[0])
    return jnp.stack([x[1] - left, -x[1] - right]) + theta.margin


def rolling(s: float = 0.0, speed: float = 1.0, friction: float = 0.8) -> State:
    """On the centreline, driving straight ahead with a speed [m/s]."""
    return jnp.asarray([s, 0.0, 0.0, speed, 0.0, 0.0, friction, speed, 0.0], jnp.result_type(float))


def _state_cost(x: State, theta: Theta) -> Scalar:
    s, n, mu, vx, vy, _, _, wheel, steer = x
    q, body = theta.weights, theta.vehicle.body
    sideslip = jnp.arctan(vy / jnp.maximum(vx, SLOWEST)) - jnp.arctan(body.lr / (body.lf + body.lr) * steer)
    squares = q.lateral * n**2 + q.heading * mu**2 + q.sideslip * sideslip**2 + q.slip * (wheel - vx) ** 2
    return squares - q.progress * s


def _terminal_cost(x: State, theta: Theta) -> Scalar:
    return _state_cost(x, theta) + theta.weights.final_heading * x[2] ** 2


def _path_rows(x: State, u: Control, k: Any, theta: Theta) -> Float[Array, "2"]:
    """At stages k ≥ 1: where the car is now cannot be changed."""
    return jnp.where(k > 0, walls(x, theta), -1.0)


def follow(x: State, theta: Theta, speed: Any) -> Control:
    """Steers along the centreline at a speed [m/s]: where an MPC may begin its first solve.

    δ_ref = (l_f + l_r) κ - 2 n/m² - 1.5 μ,   κ a little ahead
    """
    body, ahead = theta.vehicle.body, 0.1 * speed
    steer = (body.lf + body.lr) * theta.track.curvature_at(x[0] + ahead) - 2.0 * x[1] - 1.5 * x[2]
    low, high = (jnp.asarray(limit, x.dtype) for limit in theta.limits)
    return jnp.clip(jnp.stack([jnp.asarray(speed, x.dtype), steer]), low, high)


@cache  # the same function for the same numbers: nothing compiles twice
def first_guess(horizon: int, speed: float = 2.0) -> Callable:
    """first_guess(x, theta) of an `MPC`: such a drive."""

    def drive(x: State, theta: Theta) -> Solution:
        def advance(x: State, _: None) -> tuple[State, tuple[State, Control]]:
            u = follow(x, theta, speed)
            x = step(x, u, 0, theta)
            return x, (x, u)

        _, (xs, us) = jax.lax.scan(advance, x, None, length=horizon)
        return guess(jnp.concatenate([x[None], xs]), us)

    return drive


def controller(theta: Theta, horizon: int) -> MPC:
    """An MPC that does one iteration in every control step, the first from `first_guess`."""
    real_time = SQP(real_time=True)
    return MPC(
        problem(horizon, theta.limits), theta, solver=real_time, first_solver=None, first_guess=first_guess(horizon)
    )
