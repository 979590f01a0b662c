"""What a solver is: pure functions `init` and `step` on a state; the loop over steps is in `solve.py`."""

import abc
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from sartor.kkt import Expansion
from sartor.problem import Problem, Theta
from sartor.solution import Solution

State = TypeVar("State")


class AbstractSolver(eqx.Module):
    """An algorithm for (D1). All numbers that it uses are static options; all that it knows is in its state."""

    max_steps: eqx.AbstractVar[int]
    """Largest number of steps."""

    @abc.abstractmethod
    def check(self, problem: Problem) -> None:
        """Raise `ValueError` if the solver cannot take this problem."""

    @abc.abstractmethod
    def init(self, problem: Problem, theta: Theta, x0: Array, guess: Solution, unroll: bool) -> Any:
        """State before the first step."""

    @abc.abstractmethod
    def step(self, problem: Problem, theta: Theta, x0: Array, state: Any, unroll: bool) -> Any:
        """One iteration. With `unroll`, written so that reverse mode can differentiate it."""

    @abc.abstractmethod
    def running(self, state: Any) -> Array:
        """Whether another step is worth while."""

    @abc.abstractmethod
    def finish(self, problem: Problem, theta: Theta, x0: Array, state: Any) -> Solution:
        """The solution, with its status, in the last state."""


def loop(
    step: Callable[[State], State],
    running: Callable[[State], Array],
    state: State,
    max_steps: int,
    unroll: bool,
) -> State:
    """Repeat `step` while `running`, at most `max_steps` times.

    With `unroll` it takes exactly `max_steps` steps: reverse mode needs a fixed number, and the derivative of an
    iterate lags one step behind the iterate, so that stopping at once would leave it unconverged.
    """
    if unroll:
        return jax.lax.scan(lambda state, _: (step(state), None), state, None, length=max_steps)[0]

    def body(carry):
        state, count = carry
        return step(state), count + 1

    def keep_going(carry):
        state, count = carry
        return running(state) & (count < max_steps)

    return jax.lax.while_loop(keep_going, body, (state, 0))[0]


def queue(
    step: Callable,
    running: Callable,
    arrays: PyTree,
    axes: PyTree,
    state: State,
    num_samples: int,
    max_steps: int,
) -> State:
    """`loop` for a batch: steps go to the samples that still run, a group at a time, until none does.

    A plain `vmap` of a loop lets every sample of the batch step as often as the slowest one. Here a step costs as much
    as its group, so that the work is the sum of the steps that samples need. Every sample gets what it gets alone.
    """
    num_groups = -(-num_samples // group_size())
    group = -(-num_samples // num_groups)  # equal groups: a half-empty one would cost as much as a full one

    def body(carry):
        state, active, count = carry
        chosen = jnp.argsort(~active)[:group]
        pick = lambda leaf: leaf[chosen]
        inputs = jax.tree.map(
            lambda axis, leaf: leaf if axis is None else pick(leaf), axes[0], arrays, is_leaf=_is_none
        )
        old = jax.tree.map(pick, state)
        new = jax.vmap(step, (*axes, 0))(inputs, old)
        keep = lambda new, old: jnp.where(active[chosen].reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
        new = jax.tree.map(keep, new, old)
        counted = count[chosen] + 1
        goes_on = active[chosen] & jax.vmap(running)(new) & (counted < max_steps)
        state = jax.tree.map(lambda all, some: all.at[chosen].set(some, unique_indices=True), state, new)
        return state, active.at[chosen].set(goes_on), count.at[chosen].set(counted)

    begin = (state, jax.vmap(running)(state), jnp.zeros(num_samples, int))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), body, begin)[0]


def group_size() -> int:
    """Samples that step together: as many as a processor's vectors and caches take, or all on an accelerator."""
    return 16 if jax.default_backend() == "cpu" else 1 << 30


def _is_none(value: Any) -> bool:
    return value is None


def kkt_tolerance(tol: float, lams: Array) -> Array:
    """The tolerance asked for, or what rounding leaves of a residual made of such multipliers, but never much."""
    eps = jnp.finfo(lams.dtype).eps
    return jnp.maximum(tol, jnp.minimum(200 * eps * (10.0 + jnp.max(jnp.abs(lams))), 100 * eps**0.5))


def least_delta(expansion: Expansion) -> Array:
    """The least multiple of the identity worth adding to a Hessian."""
    return 1e-5 * (jnp.max(jnp.abs(jnp.diagonal(expansion.lq.Q, axis1=1, axis2=2))) + 1e-6)


def next_delta(delta: Array, alpha: Array, smallest: Array) -> Array:
    """Levenberg's rule: more regularisation after a step that was cut short, less after a full one."""
    more, less = jnp.maximum(8.0 * delta, 10.0 * smallest), 0.125 * delta
    return jnp.where(alpha < 0.25, more, jnp.where(alpha < 1.0, delta, jnp.where(less < smallest, 0.0, less)))
