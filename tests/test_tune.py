"""The derivative of a closed loop, and tuning by it."""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sartor import (
    MPC,
    Descent,
    GaussNewton,
    Objective,
    Problem,
    Softening,
    correction,
    estimators,
    stationarity,
    tune,
    tuning,
)  # fmt: skip
from sartor.policy_gradient import Rollout, cost_gradient, feedback, policy_jacobian, roll_out, sensitivities

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


# --- Tuning ----------------------------------------------------------------------------------------------------------

WRONG = THETA._replace(mass=jnp.array(2.0))
OBJECTIVE = Objective(
    lambda xs, us: jnp.sum(xs**2) + 0.1 * jnp.sum(us**2), lambda xs, us: -0.7 - xs[:, 1], penalty=30.0
)


def plant(x, u, k):
    return dynamics(x, u, k, THETA)


def weights(theta):
    return theta.weights, theta.terminal


def tuned(method=None, iterations=12, theta=WRONG, **options):
    options = {"learn": weights, **options}
    return tune(MPC(PROBLEM, theta), plant, OBJECTIVE, X0, STEPS, method, iterations=iterations, **options)


@pytest.fixture(scope="module")
def newton():
    return tuned(GaussNewton(), ridge=1e-2)


def test_gauss_newton_lowers_the_merit_and_finds_the_limit(newton):
    curve = newton.curve
    assert curve.merit.min() < 0.8 * curve.merit[0] and curve.violation[0] > 0.01
    assert curve.violation[np.argmin(curve.merit)] < 1e-3
    np.testing.assert_array_equal(curve.rollouts, 1 + np.arange(12))
    assert newton.theta.mass == 2.0  # what is not tuned stays


def test_what_is_returned_is_what_was_measured(newton):
    rollout = roll_out(plant, build(newton.theta), X0, STEPS)
    assert float(OBJECTIVE.merit(rollout.xs, rollout.us)) == pytest.approx(newton.curve.merit.min(), rel=1e-9)


def test_only_better_candidates_are_taken(newton):
    taken = newton.curve.merit[newton.curve.taken > 0]
    assert np.all(np.diff(taken) < 0) and newton.curve.taken.sum() < 12
    last = roll_out(plant, build(newton.last), X0, STEPS)
    assert float(OBJECTIVE.merit(last.xs, last.us)) == pytest.approx(taken[-1], rel=1e-9)


def test_the_plant_is_never_differentiated(newton):
    """A plant that has no derivative at all, outside of JAX, gives the same."""
    compiled = jax.jit(plant)
    numpy_plant = lambda x, u, k: np.asarray(compiled(jnp.asarray(x), jnp.asarray(u), k))
    assert_same = np.testing.assert_allclose
    found = tune(MPC(PROBLEM, WRONG), numpy_plant, OBJECTIVE, X0, STEPS, GaussNewton(), iterations=3, learn=weights,
                 ridge=1e-2, outside=True)  # fmt: skip
    assert_same(found.curve.merit, newton.curve.merit[:3], rtol=1e-6)


def test_with_the_true_model_the_correction_is_nothing():
    plain, corrected = (tuned(GaussNewton(), 4, THETA, ridge=ridge) for ridge in (0.0, 1e-2))
    np.testing.assert_allclose(corrected.curve.merit, plain.curve.merit, rtol=1e-6)


def test_ridge_regression_finds_what_the_model_gets_wrong():
    """The mass enters linearly: after one rollout the Jacobian of the control is corrected."""
    rollout = roll_out(plant, build(WRONG), X0, STEPS)
    wrong = lambda x, u, k: dynamics(x, u, k, WRONG)
    nothing = correction.nothing_seen(2, 1, float, products=False)
    sums = correction.seen(nothing, wrong, rollout, jnp.asarray(True))
    change = correction.lacking(sums, 1e-8)
    np.testing.assert_allclose(change.B[1, 0], 0.2 / 1.1 - 0.1, rtol=1e-3)
    np.testing.assert_allclose(change.A, 0.0, atol=1e-3)


