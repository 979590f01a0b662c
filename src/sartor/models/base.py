"""Models of a robot: rigid-body dynamics plus a learned residual that knows the past through a context z.

    τ = inverse_dynamics(q, q̇, q̈) + residual(q, q̇, q̈, z),   z = context(history)                             (D12)

The history of control step t holds what the intervals before t say about what the rigid body leaves out: for interval
k the state in its middle and the torque that was applied, less that which the rigid body needs for the motion seen:

    (q̄, q̇̄, u_k - inverse_dynamics(q̄, q̇̄, (q̇_{k+1} - q̇_k)/dt)),   q̄ = (q_k + q_{k+1})/2,   q̇̄ likewise           (D13)

It needs the log of states and torques alone, so it is the same in pretraining, fine-tuning and the controller. Before
the first interval the robot is taken to have been at rest, with nothing left out.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sartor.models.integrate import rk4
from sartor.models.rigid_body import RigidBody, inverse_dynamics, mass_matrix, solve_acceleration


class AbstractModel(eqx.Module):
    """What a controller believes of its robot."""

    body: eqx.AbstractVar[RigidBody]
    """The nominal robot, known beforehand; never trained."""
    history_length: eqx.AbstractVar[int]
    """Number of past intervals that `context` looks at; 0 for none."""

    def context(self, history: Float[Array, "H 3*n"]) -> Float[Array, " nz"]:
        """z, from the history (D13), oldest interval first."""
        raise NotImplementedError

    def residual(self, q: Array, qd: Array, qdd: Array, z: Array) -> Float[Array, " n"]:
        """Torques beyond those of the nominal robot, linear in q̈ with the matrix `residual_mass` [Nm]."""
        raise NotImplementedError

    def residual_mass(self, q: Array, z: Array) -> Float[Array, "n n"]:
        """Inertia beyond that of the nominal robot, symmetric and positive semidefinite [kg m²]."""
        raise NotImplementedError

    def torque(self, q: Array, qd: Array, qdd: Array, z: Array) -> Float[Array, " n"]:
        """Torques for accelerations q̈ (D12) [Nm]."""
        return _torque((self, z), q, qd, qdd)

    def acceleration(self, q: Array, qd: Array, tau: Array, z: Array) -> Float[Array, " n"]:
        """Accelerations that torques cause: (D12) solved for q̈ [rad/s²]."""
        return solve_acceleration(q, qd, tau, (self, z), inverse=_torque, mass=_mass)


class Nominal(AbstractModel):
    """The rigid body alone."""

    body: RigidBody
    """The robot."""
    history_length: int = eqx.field(static=True, default=0)
    """No history."""

    def context(self, history: Array) -> Array:
        """Nothing, (0,)."""
        return jnp.zeros(0, history.dtype)

    def residual(self, q: Array, qd: Array, qdd: Array, z: Array) -> Array:
        """Zero."""
        return jnp.zeros_like(q)

    def residual_mass(self, q: Array, z: Array) -> Array:
        """Zero."""
        return jnp.zeros((q.shape[0], q.shape[0]), q.dtype)


class Theta(NamedTuple):
    """Parameters of the control problem of a robot that follows a reference."""

    model: Any
    """The model."""
    context: Any
    """Its context z, held over the horizon."""
    reference: Any
    """Reference states (N+1, 2n)."""


def arm_dynamics(dt: float) -> Any:
    """dynamics(x, u, k, theta) of a `Problem` with `Theta`: one RK4 step of x = [q, q̇] under the torques u.

    Args:
        dt: Time step in [s].
    """
    return rk4(_ode, dt)


def history(
    body: RigidBody, xs: Float[Array, "H_plus_1 2*n"], us: Float[Array, "H n"], dt: float
) -> Float[Array, "H 3*n"]:
    """The history (D13) of H intervals.

    Args:
        body: The nominal robot.
        xs: States [q, q̇] at the control instants.
        us: Torques between them [Nm].
        dt: Time between two of them [s].
    """
    n = body.nq
    middle = 0.5 * (xs[1:] + xs[:-1])
    q, qd, qdd = middle[:, :n], middle[:, n:], (xs[1:, n:] - xs[:-1, n:]) / dt
    needed = jax.vmap(lambda q, qd, qdd: inverse_dynamics(body, q, qd, qdd))(q, qd, qdd)
    return jnp.concatenate([middle, us - needed], -1)


def rest(q: Float[Array, " n"], length: int) -> Float[Array, "H 3*n"]:
    """The history of a robot that has been at rest at q, with nothing left out."""
    return jnp.tile(jnp.concatenate([q, jnp.zeros(2 * q.shape[0], q.dtype)]), (length, 1))


def trainable(model: AbstractModel) -> PyTree:
    """Which leaves of a model are trained: all floating-point arrays but those of `body`."""
    mask = jax.tree.map(eqx.is_inexact_array, model)
    return eqx.tree_at(lambda m: m.body, mask, jax.tree.map(lambda _: False, model.body))


def _ode(x: Array, u: Array, theta: Theta) -> Array:
    n = u.shape[0]
    return jnp.concatenate([x[n:], theta.model.acceleration(x[:n], x[n:], u, theta.context)])


def _torque(known: tuple[AbstractModel, Array], q: Array, qd: Array, qdd: Array) -> Array:
    model, z = known
    return inverse_dynamics(model.body, q, qd, qdd) + model.residual(q, qd, qdd, z)


def _mass(known: tuple[AbstractModel, Array], q: Array) -> Array:
    model, z = known
    return mass_matrix(model.body, q) + model.residual_mass(q, z)
