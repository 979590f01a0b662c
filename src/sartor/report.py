"""Run folders, finished or not, to tables, figures, one HTML page and the text of docs/results.md; reads only.

What an experiment's report shows is a `Report`; what has no data yet is left out, with one line that says what is
missing.
"""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
from rich.table import Table

from sartor import tables
from sartor.figures.style import styled
from sartor.pairing import columns

Files = dict[str, Any]
_READ: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".npz": lambda path: dict(np.load(path)),
    ".parquet": lambda path: columns(pyarrow.parquet.read_table(path)),
}
_ALWAYS = ("config.json", "environment.json", "timing.json", "finished.json")
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


class Part(NamedTuple):
    """A section of a report: a table, a figure, or both, from one file."""

    name: str
    title: str
    source: str
    text: str
    grid: Callable[[Any], tables.Grid] | None = None
    figure: Callable[[Any], Any] | None = None
    large: bool = False
    """Only on the page, not in the text."""


class Report(NamedTuple):
    """What is shown of an experiment."""

    experiment: str
    """As `config.json` names it."""
    title: str
    parts: tuple[Part, ...]
    glossary: tables.Grid
    """What its words mean."""
    table: Callable[[Files], Table]
    """The headline, for people at a terminal."""
    footnote: Callable[[Files], str] = lambda files: ""
    """What a reader has to know of the numbers."""
    clip: str = ""
    """A moving picture in the run folder, and what it shows."""


def load(report: Report, folder: Path) -> Files:
    """What there is of a run, by file name. Fails: `ValueError` if it is the folder of something else."""
    names = dict.fromkeys((*_ALWAYS, *(part.source for part in report.parts)))
    found = {name: _READ[Path(name).suffix](folder / name) for name in names if (folder / name).exists()}
    if found.get("config.json", {}).get("experiment") != report.experiment:
        raise ValueError(
            f'{folder} holds no run of {report.experiment}: config.json with "experiment": "{report.experiment}" is'
            " missing."
        )
    return found


def table(report: Report, folder: Path) -> Table:
    """The headline of a run, for people at a terminal."""
    files = load(report, folder)
    out = report.table(files)
    out.title, out.title_justify = title(report, files), "left"
    return out


def figures(report: Report, folder: Path) -> list[Path]:
    """Draw what there is data for, as PNG files in the folder; returns their paths."""
    return [path for path, _ in _draw(report, folder, load(report, folder)).values() if path is not None]


def page(report: Report, folder: Path) -> Path:
    """Write `report.html`: tables, figures and clip in one file that needs nothing else."""
    files = load(report, folder)
    drawn = _draw(report, folder, files)
    sections = [f"<details><summary>What the words mean</summary>{tables.as_html(report.glossary)}</details>"]
    for part in report.parts:
        grid, missing = _grid(part, files)
        path, no_figure = drawn.get(part.name, (None, ""))
        sections.append(f"<h2>{html.escape(part.title)}</h2>")
        if missing or (no_figure and part.grid is None):
            sections.append(f'<p class="missing">{html.escape(missing or no_figure)}</p>')
            continue
        sections.append(f"<p>{html.escape(part.text)}</p>")
        sections += [tables.as_html(grid)] if grid is not None else []
        sections += [_image(path, part.title)] if path is not None else []
        sections += [f'<p class="missing">{html.escape(no_figure)}</p>'] if no_figure else []
    sections.append(f"<h2>Settings</h2>{tables.as_html(_settings(files))}")
    heading, command, versions = (html.escape(t) for t in (title(report, files), _command(files), _versions(files)))
    head = f"<h1>{heading}</h1><p>Made by <code>{command}</code>. {versions}</p>"
    body = head + f"<p>{html.escape(report.footnote(files))}</p>" + _clip(report, folder) + "\n".join(sections)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    out = folder / "report.html"
    text = f'<!doctype html><html lang="en"><head>{meta}<title>{heading}</title><style>{_CSS}</style>'
    out.write_text(f"{text}</head><body>{body}</body></html>\n", encoding="utf-8")
    return out


