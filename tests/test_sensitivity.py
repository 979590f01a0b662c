"""Error and action sensitivities, and the labels made of them, against the problems that define them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import sartor
from cases import PROBLEMS
from sartor import RESULTS

SOLVER = sartor.SQP(tol=1e-11)
STEP = 1e-4
SAMPLES = {"random_lq": 0, "obstacle": 0, "neural": 1, "soft_both": 0}


class Disturbed(eqx.Module):
    """x_{k+1} = f(x_k - ê_k, u_k) + ê_{k+1} + e_{k+1}: a defect e that propagates, an error ê that does not."""

    fn: Any = eqx.field(static=True)

    def __call__(self, x, u, k, theta):
        theta, defect, error = theta
        return self.fn(x - error[k], u, k, theta) + error[k + 1] + defect[k]


class Ignoring(eqx.Module):
    """A function of the problem, with the parameters of the disturbed one."""

    fn: Any = eqx.field(static=True)

    def __call__(self, *args):
        return self.fn(*args[:-1], args[-1][0])


class Later(eqx.Module):
    """A function of the stage, one stage later."""

    fn: Any = eqx.field(static=True)

    def __call__(self, x, u, k, theta):
        return self.fn(x, u, k + 1, theta)


def rebuilt(problem, dynamics, other, horizon):
    """The problem with other functions."""
    wrap = lambda fn: None if fn is None else other(fn)
    return sartor.Problem(
        dynamics=dynamics, stage_cost=wrap(problem.stage_cost), terminal_cost=wrap(problem.terminal_cost),
        horizon=horizon, u_min=problem.u_min, u_max=problem.u_max, constraints=wrap(problem.constraints),
        terminal_constraints=wrap(problem.terminal_constraints), softening=problem.softening,
    )  # fmt: skip


class Answers(NamedTuple):
    """What `sartor` says, and central differences."""

    defect: Any
    trajectory: Any
    numeric_defect: Any
    numeric_trajectory: Any
    successful: Any


@eqx.filter_jit
def answers(problem, theta, x0):
    """Error sensitivities of u_0 in both readings, with solves of the disturbed problem around them."""
    N, nx = problem.horizon, x0.shape[0]
    disturbed = rebuilt(problem, Disturbed(problem.dynamics), Ignoring, N)

    def first_control(vector):
        defect, error = vector[: N * nx].reshape(N, nx), vector[N * nx :].reshape(N, nx)
        error = jnp.concatenate([jnp.zeros((1, nx)), error])  # the measured state has none
        sol = sartor.solve(disturbed, (theta, defect, error), x0, solver=SOLVER, throw=False)
        return sol.us[0], sol.successful, sol

    steps = STEP * jnp.eye(2 * N * nx)
    us, fine, _ = jax.vmap(first_control)(jnp.concatenate([steps, -steps, jnp.zeros((1, 2 * N * nx))]))
    sol = sartor.solve(problem, theta, x0, solver=SOLVER, throw=False)
    defect = sartor.error_sensitivity(problem, theta, sol)
    A = sartor.sensitivity.linearise(problem, theta, sol).lq.A
    numeric = ((us[: 2 * N * nx] - us[2 * N * nx : -1]) / (2.0 * STEP)).T.reshape(-1, 2, N, nx)
    trajectory = sartor.sensitivity.trajectory_error(A, defect)
    return Answers(defect, trajectory, numeric[:, 0], numeric[:, 1], jnp.all(fine))


@pytest.fixture(scope="module", params=SAMPLES)
def found(request):
    case = PROBLEMS[request.param]
    return answers(case.problem, case.theta, case.x0s[SAMPLES[request.param]])


def test_error_sensitivity_equals_central_differences_of_the_first_control(found):
    assert bool(found.successful)
    size = np.abs(found.numeric_defect).max()
    assert size > 1e-2
    np.testing.assert_allclose(found.defect, found.numeric_defect, atol=1e-6 * size)


@pytest.mark.parametrize("found", ["random_lq", "obstacle"], indirect=True)
def test_error_of_the_trajectory_is_a_defect_that_does_not_propagate(found):
    """For linear dynamics, where what the error does to their Jacobian does not count."""
    size = np.abs(found.numeric_trajectory).max()
    np.testing.assert_allclose(found.trajectory, found.numeric_trajectory, atol=1e-6 * size)
    assert np.max(np.abs(found.trajectory - found.defect)) > 1e-2 * size


@eqx.filter_jit
def cost_of_first_control(problem, theta, x0, u0s):
    """Optimal cost with u_0 fixed: that of stage 0 and of the remaining problem from where it leads."""
    later = lambda fn: fn if fn in (problem.terminal_cost, problem.terminal_constraints) else Later(fn)
    tail = rebuilt(problem, Later(problem.dynamics), later, problem.horizon - 1)
    first = jnp.asarray(0)

    def one(u0):
        sol = sartor.solve(tail, theta, problem.dynamics(x0, u0, first, theta), solver=SOLVER, throw=False)
        return problem.stage_cost(x0, u0, first, theta) + sol.cost

    return jax.vmap(one)(u0s)


@pytest.fixture(scope="module")
def inside():
    """A pendulum whose first control is not at a bound."""
    case = PROBLEMS["pendulum"]
    problem, theta, x0 = case.problem, case.theta, jnp.asarray([0.15, -0.3])
    sol = sartor.solve(problem, theta, x0, solver=SOLVER)
    assert np.all(np.abs(sol.us[0]) < 1.9)
    return problem, theta, x0, sol


def test_action_gradient_equals_central_differences_of_the_cost(inside):
    problem, theta, x0, sol = inside
    u0 = sol.us[0] + 0.3
    plus, minus = cost_of_first_control(problem, theta, x0, jnp.stack([u0 + 1e-4, u0 - 1e-4]))
    gradient, result = sartor.action_gradient(problem, theta, x0, u0, sol=sol, solver=SOLVER)
    assert result == RESULTS.successful
    np.testing.assert_allclose(gradient, [(plus - minus) / 2e-4], rtol=1e-6)


def test_curvature_is_the_limit_of_resolving(inside):
    """The slope at distance ε is Λε to second order: a quarter of the distance leaves a sixteenth of the difference."""
    problem, theta, x0, sol = inside
    resolve = lambda eps: sartor.action_sensitivity(
        problem, theta, x0, sol, eps=eps, method="resolve", solver=SOLVER
    )  # fmt: skip
    far, near = resolve(0.2) / 0.2, resolve(0.05) / 0.05
    limit = sartor.action_sensitivity(problem, theta, x0, sol, eps=1.0)
    error_far, error_near = np.abs(far - limit) / limit, np.abs(near - limit) / limit
    assert 1e-8 < error_near < 1e-2
    np.testing.assert_allclose(error_far / error_near, 16.0, rtol=0.2)


@pytest.mark.parametrize("method", ["curvature", "resolve"])
def test_at_a_bound_the_action_sensitivity_is_its_multiplier(method):
    case = PROBLEMS["pendulum"]
    x0 = case.x0s[2]
    sol = sartor.solve(case.problem, case.theta, x0, solver=SOLVER)
    multiplier = sol.mus.u_min[0] + sol.mus.u_max[0]
    assert float(multiplier[0]) > 0.1
    found = sartor.action_sensitivity(case.problem, case.theta, x0, sol, method=method, solver=SOLVER)
    np.testing.assert_allclose(found, multiplier, rtol=1e-10)
    gradient, _ = sartor.action_gradient(case.problem, case.theta, x0, sol.us[0], sol=sol, solver=SOLVER)
    np.testing.assert_allclose(np.abs(gradient), multiplier, rtol=1e-6)


@pytest.fixture(scope="module")
def several():
    """A problem with three controls of which none is at a bound."""
    case = PROBLEMS["random_lq"]
    x0 = 0.02 * case.x0s[0]
    sol = sartor.solve(case.problem, case.theta, x0)
    lin = sartor.sensitivity.linearise(case.problem, case.theta, sol)
    Lambda = sartor.sensitivity.action_hessian(case.problem, lin, sol)
    return case.problem, case.theta, x0, sol, np.asarray(Lambda)


def test_perturbations_one_by_one_and_together(several):
    problem, theta, x0, sol, Lambda = several
    eps = np.asarray([0.1, 0.02, 0.3])
    for perturb, expected in (("one_by_one", np.abs(np.diag(Lambda) * eps)), ("together", np.abs(Lambda @ eps))):
        found = sartor.action_sensitivity(problem, theta, x0, sol, eps=eps, perturb=perturb)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("error", ["defect", "trajectory"])
def test_label_combines_the_controls_in_each_reading(several, error):
    problem, theta, x0, sol, Lambda = several
    du0_de = np.asarray(sartor.error_sensitivity(problem, theta, sol))
    if error == "trajectory":
        A = sartor.sensitivity.linearise(problem, theta, sol).lq.A
        du0_de = np.asarray(sartor.sensitivity.trajectory_error(A, jnp.asarray(du0_de)))
    g = np.diag(Lambda) * 0.1
    expected = {
        "signed": np.abs(np.einsum("j,jkx->kx", g, du0_de)),
        "absolute": np.einsum("j,jkx->kx", g, np.abs(du0_de)),
        "regret": np.sqrt(np.einsum("ikx,ij,jkx->kx", du0_de, Lambda, du0_de)),
    }
    assert np.max(np.abs(expected["signed"] - expected["absolute"])) > 1e-3
    for combine, S in expected.items():
        found = sartor.label(problem, theta, x0, combine=combine, error=error)
        assert found.result == RESULTS.successful
        np.testing.assert_allclose(found.S, S, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found.du0_de, du0_de, rtol=1e-7, atol=1e-9)


def test_labels_of_a_batch_are_those_of_single_samples_and_a_failed_one_is_refused():
    problem, theta = cases.infeasible(), jnp.asarray(5.0)
    x0s = jnp.asarray([[3.5], [0.0], [4.5]])
    run = jax.jit(jax.vmap(lambda x0: sartor.label(problem, theta, x0)))
    labels = run(x0s)
    assert [bool(cases.sample(labels.result, i) == RESULTS.successful) for i in range(3)] == [True, False, True]
    assert cases.sample(labels.result, 1) == RESULTS.infeasible
    assert np.all(np.isnan(labels.S[1])) and np.all(np.isfinite(labels.S[::2]))
    np.testing.assert_allclose(labels.S[2], sartor.label(problem, theta, x0s[2]).S, rtol=1e-9)


def limited(softening):
    """Two controls whose sum is limited at every stage, by a row that is active at the first one."""
    return sartor.Problem(
        dynamics=lambda x, u, k, theta: x + jnp.stack([u[0] + 0.5 * u[1], u[1]]),
        stage_cost=lambda x, u, k, theta: theta * x @ x + 0.5 * u @ u + 0.1 * u[0] * u[1],
        terminal_cost=lambda x, theta: theta * x @ x,
        horizon=3, u_min=[-9.0, -9.0], u_max=[9.0, 9.0],
        constraints=lambda x, u, k, theta: (u[0] + u[1] - 1.0)[None], softening=softening,
    )  # fmt: skip


@pytest.mark.parametrize("softening", [None, sartor.Softening(50.0, 3.0)], ids=["hard", "soft, held at its kink"])
def test_rows_of_the_first_stage_that_are_active_count_in_the_slope(softening):
    problem, theta, x0 = limited(softening), jnp.asarray(1.0), jnp.asarray([-3.0, -4.0])
    sol = sartor.solve(problem, theta, x0, solver=SOLVER)
    assert 0.1 < float(sol.mus.path[0, 0]) < 49.0
    eps = 1e-4
    resolved, curved = (
        sartor.action_sensitivity(problem, theta, x0, sol, eps=eps, method=method, solver=SOLVER)
        for method in ("resolve", "curvature")
    )
    assert np.all(resolved > 1.0)
    np.testing.assert_allclose(curved, resolved, rtol=1e-5)


def test_single_precision_gives_single_precision_sensitivities(several):
    problem, theta, x0, _, _ = several
    theta, x0 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (theta, x0))
    sol = sartor.solve(problem, theta, x0)
    du0_de, label = sartor.error_sensitivity(problem, theta, sol), sartor.label(problem, theta, x0)
    assert du0_de.dtype == label.S.dtype == label.dJ_du0.dtype == jnp.float32
    expected = sartor.error_sensitivity(*several[:2], several[3])
    np.testing.assert_allclose(du0_de, expected, atol=1e-3 * np.abs(expected).max())


def test_regret_factor_gives_the_cost_of_an_error_to_second_order(inside):
    """To plan with the error, apply the first control without it and go on optimally costs ½‖F e‖² more."""
    problem, theta, x0, sol = inside
    N, nx = problem.horizon, x0.shape[0]
    factor = sartor.regret_factor(problem, theta, sol)
    disturbed = rebuilt(problem, Disturbed(problem.dynamics), Ignoring, N)
    direction = jnp.asarray(np.random.default_rng(5).normal(size=(N, nx)))

    @jax.jit
    def planned(e):
        return sartor.solve(disturbed, (theta, e, jnp.zeros((N + 1, nx))), x0, solver=SOLVER, throw=False).us[0]

    errors = []
    for size in (0.02, 0.01):
        e = size * direction
        costs = cost_of_first_control(problem, theta, x0, jnp.stack([planned(e), sol.us[0]]))
        regret = 0.5 * jnp.sum(jnp.einsum("ikx,kx->i", factor, e) ** 2)
        errors.append(abs(float((costs[0] - costs[1]) / regret) - 1.0))
    assert errors[1] < 0.1 and errors[1] < 0.7 * errors[0]


def test_wrong_options_of_the_sensitivities_are_named(inside):
    problem, theta, _, sol = inside
    with pytest.raises(ValueError, match="curvature must be"):
        sartor.error_sensitivity(problem, theta, sol, curvature="Exact")
    with pytest.raises(ValueError, match="error must be"):
        sartor.regret_factor(problem, theta, sol, error="state")
