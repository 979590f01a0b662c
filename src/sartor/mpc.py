"""The closed loop: measure, solve, apply the first control, shift, repeat; for plants in JAX one `lax.scan`.

u_k = us_0(x_k, θ_k),   x_{k+1} = plant(x_k, u_k, k) + disturbance,   guess_{k+1} = shift(solution_k)
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from sartor.problem import Problem, Theta, rollout
from sartor.solution import RESULTS, Solution, shift
from sartor.solve import solve, starting_point
from sartor.solvers.base import AbstractSolver
from sartor.solvers.sqp import SQP


class Memory(NamedTuple):
    """What the controller carries from one control step to the next."""

    guess: Solution
    """Where the next solve starts."""
    us: Float[Array, "N nu"]
    """Controls of the last successful plan, shifted to the present; applied if a solve fails."""
    num_steps: Int[Array, ""]
    """Steps of the cold solve, which count for the first control step; 0 from then on."""
    lost: Bool[Array, ""]
    """Whether the last solve failed."""


class Info(eqx.Module):
    """What a person wants to know about one control step."""

    cost: Float[Array, "..."]
    """Stage cost ℓ(x_k, u_k, 0, θ_k) of the measured state and the applied control."""
    result: RESULTS
    """How the solve ended. Where it failed, the control of the previous plan was applied."""
    num_steps: Int[Array, "..."]
    """Steps (solver iterations) of the solve."""
    kkt_norm: Float[Array, "..."]
    """Largest entry of the KKT residual of the solve."""


class MPC(eqx.Module):
    """A model predictive controller: at every control step it solves its problem from the measured state.

    The first solve starts cold and runs until it has converged, if there is a `first_solver`; each later one starts
    from the solution before, shifted. If a solve fails, its control is not used: the controller applies what the last
    successful plan holds for now (beyond the end of that plan: its last control), and records the status.
    The next solve starts from `first_guess` if there is one; else where the failed one ended, or from the
    older guess if that is not finite. Before any success the plan holds the controls nearest to zero. So a
    control is always finite and within its bounds.
    """

    problem: Problem
    """The problem, with the model as its dynamics. Bounds of each stage, (N, nu), belong to the stages of the horizon:
    they do not move with the loop."""
    theta: Theta
    """Parameters of the problem; differentiable."""
    solver: AbstractSolver = SQP()
    """For all solves but the first; `SQP(real_time=True)` for the real-time iteration."""
    first_solver: AbstractSolver | None = SQP()
    """For the first solve. None: the first control step starts at `first_guess`, or else at the controls nearest to
    zero, with `solver` as all others: one program less to compile."""
    theta_at: Callable | None = eqx.field(static=True, default=None)
    """theta_at(theta, k) -> the parameters of the problem at control step k, such as θ with the part of a
    reference that lies ahead (`window`). None: `theta` at all steps."""
    first_guess: Callable | None = eqx.field(static=True, default=None)
    """first_guess(x, theta) -> where the first solve starts, and each one after a failed solve, as by `sartor.guess`.
    None: at the controls nearest to zero."""

    def init(self, x: Float[Array, " nx"]) -> Memory:
        """Memory before control step 0, from a cold start at the measured state x, which must be finite."""
        theta = self.theta_of(0)
        begin = None if self.first_guess is None else self.first_guess(x, theta)
        if self.first_solver is None:
            sol = starting_point(self.problem, theta, x, begin)
        else:
            sol = solve(self.problem, theta, x, solver=self.first_solver, guess=begin, throw=False)
        start = _cold_start(self.problem, theta, x, sol)
        us = jnp.where(sol.successful & _finite(sol), sol.us, start.us)
        return Memory(_choose(_finite(sol), sol, start), us, sol.stats.num_steps, jnp.asarray(False))

    def __call__(
        self, x: Float[Array, " nx"], k: Int[Array, ""] | int, memory: Memory
    ) -> tuple[Float[Array, " nu"], Memory, Info]:
        """The control for state x at control step k, and what to remember for step k + 1.

        A failed solve does not raise; a state that is not finite does, unless it is traced.
        """
        return self.plan(x, k, memory)[:3]

    def plan(
        self, x: Float[Array, " nx"], k: Int[Array, ""] | int, memory: Memory
    ) -> tuple[Float[Array, " nu"], Memory, Info, Solution]:
        """As a call of the controller, and the solution behind the control, whether or not the solve succeeded."""
        theta = self.theta_of(k)
        low, high = self.problem.bounds
        # Bounds of each stage belong to the stage, not to the control that a shift has moved there.
        guess = self._again(x, theta, memory)
        guess = eqx.tree_at(lambda g: g.us, guess, jnp.clip(guess.us, low, high))
        sol = solve(self.problem, theta, x, solver=self.solver, guess=guess, throw=False)
        us = jnp.where(sol.successful & _finite(sol), sol.us, memory.us)
        u = jnp.clip(us[0], low[0], high[0])
        cost = self.problem.stage_cost(x, u, jnp.asarray(0), theta)
        info = Info(cost, sol.result, sol.stats.num_steps + memory.num_steps, sol.stats.kkt_norm)
        next_guess = shift(_choose(_finite(sol), sol, memory.guess))
        return (
            u,
            Memory(next_guess, jnp.concatenate([us[1:], us[-1:]]), jnp.zeros_like(memory.num_steps), ~sol.successful),
            info,
            sol,
        )

    def _again(self, x: Array, theta: Theta, memory: Memory) -> Solution:
        """Where a solve starts: from the plan before, or anew if that was lost."""
        if self.first_guess is None:
            return memory.guess
        first_guess = self.first_guess

        def anew() -> Solution:
            begin = first_guess(x, theta)
            empty = jax.tree.map(jnp.zeros_like, memory.guess)
            return eqx.tree_at(lambda sol: (sol.us, sol.xs), empty, (begin.us, begin.xs))

        return jax.lax.cond(memory.lost, anew, lambda: memory.guess)

    def theta_of(self, k: Int[Array, ""] | int) -> Theta:
        """Parameters of the problem at control step k."""
        return self.theta if self.theta_at is None else self.theta_at(self.theta, k)


class Episode(eqx.Module):
    """A closed loop of T control steps."""

    us: Float[Array, "*batch T nu"]
    """Controls that were applied."""
    xs: Float[Array, "*batch T+1 nx"]
    """States of the plant, the initial one first."""
    costs: Float[Array, "*batch T"]
    """Stage costs."""
    results: RESULTS
    """How the solves ended, (T,); compare with `RESULTS.successful`."""
    num_steps: Int[Array, "*batch T"]
    """Steps (solver iterations) of each solve; the first includes the cold start."""
    kkt_norms: Float[Array, "*batch T"]
    """Largest entry of the KKT residual of each solve."""
    dt: float = eqx.field(static=True)
    """Time between two controls in [s]."""

    @property
    def num_failed(self) -> Int[Array, "*batch"]:
        """Number of control steps whose solve failed."""
        return jnp.sum(self.results != RESULTS.successful, axis=-1)


class LoopState(NamedTuple):
    """The closed loop between two control steps."""

    x: Float[Array, " nx"]
    k: Int[Array, ""]
    memory: Memory


class Step(NamedTuple):
    """What one control step leaves behind; with a leading axis, several of them."""

    x: Array  # after the step
    u: Array
    info: Info


def simulate(
    plant: Callable,
    controller: MPC,
    x0: Float[Array, " nx"],
    num_steps: int,
    *,
    dt: float = 1.0,
    disturbance: Callable | None = None,
    key: Array | None = None,
) -> Episode:
    """Run a plant in closed loop with a controller, in one `lax.scan`; batch it with `jax.vmap`.

        x_{k+1} = plant(x_k, u_k, k) + disturbance(key_k, x_k, u_k, k),   u_k = controller(x_k, k, memory)

    Args:
        plant: plant(x, u, k) -> x_next, the true system. A new function compiles anew; the same one, or
            `eqx.Partial(plant_step, theta=theta)` with other numbers, does not.
        controller: The controller, or any module with its `init` and `__call__`.
        x0: Initial state.
        num_steps: Number of control steps T.
        dt: Time between two controls in [s], for the record only.
        disturbance: disturbance(key, x, u, k) -> (nx,), added to the next state. Needs `key`.
        key: Random key, of which step k uses `jax.random.fold_in(key, k)`.

    Returns:
        The episode. A failed solve does not end it: see `MPC`.

    Gradients: through all solves that succeeded, none through the guesses; both modes.
    Fails: `ValueError` for wrong input; a failed solve is a status in `results`.
    """
    if (disturbance is None) != (key is None):
        raise ValueError("disturbance and key belong together: give both, or neither.")
    state = begin(controller, x0)
    _, steps = advance(plant, controller, state, num_steps, disturbance, key)
    return episode(x0, steps, dt)


@eqx.filter_jit
def begin(controller: MPC, x0: Float[Array, " nx"]) -> LoopState:
    """The closed loop before its first control step: the cold solve."""
    return LoopState(x0, jnp.asarray(0), controller.init(x0))


@eqx.filter_jit
def advance(
    plant: Callable,
    controller: MPC,
    state: LoopState,
    num_steps: int,
    disturbance: Callable | None = None,
    key: Array | None = None,
) -> tuple[LoopState, Step]:
    """The next `num_steps` control steps; the pieces of an episode are equal to the whole."""

    def step(state: LoopState, _: None) -> tuple[LoopState, Step]:
        x, k, memory = state
        u, memory, info = controller(x, k, memory)
        x = plant(x, u, k)
        if disturbance is not None and key is not None:
            x = x + disturbance(jax.random.fold_in(key, k), state.x, u, k)
        return LoopState(x, k + 1, memory), Step(x, u, info)

    return jax.lax.scan(step, state, None, length=num_steps)


def episode(x0: Float[Array, " nx"], steps: Step, dt: float) -> Episode:
    """All steps since x0 as an episode."""
    info = steps.info
    xs = jnp.concatenate([x0[None], steps.x])
    return Episode(steps.u, xs, info.cost, info.result, info.num_steps, info.kkt_norm, dt)


def window(reference: PyTree, k: Int[Array, ""] | int, num_rows: int) -> PyTree:
    """Rows k, ..., k + num_rows - 1 of every array in `reference`, its last row repeated beyond the end."""

    def rows(leaf: Array) -> Array:
        return leaf[jnp.minimum(k + jnp.arange(num_rows), leaf.shape[0] - 1)]

    return jax.tree.map(rows, reference)


def _cold_start(problem: Problem, theta: Theta, x: Array, like: Solution) -> Solution:
    """The controls nearest to zero and their rollout, or the state repeated where that is not finite."""
    us = jnp.clip(jnp.zeros_like(like.us), *problem.bounds).astype(like.us.dtype)
    xs = rollout(problem, theta, x, us)
    xs = jnp.where(jnp.all(jnp.isfinite(xs)), xs, jnp.broadcast_to(x, xs.shape))
    empty = jax.tree.map(jnp.zeros_like, like)
    return eqx.tree_at(lambda sol: (sol.us, sol.xs), empty, (us, xs))


def _finite(sol: Solution) -> Array:
    return jnp.all(jnp.isfinite(sol.us)) & jnp.all(jnp.isfinite(sol.xs)) & jnp.all(jnp.isfinite(sol.lams))


def _choose(condition: Array, yes: Solution, no: Solution) -> Solution:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
