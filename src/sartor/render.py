"""Short clips of a robot that follows several trajectories side by side, drawn by MuJoCo without a window.

OpenGL may be missing, and where it is broken it may end the process: all drawing is done by another one.
"""

# MuJoCo is compiled and has no type stubs.
# pyright: reportAttributeAccessIssue=false

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 320, 300  # of each picture [pixels]
MAX_BYTES = 2_000_000
GHOST = (0.10, 0.65, 0.30, 0.40)  # colour of the reference
TRACE = (0.85, 0.20, 0.10, 1.0)  # colour of the path
TRACE_TIME = 2.0  # length of the path behind the end effector [s]


class RenderUnavailable(RuntimeError):
    """MuJoCo cannot draw here, mostly because there is no OpenGL; the message says why."""


def clip(
    path: str | Path,
    mj_model: mujoco.MjModel,
    trajectories: Mapping[str, ArrayLike],
    *,
    reference: ArrayLike | None = None,
    dt: float,
    seconds: float = 5.0,
    fps: float = 10.0,
    body: str | None = "end_effector",
    camera: str | None = "front",
) -> Path:
    """Draw trajectories side by side, in real time, into an animation of less than 2 MB.

    Args:
        path: Where to write it; the ending, .webp or .gif, is the format (a GIF shows fewer frames in 2 MB).
        mj_model: The robot.
        trajectories: Joint positions (T, nq) by the caption under which they are drawn.
        reference: Joint positions (T, nq) of the translucent green robot in every picture; None for none.
        dt: Time between two rows in [s].
        seconds: Length of the clip at most; trajectories are shown from their beginning.
        fps: Frames per second at most; halved until the file is small enough.
        body: The body whose path of the last 2 s is drawn, red, and green for the reference; None for no path.
        camera: Name of the camera in the model; None, or a name that is not there, for a free one.

    Returns: the path.
    Fails: `RenderUnavailable` where nothing can be drawn (set MUJOCO_GL to choose the OpenGL: egl, osmesa or glfw);
        `ValueError` for wrong input.
    """
    path = Path(path)
    if path.suffix not in (".webp", ".gif"):
        raise ValueError(f"path must end in .webp or .gif, not {path.name!r}.")
    if not (dt > 0 and seconds > 0 and fps > 0):
        raise ValueError(f"dt, seconds and fps must be positive, not {dt}, {seconds} and {fps}.")
    qs = _checked(mj_model, trajectories, reference)
    stride = max(1, round(1.0 / (fps * dt)))
    pictures = _draw_elsewhere(
        mj_model, qs[:, : round(seconds / dt) + 1], stride, dt, reference is not None, body, camera
    )
    frames = [_side_by_side(row, list(trajectories)) for row in pictures]
    _save(path, frames, stride * dt)
    return path


def _checked(mj_model: mujoco.MjModel, trajectories: Mapping[str, ArrayLike], reference: ArrayLike | None) -> NDArray:
    """All trajectories, and then the reference, (n, T, nq), cut to the shortest."""
    named = {f"trajectories[{name!r}]": np.asarray(qs, float) for name, qs in trajectories.items()}
    if not named:
        raise ValueError("trajectories is empty: give joint positions (T, nq) by caption.")
    if reference is not None:
        named["reference"] = np.asarray(reference, float)
    for name, qs in named.items():
        if qs.ndim != 2 or qs.shape[1] != mj_model.nq or not len(qs):
            raise ValueError(f"{name} must have shape (T, {mj_model.nq}), not {qs.shape}.")
        if not np.isfinite(qs).all():
            raise ValueError(f"{name} is not finite: cut it where it diverges.")
    shortest = min(map(len, named.values()))
    return np.stack([qs[:shortest] for qs in named.values()])


def _draw_elsewhere(
    mj_model: mujoco.MjModel, qs: NDArray, stride: int, dt: float, ghost: bool, body: str | None, camera: str | None
) -> NDArray[np.uint8]:
    """Pictures (frames, trajectories, height, width, 3), drawn by another process."""
    with tempfile.TemporaryDirectory() as folder:
        job, result, model = (os.path.join(folder, name) for name in ("job.npz", "result.npy", "model.mjb"))
        mujoco.mj_saveModel(mj_model, model)
        np.savez(job, qs=qs, stride=stride, dt=dt, ghost=ghost, body=body or "", camera=camera or "")
        reasons = []
        chosen = os.environ.get("MUJOCO_GL")
        for backend in [chosen] if chosen else _backends():
            command = [sys.executable, "-c", "import sys; from sartor.render import _work; _work(*sys.argv[1:])"]
            done = subprocess.run(
                [*command, model, job, result], env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, text=True
            )
            if done.returncode == 0:
                return np.load(result)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            reasons.append(f"{backend}: exit status {done.returncode}, {last}")
    raise RenderUnavailable("MuJoCo could not draw with any OpenGL (choose one by MUJOCO_GL). " + "; ".join(reasons))


