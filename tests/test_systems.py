"""Every system: its shape, its physics against an independent formula, and that its problem can be solved."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.spatial.transform import Rotation

import sartor
from sartor.models.integrate import rk4
from sartor.systems import SYSTEMS, cartpole, linear, pendulum, quadrotor

GOLDEN = Path(__file__).parent / "golden"
all_systems = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


def theta_of(system, p):
    p = jnp.asarray(p)
    return quadrotor.Theta(*p[:4], p[4:]) if system is quadrotor else system.Theta(*p)


@all_systems
def test_shapes_and_types_in_single_precision(system, key):
    dtype = jnp.float32
    problem, theta = system.problem(horizon=3), system.default_theta(dtype)
    x0, u = system.sample_x0(key, dtype), 0.5 * jnp.ones(problem.nu, dtype)
    assert len(system.STATES) == len(x0) and len(system.CONTROLS) == problem.nu
    with jax.numpy_dtype_promotion("strict"):
        x = problem.dynamics(x0, u, 0, theta)
        rows = problem.path_rows(x, u, jnp.asarray(1), theta)
        costs = problem.stage_cost(x0, u, 0, theta), problem.terminal_cost(x, theta)
    for value in (x, rows, *costs, system.goal(theta)):
        assert value.dtype == dtype and jnp.all(jnp.isfinite(value))
    assert x.shape == x0.shape == system.goal(theta).shape
    assert costs[0].shape == costs[1].shape == ()


@all_systems
def test_default_theta_and_samples_have_the_precision_of_jax(system, key):
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(system.default_theta()))
    assert system.sample_x0(key).dtype == jnp.float64


@all_systems
def test_plant_is_the_model_of_the_problem(system, key):
    problem, theta, x0 = system.problem(horizon=3), system.default_theta(), system.sample_x0(key)
    u = 0.3 * jnp.ones(problem.nu)
    np.testing.assert_array_equal(problem.dynamics(x0, u, 0, theta), system.plant_step(x0, u, 0, theta))


@all_systems
def test_equal_problems_compile_once(system):
    assert jax.tree.structure(system.problem(horizon=3)) == jax.tree.structure(system.problem(horizon=3))
    assert jax.tree.structure(system.problem(horizon=3)) != jax.tree.structure(system.problem(horizon=4))


@all_systems
def test_goal_at_rest_is_an_equilibrium(system):
    theta = system.default_theta()
    u = jnp.full(4, quadrotor.HOVER) if system is quadrotor else jnp.zeros(system.problem().nu)
    x = system.goal(theta)
    np.testing.assert_allclose(system.plant_step(x, u, 0, theta), x, atol=1e-12)


# The golden data has solutions of the other two.
@pytest.mark.parametrize(
    "system",
    [cartpole, linear, pytest.param(pendulum, marks=pytest.mark.slow), pytest.param(quadrotor, marks=pytest.mark.slow)],
    ids=["cartpole", "linear", "pendulum", "quadrotor"],
)
def test_problem_solves_from_sampled_states(system, key):
    problem, theta = system.problem(horizon=8), system.default_theta()
    if system is quadrotor:
        theta = theta._replace(goal=jnp.asarray([0.2, -0.2, 0.2]))
    for key_x0 in jax.random.split(key, 3):
        x0 = system.sample_x0(key_x0)
        sol = sartor.solve(problem, theta, x0)
        np.testing.assert_allclose(sartor.rollout(problem, theta, x0, sol.us), sol.xs, atol=1e-6)
        assert jnp.all((sol.us >= problem.u_min) & (sol.us <= problem.u_max))


@pytest.mark.parametrize("system", [pendulum, quadrotor], ids=["pendulum", "quadrotor"])
def test_golden_controls_give_golden_states_and_cost(system):
    name = system.__name__.rsplit(".", 1)[1]
    with np.load(GOLDEN / f"{name}.npz") as golden:
        p, x0, us, xs, cost = (jnp.asarray(golden[k]) for k in ("p", "x0", "us", "xs", "cost"))
    problem = system.problem(horizon=us.shape[1])

    def evaluate(p, x0, us):
        rolled = sartor.rollout(problem, theta_of(system, p), x0, us)
        return rolled, sartor.total_cost(problem, theta_of(system, p), rolled, us)

    rolled, costs = jax.vmap(evaluate)(p, x0, us)
    np.testing.assert_allclose(rolled, xs, atol=1e-10)
    np.testing.assert_allclose(costs, cost, rtol=1e-10)


def test_pendulum_without_torque_keeps_its_energy():
    theta, steps = pendulum.default_theta(), 2000
    problem = pendulum.problem(horizon=steps, dt=1e-3)
    x0 = jnp.asarray([np.cos(2.0), np.sin(2.0), 0.5])
    xs = sartor.rollout(problem, theta, x0, jnp.zeros((steps, 1)))
    # a rod of length l about its end: inertia m l²/3, centre of mass at l/2
    energy = 0.5 * theta.m * theta.l**2 / 3.0 * xs[:, 2] ** 2 + 0.5 * theta.m * theta.g * theta.l * xs[:, 0]
    np.testing.assert_allclose(energy, energy[0], atol=5e-3 * float(theta.m * theta.g * theta.l))


def test_cartpole_follows_its_equations_of_motion():
    """Lagrange's equations in the coordinates (p, φ), solved as a linear system in the accelerations."""
    g, m_cart, m_pole, half = 9.8, 1.0, 0.1, 0.5
    force, rng = 3.0, np.random.default_rng(0)
    for p, v, angle, rate in rng.uniform(-1.0, 1.0, (5, 4)):
        mass = np.array([
            [m_cart + m_pole, m_pole * half * np.cos(angle)],
            [m_pole * half * np.cos(angle), 4.0 / 3.0 * m_pole * half**2],
        ])  # fmt: skip
        load = np.array([force + m_pole * half * rate**2 * np.sin(angle), m_pole * g * half * np.sin(angle)])
        v_dot, rate_dot = np.linalg.solve(mass, load)
        x = jnp.asarray([p, v, np.cos(angle), np.sin(angle), rate])
        dt = 1e-3
        x_next = cartpole.dynamics(x, jnp.asarray([force]), 0, cartpole.default_theta(), dt)
        after = angle + dt * rate
        expected = [p + dt * v, v + dt * v_dot, np.cos(after), np.sin(after), rate + dt * rate_dot]
        np.testing.assert_allclose(x_next, expected, atol=1e-12)


