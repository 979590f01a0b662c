"""Optimal control problems on which several solvers are measured, as plain numpy data.

    min  sum_{k<N} 1/2 |x_k - x_ref|^2_q + 1/2 |u_k - u_ref|^2_r  + 1/2 |x_N - x_ref|^2_q_terminal  + offset
    s.t. x_0 given,  x_{k+1} = step(x_k, u_k, theta),  u_min <= u_k <= u_max,  |x_k| <= x_max for k >= 1

with |v|^2_w = sum_i w_i v_i^2. `step` is written once, on sequences of components and with the functions of
`lib` (numpy, jax.numpy, torch or casadi), so that every solver gets the same formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Step = Callable[[Any, Any, Any, Any], list]
Sampler = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Problem:
    """One family of problems; a sample of it is a pair (x0, theta)."""

    name: str
    horizon: int
    """Number of controls N; there are N + 1 states."""
    step: Step
    """step(x, u, theta, lib) -> the nx components of the next state."""
    q: np.ndarray
    """(nx,) diagonal weights of a stage's state."""
    r: np.ndarray
    """(nu,) diagonal weights of a stage's control."""
    q_terminal: np.ndarray
    """(nx,) diagonal weights of the last state."""
    u_min: np.ndarray
    u_max: np.ndarray
    """(nu,) bounds on every control."""
    u_ref: np.ndarray
    """(nu,) reference of the control."""
    x_ref: Callable[[np.ndarray], np.ndarray]
    """theta -> (nx,) reference of the state."""
    theta: np.ndarray
    """(ntheta,) nominal parameters."""
    draw: Sampler
    """(rng, batch) -> x0s (batch, nx), thetas (batch, ntheta)."""
    x_max: np.ndarray | None = None
    """(nx,) bound on |x_k| for k >= 1, infinite where there is none."""
    is_linear: bool = False
    """Whether it is of the linear family, where theta = (A, B): see `linear_matrices`."""
    offset: float = 0.0
    """Constant part of the cost."""
    ode: Step | None = None
    """Where `step` is one Runge-Kutta step of a differential equation: its right-hand side."""
    dt: float = 1.0
    """Time step [s]; 1 where the problem has no time scale."""

    @property
    def nx(self) -> int:
        return len(self.q)

    @property
    def nu(self) -> int:
        return len(self.r)


