"""Derivatives of the solution: implicit, in both modes, = through the iterations = central differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import sartor
from cases import PROBLEMS, Inputs, assert_equal, three_ways
from sartor import RESULTS
from sartor.systems import cartpole

TIGHT = {"sqp": sartor.SQP(tol=1e-11), "box_ddp": sartor.BoxDDP(tol=1e-11)}
# The sample of each problem, and the inputs in which its controls must have a derivative that is not zero.
POINTS = {
    "random_lq": (0, "theta x0 u_min u_max"),
    "pendulum": (2, "theta x0 u_min"),
    "neural": (0, "theta x0 u_min u_max"),
    "obstacle": (0, "theta x0"),
    "power_limit": (1, "theta x0 u_min"),
    "soft_linear": (0, "theta x0 softening"),
    "soft_quadratic": (0, "theta x0 softening"),
    "soft_both": (0, "theta x0 softening"),
}
PAIRS = [(name, "sqp") for name in POINTS] + [("pendulum", "box_ddp"), ("neural", "box_ddp")]
# Three Jacobians of each: those that cover what the others do too are left to `-m slow`.
FAST = [("obstacle", "sqp"), ("soft_both", "sqp"), ("pendulum", "sqp"), ("neural", "box_ddp")]
all_pairs = pytest.mark.parametrize(
    "name, solver", [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in PAIRS]
)
_known = {}


@pytest.fixture(scope="module")
def derivatives():
    """The three Jacobians of a pair; each pair is computed once."""

    def get(name, solver):
        if (name, solver) not in _known:
            _known[name, solver] = three_ways(Inputs(PROBLEMS[name], POINTS[name][0]), solver=TIGHT[solver])
        return _known[name, solver]

    yield get
    _known.clear()


@all_pairs
def test_implicit_derivative_equals_central_differences(name, solver, derivatives):
    forward, _, numeric, _, kkt_norm = derivatives(name, solver)
    assert kkt_norm < 1e-11
    assert_equal(forward, numeric)


@all_pairs
def test_reverse_mode_equals_forward_mode(name, solver, derivatives):
    forward, reverse, *_ = derivatives(name, solver)
    assert_equal(reverse, forward, 1e-9)


@all_pairs
def test_point_is_generic(name, solver, derivatives):
    """A derivative of zero would agree with anything."""
    index, groups = POINTS[name]
    inputs, numeric = Inputs(PROBLEMS[name], index), derivatives(name, solver).numeric["us"]
    size, start = {}, 0
    for group, part in sorted(inputs.groups().items()):
        width = sum(leaf.size for leaf in jax.tree.leaves(part))
        size[group] = np.max(np.abs(numeric[:, start : start + width]))
        start += width
    assert all(size[group] > 1e-3 for group in groups.split()), size


@pytest.mark.parametrize("name, solver", [
    ("obstacle", "sqp"), ("soft_both", "sqp"), ("pendulum", "sqp"),
    pytest.param("pendulum", "box_ddp", marks=pytest.mark.slow),
])  # fmt: skip
def test_derivative_through_the_iterations_equals_the_implicit_one(name, solver, derivatives):
    inputs = Inputs(PROBLEMS[name], POINTS[name][0])
    start = sartor.solve(inputs.problem, inputs.theta, inputs.x0, solver=TIGHT[solver])
    few = sartor.SQP(max_steps=4, max_inner_steps=12) if solver == "sqp" else sartor.BoxDDP(max_steps=4)

    @eqx.filter_jit
    def unrolled(inputs, start):
        vector = inputs.vector()

        def outputs(vector):
            problem, theta, x0 = inputs.rebuild(vector)
            sol = sartor.solve(problem, theta, x0, solver=few, guess=start, derivative="unroll", throw=False)
            return {"us": sol.us.ravel(), "xs": sol.xs.ravel()}

        return jax.jacfwd(outputs)(vector)

    assert_equal(unrolled(inputs, start), derivatives(name, solver).forward, names=("us", "xs"))


def test_reverse_mode_through_the_iterations_equals_the_implicit_one(derivatives):
    inputs = Inputs(PROBLEMS["pendulum"], POINTS["pendulum"][0])
    few = sartor.SQP(max_steps=8, max_inner_steps=15)

    def first_control(vector):
        return sartor.solve(*inputs.rebuild(vector), solver=few, derivative="unroll", throw=False).us[5, 0]

    gradient = jax.jit(jax.grad(first_control))(inputs.vector())
    expected = derivatives("pendulum", "sqp").forward["us"][5]
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max())


def gauss_newton(name):
    inputs = Inputs(PROBLEMS[name], POINTS[name][0])

    @eqx.filter_jit
    def jacobian(inputs):
        fn = lambda vector: sartor.solve(*inputs.rebuild(vector), curvature="gauss_newton", throw=False).us.ravel()
        return jax.jacfwd(fn)(inputs.vector())

    return jacobian(inputs)


@pytest.mark.slow
def test_gauss_newton_derivative_is_exact_for_a_linear_problem(derivatives):
    expected = derivatives("random_lq", "sqp").forward["us"]
    np.testing.assert_allclose(gauss_newton("random_lq"), expected, atol=1e-8 * np.abs(expected).max())


def test_gauss_newton_derivative_is_off_where_constraints_are_curved(derivatives):
    """By more than a tenth of the largest entry: it is an approximation, and has to be asked for by name."""
    expected = derivatives("obstacle", "sqp").numeric["us"]
    error = np.max(np.abs(gauss_newton("obstacle") - expected)) / np.max(np.abs(expected))
    assert 0.1 < error < 10.0


CART_POLE = {
    # d(Σ x² + u²)/d(g, m_cart, m_pole, l) from a pole 2.5 rad off the top that turns with 1 rad/s: differences of
    # solutions by IPOPT, and what mpc.pytorch 0.0.6 gives (ANALYTIC), both by benchmarks/cartpole_gradient.py.
    "exact": (85.7766, 1985.3753, 754.9357, 1737.3622),
    "gauss_newton": (51.6652, 2002.9464, 681.7979, 3714.8005),
}


@pytest.mark.parametrize("curvature", CART_POLE)
def test_cart_pole_gradient_that_needs_second_derivatives(curvature):
    problem, x0 = cartpole.problem(25), jnp.asarray([0.0, 0.0, np.cos(2.5), np.sin(2.5), 1.0])

    @jax.jit
    @jax.grad
    def slope(theta):
        sol = sartor.solve(problem, theta, x0, solver=sartor.BoxDDP(), curvature=curvature, throw=False)
        return jnp.sum(sol.xs**2) + jnp.sum(sol.us**2)

    np.testing.assert_allclose(jax.tree.leaves(slope(cartpole.default_theta())), CART_POLE[curvature], rtol=1e-6)


def bounded_scalar(bound=0.8):
    case = PROBLEMS["scalar_lq"]
    return eqx.tree_at(lambda p: (p.u_min, p.u_max), case.problem, (jnp.asarray([-bound]), jnp.asarray([bound])))


def test_barrier_derivative_equals_central_differences_at_a_change_of_the_active_set():
    """Where the exact control just reaches its bound, the smoothed one has a derivative between the two sides."""
    case = PROBLEMS["scalar_lq"]
    gain = float(sartor.solve(case.problem, case.theta, jnp.ones(1)).us[0, 0])
    edge = case._replace(problem=bounded_scalar(), x0s=jnp.asarray([[0.8 / abs(gain)]]))
    found = three_ways(Inputs(edge, 0), solver=sartor.SQP(tau=1e-3, tol=1e-11))
    assert_equal(found.forward, found.numeric)
    assert_equal(found.reverse, found.forward, 1e-9)
    slope = found.forward["us"][0, -1]
    groups = list(Inputs(edge, 0).groups())
    assert sorted(groups)[-1] == "x0" and 0.1 * abs(gain) < abs(slope) < 0.9 * abs(gain)


REFUSED = {
    "the same terminal row twice": (cases.redundant(), 2.0, jnp.asarray([0.0]), sartor.SQP()),
    "a control without effect": (cases.idle(), 0.9, jnp.asarray([0.5]), sartor.SQP()),
    "a control without effect, box_ddp": (cases.idle(), 0.9, jnp.asarray([0.5]), sartor.BoxDDP()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_derivative_at_a_singular_solution_is_nan_and_named(name):
    problem, theta, x0, solver = REFUSED[name]
    theta = jnp.asarray(theta)
    sol = sartor.solve(problem, theta, x0, solver=solver, throw=False)
    run = jax.jit(lambda theta: jax.jvp(lambda t: solution(problem, t, x0, solver), (theta,), (jnp.ones(()),)))
    (_, status), (tangent, _) = run(theta)
    assert sartor.regularity(problem, theta, sol) != RESULTS.successful
    assert jnp.all(jnp.isnan(tangent))
    expected = RESULTS.singular if sol.successful else sol.result
    assert status == expected._value
    with pytest.raises(sartor.SolveError):
        sartor.error_sensitivity(problem, theta, sol)


def solution(problem, theta, x0, solver):
    """The controls, and the number of the status that a differentiated solve carries."""
    sol = sartor.solve(problem, theta, x0, solver=solver, throw=False)
    return sol.us, jnp.asarray(sol.result._value)


@pytest.fixture(scope="module")
def weakly_active():
    """A bound that the free solution just touches: active or not, it has a multiplier of zero."""
    case = PROBLEMS["scalar_lq"]
    gain = sartor.solve(case.problem, case.theta, jnp.ones(1)).us[0, 0]
    problem = bounded_scalar()

    @jax.jit
    def gradients(x0s):
        def first(x0):
            sol = sartor.solve(problem, case.theta, x0, throw=False)
            return sol.us[0, 0], sol

        (_, sols), slopes = jax.vmap(jax.value_and_grad(first, has_aux=True))(x0s)
        return sols, slopes[:, 0]

    return float(gain), *gradients(jnp.asarray([0.5, 0.8 / jnp.abs(gain), 2.0])[:, None])


def test_derivative_at_the_edge_of_being_active_is_refused(weakly_active):
    """On one side the slope is the gain, on the other zero; between them there is none."""
    gain, sols, slopes = weakly_active
    np.testing.assert_allclose(slopes[0], gain, rtol=1e-8)
    np.testing.assert_allclose(slopes[2], 0.0, atol=1e-8)
    assert jnp.isnan(slopes[1])
    status = [cases.sample(sols.result, i) for i in range(3)]
    assert status[0] == status[2] == RESULTS.successful and status[1] == RESULTS.singular


def test_derivative_of_a_failed_solve_is_nan_and_can_be_masked_out_of_a_batch():
    problem, theta = cases.infeasible(), jnp.asarray(5.0)
    x0s = jnp.asarray([[3.5], [0.0], [4.5]])

    @jax.jit
    def gradients(theta, x0s):
        def loss(theta, mask):
            sols = jax.vmap(lambda x0: sartor.solve(problem, theta, x0, throw=False))(x0s)
            costs = sols.cost + jnp.sum(sols.us, axis=(1, 2))
            kept = jnp.where(sols.successful | ~mask, costs, 0.0)
            return jnp.sum(kept), sols.successful

        return jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(theta, jnp.asarray([True, False]))

    (masked, unmasked), ok = gradients(theta, x0s)
    assert ok[0].tolist() == [True, False, True]
    assert jnp.isfinite(masked) and masked != 0.0 and jnp.isnan(unmasked)
    _, one = jax.value_and_grad(lambda t: total(problem, t, x0s[0]))(theta)
    _, other = jax.value_and_grad(lambda t: total(problem, t, x0s[2]))(theta)
    np.testing.assert_allclose(masked, one + other, rtol=1e-7)


def test_sample_that_is_not_finite_can_be_masked_out_of_a_batch():
    case = PROBLEMS["scalar_lq"]
    x0s = jnp.asarray([[1.0], [jnp.nan], [-2.0]])

    @jax.jit
    @jax.grad
    def slope(theta, x0s):
        sols = jax.vmap(lambda x0: sartor.solve(case.problem, theta, x0))(x0s)
        return jnp.sum(jnp.where(sols.successful, sols.cost + sols.us[:, 0, 0], 0.0))

    expected = slope(case.theta, x0s[::2])
    assert np.all(np.isfinite(expected))
    np.testing.assert_allclose(slope(case.theta, x0s), expected, rtol=1e-9)


def total(problem, theta, x0):
    sol = sartor.solve(problem, theta, x0)
    return sol.cost + jnp.sum(sol.us)


def test_gradient_of_the_optimal_cost_in_the_state_is_the_costate(derivatives):
    for name in ("pendulum", "obstacle"):
        found = derivatives(name, "sqp")
        nx = PROBLEMS[name].x0s.shape[1]
        start = [g for g in sorted(Inputs(PROBLEMS[name], 0).groups())].index("x0")
        parts = [Inputs(PROBLEMS[name], 0).groups()[g] for g in sorted(Inputs(PROBLEMS[name], 0).groups())]
        begin = sum(leaf.size for part in parts[:start] for leaf in jax.tree.leaves(part))
        slope = found.forward["cost"][0, begin : begin + nx]
        np.testing.assert_allclose(slope, found.values["lams"][:nx], rtol=1e-6)


def test_second_derivative_of_the_optimal_cost_is_the_riccati_matrix():
    case = PROBLEMS["scalar_lq"]
    cost = lambda x0: sartor.solve(case.problem, case.theta, x0, throw=False).cost
    hessian = jax.jit(jax.hessian(cost))(case.x0s[0])
    a, b, q, r = (float(value) for value in case.theta)
    P = q
    for _ in range(case.problem.horizon):
        P = q + a * P * a - (a * P * b) ** 2 / (r + b * P * b)
    np.testing.assert_allclose(hessian, [[P]], rtol=1e-7)
