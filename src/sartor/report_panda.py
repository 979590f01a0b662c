"""A Panda run folder, finished or not, to tables, figures, one HTML page and the text of docs/results.md; reads only.

What has no data yet is left out, with one line that says what is missing.
"""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from rich import box
from rich.table import Table

from sartor import evaluate, pairing, tables
from sartor.figures import costs
from sartor.figures.style import styled
from sartor.pairing import BASELINES
from sartor.report_parts import GLOSSARY, PARTS, Part

Files = dict[str, Any]
_READ: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".npz": lambda path: dict(np.load(path)),
    ".parquet": lambda path: pairing.columns(pyarrow.parquet.read_table(path)),
}
_FILES = (
    "config.json", "environment.json", "evaluations.parquet", "curves.parquet", "labels.json", "maps.npz", "truth.json",
    "spectrum.npz", "traces.npz", "timing.json", "speed.json", "data.json", "finished.json",
)  # fmt: skip
_LARGE = ("traces", "spectrum")  # pictures that only the page has
_CSS = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 68rem; margin: 0 auto;
       padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { max-width: 46rem; margin: .4rem 0 } img { max-width: 100%; height: auto; display: block; margin: .6rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid #d9dee4 }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #5f6b7a; vertical-align: bottom }
code { font-size: .85em; background: #f3f5f7; padding: .1em .3em; overflow-wrap: anywhere }
details td:last-child { text-align: left; white-space: normal }
.missing { color: #5f6b7a; font-size: .9rem }
"""


def load(folder: Path) -> Files:
    """What there is of a run, by file name. Fails: `ValueError` if it is not the folder of a Panda run."""
    found = {name: _READ[Path(name).suffix](folder / name) for name in _FILES if (folder / name).exists()}
    if found.get("config.json", {}).get("experiment") != "panda":
        raise ValueError(f'{folder} holds no Panda run: config.json with "experiment": "panda" is missing.')
    return found


def table(folder: Path) -> Table:
    """The headline of a run, for people at a terminal."""
    files = load(folder)
    out = Table(title=_title(files), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    out.caption, out.caption_justify = f"±: half of the 95 % interval. {_footnote(files)}", "left"
    out.add_column("\nweighting", overflow="fold", min_width=max(map(len, BASELINES)))
    for name in (
        "cost, %\nof stand", "unsatu-\nrated", "satu-\nrated", "J mean\nmedian", "q mrad\nqd rad/s",
        "e.e. mm\nat limit", "unstable\nfailed",
    ):  # fmt: skip
        out.add_column(name, justify="right", overflow="fold")
    for row in tables.rows_of(files["evaluations.parquet"]) if "evaluations.parquet" in files else ():
        s, baseline = row.summary, row.arm.method in BASELINES
        out.add_row(
            row.arm.method if baseline else f"[bold]{row.arm.method}[/bold]\n[dim]{row.arm.variant or _p(row)}[/dim]",
            *map(tables.half_width, row.ratios),
            f"{s['J']:.4g}\n{s['J_median']:.3g}",
            f"{1e3 * s['q_rmse']:.1f}\n{s['qd_rmse']:.3f}",
            f"{1e3 * s['ee_rmse']:.1f}\n{s['saturated']:.1%}",
            f"{s['unstable']:.0f}/{s['episodes']}\n{s['failed']:.0f}",
            style="dim" if baseline else None,
        )
    return out


def figures(folder: Path) -> list[Path]:
    """Draw what there is data for, as PNG files in the folder; returns their paths."""
    return [path for path, _ in _draw(folder, load(folder)).values() if path is not None]


def page(folder: Path) -> Path:
    """Write `report.html`: tables, figures and clip in one file that needs nothing else."""
    files = load(folder)
    drawn = _draw(folder, files)
    parts = [f"<details><summary>What the words mean</summary>{tables.as_html(GLOSSARY)}</details>"]
    for part in PARTS:
        grid, missing = _grid(part, files)
        path, no_figure = drawn.get(part.name, (None, ""))
        parts.append(f"<h2>{html.escape(part.title)}</h2>")
        if missing or (no_figure and part.grid is None):
            parts.append(f'<p class="missing">{html.escape(missing or no_figure)}</p>')
            continue
        parts.append(f"<p>{html.escape(part.text)}</p>")
        parts += [tables.as_html(grid)] if grid is not None else []
        parts += [_image(path, part.title)] if path is not None else []
        parts += [f'<p class="missing">{html.escape(no_figure)}</p>'] if no_figure else []
    parts.append(f"<h2>Settings</h2>{tables.as_html(_settings(files))}")
    title, command, versions = (html.escape(name(files)) for name in (_title, _command, _versions))
    head = f"<h1>{title}</h1><p>Made by <code>{command}</code>. {versions}</p>"
    body = head + f"<p>{html.escape(_footnote(files))}</p>" + _clip(folder) + "\n".join(parts)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    out = folder / "report.html"
    text = f'<!doctype html><html lang="en"><head>{meta}<title>{title}</title><style>{_CSS}</style>'
    out.write_text(f"{text}</head><body>{body}</body></html>\n", encoding="utf-8")
    return out


def results_markdown(folders: list[Path], images: Path | None = None) -> str:
    """The text of docs/results.md: the tables of some runs, each with the command and the file it comes from.

    Args:
        folders: The run folders.
        images: A folder beside the text for the figures, which are linked then.
    """
    lines = ["# Results", "", "Written by `sartor report` from run folders; not edited by hand.", ""]
    lines += ["## What the words mean", "", *(f"* **{word}**: {meaning}" for word, meaning in GLOSSARY.rows), ""]
    for folder in folders:
        files, drawn = load(folder), {}
        command = _command(files)
        lines += [f"## {_title(files)}", "", f"```sh\n{command}\n```", "", _versions(files), "", _footnote(files), ""]
        if images is not None:
            images.mkdir(parents=True, exist_ok=True)
            drawn = _draw(folder, files)
        for part in (part for part in PARTS if part.name not in _LARGE):
            grid, missing = _grid(part, files)
            path, _ = drawn.get(part.name, (None, ""))
            if part.grid is None and path is None:
                continue
            lines += [f"### {part.title}", "", missing or part.text, ""]
            lines += [*tables.as_markdown(grid), "", f"From `{part.source}` of `{command}`.", ""] if grid else []
            if path is not None and images is not None:
                name = f"{files['config.json'].get('preset', 'run')}-{path.name}"
                (images / name).write_bytes(path.read_bytes())
                lines += [f"![{part.title}]({images.name}/{name})", ""]
        lines += ["### Settings", "", *tables.as_markdown(_settings(files)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _settings(files: Files) -> tables.Grid:
    content = {name: value for name, value in files["config.json"].items() if name != "command"}
    return tables.Grid(["setting", "value"], [[name, json.dumps(value)] for name, value in content.items()])


def _draw(folder: Path, files: Files) -> dict[str, tuple[Path | None, str]]:
    """By name of the part: the path of its figure, or why there is none."""
    out: dict[str, tuple[Path | None, str]] = {}
    with styled():
        for part in (part for part in PARTS if part.figure is not None):
            path = folder / f"{part.name}.png"
            fig = part.figure(files[part.source]) if part.source in files and part.figure is not None else None
            if fig is None:
                out[part.name] = (None, _missing(part, files))
            else:
                fig.savefig(path)
                out[part.name] = (path, "")
    return out


def _grid(part: Part, files: Files) -> tuple[tables.Grid | None, str]:
    """The table of a part, or None and why there is none."""
    if part.grid is None:
        return None, ""
    grid = part.grid(files[part.source]) if part.source in files else None
    return (grid, "") if grid is not None and grid.rows else (None, _missing(part, files))


def _missing(part: Part, files: Files) -> str:
    reason = "has nothing for this yet" if part.source in files else "is missing"
    return f"Left out: {part.source} {reason}."


def _title(files: Files) -> str:
    unfinished = "" if "finished.json" in files else " (not finished: what there is so far)"
    return f"Panda: models tailored to tracking, preset {files['config.json'].get('preset', '?')}{unfinished}"


def _command(files: Files) -> str:
    config = files["config.json"]
    return config.get("command") or f"uv run sartor run panda --preset {config.get('preset', 'quick')}"


def _versions(files: Files) -> str:
    return ", ".join(f"{k} {v}" for k, v in files.get("environment.json", {}).items())


def _footnote(files: Files) -> str:
    """What the intervals can tell apart, and the rules by which episodes are counted."""
    rules = (
        f"Saturated environments: the controller that knows payload and damping reaches a torque limit in at least "
        f"{pairing.SATURATED_SHARE:.0%} of its steps. "
        f"Unstable: mean speed error above {evaluate.UNSTABLE_SPEED} rad/s."
    )
    anchor = files["config.json"].get("anchor")
    if anchor:
        rules += f" Of the loss, the weighted part is {1 / (1 + anchor):.0%} at the beginning (anchor {anchor:g})."
    rows = files.get("evaluations.parquet")
    if rows is None:
        return "No evaluations yet: evaluations.parquet is missing."
    arms = [arm for of_p in costs.tuned(rows).values() for arm in of_p if arm.method != "stand"]
    ratios = [r for r in (tables.attempt(evaluate.ratio, rows, arm) for arm in arms) if r is not None]
    if not ratios:
        return rules
    detectable = np.median([evaluate.minimum_detectable(r) for r in ratios])
    trained = {(m, s) for m, s in zip(rows["model"].tolist(), rows["seed"].tolist(), strict=True) if s >= 0}
    runs, models = len(trained), len({m for m, _ in trained})
    few = f" With {models} pretrained model{'s' if models != 1 else ''} the intervals are too narrow."
    few = few if models < 5 else ""
    dropped = sum(r.dropped for r in ratios)
    without = f" {dropped} episodes without partner are left out." if dropped else ""
    counted = f"{runs} training{'s' if runs != 1 else ''}; effects below {detectable:.1%} cannot be told from none."
    return f"{counted}{few}{without} {rules}"


def _p(row: tables.Row) -> str:
    return f"p = {row.arm.p}"


def _image(path: Path, alt: str) -> str:
    kind = path.suffix.removeprefix(".")
    return (
        f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}">'
    )


def _clip(folder: Path) -> str:
    path = folder / "clip.webp"
    if not path.exists():
        return '<p class="missing">No clip: clip.webp is missing (it takes MuJoCo with OpenGL).</p>'
    return "<p>The pretrained beside the tailored model, in the same environment.</p>" + _image(path, "clip")