def test_what_is_not_finite_is_not_learned_from():
    """Neither a rollout that is refused, nor one at which the model has no value."""
    rollout = roll_out(plant, build(WRONG), X0, STEPS)
    sums = correction.nothing_seen(2, 1, float, products=True)
    nowhere = lambda x, u, k: x / jnp.linalg.norm(0.0 * x)
    broken = rollout._replace(xs=rollout.xs.at[3].set(jnp.nan))
    right = lambda x, u, k: dynamics(x, u, k, WRONG)
    for model, seen, fine in ((nowhere, rollout, True), (right, broken, False), (right, broken, True)):
        same = correction.seen(sums, model, seen, jnp.asarray(fine))
        assert all(np.array_equal(a, b) for a, b in zip(same, sums, strict=True))


def test_products_tell_how_the_error_of_a_jacobian_changes():
    """The model lacks 0.3 q u and 0.1 v²: away from the mean of the rollouts the correction is exact too."""
    rng = np.random.default_rng(0)
    lacks = lambda x, u: jnp.stack([0.3 * x[0] * u[0], 0.1 * x[1] ** 2])
    rough = lambda x, u, k: dynamics(x, u, k, THETA)
    sums = correction.nothing_seen(2, 1, float, products=True)
    for _ in range(2):
        xs, us = rng.normal(1.0, 1.0, (40, 2)), rng.normal(-0.5, 1.0, (39, 1))
        for t in range(39):  # of states that are anywhere: every transition begins where the last one ends
            xs[t + 1] = rough(xs[t], us[t], t) + lacks(xs[t], us[t])
        sums = correction.seen(sums, rough, Rollout(jnp.asarray(xs), jnp.asarray(us), None, 0), jnp.asarray(True))
    change = correction.lacking(sums, 1e-9)
    dA, dB = change.along(jnp.asarray(xs), jnp.asarray(us))
    A, B = jax.vmap(jax.jacfwd(lacks, (0, 1)))(jnp.asarray(xs[:-1]), jnp.asarray(us))
    np.testing.assert_allclose(dA, A, atol=1e-4)
    np.testing.assert_allclose(dB, B, atol=1e-4)


@pytest.mark.parametrize("estimator", [estimators.Model(), estimators.ControlVariate()], ids=["model", "two_rollouts"])
def test_descent_lowers_the_merit(estimator):
    curve = tuned(Descent(estimator, 3e-3), 12, seed=3).curve
    assert curve.merit.min() < 0.97 * curve.merit[0]
    assert curve.rollouts[-1] == (24 if estimator.perturbs else 12)


def test_published_steps_are_all_taken():
    curve = tuned(Descent(estimators.Hybrid(0.5), lambda k: 1e-3 / (k + 1.0), monotone=False), 6).curve
    assert curve.taken.all()


def test_seeds_in_one_batch_are_those_one_by_one():
    """To what a slope over a distance of 1e-5 leaves of rounding."""
    method = Descent(estimators.Zeroth(), 1e-3)
    both = tuned(method, 4, seed=[5, 6])
    for i, seed in enumerate((5, 6)):
        one = tuned(method, 4, seed=seed)
        np.testing.assert_allclose(both.curve.merit[i], one.curve.merit, rtol=1e-5)
        np.testing.assert_allclose(both.theta.weights[i], one.theta.weights, rtol=1e-5)


def test_what_was_interrupted_goes_on_to_the_same_result(newton, tmp_path):
    class Stop(Exception):
        pass

    def stop(k, theta, curve):
        if k == 5:
            raise Stop

    file = tmp_path / "state.npz"
    module = importlib.import_module("sartor.tune")
    saved, module._SAVE_EVERY = module._SAVE_EVERY, 0.0
    try:
        with pytest.raises(Stop):
            tuned(GaussNewton(), ridge=1e-2, checkpoint=file, after_iteration=stop)
    finally:
        module._SAVE_EVERY = saved
    ran = []
    found = tuned(GaussNewton(), ridge=1e-2, checkpoint=file, monitor=lambda done, total: ran.append(done))
    assert ran[0] == 5 and found.curve.merit.tolist() == newton.curve.merit.tolist()
    with pytest.raises(ValueError, match="tuning something else"):
        tuned(GaussNewton(), ridge=1e-3, checkpoint=file)


