"""The problems and solvers that the tests of the core run through, and the one helper that compares derivatives."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import sartor
from sartor import kkt

SOLVERS = {"sqp": sartor.SQP(), "box_ddp": sartor.BoxDDP()}


class Case(NamedTuple):
    """A problem with parameters and a few initial states, at generic points of which it has a strict solution."""

    problem: sartor.Problem
    theta: Any
    x0s: Any  # (B, nx)
    touches: tuple[str, ...] = ()  # the fields of `Rows` of which some row is active at some sample


def scalar_lq():
    """The smallest: one state, one control, no bounds. theta = (a, b, q, r)."""
    return Case(
        sartor.Problem(
            dynamics=lambda x, u, k, theta: theta[0] * x + theta[1] * u,
            stage_cost=lambda x, u, k, theta: 0.5 * theta[2] * x @ x + 0.5 * theta[3] * u @ u,
            terminal_cost=lambda x, theta: 0.5 * theta[2] * x @ x,
            horizon=4, u_min=[-np.inf], u_max=[np.inf],
        ),
        jnp.asarray([1.1, 0.7, 1.3, 0.4]),
        jnp.asarray([[1.0], [-2.0], [0.3]]),
    )  # fmt: skip


def random_lq():
    """Linear-quadratic, bounds on some controls only: both, one, none. theta = (A, B, q)."""
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(4, 4)) / 2.0, rng.normal(size=(4, 3))
    return Case(
        sartor.Problem(
            dynamics=lambda x, u, k, theta: theta[0] @ x + theta[1] @ u,
            stage_cost=lambda x, u, k, theta: 0.5 * jnp.sum(theta[2] * x**2) + 0.2 * u @ u,
            terminal_cost=lambda x, theta: 0.5 * jnp.sum(theta[2] * x**2),
            horizon=6, u_min=[-0.2, -np.inf, -np.inf], u_max=[0.2, 0.1, np.inf],
        ),
        (jnp.asarray(A), jnp.asarray(B), jnp.asarray([1.0, 0.7, 1.2, 0.5])),
        jnp.asarray(3.0 * rng.normal(size=(3, 4))),
        ("u_min", "u_max"),
    )  # fmt: skip


def pendulum():
    """x = [angle, rate], upright at 0; nonconvex. theta = (gravity, inertia, weight of the angle)."""
    dt = 0.1

    def dynamics(x, u, k, theta):
        rate = x[1] + dt * (theta[0] * jnp.sin(x[0]) + u[0]) / theta[1]
        return jnp.stack([x[0] + dt * rate, rate])

    return Case(
        sartor.Problem(
            dynamics=dynamics,
            stage_cost=lambda x, u, k, theta: theta[2] * (1.0 - jnp.cos(x[0])) + 0.05 * x[1] ** 2 + 0.01 * u @ u,
            terminal_cost=lambda x, theta: 5.0 * theta[2] * (1.0 - jnp.cos(x[0])) + 0.5 * x[1] ** 2,
            horizon=8, u_min=[-2.0], u_max=[2.0],
        ),
        jnp.asarray([4.0, 0.8, 1.3]),
        jnp.asarray([[0.6, 0.4], [-0.9, 0.3], [1.3, -2.0]]),
        ("u_min", "u_max"),
    )  # fmt: skip


def obstacle():
    """A mass in the plane that goes around a disc: a nonlinear hard row. theta = (centre (2), radius, goal (2))."""
    dt = 0.3

    def rows(x, u, k, theta):
        return jnp.where(k > 0, final_rows(x, theta), -1.0)

    def final_rows(x, theta):
        return (theta[2] ** 2 - jnp.sum((x[:2] - theta[:2]) ** 2))[None]

    def distance(x, theta):
        return 0.5 * jnp.sum((x[:2] - theta[3:]) ** 2) + 0.2 * x[2:] @ x[2:]

    return Case(
        sartor.Problem(
            dynamics=lambda x, u, k, theta: jnp.concatenate([x[:2] + dt * x[2:] + 0.5 * dt**2 * u, x[2:] + dt * u]),
            stage_cost=lambda x, u, k, theta: distance(x, theta) + 0.05 * u @ u,
            terminal_cost=lambda x, theta: 5.0 * distance(x, theta),
            horizon=8, u_min=[-3.0, -3.0], u_max=[3.0, 3.0],
            constraints=rows, terminal_constraints=final_rows,
        ),
        jnp.asarray([1.0, 0.1, 0.6, 2.0, 0.2]),
        jnp.asarray([[0.0, 0.0, 0.2, 0.3], [0.1, -0.3, 0.0, 0.1], [-0.2, 0.4, 0.5, 0.0]]),
        ("path",),
    )  # fmt: skip


DT_SOFT = 0.2


def soft_dynamics(x, u, k, theta):
    return x + DT_SOFT * jnp.stack([x[1], u[0] - theta[0] * x[1] * jnp.abs(x[1])])


def soft_rows(x, u, k, theta):
    return jnp.where(k > 0, soft_final_rows(x, theta), -1.0)


def soft_final_rows(x, theta):
    return jnp.stack([x[1] - theta[1], -x[1] - theta[1] - 0.1 * x[0]])


def soft_stage_cost(x, u, k, theta):
    return 0.5 * theta[2] * x[0] ** 2 + 0.05 * u @ u


def soft_terminal_cost(x, theta):
    return 2.0 * theta[2] * x[0] ** 2 + 0.5 * x[1] ** 2


def soft(linear, quadratic):
    """A mass on a line with drag, its speed limited by soft rows: some held at the limit, some violated.

    theta = (drag, limit, weight of the position). The functions are shared: other penalties do not compile anew.
    """
    return Case(
        sartor.Problem(
            dynamics=soft_dynamics, stage_cost=soft_stage_cost, terminal_cost=soft_terminal_cost, horizon=6,
            u_min=[-2.0], u_max=[2.0], constraints=soft_rows, terminal_constraints=soft_final_rows,
            softening=sartor.Softening([linear] * 4, [quadratic] * 4),
        ),
        jnp.asarray([0.2, 0.5, 1.0]),
        jnp.asarray([[-1.5, 0.9], [1.2, -1.0], [-0.8, 0.1]]),
        ("path",),
    )  # fmt: skip


class Residual(eqx.Module):
    """theta with a network in it: x' = v, v' = u + MLP(x, v, u)."""

    network: eqx.nn.MLP
    gain: Any


def neural():
    """A learned part of the dynamics."""
    network = eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, dtype=jnp.float64, key=jax.random.key(3))

    def dynamics(x, u, k, theta):
        force = theta.gain * u + theta.network(jnp.concatenate([x, u]))
        return x + 0.2 * jnp.concatenate([x[1:], force])

    return Case(
        sartor.Problem(
            dynamics=dynamics,
            stage_cost=lambda x, u, k, theta: 0.5 * x @ x + 0.05 * u @ u,
            terminal_cost=lambda x, theta: 2.0 * x @ x,
            horizon=5, u_min=[-1.0], u_max=[1.0],
        ),
        Residual(network, jnp.asarray(1.2)),
        jnp.asarray([[1.0, 0.3], [-0.4, 0.2], [0.3, 0.9]]),
        ("u_min",),
    )  # fmt: skip


def power_limit():
    """A row in which a control, a state and a parameter meet: (u v)₊ ≤ theta[0], and u ≤ theta[1] + sin(k)/10."""
    dt = 0.2
    return Case(
        sartor.Problem(
            dynamics=lambda x, u, k, theta: x + dt * jnp.stack([x[1], u[0] - 0.2 * x[1]]),
            stage_cost=lambda x, u, k, theta: 0.5 * (x[0] - theta[2]) ** 2 + 0.02 * u @ u,
            terminal_cost=lambda x, theta: 3.0 * (x[0] - theta[2]) ** 2 + 0.5 * x[1] ** 2,
            horizon=6, u_min=[-2.0], u_max=[2.0],
            constraints=lambda x, u, k, theta: jnp.stack([u[0] * x[1] - theta[0], u[0] - theta[1] - 0.1 * jnp.sin(k)]),
        ),
        jnp.asarray([0.6, 1.3, 1.0]),
        jnp.asarray([[0.0, 0.3], [-0.3, 0.2], [0.2, 0.5]]),
        ("path",),
    )  # fmt: skip


def masses():
    """Two masses and a driven end on springs that hang from the origin, in the plane. theta = (stiffness, mass)."""
    dt = 0.15

    def dynamics(x, u, k, theta):
        p, v = x[:6].reshape(3, 2), x[6:].reshape(2, 2)
        d = jnp.diff(p, axis=0, prepend=0.0)
        force = theta[0] * (1.0 - 0.3 / jnp.sqrt(jnp.sum(d**2, axis=1) + 1e-6))[:, None] * d
        v = v + dt * ((force[1:] - force[:-1]) / theta[1] - jnp.asarray([0.0, 2.0], x.dtype))
        return jnp.concatenate([(p + dt * jnp.concatenate([v, u[None]])).ravel(), v.ravel()])

    target = np.array([0.4, -0.2, 0.8, -0.2, 1.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    weights = np.array([1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 0.1, 0.1, 0.1, 0.1])
    far = lambda x: 0.5 * jnp.sum(jnp.asarray(weights, x.dtype) * (x - jnp.asarray(target, x.dtype)) ** 2)
    start = np.array([0.4, -0.3, 0.8, -0.4, 1.0, -0.3, 0.0, 0.0, 0.0, 0.0])
    return Case(
        sartor.Problem(
            dynamics=dynamics,
            stage_cost=lambda x, u, k, theta: far(x) + 0.05 * u @ u,
            terminal_cost=lambda x, theta: 10.0 * far(x),
            horizon=6, u_min=[-0.5, -0.5], u_max=[0.5, 0.5],
        ),
        jnp.asarray([8.0, 0.8]),
        jnp.asarray(start + 0.1 * np.random.default_rng(1).normal(size=(3, 10))),
        ("u_max",),
    )  # fmt: skip


PROBLEMS = {
    "scalar_lq": scalar_lq(),
    "random_lq": random_lq(),
    "pendulum": pendulum(),
    "masses": masses(),
    "neural": neural(),
    "obstacle": obstacle(),
    "power_limit": power_limit(),
    "soft_linear": soft(0.6, 0.0),
    "soft_quadratic": soft(0.0, 3.0),
    "soft_both": soft(0.2, 2.0),
}
"""All have solutions, and derivatives there. Those without rows are for `BoxDDP` too."""

PAIRS = [
    (problem, solver)
    for problem, case in PROBLEMS.items()
    for solver in SOLVERS
    if solver == "sqp" or case.problem.constraints is None
]


def infeasible():
    """|u| ≤ 1 for 4 steps cannot bring the state from 0 to 5; from x0 = 3 it can. Path row 1 is never violated."""
    return sartor.Problem(
        dynamics=lambda x, u, k, theta: x + 0.5 * u,
        stage_cost=lambda x, u, k, theta: x @ x + u @ u,
        terminal_cost=lambda x, theta: 0.0 * x[0],
        horizon=4, u_min=[-1.0], u_max=[1.0],
        constraints=lambda x, u, k, theta: jnp.stack([-x[0] - 10.0, x[0] - 100.0]),
        terminal_constraints=lambda x, theta: jnp.stack([x[0] - 50.0, theta - x[0]]),
    )  # fmt: skip


def redundant():
    """The same terminal row twice, active at the solution: the multipliers are not unique."""
    return sartor.Problem(
        dynamics=lambda x, u, k, theta: x + 0.5 * u,
        stage_cost=lambda x, u, k, theta: x @ x + u @ u,
        terminal_cost=lambda x, theta: theta * x[0] ** 2,
        horizon=3, u_min=[-3.0], u_max=[3.0],
        terminal_constraints=lambda x, theta: jnp.stack([1.0 - x[0], 2.0 - 2.0 * x[0]]),
    )  # fmt: skip


def idle():
    """The second control neither costs nor moves anything: a flat direction. Bounded, so that solvers return."""
    return sartor.Problem(
        dynamics=lambda x, u, k, theta: theta * x + 0.5 * u[:1],
        stage_cost=lambda x, u, k, theta: x @ x + u[0] ** 2,
        terminal_cost=lambda x, theta: x @ x,
        horizon=3, u_min=[-1.0, -1.0], u_max=[1.0, 1.0],
    )  # fmt: skip


@eqx.filter_jit
def solve_batch(problem, thetas, x0s, solver):
    """Solutions for batches of theta and x0 in one compiled call. Problems with the same functions compile once."""

    def one(theta, x0):
        return sartor.solve(problem, theta, x0, solver=solver, throw=False)

    return eqx.filter_vmap(one)(thetas, x0s)


def repeated(theta, x0s):
    """The same parameters for every sample."""
    return jax.tree.map(
        lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], len(x0s), axis=0) if eqx.is_inexact_array(leaf) else leaf,
        theta,
    )


def sample(tree, i):
    """Entry i of everything."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def residual_norm(problem, theta, x0, sol, tau=0.0):
    """Largest entry of the public KKT residual at a solution."""
    point = kkt.Point(sol.us, sol.xs, sol.lams, sol.mus, sol.slacks)
    leaves = jax.tree.leaves(kkt.residual(problem, theta, x0, point, tau))
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves]))


