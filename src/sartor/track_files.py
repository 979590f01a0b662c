"""Tracks from CSV files of the common kinds, told by the names of their columns.

    x, y, w_right, w_left            centrelines with the free width to either side [m]
    s, x, y, psi, kappa, ...         lines without widths; of these, x and y are used

Names may stand in a comment, carry units (`x_m`, `x [m]`, `w_tr_right_m`), and be separated by comma, semicolon or
blanks. Four columns without names are those of the first kind.
"""

import re
from pathlib import Path

import numpy as np

from sartor.track import Track, from_points

_MEANINGS = {
    "x": ("x",), "y": ("y",), "right": ("w_right", "w_tr_right", "width_right"),
    "left": ("w_left", "w_tr_left", "width_left"), "width": ("track_width", "width"),
}  # fmt: skip


def read_track(
    path: Path | str, *, half_width: float | None = None, smoothing: float = 0.02, car_width: float = 0.2
) -> Track:
    """A closed track from a CSV file.

    Args:
        path: The file.
        half_width: Free width to either side [m]; for files without widths, or in place of theirs.
        smoothing: Root mean square of how far the centreline may leave the points [m].
        car_width: Least width of the track [m].

    Fails: `FileNotFoundError`; `ValueError` that names the file for columns that are missing, entries that are not
        numbers, and all that `sartor.track.from_points` refuses.
    """
    path = Path(path)
    names, rows = _parsed(path)
    columns = _columns(path, names, rows)
    if half_width is not None:
        left = right = half_width
    elif "left" in columns and "right" in columns:
        left, right = columns["left"], columns["right"]
    elif "width" in columns:
        left = right = 0.5 * columns["width"]
    else:
        raise ValueError(f"{path}: no column holds the width of the track: give half_width in metres.")
    xy = np.stack([columns["x"], columns["y"]], 1)
    return from_points(xy, left, right, smoothing=smoothing, car_width=car_width, name=str(path))


def _parsed(path: Path) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, none if there are none, and the texts of the rows."""
    names, rows = [], []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        cells = [cell.strip() for cell in re.split(r"[;,\t]", line.strip().lstrip("# "))]
        cells = line.strip().lstrip("# ").split() if len(cells) == 1 else cells
        if not rows and "x" in map(_plain, cells):
            names = cells
        elif any(cells) and not line.lstrip().startswith("#"):
            rows.append(cells)
    if not rows:
        raise ValueError(f"{path}: there are no rows of numbers.")
    return names, rows


def _plain(name: str) -> str:
    """The name of a column without its unit."""
    return re.sub(r"_(m|rad|radpm|mps|mps2)$|\s*[\[(].*$", "", name.lower())


def _columns(path: Path, names: list[str], rows: list[list[str]]) -> dict[str, np.ndarray]:
    counts = {len(row) for row in rows}
    if len(counts) > 1:
        raise ValueError(f"{path}: rows have {sorted(counts)} columns; all must have equally many.")
    try:
        values = np.array(rows, float)
    except ValueError as error:
        raise ValueError(f"{path}: not all entries are numbers: {error}.") from None
    if not names and values.shape[1] == 4:
        names = ["x", "y", "w_right", "w_left"]
    if len(names) != values.shape[1]:
        raise ValueError(f"{path}: {len(names)} names for {values.shape[1]} columns; write them in the first line.")
    plain = [_plain(name) for name in names]
    found = {what: values[:, plain.index(word)] for what, words in _MEANINGS.items() for word in words if word in plain}
    missing = {"x", "y"} - set(found)
    if missing:
        raise ValueError(f"{path}: columns {sorted(missing)} are missing among {names}.")
    return found
