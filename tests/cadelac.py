"""The arm with a learned Lagrangian residual of tests/golden/GOLDEN.md, as plain as it can be written."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sartor

DATA = dict(np.load(Path(__file__).parent / "golden" / "cadelac.npz"))
DT, HORIZON = 0.02, 12
ROWS, COLUMNS = DATA["tril_rows"].astype(int), DATA["tril_cols"].astype(int)


def _rotation(quaternion):
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


FRAMES = np.stack([_rotation(q) for q in DATA["nom_frame_quat_wxyz"]])
INERTIAS = DATA["nom_inertia"][:, [[0, 3, 4], [3, 1, 5], [4, 5, 2]]]


def inverse_dynamics(q, qd, qdd):
    """Newton-Euler recursion of the nominal chain: torques [Nm] of joint accelerations qdd."""
    axis = jnp.array([0.0, 0.0, 1.0])

    def outward(carry, link):
        w, wd, a = carry
        R, p, q, qd, qdd, mass, com, inertia = link
        c, s, zero, one = jnp.cos(q), jnp.sin(q), 0.0 * q, 1.0 + 0.0 * q
        E = (R @ jnp.stack([jnp.stack([c, -s, zero]), jnp.stack([s, c, zero]), jnp.stack([zero, zero, one])])).T
        a = E @ (a + jnp.cross(wd, p) + jnp.cross(w, jnp.cross(w, p)))
        wd = E @ wd + axis * qdd + jnp.cross(E @ w, axis * qd)
        w = E @ w + axis * qd
        force = mass * (a + jnp.cross(wd, com) + jnp.cross(w, jnp.cross(w, com)))
        return (w, wd, a), (E, force, inertia @ wd + jnp.cross(w, inertia @ w))

    links = (FRAMES, DATA["nom_frame_pos"], q, qd, qdd, DATA["nom_mass"], DATA["nom_com"], INERTIAS)
    begin = (jnp.zeros(3), jnp.zeros(3), jnp.array([0.0, 0.0, 9.81]))
    _, (E, forces, moments) = jax.lax.scan(outward, begin, jax.tree.map(jnp.asarray, links))

    def inward(carry, link):
        E, force, moment, com, p = link
        f, n = carry[0] + force, carry[1] + moment + jnp.cross(com, force)
        return (E.T @ f, E.T @ n + jnp.cross(p, E.T @ f)), n[2]

    chain = (E, forces, moments, jnp.asarray(DATA["nom_com"]), jnp.asarray(DATA["nom_frame_pos"]))
    _, tau = jax.lax.scan(inward, (jnp.zeros(3), jnp.zeros(3)), chain, reverse=True)
    return tau + DATA["armature"] * qdd


def network(name, a):
    for i in (1, 2):
        a = jnp.tanh(DATA[f"net_{name}_W{i}"] @ a + DATA[f"net_{name}_b{i}"])
    return DATA[f"net_{name}_W3"] @ a + DATA[f"net_{name}_b3"]


def residual_inertia(q, z):
    y = network("inertia", jnp.concatenate([jnp.cos(q), jnp.sin(q), z]))
    lower = jnp.concatenate([jax.nn.softplus(y[:7]) + 0.1, y[7:]])
    L = jnp.zeros((7, 7)).at[ROWS, COLUMNS].set(lower)
    return L @ L.T


def accelerations(q, qd, u, z):
    """qdd of (M_nom + H_res) qdd + h_nom + h_res = u."""
    rolling = inverse_dynamics(q, 0.0 * qd, 0.0 * qd)
    M = jax.vmap(lambda e: inverse_dynamics(q, 0.0 * qd, e) - rolling)(jnp.eye(7))
    H, H_dot = jax.jvp(lambda q: residual_inertia(q, z), (q,), (qd,))
    potential = lambda q: network("potential", jnp.concatenate([jnp.cos(q), jnp.sin(q), z]))[0]
    energy = lambda q: 0.5 * qd @ residual_inertia(q, z) @ qd - potential(q)
    return jnp.linalg.solve(M + H, u - inverse_dynamics(q, qd, 0.0 * qd) - H_dot @ qd + jax.grad(energy)(q))


def step(x, u, z):
    """One RK4 step; its stages as a scan, since compiling them four times is most of the test's time."""

    def stage(carry, coefficients):
        slope, total = carry
        ahead, weight = coefficients
        at = x + ahead * DT * slope
        slope = jnp.concatenate([at[7:], accelerations(at[:7], at[7:], u, z)])
        return (slope, total + weight * slope), None

    stages = (jnp.array([0.0, 0.5, 0.5, 1.0]), jnp.array([1.0, 2.0, 2.0, 1.0]) / 6.0)
    (_, total), _ = jax.lax.scan(stage, (0.0 * x, 0.0 * x), stages)
    return x + DT * total


def problem():
    """theta is (context z, reference (13, 14))."""
    Q, R = jnp.asarray(DATA["Q"]), jnp.asarray(DATA["R"])

    def stage_cost(x, u, k, theta):
        e = x - theta[1][k]
        return 0.5 * DT * (e @ (Q * e) + u @ (R * u))

    def terminal_cost(x, theta):
        e = x - theta[1][HORIZON]
        return 0.5 * e @ (Q * e)

    return sartor.Problem(
        dynamics=lambda x, u, k, theta: step(x, u, theta[0]),
        stage_cost=stage_cost,
        terminal_cost=terminal_cost,
        horizon=HORIZON,
        u_min=-DATA["u_max"],
        u_max=DATA["u_max"],
    )
