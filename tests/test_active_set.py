"""The active-set method for bounds on controls: against a dense solver, by itself and within `sartor.solve`."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear

import sartor
from sartor import kkt
from sartor.solvers.active_set import solve_bounded

N, NX, NU = 6, 3, 2
COUNT = 40
INF = np.inf


class Data(NamedTuple):
    """theta: a linear-quadratic problem with cross terms, and offsets that change with time."""

    A: np.ndarray
    B: np.ndarray
    c: np.ndarray  # (N, nx)
    H: np.ndarray  # of the stage cost in (x, u)
    g: np.ndarray  # (N, nx + nu)
    HN: np.ndarray


def random_data(seed):
    rng = np.random.default_rng(seed)
    root, last = rng.normal(size=(NX + NU, NX + NU)), rng.normal(size=(NX, NX))
    return Data(
        A=rng.normal(size=(NX, NX)) / 1.5, B=rng.normal(size=(NX, NU)), c=0.3 * rng.normal(size=(N, NX)),
        H=root @ root.T / 4 + 0.1 * np.eye(NX + NU), g=rng.normal(size=(N, NX + NU)), HN=last @ last.T,
    ), rng.normal(size=NX)  # fmt: skip


def stage_cost(x, u, k, theta):
    z = jnp.concatenate([x, u])
    return 0.5 * z @ theta.H @ z + theta.g[k] @ z


PROBLEM = sartor.Problem(
    dynamics=lambda x, u, k, theta: theta.A @ x + theta.B @ u + theta.c[k],
    stage_cost=stage_cost,
    terminal_cost=lambda x, theta: 0.5 * x @ theta.HN @ x,
    horizon=N,
    u_min=[-1.0] * NU,
    u_max=[1.0] * NU,
)
# Tight and wide, one-sided, without any, and different for each control.
BOUNDS = [([-0.3] * 2, [0.3] * 2), ([-2.0] * 2, [2.0] * 2), ([-0.3, -INF], [INF, 0.2]), ([-INF] * 2, [INF] * 2),
          ([0.1, -0.5], [0.2, 0.5])]  # fmt: skip


class Batch(NamedTuple):
    theta: Data
    x0: np.ndarray
    u_min: np.ndarray
    u_max: np.ndarray


def batch():
    draws = [random_data(seed) for seed in range(COUNT)]
    low, high = (np.array([BOUNDS[i % len(BOUNDS)][side] for i in range(COUNT)]) for side in (0, 1))
    thetas = jax.tree.map(lambda *leaves: np.stack(leaves), *[theta for theta, _ in draws])
    return Batch(thetas, np.stack([x0 for _, x0 in draws]), low, high)


BATCH = batch()
NO_CONTROLS = np.zeros((COUNT, N, NU), bool)


def problem_of(u_min, u_max):
    return eqx.tree_at(lambda p: (p.u_min, p.u_max), PROBLEM, (u_min, u_max))


@jax.jit
@jax.vmap
def quick(b, us, low, high, skip):
    """The QP around the controls `us` (which is the whole problem), from an active set."""
    problem = problem_of(b.u_min, b.u_max)
    xs = sartor.rollout(problem, b.theta, b.x0, us)
    start = sartor.guess(xs, us)
    point = kkt.Point(start.us, start.xs, start.lams, start.mus, start.slacks)
    expansion = kkt.expand(problem, b.theta, b.x0, point, False)
    return solve_bounded(expansion, kkt.bounded(problem), jnp.asarray(0.0), low, high, skip), xs


@jax.jit
@jax.vmap
def solved(b):
    return sartor.solve(problem_of(b.u_min, b.u_max), b.theta, b.x0, throw=False)


def around(shift=0.0):
    """A trajectory that is nothing special."""
    return 0.05 + shift + np.zeros((COUNT, N, NU))


NEVER, ALWAYS = np.zeros(COUNT, bool), np.ones(COUNT, bool)


@pytest.fixture(scope="module")
def oracle():
    """Controls and their slopes, from the dense problem in the controls alone."""
    cost = lambda us, b: sartor.total_cost(PROBLEM, b.theta, sartor.rollout(PROBLEM, b.theta, b.x0, us), us)
    gradient = jax.jit(jax.vmap(jax.grad(cost)))
    hessian = jax.jit(jax.vmap(jax.hessian(cost)))(np.zeros((COUNT, N, NU)), BATCH).reshape(COUNT, N * NU, N * NU)
    g = np.asarray(gradient(np.zeros((COUNT, N, NU)), BATCH)).reshape(COUNT, N * NU)
    us = []
    for i in range(COUNT):
        root = np.linalg.cholesky(np.asarray(hessian[i])).T  # ½ uᵀHu + gᵀu = ½ |root u + root⁻ᵀ g|² + constant
        low, high = np.tile(BATCH.u_min[i], N), np.tile(BATCH.u_max[i], N)
        us.append(lsq_linear(root, -np.linalg.solve(root.T, g[i]), (low, high), method="bvls", tol=1e-14).x)
    us = np.array(us).reshape(COUNT, N, NU)
    return us, np.asarray(gradient(us, BATCH))


def active(us):
    return np.abs(us - BATCH.u_min[:, None]) < 1e-9, np.abs(us - BATCH.u_max[:, None]) < 1e-9


def test_the_problems_are_as_they_should_be(oracle):
    low, high = active(oracle[0])
    count = (low | high).sum((1, 2))
    assert low.any() and high.any() and (count == 0).any() and (count > N).any()


def test_what_settles_is_the_solution(oracle):
    us, slopes = oracle
    found, xs = quick(BATCH, around(), NO_CONTROLS, NO_CONTROLS, NEVER)
    settled = np.asarray(found.settled & found.regular)
    assert settled.mean() > 0.8  # it may cycle
    np.testing.assert_allclose((around() + found.z.us)[settled], us[settled], atol=1e-9)
    mu_low, mu_high = np.asarray(found.mu_low), np.asarray(found.mu_high)
    np.testing.assert_allclose((mu_low - mu_high)[settled], slopes[settled], atol=1e-8)
    # The states follow the dynamics, and the costates are derivatives of the cost.
    reached = jax.vmap(lambda b, us: sartor.rollout(PROBLEM, b.theta, b.x0, us))(BATCH, us)
    np.testing.assert_allclose((xs + found.z.xs)[settled], reached[settled], atol=1e-8)


def test_multipliers_are_positive_and_those_of_active_bounds():
    found, _ = quick(BATCH, around(), NO_CONTROLS, NO_CONTROLS, NEVER)
    settled = np.asarray(found.settled)[:, None, None]
    for mu, held in ((found.mu_low, found.low), (found.mu_high, found.high)):
        assert np.all((np.asarray(mu) >= 0) | ~settled)
        assert np.all((np.asarray(mu) == 0) | np.asarray(held) | ~settled)
        assert np.any((np.asarray(mu) > 0) & settled)
    assert not np.any(found.low & found.high)


def test_the_right_active_set_is_confirmed_in_one_round(oracle):
    us, _ = oracle
    low, high = active(us)
    found, _ = quick(BATCH, around(), low, high, NEVER)
    assert np.all(found.settled) and np.all(found.num_steps == 1)
    np.testing.assert_allclose(around() + found.z.us, us, atol=1e-9)


def test_a_warm_start_nearby_takes_a_round_or_two(oracle):
    """The solution of a problem whose state is off by what a robot moves in one control step."""
    low, high = active(oracle[0])
    moved = BATCH._replace(x0=BATCH.x0 + 0.01 * np.random.default_rng(0).normal(size=BATCH.x0.shape))
    found, _ = quick(moved, around(), low, high, NEVER)
    steps = np.asarray(found.num_steps)
    assert np.all(found.settled) and steps.mean() < 1.5 and steps.max() <= 3


def test_a_wrong_start_leads_to_the_same_solution(oracle):
    us, _ = oracle
    everything = ~NO_CONTROLS & np.isfinite(BATCH.u_min)[:, None]
    found, _ = quick(BATCH, around(), everything, NO_CONTROLS, NEVER)
    settled = np.asarray(found.settled & found.regular)
    assert settled.mean() > 0.7
    np.testing.assert_allclose((around() + found.z.us)[settled], us[settled], atol=1e-9)


def test_skip_does_nothing():
    found, _ = quick(BATCH, around(), NO_CONTROLS, NO_CONTROLS, ALWAYS)
    assert np.all(found.num_steps == 0) and not np.any(found.settled)


def test_a_bound_at_a_distance_of_one_is_a_bound(oracle):
    """-1 stands for no bound in the rows, but it is also that of u = 0 between -1 and 1."""
    us, _ = oracle
    distance = np.where(np.isfinite(BATCH.u_min), BATCH.u_min + 1, 0.0)[:, None] + np.zeros((COUNT, N, NU))
    found, _ = quick(BATCH, distance, NO_CONTROLS, NO_CONTROLS, NEVER)
    settled = np.asarray(found.settled & found.regular)
    np.testing.assert_allclose((distance + found.z.us)[settled], us[settled], atol=1e-9)


# --- Within the solver -----------------------------------------------------------------------------------------------


def test_solutions_are_those_of_the_dense_solver_whether_or_not_the_active_set_settles(oracle):
    us, slopes = oracle
    sols = solved(BATCH)
    assert np.all(sols.successful)
    np.testing.assert_allclose(sols.us, us, atol=1e-8)
    np.testing.assert_allclose(sols.mus.u_min - sols.mus.u_max, slopes, atol=1e-7)


def test_what_cycles_falls_back_on_the_interior_point(oracle):
    """Problems that do not settle from u = 0.05, or any of some random sets, are solved like the others."""
    finite = np.isfinite(BATCH.u_min)[:, None] & np.isfinite(BATCH.u_max)[:, None]
    draws = np.random.default_rng(0).random((6, COUNT, N, NU)) < 0.5
    sets = [(NO_CONTROLS, NO_CONTROLS)] + [(draw & finite, ~draw & finite) for draw in draws]
    cycles = ~np.all([quick(BATCH, around(), *held, NEVER)[0].settled for held in sets], axis=0)
    assert cycles.any()
    # The solver begins with the controls held that have larger multipliers than slacks.
    for low, high in sets[1:]:
        sols = solved_from(BATCH, around(), low, high)
        assert np.all(sols.successful)
        np.testing.assert_allclose(sols.us, oracle[0], atol=1e-8)


@jax.jit
@jax.vmap
def solved_from(b, us, low, high):
    problem = problem_of(b.u_min, b.u_max)
    guess = sartor.guess(sartor.rollout(problem, b.theta, b.x0, us), us)
    places = lambda sol: (sol.mus.u_min, sol.mus.u_max, sol.slacks.u_min, sol.slacks.u_max)
    guess = eqx.tree_at(places, guess, tuple(jnp.where(held, 1.0, 0.0) for held in (low, high, ~low, ~high)))
    return sartor.solve(problem, b.theta, b.x0, guess=guess, throw=False)


def test_a_bound_that_is_only_just_reached(oracle):
    """The degenerate case: a multiplier of zero. The solution without bounds lies on the bound."""
    free = BATCH._replace(u_min=np.full((COUNT, NU), -INF), u_max=np.full((COUNT, NU), INF))
    unbounded = np.asarray(solved(free).us)
    touching = free._replace(u_max=unbounded.max(1), u_min=unbounded.min(1))
    sols = solved(touching)
    assert np.all(sols.successful)
    np.testing.assert_allclose(sols.us, unbounded, atol=1e-7)


def test_a_real_time_step_is_the_solution_from_any_guess():
    """One QP, also from zero controls, which lie at a distance of one from bounds of ±1."""
    solver = sartor.SQP(curvature="gauss_newton", real_time=True)

    @jax.jit
    @jax.vmap
    def step(b, us):
        guess = sartor.guess(jnp.tile(b.x0, (N + 1, 1)), us)
        return sartor.solve(PROBLEM, b.theta, b.x0, solver=solver, guess=guess, throw=False).us

    ones = np.ones((COUNT, NU))
    far = BATCH._replace(x0=5.0 * BATCH.x0, u_min=-ones, u_max=ones)
    expected = np.asarray(solved(far).us)
    assert np.mean(np.abs(expected) > 1 - 1e-6) > 0.1
    np.testing.assert_allclose(step(far, around()), expected, atol=1e-6)
    np.testing.assert_allclose(step(far, around(-0.05)), expected, atol=1e-6)


def test_rows_that_are_not_active_cost_no_interior_point_steps(oracle):
    """A limit of the first state, wide for half of the samples and tight for the other: where it is wide, the rounds
    of the active set find the solution without it; where it is tight it holds, by the interior point."""
    limited = sartor.Problem(
        dynamics=lambda x, u, k, theta: PROBLEM.dynamics(x, u, k, theta[0]),
        stage_cost=lambda x, u, k, theta: stage_cost(x, u, k, theta[0]),
        terminal_cost=lambda x, theta: PROBLEM.terminal_cost(x, theta[0]),
        horizon=N, u_min=PROBLEM.u_min, u_max=PROBLEM.u_max,
        constraints=lambda x, u, k, theta: jnp.where(k > 0, x[:1] - theta[1], -1.0),
        terminal_constraints=lambda x, theta: x[:1] - theta[1], softening=sartor.Softening(1e3, 1.0),
    )  # fmt: skip
    free = jax.jit(jax.vmap(lambda b: sartor.solve(PROBLEM, b.theta, b.x0, throw=False)))(BATCH)
    peak = np.asarray(free.xs)[:, 1:, 0].max(1)
    limits = np.where(np.arange(COUNT) % 2 == 0, peak + 0.1, peak - 0.1)
    sols = jax.jit(jax.vmap(lambda b, limit: sartor.solve(limited, (b.theta, limit), b.x0, throw=False)))(BATCH, limits)
    assert np.all(sols.successful)
    np.testing.assert_allclose(sols.us[::2], free.us[::2], atol=1e-8)
    settled = np.asarray(free.stats.num_inner_steps)[::2] <= 6  # those whose active set did not cycle
    assert np.mean(settled) > 0.5
    assert np.all(np.asarray(sols.stats.num_inner_steps)[::2][settled] <= 6)
    assert np.all(np.asarray(sols.xs)[1::2, 1:, 0].max(1) < peak[1::2] - 0.09)
    assert np.all(np.asarray(sols.cost)[1::2] > np.asarray(free.cost)[1::2])