def test_tuning_ends_where_it_is_told_to(newton, tmp_path):
    seen = []

    def good_enough(k, theta, curve):
        seen.append(curve.merit[-1])
        return k == 4

    file = tmp_path / "state.npz"
    found = tuned(GaussNewton(), ridge=1e-2, after_iteration=good_enough, checkpoint=file)
    assert found.curve.merit.tolist() == newton.curve.merit[:4].tolist() == seen
    again = tuned(GaussNewton(), ridge=1e-2, after_iteration=good_enough, checkpoint=file)
    assert again.curve.merit.tolist() == seen and len(seen) == 4  # it has ended, and stays so
    dearer = OBJECTIVE._replace(penalty=2.0 * OBJECTIVE.penalty)
    with pytest.raises(ValueError, match="tuning something else"):
        tune(MPC(PROBLEM, WRONG), plant, dearer, X0, STEPS, GaussNewton(), iterations=12, learn=weights, ridge=1e-2,
             checkpoint=file)  # fmt: skip


def test_a_candidate_that_is_not_finite_is_refused_and_nothing_is_lost():
    def breaks(x, u, k):  # wherever the first weight has grown, and so the cart has been fast
        return jnp.where(x[1] < -0.95, jnp.nan, 1.0) * plant(x, u, k)

    steep = Descent(estimators.Model(), 3.0)
    found = tune(MPC(PROBLEM, WRONG), breaks, OBJECTIVE, X0, STEPS, steep, iterations=12, learn=weights)
    refused = ~np.isfinite(found.curve.merit)
    assert refused.any() and not found.curve.taken[refused].any()
    assert np.isfinite(found.curve.merit.min()) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.last))
    with pytest.raises(FloatingPointError, match="first rollout of the plant is not finite"):
        tune(MPC(PROBLEM, WRONG), lambda x, u, k: x * jnp.nan, OBJECTIVE, X0, STEPS, steep, iterations=2, learn=weights)


def test_projection_keeps_parameters_in_their_box():
    box = lambda theta: theta._replace(weights=jnp.clip(theta.weights, 0.25, 1.02))
    outside = WRONG._replace(weights=jnp.array([2.0, 0.3, 0.1]))
    found = tuned(GaussNewton(), 6, outside, project=box)
    for theta in (found.theta, found.last, tuned(GaussNewton(), 1, outside, project=box).theta):
        assert np.all(theta.weights >= 0.25) and np.all(theta.weights <= 1.02)


def test_derivatives_that_are_not_finite_are_told():
    kinked = OBJECTIVE._replace(cost=lambda xs, us: cost(xs, us) + jnp.sum(jnp.linalg.norm(xs - xs[:1], axis=-1)))
    with pytest.raises(FloatingPointError, match="derivatives along the first rollout are not finite"):
        tune(MPC(PROBLEM, WRONG), plant, kinked, X0, STEPS, GaussNewton(), iterations=3, learn=weights)


def test_after_refusals_a_step_is_taken_at_random_and_may_be_worse():
    """A random step after every refusal may raise the merit; the best θ is kept all the same."""
    stubborn = GaussNewton(patience=1, kick=0.05)
    found = tuned(stubborn, 24, ridge=1e-2, seed=[0, 1])
    rises = [np.diff(m[t]) for m, t in zip(found.curve.merit, found.curve.taken, strict=True)]
    assert any(r.max() > 0 for r in rises) and all(np.all(r < 0.25 * 60.0) for r in rises)
    assert not np.array_equal(*found.curve.merit)  # each seed has its own random steps
    unkicked = tuned(GaussNewton(patience=0), 24, ridge=1e-2)
    assert np.all(np.diff(unkicked.curve.merit[unkicked.curve.taken]) < 0)
    best = roll_out(plant, build(jax.tree.map(lambda leaf: leaf[1], found.theta)), X0, STEPS)
    assert float(OBJECTIVE.merit(best.xs, best.us)) == pytest.approx(found.curve.merit[1].min(), rel=1e-6)


