"""The derivative of a closed loop on a plant of which only a model is known.

    u_t = π(x_t, θ),   x_{t+1} = plant(x_t, u_t),   C(x_0 … x_T, u_0 … u_{T-1})

The policy is an MPC, whose derivatives K_t = ∂π/∂x and ∂π/∂θ are exact; for the plant the model's Jacobians A_t, B_t
stand in, at the states and controls that the plant went through (straight-through):

    p_T = ∂C/∂x_T,   v_t = ∂C/∂u_t + B_tᵀ p_{t+1},   p_t = ∂C/∂x_t + A_tᵀ p_{t+1} + K_tᵀ v_t
    dC/dθ ≈ Σ_t (∂π/∂θ)ᵀ v_t                                                                                      (D20)

One rollout gives all of it, whatever the number of parameters. It is the gradient if the model's Jacobians are those of
the plant.

References: Zuliani, Balta, Lygeros, Policy Optimization for Unknown Systems using Differentiable MPC, 2026, eq. (8).
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from sartor import kkt
from sartor.kkt import Point
from sartor.mpc import MPC
from sartor.sensitivity import Direction, Linearisation, first_control_adjoint, linearise, right_hand_side, sanitised
from sartor.solution import Solution
from sartor.solvers.base import group_size

Build = Callable[[PyTree], MPC]
"""build(theta) -> the controller with these parameters."""


class Rollout(NamedTuple):
    """A closed loop of T control steps, with what its derivative needs."""

    xs: Float[Array, "T_plus_1 nx"]
    us: Float[Array, "T nu"]
    sols: Solution
    """Solutions behind the controls, (T, ...)."""
    failed: Int[Array, ""]
    """Control steps whose solve failed; the plan before was followed there."""


class Feedback(NamedTuple):
    """How the closed loop answers at every control step."""

    A: Float[Array, "T nx nx"]
    """∂f/∂x of the model at the plant's states."""
    B: Float[Array, "T nx nu"]
    K: Float[Array, "T nu nx"]
    """∂π/∂x; zero where the policy has no derivative."""
    adjoint: Direction
    """Rows of the inverse KKT matrix that belong to the control, (T, nu, ...)."""
    lin: Linearisation
    """The KKT matrix at every solution."""
    regular: Bool[Array, " T"]
    """Whether the policy has a derivative."""


@eqx.filter_jit
def roll_out(plant: Callable, controller: MPC, x0: Float[Array, " nx"], num_steps: int) -> Rollout:
    """Run a plant in JAX, plant(x, u, k) -> x_next, in closed loop."""

    def step(carry, k):
        x, memory = carry
        u, memory, _, sol = controller.plan(x, k, memory)
        return (plant(x, u, k), memory), (x, u, sol)

    (x, _), (xs, us, sols) = jax.lax.scan(step, (x0, controller.init(x0)), jnp.arange(num_steps))
    return Rollout(jnp.concatenate([xs, x[None]]), us, sols, jnp.sum(~sols.successful))


