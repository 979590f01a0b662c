"""A Franka Panda with torque motors that carries an unknown payload along a reference.

    x = [q (7) [rad], q̇ (7) [rad/s]],   u = torques (7) in [Nm], |u| ≤ (87 ×4, 12 ×3)
    ℓ = dt/2 (|x - r_k|²_Q + |u|²_R),   ℓ_N = ½ |x - r_N|²_Q,   r_k = θ.reference[k]
    Q = diag(1000 ×4, 500 ×3, 100 ×4, 50 ×3),   R = diag(0.2 ×4, 1 ×3)

References are Fourier series of five harmonics in 10 s that start at rest (w = 2π/10 s):

    q(t) = q₀ + Σ_k (A_k sin kwt - B_k cos kwt)/(kw)

The robot is panda.xml; the true system is MuJoCo (`mj_model`, `sartor.plant`). The dynamics of the problem are an
argument: any model of the robot.

Sources: Schulze et al., Context-Aware Deep Lagrangian Networks for Model Predictive Control, 2025, and its code, for
the controller, the payloads and the references; Węgrzynowski et al., Learning What Matters, eq. (7), for the tracking
cost, with these weights, which it does not print; Gaz et al., Dynamic Identification of the Franka Emika Panda Robot
with Retrieval of Feasible Parameters, 2019, for the robot.
"""

# MuJoCo is compiled and has no type stubs.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import mujoco
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike, NDArray

from sartor.problem import Problem
from sartor.systems import arm

Control = Float[Array, "7"]

DT = 0.02  # [s]
HORIZON = 12
STATES = tuple(f"{name}{i + 1} [{unit}]" for name, unit in (("q", "rad"), ("q̇", "rad/s")) for i in range(7))
CONTROLS = tuple(f"torque {i + 1} [Nm]" for i in range(7))
U_MAX = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)  # [Nm]
WEIGHTS = (1000.0,) * 4 + (500.0,) * 3 + (100.0,) * 4 + (50.0,) * 3  # diagonal of Q
PENALTY = (0.2,) * 4 + (1.0,) * 3  # diagonal of R
START = (0.0, -0.4, 0.0, -2.4, 0.0, 2.2, -0.7853)  # q₀ [rad]
Q_MIN = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)  # [rad]
Q_MAX = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
V_MAX = 2.0  # speed limit of the references [rad/s]
PERIOD = 10.0  # of the references [s]
DAMPING = 1.0  # of the true joints [Nms/rad]; no model knows it
# Noise of a history's rows (q, q̇, torque left out) in training, as published: square roots of its variances.
HISTORY_NOISE = (0.0,) * 7 + (0.032,) * 7 + (1.0, 0.71, 1.0, 0.63, 0.14, 0.17, 0.14)
OFFSET_MAX, MASS_MAX = 0.3, 4.0  # of the payloads, [m] and [kg]
INERTIA = 0.001  # of a payload about its centre of mass [kg m²]
_HARMONICS = np.arange(1, 6) * 2.0 * np.pi / PERIOD  # kw [rad/s]
_SPEEDS = (2.0, 3.5256, 5.7946, 3.0020, 5.7946, 3.7700, 5.7946)  # |A|, |B| ≤ a tenth of these [rad/s]
_TRIES = 256  # references drawn at a time; part of what a seed means


class Payload(NamedTuple):
    """A small heavy box at the end effector."""

    mass: float
    """[kg]"""
    offset: tuple[float, float, float]
    """Of its centre of mass, along the axes of the end effector [m]."""


def payloads(count: int = 130, seed: int = 0) -> list[Payload]:
    """Random payloads in the published order of draws: 0 to 99 are for training, from 100 on for evaluation.

    Offset ~ U(-0.3, 0.3)³ m, mass ~ U(0, 4) kg. A longer list begins with the shorter one.
    """
    rng = np.random.RandomState(seed)  # numpy's legacy generator, as published
    draws = []
    for _ in range(count):
        x, y, z = rng.uniform(-OFFSET_MAX, OFFSET_MAX, 3).tolist()
        draws.append(Payload(rng.uniform(0.0, MASS_MAX), (x, y, z)))
    return draws


def mj_model(payload: Payload | None = None, damping: float = DAMPING) -> mujoco.MjModel:
    """The robot, compiled by MuJoCo.

    Args:
        payload: None for the empty hand, as in the nominal model.
        damping: Of every joint in [Nms/rad]; 0 for a model that does not know it.
    """
    xml = resources.files("sartor.systems").joinpath("panda.xml").read_text(encoding="utf-8")
    spec = mujoco.MjSpec.from_string(xml)
    if payload is not None:
        if not payload.mass > 0 or not np.isfinite([payload.mass, *payload.offset]).all():
            raise ValueError(f"payload must have a positive mass and a finite offset, or be None, not {payload}.")
        body, box = spec.body("ee_box"), spec.geom("ee_box")
        body.mass, body.ipos, body.inertia, body.explicitinertial = payload.mass, payload.offset, [INERTIA] * 3, True
        box.pos, box.group = payload.offset, 0  # drawn where the mass is
    compiled = spec.compile()
    compiled.dof_damping[:] = damping
    return compiled


