"""A robot from an MJCF file or a compiled MuJoCo model."""

# MuJoCo is compiled and has no type stubs.
# pyright: reportAttributeAccessIssue=false
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import mujoco
import numpy as np

from sartor.models.links import RigidBody


def from_mjcf(path: str | Path) -> RigidBody:
    """The robot of an MJCF (or URDF) file. Fails: `ValueError` as `from_mujoco`, or if MuJoCo cannot read the file."""
    try:
        return from_mujoco(mujoco.MjModel.from_xml_path(str(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_mujoco(mj_model: mujoco.MjModel) -> RigidBody:
    """The robot of a compiled MuJoCo model.

    Args:
        mj_model: Fixed base; any tree of hinge and slide joints, several of one body included. Contacts, limits and
            actuators are not read.

    Fails: `ValueError` for what (D11) does not hold: a free or ball joint, equality constraints, springs, dry
        friction, actuators with armature or damping, gravity compensation, a fluid.
    """
    _check(mj_model)
    links: list[_Link] = []
    link_of = {0: -1}  # the last joint of every body, and where the body sits in the frame of that joint
    place_of = {0: (np.zeros(3), np.eye(3))}
    for body in range(1, mj_model.nbody):
        parent = mj_model.body_parentid[body]
        link, (p, R) = link_of[parent], place_of[parent]
        p, R = p + R @ mj_model.body_pos[body], R @ _rotation(mj_model.body_quat[body])
        for j in range(mj_model.body_jntadr[body], mj_model.body_jntadr[body] + mj_model.body_jntnum[body]):
            slide = mj_model.jnt_type[j] == int(mujoco.mjtJoint.mjJNT_SLIDE)
            anchor = np.zeros(3) if slide else mj_model.jnt_pos[j]
            links.append(_Link(mj_model.joint(j).name, link, bool(slide), mj_model.jnt_axis[j], p + R @ anchor, R))
            link, p, R = len(links) - 1, -anchor, np.eye(3)
        link_of[body], place_of[body] = link, (p, R)
    if not links:
        raise ValueError("the model has no joint: there is nothing to control.")
    masses, coms, inertias = _lump(mj_model, link_of, place_of, len(links))
    bodies = [b for b in range(1, mj_model.nbody) if link_of[b] >= 0]
    # MuJoCo's q counts from qpos0: turn every frame back by it.
    axes = np.array([link.axis for link in links])
    rotations, positions = (np.array([getattr(link, name) for link in links]) for name in ("R", "p"))
    for i, (link, q0) in enumerate(zip(links, mj_model.qpos0, strict=True)):
        positions[i] = positions[i] - link.slide * rotations[i] @ axes[i] * q0
        rotations[i] = rotations[i] if link.slide else rotations[i] @ _axis_angle(axes[i], -q0)
    arrays = (axes, positions, rotations, [place_of[b][0] for b in bodies], masses, coms, inertias)
    return RigidBody(
        tuple(link.name for link in links),
        tuple(link.parent for link in links),
        tuple(link.slide for link in links),
        tuple((mj_model.body(b).name, link_of[b]) for b in bodies),
        *(jnp.asarray(np.array(a)) for a in (*arrays, mj_model.dof_armature, mj_model.dof_damping)),
        gravity=jnp.asarray(_gravity(mj_model)),
    )


class _Link(NamedTuple):
    name: str
    parent: int
    slide: bool
    axis: np.ndarray
    p: np.ndarray
    R: np.ndarray


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    R = np.zeros(9)
    mujoco.mju_quat2Mat(R, quaternion)
    return R.reshape(3, 3)


def _axis_angle(axis: np.ndarray, angle: float) -> np.ndarray:
    quaternion = np.zeros(4)
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    return _rotation(quaternion)


def _lump(mj_model: mujoco.MjModel, link_of: dict, place_of: dict, n: int) -> tuple[np.ndarray, ...]:
    """Mass, centre and inertia of the bodies on each link together."""
    masses, moments, seconds = np.zeros(n), np.zeros((n, 3)), np.zeros((n, 3, 3))
    spread = lambda c: c @ c * np.eye(3) - np.outer(c, c)
    for body, link in link_of.items():
        if link < 0:
            continue
        p, R = place_of[body]
        c, axes = p + R @ mj_model.body_ipos[body], R @ _rotation(mj_model.body_iquat[body])
        m = mj_model.body_mass[body]
        masses[link] += m
        moments[link] += m * c
        seconds[link] += axes @ np.diag(mj_model.body_inertia[body]) @ axes.T + m * spread(c)
    coms = moments / np.where(masses == 0, 1.0, masses)[:, None]
    return masses, coms, np.array([I - m * spread(c) for I, m, c in zip(seconds, masses, coms, strict=True)])


def _gravity(mj_model: mujoco.MjModel) -> np.ndarray:
    off = mj_model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_GRAVITY)
    return np.zeros(3) if off else mj_model.opt.gravity


def _check(m: mujoco.MjModel) -> None:
    """Refuse what (D11) leaves out rather than be wrong about it."""
    movable = [int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)]
    other = [m.joint(j).name or str(j) for j in range(m.njnt) if m.jnt_type[j] not in movable]
    if other:
        raise ValueError(
            f"joint {other[0]!r} is neither a hinge nor a slide: a free base or a ball joint is not supported, fix the"
            " base or replace a ball by three hinges."
        )
    wrong = {
        "equality constraints (a closed loop); cut the loop": m.neq,
        "joint springs (stiffness); set it to 0 and add the springs to the residual": np.any(m.jnt_stiffness)
        or np.any(getattr(m, "jnt_stiffnesspoly", 0)),
        "damping that is not linear in the velocity; keep its first number alone": np.any(
            getattr(m, "dof_dampingpoly", 0)
        ),
        "dry friction (frictionloss); set it to 0 in the model of the controller": np.any(m.dof_frictionloss),
        "tendons with springs, dampers, friction or inertia; leave them out": any(
            np.any(getattr(m, f"tendon_{kind}", 0))
            for kind in ("stiffness", "stiffnesspoly", "damping", "dampingpoly", "frictionloss", "armature")
        ),
        "actuators with armature or damping of their own; write them as those of their joints": any(
            np.any(getattr(m, f"actuator_{kind}", 0)) for kind in ("armature", "damping", "dampingpoly")
        ),
        "gravity compensation (gravcomp); set it to 0": np.any(m.body_gravcomp),
        "a fluid (density or viscosity of `option`); set both to 0": m.opt.density or m.opt.viscosity,
    }
    for name, there in wrong.items():
        if there:
            raise ValueError(f"the model has {name}: its dynamics would be wrong.")
