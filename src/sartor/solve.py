"""`solve`: checks its input, runs a solver, attaches the derivative rule."""

import functools as ft
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from sartor import kkt, solution
from sartor.kkt import Point
from sartor.problem import Problem, Theta, cast, check_bounds, penalties, rollout, total_cost
from sartor.sensitivity import Curvature, linearise, reason, sanitised, solution_tangent
from sartor.solution import RESULTS, Rows, Solution, SolveError
from sartor.solvers.base import AbstractSolver, loop, queue
from sartor.solvers.sqp import SQP


def solve(
    problem: Problem,
    theta: Theta,
    x0: Float[Array, " nx"],
    *,
    solver: AbstractSolver | None = None,
    guess: Solution | None = None,
    derivative: Literal["implicit", "unroll"] = "implicit",
    curvature: Curvature = "exact",
    throw: bool = True,
) -> Solution:
    """Solve the optimal control problem (D1) for one initial state; batch it with `jax.vmap`.

        min   Σ_{k<N} ℓ(x_k, u_k, k, θ) + ℓ_N(x_N, θ)
        s.t.  x_0 = x0,   x_{k+1} = f(x_k, u_k, k, θ),   u_min ≤ u_k ≤ u_max,   h ≤ 0,   h_N ≤ 0

    Args:
        problem: The problem.
        theta: Parameters of its functions, any pytree.
        x0: Initial state, (nx,); its precision (float64, float32) is that of the solve.
        solver: `SQP()` (the default) for every problem, `BoxDDP()` for those with control bounds alone.
        guess: Where to start: an earlier solution, `shift(sol)`, or `guess(xs, us)`. Without one: the controls
            nearest to zero within the bounds, and their rollout if that stays finite.
        derivative: "implicit" differentiates the KKT conditions at the solution, from one factorisation. "unroll"
            differentiates through exactly `solver.max_steps` steps: the alternative where no solution is reached
            (Amos et al., 2018, section 4.3); its cost grows with the steps.
        curvature: "exact", or "gauss_newton" for the approximate derivative without second derivatives of dynamics and
            constraints (Amos et al., 2018, Module 2). It does not change the solution.
        throw: Raise if the solve fails. Inside `jit` and `vmap` nothing is raised: look at `result`.

    Returns:
        The solution, with a status for each sample in `result`.

    Gradients: of every floating-point field of the solution, in theta, x0, u_min, u_max and the softening, in forward
        and reverse mode, also under `jit` and `vmap`; none in `guess`. Where the solve failed or the KKT matrix is
        singular they are NaN, never zero, and the `result` of a differentiated solve says `singular`; a cotangent of
        exactly zero stays zero, so that failed samples can be masked out of a loss by `jnp.where`.
    Fails: `ValueError` for input that is wrong before any compiling, `SolveError` for a failed solve if `throw`.
    References: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, section 4.
    """
    solver = SQP() if solver is None else solver
    if not isinstance(problem, Problem):
        raise ValueError(f"problem must be a sartor.Problem, not {type(problem).__name__}.")
    x0 = _checked_state(x0)
    _check_theta(theta)
    # A Python float would be a constant of the compiled code, which every new value compiles anew.
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, theta)
    check_bounds(problem.u_min, problem.u_max)
    _check_options(problem, solver, derivative, curvature)
    _check_functions(problem, theta, x0)
    if guess is not None:
        _check_guess(problem, theta, x0, guess)
    sol = _solve(problem, theta, x0, guess, solver, derivative, curvature)
    if throw and not isinstance(sol.result._value, Tracer) and not bool(sol.successful):
        raise SolveError(_explain(problem, theta, sol))
    return sol


def starting_point(problem: Problem, theta: Theta, x0: Float[Array, " nx"], guess: Solution | None = None) -> Solution:
    """Where `solve` begins: the guess within the bounds; without one, the controls nearest to zero and their rollout.

    Fails: `ValueError` as `solve`; a guess that is not finite, under `jit`, stays so.
    """
    x0 = _checked_state(x0)
    if guess is not None:
        _check_guess(problem, theta, x0, guess)
    return _start(cast(problem, x0.dtype), theta, x0, guess)


