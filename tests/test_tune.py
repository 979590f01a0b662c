"""The derivative of a closed loop, and tuning by it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sartor import MPC, Problem, Softening
from sartor.policy_gradient import cost_gradient, feedback, roll_out, sensitivities

STEPS = 12
X0 = jnp.array([2.0, 0.0])


class Theta(NamedTuple):
    """A cart that is steered to zero: roots of the cost's weights, and its mass."""

    weights: Any
    terminal: Any
    mass: Any


def dynamics(x, u, k, theta):
    return jnp.stack([x[0] + 0.2 * x[1], x[1] + 0.2 * u[0] / theta.mass - 0.01 * x[1] ** 3])


PROBLEM = Problem(
    dynamics=dynamics,
    stage_cost=lambda x, u, k, theta: jnp.sum(theta.weights[:2] ** 2 * x**2) + jnp.sum((theta.weights[2:] * u) ** 2),
    terminal_cost=lambda x, theta: jnp.sum((theta.terminal * x) ** 2),
    horizon=6,
    u_min=[-1.0],
    u_max=[1.0],
    constraints=lambda x, u, k, theta: jnp.where(k > 0, -0.8 - x[1:], -1.0),  # of what can still be chosen
    terminal_constraints=lambda x, theta: -0.8 - x[1:],
    softening=Softening(5.0, 20.0),
)
THETA = Theta(jnp.array([1.0, 0.3, 0.4]), jnp.array([1.5, 0.7]), jnp.array(1.1))


def build(theta):
    return MPC(PROBLEM, theta)


def model(x, u, k):
    return dynamics(x, u, k, THETA)


def cost(xs, us):
    return jnp.sum(xs**2) + 0.1 * jnp.sum(us**2) + 3.0 * jnp.sum(jnp.maximum(-0.7 - xs[:, 1], 0.0))


@pytest.fixture(scope="module")
def loop():
    rollout = roll_out(model, build(THETA), X0, STEPS)
    return rollout, jax.jit(lambda rollout: feedback(build(THETA), rollout))(rollout)


def test_the_loop_meets_bounds_and_soft_rows(loop):
    rollout, along = loop
    assert int(rollout.failed) == 0 and bool(along.regular.all())
    assert np.isclose(np.abs(rollout.us), 1.0).any() and (rollout.sols.mus.path > 1e-3).any()
    assert (rollout.xs[:, 1] < -0.7).any()  # the penalty of the closed loop


def test_with_the_true_model_it_is_the_gradient(loop):
    rollout, along = loop
    slopes = jax.grad(cost, (0, 1))(rollout.xs, rollout.us)
    found = jax.jit(lambda: cost_gradient(build, THETA, rollout, along, slopes))()
    of = jax.jit(lambda theta: (lambda r: cost(r.xs, r.us))(roll_out(model, build(theta), X0, STEPS)))
    flat, unravel = jax.flatten_util.ravel_pytree(THETA)
    h = 1e-5
    differences = [(of(unravel(flat + h * d)) - of(unravel(flat - h * d))) / (2 * h) for d in np.eye(flat.size)]
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], differences, rtol=1e-6, atol=1e-6)
    Xs, Us = jax.jit(lambda: sensitivities(build, THETA, rollout, along))()
    chained = jnp.einsum("tx,txn->n", slopes[0], Xs) + jnp.einsum("tu,tun->n", slopes[1], Us)
    np.testing.assert_allclose(chained, jax.flatten_util.ravel_pytree(found)[0], rtol=1e-9, atol=1e-9)
