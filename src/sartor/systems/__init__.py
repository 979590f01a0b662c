"""Systems to try things on, one a module, all of the same shape (`System`)."""

from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Array

from sartor.problem import Problem
from sartor.systems import cartpole, linear, pendulum, quadrotor


class System(Protocol):
    """What each module here offers; `dtype` is JAX's current precision unless it is given."""

    @property
    def DT(self) -> float:
        """Time step in [s]."""
        ...

    @property
    def STATES(self) -> tuple[str, ...]:
        """Names of the states, with units in brackets."""
        ...

    @property
    def CONTROLS(self) -> tuple[str, ...]:
        """Names of the controls, with units in brackets."""
        ...

    @property
    def problem(self) -> Callable[..., Problem]:
        """problem(horizon=..., ...) -> Problem."""
        ...

    @property
    def plant_step(self) -> Callable[..., Array]:
        """plant_step(x, u, k, theta) -> x_next, the true system: equal to the model of `problem`."""
        ...

    def default_theta(self, dtype: Any = None) -> Any:
        """The true parameters."""
        ...

    def goal(self, theta: Any) -> Array:
        """State (nx,) at which the system should end."""
        ...

    def sample_x0(self, key: Array, dtype: Any = None) -> Array:
        """A random initial state (nx,)."""
        ...


SYSTEMS: dict[str, System] = {
    "pendulum": pendulum,
    "cartpole": cartpole,
    "quadrotor": quadrotor,
    "linear": linear,
}
