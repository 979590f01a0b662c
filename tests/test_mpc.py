"""The closed loop: one batched simulation, looked at from several sides, and a hand-written loop as the oracle."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sartor
from sartor.mpc import MPC, advance, begin, simulate, window
from sartor.systems import linear, pendulum
from sartor.systems.pendulum import default_theta, problem, sample_x0

NUM_STEPS = 70
BROKEN = 20  # the control step before which the last sample's measurement is lost


def plant(x, u, k, lost_at):
    """The pendulum; its state is NaN at step `lost_at`, and hangs at rest after that."""
    x_next = pendulum.plant_step(x, u, k, default_theta())
    x_next = jnp.where(jnp.isnan(x).any(), jnp.asarray([-1.0, 0.0, 0.0]), x_next)
    return jnp.where(k + 1 == lost_at, jnp.nan, x_next)


@pytest.fixture(scope="module")
def controller():
    return MPC(problem(horizon=15), default_theta())


@pytest.fixture(scope="module")
def starts():
    hanging = jnp.asarray([[-1.0, 0.0, 0.0], [np.cos(2.5), np.sin(2.5), 0.0]])
    return jnp.concatenate([hanging, sample_x0(jax.random.key(1))[None]])


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
    assert failed[2, BROKEN] and not failed[:, :BROKEN].any()
    assert episodes.results[2, BROKEN] == sartor.RESULTS.non_finite
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
        u, memory, info = control(jnp.full(3, jnp.nan), jnp.asarray(k), memory)
        np.testing.assert_array_equal(u, planned.us[k])
        assert info.result == sartor.RESULTS.non_finite


def test_without_any_plan_the_control_nearest_to_zero_is_applied(compiled):
    init, control = compiled
    nowhere = jnp.full(3, jnp.nan)
    u, _, info = control(nowhere, jnp.asarray(0), init(nowhere))
    assert u == 0.0 and info.result == sartor.RESULTS.non_finite


def test_warm_starts_take_fewer_steps_than_cold_ones(episodes, compiled):
    init, _ = compiled
    stages = range(2, 42, 8)
    cold = [int(init(episodes.xs[0, k]).num_steps) for k in stages]
    warm = [int(episodes.num_steps[0, k]) for k in stages]
    assert np.sum(warm) < 0.7 * np.sum(cold)


def test_pieces_of_an_episode_are_equal_to_the_whole_and_references_and_noise_work(key):
    """A random linear system follows a reference that moves: θ at step k is the window of it that lies ahead."""
    horizon, num_steps = 5, 6
    system = linear.sample(key, nx=2, nu=1)
    reference = jnp.stack([jnp.linspace(0.0, 1.0, 9), jnp.zeros(9)], axis=1)

    def stage_cost(x, u, k, theta):
        return 0.5 * jnp.sum((x - theta[1][k]) ** 2) + 0.05 * jnp.sum(u**2)

    tracking = sartor.Problem(
        dynamics=lambda x, u, k, theta: linear.dynamics(x, u, k, theta[0]), stage_cost=stage_cost,
        terminal_cost=lambda x, theta: 0.5 * jnp.sum((x - theta[1][-1]) ** 2), horizon=horizon, u_min=[-1.0], u_max=[1.0],
    )  # fmt: skip
    ahead = lambda theta, k: (theta[0], window(theta[1], k, horizon + 1))
    controller = MPC(tracking, (system, reference), theta_at=ahead)
    plant = eqx.Partial(linear.plant_step, theta=system)
    noise = lambda key, x, u, k: 0.01 * jax.random.normal(key, x.shape, x.dtype)
    x0 = jnp.asarray([0.5, -0.5])
    whole = simulate(plant, controller, x0, num_steps, disturbance=noise, key=key)
    state = begin(controller, x0)
    for i in range(2):
        state, steps = advance(plant, controller, state, num_steps // 2, noise, key)
        np.testing.assert_allclose(steps.u, whole.us[3 * i : 3 * i + 3], atol=1e-12)
        np.testing.assert_allclose(steps.x, whole.xs[3 * i + 1 : 3 * i + 4], atol=1e-12)
    k = 4
    sol = sartor.solve(tracking, ahead(controller.theta, k), whole.xs[k])
    np.testing.assert_allclose(whole.us[k], sol.us[0], atol=1e-6)
    pushed = whole.xs[k + 1] - linear.plant_step(whole.xs[k], whole.us[k], k, system)
    np.testing.assert_allclose(pushed, noise(jax.random.fold_in(key, k), x0, None, k), atol=1e-12)


def test_window_repeats_the_last_row():
    np.testing.assert_array_equal(window(jnp.arange(5), 3, 4), [3, 4, 4, 4])
    np.testing.assert_array_equal(window(jnp.arange(5), jnp.asarray(1), 3), [1, 2, 3])


def test_disturbance_needs_a_key(controller, starts):
    with pytest.raises(ValueError, match="disturbance and key"):
        simulate(plant, controller, starts[0], 1, key=jax.random.key(0))
