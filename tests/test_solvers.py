"""Every solver on every problem: converges, is self-consistent, survives its neighbours, and says why it failed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import sartor
from cases import PAIRS, PROBLEMS, SOLVERS, repeated, residual_norms, sample, solve_batch
from sartor import RESULTS
from sartor.systems import linear

all_pairs = pytest.mark.parametrize("name, solver", PAIRS)
_solved = {}


def solved(case, solver):
    return solve_batch(case.problem, repeated(case.theta, case.x0s), case.x0s, solver)


@pytest.fixture(scope="module")
def solutions():
    """The solutions of a pair from a cold start, as a batch; each pair is solved once."""

    def get(name, solver):
        if (name, solver) not in _solved:
            case = PROBLEMS[name]
            _solved[name, solver] = solved(case, SOLVERS[solver])
        return _solved[name, solver]

    yield get
    _solved.clear()


@all_pairs
def test_converges_from_a_cold_start(name, solver, solutions):
    case, sols = PROBLEMS[name], solutions(name, solver)
    assert jnp.all(sols.successful), [RESULTS[sample(sols.result, i)] for i in range(len(case.x0s))]
    assert jnp.all(residual_norms(case.problem, case.theta, case.x0s, sols) <= 1e-8)
    assert jnp.all(sols.stats.kkt_norm <= 1e-8) and jnp.all(sols.stats.num_steps >= 1)


@all_pairs
def test_solution_is_consistent_with_itself(name, solver, solutions):
    (problem, theta, x0s, touches), sols = PROBLEMS[name], solutions(name, solver)
    check = eqx.filter_jit(
        lambda problem, theta, x0, sol: (
            sartor.rollout(problem, theta, x0, sol.us),
            sartor.total_cost(problem, theta, sol.xs, sol.us),
            sartor.violations(problem, theta, sol),
        )
    )
    active = set()
    for i, x0 in enumerate(x0s):
        sol = sample(sols, i)
        xs, cost, violated = check(problem, theta, x0, sol)
        np.testing.assert_allclose(sol.xs, xs, atol=1e-7)
        np.testing.assert_allclose(sol.cost, cost, rtol=1e-12)
        np.testing.assert_array_equal(sol.xs[0], x0)
        assert jnp.all((sol.us >= problem.u_min) & (sol.us <= problem.u_max))
        if problem.softening is None:
            assert all(jnp.max(leaf, initial=0.0) <= 1e-8 for leaf in jax.tree.leaves(violated))
        for field in ("u_min", "u_max", "path", "terminal"):
            mus, slacks = getattr(sol.mus, field), getattr(sol.slacks, field)
            assert jnp.all(mus >= 0) and jnp.all(slacks >= 0) and jnp.all(mus * slacks <= 1e-8)
            active |= {field} if jnp.max(mus, initial=0.0) > 1e-3 else set()
    assert set(touches) <= active, "the case is meant to have active rows"


@pytest.mark.parametrize("name", [name for name, solver in PAIRS if solver == "box_ddp"])
def test_sqp_and_box_ddp_agree(name, solutions):
    one, other = solutions(name, "sqp"), solutions(name, "box_ddp")
    np.testing.assert_allclose(one.cost, other.cost, rtol=1e-8)
    for field in ("us", "xs", "lams"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-6)
    np.testing.assert_allclose(one.mus.u_max - one.mus.u_min, other.mus.u_max - other.mus.u_min, atol=1e-6)


@pytest.mark.parametrize("name, solver", [("pendulum", "sqp"), ("pendulum", "box_ddp"), ("obstacle", "sqp")])
def test_batch_gives_every_sample_what_it_gets_alone(name, solver, solutions):
    """To rounding; the obstacle's last step, below the tolerance, may be one sooner or later."""
    case, sols = PROBLEMS[name], solutions(name, solver)
    for i, x0 in enumerate(case.x0s):
        alone = sartor.solve(case.problem, case.theta, x0, solver=SOLVERS[solver])  # compiles once, raises if it fails
        for field in ("us", "xs", "lams", "cost"):
            one, other = getattr(sample(sols, i), field), getattr(alone, field)
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11 if name == "pendulum" else 1e-7)


