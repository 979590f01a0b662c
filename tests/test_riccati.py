"""The Riccati recursion and its derivatives against one dense solve of the whole KKT system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sartor
from sartor import riccati
from sartor.riccati import Trajectory

BATCH, N, NX, NU = 4, 5, 3, 2
lqr = jax.jit(sartor.lqr, static_argnums=2)
factor = jax.jit(riccati.factor, static_argnums=1)


def random_lq(rng, num_stages=N, nx=NX, nu=NU):
    """Time-varying, with cross terms and offsets; every stage Hessian [Q Sᵀ; S R] positive definite."""
    normal = lambda *shape: rng.normal(size=shape)
    root = normal(num_stages + 1, nx + nu, nx + nu)
    H = np.einsum("kij,klj->kil", root, root) / (nx + nu) + 0.1 * np.eye(nx + nu)
    lq = sartor.LQ(
        A=normal(num_stages, nx, nx), B=normal(num_stages, nx, nu), c=normal(num_stages, nx),
        Q=H[:, :nx, :nx], R=H[:-1, nx:, nx:], S=H[:-1, nx:, :nx],
        q=normal(num_stages + 1, nx), r=normal(num_stages, nu),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, lq), jnp.asarray(normal(nx))


def dense_kkt(lq):
    """The matrix of the linear system in (us, xs, lams), written row by row from the Lagrangian."""
    A, B, Q, R, S = (np.asarray(leaf) for leaf in (lq.A, lq.B, lq.Q, lq.R, lq.S))
    num_stages, nx, nu = B.shape
    u = lambda k: slice(k * nu, (k + 1) * nu)
    x = lambda k: slice(num_stages * nu + k * nx, num_stages * nu + (k + 1) * nx)
    lam = lambda k: slice(x(num_stages + 1 + k).start, x(num_stages + 1 + k).stop)
    M = np.zeros((lam(num_stages).stop,) * 2)
    for k in range(num_stages):
        M[u(k), u(k)], M[u(k), x(k)], M[x(k), u(k)] = R[k], S[k], S[k].T
        M[lam(k + 1), x(k)], M[lam(k + 1), u(k)] = A[k], B[k]
        M[x(k), lam(k + 1)], M[u(k), lam(k + 1)] = A[k].T, B[k].T
    for k in range(num_stages + 1):
        M[x(k), x(k)] = Q[k]
        M[lam(k), x(k)] = M[x(k), lam(k)] = -np.eye(nx)
    return M


def flat(z):
    return np.concatenate([np.ravel(leaf) for leaf in (z.us, z.xs, z.lams)])


def dense_solution(lq, x0):
    rhs = Trajectory(us=-lq.r, xs=-lq.q, lams=-jnp.concatenate([x0[None], lq.c]))
    return np.linalg.solve(dense_kkt(lq), flat(rhs))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[random_lq(rng) for _ in range(BATCH)])


@pytest.fixture(scope="module")
def solved(samples):
    return jax.jit(jax.vmap(sartor.lqr))(*samples)


def sample(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_lqr_solves_the_dense_kkt_system(samples, solved):
    for i in range(BATCH):
        expected = dense_solution(*sample(samples, i))
        np.testing.assert_allclose(flat(sample(solved, i)), expected, rtol=1e-10, atol=1e-10)


def test_lqr_starts_at_x0_and_follows_the_dynamics(samples, solved):
    lq, x0 = samples
    np.testing.assert_allclose(solved.xs[:, 0], x0)
    ahead = np.einsum("bkxy,bky->bkx", lq.A, solved.xs[:, :-1]) + np.einsum("bkxu,bku->bkx", lq.B, solved.us) + lq.c
    np.testing.assert_allclose(solved.xs[:, 1:], ahead, atol=1e-10)


def test_costate_of_stage_0_is_the_gradient_of_the_optimal_cost(samples, solved):
    lq, x0 = sample(samples, 0)

    def optimal_cost(x0):
        us, xs = np.split(dense_solution(lq, x0)[: N * NU + (N + 1) * NX], [N * NU])
        us, xs = us.reshape(N, NU), xs.reshape(N + 1, NX)
        cost = 0.5 * np.einsum("kx,kxy,ky", xs, lq.Q, xs) + 0.5 * np.einsum("ku,kuv,kv", us, lq.R, us)
        return cost + np.einsum("ku,kux,kx", us, lq.S, xs[:-1]) + np.sum(lq.q * xs) + np.sum(lq.r * us)

    eps = 1e-4  # the cost is quadratic: no truncation error
    slopes = [(optimal_cost(x0 + eps * e) - optimal_cost(x0 - eps * e)) / (2 * eps) for e in np.eye(NX)]
    np.testing.assert_allclose(sample(solved, 0).lams[0], slopes, rtol=1e-7)


def test_apply_kkt_is_the_dense_matrix(samples):
    rng, lq = np.random.default_rng(1), sample(samples, 0)[0]
    z = Trajectory(*(jnp.asarray(rng.normal(size=shape)) for shape in ((N, NU), (N + 1, NX), (N + 1, NX))))
    np.testing.assert_allclose(flat(jax.jit(riccati.apply_kkt)(lq, z)), dense_kkt(lq) @ flat(z), atol=1e-12)


def test_one_factorisation_serves_many_right_hand_sides(samples):
    rng, lq = np.random.default_rng(2), sample(samples, 0)[0]
    shapes = ((3, N, NU), (3, N + 1, NX), (3, N + 1, NX))
    rhs = Trajectory(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes))
    factors = factor(lq, False)
    assert bool(factors.regular)
    solved = jax.jit(jax.vmap(riccati.solve_kkt, (None, 0)))(factors, rhs)
    for i in range(3):
        expected = np.linalg.solve(dense_kkt(lq), flat(sample(rhs, i)))
        np.testing.assert_allclose(flat(sample(solved, i)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_stages", [1, 6])
def test_associative_scan_gives_the_answer_of_the_sequential_one(num_stages):
    lq, x0 = random_lq(np.random.default_rng(3), num_stages)
    sequential, parallel = factor(lq, False), factor(lq, True)
    for name in ("A_cl", "K", "P", "root"):
        np.testing.assert_allclose(getattr(parallel, name), getattr(sequential, name), rtol=1e-9, atol=1e-9)
    assert bool(parallel.regular) and bool(sequential.regular)
    one, other = lqr(lq, x0, False), lqr(lq, x0, True)
    np.testing.assert_allclose(flat(other), flat(one), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(flat(one), dense_solution(lq, x0), rtol=1e-10, atol=1e-10)


def directions(lq, x0, rng):
    """A random direction in every leaf by itself, symmetric where the leaf is."""
    zero = jax.tree.map(jnp.zeros_like, (lq, x0))
    for name, leaf in lq._asdict().items():
        d = jnp.asarray(rng.normal(size=leaf.shape))
        d = 0.5 * (d + jnp.swapaxes(d, 1, 2)) if name in ("Q", "R") else d
        yield name, (zero[0]._replace(**{name: d}), zero[1])
    yield "x0", (zero[0], jnp.asarray(rng.normal(size=x0.shape)))


@pytest.fixture(scope="module")
def derivatives(samples):
    """(names, forward, reverse, central differences of the dense solve) of vᵀ(solution) in each leaf."""
    rng, (lq, x0) = np.random.default_rng(4), sample(samples, 1)
    names, tangents = zip(*directions(lq, x0, rng), strict=True)
    v = Trajectory(*(jnp.asarray(rng.normal(size=shape)) for shape in ((N, NU), (N + 1, NX), (N + 1, NX))))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tangents)
    along_v = lambda z: sum(jnp.vdot(a, b) for a, b in zip(z, v, strict=True))

    def both(lq, x0):
        value = lambda lq, x0: along_v(sartor.lqr(lq, x0))
        forward = jax.vmap(lambda t: jax.jvp(value, (lq, x0), t)[1])(stacked)
        gradient = jax.grad(value, argnums=(0, 1))(lq, x0)
        pair = lambda t: sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(t), strict=True))
        return forward, jax.vmap(pair)(stacked)

    eps, move = 6e-6, lambda t, h: jax.tree.map(lambda p, d: p + h * d, (lq, x0), t)
    dense = lambda inputs: flat(v) @ dense_solution(*inputs)
    numeric = [(dense(move(t, eps)) - dense(move(t, -eps))) / (2 * eps) for t in tangents]
    return names, *jax.jit(both)(lq, x0), np.asarray(numeric)


def test_derivative_of_lqr_in_every_leaf_equals_central_differences(derivatives):
    names, forward, _, numeric = derivatives
    assert names == ("A", "B", "c", "Q", "R", "S", "q", "r", "x0")
    assert np.all(np.abs(numeric) > 1e-3)  # a zero would pass for anything
    np.testing.assert_allclose(forward, numeric, rtol=1e-6, atol=1e-7)


def test_reverse_mode_of_lqr_equals_forward_mode(derivatives):
    _, forward, reverse, _ = derivatives
    np.testing.assert_allclose(reverse, forward, rtol=1e-9)


def test_indefinite_problem_is_found_and_answered_with_nan(samples):
    lq, x0 = sample(samples, 2)
    concave = lq._replace(R=lq.R.at[1].add(-1e3 * jnp.eye(NU)))
    assert not factor(concave, False).regular
    for leaf in lqr(concave, x0, False):
        assert jnp.all(jnp.isnan(leaf))


def test_singular_problem_is_found(samples):
    """A control that neither costs nor moves anything: the minimiser is not unique."""
    lq, x0 = sample(samples, 2)
    idle = lq._replace(
        R=lq.R.at[1, 0].set(0.0).at[1, :, 0].set(0.0), S=lq.S.at[1, 0].set(0.0), B=lq.B.at[1, :, 0].set(0.0)
    )
    assert not factor(idle, False).regular
    assert jnp.all(jnp.isnan(lqr(idle, x0, False).us))


def test_indefinite_stage_cost_is_regular_where_the_reduced_hessian_is_positive(samples):
    """A state cost that is negative at one stage is made up for by the others."""
    lq, x0 = sample(samples, 3)
    dented = lq._replace(Q=lq.Q.at[2].add(-0.2 * jnp.eye(NX) - lq.Q[2]))
    assert np.linalg.eigvalsh(dented.Q[2]).max() < 0 and bool(factor(dented, False).regular)
    np.testing.assert_allclose(flat(lqr(dented, x0, False)), dense_solution(dented, x0), rtol=1e-9, atol=1e-9)


def test_singular_sample_leaves_its_neighbours_in_a_batch_alone(samples, solved):
    lq, x0 = samples
    bad = lq._replace(R=lq.R.at[1].add(-1e3 * jnp.eye(NU)))
    zs = jax.jit(jax.vmap(sartor.lqr))(bad, x0)
    assert jnp.all(jnp.isnan(zs.us[1]))
    for i in (0, 2, 3):
        np.testing.assert_array_equal(flat(sample(zs, i)), flat(sample(solved, i)))


def test_lqr_runs_in_float32(samples, solved):
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), samples)
    zs = jax.jit(jax.vmap(sartor.lqr))(*single)
    for leaf, expected in zip(zs, solved, strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, expected, atol=1e-4 * np.abs(expected).max())


@jax.jit
def solved_and_put_back(lq, x0):
    z = riccati.backsolve(riccati.factor(lq), lq.q, lq.r, lq.c, x0)
    return z, riccati.apply_kkt(lq, z)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_backsolve_inverts_apply_kkt_for_any_dimensions(num_stages, nx, nu, seed):
    lq, x0 = random_lq(np.random.default_rng(seed), num_stages, nx, nu)
    z, residual = solved_and_put_back(lq, x0)
    scale = 1.0 + max(float(jnp.max(jnp.abs(leaf))) for leaf in (*lq, *z)) ** 2
    np.testing.assert_allclose(residual.us, -lq.r, atol=1e-12 * scale)
    np.testing.assert_allclose(residual.xs, -lq.q, atol=1e-12 * scale)
    np.testing.assert_allclose(residual.lams, -jnp.concatenate([x0[None], lq.c]), atol=1e-12 * scale)
    np.testing.assert_allclose(flat(z), dense_solution(lq, x0), atol=1e-10 * scale)