@eqx.filter_jit
def residual_norms(problem, theta, x0s, sols, tau=0.0):
    """Largest entry of the public KKT residual, for each sample of a batch."""
    return jax.vmap(lambda x0, sol: residual_norm(problem, theta, x0, sol, tau))(x0s, sols)


def flat_inputs(problem, theta, x0):
    """(theta, x0, finite entries of u_min and u_max, softening) as one vector, and the way back."""
    low, high = np.flatnonzero(np.isfinite(problem.u_min)), np.flatnonzero(np.isfinite(problem.u_max))
    numbers, rest = eqx.partition(theta, eqx.is_inexact_array)
    soft = problem.softening
    vector, unravel = ravel_pytree((numbers, x0, problem.u_min[low], problem.u_max[high], soft))

    def rebuild(vector):
        numbers, x0, u_min, u_max, soft = unravel(vector)
        bounds = (problem.u_min.at[low].set(u_min), problem.u_max.at[high].set(u_max))
        changed = eqx.tree_at(lambda p: (p.u_min, p.u_max), problem, bounds)
        if soft is not None:
            changed = eqx.tree_at(lambda p: p.softening, changed, soft)
        return changed, eqx.combine(numbers, rest), x0

    return vector, rebuild


def central_differences(fn, vector, scale=6e-6):
    """Jacobian of fn (vectors to vectors) by central differences, all in one batch."""
    steps = scale * jnp.maximum(1.0, jnp.abs(vector))
    ahead, behind = (jax.vmap(fn)(vector + sign * jnp.diag(steps)) for sign in (1.0, -1.0))
    return jnp.moveaxis((ahead - behind) / (2.0 * steps)[:, None], 0, -1)


def assert_equal_jacobians(one, other, tolerance=1e-6):
    """Equal to a tolerance relative to the largest entry."""
    largest = np.max(np.abs(other))
    assert largest > 1e-3, "a zero derivative would agree with anything"
    np.testing.assert_allclose(one, other, rtol=0.0, atol=tolerance * largest)
