"""The closed loop: one batched simulation, looked at from several sides, and a hand-written loop as the oracle."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sartor
from sartor.mpc import MPC, advance, begin, simulate, window
from sartor.systems import pendulum
from sartor.systems.pendulum import default_theta, problem

NUM_STEPS = 100
BROKEN = 20  # the control step before which the last sample's measurement is lost


def plant(x, u, k, lost_at):
    """The pendulum; its state is NaN at step `lost_at`, and leans by 0.3 rad after that."""
    x_next = pendulum.plant_step(x, u, k, default_theta())
    x_next = jnp.where(jnp.isnan(x).any(), jnp.asarray([np.cos(0.3), np.sin(0.3), 0.0]), x_next)
    return jnp.where(k + 1 == lost_at, jnp.nan, x_next)


@pytest.fixture(scope="module")
def controller():
    return MPC(problem(horizon=20), default_theta())


@pytest.fixture(scope="module")
def starts():
    angles = jnp.asarray([np.pi - 0.01, 2.5, 0.5])
    return jnp.stack([jnp.cos(angles), jnp.sin(angles), jnp.zeros(3)], axis=1)


@pytest.fixture(scope="module")
def episodes(controller, starts):
    """Three samples; the last one loses a measurement."""
    lost_at = jnp.asarray([-1, -1, BROKEN])
    return jax.vmap(lambda x0, k: simulate(eqx.Partial(plant, lost_at=k), controller, x0, NUM_STEPS, dt=0.05))(
        starts, lost_at
    )


@pytest.fixture(scope="module")
def compiled(controller):
    """init and __call__ of the controller for one sample."""
    return eqx.filter_jit(controller.init), eqx.filter_jit(controller.__call__)


def test_it_swings_the_pendulum_up_and_keeps_it_there(episodes):
    angles = jnp.arctan2(episodes.xs[:2, -10:, 1], episodes.xs[:2, -10:, 0])
    assert jnp.max(jnp.abs(angles)) < 0.1
    assert jnp.all(jnp.abs(episodes.us) <= 2.0)


def test_simulate_is_the_loop_written_by_hand_and_a_batch_is_one_by_one(episodes, starts, compiled):
    init, control = compiled
    x, us, num_steps = starts[1], [], []
    memory = init(x)
    for k in range(8):
        u, memory, info = control(x, jnp.asarray(k), memory)
        us.append(u)
        num_steps.append(info.num_steps)
        x = pendulum.plant_step(x, u, k, default_theta())
        np.testing.assert_allclose(episodes.xs[1, k + 1], x, atol=1e-7)
    np.testing.assert_allclose(episodes.us[1, :8], np.stack(us), atol=1e-7)
    np.testing.assert_array_equal(episodes.num_steps[1, :8], num_steps)


def test_costs_are_those_of_states_and_controls(episodes, controller):
    cost = jax.vmap(lambda x, u: controller.problem.stage_cost(x, u, 0, controller.theta))
    np.testing.assert_allclose(episodes.costs[0], cost(episodes.xs[0, :-1], episodes.us[0]))


def test_a_failed_solve_is_recorded_and_the_plan_before_it_applied(episodes):
    failed = episodes.results != sartor.RESULTS.successful
    assert failed[2, BROKEN] and not failed[2, :BROKEN].any()
    assert (episodes.results == sartor.RESULTS.non_finite)[2, BROKEN]
    assert jnp.isnan(episodes.xs[2, BROKEN]).all()
    assert jnp.all(jnp.isfinite(episodes.us))
    assert not failed[2, BROKEN + 1 :].any()
    assert jnp.all(jnp.isfinite(episodes.xs[2, BROKEN + 1 :]))


def test_after_a_failure_the_last_plan_runs_on(compiled, starts):
    init, control = compiled
    memory = init(starts[0])
    _, planned, _ = control(starts[0], jnp.asarray(0), memory)
    memory = planned
    for k in range(3):
        u, memory, info = control(starts[0] * jnp.nan, jnp.asarray(k), memory)
        np.testing.assert_array_equal(u, planned.us[k])
        assert info.result == sartor.RESULTS.non_finite


def test_without_any_plan_the_control_nearest_to_zero_is_applied(compiled, starts):
    init, control = compiled
    nowhere = starts[0] * jnp.nan
    u, _, info = control(nowhere, jnp.asarray(0), init(nowhere))
    assert u == 0.0 and info.result == sartor.RESULTS.non_finite


def test_warm_starts_take_fewer_steps_than_cold_ones(episodes, compiled):
    init, _ = compiled
    stages = range(2, 42, 8)
    cold = [int(init(episodes.xs[0, k]).num_steps) for k in stages]
    warm = [int(episodes.num_steps[0, k]) for k in stages]
    assert np.sum(warm) < 0.7 * np.sum(cold)


def test_references_noise_and_pieces_of_an_episode(key):
    """x⁺ = a x + b u follows a reference with horizon 1, where u = b (r - a x) / (b² + 0.1) is the solution."""
    a, b, reference = 1.2, 0.7, jnp.asarray([0.0, 0.5, 1.0, -1.0, 0.3])
    follow = sartor.Problem(
        dynamics=lambda x, u, k, theta: a * x + b * u,
        stage_cost=lambda x, u, k, theta: 0.05 * u[0] ** 2 + 0.0 * theta[k],
        terminal_cost=lambda x, theta: 0.5 * (x[0] - theta[-1]) ** 2,
        horizon=1, u_min=[-9.0], u_max=[9.0],
    )  # fmt: skip
    controller = MPC(follow, reference, theta_at=lambda theta, k: window(theta, k, 2))
    plant = lambda x, u, k: a * x + b * u
    noise = lambda key, x, u, k: 0.01 * jax.random.normal(key, x.shape, x.dtype)
    x0 = jnp.asarray([0.5])
    state, first = advance(plant, controller, begin(controller, x0), 3, noise, key)
    _, second = advance(plant, controller, state, 3, noise, key)
    np.testing.assert_array_equal(simulate(plant, controller, x0, 3, disturbance=noise, key=key).us, first.u)
    x = x0
    for k in range(6):
        u = b * (reference[min(k + 1, 4)] - a * x) / (b**2 + 0.1)
        x = plant(x, u, k) + noise(jax.random.fold_in(key, k), x, u, k)
        steps = first if k < 3 else second
        np.testing.assert_allclose(steps.u[k % 3], u, atol=1e-6)
        np.testing.assert_allclose(steps.x[k % 3], x, atol=1e-6)
        x = steps.x[k % 3]


def test_window_repeats_the_last_row():
    np.testing.assert_array_equal(window(jnp.arange(5), 3, 4), [3, 4, 4, 4])
    np.testing.assert_array_equal(window(jnp.arange(5), jnp.asarray(1), 3), [1, 2, 3])


def test_disturbance_needs_a_key(controller, starts):
    with pytest.raises(ValueError, match="disturbance and key"):
        simulate(plant, controller, starts[0], 1, key=jax.random.key(0))


def test_bounds_of_each_stage_do_not_stop_the_loop():
    """A shifted plan need not respect the bounds of the stages that it was shifted to."""
    low = -jnp.linspace(2.0, 0.2, 10)[:, None]
    tight = sartor.Problem(
        dynamics=lambda x, u, k, theta: x + 0.2 * jnp.stack([x[1], u[0]]),
        stage_cost=lambda x, u, k, theta: x @ x + 0.01 * u @ u, terminal_cost=lambda x, theta: 5.0 * x @ x,
        horizon=10, u_min=low, u_max=-low,
    )  # fmt: skip
    controller, x = sartor.MPC(tight, jnp.asarray(1.0)), jnp.asarray([2.0, 1.0])
    memory = controller.init(x)
    for k in range(3):
        u, memory, info = controller(x, k, memory)
        assert info.result == sartor.RESULTS.successful
        x = tight.dynamics(x, u, 0, None)
    assert abs(float(u[0])) <= 2.0


def test_a_plan_that_was_lost_begins_anew_from_the_first_guess(controller, starts):
    quick = sartor.SQP(real_time=True)
    again = MPC(problem(horizon=20), default_theta(), solver=quick, first_guess=_at_rest)
    x, memory = starts[1], eqx.filter_jit(controller.init)(starts[1])
    plan = eqx.filter_jit(lambda memory: again.plan(x, 1, memory)[3].us)
    anew = eqx.filter_jit(lambda: sartor.solve(again.problem, again.theta, x, solver=quick, guess=_at_rest(x, None)).us)
    np.testing.assert_allclose(plan(memory._replace(lost=jnp.asarray(True))), anew(), atol=1e-9)
    assert np.abs(plan(memory) - anew()).max() > 1e-2


def test_without_a_first_solve_the_first_control_step_starts_at_the_first_guess(starts):
    quick, x = sartor.SQP(real_time=True), starts[1]
    alone = MPC(problem(horizon=20), default_theta(), solver=quick, first_solver=None, first_guess=_at_rest)
    u, memory, info = eqx.filter_jit(lambda x: alone(x, 0, alone.init(x)))(x)
    anew = eqx.filter_jit(lambda: sartor.solve(alone.problem, alone.theta, x, solver=quick, guess=_at_rest(x, None)).us)
    np.testing.assert_allclose(u, anew()[0], atol=1e-9)
    assert info.num_steps == 1 and memory.num_steps == 0


def test_without_a_first_solve_a_guess_that_is_no_number_is_not_used(starts):
    lost = lambda x, theta: sartor.guess(jnp.nan * jnp.tile(x, (21, 1)), jnp.zeros((20, 1)))
    for first in (lost, None):
        loop = MPC(problem(horizon=20), default_theta(), first_solver=None, first_guess=first)
        memory = eqx.filter_jit(loop.init)(starts[1])
        assert np.isfinite(memory.guess.xs).all() and not memory.us.any() and not memory.lost


def _at_rest(x, theta):
    return sartor.guess(jnp.tile(x, (21, 1)), jnp.zeros((20, 1)))