def violations(problem: Problem, theta: Theta, sol: Solution) -> Rows:
    """max(h, 0) of every inequality along a solution: which rows are violated, and by how much.

    Args:
        problem: The problem.
        theta: Its parameters.
        sol: A solution, in particular one that is `infeasible`.

    Returns: zero for rows that hold, in the units of each row for those that do not.
    """
    return jax.tree.map(lambda row: jnp.maximum(row, 0.0), kkt.rows(problem, theta, sol.xs, sol.us))


@eqx.filter_jit
def _solve(problem, theta, x0, guess, solver, derivative, curvature) -> Solution:
    problem = cast(problem, x0.dtype)
    start = _start(problem, theta, x0, guess)
    if derivative == "unroll":
        return _iterate(problem, theta, x0, start, solver, unroll=True)
    return _implicit(problem, theta, x0, start, solver=solver, curvature=curvature)


def _iterate(problem, theta, x0, start, solver, unroll: bool) -> Solution:
    arrays, rest = eqx.partition((problem, theta, x0, start), eqx.is_array)

    def init(arrays):
        problem, theta, x0, start = eqx.combine(arrays, rest)
        return solver.init(problem, theta, x0, start, unroll)

    def step(arrays, state):
        problem, theta, x0, _ = eqx.combine(arrays, rest)
        return solver.step(problem, theta, x0, state, unroll)

    def finish(arrays, state):
        problem, theta, x0, _ = eqx.combine(arrays, rest)
        return solver.finish(problem, theta, x0, state)

    def run(arrays):
        state = loop(ft.partial(step, arrays), solver.running, init(arrays), solver.max_steps, unroll)
        return finish(arrays, state)

    if unroll:
        return run(arrays)
    run = jax.custom_batching.custom_vmap(run)

    @run.def_vmap
    def _(num_samples, batched, arrays):
        axes = (jax.tree.map(lambda yes: 0 if yes else None, batched[0]),)
        begin = jax.vmap(init, axes)(arrays)
        state = queue(step, solver.running, arrays, axes, begin, num_samples, solver.max_steps)
        sol = jax.vmap(finish, (*axes, 0))(arrays, state)
        return sol, jax.tree.map(lambda _: True, sol)

    return run(arrays)


@eqx.filter_custom_jvp
def _implicit(problem, theta, x0, start, *, solver, curvature) -> Solution:
    del curvature
    return _iterate(problem, theta, x0, start, solver, unroll=False)


@_implicit.def_jvp
def _implicit_jvp(primals, tangents, *, solver, curvature):
    problem, theta, x0, start = primals
    # A failed sample is differentiated at finite values: NaN times a zero cotangent would still be NaN.
    whole = _implicit(problem, theta, x0, start, solver=solver, curvature=curvature)
    sol, x0 = sanitised(whole), jnp.where(jnp.isfinite(x0), x0, 0.0)
    lin = linearise(problem, theta, sol, curvature)
    point = Point(sol.us, sol.xs, sol.lams, sol.mus, sol.slacks)
    inputs, tangents = (problem, theta, x0), tangents[:3]
    r = _tangent(lambda problem, theta, x0: kkt.residual(problem, theta, x0, point, sol.tau), inputs, tangents)
    z = solution_tangent(lin, r)
    cost = _tangent(
        lambda problem, theta, xs, us: total_cost(problem, theta, xs, us),
        (problem, theta, sol.xs, sol.us),
        (*tangents[:2], z.xs, z.us),
    )
    out = eqx.tree_at(lambda s: s.result, whole, reason(sol, lin))
    nothing = jax.tree.map(lambda _: None, out)
    fields = lambda s: (s.us, s.xs, s.lams, s.mus, s.slacks, s.cost)
    return out, eqx.tree_at(fields, nothing, (*z, cost), is_leaf=lambda leaf: leaf is None)