def sample(problem: Problem, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw `batch` samples: x0s (batch, nx) and thetas (batch, ntheta)."""
    return problem.draw(np.random.default_rng(seed), batch)


def rollout(problem: Problem, x0: np.ndarray, us: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The states (..., N+1, nx) that follow from x0 (..., nx), us (..., N, nu) and theta (..., ntheta)."""
    xs = [np.asarray(x0, dtype=float)]
    for k in range(us.shape[-2]):
        x, u, p = (np.moveaxis(v, -1, 0) for v in (xs[-1], us[..., k, :], np.asarray(theta)))
        xs.append(np.stack(np.broadcast_arrays(*problem.step(x, u, p, np)), axis=-1))
    return np.stack(xs, axis=-2)


def cost(problem: Problem, x0: np.ndarray, us: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The cost (...) of the controls us (..., N, nu), whose states are rolled out from x0 (..., nx)."""
    xs = rollout(problem, x0, us, theta)
    dx = xs - np.apply_along_axis(problem.x_ref, -1, np.asarray(theta))[..., None, :]
    stage = np.sum(problem.q * dx[..., :-1, :] ** 2, axis=(-2, -1))
    control = np.sum(problem.r * (us - problem.u_ref) ** 2, axis=(-2, -1))
    terminal = np.sum(problem.q_terminal * dx[..., -1, :] ** 2, axis=-1)
    return 0.5 * (stage + control + terminal) + problem.offset


# --- random linear systems -----------------------------------------------------------------------


def linear(horizon: int = 20, nx: int = 8, nu: int = 4, gain: float = 0.25) -> Problem:
    """Marginal systems: A = radius * (random orthogonal), radius ~ U(0.9, 1.1), B = gain * N(0, 1).

    Every eigenvalue of A lies on one circle. With this gain a control is at its bound at most stages.
    """

    def draw_matrices(rng, batch):
        rotation = np.linalg.qr(rng.normal(size=(batch, nx, nx))).Q
        return rng.uniform(0.9, 1.1, (batch, 1, 1)) * rotation, gain * rng.normal(size=(batch, nx, nu))

    return _linear("linear", horizon, nx, nu, draw_matrices)


def unstable_linear(horizon: int = 20, nx: int = 8, nu: int = 4, spread: float = 0.1, gain: float = 0.5) -> Problem:
    """Unstable systems: A = I + spread * N(0, 1), B = gain * N(0, 1); the spectral radius is some 1.25.

    spread = 0.2, gain = 1 is the recipe of the imitation experiments; its worst optimal costs are near 1e9.
    """

    def draw_matrices(rng, batch):
        A = np.eye(nx) + spread * rng.normal(size=(batch, nx, nx))
        return A, gain * rng.normal(size=(batch, nx, nu))

    return _linear("unstable linear", horizon, nx, nu, draw_matrices)


def _linear(name: str, horizon: int, nx: int, nu: int, draw_matrices: Sampler) -> Problem:
    """x_next = A x + B u, theta = (A, B) row by row, Q = I, R = 0.1 I, |u| <= 1, x0 ~ 3 N(0, I).

    Every sample has matrices of its own.
    """

    def step(x, u, theta, lib):
        A, B = theta[: nx * nx], theta[nx * nx :]
        return [
            sum(A[nx * i + j] * x[j] for j in range(nx)) + sum(B[nu * i + j] * u[j] for j in range(nu))
            for i in range(nx)
        ]

    def draw(rng, batch):
        A, B = draw_matrices(rng, batch)
        x0s = 3.0 * rng.normal(size=(batch, nx))
        return x0s, np.concatenate([A.reshape(batch, -1), B.reshape(batch, -1)], axis=1)

    return Problem(
        name=name,
        horizon=horizon,
        step=step,
        q=np.ones(nx),
        r=np.full(nu, 0.1),
        q_terminal=np.ones(nx),
        u_min=np.full(nu, -1.0),
        u_max=np.full(nu, 1.0),
        u_ref=np.zeros(nu),
        x_ref=lambda theta: np.zeros(nx),
        theta=draw(np.random.default_rng(0), 1)[1][0],
        draw=draw,
        is_linear=True,
    )


def linear_matrices(problem: Problem, theta: Any) -> tuple[Any, Any]:
    """theta (..., ntheta) of a linear problem as A (..., nx, nx) and B (..., nx, nu)."""
    nx, nu = problem.nx, problem.nu
    A = theta[..., : nx * nx].reshape(*theta.shape[:-1], nx, nx)
    B = theta[..., nx * nx :].reshape(*theta.shape[:-1], nx, nu)
    return A, B


# --- pendulum ------------------------------------------------------------------------------------


def _pendulum_step(x, u, theta, lib, dt=0.05):
    """Semi-implicit Euler; x = (cos, sin, rate [rad/s]), u torque [Nm], theta = (g, m, l)."""
    g, m, length = theta[0], theta[1], theta[2]
    rate = x[2] + dt * (3.0 * g / (2.0 * length) * x[1] + 3.0 * u[0] / (m * length**2))
    angle = lib.arctan2(x[1], x[0]) + dt * rate
    return [lib.cos(angle), lib.sin(angle), rate]


def pendulum(horizon: int = 20) -> Problem:
    """Swing-up of mpc.pytorch's pendulum: goal (1, 0, 0), weights (1, 1, 0.1), penalty 0.001, |u| <= 2."""
    goal, q, theta = np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.1]), np.array([10.0, 1.0, 1.0])

    def draw(rng, batch):
        angle, rate = rng.uniform(-np.pi, np.pi, batch), rng.uniform(-1.0, 1.0, batch)
        return np.stack([np.cos(angle), np.sin(angle), rate], axis=1), np.tile(theta, (batch, 1))

    return Problem(
        name="pendulum",
        horizon=horizon,
        step=_pendulum_step,
        q=q,
        r=np.array([0.001]),
        q_terminal=q,
        u_min=np.array([-2.0]),
        u_max=np.array([2.0]),
        u_ref=np.zeros(1),
        x_ref=lambda theta: goal,
        theta=theta,
        draw=draw,
        offset=-0.5 * (horizon + 1) * float(np.sum(q * goal**2)),
    )


# --- cart-pole -----------------------------------------------------------------------------------


def _cartpole_step(x, u, theta, lib, dt=0.05):
    """Explicit Euler; x = (p, pdot, cos, sin, rate), u force [N], theta = (g, m_cart, m_pole, half pole)."""
    g, m_cart, m_pole, half = theta[0], theta[1], theta[2], theta[3]
    total = m_cart + m_pole
    position, velocity, cos, sin, rate = x[0], x[1], x[2], x[3], x[4]
    push = (u[0] + m_pole * half * rate**2 * sin) / total
    angle_acc = (g * sin - cos * push) / (half * (4.0 / 3.0 - m_pole * cos**2 / total))
    acc = push - m_pole * half * angle_acc * cos / total
    angle = lib.arctan2(sin, cos) + dt * rate
    return [
        position + dt * velocity,
        velocity + dt * acc,
        lib.cos(angle),
        lib.sin(angle),
        rate + dt * angle_acc,
    ]