def results_markdown(runs: list[tuple[Report, Path]], images: Path | None = None) -> str:
    """The text of docs/results.md: the tables of some runs, each with the command and the file it comes from.

    Args:
        runs: The run folders and what to show of them.
        images: A folder beside the text for the figures, which are linked then, and for the files that both are made
            from: a folder for each run, named by experiment and preset, or like the run's own folder if that is taken.

    Fails: `ValueError` if two runs would have one name.
    """
    lines = ["# Results", "", "Written by `sartor report` from run folders; not edited by hand.", ""]
    told: list[str] = []
    for (report, folder), name in zip(runs, _names(runs), strict=True):
        if report.experiment not in told:
            told.append(report.experiment)
            lines += [f"## {report.title}: what the words mean", ""]
            lines += [*(f"* **{word}**: {meaning}" for word, meaning in report.glossary.rows), ""]
        lines += _text_of_run(report, folder, name, images)
    return "\n".join(lines).rstrip() + "\n"


def title(report: Report, files: Files) -> str:
    """Title, preset, and whether the run has finished."""
    unfinished = "" if "finished.json" in files else " (not finished: what there is so far)"
    return f"{report.title}, preset {files['config.json'].get('preset', '?')}{unfinished}"


def _text_of_run(report: Report, folder: Path, name: str, images: Path | None) -> list[str]:
    files, drawn = load(report, folder), {}
    command = _command(files)
    lines = [f"## {title(report, files)}, {name}", "", f"```sh\n{command}\n```", "", _versions(files), ""]
    lines += [report.footnote(files), ""] if report.footnote(files) else []
    if images is not None:
        drawn = _draw(report, folder, files)
        _keep(report, folder, images / name)
    for part in (part for part in report.parts if not part.large):
        grid, missing = _grid(part, files)
        path, _ = drawn.get(part.name, (None, ""))
        if part.grid is None and path is None:
            continue
        lines += [f"### {part.title}", "", missing or part.text, ""]
        lines += [*tables.as_markdown(grid), "", f"From `{part.source}` of `{command}`.", ""] if grid else []
        if path is not None and images is not None:
            (images / f"{name}-{path.name}").write_bytes(path.read_bytes())
            lines += [f"![{part.title}]({images.name}/{name}-{path.name})", ""]
    return [*lines, "### Settings", "", *tables.as_markdown(_settings(files)), ""]


def _names(runs: list[tuple[Report, Path]]) -> list[str]:
    """Of runs among the results: experiment and preset; that of the folder where another run has those."""
    names: list[str] = []
    for report, folder in runs:
        preset = load(report, folder)["config.json"].get("preset", "run")
        own = folder.resolve().name
        own = own if own.startswith(report.experiment) else f"{report.experiment}-{own}"
        names.append(own if f"{report.experiment}-{preset}" in names else f"{report.experiment}-{preset}")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"several run folders would be kept as {sorted(twice)}: rename all but one of them.")
    return names


def _keep(report: Report, folder: Path, copy: Path) -> None:
    """Copy the files that the text is made from: the report of the copy is the same, without what is large."""
    copy.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys((*_ALWAYS, *(part.source for part in report.parts if not part.large)))
    for name in names:
        if (folder / name).exists() and folder.resolve() != copy.resolve():
            (copy / name).write_bytes((folder / name).read_bytes())


def _settings(files: Files) -> tables.Grid:
    content = {name: value for name, value in files["config.json"].items() if name != "command"}
    return tables.Grid(["setting", "value"], [[name, json.dumps(value)] for name, value in content.items()])


def _draw(report: Report, folder: Path, files: Files) -> dict[str, tuple[Path | None, str]]:
    """By name of the part: the path of its figure, or why there is none."""
    out: dict[str, tuple[Path | None, str]] = {}
    with styled():
        for part in (part for part in report.parts if part.figure is not None):
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


def _command(files: Files) -> str:
    config = files["config.json"]
    return config.get("command") or f"uv run sartor run {config['experiment']} --preset {config.get('preset', 'quick')}"


def _versions(files: Files) -> str:
    return ", ".join(f"{k} {v}" for k, v in files.get("environment.json", {}).items())


def _image(path: Path, alt: str) -> str:
    kind = path.suffix.removeprefix(".")
    return (
        f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}">'
    )


def _clip(report: Report, folder: Path) -> str:
    if not report.clip:
        return ""
    path = folder / "clip.webp"
    if not path.exists():
        return '<p class="missing">No clip: clip.webp is missing.</p>'
    return f"<p>{html.escape(report.clip)}</p>" + _image(path, "clip")
