"""A plant and the MPC that drives it, of which leaves of θ are tuned: everything that a rollout depends on."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from sartor.mpc import MPC
from sartor.parameters import Where, selected, values
from sartor.policy_gradient import Rollout, roll_out
from sartor.tuning import Objective, Score


class Bench(eqx.Module):
    """The plant and who drives it."""

    controller: MPC
    x0: Array
    objective: Objective
    free: PyTree  # which leaves of θ are tuned
    num_steps: int = eqx.field(static=True)
    plant: Callable

    @property
    def theta(self) -> PyTree:
        """θ as it is at first."""
        return self.controller.theta

    def build(self, theta: PyTree) -> MPC:
        """The controller with parameters θ."""
        return eqx.tree_at(lambda c: c.theta, self.controller, values(theta))

    def flat(self, theta: PyTree) -> Array:
        """What is tuned, as one vector."""
        return ravel_pytree(eqx.filter(theta, self.free))[0]

    def at(self, theta: PyTree, flat: Array) -> PyTree:
        """θ with other numbers in what is tuned."""
        free, fixed = eqx.partition(theta, self.free)
        return eqx.combine(ravel_pytree(free)[1](flat), fixed)

    def run(self, theta: PyTree) -> tuple[Rollout, Score]:
        """The plant in closed loop; its merit is infinite where it, or a state, is not finite."""
        rollout = roll_out(self.plant, self.build(theta), self.x0, self.num_steps)
        at = rollout.xs, rollout.us
        score = Score(self.objective.merit(*at), self.objective.cost(*at), self.objective.excess(*at), rollout.failed)
        fine = jnp.all(jnp.isfinite(rollout.xs)) & jnp.isfinite(score.merit)
        return rollout, score._replace(merit=jnp.where(fine, score.merit, jnp.inf))


def bench(
    controller: MPC, plant: Callable, objective: Objective, x0: Any, num_steps: int, learn: Where | None,
    outside: bool = False,
) -> Bench:  # fmt: skip
    """A bench from the arguments of `tune`. Fails: `ValueError` for wrong ones."""
    if not isinstance(controller, MPC):
        raise ValueError(f"controller must be a sartor.MPC, not {type(controller).__name__}.")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must be a sartor.Objective, not {type(objective).__name__}.")
    if not objective.penalty > 0:
        raise ValueError(f"objective.penalty must be positive, not {objective.penalty}.")
    if np.ndim(x0) != 1 or not np.isfinite(np.asarray(x0)).all():
        raise ValueError("x0 must be one finite state, (nx,).")
    if not num_steps >= 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}.")
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, controller.theta)
    controller = eqx.tree_at(lambda c: c.theta, controller, theta)
    x0 = jnp.asarray(x0, jnp.result_type(float))
    plant = _called(plant, x0) if outside else plant
    return Bench(controller, x0, objective, selected(theta, learn), num_steps, plant)


def _called(plant: Callable, x0: Array) -> Callable:
    """A function of NumPy arrays as a part of a compiled loop."""
    like = jax.ShapeDtypeStruct(x0.shape, x0.dtype)

    def call(x, u, k):
        x_next = np.asarray(plant(np.asarray(x), np.asarray(u), int(k)), x0.dtype)
        if x_next.shape != x0.shape:
            raise ValueError(f"plant must return a state {x0.shape}, as x0 is, not {x_next.shape}.")
        return x_next

    return lambda x, u, k: io_callback(call, like, x, u, k, ordered=True)
