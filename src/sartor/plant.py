"""The true system: robots that MuJoCo simulates, many at a time; the only module that simulates with it.

x_{k+1} = MuJoCo(x_k, u_k): u_k held for dt, x = [q, qd], several of MuJoCo's own timesteps to one control step
"""

# MuJoCo is compiled and has no type stubs.
# pyright: reportAttributeAccessIssue=false

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SPEED = 1000.0  # [rad/s] or [m/s]; a joint beyond it has left what a robot can do: its plant has diverged
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # with the warm start of the constraint solver
_ONE_DEGREE = {int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)}
# What <motor joint="..."/> compiles to: transmission, gain, bias and dynamics such that force = control.
_TO_JOINT, _FIXED = int(mujoco.mjtTrn.mjTRN_JOINT), int(mujoco.mjtGain.mjGAIN_FIXED)
_MOTOR = (_TO_JOINT, _FIXED, int(mujoco.mjtBias.mjBIAS_NONE), int(mujoco.mjtDyn.mjDYN_NONE))
# All by which MuJoCo says that it has met a bad state or control, and has replaced it.
_BAD = [int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}")) for name in ("QPOS", "QVEL", "QACC", "CTRL")]


class PlantState(NamedTuple):
    """Everything on which the future of a batch of plants depends, and what they show of the present."""

    integration: NDArray[np.float64]
    """(B, ...), MuJoCo's own state, mjSTATE_INTEGRATION."""
    xs: NDArray[np.float64]
    """(B, 2 nq)."""
    us: NDArray[np.float64]
    """(B, nu)."""
    qdd: NDArray[np.float64]
    """(B, nq)."""
    diverged: NDArray[np.bool_]
    """(B,)."""
    num_steps: int
    """Control steps since the last reset."""

    def take(self, indices: ArrayLike) -> "PlantState":
        """The state of the chosen plants, in this order; an index may be repeated."""
        i = np.asarray(indices, int)
        now = self.xs[i], self.us[i], self.qdd[i], self.diverged[i]
        return PlantState(self.integration[i], *now, self.num_steps)


