"""Experts and learners of the imitation experiments: pendulum and cart-pole with a cost that can be learned.

    C(τ) = ½ τᵀ diag(w) τ + (√w ∘ g)ᵀ τ,   τ = [x; u]                                                          (D19)

w, the weights, lie in (0, 1); g is the goal, with the sign of a linear term. The expert has w = (goal weights, 0.001)
and √w ∘ g = (-√goal weights ∘ goal state, 0). A plan has N = 19 controls, the 20 of the paper less the last one, which
moves no state.

Source: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 5.3, and its code.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sartor.imitate import Demonstrations
from sartor.parameters import bounded, positive
from sartor.problem import Problem
from sartor.solve import solve
from sartor.solvers.box_ddp import BoxDDP
from sartor.systems import cartpole, pendulum

HORIZON = 19
SOLVER = BoxDDP()  # there are no other constraints than bounds of controls
Damping = Literal["rate", "angle"]
"""What friction acts on: the rate, as the paper's text says, or the angle, as in its code."""


class Theta(NamedTuple):
    """What can be learned."""

    dx: Any
    """Parameters of the dynamics."""
    weights: Any
    """w, (nx + 1,)."""
    goal: Any
    """g, (nx + 1,)."""


class Windy(NamedTuple):
    """A pendulum with friction in the wind."""

    g: Any  # gravity [m/s²]
    m: Any  # mass [kg]
    l: Any  # length [m]
    d: Any  # damping [1/s²] as published, [1/s] as the text says
    b: Any  # angle of the force on the mass [rad]


class System(NamedTuple):
    """A problem with its expert and where a learner begins."""

    problem: Problem
    true: Theta
    start: Theta
    sample: Callable
    """sample(rng, n) -> initial states (n, nx)."""


def _cost(x: Array, u: Array, theta: Theta) -> Array:
    tau = jnp.concatenate([x, u])
    return 0.5 * jnp.sum(theta.weights * tau**2) + jnp.sum(jnp.sqrt(theta.weights) * theta.goal * tau)


def _stage_cost(x: Array, u: Array, k: Any, theta: Theta) -> Float[Array, ""]:
    return _cost(x, u, theta)


def _terminal_cost(x: Array, theta: Theta) -> Float[Array, ""]:
    return _cost(x, jnp.zeros(1, x.dtype), theta)


def _pendulum_step(x: Array, u: Array, k: Any, theta: Theta) -> Array:
    return pendulum.dynamics(x, u, k, theta.dx)


def _cartpole_step(x: Array, u: Array, k: Any, theta: Theta) -> Array:
    return cartpole.dynamics(x, u, k, theta.dx)


def _windy_step(x: Array, u: Array, k: Any, theta: Theta) -> Array:
    """The expert of section 5.4: damping -d ω and a force that turns gravity by the angle b."""
    return _damped_step(x, u, theta.dx, x[2])


def _windy_step_on_angle(x: Array, u: Array, k: Any, theta: Theta) -> Array:
    """As the authors' code has it: the damping acts on the angle."""
    return _damped_step(x, u, theta.dx, jnp.arctan2(x[1], x[0]))


def _damped_step(x: Array, u: Array, dx: Windy, damped: Array) -> Array:
    dt, angle = pendulum.DT, jnp.arctan2(x[1], x[0])
    pull = 1.5 * dx.g / dx.l * jnp.sin(angle + dx.b) + 3.0 * u[0] / (dx.m * dx.l**2)
    rate = x[2] + dt * (pull - dx.d * damped)
    angle = angle + dt * rate
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), rate])


def _problem(step: Callable, limit: float) -> Problem:
    return Problem(
        dynamics=step, stage_cost=_stage_cost, terminal_cost=_terminal_cost, horizon=HORIZON, u_min=[-limit],
        u_max=[limit],
    )  # fmt: skip


def _true(dx: Any, weights: tuple[float, ...], goal: tuple[float, ...]) -> Theta:
    w = np.array([*weights, 0.001])
    g = -np.array([*goal, 0.0])  # √w ∘ g = -√w ∘ goal
    return Theta(jax.tree.map(jnp.asarray, dx), jnp.asarray(w), jnp.asarray(g))


def _start(dx: Any, nx: int) -> Theta:
    return Theta(jax.tree.map(positive, dx), bounded(np.full(nx + 1, 0.5), 0.0, 1.0), jnp.zeros(nx + 1))


def _pendulum_states(rng: np.random.Generator, n: int) -> np.ndarray:
    angle, rate = rng.uniform(-np.pi / 2, np.pi / 2, n), rng.uniform(-1.0, 1.0, n)
    return np.stack([np.cos(angle), np.sin(angle), rate], 1)


def _cartpole_states(rng: np.random.Generator, n: int) -> np.ndarray:
    p, v = rng.uniform(-0.5, 0.5, (2, n))
    angle, rate = rng.uniform(-np.pi, np.pi, n), rng.uniform(-1.0, 1.0, n)
    return np.stack([p, v, np.cos(angle), np.sin(angle), rate], 1)


def system(name: str) -> System:
    """The pendulum or the cart-pole of section 5.3."""
    if name == "pendulum":
        true = _true(pendulum.Theta(10.0, 1.0, 1.0), pendulum.WEIGHTS, (1.0, 0.0, 0.0))
        start = _start(pendulum.Theta(15.0, 3.0, 0.5), 3)
        return System(_problem(_pendulum_step, 2.0), true, start, _pendulum_states)
    true = _true(cartpole.Theta(9.8, 1.0, 0.1, 0.5), cartpole.WEIGHTS, (0.0, 0.0, 1.0, 0.0, 0.0))
    start = _start(cartpole.Theta(9.8, 3.0, 0.1, 1.0), 5)
    return System(_problem(_cartpole_step, 100.0), true, start, _cartpole_states)


def windy(damping: Damping) -> System:
    """The expert of section 5.4, whose damping (of the rate, or of the angle) and wind no learner has."""
    dx = Windy(10.0, 1.0, 1.0, 1.0, 0.1)
    step = {"rate": _windy_step, "angle": _windy_step_on_angle}[damping]
    true = _true(dx, pendulum.WEIGHTS, (1.0, 0.0, 0.0))
    return System(_problem(step, 2.0), true, _start(dx, 3), _pendulum_states)


def demonstrate(system: System, num_samples: int, seed: int) -> Demonstrations:
    """Plans of the expert from random states; from states whose solve fails there is none, others are drawn."""
    rng = np.random.default_rng(seed)
    us, xs = np.zeros((0, HORIZON, 1)), np.zeros((0, HORIZON + 1, len(system.start.goal) - 1))
    plan = jax.jit(jax.vmap(lambda x0: solve(system.problem, system.true, x0, solver=SOLVER, throw=False)))
    while len(us) < num_samples:
        sols = plan(jnp.asarray(system.sample(rng, 32)))
        good = np.asarray(sols.successful)
        us, xs = np.concatenate([us, np.asarray(sols.us)[good]]), np.concatenate([xs, np.asarray(sols.xs)[good]])
    return Demonstrations(us[:num_samples], xs[:num_samples])
