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
        jnp.asarray(start + 0.03 * np.random.default_rng(1).normal(size=(3, 10))),
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


class Inputs(eqx.Module):
    """All that a solution can be differentiated in: theta, x0, the finite bounds, the penalties; as one vector."""

    problem: sartor.Problem
    theta: Any
    x0: Any
    low: tuple = eqx.field(static=True)
    high: tuple = eqx.field(static=True)
    soft: tuple = eqx.field(static=True)

    def __init__(self, case, i):
        self.problem, self.theta, self.x0 = case.problem, case.theta, case.x0s[i]
        self.low = tuple(np.flatnonzero(np.isfinite(case.problem.u_min)).tolist())
        self.high = tuple(np.flatnonzero(np.isfinite(case.problem.u_max)).tolist())
        # A penalty of zero is at the end of its range: there is no derivative to both sides.
        names = () if case.problem.softening is None else ("linear", "quadratic")
        self.soft = tuple(name for name in names if np.all(getattr(case.problem.softening, name) > 0))

    def groups(self):
        """The parts, by name."""
        bounds = {
            name: getattr(self.problem, name)[jnp.asarray(index)]
            for name, index in (("u_min", self.low), ("u_max", self.high))
            if index
        }
        numbers = eqx.filter(self.theta, eqx.is_inexact_array)
        return {"theta": numbers, "x0": self.x0} | bounds | ({"softening": self._penalties()} if self.soft else {})

    def _penalties(self):
        return {name: getattr(self.problem.softening, name) for name in self.soft}

    def vector(self):
        return ravel_pytree(self.groups())[0]

    def rebuild(self, vector):
        """(problem, theta, x0) with the numbers of a vector."""
        groups = ravel_pytree(self.groups())[1](vector)
        problem = self.problem
        for name, index in (("u_min", self.low), ("u_max", self.high)):
            if index:
                bound = getattr(problem, name).at[jnp.asarray(index)].set(groups[name])
                problem = eqx.tree_at(lambda p, name=name: getattr(p, name), problem, bound)
        for name in self.soft:
            problem = eqx.tree_at(lambda p, name=name: getattr(p.softening, name), problem, groups["softening"][name])
        rest = eqx.filter(self.theta, eqx.is_inexact_array, inverse=True)
        return problem, eqx.combine(groups["theta"], rest), groups["x0"]


class Derivatives(NamedTuple):
    """Jacobians of the fields of a solution in the vector of `Inputs`, by name of the field, (entries, n)."""

    forward: dict
    reverse: dict
    numeric: dict
    values: dict
    """The fields themselves."""
    kkt_norm: Any
    """Largest residual at any of the points."""


STEP = 2e-4
STENCIL = {-2.0: 1.0, -1.0: -8.0, 1.0: 8.0, 2.0: -1.0}  # over 12 steps: an error of fourth order


def fields(sol):
    path = jnp.concatenate([sol.mus.path.ravel(), sol.mus.terminal])
    bounds = (sol.mus.u_max - sol.mus.u_min).ravel()
    every = {"us": sol.us, "xs": sol.xs, "lams": sol.lams, "bounds": bounds, "path": path, "cost": sol.cost}
    return {name: value.ravel() for name, value in every.items()}


@eqx.filter_jit
def three_ways(inputs, **options):
    """Forward mode, reverse mode and central differences of `solve`, all from one compiled solve of a batch."""
    vector = inputs.vector()
    n = vector.size
    steps = STEP * jnp.maximum(1.0, jnp.abs(vector))
    stencil = [vector + place * jnp.diag(steps) for place in STENCIL]
    points = jnp.concatenate([*stencil, jnp.tile(vector, (n, 1))])  # the last n are the centre
    centre = lambda rows: jnp.concatenate([jnp.zeros((points.shape[0] - n, rows.shape[1])), rows])

    def outputs(vector):
        sol = sartor.solve(*inputs.rebuild(vector), throw=False, **options)
        return fields(sol) | {"kkt_norm": sol.stats.kkt_norm[None]}

    flat = jax.vmap(lambda vector: ravel_pytree(outputs(vector))[0])
    structure = jax.tree.map(jnp.zeros_like, jax.eval_shape(outputs, vector))
    split = lambda matrix: jax.vmap(ravel_pytree(structure)[1], in_axes=1, out_axes=-1)(matrix)
    values, push = jax.linearize(flat, points)
    forward = push(centre(jnp.eye(n)))[-n:].T
    pull = jax.linear_transpose(push, points)
    m = values.shape[1]
    blocks = -(-m // n)
    cotangents = jnp.eye(blocks * n, m).reshape(blocks, n, m)
    reverse = jax.vmap(lambda rows: pull(centre(rows))[0][-n:])(cotangents).reshape(blocks * n, n)[:m]
    around = values[:-n].reshape(len(STENCIL), n, m)
    numeric = jnp.einsum("p,pnm->mn", jnp.asarray(list(STENCIL.values())), around) / (12.0 * steps)
    all_values = jax.vmap(ravel_pytree(structure)[1])(values)
    one = jax.tree.map(lambda leaf: leaf[-1], all_values)
    return Derivatives(split(forward), split(reverse), split(numeric), one, jnp.max(all_values["kkt_norm"]))


def assert_equal(one, other, tolerance=1e-6, names=("us", "xs", "lams", "bounds", "path", "cost")):
    """Jacobians by field, equal to a tolerance relative to the largest entry of the field."""
    for name in names:
        if other[name].size:
            largest = np.max(np.abs(other[name]))
            np.testing.assert_allclose(one[name], other[name], rtol=0.0, atol=tolerance * largest + 1e-9, err_msg=name)
