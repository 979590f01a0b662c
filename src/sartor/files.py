"""Files and folders that are replaced whole or not at all.

What is new is written beside what is there, brought to the disk, and renamed. So a write that fails, as on a full disk,
leaves what was there; and a reader never sees half of it.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder; it takes the place of `path` if all goes well, and vanishes if not."""
    new, _ = _beside(path)
    try:
        yield new
        _sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, mark: str) -> Iterator[Path]:
    """An empty folder to write to; it takes the place of `folder` if all goes well, and vanishes if not.

    A folder that is there is replaced only if it is empty or holds the file `mark`, which says what it is. Two renames
    are needed then; `complete` makes up for the second if a kill hits between them.
    """
    complete(folder)
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and has no {mark}, so it is not replaced: choose another folder.")
    new, old = _beside(folder)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for path in new.rglob("*"):
            _sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def complete(folder: Path) -> None:
    """Finish a replacement that was killed between its renames: the old folder is aside and the new one whole."""
    new, old = _beside(folder)
    if old.exists() and not folder.exists():
        (new if new.exists() else old).rename(folder)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a dictionary or a list, whole or not at all."""
    with replacing_file(path) as new:
        new.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write named arrays as `.npz`, whole or not at all."""
    with replacing_file(path) as new, new.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `save_arrays` wrote. Fails: `ValueError` that names a file that is torn or something else."""
    with Path(path).open("rb") as stream:  # a file that may not be opened is not torn
        try:
            with np.load(stream) as file:
                return dict(file)
        except (zipfile.BadZipFile, EOFError, OSError, TypeError, ValueError) as error:  # TypeError: a plain .npy
            raise ValueError(f"{path} cannot be read, it is torn or no .npz file ({error}): delete it.") from None


def save_tree(path: Path, tree: PyTree) -> None:
    """Write the leaves of a pytree, which are arrays or numbers, in order."""
    save_arrays(path, **{f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))})


def load_tree(path: Path, like: PyTree) -> PyTree:
    """Read what `save_tree` wrote, into the structure of `like`; its shapes do not matter."""
    stored, structure = load_arrays(path), jax.tree.structure(like)
    if set(stored) != {f"leaf_{i}" for i in range(structure.num_leaves)}:
        raise ValueError(
            f"{path} holds {len(stored)} arrays, not {structure.num_leaves}: it was written for something else."
        )
    return jax.tree.unflatten(structure, [jnp.asarray(stored[f"leaf_{i}"]) for i in range(structure.num_leaves)])


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