class Reference(NamedTuple):
    """Fourier coefficients of references; a leading axis for several."""

    q0: NDArray[np.float64]
    """(..., 7), posture at t = 0 [rad]."""
    A: NDArray[np.float64]
    """(..., 5, 7), harmonic first [rad/s]."""
    B: NDArray[np.float64]
    """(..., 5, 7) [rad/s]."""


def references(seed: Any, count: int, *, v_max: float = V_MAX, max_tries: int = 10_000) -> Reference:
    """Random references that start at rest in `START`, without acceleration.

    Drawn at random, and rejected unless all joints stay within their ranges and |q̇| ≤ `v_max` at 100 Hz: about one
    in 320 is accepted. A longer batch begins with the shorter one.

    Args:
        seed: An integer, or a `numpy.random.Generator`, which is advanced.
        count: Number of references.
        v_max: Speed limit [rad/s].
        max_tries: Draws for each reference, on average over the batch.

    Returns: the references, with a leading axis.
    Fails: `ValueError` if fewer than `count` have been accepted after `count * max_tries` draws.
    """
    rng = np.random.default_rng(seed)
    accepted, num_accepted, num_tries = [], 0, 0
    while num_accepted < count:
        if num_tries >= count * max_tries:
            raise ValueError(
                f"only {num_accepted} of {count} references were accepted in {num_tries} tries:"
                f" allow a higher v_max ({v_max} rad/s) or more max_tries ({max_tries})."
            )
        drawn = _draw(rng, min(_TRIES, count * max_tries - num_tries))
        num_tries += len(drawn.q0)
        for stride in (25, 1):  # most are rejected by a few of the samples
            drawn = _select(drawn, _within_limits(drawn, np.arange(0.0, PERIOD, 0.01 * stride), v_max))
        accepted.append(drawn)
        num_accepted += len(drawn.q0)
    q0, A, B = (np.concatenate(parts)[:count] for parts in zip(*accepted, strict=True))
    return Reference(q0, A, B)


def reference_at(
    reference: Reference, times: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Position, velocity and acceleration of references at times (T,) in [s], which repeat after 10 s.

    Returns: q [rad], q̇ [rad/s], q̈ [rad/s²], each (..., T, 7).
    """
    phase = np.asarray(times, float)[:, None] * _HARMONICS  # (T, 5)
    sin, cos = np.sin(phase), np.cos(phase)
    q = reference.q0[..., None, :] + (sin / _HARMONICS) @ reference.A - (cos / _HARMONICS) @ reference.B
    qd = cos @ reference.A + sin @ reference.B
    qdd = (cos * _HARMONICS) @ reference.B - (sin * _HARMONICS) @ reference.A
    return q, qd, qdd


def sample_reference(reference: Reference, num_steps: int, horizon: int = HORIZON) -> NDArray[np.float64]:
    """Rows [q, q̇] at the control instants of an episode and of the last plan, (..., num_steps + horizon + 1, 14).

    Rows k to k + horizon are `theta.reference` of control step k.
    """
    q, qd, _ = reference_at(reference, DT * np.arange(num_steps + horizon + 1))
    return np.concatenate([q, qd], axis=-1)


def problem(dynamics: Callable, horizon: int = HORIZON) -> Problem:
    """The optimal control problem over `horizon` stages of 0.02 s; `arm.problem` has the cost.

    Args:
        dynamics: dynamics(x, u, k, theta) -> x_next (14,), the model.
        horizon: N; theta.reference has N + 1 rows.
    """
    limits = {"u_min": [-u for u in U_MAX], "u_max": U_MAX}
    return arm.problem(dynamics, Q=WEIGHTS, R=PENALTY, **limits, dt=DT, horizon=horizon)


def _draw(rng: np.random.Generator, count: int) -> Reference:
    """Candidates: uniform coefficients, of which A_5, B_1 and B_2 follow so that all starts at rest in q₀.

    q̇(0) = 0: Σ A_k = 0;   q(0) = q₀: Σ B_k/k = 0;   q̈(0) = 0: Σ k B_k = 0
    """
    A, B = 0.1 * np.asarray(_SPEEDS) * rng.uniform(-1.0, 1.0, (count, 2, 5, 7)).swapaxes(0, 1)
    A[:, 4] = -A[:, :4].sum(axis=1)
    k = np.arange(3, 6)[:, None]
    by_k, times_k = (B[:, 2:] / k).sum(axis=1), (B[:, 2:] * k).sum(axis=1)
    B[:, 1] = (by_k - times_k) / 1.5
    B[:, 0] = -by_k - B[:, 1] / 2.0
    return Reference(np.tile(START, (count, 1)), A, B)


def _within_limits(reference: Reference, times: NDArray[np.float64], v_max: float) -> NDArray[np.bool_]:
    q, qd, _ = reference_at(reference, times)
    return np.all((q >= Q_MIN) & (q <= Q_MAX) & (np.abs(qd) <= v_max), axis=(-2, -1))


def _select(reference: Reference, which: NDArray[np.bool_]) -> Reference:
    return Reference(*(coefficients[which] for coefficients in reference))
