"""Linear-quadratic problems with bounds, hard rows and soft rows, and box QPs, against CVXPY."""

from typing import NamedTuple

import cvxpy
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

import sartor
from cases import sample
from sartor.solvers import qp
from sartor.solvers.box_ddp import box_qp

N, NX, NU, NH, NHN = 5, 3, 3, 2, 2
INF = np.inf


class Data(NamedTuple):
    """theta: all numbers of a linear-quadratic problem, time-varying in the dynamics' offset and the linear cost."""

    A: np.ndarray
    B: np.ndarray
    c: np.ndarray  # (N, nx)
    H: np.ndarray  # Hessian of the stage cost in (x, u), with cross terms
    g: np.ndarray  # (N, nx + nu)
    HN: np.ndarray
    G: np.ndarray  # rows G (x, u) ≤ b
    b: np.ndarray  # (N, nh)
    GN: np.ndarray
    bN: np.ndarray


def random_data(seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    root, last = normal(NX + NU, NX + NU), normal(NX, NX)
    return Data(
        A=normal(NX, NX) / 1.5, B=normal(NX, NU), c=0.3 * normal(N, NX), H=root @ root.T / 4 + 0.1 * np.eye(NX + NU),
        g=normal(N, NX + NU), HN=last @ last.T, G=normal(NH, NX + NU), b=0.5 + rng.uniform(size=(N, NH)),
        GN=normal(NHN, NX), bN=0.1 + 0.5 * rng.uniform(size=NHN),
    ), normal(NX)  # fmt: skip


def cost(x, u, k, theta):
    z = jnp.concatenate([x, u])
    return 0.5 * z @ theta.H @ z + theta.g[k] @ z


PROBLEM = sartor.Problem(
    dynamics=lambda x, u, k, theta: theta.A @ x + theta.B @ u + theta.c[k],
    stage_cost=cost,
    terminal_cost=lambda x, theta: 0.5 * x @ theta.HN @ x,
    horizon=N,
    u_min=[-1.0] * NU,
    u_max=[1.0] * NU,
    constraints=lambda x, u, k, theta: theta.G @ jnp.concatenate([x, u]) - theta.b[k],
    terminal_constraints=lambda x, theta: theta.GN @ x - theta.bN,
    softening=sartor.Softening([1.0] * (NH + NHN), [1.0] * (NH + NHN)),
)
FREE, BOX = ([-INF] * NU, [INF] * NU), ([-0.3] * NU, [0.3] * NU)
MIXED = ([-0.3, -INF, -INF], [0.2, 0.25, INF])
HARD = ([INF] * 4, [INF] * 4)

# name: (bounds, (linear, quadratic) of rows and terminal rows, seed)
VARIANTS = {
    "no rows, no bounds": (FREE, None, 0),
    "box on all controls": (BOX, None, 1),
    "bounds on some controls, one-sided and infinite": (MIXED, None, 2),
    "hard rows and terminal rows": (FREE, HARD, 3),
    "hard rows with bounds": (([-1.0] * NU, [1.5] * NU), HARD, 9),
    "soft rows, linear": (FREE, ([0.4, 0.8, 0.5, 0.3], [0.0] * 4), 5),
    "soft rows, quadratic": (MIXED, ([0.0] * 4, [3.0, 5.0, 2.0, 4.0]), 6),
    "soft rows, both": (MIXED, ([0.3, 0.2, 0.1, 0.2], [3.0, 2.0, 5.0, 1.0]), 7),
    "hard and soft rows together": (FREE, ([INF, 0.5, 0.0, INF], [INF, 0.0, 2.0, 0.0]), 8),
}


def inputs(bounds, penalties, seed):
    theta, x0 = random_data(seed)
    if penalties is None:  # rows that are never reached
        theta = theta._replace(b=theta.b + 1e3, bN=theta.bN + 1e3)
    softening = sartor.Softening(*(penalties or HARD))
    changed = eqx.tree_at(
        lambda p: (p.u_min, p.u_max, p.softening), PROBLEM, (*(jnp.asarray(b) for b in bounds), softening)
    )
    return changed, jax.tree.map(jnp.asarray, theta), jnp.asarray(x0)


@pytest.fixture(scope="module")
def solutions():
    """All variants in one batch: bounds, penalties and data are arrays, the functions are the same."""
    parts = [eqx.partition(inputs(*variant), eqx.is_array) for variant in VARIANTS.values()]
    arrays, static = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p[0] for p in parts]), parts[0][1]
    solve = lambda arrays: sartor.solve(*eqx.combine(arrays, static), throw=False)
    sols = jax.jit(jax.vmap(solve))(arrays)
    return {name: sample(sols, i) for i, name in enumerate(VARIANTS)}


