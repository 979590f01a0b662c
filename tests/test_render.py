"""Clips: what is in the file, and what happens where nothing can be drawn."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from sartor import render
from sartor.systems import panda

QS = np.tile(panda.START, (41, 1))
TURNED = QS + np.linspace(0, 1, 41)[:, None] * np.eye(7)[0]


def frames(path):
    """Pictures (frames, height, width, 3) and their durations in [ms]; webp tells one only where it has been read."""
    with Image.open(path) as image:
        shown = [(np.asarray(f.convert("RGB"), float), f.info.get("duration")) for f in ImageSequence.Iterator(image)]
    return np.stack([pixels for pixels, _ in shown]), [duration for _, duration in shown]


def drawn(*args, **options):
    try:
        return render.clip(*args, **options)
    except render.RenderUnavailable as reason:
        pytest.skip(str(reason))


def test_a_clip_shows_the_trajectories_side_by_side(tmp_path):
    robot = panda.mj_model(panda.Payload(1.0, (0.0, 0.0, 0.1)))
    pair = {"still": QS, "turned": TURNED}
    path = drawn(tmp_path / "new" / "a.webp", robot, pair, reference=QS, dt=0.02, seconds=0.6, fps=5)
    seen, durations = frames(path)
    assert path.stat().st_size < render.MAX_BYTES
    assert seen.shape == (4, render.HEIGHT, 2 * render.WIDTH, 3) and set(durations) == {200}
    body = seen[:, 40:]  # below the captions
    left, right = body[:, :, : render.WIDTH], body[:, :, render.WIDTH :]
    changed = lambda a, b: np.mean(np.abs(a - b).max(axis=-1) > 30)  # share of the pixels
    assert changed(left[0], right[0]) < 0.002 and changed(left[0], left[-1]) < 0.002
    assert changed(right[0], right[-1]) > 0.01 and changed(left[-1], right[-1]) > 0.01
    assert seen.std() > 20


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_frames_are_left_out_until_the_file_is_small(tmp_path, suffix, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (8, 60, 80, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    render._save(tmp_path / f"all{suffix}", images, 0.1)
    whole, durations = frames(tmp_path / f"all{suffix}")
    assert len(whole) == 8 and set(durations) == {100}
    monkeypatch.setattr(render, "MAX_BYTES", (tmp_path / f"all{suffix}").stat().st_size // 3)
    render._save(tmp_path / f"few{suffix}", images, 0.1)
    few, durations = frames(tmp_path / f"few{suffix}")
    assert (tmp_path / f"few{suffix}").stat().st_size < render.MAX_BYTES
    assert len(few) == 2 and set(durations) == {400}


def test_where_nothing_can_be_drawn_the_reason_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(render.RenderUnavailable, match="nonsense: exit status 1, .*MUJOCO_GL"):
        render.clip(tmp_path / "a.gif", panda.mj_model(), {"a": QS}, dt=0.02)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(render.sys, "platform", "linux")
    monkeypatch.setattr(render.sys, "executable", "/bin/false")
    with pytest.raises(render.RenderUnavailable, match="egl: exit status 1, no message; osmesa: exit status 1"):
        render.clip(tmp_path / "a.gif", panda.mj_model(), {"a": QS}, dt=0.02)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"path": "a.mp4"}, "path must end in .webp or .gif, not 'a.mp4'"),
        ({"dt": 0.0}, "dt, seconds and fps must be positive"),
        ({"trajectories": {}}, "trajectories is empty"),
        ({"trajectories": {"a": QS[:, :3]}}, r"trajectories\['a'\] must have shape \(T, 7\), not \(41, 3\)"),
        ({"reference": QS * np.nan}, "reference is not finite"),
    ],
)
def test_bad_input_is_named(change, match):
    options = {"path": "a.gif", "trajectories": {"a": QS}, "dt": 0.02} | change
    with pytest.raises(ValueError, match=match):
        render.clip(mj_model=panda.mj_model(), **options)