def test_a_limit_on_what_is_worse_holds_for_negative_merits():
    method, score = GaussNewton(), lambda merit: tuning.Score(jnp.asarray(merit), *jnp.zeros((2,)), jnp.asarray(0))
    memory = method.init(jnp.zeros(2))
    assert method.takes(score(-10.0), score(-11.0), memory) and not method.takes(score(-10.0), score(-9.0), memory)
    kicked = memory._replace(kicked=jnp.asarray(True))
    assert method.takes(score(-10.0), score(-8.0), kicked) and not method.takes(score(-10.0), score(-7.0), kicked)


def test_scales_are_units_of_the_parameters():
    """One step in units of s is one with s² as rates; in other units of the model the step is the same."""
    scales = jnp.array([0.5, 2.0, 1.0, 0.2, 3.0])
    run = lambda **options: tuned(Descent(estimators.Model(), 1e-4, monotone=False, **options), 2)
    start, plain, scaled = (jnp.concatenate(weights(t)) for t in (WRONG, run().last, run(scales=scales).last))
    np.testing.assert_allclose(scaled - start, scales**2 * (plain - start), rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"controller": PROBLEM}, "controller must be a sartor.MPC"),
        ({"objective": lambda xs, us: 0.0}, "objective must be a sartor.Objective"),
        ({"objective": OBJECTIVE._replace(penalty=0.0)}, "penalty must be positive"),
        ({"x0": np.full(2, np.nan)}, "x0 must be one finite state"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"ridge": -1.0}, "ridge must be at least 0"),
        ({"refit": lambda theta, change: theta}, "give ridge"),
        ({"products": True}, "products needs ridge"),
        ({"outside": True, "seed": [0, 1]}, "one seed"),
        ({"learn": lambda theta: ()}, "learn must name"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = dict(controller=MPC(PROBLEM, WRONG), plant=plant, objective=OBJECTIVE, x0=X0, num_steps=STEPS)
    with pytest.raises(ValueError, match=message):
        tune(**{**given, **change})


# --- Stationarity ----------------------------------------------------------------------------------------------------


def test_the_radius_covers_the_gradient_as_often_as_it_says():
    """Against central differences, with a model that is wrong; the merit is smooth within the distance."""
    flat, unravel = jax.flatten_util.ravel_pytree(weights(WRONG))
    smooth = OBJECTIVE._replace(rows=None)

    @jax.jit
    def merit(flat):
        now = WRONG._replace(weights=unravel(flat)[0], terminal=unravel(flat)[1])
        rollout = roll_out(plant, build(now), X0, STEPS)
        return smooth.merit(rollout.xs, rollout.us)

    h = 1e-5
    truth = np.array([(merit(flat + h * e) - merit(flat - h * e)) / (2 * h) for e in np.eye(flat.size)])
    found = [
        stationarity(MPC(PROBLEM, WRONG), plant, smooth, X0, STEPS, learn=weights, samples=40, distance=1e-4, seed=seed)
        for seed in range(20)
    ]
    covered = [np.linalg.norm(c.gradient - truth) <= c.radius for c in found]
    assert 16 <= sum(covered) and all(c.radius < 1.5 * np.linalg.norm(truth) for c in found)
    assert found[0].rollouts == 41 and found[0].norm == pytest.approx(np.linalg.norm(found[0].gradient))


def test_the_radius_is_right_for_normal_estimates():
    rng, scales = np.random.default_rng(0), np.array([3.0, 1.0, 0.5, 0.1])
    module = importlib.import_module("sartor.stationarity")
    draws = [scales * rng.normal(size=(60, 4)) for _ in range(2000)]
    share = np.mean([np.linalg.norm(d.mean(0)) <= module._radius(d, 0.9) for d in draws])
    assert share == pytest.approx(0.9, abs=0.025)


def test_stationarity_refuses_numbers_that_make_no_sense():
    with pytest.raises(ValueError, match="samples must be at least 2"):
        stationarity(MPC(PROBLEM, WRONG), plant, OBJECTIVE, X0, STEPS, samples=1)