@pytest.mark.slow
def test_solve_without_jit_gives_what_it_gives_with_jit():
    case = PROBLEMS["scalar_lq"]
    solver = sartor.SQP()
    jitted = sartor.solve(case.problem, case.theta, case.x0s[0], solver=solver)
    with jax.disable_jit():
        plain = sartor.solve(case.problem, case.theta, case.x0s[0], solver=solver)
    np.testing.assert_allclose(plain.us, jitted.us, atol=1e-12)
    assert plain.stats.num_steps == jitted.stats.num_steps


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", ["theta", "x0"])
def test_a_bad_sample_is_named_and_leaves_its_neighbours_alone(solver, bad, solutions):
    case, good = PROBLEMS["pendulum"], solutions("pendulum", solver)
    thetas, x0s = repeated(case.theta, case.x0s), case.x0s
    if bad == "theta":
        thetas = thetas.at[1, 0].set(jnp.nan)
    else:
        x0s = x0s.at[1, 0].set(jnp.inf)
    mixed = solve_batch(case.problem, thetas, x0s, SOLVERS[solver])
    assert sample(mixed.result, 1) == RESULTS.non_finite
    for i in (0, 2):
        for one, other in zip(jax.tree.leaves(sample(good, i)), jax.tree.leaves(sample(mixed, i)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def infeasible_batch():
    problem, theta, x0s = cases.infeasible(), jnp.asarray(5.0), jnp.asarray([[3.5], [0.0], [4.5]])
    return problem, theta, x0s, solve_batch(problem, repeated(theta, x0s), x0s, sartor.SQP())


def test_infeasible_sample_is_named_and_leaves_its_neighbours_alone(infeasible_batch):
    problem, theta, x0s, sols = infeasible_batch
    assert [bool(ok) for ok in sols.successful] == [True, False, True]
    assert sample(sols.result, 1) == RESULTS.infeasible
    for i in (0, 2):
        alone = sartor.solve(problem, theta, x0s[i])
        np.testing.assert_allclose(sols.us[i], alone.us, rtol=0, atol=1e-11)


def test_violations_and_the_error_name_the_rows_of_an_infeasible_problem(infeasible_batch):
    problem, theta, x0s, sols = infeasible_batch
    rows = sartor.violations(problem, theta, sample(sols, 1))
    np.testing.assert_allclose(rows.terminal, [0.0, 3.0], atol=1e-5)  # 4 steps of 0.5 reach 2 of 5
    assert jnp.all(rows.path == 0)
    with pytest.raises(sartor.SolveError, match=r"terminal\[1\]") as error:
        sartor.solve(problem, theta, x0s[1])
    assert "terminal[0]" not in str(error.value) and "path[" not in str(error.value)


@pytest.mark.parametrize("solver", [sartor.SQP(max_steps=1), sartor.BoxDDP(max_steps=1)])
def test_too_few_steps_end_as_not_converged(solver):
    case = PROBLEMS["pendulum"]
    sol = sartor.solve(case.problem, case.theta, case.x0s[2], solver=solver, throw=False)
    assert sol.result == RESULTS.not_converged and sol.stats.num_steps == 1
    with pytest.raises(sartor.SolveError, match="max_steps"):
        sartor.solve(case.problem, case.theta, case.x0s[2], solver=solver)


@pytest.mark.parametrize("name", ["pendulum", "obstacle"])
def test_solution_as_guess_takes_at_most_two_steps(name, solutions):
    case = PROBLEMS[name]
    sols = solutions(name, "sqp")
    assert jnp.max(sols.stats.num_steps) > 2
    for i, x0 in enumerate(case.x0s):
        again = sartor.solve(case.problem, case.theta, x0, guess=sample(sols, i))
        assert again.stats.num_steps <= 2
        np.testing.assert_allclose(again.us, sols.us[i], atol=1e-7)


def test_real_time_step_has_an_error_of_second_order_in_the_disturbance(solutions):
    case = PROBLEMS["obstacle"]
    sol = sample(solutions("obstacle", "sqp"), 1)
    errors = []
    for size in (4e-2, 1e-2):
        x0 = sol.xs[0] + size * jnp.asarray([1.0, -1.0, 0.5, 0.5])
        exact = sartor.solve(case.problem, case.theta, x0, guess=sol)
        step = sartor.solve(case.problem, case.theta, x0, guess=sol, solver=sartor.SQP(real_time=True))
        assert step.successful and step.stats.num_steps == 1
        errors.append(float(jnp.max(jnp.abs(step.us - exact.us))))
    assert errors[1] < 0.15 * errors[0]


def test_real_time_step_from_the_shifted_guess_is_close_to_the_next_solution(solutions):
    case = PROBLEMS["obstacle"]
    guess = sartor.shift(sample(solutions("obstacle", "sqp"), 1))
    x0 = guess.xs[0] + 1e-2 * jnp.asarray([1.0, -1.0, 0.5, 0.5])
    exact = sartor.solve(case.problem, case.theta, x0, guess=guess)
    step = sartor.solve(case.problem, case.theta, x0, guess=guess, solver=sartor.SQP(real_time=True))
    error, without = (float(jnp.max(jnp.abs(sol.us[0] - exact.us[0]))) for sol in (step, guess))
    assert step.successful and error < 0.25 * without


def test_shift_moves_everything_one_stage_ahead(solutions):
    sol = sample(solutions("obstacle", "sqp"), 0)
    moved = sartor.shift(sol)
    for field in ("us", "xs", "lams"):
        one, other = getattr(sol, field), getattr(moved, field)
        np.testing.assert_array_equal(other[:-1], one[1:])
        np.testing.assert_array_equal(other[-1], one[-1])
    for field in ("u_min", "u_max", "path"):
        np.testing.assert_array_equal(getattr(moved.mus, field)[:-1], getattr(sol.mus, field)[1:])
    np.testing.assert_array_equal(moved.mus.terminal, sol.mus.terminal)


@pytest.mark.parametrize("name, solver", [("pendulum", "sqp"), ("pendulum", "box_ddp")])
def test_float32_is_within_1e_2_of_float64(name, solver, solutions):
    case = PROBLEMS[name]
    single = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf,
        case._replace(touches=()),
    )
    sols = solved(single, SOLVERS[solver])
    assert sols.us.dtype == sols.xs.dtype == sols.cost.dtype == jnp.float32
    assert jnp.all(sols.successful)
    expected = solutions(name, solver)
    for field in ("us", "xs"):
        value = getattr(expected, field)
        np.testing.assert_allclose(getattr(sols, field), value, atol=1e-2 * float(jnp.max(jnp.abs(value))))


def test_barrier_solution_satisfies_the_smoothed_conditions_across_a_change_of_the_active_set():
    """μt = τ for every row; as the weight grows, u_0 goes to its bound without a kink."""
    case, tau = PROBLEMS["scalar_lq"], 1e-3
    problem = eqx.tree_at(lambda p: (p.u_min, p.u_max), case.problem, (jnp.asarray([-0.8]), jnp.asarray([0.8])))
    x0s = jnp.linspace(0.4, 2.0, 81)[:, None]
    bounded = case._replace(problem=problem, x0s=x0s)
    smooth = solved(bounded, sartor.SQP(tau=tau))
    assert jnp.all(smooth.successful) and jnp.all(smooth.tau == tau)
    for field in ("u_min", "u_max"):
        products = getattr(smooth.mus, field) * getattr(smooth.slacks, field)
        np.testing.assert_allclose(products, tau, rtol=1e-4)
    assert jnp.all(residual_norms(problem, case.theta, x0s, smooth, tau) <= 1e-8)
    u0 = np.asarray(smooth.us[:, 0, 0])
    assert u0.min() < -0.78 and u0.max() > -0.6  # from the interior to the bound
    second = np.diff(u0, 2) / 0.02**2
    exact = np.asarray(solved(bounded, sartor.SQP()).us[:, 0, 0])
    kink = np.abs(np.diff(exact, 2)).max() / 0.02**2
    assert np.abs(second).max() < 0.3 * kink
    assert np.all(np.diff(u0) < 0)


def test_linear_family_with_saturated_controls_converges_for_all_128_samples(key):
    """nx 8, nu 4, N 20, |u| ≤ 1: bounds active at most stages, unstable systems among them."""
    keys = jax.random.split(key, (2, 128))
    thetas, x0s = jax.vmap(linear.sample)(keys[0]), jax.vmap(linear.sample_x0)(keys[1])
    problem = linear.problem(horizon=20)

    @jax.jit
    def solve(thetas, x0s):
        def one(theta, x0):
            sol = sartor.solve(problem, theta, x0, throw=False)
            return sol, cases.residual_norm(problem, theta, x0, sol)

        return jax.vmap(one)(thetas, x0s)

    sols, norms = solve(thetas, x0s)
    assert jnp.all(sols.successful) and jnp.max(norms) <= 1e-8
    at_bound = jnp.abs(sols.us) > 1.0 - 1e-6
    assert jnp.mean(jnp.any(at_bound, axis=(1, 2))) > 0.5


def steep(scale):
    """Held at x_N ≥ 1 against a cost that is `scale` times larger than everything else."""
    return sartor.Problem(
        dynamics=lambda x, u, k, theta: x + theta * u,
        stage_cost=lambda x, u, k, theta: scale * (x @ x + u @ u),
        terminal_cost=lambda x, theta: scale * x @ x,
        horizon=2, u_min=[-5.0], u_max=[5.0],
        terminal_constraints=lambda x, theta: 1.0 - x,
    )  # fmt: skip


def test_real_time_step_tells_infeasible_and_non_finite_problems():
    solver = sartor.SQP(real_time=True)
    problem, x0s = cases.infeasible(), jnp.asarray([[3.5], [0.0], [jnp.nan]])
    sols = jax.jit(jax.vmap(lambda x0: sartor.solve(problem, 5.0, x0, solver=solver)))(x0s)
    expected = (RESULTS.successful, RESULTS.infeasible, RESULTS.non_finite)
    for i in range(3):
        assert cases.sample(sols.result, i) == expected[i]


def test_real_time_step_from_a_solution_with_large_multipliers_stays_there():
    problem = steep(1e4)
    sol = sartor.solve(problem, 1.0, jnp.zeros(1))
    assert float(sol.mus.terminal[0]) > 1e4
    again = sartor.solve(problem, 1.0, jnp.zeros(1), guess=sol, solver=sartor.SQP(real_time=True))
    np.testing.assert_allclose(again.us, sol.us, atol=1e-7)


def test_a_feasible_problem_that_ran_out_of_steps_is_not_called_infeasible():
    problem = sartor.Problem(
        dynamics=lambda x, u, k, theta: x + u, stage_cost=lambda x, u, k, theta: 0.1 * u @ u,
        terminal_cost=lambda x, theta: jnp.zeros(()), horizon=2, u_min=[-9.0], u_max=[9.0],
        terminal_constraints=lambda x, theta: jnp.exp(x) - theta,
    )  # fmt: skip
    short = sartor.solve(problem, 1e-3, jnp.ones(1), solver=sartor.SQP(max_steps=4), throw=False)
    assert short.result == RESULTS.not_converged
    assert sartor.solve(problem, 1e-3, jnp.ones(1), throw=False).successful


@pytest.mark.parametrize("solver", cases.SOLVERS)
def test_traced_bounds_that_are_crossed_end_as_infeasible(solver):
    case = cases.PROBLEMS["scalar_lq"]

    @jax.jit
    def status(low, high):
        problem = eqx.tree_at(lambda p: (p.u_min, p.u_max), case.problem, (low, high))
        sol = sartor.solve(problem, case.theta, jnp.asarray([-5.0]), solver=cases.SOLVERS[solver])
        return sol.result

    assert status(jnp.asarray([0.5]), jnp.asarray([-0.5])) == RESULTS.infeasible
    assert status(jnp.asarray([-0.5]), jnp.asarray([0.5])) == RESULTS.successful


def test_shift_takes_one_solution():
    case = cases.PROBLEMS["scalar_lq"]
    sols = jax.vmap(lambda x0: sartor.solve(case.problem, case.theta, x0))(case.x0s)
    with pytest.raises(ValueError, match=r"jax\.vmap\(shift\)"):
        sartor.shift(sols)
    np.testing.assert_array_equal(jax.vmap(sartor.shift)(sols).us[:, 0], sols.us[:, 1])
