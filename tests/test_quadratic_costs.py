"""The kind of problems that mpc.pytorch is tested with: C, c, F, f at every stage, bounds of every stage, a network.

    min Σ_{t<T} ½ τ_tᵀ C_t τ_t + c_tᵀ τ_t,  τ_t = [x_t; u_t],   x_{t+1} = F_t τ_t + f_t,   u_min,t ≤ u_t ≤ u_max,t

The last control has a cost and moves nothing, so the horizon is T and the terminal cost zero.
"""

from typing import Any, NamedTuple

import cvxpy as cp
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import sartor
from cases import SOLVERS

NX, NU = 3, 4


class Theta(NamedTuple):
    """Costs of all stages, and the dynamics: matrices, or a network."""

    C: Any
    c: Any
    dynamics: Any


class Affine(NamedTuple):
    """x_{t+1} = F_t τ_t + f_t."""

    F: Any
    f: Any


def affine(x, u, k, theta):
    F, f = theta.dynamics
    k = jnp.minimum(k, F.shape[0] - 1)
    return F[k] @ jnp.concatenate([x, u]) + f[k]


def network(x, u, k, theta):
    return theta.dynamics(jnp.concatenate([x, u]))


def stage_cost(x, u, k, theta):
    tau = jnp.concatenate([x, u])
    return 0.5 * tau @ theta.C[k] @ tau + theta.c[k] @ tau


def problem(dynamics, T, u_min, u_max):
    return sartor.Problem(
        dynamics=dynamics, stage_cost=stage_cost, terminal_cost=lambda x, theta: jnp.zeros((), x.dtype), horizon=T,
        u_min=u_min, u_max=u_max,
    )  # fmt: skip


def random_theta(rng, T, nx, nu, scale=1.0):
    n = nx + nu
    C = scale * rng.normal(size=(T, n, n))
    A = np.eye(nx) + 0.2 * rng.normal(size=(nx, nx))
    F = np.tile(np.concatenate([A, rng.normal(size=(nx, nu))], axis=1), (T - 1, 1, 1))
    f = np.tile(rng.normal(size=nx), (T - 1, 1))
    C, c = jnp.asarray(C.transpose(0, 2, 1) @ C), jnp.asarray(scale * rng.normal(size=(T, n)))
    return Theta(C, c, Affine(jnp.asarray(F), jnp.asarray(f)))


def oracle(theta, x0, low, high):
    """(T, nu) controls by CVXPY."""
    C, c, (F, f) = jax.tree.map(np.asarray, theta)
    T, nx = len(C), len(x0)
    tau = cp.Variable((T, C.shape[1]))
    objective, rows = 0.0, [tau[0, :nx] == x0]
    for t in range(T):
        objective += 0.5 * cp.quad_form(tau[t], cp.psd_wrap(C[t])) + c[t] @ tau[t]
        rows += [tau[t, nx:] >= low[t], tau[t, nx:] <= high[t]] if np.isfinite(low[t]).all() else []
        rows += [tau[t + 1, :nx] == F[t] @ tau[t] + f[t]] if t + 1 < T else []
    cp.Problem(cp.Minimize(objective), rows).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    return tau.value[:, nx:]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bounded", [False, True])
def test_controls_are_those_of_cvxpy_with_bounds_of_every_stage(solver, bounded):
    T, rng = 5, np.random.default_rng(1)
    thetas, x0s = [random_theta(rng, T, NX, NU) for _ in range(3)], rng.normal(size=(3, NX))
    low, high = -rng.uniform(size=(3, T, NU)), rng.uniform(size=(3, T, NU))
    if not bounded:
        low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
    base = problem(affine, T, low[0], high[0])

    @jax.jit
    @jax.vmap
    def solve(theta, x0, low, high):
        one = eqx.tree_at(lambda p: (p.u_min, p.u_max), base, (low, high))
        return sartor.solve(one, theta, x0, solver=SOLVERS[solver], throw=False)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas)
    sols = solve(stacked, jnp.asarray(x0s), jnp.asarray(low), jnp.asarray(high))
    assert np.all(sols.successful)
    if bounded:
        at_bound = np.isclose(sols.us, low) | np.isclose(sols.us, high)
        assert 0.1 < np.mean(at_bound) < 0.9
    for i in range(3):
        np.testing.assert_allclose(sols.us[i], oracle(thetas[i], x0s[i], low[i], high[i]), atol=1e-6)