class Plants:
    """A batch of robots that MuJoCo steps together, on threads.

    Any robot with a fixed base, hinge and slide joints, and one motor (torque or force) for each joint, in the order
    of the joints. The models may differ, in a payload for instance, but not in the number of joints or the timestep.
    They are used, not copied: do not change them. A plant gives the same numbers to the last bit in any batch and on
    any number of threads.

    A plant diverges where a joint is faster than `MAX_SPEED` or MuJoCo warns of a bad state or a huge control. It is
    then frozen in its last good state and flagged in `diverged`, until `reset` or `restore`; the others go on.
    """

    def __init__(self, mj_models: Sequence[mujoco.MjModel], dt: float, num_threads: int | None = None):
        """
        Args:
            mj_models: One model for each plant; one may be there several times.
            dt: Control step in [s], a multiple of the timestep of the models.
            num_threads: Defaults to the number of cores that this process may use.

        Fails: `ValueError` for a model that is no fixed-base robot with one motor a joint, or a `dt` that does not fit.
        """
        self._models = list(mj_models)
        if not self._models:
            raise ValueError("mj_models is empty: give one MjModel for each plant.")
        for i, mj_model in enumerate(self._models):
            _check_model(mj_model, f"mj_models[{i}]")
        self.nq = self._models[0].nq
        if any(m.nq != self.nq for m in self._models):
            raise ValueError(f"mj_models differ in their number of joints: {sorted({m.nq for m in self._models})}.")
        self.dt = float(dt)
        self.num_substeps = _num_substeps(self.dt, [m.opt.timestep for m in self._models])
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}.")
        self.num_threads = num_threads or _num_cores()
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None
        self._chunks = np.array_split(np.arange(len(self._models)), min(self.num_threads, len(self._models)))
        self._data = [mujoco.MjData(m) for m in self._models]
        self.u_min, self.u_max = (np.stack([_control_range(m)[side] for m in self._models]) for side in (0, 1))
        self.reset(np.stack([np.concatenate([m.qpos0, np.zeros(self.nq)]) for m in self._models]))

    def __len__(self) -> int:
        """B, the number of plants."""
        return len(self._models)

    @property
    def xs(self) -> NDArray[np.float64]:
        """States [q, qd], (B, 2 nq), read-only; of a diverged plant the last good one."""
        return self._xs

    @property
    def us(self) -> NDArray[np.float64]:
        """Controls of the last interval as they were applied, (B, nu), read-only; zero after a reset."""
        return self._us

    @property
    def qdd(self) -> NDArray[np.float64]:
        """Joint accelerations at the beginning of the last interval, (B, nq), read-only; zero after a reset.

        MuJoCo's qacc of the first timestep: forces of dampers and joint limits are in it.
        """
        return self._qdd

    @property
    def diverged(self) -> NDArray[np.bool_]:
        """Which plants are frozen, (B,), read-only."""
        return self._diverged

    @property
    def time(self) -> float:
        """Time since the last reset in [s]."""
        return self._num_steps * self.dt

    def reset(self, xs: ArrayLike) -> NDArray[np.float64]:
        """Put every plant into the state [q, qd] of its row of xs (B, 2 nq), at time zero. Returns the states."""
        xs = _rows(xs, "xs", (len(self), 2 * self.nq))
        if bad := _not_finite(xs):
            raise ValueError(f"xs is not finite for plant {bad}: give finite positions and velocities.")
        for mj_model, data, x in zip(self._models, self._data, xs, strict=True):
            _place(mj_model, data, x)
        nothing = np.zeros((len(self), self.nq))
        self._show(xs, nothing, nothing, np.zeros(len(self), bool), 0)
        return self._xs

    def step(self, us: ArrayLike) -> NDArray[np.float64]:
        """Hold the controls for dt.

        Args:
            us: Controls (B, nu) in [Nm] or [N], clipped here to the control range of each motor.

        Returns: the states after the step, (B, 2 nq), read-only.
        Fails: `ValueError` where the control of a plant that has not diverged is not finite; nothing has moved then.
        """
        us = _rows(us, "us", (len(self), self.nq))
        us = np.where(self._diverged[:, None], self._us, us)
        if bad := _not_finite(us):
            raise ValueError(f"us is not finite for plant {bad}: the controller has to decide what to apply.")
        us = np.clip(us, self.u_min, self.u_max)
        xs, qdd, diverged = self._xs.copy(), self._qdd.copy(), self._diverged.copy()

        def advance(chunk: NDArray[np.intp]) -> None:
            for i in chunk:
                if not diverged[i]:
                    diverged[i] = not _advance(self._models[i], self._data[i], us[i], self.num_substeps, xs[i], qdd[i])

        with _without_log():
            list((self._pool.map if self._pool else map)(advance, self._chunks))
        self._show(xs, us, qdd, diverged, self._num_steps + 1)
        return self._xs

    def snapshot(self) -> PlantState:
        """The present, from which `restore` repeats the future to the last bit."""
        integration = np.empty((len(self), mujoco.mj_stateSize(self._models[0], int(_STATE))))
        for mj_model, data, row in zip(self._models, self._data, integration, strict=True):
            mujoco.mj_getState(mj_model, data, row, int(_STATE))
        return PlantState(integration, self._xs, self._us, self._qdd, self._diverged, self._num_steps)

    def restore(self, state: PlantState) -> None:
        """Go back to a snapshot of these plants, or of others with the same models in the same order."""
        size = mujoco.mj_stateSize(self._models[0], int(_STATE))
        if state.integration.shape != (len(self), size) or state.xs.shape[1] != 2 * self.nq:
            raise ValueError(
                f"state is one of {len(state.xs)} plants with {state.xs.shape[1] // 2} joints, but here are {len(self)}"
                f" with {self.nq}: restore a snapshot of plants with these models, or its `take`."
            )
        for mj_model, data, row in zip(self._models, self._data, state.integration, strict=True):
            mujoco.mj_resetData(mj_model, data)
            mujoco.mj_setState(mj_model, data, row, int(_STATE))
        self._show(state.xs, state.us, state.qdd, state.diverged, state.num_steps)

    def repeat(self, indices: ArrayLike) -> "Plants":
        """New plants: copies of the chosen ones, (C,), in their present state; an index may be repeated."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or not indices.size or indices.dtype.kind not in "iu":
            raise ValueError("indices must be a list of at least one integer, the plants to copy.")
        copies = Plants([self._models[i] for i in indices], self.dt, self.num_threads)
        copies.restore(self.snapshot().take(indices))
        return copies

    def _show(self, xs: NDArray, us: NDArray, qdd: NDArray, diverged: NDArray, num_steps: int) -> None:
        """Set what the properties return; they are handed out without copying, so nothing may write to them."""
        for array in (xs, us, qdd, diverged):
            array.flags.writeable = False
        self._xs, self._us, self._qdd, self._diverged, self._num_steps = xs, us, qdd, diverged, num_steps


def end_effector(mj_model: mujoco.MjModel, qs: ArrayLike, name: str = "end_effector") -> NDArray[np.float64]:
    """Positions of the origin of a body along a trajectory.

    Args:
        mj_model: The robot.
        qs: Joint positions (T, nq).
        name: Name of the body.

    Returns: (T, 3) in [m], in the world frame.
    """
    body = mujoco.mj_name2id(mj_model, mujoco.mjtObj.mjOBJ_BODY, name)
    if body < 0:
        names = [mj_model.body(i).name for i in range(mj_model.nbody)]
        raise ValueError(f"no body is named {name!r}: choose one of {names}.")
    qs = np.asarray(qs, float)
    if qs.ndim != 2 or qs.shape[1] != mj_model.nq:
        raise ValueError(f"qs must have shape (T, {mj_model.nq}), not {qs.shape}.")
    data, positions = mujoco.MjData(mj_model), np.empty((len(qs), 3))
    for q, position in zip(qs, positions, strict=True):
        data.qpos[:] = q
        mujoco.mj_kinematics(mj_model, data)
        position[:] = data.xpos[body]
    return positions


def _advance(
    mj_model: mujoco.MjModel, data: mujoco.MjData, u: NDArray, num_substeps: int, x: NDArray, qdd: NDArray
) -> bool:
    """Step one plant and write x and qdd in place; False, with both as they were, if it diverges."""
    data.ctrl[:] = u
    mujoco.mj_step(mj_model, data, 1)
    acceleration = data.qacc.copy()
    if num_substeps > 1:
        mujoco.mj_step(mj_model, data, num_substeps - 1)
    # MuJoCo itself puts a plant with a bad state back to its initial posture, and counts a warning.
    if data.warning.number[_BAD].any() or not (np.abs(data.qvel) <= MAX_SPEED).all():
        _place(mj_model, data, x)
        return False
    x[: mj_model.nq], x[mj_model.nq :], qdd[:] = data.qpos, data.qvel, acceleration
    return True


def _place(mj_model: mujoco.MjModel, data: mujoco.MjData, x: NDArray) -> None:
    mujoco.mj_resetData(mj_model, data)
    data.qpos[:], data.qvel[:] = x[: mj_model.nq], x[mj_model.nq :]


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep MuJoCo from writing its warnings into a file in the working directory: `diverged` tells the same."""
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _check_model(mj_model: mujoco.MjModel, name: str) -> None:
    if mj_model.nq == 0 or not set(mj_model.jnt_type) <= _ONE_DEGREE:
        raise ValueError(f"{name} must have a fixed base and hinge or slide joints only (no free or ball joint).")
    if mj_model.nu != mj_model.nv:
        raise ValueError(f"{name} has {mj_model.nv} joints but {mj_model.nu} actuators: give every joint one motor.")
    for i in range(mj_model.nu):
        actuator = mj_model.actuator(i)
        kinds = (actuator.trntype, actuator.gaintype, actuator.biastype, actuator.dyntype)
        numbers = (actuator.trnid[0], actuator.gainprm[0], *actuator.gear)
        if tuple(int(np.squeeze(kind)) for kind in kinds) != _MOTOR or numbers != (i, 1, 1, 0, 0, 0, 0, 0):
            raise ValueError(
                f"{name}: actuator {i} ({actuator.name!r}) is not the <motor> of joint {i} ({mj_model.joint(i).name!r})"
                " with gear 1: controls are torques or forces, in the order of the joints."
            )


def _control_range(mj_model: mujoco.MjModel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The limits of each control, ±inf where there is none."""
    limited = mj_model.actuator_ctrllimited.astype(bool)
    low, high = mj_model.actuator_ctrlrange.T
    return np.where(limited, low, -np.inf), np.where(limited, high, np.inf)


def _num_substeps(dt: float, timesteps: Sequence[float]) -> int:
    if len(set(timesteps)) > 1:
        raise ValueError(f"mj_models differ in their timestep: {sorted(set(timesteps))} s.")
    ratio = dt / timesteps[0]
    if not np.isfinite(ratio) or round(ratio) < 1 or abs(ratio - round(ratio)) > 1e-9 * ratio:
        raise ValueError(f"dt must be a multiple of the timestep of the models, {timesteps[0]} s, not {dt} s.")
    return round(ratio)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rows(value: ArrayLike, name: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    array = np.array(value, float)  # a copy: nobody else may change it
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one row a plant, not {array.shape}.")
    return array


def _not_finite(rows: NDArray) -> str:
    """The rows that are not finite, to be read by a person; empty if there is none."""
    return ", ".join(map(str, np.flatnonzero(~np.isfinite(rows).all(axis=1))))
