"""The Panda with a CaDeLaC residual for acados, written in CasADi as a user would: plain automatic differentiation.

    M(q, z) q̈ = u - h(q, q̇, z),   M = ∂τ/∂q̈,   h = τ at q̈ = 0,
    τ = recursive Newton-Euler + d/dt ∂T/∂q̇ - ∂(T - P)/∂q,   T = ½ |Lᵀq̇|²,   (L, P) = networks of (cos q, sin q, z)

The parameters of the networks are constants of the generated code; z is a parameter, the reference part of the cost.
"""

from typing import Any

import numpy as np

from peers.acados import Acados
from problems import Problem
from sartor.models.lagrangian import CaDeLaC
from sartor.systems import panda

_DIAGONAL_SHIFT = 0.1


def real_time_iteration(model: CaDeLaC) -> Acados:
    """acados' solver of the MPC with this model; its theta is z. Fails: `PeerUnavailable`."""
    return Acados(problem(model), real_time=True)


def problem(model: CaDeLaC) -> Problem:
    """The problem of `sartor.systems.panda` with this model; the reference is given to `Acados.load`."""
    weights, n = np.array(panda.WEIGHTS), model.body.nq

    def ode(x, u, p, ca):
        q, qd, qdd, z = ca.vertcat(*x[:n]), ca.vertcat(*x[n:]), ca.SX.sym("qdd", n), ca.vertcat(*p)
        torques = inverse_dynamics(ca, model.body, q, qd, qdd) + residual(ca, model, q, qd, qdd, z)
        M, h = ca.jacobian(torques, qdd), ca.substitute(torques, qdd, ca.SX.zeros(n))
        root = ca.chol(M)  # M = rootᵀ root
        return [*x[n:], *ca.vertsplit(ca.solve(root, ca.solve(root.T, ca.vertcat(*u) - h)))]

    def no_draw(rng, batch):
        raise NotImplementedError("samples of this problem come from a closed loop.")

    return Problem(
        name="panda", horizon=panda.HORIZON, step=ode, ode=ode, dt=panda.DT,
        q=panda.DT * weights, r=panda.DT * np.array(panda.PENALTY), q_terminal=weights,
        u_min=-np.array(panda.U_MAX), u_max=np.array(panda.U_MAX), u_ref=np.zeros(n),
        x_ref=lambda theta: np.zeros(2 * n), theta=np.zeros(model.encoder.readout.out_features), draw=no_draw,
    )  # fmt: skip


def inverse_dynamics(ca: Any, body: Any, q: Any, qd: Any, qdd: Any) -> Any:
    """Torques of the arm by the recursive Newton-Euler algorithm, in the frames of the links, for a chain of hinges."""
    w, wd, a = ca.SX.zeros(3), ca.SX.zeros(3), ca.SX(-_plain(body.gravity))
    links = []
    for i in range(body.nq):
        axis, p, c = (_plain(part[i]) for part in (body.axes, body.positions, body.coms))
        m, I = float(body.masses[i]), _plain(body.inertias[i])
        R = ca.mtimes(_plain(body.rotations[i]), _turn(ca, axis, q[i]))
        a = ca.mtimes(R.T, a + ca.cross(wd, p) + ca.cross(w, ca.cross(w, p)))
        w, wd = ca.mtimes(R.T, w), ca.mtimes(R.T, wd)
        wd = wd + ca.cross(w, axis * qd[i]) + axis * qdd[i]
        w = w + axis * qd[i]
        force = m * (a + ca.cross(wd, c) + ca.cross(w, ca.cross(w, c)))
        moment = ca.mtimes(I, wd) + ca.cross(w, ca.mtimes(I, w)) + ca.cross(c, force)
        links.append((R, p, axis, force, moment))
    F, T, torques = ca.SX.zeros(3), ca.SX.zeros(3), []
    for R, p, axis, force, moment in reversed(links):
        F, T = F + force, T + moment
        torques.append(ca.dot(axis, T))
        F = ca.mtimes(R, F)
        T = ca.mtimes(R, T) + ca.cross(p, F)
    return ca.vertcat(*reversed(torques)) + _plain(body.armatures) * qdd + _plain(body.dampings) * qd


def residual(ca: Any, model: CaDeLaC, q: Any, qd: Any, qdd: Any, z: Any) -> Any:
    """Torques of the residual, the Euler-Lagrange equation by automatic differentiation."""
    n, features = model.body.nq, ca.vertcat(ca.cos(q), ca.sin(q), z)
    y, L = _network(ca, model.inertia, features), ca.SX.zeros(n, n)
    for i in range(n):
        L[i, i] = ca.log(1.0 + ca.exp(y[i])) + _DIAGONAL_SHIFT
    for entry, (i, j) in enumerate(zip(*np.tril_indices(n, -1), strict=True), n):
        L[int(i), int(j)] = y[entry]
    kinetic, potential = 0.5 * ca.sumsqr(ca.mtimes(L.T, qd)), _network(ca, model.potential, features)
    momentum = ca.gradient(kinetic, qd)
    rate = ca.jtimes(momentum, q, qd) + ca.jtimes(momentum, qd, qdd)
    return rate - ca.gradient(kinetic - potential, q)


def _network(ca: Any, network: Any, inputs: Any) -> Any:
    for layer in network.layers[:-1]:
        inputs = ca.tanh(ca.mtimes(np.array(layer.weight), inputs) + np.array(layer.bias))
    return ca.mtimes(np.array(network.layers[-1].weight), inputs) + np.array(network.layers[-1].bias)


def _turn(ca: Any, axis: np.ndarray, angle: Any) -> Any:
    """Rotation about an axis (Rodrigues)."""
    K = np.cross(np.eye(3), axis)
    return np.eye(3) + ca.sin(angle) * K + (1.0 - ca.cos(angle)) * (K @ K)


def _plain(array: Any) -> np.ndarray:
    """As numpy, with exact zeros, which CasADi then leaves out."""
    array = np.array(array)
    return np.where(np.abs(array) < 1e-12, 0.0, array)