def feedback(controller: MPC, rollout: Rollout, model: Callable | None = None) -> Feedback:
    """Derivatives of model and policy along a rollout, all control steps in one batch.

    Args:
        controller: The policy.
        rollout: A closed loop with it.
        model: model(x, u, k) -> x_next, to stand in for the plant; the controller's own dynamics unless given.
    """
    problem = controller.problem

    def at(stage):
        k, x, u, sol = stage
        theta = controller.theta_of(k)
        lin = linearise(problem, theta, sol)
        regular = lin.regular & sol.successful
        adjoint = jax.tree.map(lambda leaf: jnp.where(regular, leaf, 0.0), first_control_adjoint(lin))
        own = lambda x, u, k: problem.dynamics(x, u, jnp.asarray(0), theta)
        A, B = jax.jacfwd(own if model is None else model, (0, 1))(x, u, k)
        return Feedback(A, B, -adjoint.lams[:, 0], adjoint, lin, regular)

    T = rollout.us.shape[0]
    # In groups: what is refined then takes as many rounds as the worst of its group needs, not the worst of all.
    group = max(n for n in range(1, min(T, 2 * group_size()) + 1) if T % n == 0)
    stages = (jnp.arange(T), rollout.xs[:-1], rollout.us, rollout.sols)
    groups = jax.tree.map(lambda leaf: leaf.reshape(T // group, group, *leaf.shape[1:]), stages)
    along = jax.lax.map(jax.vmap(at), groups)
    return jax.tree.map(lambda leaf: leaf.reshape(T, *leaf.shape[2:]), along)


def cost_gradient(
    build: Build, theta: PyTree, rollout: Rollout, along: Feedback, slopes: tuple[Array, Array]
) -> PyTree:
    """dC/dθ by (D20).

    Args:
        build: The controller of some parameters.
        theta: The parameters: floating-point arrays.
        rollout: A closed loop with them.
        along: Its `feedback`.
        slopes: ∂C/∂x_t and ∂C/∂u_t.
    """
    by_x, by_u = slopes

    def back(p, at):
        A, B, K, by_x, by_u = at
        v = by_u + B.T @ p
        return by_x + A.T @ p + K.T @ v, v

    _, vs = jax.lax.scan(back, by_x[-1], (along.A, along.B, along.K, by_x[:-1], by_u), reverse=True)
    weighted = jax.tree.map(lambda rows: jnp.einsum("tu,tu...->t...", vs, rows), along.adjoint)
    pulled = jax.vmap(_pulled, (None, 0, 0, 0, 0))
    stages = (jnp.arange(vs.shape[0]), rollout.sols, along.lin, weighted)
    return jax.grad(lambda theta: jnp.sum(pulled(build(theta), *stages)))(theta)


def policy_jacobian(build: Build, theta: PyTree, rollout: Rollout, along: Feedback) -> Float[Array, "T nu n"]:
    """∂π/∂θ at every control step, for θ as one vector: as many gradients as there are controls."""
    flat, unravel = ravel_pytree(theta)

    def at(k, sol, lin, rows):
        one = lambda row: jax.grad(lambda flat: _pulled(build(unravel(flat)), k, sol, lin, row))(flat)
        return jax.vmap(one)(rows)

    return jax.vmap(at)(jnp.arange(rollout.us.shape[0]), rollout.sols, along.lin, along.adjoint)


def sensitivities(A: Array, B: Array, K: Array, direct: Array) -> tuple[Array, Array]:
    """dx_t/dθ (T+1, nx, n) and du_t/dθ (T, nu, n), with the model in place of the plant; n columns are carried along.

    Args:
        A: ∂f/∂x, (T, nx, nx).
        B: ∂f/∂u, (T, nx, nu).
        K: ∂π/∂x, (T, nu, nx).
        direct: ∂π/∂θ, (T, nu, n).
    """

    def ahead(X, at):
        A, B, K, direct = at
        U = K @ X + direct
        return A @ X + B @ U, (X, U)

    start = jnp.zeros((A.shape[1], direct.shape[2]), direct.dtype)
    last, (Xs, Us) = jax.lax.scan(ahead, start, (A, B, K, direct))
    return jnp.concatenate([Xs, last[None]]), Us


def _pulled(controller: MPC, k: Array, sol: Solution, lin: Linearisation, row: Direction) -> Float[Array, ""]:
    """A row of the inverse KKT matrix times the residual: its derivative in θ is that of the control."""
    sol = sanitised(sol)
    point = Point(sol.us, sol.xs, sol.lams, sol.mus, sol.slacks)
    b = right_hand_side(lin, kkt.residual(controller.problem, controller.theta_of(k), sol.xs[0], point, sol.tau))
    return jnp.vdot(ravel_pytree(row)[0], ravel_pytree(b)[0])