class Oracle(NamedTuple):
    us: np.ndarray
    xs: np.ndarray
    lams: np.ndarray
    mus: dict
    cost: float


def minimise(objective, constraints):
    problem = cvxpy.Problem(cvxpy.Minimize(objective), constraints)
    tight = {f"tol_{name}": 1e-12 for name in ("gap_abs", "gap_rel", "feas")}
    problem.solve(solver=cvxpy.CLARABEL, **tight)
    assert problem.status in ("optimal", "optimal_inaccurate")
    return problem.value


def oracle(bounds, penalties, seed) -> Oracle:
    """The same problem in CVXPY, all stages at once, with a slack for each soft row."""
    _, theta, x0 = inputs(bounds, penalties, seed)
    theta, x0 = jax.tree.map(np.asarray, (theta, x0))
    (low, high), (linear, quadratic) = (np.asarray(b) for b in bounds), (np.asarray(p) for p in penalties or HARD)
    xs, us = cvxpy.Variable((N + 1, NX)), cvxpy.Variable((N, NU))
    objective = 0.5 * cvxpy.quad_form(xs[N], cvxpy.psd_wrap(theta.HN))
    start, dynamics, rows = [xs[0] == x0], [], []
    bound_rows = {"u_min": [], "u_max": []}
    for k in range(N):
        z = cvxpy.hstack([xs[k], us[k]])
        objective += 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(theta.H)) + theta.g[k] @ z
        dynamics.append(theta.A @ xs[k] + theta.B @ us[k] + theta.c[k] - xs[k + 1] == 0)
        rows += [theta.G[i] @ z - theta.b[k, i] for i in range(NH)]
        for i in range(NU):
            bound_rows["u_min"].append(low[i] <= us[k, i] if np.isfinite(low[i]) else None)
            bound_rows["u_max"].append(us[k, i] <= high[i] if np.isfinite(high[i]) else None)
    rows += [theta.GN[i] @ xs[N] - theta.bN[i] for i in range(NHN)]
    kinds = [*range(NH)] * N + [NH + i for i in range(NHN)]
    held = []
    for row, kind in zip(rows, kinds, strict=True):
        if np.isinf(linear[kind]) or np.isinf(quadratic[kind]):
            held.append(row <= 0)
        else:
            s = cvxpy.Variable(nonneg=True)
            objective += linear[kind] * s + 0.5 * quadratic[kind] * cvxpy.square(s)
            held.append(row <= s)
    existing = [row for name in bound_rows for row in bound_rows[name] if row is not None]
    value = minimise(objective, [*start, *dynamics, *held, *existing])
    dual = lambda row: 0.0 if row is None else float(row.dual_value)
    mus = {name: np.reshape([dual(row) for row in some], (N, NU)) for name, some in bound_rows.items()}
    duals = np.asarray([dual(row) for row in held])
    mus |= {"path": duals[: N * NH].reshape(N, NH), "terminal": duals[N * NH :]}
    lams = np.stack([-start[0].dual_value, *(row.dual_value for row in dynamics)])
    return Oracle(us.value, xs.value, lams, mus, value)


@pytest.mark.parametrize("name", VARIANTS)
def test_solution_and_multipliers_equal_those_of_cvxpy(name, solutions):
    sol, expected = solutions[name], oracle(*VARIANTS[name])
    assert bool(sol.successful)
    np.testing.assert_allclose(sol.us, expected.us, atol=1e-6)
    np.testing.assert_allclose(sol.xs, expected.xs, atol=1e-6)
    np.testing.assert_allclose(sol.cost, expected.cost, atol=1e-7 * (1.0 + abs(expected.cost)))
    scale = 1.0 + np.abs(expected.lams).max()
    np.testing.assert_allclose(sol.lams, expected.lams, atol=1e-5 * scale)
    for kind, mus in expected.mus.items():
        np.testing.assert_allclose(getattr(sol.mus, kind), mus, atol=1e-5 * scale, err_msg=kind)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_exercise_what_their_names_say(name, solutions):
    bounds, penalties, _ = VARIANTS[name]
    sol = solutions[name]
    active = {kind: float(jnp.max(getattr(sol.mus, kind))) > 1e-3 for kind in ("u_min", "u_max", "path", "terminal")}
    assert active["u_min"] <= np.isfinite(bounds[0]).any() and active["u_max"] <= np.isfinite(bounds[1]).any()
    if bounds in (BOX, MIXED):
        assert active["u_min"] and active["u_max"]
    assert (active["path"] or active["terminal"]) == (penalties is not None)
    rows = np.concatenate([sol.slacks.path.ravel(), sol.slacks.terminal])
    if "soft" in name:
        changed, theta, _ = inputs(*VARIANTS[name])
        violated = sartor.violations(changed, theta, sol)
        assert max(float(jnp.max(violated.path)), float(jnp.max(violated.terminal))) > 1e-2
    assert np.max(rows) > 1e-2  # not all rows are active


