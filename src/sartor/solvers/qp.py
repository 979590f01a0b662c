"""Quadratic programs on the stage structure: a primal-dual interior-point method with Riccati inside.

    min over z = (us, xs):  (D3) + Σ_i linear_i·s_i + ½ quadratic_i·s_i²   s.t.  g + Gz - s + t = 0,  s, t ≥ 0   (D5)

with s = 0 for hard rows. Each step factorises once and solves twice (predictor and corrector).

References: Mehrotra, On the Implementation of a Primal-Dual Interior Point Method, 1992; Rao, Wright and Rawlings,
Application of Interior-Point Methods to Model Predictive Control, 1998.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from sartor.kkt import Expansion, add_row_curvature, rows_cotangent, rows_tangent, with_bending
from sartor.riccati import backsolve, factor
from sartor.solution import Rows
from sartor.solvers.base import loop

_TO_BOUNDARY = 0.995


class Rules(NamedTuple):
    """What kind each row is; all fields flat, (m,)."""

    exist: Bool[Array, " m"]
    """False for an infinite bound."""
    hard: Bool[Array, " m"]
    linear: Float[Array, " m"]
    quadratic: Float[Array, " m"]


class Interior(NamedTuple):
    """An interior point of (D5)."""

    us: Float[Array, "N nu"]
    xs: Float[Array, "N_plus_1 nx"]
    lams: Float[Array, "N_plus_1 nx"]
    mus: Float[Array, " m"]
    slacks: Float[Array, " m"]
    """t"""
    violations: Float[Array, " m"]
    """s"""
    nus: Float[Array, " m"]
    """ν, multipliers of s ≥ 0. Not computed from linear + quadratic·s - μ, where it would drown in rounding."""


class QPState(NamedTuple):
    """The carry of the interior-point iteration."""

    point: Interior
    K: Float[Array, "N nu nx"]
    """Feedback of the controls to the states in the last step."""
    delta: Float[Array, ""]
    """Multiple of the identity added to the Hessian so far."""
    infeasibility: Float[Array, ""]
    """What is left of the initial residual of the linear equations, as a fraction."""
    regular: Bool[Array, ""]
    done: Bool[Array, ""]
    num_steps: Int[Array, ""]


def solve_qp(
    expansion: Expansion,
    rules: Rules,
    start: Interior,
    tau: Array,
    deltas: tuple[Array, Array],
    max_steps: int,
    unroll: bool,
    skip: Array | bool = False,
) -> QPState:
    """Solve (D5) from an interior point; `expansion.lq` gives H, `expansion.rows` g and `expansion.jacobian` G.

    With `expansion.bending` H is the exact Hessian. Where H is not positive definite on the feasible directions, the
    iteration starts anew with a multiple of the identity added to it, and a larger one until it is.

    Args:
        expansion: The problem, in deviations from a trajectory.
        rules: Kinds of the rows.
        start: Starting point with mus, slacks > 0; it need not satisfy any equation.
        tau: Complementarity μt = sν = τ to be reached.
        deltas: Multiple of the identity to begin with, and the one to try first where that does not do.
        max_steps: Limit of interior-point steps.
        unroll: Take exactly `max_steps` steps, in a loop that reverse mode can differentiate.
        skip: Take no step at all.

    Fails: never raises; `regular` is False where no multiple made H positive definite.
    """
    g = pack(expansion.rows)
    lq = expansion.lq if expansion.bending is None else with_bending(expansion)
    largest = 1e8 * (jnp.max(jnp.abs(lq.Q)) + jnp.max(jnp.abs(lq.R)))

    def step(state: QPState) -> QPState:
        point = state.point
        H = lq._replace(Q=lq.Q + state.delta * _eye(lq.q), R=lq.R + state.delta * _eye(lq.r))
        D = row_curvature(rules, point)
        factors = factor(add_row_curvature(H, expansion.jacobian, unpack(D, expansion.rows)))

        def direction(target, correction_t, correction_s):
            e, offset, compliance = _row_offsets(rules, point, target, correction_t, correction_s)
            drive_us, drive_xs = rows_cotangent(expansion.jacobian, unpack(D * g + e, expansion.rows))
            z = backsolve(factors, lq.q + drive_xs, lq.r + drive_us, lq.c, expansion.x0_gap)
            rows = g + pack(rows_tangent(expansion.jacobian, z.us, z.xs))
            mus = D * rows + e
            t, s, nus = _full_step(rules, point, target, correction_t, correction_s, rows, mus, offset, compliance)
            return jax.tree.map(jnp.subtract, Interior(z.us, z.xs, z.lams, mus, t, s, nus), point)

        def predict_and_correct(previous, _):
            change = direction(*previous[1:])
            # Lengths and targets are choices: derivatives through the iterations hold them fixed.
            still, ahead = jax.lax.stop_gradient((point, change))
            alpha = jnp.minimum(1.0, _TO_BOUNDARY * _longest_step(rules, still, ahead))
            gap, ahead = complementarity(rules, still), complementarity(rules, _move(still, ahead, alpha))
            target = jnp.maximum(gap * (ahead / jnp.maximum(gap, jnp.finfo(gap.dtype).tiny)) ** 3, tau)
            # At the end of the path the predictor's aim, τ = 0, is not where to go: a plain Newton step is.
            ahead_of_end = jnp.where(target > tau, 1.0, 0.0)
            correction_t = ahead_of_end * change.mus * change.slacks
            return (change, target, correction_t, ahead_of_end * change.violations * change.nus), alpha

        none = jnp.zeros_like(g)
        # One loop of two rounds, rather than the same code twice: it halves what has to be compiled.
        (change, *_), alphas = jax.lax.scan(predict_and_correct, (point, tau * 0.0, none, none), length=2)
        moved = _move(point, change, alphas[1])
        regular = factors.regular & jnp.all(jnp.isfinite(moved.us))
        larger = jnp.maximum(deltas[1], 8.0 * state.delta)
        restart = ~regular & (larger < largest)
        infeasibility = jnp.where(restart, 1.0, state.infeasibility * (1.0 - alphas[1]))
        done = (complementarity(rules, moved) <= 3.0 * tau) & (infeasibility <= 1e-6)
        moved = jax.tree.map(lambda begin, now: jnp.where(restart, begin, now), start, moved)
        delta = jnp.where(restart, larger, state.delta)
        return QPState(moved, factors.K, delta, infeasibility, regular | restart, done & regular, state.num_steps + 1)

    no_feedback, yes = jnp.zeros_like(lq.S), jnp.asarray(True)
    begin = QPState(start, no_feedback, deltas[0], jnp.ones_like(tau), yes, yes & skip, jnp.asarray(0))
    return loop(step, lambda state: ~state.done & state.regular, begin, max_steps, unroll)


def center(rules: Rules, g: Array, mus: Array, tau: Array) -> tuple[Array, Array, Array, Array]:
    """μ, t, s, ν with μt = sν = τ nearest to what is known: rows g, old multipliers.

    μ and t solve μt = τ, μ - t = mus + g. From a cold start (mus = 0) that keeps feasible rows where they are; from
    an old solution it keeps the active set, yet at a distance √τ from the corner, whence Newton steps are long.
    """
    difference = mus + g
    # Whichever of the two is small is computed from the product: the difference would cancel.
    large = 0.5 * (jnp.abs(difference) + jnp.sqrt(difference**2 + 4.0 * tau))
    mus = jnp.where(difference > 0, large, tau / large)
    with_nu = _with_nu(rules)
    violated = jnp.maximum(g, jnp.sqrt(tau))
    ceiling = rules.linear + rules.quadratic * violated
    margin = jnp.minimum(tau / violated, 0.5 * ceiling)
    saturated = with_nu & (mus > ceiling - margin)
    mus = jnp.where(saturated, ceiling - margin, mus)
    # s ν = τ with ν = rest + quadratic·s; a multiplier above the linear penalty means that the row is violated.
    rest = rules.linear - mus
    sum_of_both = jnp.abs(rest) + jnp.sqrt(rest**2 + 4.0 * rules.quadratic * tau)
    sum_of_both = jnp.where(with_nu & ~saturated, sum_of_both, 1.0)
    quadratic = jnp.where(rules.quadratic > 0, rules.quadratic, 1.0)
    above = rest < 0
    s = jnp.where(saturated, violated, jnp.where(above, 0.5 * sum_of_both / quadratic, 2.0 * tau / sum_of_both))
    s = jnp.where(rules.linear > 0, s, mus / quadratic)
    nus = jnp.where(above, 2.0 * rules.quadratic * tau / sum_of_both, 0.5 * sum_of_both)
    nus = jnp.where(with_nu, jnp.where(saturated, margin, nus), 0.0)
    exist = rules.exist
    s = jnp.where(rules.hard, 0.0, s)
    return jnp.where(exist, mus, 0.0), jnp.where(exist, tau / mus, 1.0), s, nus


def row_curvature(rules: Rules, point: Interior) -> Float[Array, " m"]:
    """D of the condensed Hessian H + GᵀDG: dμ = D (G dz) along the linearised complementarity."""
    compliance, _ = _compliance(rules, point)
    return jnp.where(rules.exist, point.mus / (point.slacks + point.mus * compliance), 0.0)


def complementarity(rules: Rules, point: Interior) -> Float[Array, ""]:
    """Mean of the products μt and sν."""
    with_nu = _with_nu(rules)
    products = jnp.where(rules.exist, point.mus * point.slacks, 0.0)
    products = products + jnp.where(with_nu, point.violations * point.nus, 0.0)
    return jnp.sum(products) / jnp.maximum(jnp.sum(rules.exist) + jnp.sum(with_nu), 1)


def pack(rows: Rows) -> Shaped[Array, " m"]:
    """Rows as one vector: lower bounds, upper bounds, path, terminal."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(rows)])