def cartpole(horizon: int = 25) -> Problem:
    """mpc.pytorch's cart-pole: goal (0, 0, 1, 0, 0), weights (.1, .1, 1, 1, .1), penalty .001, |u| <= 100."""
    goal, q = np.array([0.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.1, 0.1, 1.0, 1.0, 0.1])
    theta = np.array([9.8, 1.0, 0.1, 0.5])

    def draw(rng, batch):
        position, velocity = rng.uniform(-0.5, 0.5, (2, batch))
        angle, rate = rng.uniform(-np.pi, np.pi, batch), rng.uniform(-1.0, 1.0, batch)
        x0s = np.stack([position, velocity, np.cos(angle), np.sin(angle), rate], axis=1)
        return x0s, np.tile(theta, (batch, 1))

    return Problem(
        name="cartpole",
        horizon=horizon,
        step=_cartpole_step,
        q=q,
        r=np.array([0.001]),
        q_terminal=q,
        u_min=np.array([-100.0]),
        u_max=np.array([100.0]),
        u_ref=np.zeros(1),
        x_ref=lambda theta: goal,
        theta=theta,
        draw=draw,
        offset=-0.5 * (horizon + 1) * float(np.sum(q * goal**2)),
    )


# --- quadrotor -----------------------------------------------------------------------------------


def _quadrotor_ode(x, u, theta, lib, arm=0.2, kq=0.05, gravity=9.81):
    """x = (position, roll pitch yaw, velocity, body rates), u thrusts [N], theta = (m, Jx, Jy, Jz, goal)."""
    m, jx, jy, jz = theta[0], theta[1], theta[2], theta[3]
    roll, pitch, yaw, wx, wy, wz = x[3], x[4], x[5], x[9], x[10], x[11]
    cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (lib.cos, lib.sin))
    thrust = (u[0] + u[1] + u[2] + u[3]) / m
    acc = [(cr * sp * cy + sr * sy) * thrust, (cr * sp * sy - sr * cy) * thrust, cr * cp * thrust - gravity]
    swing = sr * wy + cr * wz
    angle_rates = [wx + swing * sp / cp, cr * wy - sr * wz, swing / cp]
    spin = [
        (arm * (u[1] - u[3]) - (jz - jy) * wy * wz) / jx,
        (arm * (u[2] - u[0]) - (jx - jz) * wz * wx) / jy,
        (kq * (u[0] - u[1] + u[2] - u[3]) - (jy - jx) * wx * wy) / jz,
    ]
    return [x[6], x[7], x[8], *angle_rates, *acc, *spin]


def rk4(ode: Step, dt: float) -> Step:
    """One classical Runge-Kutta step of x' = ode(x, u, theta)."""

    def step(x, u, theta, lib):
        def shifted(slope, h):
            return [x[i] + h * slope[i] for i in range(len(slope))]

        k1 = ode(x, u, theta, lib)
        k2 = ode(shifted(k1, dt / 2), u, theta, lib)
        k3 = ode(shifted(k2, dt / 2), u, theta, lib)
        k4 = ode(shifted(k3, dt), u, theta, lib)
        return shifted([a + 2 * b + 2 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True)], dt / 6)

    return step


def quadrotor(horizon: int = 20, dt: float = 0.05) -> Problem:
    """Fly to a goal: 0 <= u <= 5, |velocity| <= 1 for k >= 1, stage cost times dt, the last state's not."""
    weights = np.array([10.0, 10.0, 10.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1])
    nominal = np.array([1.0, 0.01, 0.01, 0.02, 0.5, 0.5, -0.5])
    x_max = np.full(12, np.inf)
    x_max[6:9] = 1.0

    def draw(rng, batch):
        half_widths = np.repeat([0.3, 0.25, 0.5, 0.5], 3)
        x0s = rng.uniform(-half_widths, half_widths, (batch, 12))
        inertia = nominal[:4] * rng.uniform(0.8, 1.2, (batch, 4))
        return x0s, np.concatenate([inertia, rng.uniform(-0.8, 0.8, (batch, 3))], axis=1)

    return Problem(
        name="quadrotor",
        horizon=horizon,
        step=rk4(_quadrotor_ode, dt),
        q=dt * weights,
        r=np.full(4, 0.1 * dt),
        q_terminal=weights,
        u_min=np.zeros(4),
        u_max=np.full(4, 5.0),
        u_ref=np.full(4, 2.4525),
        x_ref=lambda theta: np.concatenate([theta[4:7], np.zeros(9)]),
        theta=nominal,
        draw=draw,
        x_max=x_max,
        ode=_quadrotor_ode,
        dt=dt,
    )
