"""First and second derivatives of the torques (D11) of a robot, by analytical formulas.

    ∂τ/∂q, ∂τ/∂q̇, ∂τ/∂q̈ = M;   ∂²(σᵀτ)/∂(q, q̇, q̈)² for constant σ                                            (D16)

References: Singh, Russell and Wensing, Efficient Analytical Derivatives of Rigid-Body Dynamics Using Spatial Vector
Algebra, 2022.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sartor.models.links import (
    Motion,
    RigidBody,
    eye,
    momenta_and_forces,
    move,
    path_sums,
    products,
    subtree_sums,
    table_of,
)  # fmt: skip
from sartor.models.spatial import (
    Inertia,
    Spatial,
    Symmetric,
    add,
    cross,
    force_cross,
    motion_cross,
    scale,
    sub,
)  # fmt: skip


def torque_jacobian(
    body: RigidBody, q: Float[Array, " n"], qd: Float[Array, " n"], qdd: Float[Array, " n"]
) -> tuple[Float[Array, "n n"], Float[Array, "n n"], Float[Array, "n n"]]:
    """Jacobians of inverse_dynamics(body, q, q̇, q̈) in q, q̇ and q̈, by the analytical formulas.

    Args:
        body: The robot.
        q: Positions [rad or m].
        qd: Velocities.
        qdd: Accelerations.
    """
    return _partials(body, move(body, q, qd, qdd))


class TorqueHessian(NamedTuple):
    """Second derivatives of σᵀτ(q, q̇, q̈) for constant σ; those that are missing are zero, as τ is linear in q̈."""

    q_q: Float[Array, "n n"]
    q_qd: Float[Array, "n n"]
    """Row i, column j: ∂²/∂q_i ∂q̇_j."""
    q_qdd: Float[Array, "n n"]
    qd_qd: Float[Array, "n n"]

    def times(self, dq: Array, dqd: Array, dqdd: Array) -> Float[Array, "m m"]:
        """Wᵀ (Hessian) W for the rows W = [dq; dqd; dqdd], (n, m) each."""
        upper = jnp.concatenate([0.5 * self.q_q, self.q_qd, self.q_qdd], 1)
        lower = jnp.concatenate([jnp.zeros_like(self.q_q), 0.5 * self.qd_qd, jnp.zeros_like(self.q_q)], 1)
        # Two products of whole blocks: in a batch each product of small matrices costs a call.
        mixed = jnp.concatenate([dq, dqd]).T @ (jnp.concatenate([upper, lower]) @ jnp.concatenate([dq, dqd, dqdd]))
        return mixed + mixed.T


def torque_hessian(
    body: RigidBody, q: Float[Array, " n"], qd: Float[Array, " n"], qdd: Float[Array, " n"], sigma: Float[Array, " n"]
) -> TorqueHessian:
    """Second derivatives of σᵀ inverse_dynamics(body, q, q̇, q̈) for constant σ, by the analytical formulas (D16).

    Args:
        body: The robot.
        q: Positions [rad or m].
        qd: Velocities.
        qdd: Accelerations.
        sigma: σ, such as M⁻¹ times the adjoint of the accelerations.

    Returns: blocks (n, n), in units of στ over those of the two variables.
    """
    motion = move(body, q, qd, qdd)
    V_sigma = path_sums(body, scale(sigma, motion.S))
    return _second_partials(body, motion, V_sigma)


def _partials(body: RigidBody, motion: Motion) -> tuple[Array, Array, Array]:
    """∂τ/∂q, ∂τ/∂q̇, ∂τ/∂q̈ (Singh et al., 2022), with B of a link ½((V ×*) I - I (V ×) + (I V) ×̄*) and its sum B^C."""
    S, inertia, V, V0, _, A0 = motion
    psi_dot, S_dot = motion_cross(V0, S), motion_cross(V, S)
    psi_ddot = add(motion_cross(A0, S), motion_cross(V0, psi_dot))
    psi_mean = add(psi_dot, S_dot)
    momentum, force = momenta_and_forces(motion)
    # 2B has one block of its own, rate - momentum.w ×, and -2 momentum.v ×: all else cancels.
    inertia, rate, momentum, force = subtree_sums(body, (inertia, _rate(inertia, V), momentum, force))
    B_times = lambda X: _turning(rate, momentum, X)
    S_B = add(rate.times(S.w), cross(momentum.w, S.w), scale(2.0, cross(momentum.v, S.v)))
    S_I = inertia.times(S)
    q_above = add(B_times(psi_dot), inertia.times(psi_ddot), force_cross(S, force))
    qd_above = add(B_times(S), inertia.times(psi_mean))
    zero = jax.tree.map(jnp.zeros_like, S.w)
    lower = products((S_B, S_I), [(psi_dot.w, psi_ddot), (S.w, psi_mean), (zero, S)])
    upper = products(S, [q_above, qd_above, S_I])
    dq, dqd, dqdd = (table_of(body, *pair) for pair in zip(lower, upper, strict=True))
    return dq, dqd + eye(body) * body.dampings, dqdd + eye(body) * body.armatures


def _second_partials(body: RigidBody, motion: Motion, V_sigma: Spatial) -> TorqueHessian:
    """Second derivatives of Σ_i Vσ_i · f_i, the power of the forces f_i of the links along Vσ (D16).

    A link sees q_k, q̇_k or q̈_k of a joint k before it through one triple (δVσ, δA, δV) that is the same for all links,
    and so does a joint behind k: every entry is a product of the triple of the joint before with a triple of sums over
    the links of the joint behind.
    """
    S, inertia, V, _, A, _ = motion
    psi_dot, rho = motion_cross(V, S), motion_cross(V_sigma, S)
    psi_ddot = add(motion_cross(A, S), motion_cross(V, psi_dot))
    momentum, force = momenta_and_forces(motion)
    pull = inertia.times(V_sigma)
    bent = sub(force_cross(V, pull), add(force_cross(V_sigma, momentum), inertia.times(motion_cross(V, V_sigma))))
    inertia, rate, rate_sigma, momentum, force, pull, bent = subtree_sums(
        body, (inertia, _rate(inertia, V), _rate(inertia, V_sigma), momentum, force, pull, bent)
    )
    B = lambda X: _turning(rate, momentum, X)
    B_sigma = lambda X: _turning(rate_sigma, pull, X)
    B_rho = add(rate.times(rho.w), cross(momentum.w, rho.w), scale(2.0, cross(momentum.v, rho.v)))  # Bᵀ ρ
    S_pull = force_cross(S, pull)
    I_S, still = inertia.times(S), jax.tree.map(jnp.zeros_like, rho.w)
    # By the joint behind: what δVσ, δA and δV of the joint before are multiplied with, for q, q̇ and q̈ behind.
    q_sigma = add(inertia.times(psi_ddot), B(psi_dot), force_cross(S, force))
    q_A = add(inertia.times(rho), S_pull)
    q_V = sub(add(scale(2.0, force_cross(psi_dot, pull)), force_cross(S, bent)), B_sigma(psi_dot))
    q_V = q_V._replace(w=add(q_V.w, B_rho))
    qd_sigma = add(scale(2.0, inertia.times(psi_dot)), B(S))
    qd_V = sub(scale(2.0, S_pull), B_sigma(S))
    zero = Spatial(still, still)
    (qq, q_qd, q_qdd), (qd_q, qd_qd, _), (qdd_q, _, _) = (
        products(before, [(q_sigma, q_A, q_V), (qd_sigma, zero, qd_V), (I_S, zero, zero)])
        for before in ((rho, psi_ddot, psi_dot), (zero, scale(2.0, psi_dot), S), (zero, S, zero))
    )
    tables = ((qq.T, qq), (qd_q.T, q_qd), (qdd_q.T, q_qdd), (qd_qd.T, qd_qd))
    return TorqueHessian(*(table_of(body, lower, upper) for lower, upper in tables))


def _turning(rate: Symmetric, momentum: Spatial, X: Spatial) -> Spatial:
    """2B X = I(X × V) + X ×* IV + V ×* IX, summed over links with the same X."""
    return Spatial(sub(rate.times(X.w), cross(momentum.w, X.w)), scale(2.0, cross(X.w, momentum.v)))


def _rate(inertia: Inertia, V: Spatial) -> Symmetric:
    """Rate of the second moment of a link that moves: ω× I - I ω× - v× h× - h× v×."""
    (x, y, z), I, h, v = V.w, inertia.I, inertia.h, V.v
    hv = sum(a * b for a, b in zip(h, v, strict=True))
    return Symmetric(
        2.0 * (y * I.xz - z * I.xy + hv - h.x * v.x),
        2.0 * (z * I.xy - x * I.yz + hv - h.y * v.y),
        2.0 * (x * I.yz - y * I.xz + hv - h.z * v.z),
        z * (I.xx - I.yy) + y * I.yz - x * I.xz - h.x * v.y - h.y * v.x,
        y * (I.zz - I.xx) + x * I.xy - z * I.yz - h.x * v.z - h.z * v.x,
        x * (I.yy - I.zz) + z * I.xz - y * I.xy - h.y * v.z - h.z * v.y,
    )
