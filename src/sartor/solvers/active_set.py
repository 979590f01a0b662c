"""Quadratic programs with bounds on the controls alone: a primal-dual active set method with Riccati inside.

Controls that are held at their bound leave the problem; what is left is (D3), solved by one factorisation. Then those
whose multiplier has the wrong sign are freed, those that have left their bounds are held, and so on until nothing
changes: that is the solution of the QP, to rounding. From a warm start this takes one or two rounds, where an
interior-point method takes five to ten. It may also cycle; then the caller does without.

References: Hintermüller, Ito and Kunisch, The Primal-Dual Active Set Strategy as a Semismooth Newton Method, 2003.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sartor.kkt import Expansion, with_bending
from sartor.riccati import Trajectory, backsolve, factor
from sartor.solution import Rows

_MAX_ROUNDS = 6


class ActiveSet(NamedTuple):
    """The carry of the rounds, and the solution in deviations from the trajectory of the expansion."""

    low: Bool[Array, "N nu"]
    """Controls held at u_min."""
    high: Bool[Array, "N nu"]
    """Controls held at u_max."""
    z: Trajectory
    mu_low: Float[Array, "N nu"]
    """Multipliers ≥ 0 of the controls held at u_min, else 0."""
    mu_high: Float[Array, "N nu"]
    K: Float[Array, "N nu nx"]
    settled: Bool[Array, ""]
    """Whether the last round changed nothing: then this is the solution."""
    regular: Bool[Array, ""]
    num_steps: Int[Array, ""]


def solve_bounded(expansion: Expansion, exist: Rows, delta: Array, low: Array, high: Array, skip: Array) -> ActiveSet:
    """Solve the QP of an expansion whose only inequalities are bounds.

    Args:
        expansion: The QP; `expansion.rows.u_min` is u_min - u.
        exist: Which bounds there are, from `kkt.bounded`.
        delta: Multiple of the identity added to its Hessian.
        low: Controls at u_min to begin with, (N, nu).
        high: Controls at u_max.
        skip: Do nothing.

    Fails: never raises; `settled & regular` says whether the solution was found.
    """
    lq = expansion.lq if expansion.bending is None else with_bending(expansion)
    eye_x, eye_u = (jnp.eye(v.shape[-1], dtype=v.dtype) for v in (lq.q, lq.r))
    lq = lq._replace(Q=lq.Q + delta * eye_x, R=lq.R + delta * eye_u)
    to_low, to_high = expansion.rows.u_min, -expansion.rows.u_max

    def round(state: ActiveSet) -> ActiveSet:
        held = state.low | state.high
        fixed = jnp.where(state.low, to_low, jnp.where(state.high, to_high, 0.0))
        free = jnp.where(held, 0.0, 1.0)
        R = lq.R * free[:, :, None] * free[:, None, :] + eye_u * jnp.where(held, 1.0, 0.0)[:, None, :]
        factors = factor(lq._replace(B=lq.B * free[:, None, :], R=R, S=lq.S * free[:, :, None]))
        q = lq.q.at[:-1].add(jnp.einsum("kux,ku->kx", lq.S, fixed))
        r = free * (lq.r + jnp.einsum("kuv,kv->ku", lq.R, fixed))
        c = lq.c + jnp.einsum("kxu,ku->kx", lq.B, fixed)
        z = backsolve(factors, q, r, c, expansion.x0_gap)
        us = jnp.where(held, fixed, z.us)
        slope = lq.r + jnp.einsum("kuv,kv->ku", lq.R, us) + jnp.einsum("kux,kx->ku", lq.S, z.xs[:-1])
        slope = slope + jnp.einsum("kxu,kx->ku", lq.B, z.lams[1:])
        low = exist.u_min & jnp.where(state.low, slope > 0, us < to_low)
        high = exist.u_max & jnp.where(state.high, slope < 0, us > to_high)
        settled = jnp.all(low == state.low) & jnp.all(high == state.high)
        mu_low, mu_high = jnp.where(state.low, slope, 0.0), jnp.where(state.high, -slope, 0.0)
        return ActiveSet(
            low, high, z._replace(us=us), mu_low, mu_high, factors.K, settled, factors.regular, state.num_steps + 1
        )

    zero, nothing = jnp.zeros_like(lq.r), Trajectory(jnp.zeros_like(lq.r), jnp.zeros_like(lq.q), jnp.zeros_like(lq.q))
    no, yes = jnp.asarray(False), jnp.asarray(True)
    begin = ActiveSet(low, high, nothing, zero, zero, jnp.zeros_like(lq.S), no, yes, jnp.asarray(0))
    going = lambda state: ~state.settled & state.regular & (state.num_steps < _MAX_ROUNDS) & ~skip
    return jax.lax.while_loop(going, round, begin)