def _tangent(fn, primals: tuple, tangents: tuple) -> Any:
    """jvp of `fn` where tangents may be None (zero) and primals hold leaves that are no arrays."""
    perturbed = jax.tree.map(lambda t: t is not None, tangents, is_leaf=lambda t: t is None)
    moving = eqx.filter(primals, perturbed)
    still = eqx.filter(primals, perturbed, inverse=True)
    t_moving = jax.tree.map(lambda p, t: t, moving, eqx.filter(tangents, perturbed))
    return jax.jvp(lambda moving: fn(*eqx.combine(moving, still)), (moving,), (t_moving,))[1]


def _start(problem: Problem, theta: Theta, x0: Array, guess: Solution | None) -> Solution:
    """The guess with zeros for unknown multipliers; or the rollout of the controls nearest to zero."""
    if guess is None:
        us = jnp.clip(jnp.zeros((problem.horizon, problem.nu), x0.dtype), *problem.bounds)
        xs = rollout(problem, theta, x0, us)
        usable = jnp.all(jnp.isfinite(xs)) & (jnp.max(jnp.abs(xs)) < 1e4 * (1.0 + jnp.max(jnp.abs(x0))))
        start = solution.guess(jnp.where(usable, xs, x0), us)
    else:
        start = eqx.tree_at(lambda g: g.us, guess, jnp.clip(guess.us, problem.u_min, problem.u_max))
    shapes = jax.eval_shape(lambda: kkt.rows(problem, theta, start.xs, start.us))
    fill = lambda value, like: (
        value.astype(like.dtype) if value.shape == like.shape else jnp.zeros(like.shape, like.dtype)
    )
    return eqx.tree_at(
        lambda g: (g.mus, g.slacks), start,
        (jax.tree.map(fill, start.mus, shapes), jax.tree.map(fill, start.slacks, shapes)),
    )  # fmt: skip


def _checked_state(x0: Any) -> Array:
    x0 = jnp.asarray(x0)
    if jnp.issubdtype(x0.dtype, jnp.complexfloating):
        raise ValueError("x0 must be real.")
    if not jnp.issubdtype(x0.dtype, jnp.inexact):
        x0 = x0.astype(jnp.result_type(float))
    if x0.ndim != 1 or x0.shape[0] == 0:
        raise ValueError(f"x0 must have shape (nx,), not {x0.shape}; for a batch use jax.vmap.")
    _check_finite("x0", x0)
    return x0


def _check_theta(theta: Theta) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        if isinstance(leaf, float) or eqx.is_inexact_array(leaf):
            _check_finite("theta" + jax.tree_util.keystr(path), leaf)


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, Tracer):
        return
    value = np.asarray(value)
    bad = np.argwhere(~np.isfinite(value))
    if len(bad):
        where = f"{name}{list(map(int, bad[0]))}" if value.ndim else name
        raise ValueError(f"{where} is {value[tuple(bad[0])]}: {name} has to be finite.")


def _check_options(problem: Problem, solver: AbstractSolver, derivative: str, curvature: str) -> None:
    if not isinstance(solver, AbstractSolver):
        raise ValueError(f"solver must be a solver such as sartor.SQP(), not {solver!r}.")
    if derivative not in ("implicit", "unroll"):
        raise ValueError(f"derivative must be 'implicit' or 'unroll', not {derivative!r}.")
    if curvature not in ("exact", "gauss_newton"):
        raise ValueError(f"curvature must be 'exact' or 'gauss_newton', not {curvature!r}.")
    solver.check(problem)


