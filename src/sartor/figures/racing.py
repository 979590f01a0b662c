"""The racing car: what matters where on the track, along a lap, and that lap as a moving picture."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Patch
from matplotlib.path import Path as Outline
from PIL import Image

from sartor.figures.style import BLUE, GREEN, GREY, GRID, INK, MUSTARD, ORANGE, PURPLE, name_rows, styled
from sartor.racing_labels import PHASES
from sartor.systems.racing_car import DT, STATES

Arrays = Mapping[str, np.ndarray]
SYMBOLS = tuple(name.split(" [")[0] for name in STATES)
_TINTS: dict[str, str] = dict(zip(PHASES, ("#eef1f4", "#cfe0ee", "#f6d3bb", "#cfe6d6"), strict=True))
_LIGHT_BLUE, _LIGHT_ORANGE, _LIGHT_GREEN = "#8fbbdc", "#f3c09c", "#a5cfb3"
_BANDS = (GREY, BLUE, _LIGHT_BLUE, ORANGE, _LIGHT_ORANGE, PURPLE, MUSTARD, GREEN, _LIGHT_GREEN)
_CAR = Outline([(-0.7, -0.5), (0.9, 0.0), (-0.7, 0.5), (-0.35, 0.0), (-0.7, -0.5)])
_DECADES = 3.0  # of weights that a map tells apart
_MAX_BYTES = 1_500_000  # of a clip


def maps(arrays: Arrays) -> Figure | None:
    """At a usual moment of each phase the plan on the track, and what errors along it weigh (the paper's Fig. 3)."""
    moments, weights = usual_moments(arrays), _weights(arrays)
    if not moments:
        return None
    norm = _norm(weights[list(moments.values())])
    width, height = np.ptp(_corners(arrays), 0)
    tall = 2.4 * min(height / width, 1.5)
    fig = Figure(figsize=(1.6 + 2.5 * len(moments), 3.6 + tall))
    axes = fig.subplots(2, len(moments), squeeze=False, height_ratios=(tall, 2.4))
    for i, (phase, k) in enumerate(moments.items()):
        _track(axes[0, i], arrays)
        _show(_car(axes[0, i]), arrays, k)
        axes[0, i].set_title(f"{phase}, {arrays['xs'][k, 3]:.1f} m/s")
    images = [_map(ax, weights[k], norm, ax is axes[1, 0]) for ax, k in zip(axes[1], moments.values(), strict=True)]
    _scale(axes[0, 0], arrays)
    fig.colorbar(images[0], ax=axes[1].tolist(), label="weight: S · usual error", pad=0.01, aspect=18, extend="both")
    fig.legend(handles=_car_key(), loc="outside upper center", ncols=3)
    return fig


def usual_moments(arrays: Arrays) -> dict[str, int]:
    """The control step of each phase with the (upper) median of Σ (S · usual error)² among those with a label."""
    energy = np.sum(_weights(arrays) ** 2, (1, 2))
    known = arrays["ok"] & np.isfinite(energy)
    of = {phase: np.flatnonzero(known & (arrays["phase"] == phase)) for phase in PHASES}
    return {
        phase: int(mine[np.argsort(energy[mine], kind="stable")[mine.size // 2]])
        for phase, mine in of.items()
        if mine.size
    }


def lap(arrays: Arrays) -> Figure | None:
    """Along a lap the speed, how much errors weigh in all, and the share of each state in it."""
    energy = np.sum(_weights(arrays) ** 2, 1)  # (T, 9)
    total = energy.sum(1)
    known = arrays["ok"] & np.isfinite(total) & (total > 0.0)
    if not known.any():
        return None
    s = arrays["xs"][: len(total), 0] - arrays["xs"][0, 0]
    shares = np.where(known[:, None], energy / np.where(known, total, 1.0)[:, None], np.nan)
    fig = Figure(figsize=(10.0, 6.4))
    speed, size, stack = fig.subplots(3, 1, sharex=True, height_ratios=(1.0, 1.0, 2.2))
    speed.plot(s, arrays["xs"][: len(s), 3], color=INK, lw=1.4)
    size.semilogy(s, np.where(known, np.sqrt(total), np.nan), color=INK, lw=1.4)
    _stack(stack, s, shares)
    _shade((speed, size), stack, s, arrays["phase"])
    speed.set_ylabel("speed [m/s]")
    size.set_ylabel("weight of\nall errors")
    stack.set(ylabel="share of energy [%]", xlabel="distance along the lap [m]", ylim=(0.0, 100.0), xlim=(s[0], s[-1]))
    fig.align_ylabels()
    fig.legend(handles=[Patch(color=c, label=n) for n, c in _TINTS.items()], loc="outside upper center", ncols=4)
    return fig


def _stack(ax: Axes, s: np.ndarray, shares: np.ndarray) -> None:
    """States with at least 1 % of the energy on the average, the others together."""
    shown = np.flatnonzero(np.nanmean(shares, 0) >= 0.01)
    rest = 1.0 - shares[:, shown].sum(1, keepdims=True)
    bands = 100.0 * np.cumsum(np.concatenate([shares[:, shown], rest], 1), 1)
    below, handles = np.zeros(len(s)), []
    names = [*(_math(SYMBOLS[i]) for i in shown), "others"]
    for above, name, color in zip(bands.T, names, [*(_BANDS[i] for i in shown), GRID], strict=True):
        ax.fill_between(s, below, above, color=color, lw=0)
        handles.append(Patch(color=color, label=name))
        below = above
    ax.legend(handles=handles[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.grid(False)


def _shade(axes: tuple[Axes, ...], stack: Axes, s: np.ndarray, phase: np.ndarray) -> None:
    """Phases as tints, and as lines where tints cannot be seen."""
    begins = np.flatnonzero(np.r_[True, phase[1:] != phase[:-1]])
    for begin, end in zip(begins, np.r_[begins[1:], len(s) - 1], strict=True):
        for ax in axes:
            ax.axvspan(float(s[begin]), float(s[end]), color=_TINTS[str(phase[begin])], lw=0)
        stack.axvline(float(s[begin]), color=INK, lw=0.7, alpha=0.5)
    for ax in axes:
        ax.grid(False, axis="x")


def clip(content: Arrays, path: Path, frames: int = 100) -> Path:
    """Write the lap as a moving picture of less than 1.5 MB, in real time.

    Args:
        content: The arrays of `maps.npz`.
        path: Where to write it, as .webp.
        frames: How many pictures at most; halved until the file is small enough.
    """
    steps = len(content["xy"])
    shown = np.unique(np.linspace(0, steps - 1, min(frames, steps)).astype(int))
    with styled():
        pictures = _pictures(content, shown)
    _save(path, pictures, DT * steps)
    return path


def _pictures(arrays: Arrays, shown: np.ndarray) -> list[Image.Image]:
    """The car on the track, and beside it what errors along the plan weigh."""
    weights = _weights(arrays)
    fig = Figure(figsize=(9.0, 3.9), dpi=90)
    canvas = FigureCanvasAgg(fig)
    road, heat = fig.subplots(1, 2, width_ratios=(1.0, 1.1))
    _track(road, arrays)
    _scale(road, arrays)
    car, norm = _car(road), _norm(weights[arrays["ok"]])
    image = _map(heat, weights[shown[0]], norm, names=True)
    fig.colorbar(image, ax=heat, label="weight: S · usual error", pad=0.02, aspect=18, extend="both")
    road.legend(handles=_car_key(), loc="lower center", bbox_to_anchor=(0.5, -0.1), ncols=3, columnspacing=1.2)
    pictures = []
    for k in shown:
        _show(car, arrays, k)
        road.set_title(f"{DT * k:.1f} s, {arrays['xs'][k, 3]:.1f} m/s, {arrays['phase'][k]}")
        image.set_array(_clipped(weights[k], norm).T)
        heat.set_title("" if arrays["ok"][k] else "no label")
        canvas.draw()
        fig.set_layout_engine("none")  # what has found its place stays there
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return pictures


def _save(path: Path, pictures: list[Image.Image], seconds: float) -> None:
    """Without every other picture until they fit."""
    while True:
        out = io.BytesIO()
        timing = {"duration": round(1000 * seconds / len(pictures)), "loop": 0}
        pictures[0].save(out, "webp", save_all=True, append_images=pictures[1:], method=4, quality=70, **timing)
        if out.tell() < _MAX_BYTES or len(pictures) == 1:
            path.write_bytes(out.getvalue())
            return
        pictures = pictures[::2]


def _weights(arrays: Arrays) -> np.ndarray:
    """S times the usual error of each state (T, N, 9): in units of the cost, so that states compare."""
    return np.asarray(arrays["S"], float) * arrays["size"]


def _norm(weights: np.ndarray) -> LogNorm:
    """One scale for several maps (M, N, 9); a few with very large weights do not make the others pale."""
    tops = np.nanmax(weights, (1, 2), initial=0.0)
    top = float(np.quantile(tops, 0.9, method="higher")) if tops.any() else 1.0
    return LogNorm(top * 10.0**-_DECADES, top)


def _clipped(weights: np.ndarray, norm: LogNorm) -> np.ndarray:
    """What a map cannot tell from nothing is as light as nothing."""
    return np.ma.masked_invalid(np.maximum(weights, norm.vmin or 0.0))


def _map(ax: Axes, weights: np.ndarray, norm: LogNorm, names: bool) -> Any:
    """Weights (N, 9) by state and time ahead."""
    ahead = DT * (np.arange(len(weights) + 1) + 0.5)  # the first error is that after one control step
    rows = np.arange(len(STATES) + 1) - 0.5
    image = ax.pcolormesh(ahead, rows, _clipped(weights, norm).T, cmap="magma_r", norm=norm)
    name_rows(ax, [_math(name) for name in SYMBOLS], names)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("time ahead [s]")
    return image


def _math(symbol: str) -> str:
    return f"${symbol}$" if len(symbol.split("_")[0]) == 1 else symbol


def _track(ax: Axes, arrays: Arrays) -> None:
    """The road between its walls, and the line that is driven."""
    left, right = (np.concatenate([arrays[side], arrays[side][:1]]) for side in ("left", "right"))
    ax.fill(*np.concatenate([left, right[::-1]]).T, color="#f1f3f6", lw=0)
    for wall in (left, right):
        ax.plot(*wall.T, color=INK, lw=0.9)
    ax.plot(*arrays["xy"].T, color=BLUE, lw=0.9, alpha=0.6)
    (x, y), (x_end, y_end) = _corners(arrays)
    ax.set(xlim=(x, x_end), ylim=(y, y_end), aspect="equal")
    ax.set_axis_off()


def _corners(arrays: Arrays) -> np.ndarray:
    """Least and largest x and y to be seen [m], with room for a scale below."""
    walls = np.concatenate([arrays["left"], arrays["right"]])
    return np.array([walls.min(0) - (0.2, 0.5), walls.max(0) + 0.2])


def _scale(ax: Axes, arrays: Arrays) -> None:
    """One metre, below the track."""
    x, y = _corners(arrays)[0] + 0.2
    ax.plot([x, x + 1.0], [y, y], color=INK, lw=1.6, solid_capstyle="butt")
    ax.text(x + 1.15, y, "1 m", va="center", fontsize=8)


def _car(ax: Axes) -> tuple[Line2D, Line2D]:
    """Lines for plan and car, to be put in place by `_show`."""
    (plan,) = ax.plot([], [], color=ORANGE, lw=2.4, solid_capstyle="round")
    (car,) = ax.plot([], [], ls="", ms=13, color=INK, mec="white", mew=0.6)
    return plan, car


def _show(lines: tuple[Line2D, Line2D], arrays: Arrays, k: int) -> None:
    plan, car = lines
    plan.set_data(*arrays["plan"][k].T)
    car.set_data(*arrays["xy"][k : k + 1].T)
    car.set_marker(MarkerStyle(_CAR).rotated(rad=float(arrays["heading"][k])))


def _car_key() -> list[Line2D]:
    car = Line2D([], [], ls="", marker=MarkerStyle(_CAR), ms=11, color=INK, label="car")
    return [car, Line2D([], [], color=ORANGE, lw=2.4, label="plan"), Line2D([], [], color=BLUE, lw=0.9, label="driven")]
