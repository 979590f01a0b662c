"""The optimal control problem that an MPC solves, and the two functions that only evaluate it.

min   Σ_{k<N} ℓ(x_k, u_k, k, θ) + ℓ_N(x_N, θ)
s.t.  x_0 = x̂,   x_{k+1} = f(x_k, u_k, k, θ),   u_min ≤ u_k ≤ u_max,   h(x_k, u_k, k, θ) ≤ 0,   h_N(x_N, θ) ≤ 0     (D1)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

Theta = PyTree[Any]


class Softening(eqx.Module):
    """Penalty of soft constraint rows: a violation s = max(h, 0) costs `linear`·s + `quadratic`·s²/2.

    Each field is a scalar for all rows, or has one entry per row: the rows of h first, then those of h_N. A row is
    hard where either entry is inf. A linear part makes the penalty exact: the row holds as long as its multiplier
    stays below `linear`.
    """

    linear: Float[Array, "..."]
    """ℓ ≥ 0, shape () or (nh + nhN,), in cost units per unit of h."""
    quadratic: Float[Array, "..."]
    """c ≥ 0, shape () or (nh + nhN,), in cost units per squared unit of h."""

    def __init__(self, linear: Any = 0.0, quadratic: Any = 0.0):
        self.linear = _floating(linear)
        self.quadratic = _floating(quadratic)
        for name in ("linear", "quadratic"):
            value = getattr(self, name)
            if value.ndim > 1:
                raise ValueError(
                    f"Softening.{name} has shape {value.shape}: give a scalar, or one entry per row of h and h_N."
                )
            if _concrete(value) and (np.isnan(value).any() or (np.asarray(value) < 0).any()):
                raise ValueError(f"Softening.{name} has entries that are negative or NaN: penalties are ≥ 0.")
        if _concrete(self.linear) and _concrete(self.quadratic):
            without = (np.asarray(self.linear) == 0) & (np.asarray(self.quadratic) == 0)
            if without.any():
                raise ValueError("Softening has rows with linear = quadratic = 0, without a penalty: drop those rows.")


class Problem(eqx.Module):
    """An optimal control problem (D1), written for one sample; batch it with `jax.vmap`.

    What may be differentiated is an argument (`theta`, `x0`) or an array field (`u_min`, `u_max`, `softening`).
    The functions themselves must not capture traced arrays: pass those through `theta`.

    References: Amos et al., Differentiable MPC for End-to-end Planning and Control, 2018, eq. (10).
    """

    dynamics: Callable = eqx.field(static=True)
    """f(x, u, k, theta) -> x_next (nx,), with x (nx,), u (nu,) and the stage index k, an integer scalar."""
    stage_cost: Callable = eqx.field(static=True)
    """ℓ(x, u, k, theta) -> scalar."""
    terminal_cost: Callable = eqx.field(static=True)
    """ℓ_N(x, theta) -> scalar."""
    horizon: int = eqx.field(static=True)
    """N, the number of controls."""
    u_min: Float[Array, "*N nu"]
    """Lower bounds of the control, (nu,) for all stages or (N, nu); -inf where there is none."""
    u_max: Float[Array, "*N nu"]
    """Upper bounds of the control in the same shape; +inf where there is none."""
    constraints: Callable | None = eqx.field(static=True, default=None)
    """h(x, u, k, theta) -> (nh,), feasible where ≤ 0, for k = 0..N-1."""
    terminal_constraints: Callable | None = eqx.field(static=True, default=None)
    """h_N(x, theta) -> (nhN,), feasible where ≤ 0."""
    softening: Softening | None = None
    """Penalties of soft rows; None makes every row hard."""

    def __init__(
        self,
        *,
        dynamics: Callable,
        stage_cost: Callable,
        terminal_cost: Callable,
        horizon: int,
        u_min: Any,
        u_max: Any,
        constraints: Callable | None = None,
        terminal_constraints: Callable | None = None,
        softening: Softening | None = None,
    ):
        if isinstance(horizon, bool) or not isinstance(horizon, int | np.integer) or horizon < 1:
            raise ValueError(f"horizon must be an integer of at least 1 (the number of controls), not {horizon!r}.")
        self.dynamics = dynamics
        self.stage_cost = stage_cost
        self.terminal_cost = terminal_cost
        self.horizon = int(horizon)
        self.u_min = _floating(u_min)
        self.u_max = _floating(u_max)
        self.constraints = constraints
        self.terminal_constraints = terminal_constraints
        self.softening = softening

    def __check_init__(self):
        for name in ("dynamics", "stage_cost", "terminal_cost"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a function, not {type(getattr(self, name)).__name__}.")
        for name in ("constraints", "terminal_constraints"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a function or None, not {type(getattr(self, name)).__name__}.")
        shapes = [(self.nu,), (self.horizon, self.nu)] if self.u_min.ndim in (1, 2) else []
        if self.u_min.shape not in shapes or self.u_min.shape != self.u_max.shape or self.nu == 0:
            raise ValueError(
                f"u_min and u_max must have shape (nu,) or ({self.horizon}, nu), horizon first, with nu ≥ 1, not"
                f" {self.u_min.shape} and {self.u_max.shape}."
                " Use ±inf for a control without a bound."
            )
        if not (self.softening is None or isinstance(self.softening, Softening)):
            raise ValueError(f"softening must be a sartor.Softening or None, not {type(self.softening).__name__}.")
        check_bounds(self.u_min, self.u_max)

    @property
    def nu(self) -> int:
        """Number of controls."""
        return self.u_min.shape[-1]

    @property
    def bounds(self) -> tuple[Float[Array, "N nu"], Float[Array, "N nu"]]:
        """u_min and u_max of every stage."""
        shape = (self.horizon, self.nu)
        return jnp.broadcast_to(self.u_min, shape), jnp.broadcast_to(self.u_max, shape)

    def path_rows(self, x: Array, u: Array, k: Any, theta: Theta) -> Array:
        """h(x, u, k, θ), shape (nh,); empty without constraints."""
        if self.constraints is None:
            return jnp.zeros(0, x.dtype)
        return self.constraints(x, u, k, theta)

    def terminal_rows(self, x: Array, theta: Theta) -> Array:
        """h_N(x, θ), shape (nhN,); empty without terminal constraints."""
        if self.terminal_constraints is None:
            return jnp.zeros(0, x.dtype)
        return self.terminal_constraints(x, theta)


def rollout(
    problem: Problem, theta: Theta, x0: Float[Array, " nx"], us: Float[Array, "N nu"]
) -> Float[Array, "N_plus_1 nx"]:
    """States x_0 = x0, x_{k+1} = f(x_k, u_k, k, θ) that the model predicts for the controls.

    Args:
        problem: Its dynamics and horizon are used.
        theta: Parameters of the dynamics.
        x0: Initial state.
        us: Controls, not clipped to the bounds.

    Returns: xs, shape (N+1, nx); not finite where the dynamics are not.
    Gradients: through the scan, in every argument; both modes.
    """

    def advance(x, stage):
        u, k = stage
        x_next = problem.dynamics(x, u, k, theta)
        return x_next, x_next

    _, xs = jax.lax.scan(advance, x0, (us, jnp.arange(problem.horizon)))
    return jnp.concatenate([x0[None], xs])


def total_cost(
    problem: Problem, theta: Theta, xs: Float[Array, "N_plus_1 nx"], us: Float[Array, "N nu"]
) -> Float[Array, ""]:
    """J = Σ_{k<N} ℓ(x_k, u_k, k, θ) + ℓ_N(x_N, θ) + the penalties of the soft rows that are violated.

    Args:
        problem: The problem; its hard rows add nothing.
        theta: Parameters of its functions.
        xs: States, which need not follow the dynamics.
        us: Controls.

    Returns: the cost, a scalar.
    Gradients: ordinary, in every argument; both modes.
    """
    stages = jnp.arange(problem.horizon)
    costs = jax.vmap(lambda x, u, k: problem.stage_cost(x, u, k, theta))(xs[:-1], us, stages)
    cost = jnp.sum(costs) + problem.terminal_cost(xs[-1], theta)
    if problem.softening is None:
        return cost
    path = jax.vmap(lambda x, u, k: problem.path_rows(x, u, k, theta))(xs[:-1], us, stages)
    terminal = problem.terminal_rows(xs[-1], theta)
    linear, quadratic = penalties(problem, path.shape[1], terminal.shape[0], xs.dtype)
    rows = jnp.concatenate([path.ravel(), terminal])
    return cost + jnp.sum(penalty(rows, linear, quadratic))


def penalty(rows: Array, linear: Array, quadratic: Array) -> Array:
    """linear·s + quadratic·s²/2 with s = max(h, 0); zero for hard rows (an infinite entry)."""
    soft = jnp.isfinite(linear) & jnp.isfinite(quadratic)
    s = jnp.maximum(rows, 0.0)
    return jnp.where(soft, jnp.where(soft, linear, 0.0) * s + 0.5 * jnp.where(soft, quadratic, 0.0) * s**2, 0.0)


def row_penalties(problem: Problem, nh: int, nh_terminal: int, dtype: Any) -> tuple[Array, Array]:
    """Linear and quadratic penalty of every row of h and then of h_N, each (nh + nhN,); inf for hard rows."""
    if problem.softening is None:
        hard = jnp.full(nh + nh_terminal, jnp.inf, dtype)
        return hard, hard
    for name in ("linear", "quadratic"):
        shape = getattr(problem.softening, name).shape
        if shape not in ((), (nh + nh_terminal,)):
            raise ValueError(f"softening.{name} has shape {shape}.")
    linear, quadratic = (
        jnp.broadcast_to(value, (nh + nh_terminal,)).astype(dtype)
        for value in (problem.softening.linear, problem.softening.quadratic)
    )
    hard = jnp.isinf(linear) | jnp.isinf(quadratic)
    return jnp.where(hard, jnp.inf, linear), jnp.where(hard, jnp.inf, quadratic)


def penalties(problem: Problem, nh: int, nh_terminal: int, dtype: Any) -> tuple[Array, Array]:
    """The same over the horizon, each (N·nh + nhN,)."""
    spread = lambda value: jnp.concatenate([jnp.tile(value[:nh], problem.horizon), value[nh:]])
    linear, quadratic = row_penalties(problem, nh, nh_terminal, dtype)
    return spread(linear), spread(quadratic)


def check_bounds(u_min: Array, u_max: Array) -> None:
    """Raise if concrete bounds are NaN or crossed; traced bounds pass (a crossed one ends as a status)."""
    if not (_concrete(u_min) and _concrete(u_max)):
        return
    low, high = np.asarray(u_min), np.asarray(u_max)
    if np.isnan(low).any() or np.isnan(high).any():
        raise ValueError("u_min or u_max is NaN: use -inf and +inf for a control without a bound.")
    crossed = np.argwhere(low >= high)
    if crossed.size:
        i = tuple(crossed[0])
        where = ", ".join(map(str, i))
        raise ValueError(
            f"u_min must be below u_max, but u_min[{where}] = {low[i]} and u_max[{where}] = {high[i]}."
            " To fix a control, put its value into theta and drop it from u."
        )


def crossed(problem: Problem) -> Bool[Array, ""]:
    """Whether some lower bound is not below its upper one: what `check_bounds` cannot see of traced bounds."""
    return jnp.any(problem.u_min >= problem.u_max)


def cast(problem: Problem, dtype: Any) -> Problem:
    """The problem with its bounds in the precision of a solve."""
    bounds = (problem.u_min.astype(dtype), problem.u_max.astype(dtype))
    return eqx.tree_at(lambda p: (p.u_min, p.u_max), problem, bounds)


def _concrete(value: Any) -> bool:
    return not isinstance(value, Tracer) and isinstance(value, jax.Array | np.ndarray)


def _floating(value: Any) -> Array:
    """As a floating-point array of JAX's current precision; abstract leaves (transformations rebuild modules) pass."""
    if isinstance(value, Tracer) or (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)):
        return jnp.asarray(value)
    return jnp.asarray(value, dtype=jnp.result_type(float))