def _backends() -> list[str]:
    """Kinds of OpenGL to try, the fastest first."""
    return ["egl", "osmesa"] if sys.platform == "linux" else ["cgl" if sys.platform == "darwin" else "wgl"]


def _work(model: str, job: str, result: str) -> None:
    """What the other process does."""
    data = np.load(job)
    mj_model = mujoco.MjModel.from_binary_path(model)
    scene = _Scene(mj_model, str(data["body"]), str(data["camera"]))
    qs, stride, trace = data["qs"], int(data["stride"]), round(TRACE_TIME / float(data["dt"]))
    shown, ghost = (qs[:-1], qs[-1]) if data["ghost"] else (qs, None)
    np.save(
        result,
        [
            [scene.draw(own[: t + 1][-trace:], None if ghost is None else ghost[: t + 1][-trace:]) for own in shown]
            for t in range(0, qs.shape[1], stride)
        ],
    )


class _Scene:
    """Draws one picture after the other."""

    def __init__(self, mj_model: mujoco.MjModel, body: str, camera: str):
        self.mj_model, self.data = mj_model, mujoco.MjData(mj_model)
        mj_model.vis.global_.offwidth = max(mj_model.vis.global_.offwidth, WIDTH)
        mj_model.vis.global_.offheight = max(mj_model.vis.global_.offheight, HEIGHT)
        self.ghost = copy.copy(mj_model)
        self.ghost.geom_matid[:], self.ghost.geom_rgba[:] = -1, GHOST
        self.ghost.geom_size[:] *= 0.97  # where both robots are at the same place, the ghost is inside
        self.renderer = mujoco.Renderer(mj_model, HEIGHT, WIDTH)
        self.body = mujoco.mj_name2id(mj_model, mujoco.mjtObj.mjOBJ_BODY, body)
        self.camera = mujoco.mj_name2id(mj_model, mujoco.mjtObj.mjOBJ_CAMERA, camera)

    def draw(self, qs: NDArray, ghost: NDArray | None) -> NDArray[np.uint8]:
        """The robot at the end of the path qs (T, nq), and a translucent one at the end of another."""
        positions = self._positions(qs)
        self.renderer.update_scene(self.data, self.camera)
        self._trace(positions, TRACE)
        if ghost is not None:
            positions = self._positions(ghost)
            options, grabbed, moving = mujoco.MjvOption(), mujoco.MjvPerturb(), int(mujoco.mjtCatBit.mjCAT_DYNAMIC)
            mujoco.mjv_addGeoms(self.ghost, self.data, options, grabbed, moving, self.renderer.scene)
            self._trace(positions, GHOST)
        return self.renderer.render()

    def _positions(self, qs: NDArray) -> NDArray:
        """Of the body along the path; afterwards the data are at its end."""
        positions = np.zeros((len(qs), 3))
        for q, position in zip(qs, positions, strict=True):
            self.data.qpos[:] = q
            mujoco.mj_kinematics(self.mj_model, self.data)
            position[:] = self.data.xpos[self.body]
        mujoco.mj_forward(self.mj_model, self.data)
        return positions

    def _trace(self, positions: NDArray, colour: tuple[float, ...]) -> None:
        if self.body < 0:
            return
        scene, line = self.renderer.scene, mujoco.mjtGeom.mjGEOM_LINE
        for geom, start, end in zip(scene.geoms[scene.ngeom :], positions[:-1], positions[1:], strict=False):
            mujoco.mjv_initGeom(
                geom, line, np.zeros(3), np.zeros(3), np.zeros(9), np.array([*colour[:3], 1.0], np.float32)
            )
            mujoco.mjv_connector(geom, line, 3.0, start, end)
            scene.ngeom += 1


def _side_by_side(pictures: NDArray[np.uint8], captions: list[str]) -> Image.Image:
    """One frame from the pictures (n, height, width, 3), with their captions on top."""
    image = Image.fromarray(np.concatenate(list(pictures), axis=1))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=16)
    for i, caption in enumerate(captions):
        draw.text((i * WIDTH + 10, 6), caption, fill=(25, 30, 40), font=font)
    return image


def _save(path: Path, frames: list[Image.Image], duration: float) -> None:
    """Write the frames, each shown for `duration` [s], leaving out every other one until they fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"method": 4, "quality": 70} if path.suffix == ".webp" else {"optimize": True}
    if path.suffix == ".gif":  # noise of dithering does not compress
        frames = [frame.quantize(96, dither=Image.Dither.NONE) for frame in frames]
    while True:
        timing = {"duration": round(1000 * duration), "loop": 0}
        frames[0].save(path, save_all=True, append_images=frames[1:], **timing, **options)
        if path.stat().st_size < MAX_BYTES or len(frames) == 1:
            return
        frames, duration = frames[::2], 2 * duration