def _check_functions(problem: Problem, theta: Theta, x0: Array) -> None:
    """Shapes and types of what the user's functions return, by abstract evaluation: nothing is compiled."""
    x, u = jax.ShapeDtypeStruct(x0.shape, x0.dtype), jax.ShapeDtypeStruct((problem.nu,), x0.dtype)
    k = jax.ShapeDtypeStruct((), jnp.asarray(0).dtype)
    evaluate = lambda fn, *args: eqx.filter_eval_shape(fn, *args, theta)
    like_state = f"shape {x0.shape} and dtype {x0.dtype}, those of x0"
    x_next = evaluate(problem.dynamics, x, u, k)
    if not _is(x_next, x0.shape, x0.dtype):
        raise ValueError(f"dynamics(x, u, k, theta) must return an array of {like_state}, not {_describe(x_next)}.")
    for name, value in (
        ("stage_cost(x, u, k, theta)", evaluate(problem.stage_cost, x, u, k)),
        ("terminal_cost(x, theta)", evaluate(problem.terminal_cost, x)),
    ):
        if not _is(value, (), x0.dtype):
            raise ValueError(f"{name} must return a scalar of dtype {x0.dtype}, not {_describe(value)}.")
    counts = []
    for name, value in (
        ("constraints(x, u, k, theta)", evaluate(problem.path_rows, x, u, k)),
        ("terminal_constraints(x, theta)", evaluate(problem.terminal_rows, x)),
    ):
        if not (hasattr(value, "shape") and _is(value, value.shape, x0.dtype) and len(value.shape) == 1):
            raise ValueError(f"{name} must return a vector of dtype {x0.dtype}, not {_describe(value)}.")
        counts.append(value.shape[0])
    try:
        jax.eval_shape(lambda: penalties(problem, counts[0], counts[1], x0.dtype))
    except ValueError:
        raise ValueError(
            f"softening must hold scalars or one entry for each of the {counts[0]} rows of constraints followed by the"
            f" {counts[1]} rows of terminal_constraints."
        ) from None


def _is(value: Any, shape: tuple, dtype: Any) -> bool:
    return hasattr(value, "shape") and value.shape == shape and value.dtype == dtype


def _describe(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"shape {value.shape} and dtype {value.dtype}"
    return f"a {type(value).__name__}"


def _check_guess(problem: Problem, theta: Theta, x0: Array, guess: Solution) -> None:
    if not isinstance(guess, Solution):
        raise ValueError(f"guess must be a solution or sartor.guess(xs, us), not {type(guess).__name__}.")
    states = (problem.horizon + 1, x0.shape[0])
    for name, expected in (("us", (problem.horizon, problem.nu)), ("xs", states), ("lams", states)):
        value = getattr(guess, name)
        if value.shape != expected or value.dtype != x0.dtype:
            raise ValueError(
                f"guess.{name} must have shape {expected} and dtype {x0.dtype}, not {_describe(value)}: "
                "us is (N, nu), xs and lams are (N+1, nx), with N the horizon."
            )
        _check_finite(f"guess.{name}", value)
    if any(isinstance(v, Tracer) for v in (guess.us, problem.u_min, problem.u_max)):
        return
    # In NumPy: with jax.numpy even known values become traced ones inside of `jit`.
    us, low, high = (np.asarray(value) for value in (guess.us, problem.u_min, problem.u_max))
    low, high = np.broadcast_to(low, us.shape), np.broadcast_to(high, us.shape)
    slack = 1e-6 * (1.0 + np.abs(us))
    outside = np.argwhere((us < low - slack) | (us > high + slack))
    if outside.size:
        k, i = map(int, outside[0])
        raise ValueError(
            f"guess.us[{k}, {i}] = {us[k, i]} is outside of the bounds [{low[k, i]}, {high[k, i]}]:"
            " clip the guess, or widen u_min and u_max."
        )


def _explain(problem: Problem, theta: Theta, sol: Solution) -> str:
    message = f"solve ended after {int(sol.stats.num_steps)} steps, KKT residual {float(sol.stats.kkt_norm):.1e}: "
    message += RESULTS[sol.result]
    if bool(sol.result == RESULTS.infeasible):
        rows = violations(problem, theta, sol)
        names = ("u_min", "u_max", "path", "terminal")
        worst = {name: np.argwhere(np.asarray(getattr(rows, name)) > 1e-6) for name in names}
        found = [f"{name}[{', '.join(map(str, index))}]" for name, many in worst.items() for index in many[:5]]
        message += " Violated rows: " + ", ".join(found) + "."
    return message
