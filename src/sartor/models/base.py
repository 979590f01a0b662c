"""Models of a robot: rigid-body dynamics plus a learned residual that knows the past through a context z.

    τ = inverse_dynamics(q, q̇, q̈) + residual(q, q̇, q̈, z),   z = context(history)                             (D12)

The history of control step t holds what the intervals before t say about what the rigid body leaves out: for interval
k the state in its middle and the torque that was applied, less that which the rigid body needs for the motion seen:

    (q̄, q̇̄, u_k - inverse_dynamics(q̄, q̇̄, (q̇_{k+1} - q̇_k)/dt)),   q̄ = (q_k + q_{k+1})/2,   q̇̄ likewise           (D13)

It needs the log of states and torques alone, so it is the same in pretraining, fine-tuning and the controller. Before
the first interval the robot is taken to have been at rest, with nothing left out.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sartor.models.integrate import rk4
from sartor.models.rigid_body import (
    RigidBody,
    TorqueHessian,
    inverse_dynamics,
    inverse_root,
    mass_matrix,
    solve_acceleration,
    torque_hessian,
)


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

    def power(self, q: Array, qd: Array, qdd: Array, z: Array, sigma: Array) -> Float[Array, ""]:
        """σᵀ residual; a model may write it in another way that is cheaper to differentiate backwards."""
        return sigma @ self.residual(q, qd, qdd, z)

    def residual_hessian(self, q: Array, qd: Array, qdd: Array, z: Array, sigma: Array) -> TorqueHessian:
        """Second derivatives of σᵀ residual in q, q̇ and q̈; a model may write them out."""
        gradient = jax.grad(lambda q, qd, qdd: self.power(q, qd, qdd, z, sigma), (0, 1, 2))
        by_q = jax.jacfwd(gradient)(q, qd, qdd)
        by_qd = jax.jacfwd(lambda qd: gradient(q, qd, qdd)[1])(qd)
        return TorqueHessian(by_q[0], by_q[1].T, by_q[2].T, by_qd)

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


class ArmDynamics(eqx.Module):
    """dynamics(x, u, k, theta) of a `Problem` with `Theta`: one RK4 step of x = [q, q̇] under the torques u."""

    dt: float
    """Time step in [s]."""
    reverse: bool = eqx.field(static=True, default=False)
    """Gradients are to be taken backwards, as in training: cheaper there, but impossible forwards. Else both work, and
    Jacobians in x and u are cheap."""

    def __call__(self, x: Array, u: Array, k: Any, theta: Theta) -> Float[Array, " nx"]:
        """The next state."""
        return rk4(_ode_reverse if self.reverse else _ode, self.dt)(x, u, k, theta)

    def contracted_hessian(self, x: Array, u: Array, k: Any, theta: Theta, lam: Array) -> Float[Array, "nw nw"]:
        """∂²(λᵀ x_next)/∂w² for w = [x; u] (D16): by the second derivatives of torques, not of accelerations."""
        del k
        return _contracted_hessian(x, u, theta, lam, self.dt)


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


def trainable(model: AbstractModel, frozen: Sequence[str] = ()) -> PyTree:
    """Which leaves of a model are trained: all floating-point arrays but those of `body` and of the fields `frozen`.

    Fails: `ValueError` if the model has no such field.
    """
    parts = [field.name for field in dataclasses.fields(model)]
    mask = jax.tree.map(eqx.is_inexact_array, model)
    for name in ("body", *frozen):
        if name not in parts:
            raise ValueError(f"frozen names {name!r}, but a {type(model).__name__} has {parts}.")
        none = jax.tree.map(lambda _: False, getattr(model, name))
        mask = eqx.tree_at(operator.attrgetter(name), mask, none)
    return mask


def _ode(x: Array, u: Array, theta: Theta) -> Array:
    n = u.shape[0]
    return jnp.concatenate([x[n:], theta.model.acceleration(x[:n], x[n:], u, theta.context)])


def _ode_reverse(x: Array, u: Array, theta: Theta) -> Array:
    n = u.shape[0]
    return jnp.concatenate([x[n:], _acceleration((theta.model, theta.context, x[:n], x[n:], u))])


@eqx.filter_custom_vjp
def _acceleration(known: tuple) -> Array:
    """The acceleration, whose gradient is that of a power: g·dq̈ = σᵀ(dτ - d torque) with M σ = g."""
    model, z, q, qd, tau = known
    return model.acceleration(q, qd, tau, z)


@_acceleration.def_fwd
def _acceleration_fwd(perturbed: Any, known: tuple) -> tuple[Array, tuple[Array, Array]]:
    del perturbed
    model, z, q, qd, tau = known
    root = inverse_root(_mass((model, z), q))
    qdd = root.T @ (root @ (tau - model.torque(q, qd, jnp.zeros_like(q), z)))
    return qdd, (qdd, root)


@_acceleration.def_bwd
def _acceleration_bwd(kept: tuple, cotangent: Array, perturbed: Any, known: tuple) -> Any:
    qdd, root = kept
    sigma = root.T @ (root @ cotangent)
    free, fixed = eqx.partition(known, perturbed)

    def power(free):
        model, z, q, qd, tau = eqx.combine(free, fixed)
        needed = sigma @ inverse_dynamics(model.body, q, qd, qdd) + model.power(q, qd, qdd, z, sigma)
        return sigma @ tau - needed

    return jax.grad(power)(free)


def _contracted_hessian(x: Array, u: Array, theta: Theta, lam: Array, dt: float) -> Array:
    """The stages s_i = ode(y_i, u) of RK4 have adjoints c_i, and only q̈ bends: its contribution is

    -Wᵀ ∂²(σᵀ torque) W,   W = ∂(q, q̇, q̈)/∂(x, u) at stage i,   M σ = the part of c_i that belongs to q̈
    """
    n, (model, z) = u.shape[0], theta[:2]
    place = dt * jnp.asarray([0.0, 0.5, 0.5, 1.0], x.dtype)
    weight = dt * jnp.asarray([1.0, 2.0, 2.0, 1.0], x.dtype) / 6.0
    eye = jnp.eye(3 * n, dtype=x.dtype)

    def stage(carry, place):
        s, ds = carry
        y, dy = x + place * s, eye[: 2 * n] + place * ds

        def ode(w):
            s = _ode(w[: 2 * n], w[2 * n :], theta)
            return s, s

        J, s = jax.jacfwd(ode, has_aux=True)(jnp.concatenate([y, u]))
        ds = J[:, : 2 * n] @ dy + J[:, 2 * n :] @ eye[2 * n :]
        return (s, ds), (y, s[n:], dy, ds[n:], J)

    start = (jnp.zeros_like(x), jnp.zeros((2 * n, 3 * n), x.dtype))
    _, (ys, qdds, dys, dqdds, Js) = jax.lax.scan(stage, start, place)
    c, cs = jnp.zeros_like(x), []
    for i in reversed(range(4)):
        ahead = place[i + 1] * Js[i + 1, :, : 2 * n].T @ c if i < 3 else 0.0
        c = weight[i] * lam + ahead
        cs.append(c)
    sigmas = jnp.einsum("isu,is->iu", Js[:, n:, 2 * n :], jnp.stack(cs[::-1])[:, n:])

    def bend(y, qdd, dy, dqdd, sigma):
        q, qd = y[:n], y[n:]
        body, residual = torque_hessian(model.body, q, qd, qdd, sigma), model.residual_hessian(q, qd, qdd, z, sigma)
        return jax.tree.map(jnp.add, body, residual).times(dy[:n], dy[n:], dqdd)

    return -jnp.sum(jax.lax.map(lambda s: bend(*s), (ys, qdds, dys, dqdds, sigmas)), 0)


def _torque(known: tuple[AbstractModel, Array], q: Array, qd: Array, qdd: Array) -> Array:
    model, z = known
    return inverse_dynamics(model.body, q, qd, qdd) + model.residual(q, qd, qdd, z)


def _mass(known: tuple[AbstractModel, Array], q: Array) -> Array:
    model, z = known
    return mass_matrix(model.body, q) + model.residual_mass(q, z)
