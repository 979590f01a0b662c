"""What a solve returns: the trajectory, its multipliers, and a status that says what to do."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class RESULTS(eqx.Enumeration):
    """How a solve ended. Compare with `==`, also under `vmap`; `RESULTS[result]` is the message."""

    successful = ""
    not_converged = (
        "The solver took its last step before the KKT residual fell below its tolerance. Raise `max_steps`, start "
        "from a better `guess`, or scale the states, controls and costs to similar size."
    )
    infeasible = (
        "No trajectory near the last iterate satisfies the hard constraints: the rows with a positive entry in "
        "`violations(problem, theta, sol)` remain violated. Soften those rows, widen the bounds, or check x0."
    )
    non_finite = (
        "A cost, a constraint, the dynamics or one of their derivatives is NaN or infinite along the trajectory. "
        "Check x0, theta and the guess, and functions such as sqrt or norm where they are not differentiable."
    )
    singular = (
        "The KKT matrix at the solution is singular: the minimiser is not a strict one, active constraints depend on "
        "each other, or a constraint is at the edge of being active. The derivative does not exist there. Regularise "
        "the cost, remove redundant rows, or smooth with a barrier `tau > 0`."
    )


class Rows(eqx.Module):
    """One value for every inequality of a problem: its multiplier, its slack, its violation, or a mark."""

    u_min: Shaped[Array, "..."]
    """u_min - u_k ≤ 0, (N, nu)."""
    u_max: Shaped[Array, "..."]
    """u_k - u_max ≤ 0, (N, nu)."""
    path: Shaped[Array, "..."]
    """h(x_k, u_k, k, θ) ≤ 0, (N, nh)."""
    terminal: Shaped[Array, "..."]
    """h_N(x_N, θ) ≤ 0, (nhN,)."""


class Stats(eqx.Module):
    """What a person wants to know about a solve."""

    num_steps: Int[Array, ""]
    """Steps (solver iterations) taken."""
    num_inner_steps: Int[Array, ""]
    """Interior-point steps taken in all quadratic programs (`SQP`); 0 for `BoxDDP`."""
    kkt_norm: Float[Array, ""]
    """Largest entry of the KKT residual (`kkt.residual`), in absolute value."""


class Solution(eqx.Module):
    """A stationary point of (D1), with its multipliers. Also what `guess` is: `guess` and `shift` make one."""

    us: Float[Array, "N nu"]
    """Controls."""
    xs: Float[Array, "N_plus_1 nx"]
    """States, xs[0] = x0."""
    lams: Float[Array, "N_plus_1 nx"]
    """Costates λ: lams[0] belongs to x̂ - x_0 = 0 (so dJ/dx0 = lams[0]), lams[k+1] to f(x_k, u_k) - x_{k+1} = 0."""
    mus: Rows
    """Multipliers μ ≥ 0 of the inequalities."""
    slacks: Rows
    """Slacks t ≥ 0: t = -h for a hard row, t = max(h, 0) - h for a soft one; 1 for an infinite bound."""
    cost: Float[Array, ""]
    """Cost J, with the penalties of soft rows."""
    tau: Float[Array, ""]
    """Barrier μ·t = τ that the solution satisfies; 0 for the exact one."""
    result: RESULTS
    """Success, or the reason of failure."""
    stats: Stats
    """Counts and the residual reached."""

    @property
    def successful(self) -> Bool[Array, "..."]:
        """Whether the solve succeeded."""
        return self.result == RESULTS.successful


class SolveError(RuntimeError):
    """Raised by `solve(..., throw=True)` outside of `jit` when a solve fails."""


def guess(xs: Any, us: Any) -> Solution:
    """A starting point from a trajectory, multipliers unknown.

    Args:
        xs: States (N+1, nx). They need not follow the dynamics (the solvers start infeasible), but have to be finite.
        us: Controls (N, nu).

    Fails: `ValueError` for shapes that do not belong together.
    """
    us = jnp.asarray(us)
    us = us.astype(jnp.result_type(us, float))
    xs = jnp.asarray(xs, us.dtype)
    if us.ndim != 2 or xs.ndim != 2 or xs.shape[0] != us.shape[0] + 1:
        raise ValueError(f"guess needs us of shape (N, nu) and xs of shape (N+1, nx), not {us.shape} and {xs.shape}.")
    rows = Rows(jnp.zeros_like(us), jnp.zeros_like(us), jnp.zeros_like(us[:, :0]), jnp.zeros_like(us[0, :0]))
    zero = jnp.zeros((), us.dtype)
    stats = Stats(num_steps=jnp.asarray(0), num_inner_steps=jnp.asarray(0), kkt_norm=jnp.full_like(zero, jnp.inf))
    return Solution(us=us, xs=xs, lams=jnp.zeros_like(xs), mus=rows, slacks=rows, cost=zero, tau=zero,
                    result=RESULTS.not_converged, stats=stats)  # fmt: skip


def shift(sol: Solution) -> Solution:
    """The guess for the next control step: everything one stage earlier, the last stage repeated.

    x0 of the next solve replaces xs[0]; multipliers move along, so the next solve starts warm in primal and dual.

    Args:
        sol: One solution; for a batch `jax.vmap(shift)(sol)`.

    Fails: `ValueError` for a batch.
    """
    if sol.us.ndim != 2:
        raise ValueError(
            f"shift takes one solution, with us of shape (N, nu), not {sol.us.shape}: use jax.vmap(shift)."
        )

    def advance(leaf):
        return jnp.concatenate([leaf[1:], leaf[-1:]])

    def rows(value: Rows) -> Rows:
        return Rows(advance(value.u_min), advance(value.u_max), advance(value.path), value.terminal)

    return Solution(
        us=advance(sol.us), xs=advance(sol.xs), lams=advance(sol.lams), mus=rows(sol.mus), slacks=rows(sol.slacks),
        cost=sol.cost, tau=sol.tau, result=sol.result, stats=sol.stats,
    )  # fmt: skip
