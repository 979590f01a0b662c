"""What every run folder has: its settings, versions, commit and device, and the time that each phase took."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sartor.experiments.jobs import Monitor, Workers
from sartor.files import read_json, write_json

_IGNORED = ("workers", "command")  # nothing that is computed depends on them


@contextmanager
def opened(out: Path, config: Any, monitor: Monitor | None, command: str) -> Iterator[Workers]:
    """A run folder for a resolved `config`, and its workers; at the end it is marked as finished.

    Fails: `ValueError` if the folder holds another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, config, command)
    _note_environment(out)
    path = out / "timing.json"
    before = read_json(path) if path.exists() else {}
    keep_times = lambda times: write_json(path, _add(before, times))
    with Workers(config.workers, monitor, keep_times) as workers:
        yield workers
    write_json(out / "finished.json", {"command": command})


def environment() -> dict[str, str]:
    """Versions, commit and device: what else a number may depend on."""
    device = jax.devices()[0]
    return {
        "sartor": version("sartor"),
        "jax": version("jax"),
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpus": str(os.cpu_count()),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the source tree; "unknown" for an installed package."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" with changes" if changed else "")


def _claim(out: Path, config: Any, command: str) -> None:
    path = out / "config.json"
    mine = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    if path.exists():
        stored = read_json(path)
        different = [k for k in mine if k not in _IGNORED and stored.get(k) != mine[k]]
        if different:
            raise ValueError(f"{out} holds a run with other settings ({', '.join(different)}): choose another folder.")
        return
    write_json(path, mine | {"command": command})


def _note_environment(out: Path) -> None:
    """Versions and device; of the commits, all that the run was made with."""
    mine, path = environment(), out / "environment.json"
    before = read_json(path)["commit"].split(", ") if path.exists() else []
    write_json(path, mine | {"commit": ", ".join(dict.fromkeys([*before, mine["commit"]]))})


def _add(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {**a, **b}}
