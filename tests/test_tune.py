"""The derivative of a closed loop, and tuning by it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sartor import MPC, Problem, Softening, estimators
from sartor.policy_gradient import cost_gradient, feedback, policy_jacobian, roll_out, sensitivities

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
    direct = jax.jit(lambda: policy_jacobian(build, THETA, rollout, along))()
    Xs, Us = sensitivities(along.A, along.B, along.K, direct)
    chained = jnp.einsum("tx,txn->n", slopes[0], Xs) + jnp.einsum("tu,tun->n", slopes[1], Us)
    np.testing.assert_allclose(chained, jax.flatten_util.ravel_pytree(found)[0], rtol=1e-9, atol=1e-9)


# --- Estimators ------------------------------------------------------------------------------------------------------

N = 5
CURVATURE = np.diag([1.0, 2.0, 0.5, 3.0, 1.5]) + 0.3
SLOPE = np.array([1.0, -2.0, 0.5, 0.0, 1.5])
BIASED = jnp.asarray(1.3 * SLOPE + np.array([0.2, 0.3, -0.4, 0.5, 0.0]))


def measured(estimator, count, memory, distance=0.1):
    """Estimates at θ = 0 of ½ θᵀHθ + gᵀθ, whose smoothed gradient there is g, with a model that is wrong."""
    v = jax.random.normal(jax.random.key(0), (count, N))
    v = v / jnp.linalg.norm(v, axis=1, keepdims=True)
    s = v @ SLOPE + 0.5 * distance * jnp.einsum("bi,ij,bj->b", v, CURVATURE, v)
    return jax.vmap(lambda v, s: estimator(3, BIASED, v, s, memory)[0])(v, s)


@pytest.mark.parametrize(
    "estimator, memory",
    [
        (estimators.Zeroth(), ()),
        (estimators.ControlVariate(), estimators.Regression(jnp.asarray(0.0), jnp.asarray(0.0))),
        (estimators.ControlVariate(), estimators.Regression(jnp.asarray(0.9), jnp.asarray(1.2))),
    ],
    ids=["zeroth", "control_variate_1", "control_variate_0.75"],
)
def test_unbiased_estimators_have_the_smoothed_gradient_as_their_mean(estimator, memory):
    found = np.asarray(measured(estimator, 200_000, memory))
    error = found.std(0) / len(found) ** 0.5
    assert np.all(np.abs(found.mean(0) - SLOPE) < 4.5 * error) and np.all(error < 0.02)


def test_the_control_variate_lowers_the_variance_as_its_formula_says():
    known = estimators.Regression(jnp.asarray(0.9), jnp.asarray(1.2))
    for estimator, memory, rest in (
        (estimators.Zeroth(), (), SLOPE), (estimators.ControlVariate(), known, SLOPE - 0.75 * np.asarray(BIASED)),
    ):  # fmt: skip
        variance = np.asarray(measured(estimator, 200_000, memory, distance=1e-6)).var(0).sum()
        assert variance == pytest.approx((N - 1) * rest @ rest, rel=0.05)


def test_the_regression_finds_the_scale_of_the_model():
    estimator = estimators.ControlVariate()
    memory = estimator.init(BIASED)
    rng = np.random.default_rng(0)
    for k in range(30):
        v = jnp.asarray(rng.normal(size=N))
        v = v / jnp.linalg.norm(v)
        _, memory = estimator(k, BIASED, v, 0.4 * BIASED @ v, memory)
    assert float(memory.products / memory.squares) == pytest.approx(0.4)


@pytest.mark.parametrize("estimator", [estimators.InverseVariance(), estimators.Alpha(0.995)], ids=["inverse", "alpha"])
def test_mixtures_trust_a_right_model_and_not_a_wrong_one(estimator):
    rng, right = np.random.default_rng(0), {}
    for name, d in (("right", jnp.asarray(SLOPE)), ("wrong", -20.0 * jnp.asarray(SLOPE))):
        memory = estimator.init(d)
        estimate, g = jax.jit(estimator), d
        for k in range(400):
            v = rng.normal(size=N)
            v = v / np.linalg.norm(v)
            g, memory = estimate(k, d, v, SLOPE @ v, memory)
        zeroth = N * (SLOPE @ v) * v
        right[name] = float((g - zeroth) @ (d - zeroth) / ((d - zeroth) @ (d - zeroth)))
    assert (
        right["right"] > (0.99 if isinstance(estimator, estimators.InverseVariance) else 0.2) and right["wrong"] < 0.05
    )


def test_the_hybrid_begins_with_the_model():
    v, s = jnp.eye(N)[0], jnp.asarray(2.0)
    np.testing.assert_array_equal(estimators.Hybrid(0.5)(0, BIASED, v, s, ())[0], BIASED)
    expected = 0.5 * BIASED + 0.5 * N * 2.0 * v
    np.testing.assert_allclose(estimators.Hybrid(0.5)(3, BIASED, v, s, ())[0], expected)
