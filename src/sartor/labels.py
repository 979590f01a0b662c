"""Labels: how much an error of the predicted state matters to the task, from the sensitivities of the MPC.

    S_{k,i} = |Σ_j |dJ/du_0[j]|_eff · du_0[j]/de_k[i]|                                                        (D9)

and, to second order and without a free parameter, the regret of an error e, with Λ = d²J/du_0²:

    ΔJ ≈ ½ eᵀ (du_0/de)ᵀ Λ (du_0/de) e = ½ ‖Λ^{1/2} (du_0/de) e‖²                                            (D10)

References: Węgrzynowski et al., Learning What Matters: Task Tailored Dynamics Models through Differentiable MPC,
equations (3) to (6).
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from sartor import kkt
from sartor.problem import Problem, Theta, penalty, row_penalties
from sartor.sensitivity import (
    Curvature,
    Linearisation,
    action_hessian,
    first_control_adjoint,
    linearise,
    reason,
    refuse,
    trajectory_error,
)
from sartor.solution import RESULTS, Rows, Solution, guess
from sartor.solve import solve
from sartor.solvers.base import AbstractSolver

Method = Literal["curvature", "resolve"]
Together = Literal["one_by_one", "together"]


class Label(eqx.Module):
    """The label of one sample."""

    S: Float[Array, "N nx"]
    """Weight of an error of state i at stage k + 1, in cost units per unit of the state; NaN if refused."""
    du0_de: Float[Array, "nu N nx"]
    """Sensitivity of the first control to the errors."""
    du0_dx0: Float[Array, "nu nx"]
    """Sensitivity of the first control to the measured state."""
    dJ_du0: Float[Array, " nu"]
    """Effective sensitivity of the cost to the first control."""
    Lambda: Float[Array, "nu nu"]
    """Hessian of the cost in the first control, the others optimised; its bounds do not count."""
    A: Float[Array, "N nx nx"]
    """Derivatives of the model along the plan, in the state."""
    B: Float[Array, "N nx nu"]
    """In the control."""
    result: RESULTS
    """`successful`, or why there is no label."""


def action_gradient(
    problem: Problem,
    theta: Theta,
    x0: Float[Array, " nx"],
    u0: Float[Array, " nu"],
    *,
    sol: Solution | None = None,
    solver: AbstractSolver | None = None,
) -> tuple[Float[Array, " nu"], RESULTS]:
    """dJ/du_0 of the optimal cost when the first control is fixed to u_0 and all others are optimised.

    Args:
        problem: The problem; the bounds and the hard rows of stage 0 do not apply to the fixed control.
        theta: Its parameters.
        x0: Initial state.
        u0: The first control.
        sol: A solution to start from.
        solver: The solver of the remaining stages.

    Returns: the gradient, in cost units per unit of the control, and the status of the solve; NaN if that failed.
    References: Węgrzynowski et al., section III-A, the slopes that eq. (6) averages.
    """
    x1 = problem.dynamics(x0, u0, jnp.asarray(0), theta)
    lam, result = _tail_costate(problem, theta, x1, sol, solver)

    k = jnp.asarray(0)

    def first_stage(u):
        h = problem.path_rows(x0, u, k, theta)
        linear, quadratic = _split_penalties(problem, theta, x0, h)[0]
        soft = jnp.sum(penalty(h, linear, quadratic))
        return problem.stage_cost(x0, u, k, theta) + soft + problem.dynamics(x0, u, k, theta) @ lam

    gradient = jax.grad(first_stage)(u0)
    return jnp.where(result == RESULTS.successful, gradient, jnp.nan), result


def action_sensitivity(
    problem: Problem,
    theta: Theta,
    x0: Float[Array, " nx"],
    sol: Solution,
    *,
    eps: Any = 0.1,
    method: Method = "curvature",
    perturb: Together = "one_by_one",
    solver: AbstractSolver | None = None,
) -> Float[Array, " nu"]:
    """The effective |dJ/du_0| of a solution: the mean magnitude of the slopes at u_0 ± ε.

    At a control that lies on a bound it is the multiplier of that bound. Elsewhere the slopes at a distance ε count:

        |dJ/du_0[j]|_eff = ½ Σ_± |∂J/∂u_0[j] (u_0 ± ε)|  =  ½ Σ_± |g_j ± Λ_jj ε_j| + O(ε²)

    with g the slope at u_0 itself: zero but for the multipliers of active rows of stage 0, as those do not apply to a
    control that is fixed.

    Args:
        problem: The problem.
        theta: Its parameters.
        x0: Initial state.
        sol: Its solution.
        eps: Size of the perturbation in units of the control, a scalar or one for each control.
        method: "resolve" solves the problem with u_0 fixed on either side, as the paper does. "curvature" takes the
            Riccati matrix Λ of stage 0 at the solution: no solve, the same up to O(ε²).
        perturb: "one_by_one" moves each control by itself; "together" moves all by +ε, then all by -ε.
        solver: For "resolve".

    Returns: (nu,), cost units per unit of the control; NaN where a solve failed or no derivative exists.
    Fails: raises `SolveError` outside of transformations where the solution has no derivative.
    References: Węgrzynowski et al., eq. (6).
    """
    check_options(problem, eps=eps, method=method, perturb=perturb)
    eps = jnp.asarray(eps, sol.us.dtype)
    effective, status = _effective(problem, theta, x0, sol, eps, method, perturb, solver)
    refuse(status)
    return effective


def label(
    problem: Problem,
    theta: Theta,
    x0: Float[Array, " nx"],
    *,
    solver: AbstractSolver | None = None,
    guess: Solution | None = None,
    eps: Any = 0.1,
    method: Method = "curvature",
    perturb: Together = "one_by_one",
    combine: Literal["signed", "absolute", "regret"] = "signed",
    error: Literal["defect", "trajectory"] = "defect",
    curvature: Curvature = "exact",
) -> Label:
    """Solve, and label the sample with the weight S of every predicted state's error (D9).

    Args:
        problem: The control problem.
        theta: Its parameters, the model included.
        x0: Measured state.
        solver: Defaults to `SQP()`. Labels need a converged solution.
        guess: Where the solve starts.
        eps: See `action_sensitivity`.
        method: See `action_sensitivity`.
        perturb: See `action_sensitivity`.
        combine: How controls are combined: "signed" |Σ_j g_j du_0[j]/de|, the literal eq. (5); "absolute"
            Σ_j g_j |du_0[j]/de|; "regret" √diag((du_0/de)ᵀΛ(du_0/de)), the cost of an error to second order (D10).
        error: "defect": x_{k+1} = f(x_k, u_k) + e_{k+1}, the error propagates. "trajectory": the prediction of stage k
            alone is off by e_k.
        curvature: See `linearise`: "gauss_newton" is cheaper, and an approximation.

    Returns: the label, with a status.
    Fails: `ValueError` for wrong input, as `solve`; a failed solve is a status, and its label NaN.
    References: Węgrzynowski et al., eqs. (4) to (6).
    """
    check_options(problem, eps=eps, method=method, perturb=perturb, combine=combine, error=error)
    sol = solve(problem, theta, x0, solver=solver, guess=guess, throw=False)
    return label_solution(
        problem, theta, sol, solver=solver, eps=eps, method=method, perturb=perturb, combine=combine, error=error,
        curvature=curvature,
    )  # fmt: skip


def label_solution(
    problem: Problem,
    theta: Theta,
    sol: Solution,
    *,
    solver: AbstractSolver | None = None,
    eps: Any = 0.1,
    method: Method = "curvature",
    perturb: Together = "one_by_one",
    combine: Literal["signed", "absolute", "regret"] = "signed",
    error: Literal["defect", "trajectory"] = "defect",
    curvature: Curvature = "exact",
) -> Label:
    """The label of a sample whose solution is at hand; arguments, result and errors as of `label`."""
    check_options(problem, eps=eps, method=method, perturb=perturb, combine=combine, error=error)
    eps = jnp.asarray(eps, sol.us.dtype)  # an array: as a number it would be compiled in
    return _label(problem, theta, sol, eps, method, perturb, combine, error, curvature, solver)


def regret_factor(
    problem: Problem, theta: Theta, sol: Solution, error: Literal["defect", "trajectory"] = "defect"
) -> Float[Array, "nu N nx"]:
    """Λ^{1/2} du_0/de: half of the square of its product with an error is the regret (D10) of that error.

    Args:
        problem: The problem.
        theta: Its parameters.
        sol: Its solution.
        error: See `label`.

    Returns: (nu, N, nx), in √cost per unit of the state.
    Fails: `ValueError` for an unknown `error`; else as `error_sensitivity`.
    """
    if error not in ("defect", "trajectory"):
        raise ValueError(f"error must be 'defect' or 'trajectory', not {error!r}.")
    factor, status = _regret_factor(problem, theta, sol, error)
    refuse(status)
    return factor


@eqx.filter_jit
def _label(problem, theta, sol, eps, method, perturb, combine, error, curvature, solver) -> Label:
    lin = linearise(problem, theta, sol, curvature)
    adjoint = -first_control_adjoint(lin).lams
    du0_dx0, du0_de = adjoint[:, 0], adjoint[:, 1:]
    if error == "trajectory":
        du0_de = trajectory_error(lin.lq.A, du0_de)
    Lambda = action_hessian(problem, lin, sol)
    dJ_du0, resolved = _action_sensitivity(problem, theta, sol.xs[0], sol, lin, eps, method, perturb, solver)
    if combine == "signed":
        S = jnp.abs(jnp.einsum("j,jkx->kx", dJ_du0, du0_de))
    elif combine == "absolute":
        S = jnp.einsum("j,jkx->kx", dJ_du0, jnp.abs(du0_de))
    else:
        S = jnp.sqrt(jnp.maximum(jnp.einsum("ikx,ij,jkx->kx", du0_de, Lambda, du0_de), 0.0))
    status = reason(sol, lin)
    result = RESULTS.where(status == RESULTS.successful, resolved, status)
    S = jnp.where(result == RESULTS.successful, S, jnp.nan)
    return Label(S, du0_de, du0_dx0, dJ_du0, Lambda, lin.lq.A, lin.lq.B, result)


@eqx.filter_jit
def _regret_factor(problem, theta, sol, error) -> tuple[Array, RESULTS]:
    lin = linearise(problem, theta, sol)
    du0_de = -first_control_adjoint(lin).lams[:, 1:]
    if error == "trajectory":
        du0_de = trajectory_error(lin.lq.A, du0_de)
    values, vectors = jnp.linalg.eigh(action_hessian(problem, lin, sol))
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))) @ vectors.T
    return jnp.einsum("ij,jkx->ikx", root, du0_de), reason(sol, lin)


@eqx.filter_jit
def _effective(problem, theta, x0, sol, eps, method, perturb, solver) -> tuple[Array, RESULTS]:
    lin = linearise(problem, theta, sol)
    effective, resolved = _action_sensitivity(problem, theta, x0, sol, lin, eps, method, perturb, solver)
    status = reason(sol, lin)
    return effective, RESULTS.where(status == RESULTS.successful, resolved, status)


def _action_sensitivity(
    problem: Problem, theta: Theta, x0: Array, sol: Solution, lin: Linearisation, eps: Any, method: Method,
    perturb: Together, solver: AbstractSolver | None,
) -> tuple[Array, RESULTS]:  # fmt: skip
    eps = jnp.broadcast_to(jnp.asarray(eps, x0.dtype), (problem.nu,))
    steps = jnp.diag(eps) if perturb == "one_by_one" else eps[None]
    result = RESULTS.successful
    if method == "curvature":
        slopes = _slopes(problem, sol, lin, steps)
    else:
        u0s = sol.us[0] + jnp.stack([steps, -steps])
        resolve = lambda u0: action_gradient(problem, theta, x0, u0, sol=sol, solver=solver)
        # One after the other: in a batch of samples each then takes as many steps as it needs, and fits the caches.
        gradients, results = jax.lax.map(lambda both: jax.lax.map(resolve, both), u0s)
        slopes = jnp.mean(jnp.abs(gradients), axis=0)
        failed = jnp.any(results != RESULTS.successful)
        result = RESULTS.where(failed, RESULTS.not_converged, result)
    slope = jnp.diagonal(slopes) if perturb == "one_by_one" else slopes[0]
    multiplier = sol.mus.u_min[0] + sol.mus.u_max[0]
    at_bound = lin.active.u_min[0] | lin.active.u_max[0]
    effective = jnp.where(at_bound & (sol.tau == 0), multiplier, slope)
    return jnp.where(lin.regular, effective, jnp.nan), result


def _slopes(problem: Problem, sol: Solution, lin: Linearisation, steps: Array) -> Array:
    """½ Σ_± |∂J/∂u_0| at u_0 ± each step, by the slope and the Hessian at u_0, without the hard rows of stage 0."""
    G, mus = lin.jacobian.u[0], sol.mus
    linear, quadratic = (term.path[0] for term in kkt.soft_terms(problem, mus))
    soft = jnp.isfinite(linear)
    kink = soft & lin.active.path[0] & (lin.compliance.path[0] == 0)  # held there: one slope on either side
    slope = mus.u_min[0] - mus.u_max[0] - G.T @ jnp.where(kink | ~soft, mus.path[0], 0.0)
    Lambda = action_hessian(problem, lin, sol)

    def gradient(step):
        ahead = G @ step
        penalty = jnp.where(kink, linear, 0.0) + jnp.where(kink, quadratic, 0.0) * ahead
        return slope + Lambda @ step + G.T @ jnp.where(ahead > 0, penalty, 0.0)

    return jax.vmap(lambda step: 0.5 * (jnp.abs(gradient(step)) + jnp.abs(gradient(-step))))(steps)


def _tail_costate(
    problem: Problem, theta: Theta, x1: Array, sol: Solution | None, solver: AbstractSolver | None
) -> tuple[Array, RESULTS]:
    """dJ/dx_1 of the remaining stages, by solving them."""
    if problem.horizon == 1:
        final = lambda x: problem.terminal_cost(x, theta) + _terminal_penalty(problem, theta, x)
        return jax.grad(final)(x1), RESULTS.successful
    start = None if sol is None else guess(sol.xs[1:], sol.us[1:])
    if sol is not None and start is not None:
        later = lambda rows: Rows(rows.u_min[1:], rows.u_max[1:], rows.path[1:], rows.terminal)
        known = (sol.lams[1:], later(sol.mus), later(sol.slacks))
        start = eqx.tree_at(lambda g: (g.lams, g.mus, g.slacks), start, known)
    tail = solve(_tail(problem), theta, x1, solver=solver, guess=start, throw=False)
    return tail.lams[0], tail.result


def _tail(problem: Problem) -> Problem:
    """The problem without its first stage."""
    later = lambda fn: None if fn is None else _Later(fn)
    u_min, u_max = (bound if bound.ndim == 1 else bound[1:] for bound in (problem.u_min, problem.u_max))
    return Problem(
        dynamics=_Later(problem.dynamics), stage_cost=_Later(problem.stage_cost), terminal_cost=problem.terminal_cost,
        horizon=problem.horizon - 1, u_min=u_min, u_max=u_max,
        constraints=later(problem.constraints), terminal_constraints=problem.terminal_constraints,
        softening=problem.softening,
    )  # fmt: skip


class _Later(eqx.Module):
    """f(x, u, k + 1, θ). A module rather than a lambda: equal for equal functions, so that compiled code is reused."""

    fn: Any = eqx.field(static=True)

    def __call__(self, x, u, k, theta):
        return self.fn(x, u, k + 1, theta)

    @property
    def expand_step(self):
        """That of `fn`, if it has one."""
        inner = self.fn.expand_step
        return lambda x, u, k, theta, lam: inner(x, u, k + 1, theta, lam)


def _terminal_penalty(problem: Problem, theta: Theta, x: Array) -> Array:
    h = problem.terminal_rows(x, theta)
    path = jax.eval_shape(lambda: problem.path_rows(x, problem.bounds[0][0], jnp.asarray(0), theta))
    linear, quadratic = _split_penalties(problem, theta, x, path)[1]
    return jnp.sum(penalty(h, linear, quadratic))


def _split_penalties(problem: Problem, theta: Theta, x: Array, path: Any) -> tuple[tuple, tuple]:
    """(linear, quadratic) of the path rows, and of the terminal rows."""
    nh, nh_terminal = path.shape[0], jax.eval_shape(lambda: problem.terminal_rows(x, theta)).shape[0]
    both = row_penalties(problem, nh, nh_terminal, x.dtype)
    return tuple(value[:nh] for value in both), tuple(value[nh:] for value in both)


def check_options(
    problem: Problem, *, eps: Any = 0.1, method: str = "curvature", perturb: str = "one_by_one",
    combine: str = "signed", error: str = "defect", curvature: str = "exact",
) -> None:  # fmt: skip
    """Raise a `ValueError` for values that the options of `label` do not have."""
    del curvature  # `linearise` says what is wrong with it
    if combine not in ("signed", "absolute", "regret"):
        raise ValueError(f"combine must be 'signed', 'absolute' or 'regret', not {combine!r}.")
    if error not in ("defect", "trajectory"):
        raise ValueError(f"error must be 'defect' or 'trajectory', not {error!r}.")
    if method not in ("curvature", "resolve"):
        raise ValueError(f"method must be 'curvature' or 'resolve', not {method!r}.")
    if perturb not in ("one_by_one", "together"):
        raise ValueError(f"perturb must be 'one_by_one' or 'together', not {perturb!r}.")
    if not isinstance(eps, Tracer) and not np.all(np.isfinite(np.asarray(eps))):
        raise ValueError(f"eps must be finite, not {eps}.")
    if jnp.shape(eps) not in ((), (problem.nu,)):
        raise ValueError(f"eps must be a scalar or have shape ({problem.nu},), not {jnp.shape(eps)}.")
