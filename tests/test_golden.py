"""Solutions and sensitivities computed by other solvers; tests/golden/GOLDEN.md defines the problems."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cadelac
import sartor
from sartor.sensitivity import action_hessian, first_control_adjoint, linearise
from sartor.systems import pendulum, quadrotor

GOLDEN = Path(__file__).parent / "golden"


def largest_relative(value, reference):
    """Per sample: largest difference over the largest entry of the reference (1 if that is 0)."""
    axes = tuple(range(1, reference.ndim))
    size = np.abs(reference).max(axes)
    return np.abs(np.asarray(value) - reference).max(axes) / np.where(size == 0, 1.0, size)


def solved(problem, thetas, x0s, guesses):
    """Solutions with their Jacobians in theta and x0, one compiled function for all samples."""

    def one(theta, x0, guess):
        def us(theta, x0):
            sol = sartor.solve(problem, theta, x0, guess=guess)
            return sol.us, sol

        jacobians, sol = jax.jacfwd(us, argnums=(0, 1), has_aux=True)(theta, x0)
        return sol, *jacobians

    return jax.jit(jax.vmap(one))(thetas, x0s, guesses)


@pytest.fixture(scope="module", params=["pendulum", "quadrotor"])
def case(request):
    data = dict(np.load(GOLDEN / f"{request.param}.npz"))
    p, x0s = jnp.asarray(data["p"]), jnp.asarray(data["x0"])
    num_samples, num_states, _ = data["xs"].shape
    if request.param == "pendulum":
        problem, thetas = pendulum.problem(), pendulum.Theta(*p.T)
        us = jnp.zeros((num_samples, num_states - 1, 1))
        xs = jax.vmap(lambda theta, x0, u: sartor.rollout(problem, theta, x0, u))(thetas, x0s, us)
    else:
        problem, thetas = quadrotor.problem(), quadrotor.Theta(*p.T[:4], p[:, 4:])
        us = jnp.full((num_samples, num_states - 1, 4), float(data["u_hover"]))
        xs = jnp.repeat(x0s[:, None], num_states, axis=1)
    return data, *solved(problem, thetas, x0s, jax.vmap(sartor.guess)(xs, us))


def test_every_sample_reaches_the_golden_trajectory(case):
    data, sol, _, _ = case
    assert np.all(sol.successful)
    np.testing.assert_allclose(sol.cost, data["cost"], rtol=1e-8)
    np.testing.assert_allclose(sol.us, data["us"], atol=1e-6)
    np.testing.assert_allclose(sol.xs, data["xs"], atol=1e-6)


def test_multipliers_are_the_golden_ones(case):
    data, sol, _, _ = case
    assert largest_relative(sol.lams, data["lam_dyn"]).max() < 1e-5
    assert largest_relative(sol.mus.u_max - sol.mus.u_min, data["mu_u"]).max() < 1e-5


def test_sensitivities_to_the_initial_state_are_the_golden_ones(case):
    data, _, _, dus_dx0 = case
    assert largest_relative(dus_dx0, data["dus_dx0"]).max() < 1e-5
    assert largest_relative(dus_dx0[:, 0], data["du0_dx0"]).max() < 1e-5


def test_sensitivities_to_the_parameters_are_the_golden_ones(case):
    data, _, dus_dtheta, _ = case
    columns = [leaf if leaf.ndim == 4 else leaf[..., None] for leaf in jax.tree.leaves(dus_dtheta)]
    dus_dp = jnp.concatenate(columns, axis=-1)
    assert largest_relative(dus_dp, data["dus_dp"]).max() < 1e-5
    assert largest_relative(dus_dp[:, 0], data["du0_dp"]).max() < 1e-5


@pytest.fixture(scope="module")
def arm():
    data, problem = cadelac.DATA, cadelac.problem()

    def one(z, reference, x0):
        theta, guess = (z, reference), sartor.guess(reference.at[0].set(x0), jnp.zeros((12, 7)))
        sol = sartor.solve(problem, theta, x0, guess=guess)
        lin = linearise(problem, theta, sol)
        adjoint = first_control_adjoint(lin)
        return sol, -adjoint.lams, action_hessian(problem, lin, sol)

    inputs = (jnp.asarray(data[name]) for name in ("z", "ref", "x0"))
    return data, *jax.jit(jax.vmap(one))(*inputs)


def test_the_arm_moves_as_the_golden_one():
    data = cadelac.DATA
    x1 = jax.jit(jax.vmap(cadelac.step))(data["x0"], data["us"][:, 0], data["z"])
    np.testing.assert_allclose(x1, data["check_F_x0_u0"], atol=1e-11)


@pytest.mark.slow
def test_arm_reaches_the_golden_trajectory(arm):
    data, sol, _, _ = arm
    assert np.all(sol.successful)
    np.testing.assert_allclose(sol.us, data["us"], atol=1e-6)
    np.testing.assert_allclose(sol.xs, data["xs"], atol=1e-6)
    assert largest_relative(sol.lams[:, 1:], data["pi"]).max() < 1e-5


@pytest.mark.slow
def test_arm_error_sensitivities_are_the_golden_ones(arm):
    data, _, du0_dlams, _ = arm
    assert largest_relative(du0_dlams[:, :, 1:], data["du0_de"]).max() < 1e-5
    assert largest_relative(du0_dlams[:, :, 0], data["du0_dx0"]).max() < 1e-5


@pytest.mark.slow
def test_curvature_gives_the_golden_slopes_away_from_bounds(arm):
    # The slope at ±0.1 Nm is Λ ε but for third-order terms; the difference of the signs cancels the bounds' part.
    data, _, _, Lambda = arm
    slopes = 0.5 * (data["dJdu0"][:, :, 0] - data["dJdu0"][:, :, 1])
    assert largest_relative(data["action_eps"] * Lambda, slopes).max() < 1e-5