def test_box_ddp_equals_cvxpy_on_box_problems():
    bare = sartor.Problem(
        dynamics=PROBLEM.dynamics, stage_cost=PROBLEM.stage_cost, terminal_cost=PROBLEM.terminal_cost, horizon=N,
        u_min=[0.0] * NU, u_max=[0.0 + 1.0] * NU,
    )  # fmt: skip
    variants = [VARIANTS[name] for name in VARIANTS if VARIANTS[name][1] is None]
    every = [inputs(*variant) for variant in variants]
    bounds = [jnp.stack([getattr(changed, name) for changed, _, _ in every]) for name in ("u_min", "u_max")]
    thetas, x0s = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(theta, x0) for _, theta, x0 in every])

    def solve(u_min, u_max, theta, x0):
        changed = eqx.tree_at(lambda p: (p.u_min, p.u_max), bare, (u_min, u_max))
        return sartor.solve(changed, theta, x0, solver=sartor.BoxDDP(), throw=False)

    sols = jax.jit(jax.vmap(solve))(*bounds, thetas, x0s)
    assert jnp.all(sols.successful)
    for i, variant in enumerate(variants):
        expected = oracle(*variant)
        np.testing.assert_allclose(sols.us[i], expected.us, atol=1e-6)
        np.testing.assert_allclose(sols.mus.u_max[i], expected.mus["u_max"], atol=1e-5)
        np.testing.assert_allclose(sols.mus.u_min[i], expected.mus["u_min"], atol=1e-5)


solve_box = jax.jit(box_qp)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 5]), st.integers(0, 10_000), st.booleans())
def test_box_qp_equals_scipy_and_its_feedback_moves_only_free_controls(nu, seed, unbounded):
    rng = np.random.default_rng(seed)
    root, g, G = rng.normal(size=(nu + 2, nu)), rng.normal(size=nu), rng.normal(size=(nu, 2))
    H = root.T @ root + 1e-2 * np.eye(nu)
    low, high = -rng.uniform(0.0, 0.5, nu), rng.uniform(0.0, 0.5, nu)
    if unbounded:
        low[0], high[-1] = -INF, INF
    v, K, definite = (np.asarray(out) for out in solve_box(*map(jnp.asarray, (H, g, G, low, high))))
    # ½ vᵀHv + gᵀv = ½ |Lᵀv + L⁻¹g|² + constant
    L = np.linalg.cholesky(H)
    expected = lsq_linear(L.T, -np.linalg.solve(L, g), (low, high), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(v, expected, atol=1e-7)
    assert definite and np.all((low <= v) & (v <= high))
    free = (v > low) & (v < high)
    assert np.all(K[~free] == 0)
    np.testing.assert_allclose(H[np.ix_(free, free)] @ K[free], -G[free], atol=1e-8)


def test_box_qp_says_where_the_hessian_is_not_definite_on_the_free_controls():
    H, G = jnp.diag(jnp.asarray([1.0, -1.0])), jnp.zeros((2, 2))
    *_, definite = solve_box(H, jnp.asarray([0.1, 0.0]), G, -jnp.full(2, INF), jnp.full(2, INF))
    assert not definite


@settings(max_examples=200, deadline=None)
@given(
    g=st.floats(-10, 10), mu=st.floats(0, 60), log_tau=st.floats(-12, 0), linear=st.sampled_from([0.0, 5.0, 25.0]),
    quadratic=st.sampled_from([0.0, 0.3, 25.0]),
)  # fmt: skip
def test_a_warm_start_is_inside_whatever_is_known(g, mu, log_tau, linear, quadratic):
    """Also where the multiplier of a violated soft row lies between its linear penalty and the whole one."""
    if linear == quadratic == 0.0:
        return
    tau, one = jnp.asarray(10.0**log_tau), lambda value: jnp.asarray([value])
    rules = qp.Rules(one(True), one(False), one(linear), one(quadratic))
    mus, t, s, nus = (float(part[0]) for part in qp.center(rules, one(g), one(mu), tau))
    assert mus > 0 and t > 0 and s >= 0 and nus >= 0
    np.testing.assert_allclose(mus * t, tau, rtol=1e-9)
    if linear > 0:
        assert 0 < s * nus <= tau * (1 + 1e-6)  # less where the whole penalty is too small for more
        if s < g:
            np.testing.assert_allclose(s * nus, tau, rtol=1e-6)