def jacobians(base, theta, x0, solver):
    """Implicit Jacobian of the controls in all that is given, and central differences of fourth order."""
    moving, still = eqx.partition((theta, x0, base.u_min, base.u_max), eqx.is_inexact_array)
    vector, rebuild = ravel_pytree(moving)

    def us(vector):
        theta, x0, low, high = eqx.combine(rebuild(vector), still)
        one = eqx.tree_at(lambda p: (p.u_min, p.u_max), base, (low, high))
        sol = sartor.solve(one, theta, x0, solver=solver, throw=False)
        return sol.us.ravel(), sol.successful

    places, weights = np.array([-2.0, -1.0, 1.0, 2.0]), np.array([1.0, -8.0, 8.0, -1.0])
    h = 2e-4
    steps = jnp.asarray(h * places)[:, None, None] * jnp.eye(vector.size)
    run = jax.jit(jax.vmap(us))
    values, fine = run((vector + steps).reshape(-1, vector.size))
    assert np.all(fine)
    values = values.reshape(len(places), vector.size, -1)
    numeric = np.einsum("p,pnm->mn", weights, values) / (12.0 * h)
    implicit = jax.jit(jax.jacrev(lambda vector: us(vector)[0]))(vector)
    return implicit, numeric


@pytest.mark.parametrize("kind", ["affine", "network", "slew"])
def test_jacobian_of_the_controls_equals_central_differences(kind):
    T, nx, nu, rng = 3, 2, 2, np.random.default_rng(0)
    theta, x0 = random_theta(rng, T, nx, nu, scale=2.0), jnp.asarray(rng.normal(size=nx))
    low, high = -rng.uniform(0.3, 1.0, size=(T, nu)), rng.uniform(0.3, 1.0, size=(T, nu))
    if kind == "affine":
        base = problem(affine, T, low, high)
    elif kind == "network":
        mlp = eqx.nn.MLP(nx + nu, nx, 10, 2, jax.nn.sigmoid, dtype=jnp.float64, key=jax.random.key(1))
        theta, base = theta._replace(dynamics=mlp), problem(network, T, low, high)
    else:  # a cost on the change of the control: the last control becomes part of the state
        x0 = jnp.concatenate([x0, jnp.zeros(nu)])
        base = sartor.Problem(
            dynamics=lambda x, u, k, theta: jnp.concatenate([affine(x[:nx], u, k, theta), u]),
            stage_cost=lambda x, u, k, theta: stage_cost(x[:nx], u, k, theta) + 0.5 * jnp.sum((u - x[nx:]) ** 2),
            terminal_cost=lambda x, theta: jnp.zeros((), x.dtype), horizon=T, u_min=low, u_max=high,
        )  # fmt: skip
    implicit, numeric = jacobians(base, theta, x0, sartor.SQP(tol=1e-11))
    size = np.abs(numeric).max()
    assert size > 0.1
    np.testing.assert_allclose(implicit, numeric, atol=1e-6 * size)


def test_bounds_of_the_wrong_shape_are_named():
    for low, high in ((np.zeros((4, 2)), np.ones((4, 2))), (np.zeros(2), np.ones((3, 2))), (np.zeros((3, 0)),) * 2):
        with pytest.raises(ValueError, match=r"u_min and u_max must have shape \(nu,\) or \(3, nu\)"):
            problem(affine, 3, low, high)
    with pytest.raises(ValueError, match=r"u_min\[2, 1\] = 0.0 and u_max\[2, 1\] = -1.0"):
        problem(affine, 3, np.zeros((3, 2)), np.where(np.arange(6).reshape(3, 2) == 5, -1.0, 1.0))
