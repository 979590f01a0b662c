"""What a solver is: pure functions `init` and `step` on a state; the loop over steps is in `solve.py`."""

import abc
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

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
    step: Callable[[State], State], running: Callable[[State], Array], state: State, max_steps: int, unroll: bool
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


def kkt_tolerance(tol: float, dtype: Any) -> float:
    """The tolerance asked for, or what rounding leaves in float32."""
    return max(tol, 2e3 * float(jnp.finfo(dtype).eps))