def unpack(flat: Array, like: Rows) -> Rows:
    """The inverse of `pack`."""
    leaves, structure = jax.tree.flatten(like)
    ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    parts = [flat[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _with_nu(rules: Rules) -> Array:
    """Soft rows with a linear penalty; without one, s is free: its quadratic penalty keeps it at 0 by itself."""
    return ~rules.hard & (rules.linear > 0)


def _compliance(rules: Rules, point: Interior) -> tuple[Array, Array]:
    """ds/dμ of a soft row, and 1/(ν + quadratic·s), both 0 for a hard row (the second also without a linear part)."""
    curvature = point.nus + rules.quadratic * point.violations
    slope = jnp.where(_with_nu(rules), 1.0 / jnp.where(curvature > 0, curvature, 1.0), 0.0)
    only_quadratic = ~rules.hard & (rules.linear == 0)
    inverse = 1.0 / jnp.where(only_quadratic, rules.quadratic, 1.0)
    return jnp.where(only_quadratic, inverse, point.violations * slope), slope


def _row_offsets(
    rules: Rules, point: Interior, target: Array, correction_t: Array, correction_s: Array
) -> tuple[Array, Array, Array]:
    """e, a, b of the linearised complementarity: new μ = D (g + Gz) + e and new s = a + b μ."""
    mus, t, s, nus = point.mus, point.slacks, point.violations, point.nus
    compliance, slope = _compliance(rules, point)
    offset = (target + s * nus - correction_s - s * rules.linear) * slope
    e = (target + mus * t - correction_t - mus * offset) / (t + mus * compliance)
    return jnp.where(rules.exist, e, 0.0), offset, compliance


def _full_step(
    rules: Rules, point: Interior, target: Array, correction_t: Array, correction_s: Array,
    rows: Array, new_mus: Array, offset: Array, compliance: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """t, s, ν after a full step. The smaller factor of a product comes from the product, lest it drown in rounding."""
    mus, t, s, nus = point.mus, point.slacks, point.violations, point.nus
    with_nu = _with_nu(rules)
    violated = with_nu & (s > nus)
    t_by_product = (target + mus * t - correction_t - t * new_mus) / jnp.where(mus > 0, mus, 1.0)
    new_s = jnp.where(violated, rows + t_by_product, offset + compliance * new_mus)
    new_s = jnp.where(rules.hard, 0.0, new_s)
    new_t = jnp.where(rules.exist, jnp.where(violated, t_by_product, new_s - rows), t)
    nu_by_product = (target + s * nus - correction_s - nus * new_s) / jnp.where(s > 0, s, 1.0)
    new_nus = jnp.where(violated, nu_by_product, rules.linear + rules.quadratic * new_s - new_mus)
    return new_t, new_s, jnp.where(with_nu, new_nus, 0.0)


def _longest_step(rules: Rules, point: Interior, step: Interior) -> Array:
    """Largest α ≤ 1/0.995 that keeps μ, t, s, ν ≥ 0."""

    def limit(value, change, relevant):
        ratio = jnp.where(relevant & (change < 0), -value / jnp.where(change < 0, change, -1.0), jnp.inf)
        return jnp.min(ratio, initial=1.0 / _TO_BOUNDARY)

    with_nu = _with_nu(rules)
    return jnp.minimum(
        jnp.minimum(limit(point.mus, step.mus, rules.exist), limit(point.slacks, step.slacks, rules.exist)),
        jnp.minimum(limit(point.violations, step.violations, with_nu), limit(point.nus, step.nus, with_nu)),
    )


def _move(point: Interior, step: Interior, alpha: Array) -> Interior:
    return jax.tree.map(lambda value, change: value + alpha * change, point, step)


def _eye(vectors: Array) -> Array:
    return jnp.eye(vectors.shape[-1], dtype=vectors.dtype)