def test_quadrotor_follows_newton_and_euler(key):
    """Rotation matrices and their derivative R' = R [w]×, instead of Euler angle rates."""
    mass, J = 1.1, np.diag([0.011, 0.009, 0.021])
    theta = quadrotor.Theta(*jnp.asarray([mass, *np.diag(J)]), jnp.zeros(3))
    for key_x0 in jax.random.split(key, 4):
        x, u = np.asarray(quadrotor.sample_x0(key_x0)), np.array([1.0, 2.0, 3.0, 2.5])
        R = Rotation.from_euler("ZYX", x[[5, 4, 3]]).as_matrix()
        w = x[9:]
        torque = np.array([0.2 * (u[1] - u[3]), 0.2 * (u[2] - u[0]), 0.05 * (u[0] - u[1] + u[2] - u[3])])
        dx = quadrotor.ode(jnp.asarray(x), jnp.asarray(u), theta)
        np.testing.assert_allclose(dx[:3], x[6:9])
        np.testing.assert_allclose(dx[6:9], R @ [0.0, 0.0, u.sum() / mass] - [0.0, 0.0, 9.81], atol=1e-12)
        np.testing.assert_allclose(dx[9:], np.linalg.solve(J, torque - np.cross(w, J @ w)), atol=1e-12)
        after = x[3:6] + 1e-6 * np.asarray(dx[3:6])
        R_dot = (Rotation.from_euler("ZYX", after[::-1]).as_matrix() - R) / 1e-6
        skew = np.array([[0.0, -w[2], w[1]], [w[2], 0.0, -w[0]], [-w[1], w[0], 0.0]])
        np.testing.assert_allclose(R_dot, R @ skew, atol=1e-5)


def test_quadrotor_velocity_limit_spares_the_measured_state():
    problem, theta = quadrotor.problem(v_max=1.0), quadrotor.default_theta()
    x, u = jnp.zeros(12).at[7].set(-1.5), jnp.zeros(4)
    assert jnp.all(problem.path_rows(x, u, 0, theta) < 0)
    assert jnp.max(problem.path_rows(x, u, 1, theta)) == jnp.max(problem.terminal_rows(x, theta)) == 0.5
    assert quadrotor.problem(v_max=None).path_rows(x, u, 1, theta).shape == (0,)


def test_linear_systems_are_different_and_have_a_spectral_radius_of_about_one(key):
    systems = jax.jit(jax.vmap(linear.sample))(jax.random.split(key, 50))
    radii = np.abs(np.linalg.eigvals(np.asarray(systems.A))).max(axis=-1)
    assert 0.88 < radii.min() < 0.95 and 1.05 < radii.max() < 1.12


def test_rk4_is_of_fourth_order():
    def ode(x, u, theta):
        return jnp.stack([x[1], -theta * jnp.sin(x[0]) + u[0]])

    x0, u, theta = jnp.asarray([1.0, 0.0]), jnp.asarray([0.3]), 2.0
    exact = solve_ivp(lambda t, x: ode(x, u, theta), (0.0, 0.4), x0, rtol=1e-12, atol=1e-13).y[:, -1]

    def error(num_steps):
        x, step = x0, eqx.filter_jit(rk4(ode, 0.4 / num_steps))
        for k in range(num_steps):
            x = step(x, u, k, theta)
        return np.abs(x - exact).max()

    assert 14.0 < error(2) / error(4) < 18.0
