"""Imitation: its loss and gradient, what it recovers, what fails, and that an interruption changes nothing."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sartor
from sartor import descent
from sartor.descent import Learning, LevenbergMarquardt
from sartor.imitate import Demonstrations, identify, imitate, imitation_loss
from sartor.parameters import Bounded, bounded, positive, values

HORIZON = 4
RMSPROP, SGD = optax.rmsprop(1e-2, decay=0.5), optax.sgd(1e-3)  # a new one would compile anew


class Theta(NamedTuple):
    """A mass on a spring, and how much its deviation from a goal costs."""

    mass: Any
    stiffness: Any
    weight: Any
    goal: Any


TRUE = Theta(1.5, 0.8, 2.0, 0.3)


def dynamics(x, u, k, theta):
    acceleration = (u[0] - theta.stiffness * x[0]) / theta.mass
    return x + 0.2 * jnp.stack([x[1], acceleration])


def stage_cost(x, u, k, theta):
    return terminal_cost(x, theta) + 0.05 * u[0] ** 2


def terminal_cost(x, theta):
    return 0.5 * theta.weight * (x[0] - theta.goal) ** 2 + 0.1 * x[1] ** 2


PROBLEM = sartor.Problem(
    dynamics=dynamics, stage_cost=stage_cost, terminal_cost=terminal_cost, horizon=HORIZON, u_min=[-1.0], u_max=[1.0]
)


@jax.jit
@jax.vmap
def expert(x0):
    theta = jax.tree.map(jnp.asarray, TRUE)
    return sartor.solve(PROBLEM, theta, x0, throw=False)


def demonstrations(num_samples, seed):
    x0s = np.random.default_rng(seed).uniform(-1.0, 1.0, (num_samples, 2))
    sols = expert(jnp.asarray(x0s))
    assert bool(sols.successful.all())
    at_bound = np.abs(sols.us) > 1.0 - 1e-6
    assert at_bound.any() and not at_bound.all()
    return Demonstrations(np.asarray(sols.us), np.asarray(sols.xs))


DATA, HELD_OUT = demonstrations(24, 0), demonstrations(6, 1)
START = Theta(positive(1.0), positive(1.2), positive(1.0), bounded(0.0, -1.0, 1.0))
DYNAMICS = lambda theta: (theta.mass, theta.stiffness)
WEIGHT, GOAL = (lambda theta: theta.weight), (lambda theta: theta.goal)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-5.0, 4.9), st.floats(0.1, 5.0))
def test_transforms_begin_at_their_value_and_stay_inside(size, low, width):
    high, inside = low + width, low + 0.3 * width
    theta = values({"a": positive(size), "b": bounded(inside, low, high), "c": size})
    np.testing.assert_allclose([theta["a"], theta["b"], theta["c"]], [size, inside, size], rtol=1e-9, atol=1e-9)
    far = [Bounded(jnp.asarray(raw), low, high).value for raw in (-50.0, 50.0)]
    assert low <= far[0] < inside < far[1] <= high


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: positive(0.0), "value must be positive, not 0.0"),
        (lambda: positive([1.0, -2.0]), "value must be positive"),
        (lambda: bounded(2.0, 0.0, 1.0), "value must lie between low = 0.0 and high = 1.0, not at 2.0"),
        (lambda: bounded(0.5, 1.0, 0.0), "low below high"),
        (lambda: bounded(0.5, 0.0, np.inf), "must be finite"),
    ],
)
def test_values_outside_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def loss(theta):
    return float(np.mean(imitation_loss(PROBLEM, theta, DATA)))


def test_the_loss_is_that_of_the_formula():
    theta = values(START)
    sols = jax.vmap(lambda x0: sartor.solve(PROBLEM, theta, x0, throw=False))(jnp.asarray(DATA.xs[:, 0]))
    controls = ((sols.us - DATA.us) ** 2).mean((1, 2))
    states = ((sols.xs - DATA.xs)[:, 1:] ** 2).mean((1, 2))
    np.testing.assert_allclose(imitation_loss(PROBLEM, START, DATA), controls, rtol=1e-9)
    np.testing.assert_allclose(imitation_loss(PROBLEM, theta, DATA, states=0.7), controls + 0.7 * states, rtol=1e-9)
    np.testing.assert_allclose(imitation_loss(PROBLEM, theta, DATA, scales=[2.0]), controls / 4, rtol=1e-9)
    some = Demonstrations(DATA.us[:, :1], DATA.xs[:, :2])
    np.testing.assert_allclose(
        imitation_loss(PROBLEM, theta, some), ((sols.us - DATA.us)[:, 0] ** 2).mean(1), rtol=1e-9, atol=1e-15
    )


def test_one_step_of_gradient_descent_follows_central_differences():
    rate, h = 1e-3, 1e-5
    learned = imitate(PROBLEM, START, DATA, Learning(epochs=1, batch=24), optimiser=SGD).theta
    for i, (before, after) in enumerate(zip(jax.tree.leaves(START), jax.tree.leaves(learned), strict=True)):
        moved = [eqx.tree_at(lambda t, i=i: jax.tree.leaves(t)[i], START, before + sign * h) for sign in (1.0, -1.0)]
        slope = (loss(moved[0]) - loss(moved[1])) / (2 * h)
        assert abs(slope) > 1e-4
        np.testing.assert_allclose((before - after) / rate, slope, rtol=1e-6)


def test_levenberg_and_marquardt_recover_what_controls_identify():
    learned = imitate(
        PROBLEM, START, DATA, Learning(epochs=30, patience=5), validation=HELD_OUT, optimiser=LevenbergMarquardt()
    )
    np.testing.assert_allclose(jax.tree.leaves(values(learned.theta)), TRUE, rtol=1e-6)
    assert learned.curve.train[-1] < 1e-16 < 1e-3 < learned.curve.train[0] and len(learned.curve.train) < 30
    assert np.all(np.diff(learned.curve.train) <= 1e-20) and learned.curve.failed.sum() == 0


def test_rmsprop_learns_with_batches_and_leaves_the_rest_alone():
    begin = Theta(positive(1.0), positive(1.2), 2.0, 0.3)
    learned = imitate(PROBLEM, begin, DATA, Learning(epochs=60, batch=8), learn=DYNAMICS, optimiser=RMSPROP)
    assert learned.curve.train[-1] < 1e-2 * learned.curve.train[0]
    theta = values(learned.theta)
    assert (theta.weight, theta.goal) == (2.0, 0.3) and abs(theta.mass - 1.5) < 0.1
    assert np.isnan(learned.curve.validation).all()


def test_groups_take_turns_of_equal_length():
    seen = []
    for epochs in (2, 4, 5):
        config = Learning(epochs=epochs, batch=8, turn=2)
        theta = imitate(PROBLEM, START, DATA, config, learn=[WEIGHT, GOAL], optimiser=RMSPROP).theta
        seen.append((float(theta.weight.raw), float(theta.goal.raw)))
    begin = (float(START.weight.raw), float(START.goal.raw))
    assert seen[0][0] != begin[0] and seen[0][1] == begin[1]
    assert seen[1][0] == seen[0][0] and seen[1][1] != begin[1]
    assert seen[2][0] != seen[1][0] and seen[2][1] == seen[1][1]


def test_the_epoch_is_that_of_the_lowest_validation_loss():
    own = imitation_loss(PROBLEM, START, HELD_OUT)
    other = HELD_OUT._replace(us=HELD_OUT.us - 3.0)  # controls that no plan has
    learned = imitate(PROBLEM, START, DATA, Learning(epochs=15, batch=8), validation=other, optimiser=RMSPROP)
    best = int(np.argmin(learned.curve.validation))
    assert best < 14 and own.shape == (6,)
    found = float(np.mean(imitation_loss(PROBLEM, learned.theta, other)))
    np.testing.assert_allclose(found, learned.curve.validation[best], rtol=1e-8)


def test_patience_ends_it():
    config = Learning(epochs=40, patience=3)
    learned = identify(PROBLEM, START, DATA, config, learn=DYNAMICS, optimiser=LevenbergMarquardt())
    best = int(np.argmin(learned.curve.train))
    assert len(learned.curve.train) == best + 4 < 40


def test_transitions_identify_the_dynamics_and_nothing_else():
    config = Learning(epochs=15)
    learned = identify(PROBLEM, START, DATA, config, learn=DYNAMICS, optimiser=LevenbergMarquardt())
    theta = values(learned.theta)
    np.testing.assert_allclose([theta.mass, theta.stiffness], [1.5, 0.8], rtol=1e-9)
    assert theta.weight == 1.0
    errors = [dynamics(x, u, 0, values(START)) for x, u in zip(DATA.xs[:, 0], DATA.us[:, 0], strict=True)]
    one = Demonstrations(DATA.us[:, :1], DATA.xs[:, :2])
    curve = identify(PROBLEM, START, one, Learning(epochs=1), learn=DYNAMICS, optimiser=LevenbergMarquardt()).curve
    np.testing.assert_allclose(curve.train[0], np.mean((np.stack(errors) - DATA.xs[:, 1]) ** 2), rtol=1e-9)


def with_goal(theta, context):
    return theta._replace(goal=context)


@pytest.mark.slow
def test_a_context_of_each_demonstration_reaches_the_problem():
    goals = np.linspace(-0.5, 0.5, 12)
    theta = lambda goal: Theta(*map(jnp.asarray, TRUE))._replace(goal=goal)
    solve = jax.jit(jax.vmap(lambda x0, g: sartor.solve(PROBLEM, theta(g), x0, throw=False)))
    sols = solve(jnp.asarray(DATA.xs[:12, 0]), jnp.asarray(goals))
    data = Demonstrations(np.asarray(sols.us), np.asarray(sols.xs), goals)
    begin = Theta(positive(1.0), positive(1.2), 2.0, 0.0)
    learned = imitate(
        PROBLEM, begin, data, Learning(epochs=20, patience=4), learn=DYNAMICS, theta_of=with_goal,
        optimiser=LevenbergMarquardt(),
    )  # fmt: skip
    np.testing.assert_allclose([learned.theta.mass.value, learned.theta.stiffness.value], [1.5, 0.8], rtol=1e-6)


@pytest.mark.parametrize("optimiser", [RMSPROP, LevenbergMarquardt()], ids=["rmsprop", "levenberg_marquardt"])
def test_an_interruption_changes_nothing(optimiser, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "_SAVE_EVERY", 0.0)
    config, options = Learning(epochs=7, batch=8, turn=2, restart=3), {"validation": HELD_OUT}
    if optimiser is RMSPROP:
        options["learn"] = [WEIGHT, GOAL]

    def run(checkpoint, monitor=None):
        return imitate(
            PROBLEM, START, DATA, config, optimiser=optimiser, checkpoint=checkpoint, monitor=monitor, **options
        )

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.npz", stop)
    counts = []
    resumed = run(tmp_path / "state.npz", lambda done, total: counts.append(done))
    whole = run(None)
    assert counts[0] == 4 and counts[-1] == 7
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="delete it"):
        imitate(PROBLEM, START, HELD_OUT, config, optimiser=optimiser, checkpoint=tmp_path / "state.npz", **options)
    other = optax.rmsprop(2e-2, decay=0.5) if optimiser is RMSPROP else LevenbergMarquardt(damping=1.0)
    with pytest.raises(ValueError, match="delete it"):
        imitate(PROBLEM, START, DATA, config, optimiser=other, checkpoint=tmp_path / "state.npz", **options)


def test_failed_solves_are_left_out_and_counted():
    xs = DATA.xs.copy()
    xs[0, 0] = 1e200  # its square is not a number
    bad = DATA._replace(xs=xs)
    losses = imitation_loss(PROBLEM, START, bad)
    assert np.isnan(losses[0]) and np.isfinite(losses[1:]).all()
    for optimiser in (SGD, LevenbergMarquardt()):
        learned = imitate(PROBLEM, START, bad, Learning(epochs=2, batch=24), optimiser=optimiser)
        np.testing.assert_array_equal(learned.curve.failed, [1, 1])
        np.testing.assert_allclose(learned.curve.train[0], np.nanmean(losses), rtol=1e-9)
        assert learned.curve.train[1] < learned.curve.train[0]
    every = bad._replace(xs=np.full_like(xs, 1e200))
    with pytest.raises(FloatingPointError, match="no sample has a residual"):
        imitate(PROBLEM, START, every, Learning(epochs=2, batch=24), optimiser=SGD)


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"us": np.zeros((24, 4, 2))}, {}, r"demonstrations.us must have shape \(B, M, 1\)"),
        ({"us": np.zeros((24, 5, 1))}, {}, "1 ≤ M ≤ 4"),
        ({"xs": np.zeros((24, 4, 2))}, {}, r"demonstrations.xs must have shape \(24, 5\)"),
        ({"us": np.where(np.arange(24)[:, None, None] == 3, np.nan, DATA.us)}, {}, r"us\[3, 0, 0\] is nan"),
        ({"context": np.zeros(3)}, {}, "context must have 24 entries"),
        ({}, {"learn": lambda theta: ()}, "learn must name floating-point leaves"),
        ({}, {"scales": [0.0]}, "scales must be positive"),
        ({}, {"scales": [1.0, 1.0]}, "scales must be a number or have shape"),
        ({}, {"states": -1.0}, "states must be at least 0"),
        ({}, {"learn": []}, "learn is empty"),
        ({"us": DATA.us[:0], "xs": DATA.xs[:0]}, {}, "B ≥ 1"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(change, options, message):
    with pytest.raises(ValueError, match=message):
        imitate(PROBLEM, START, DATA._replace(**change), **options)


@pytest.mark.parametrize("name, value", [("epochs", 0), ("batch", 0), ("turn", 0), ("patience", -1), ("restart", -1)])
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Learning(**{name: value})


def test_a_damping_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="damping must be positive"):
        LevenbergMarquardt(0.0)
