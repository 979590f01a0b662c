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
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from sartor.models.integrate import RK4_PLACES, RK4_WEIGHTS, held, rk4
from sartor.models.links import RigidBody
from sartor.models.rigid_body import inverse_dynamics, inverse_root, mass_matrix, mass_solver, solve_acceleration
from sartor.models.torque_derivatives import TorqueHessian, torque_hessian, torque_jacobian


class AbstractModel(eqx.Module):
    """What a controller believes of its robot."""

    known: ClassVar[tuple[str, ...]] = ("body",)
    """Fields that are never trained."""
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

    def residual_jacobian(
        self, q: Array, qd: Array, qdd: Array, z: Array
    ) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
        """Jacobians of the residual in q [Nm/rad] and q̇ [Nm s/rad]; a model may write them out."""
        return jax.jacfwd(self.residual, (0, 1))(q, qd, qdd, z)

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

    def expand_step(
        self, x: Array, u: Array, k: Any, theta: Theta, lam: Array | None
    ) -> tuple[Float[Array, " nx"], Float[Array, "nx nw"], Float[Array, "nw nw"]]:
        """The next state, its Jacobian in w = [x; u], and ∂²(λᵀ x_next)/∂w² (D16), zero without λ.

        Accelerations are those of the model's torques (D12).
        """
        del k
        x_next, J, stages = _expand(x, u, theta, self.dt)
        if lam is None:
            return x_next, J, jnp.zeros((J.shape[1], J.shape[1]), J.dtype)
        return x_next, J, _contracted_hessian(stages, theta, lam, self.dt)


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


def trainable(model: eqx.Module, frozen: Sequence[str] = ()) -> PyTree:
    """Which leaves of a model are trained: all floating-point arrays but those of its fields `known` and `frozen`.

    Fails: `ValueError` if the model has no such field.
    """
    parts = [field.name for field in dataclasses.fields(model)]
    mask = jax.tree.map(eqx.is_inexact_array, model)
    for name in (*getattr(model, "known", ()), *frozen):
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


class _Stage(NamedTuple):
    """One of the four RK4 stages s = ode(y, u) of a step, with w = [x; u]; with a leading axis, all of them."""

    y: Float[Array, " 2*n"]
    """State [q, q̇] at which it is evaluated."""
    s: Float[Array, " 2*n"]
    """[q̇, q̈] there."""
    dy: Float[Array, "2*n 3*n"]
    """∂y/∂w."""
    ds: Float[Array, "2*n 3*n"]
    """∂s/∂w."""
    M: Float[Array, "n n"]
    """Mass matrix of robot and residual at y [kg m²]."""
    slope: Float[Array, "n 2*n"]
    """∂torque/∂(q, q̇)."""


def _expand(x: Array, u: Array, theta: Theta, dt: float) -> tuple[Array, Array, _Stage]:
    """One RK4 step, its Jacobian in w, and its stages: M dq̈ = du - ∂torque/∂(q, q̇) dy in each."""
    n = u.shape[0]
    place, weight = (dt * jnp.asarray(c, x.dtype) for c in (RK4_PLACES, RK4_WEIGHTS))
    eye = jnp.asarray(np.eye(3 * n), x.dtype)

    def stage(carry, place):
        s, ds = carry
        y, dy = x + place * s, eye[: 2 * n] + place * ds
        q, qd, (model, z) = y[:n], y[n:], held(theta[:2], y)
        M = _mass((model, z), q)
        solve = mass_solver(M)
        qdd = solve(u - model.torque(q, qd, jnp.zeros_like(q), z))
        body, residual = torque_jacobian(model.body, q, qd, qdd)[:2], model.residual_jacobian(q, qd, qdd, z)
        slope = jnp.concatenate([a + b for a, b in zip(body, residual, strict=True)], 1)
        s, ds = jnp.concatenate([qd, qdd]), jnp.concatenate([dy[n:], solve(eye[2 * n :] - slope @ dy)])
        return (s, ds), _Stage(y, s, dy, ds, M, slope)

    _, stages = jax.lax.scan(stage, (jnp.zeros_like(x), jnp.zeros((2 * n, 3 * n), x.dtype)), place)
    return x + weight @ stages.s, eye[: 2 * n] + jnp.tensordot(weight, stages.ds, 1), stages


def _contracted_hessian(stages: _Stage, theta: Theta, lam: Array, dt: float) -> Array:
    """∂²(λᵀ x_next)/∂w². The stages have adjoints c, and only q̈ bends: each contributes

    -Wᵀ ∂²(σᵀ torque) W,   W = ∂(q, q̇, q̈)/∂w,   M σ = the part of c that belongs to q̈
    """
    n = stages.M.shape[-1]
    places, weights = (dt * jnp.asarray(c, lam.dtype) for c in (RK4_PLACES, RK4_WEIGHTS))

    def back(carry, at):
        total, ahead = carry
        (y, s, dy, ds, M, slope), place, weight = at
        model, z = held(theta[:2], y)
        c = weight * lam + ahead
        sigma = mass_solver(M)(c[n:])
        motion = y[:n], y[n:], s[n:]
        body, residual = torque_hessian(model.body, *motion, sigma), model.residual_hessian(*motion, z, sigma)
        total = total - jax.tree.map(jnp.add, body, residual).times(dy[:n], dy[n:], ds[n:])
        return (total, place * (jnp.concatenate([jnp.zeros_like(sigma), c[:n]]) - sigma @ slope)), None

    start = (jnp.zeros((3 * n, 3 * n), lam.dtype), jnp.zeros_like(lam))
    return jax.lax.scan(back, start, (stages, places, weights), reverse=True)[0][0]


def _torque(known: tuple[AbstractModel, Array], q: Array, qd: Array, qdd: Array) -> Array:
    model, z = known
    return inverse_dynamics(model.body, q, qd, qdd) + model.residual(q, qd, qdd, z)


def _mass(known: tuple[AbstractModel, Array], q: Array) -> Array:
    model, z = known
    return mass_matrix(model.body, q) + model.residual_mass(q, z)
