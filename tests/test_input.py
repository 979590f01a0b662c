"""Input that is wrong is refused with a `ValueError` that names the argument, before anything is compiled."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sartor

N, NX, NU = 3, 2, 1
A, B = jnp.asarray([[1.0, 0.1], [0.0, 1.0]]), jnp.asarray([[0.0], [0.1]])


def dynamics(x, u, k, theta):
    return theta["A"] @ x + theta["B"] @ u


def stage_cost(x, u, k, theta):
    return x @ x + u @ u


def terminal_cost(x, theta):
    return x @ x


def rows(x, u, k, theta):
    return x - 1.0


def terminal_row(x, theta):
    return x[:1] - 1.0


THETA = {"A": A, "B": B}
X0 = jnp.asarray([0.5, 0.0])
GOOD = dict(dynamics=dynamics, stage_cost=stage_cost, terminal_cost=terminal_cost, horizon=N, u_min=[-1.0], u_max=[1.0])


def problem(**changes):
    return sartor.Problem(**(GOOD | changes))


@pytest.fixture(autouse=True)
def compiling_is_an_error(monkeypatch):
    """A refusal may not wait for the compiler: replace the compiled function by one that fails."""

    def compiled(*_):
        raise AssertionError("the input got as far as the compiler")

    monkeypatch.setattr(sys.modules["sartor.solve"], "_solve", compiled)


def test_good_input_gets_as_far_as_the_compiler():
    with pytest.raises(AssertionError, match="as far as the compiler"):
        sartor.solve(problem(constraints=rows, softening=sartor.Softening(1.0)), THETA, X0)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("horizon", dict(horizon=0)),
        ("horizon", dict(horizon=-2)),
        ("horizon", dict(horizon=2.0)),
        ("horizon", dict(horizon=True)),
        ("dynamics", dict(dynamics=None)),
        ("stage_cost", dict(stage_cost=1.0)),
        ("terminal_cost", dict(terminal_cost="cost")),
        ("constraints", dict(constraints="rows")),
        ("terminal_constraints", dict(terminal_constraints=0.0)),
        ("u_min", dict(u_min=[2.0])),
        ("u_min", dict(u_min=[1.0])),
        ("u_min", dict(u_min=-1.0, u_max=1.0)),
        ("u_min", dict(u_min=[-1.0, -1.0])),
        ("u_max", dict(u_max=[[1.0]])),
        ("u_min", dict(u_min=[], u_max=[])),
        ("u_min", dict(u_min=[np.nan])),
        ("u_max", dict(u_max=[np.nan])),
    ],
)
def test_problem_names_the_wrong_field(name, changes):
    with pytest.raises(ValueError, match=name):
        problem(**changes)


@pytest.mark.parametrize("name, value", [("linear", -1.0), ("quadratic", [1.0, np.nan]), ("linear", [[1.0]])])
def test_softening_names_the_wrong_field(name, value):
    with pytest.raises(ValueError, match=f"Softening.{name}"):
        sartor.Softening(**{name: value})


@pytest.mark.parametrize(
    "name, x0",
    [
        ("x0", 0.5),
        ("x0", jnp.zeros((1, NX))),
        ("x0", jnp.zeros(0)),
        (r"x0\[1\] is nan", jnp.asarray([0.0, jnp.nan])),
        (r"x0\[0\] is inf", jnp.asarray([jnp.inf, 0.0])),
    ],
)
def test_x0_has_to_be_a_finite_vector(name, x0):
    with pytest.raises(ValueError, match=name):
        sartor.solve(problem(), THETA, x0)


@pytest.mark.parametrize(
    "where, theta",
    [
        (r"theta\['A'\]\[0, 1\]", THETA | {"A": A.at[0, 1].set(jnp.nan)}),
        (r"theta\['B'\]", THETA | {"B": B / 0.0}),
        (r"theta\['gain'\]", THETA | {"gain": jnp.asarray(jnp.inf)}),
        (r"theta\['gain'\]", THETA | {"gain": float("nan")}),
    ],
)
def test_theta_has_to_be_finite(where, theta):
    with pytest.raises(ValueError, match=where):
        sartor.solve(problem(), theta, X0)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("dynamics", dict(dynamics=lambda x, u, k, theta: x[:1])),
        ("dynamics", dict(dynamics=lambda x, u, k, theta: x[None])),
        ("dynamics", dict(dynamics=lambda x, u, k, theta: x.astype(jnp.float32))),
        ("dynamics", dict(dynamics=lambda x, u, k, theta: (x, u))),
        ("stage_cost", dict(stage_cost=lambda x, u, k, theta: x**2)),
        ("stage_cost", dict(stage_cost=lambda x, u, k, theta: (x @ x)[None])),
        ("stage_cost", dict(stage_cost=lambda x, u, k, theta: 1.0)),
        ("terminal_cost", dict(terminal_cost=lambda x, theta: x)),
        ("terminal_cost", dict(terminal_cost=lambda x, theta: (x @ x).astype(jnp.float32))),
        ("constraints", dict(constraints=lambda x, u, k, theta: x[0] - 1.0)),
        ("constraints", dict(constraints=lambda x, u, k, theta: jnp.outer(x, x))),
        ("constraints", dict(constraints=lambda x, u, k, theta: [x[0] - 1.0])),
        ("terminal_constraints", dict(terminal_constraints=lambda x, theta: x[0])),
        ("terminal_constraints", dict(terminal_constraints=lambda x, theta: x > 0)),
        (
            "softening",
            dict(constraints=rows, terminal_constraints=terminal_row, softening=sartor.Softening([1.0, 1.0])),
        ),
        ("softening", dict(constraints=rows, softening=sartor.Softening(quadratic=[1.0]))),
    ],
)
def test_functions_have_to_return_the_right_shape_and_dtype(name, changes):
    with pytest.raises(ValueError, match=name):
        sartor.solve(problem(**changes), THETA, X0)


def test_dtype_of_theta_may_not_change_that_of_the_state():
    """float64 parameters with a float32 state: the dynamics would return float64."""
    with pytest.raises(ValueError, match=r"dynamics.*float32"):
        sartor.solve(problem(), THETA, X0.astype(jnp.float32))


@pytest.mark.parametrize(
    "name, make",
    [
        (r"guess\.us.*\(3, 1\)", lambda: sartor.guess(jnp.zeros((N + 2, NX)), jnp.zeros((N + 1, NU)))),
        (r"guess\.us", lambda: sartor.guess(jnp.zeros((N + 1, NX)), jnp.zeros((N, 2)))),
        (r"guess\.xs", lambda: sartor.guess(jnp.zeros((N + 1, 3)), jnp.zeros((N, NU)))),
        (r"guess\.us", lambda: sartor.guess(jnp.zeros((N + 1, NX)), jnp.zeros((N, NU), jnp.float32))),
        (r"guess\.us", lambda: sartor.guess(jnp.zeros((N + 1, NX)), jnp.full((N, NU), jnp.nan))),
        (r"guess\.xs", lambda: sartor.guess(jnp.full((N + 1, NX), jnp.inf), jnp.zeros((N, NU)))),
        (r"guess\.us\[1, 0\].*u_max", lambda: sartor.guess(jnp.zeros((N + 1, NX)), jnp.zeros((N, NU)).at[1].set(1.1))),
        (r"guess\.us\[2, 0\].*u_min", lambda: sartor.guess(jnp.zeros((N + 1, NX)), jnp.zeros((N, NU)).at[2].set(-2.0))),
        ("guess", lambda: sartor.guess(jnp.zeros((N, NX)), jnp.zeros((N, NU)))),
        ("guess", lambda: sartor.guess(jnp.zeros((N + 1, NX)), jnp.zeros(N))),
    ],
)
def test_guess_has_to_fit_and_to_respect_the_bounds(name, make):
    with pytest.raises(ValueError, match=name):
        sartor.solve(problem(), THETA, X0, guess=make())


def test_known_guess_is_taken_and_checked_while_the_state_is_traced():
    good = sartor.guess(jnp.zeros((N + 1, NX)), jnp.full((N, NU), 0.1))
    bad = sartor.guess(jnp.zeros((N + 1, NX)), jnp.zeros((N, NU)).at[1].set(1.1))
    known = problem()
    run = lambda guess: jax.eval_shape(lambda x0: sartor.solve(known, THETA, x0, guess=guess).us, X0)
    with pytest.raises(AssertionError, match="as far as the compiler"):
        run(good)
    with pytest.raises(ValueError, match=r"guess\.us\[1, 0\].*u_max"):
        run(bad)


@pytest.mark.parametrize(
    "name, options",
    [
        ("solver", dict(solver="sqp")),
        ("solver", dict(solver=sartor.SQP)),
        ("derivative", dict(derivative="implict")),
        ("curvature", dict(curvature="gauss-newton")),
    ],
)
def test_options_of_solve_are_checked(name, options):
    with pytest.raises(ValueError, match=name):
        sartor.solve(problem(), THETA, X0, **options)


@pytest.mark.parametrize("solver", [sartor.SQP, sartor.BoxDDP])
@pytest.mark.parametrize("options", [dict(tol=0.0), dict(max_steps=0), dict(curvature="newton")])
def test_options_of_solvers_are_checked(solver, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        solver(**options)


@pytest.mark.parametrize("options", [dict(tau=-1.0), dict(max_inner_steps=0)])
def test_options_of_sqp_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sartor.SQP(**options)


@pytest.mark.parametrize("name, rows", [("constraints", rows), ("terminal_constraints", terminal_row)])
def test_box_ddp_refuses_constraints_and_names_the_alternative(name, rows):
    with pytest.raises(ValueError, match=rf"SQP\(\).*{name}"):
        sartor.solve(problem(**{name: rows}), THETA, X0, solver=sartor.BoxDDP())


def test_bounds_crossed_after_construction_are_found_by_solve():
    crossed = eqx.tree_at(lambda p: p.u_min, problem(), jnp.asarray([3.0]))
    with pytest.raises(ValueError, match="u_min"):
        sartor.solve(crossed, THETA, X0)


def test_shapes_of_traced_input_are_checked_too():
    with pytest.raises(ValueError, match="x0"):
        jax.eval_shape(lambda x0: sartor.solve(problem(), THETA, x0), jnp.zeros((2, NX)))


LQ = sartor.LQ(
    A=jnp.zeros((N, NX, NX)), B=jnp.zeros((N, NX, NU)), c=jnp.zeros((N, NX)), Q=jnp.zeros((N + 1, NX, NX)),
    R=jnp.zeros((N, NU, NU)), S=jnp.zeros((N, NU, NX)), q=jnp.zeros((N + 1, NX)), r=jnp.zeros((N, NU)),
)  # fmt: skip


@pytest.mark.parametrize(
    "name, shape",
    [
        ("B", (NX, NU)),
        ("A", (N, NX, NX + 1)),
        ("Q", (N, NX, NX)),
        ("S", (N, NU, NX + 1)),
        ("q", (N, NX)),
        ("r", (N + 1, NU)),
    ],
)
def test_lqr_names_the_wrong_matrix(name, shape):
    with pytest.raises(ValueError, match=f"lq.{name}"):
        sartor.lqr(LQ._replace(**{name: jnp.zeros(shape)}), X0)


def test_lqr_names_the_wrong_state():
    with pytest.raises(ValueError, match="x0"):
        sartor.lqr(LQ, jnp.zeros(NX + 1))


@pytest.mark.parametrize(
    "name, options",
    [
        ("method", dict(method="solve")),
        ("perturb", dict(perturb="both")),
        ("eps", dict(eps=jnp.ones(2))),
        ("combine", dict(combine="sum")),
        ("error", dict(error="prediction")),
    ],
)
def test_options_of_label_are_checked(name, options):
    with pytest.raises(ValueError, match=name):
        sartor.label(problem(), THETA, X0, **options)
