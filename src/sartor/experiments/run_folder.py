"""What is in a run folder: `config.json`, `metrics.json`, `episode.npz`; while it runs, `checkpoint.npz`."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary, whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n"))


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote."""
    return json.loads(path.read_text())


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write named arrays as `.npz`, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    _replace(path, write)


def save_tree(path: Path, tree: PyTree) -> None:
    """Write the array leaves of a pytree, in order."""
    save_arrays(path, **{f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))})


def load_tree(path: Path, like: PyTree) -> PyTree:
    """Read what `save_tree` wrote, into the structure of `like`; its shapes do not matter."""
    with np.load(path) as file:
        leaves = [jnp.asarray(file[f"leaf_{i}"]) for i in range(len(file.files))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


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
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)
