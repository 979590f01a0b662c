"""Model files: one `.npz` that holds a model whole, its robot included, so that nobody needs to remember its sizes.

header                          JSON: format, version, class, sizes of the networks, joints of the robot
body.masses, body.coms, ...     the robot
encoder.cells[0].weight_ih, ... the parameters, each under its place in the model
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sartor.files import load_arrays, save_arrays
from sartor.models.base import AbstractModel, Nominal
from sartor.models.lagrangian import CaDeLaC
from sartor.models.links import RigidBody
from sartor.models.mlp import ResidualMLP

_FORMAT, _VERSION = "sartor model", 1
_CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (Nominal, CaDeLaC, ResidualMLP)}
_STATIC = [f.name for f in dataclasses.fields(RigidBody) if f.metadata.get("static")]
_ARRAYS = [f.name for f in dataclasses.fields(RigidBody) if f.name not in _STATIC]
_CLOSE = 1e-3  # of the largest entry; what rounding to single precision or to printed digits changes is far less


def save_model(path: str | Path, model: AbstractModel) -> None:
    """Write a model, whole or not at all.

    Args:
        path: The file, such as `arm.npz`; it is replaced if it is there.
        model: A `CaDeLaC`, `ResidualMLP` or `Nominal`.

    Fails: `ValueError` for a model of another class, or several models in one.
    """
    if type(model).__name__ not in _CLASSES or type(model) is not _CLASSES[type(model).__name__]:
        raise ValueError(f"model is a {type(model).__name__}: only {', '.join(_CLASSES)} have a file format.")
    sizes, arrays = _sizes(model), _named(model)
    for name, leaf in _named(_skeleton(type(model), model.body, sizes)).items():
        if arrays[name].shape != leaf.shape:
            raise ValueError(
                f"model has {name} of shape {arrays[name].shape}, where one model has {leaf.shape}: save the models of"
                " a batch one by one."
            )
    if model.body.masses.shape != (model.body.nq,):
        raise ValueError(f"model.body has {model.body.masses.shape} masses: save the models of a batch one by one.")
    body = {name: getattr(model.body, name) for name in _STATIC}
    header = {"format": _FORMAT, "version": _VERSION, "class": type(model).__name__, "sizes": sizes, "body": body}
    save_arrays(Path(path), header=np.asarray(json.dumps(header, ensure_ascii=False)), **arrays)


def load_model(path: str | Path, body: RigidBody | None = None) -> Any:
    """Read a model, equal to the one saved in every bit.

    Args:
        path: The file.
        body: The robot that the model has to be of: the same joints, and numbers equal to about a thousandth.

    Returns: the model, with the robot that it was saved with.
    Fails: `ValueError` for a file that is torn, is something else, comes from a newer version, or is of another robot.
    """
    path = Path(path)
    arrays = load_arrays(path)
    header = _header(path, arrays)
    cls = _CLASSES[header["class"]]
    try:
        fields: dict[str, Any] = {name: _tuples(header["body"][name]) for name in _STATIC}
        fields.update({name: arrays[f"body.{name}"] for name in _ARRAYS})
        robot = RigidBody(**fields)
        skeleton = _skeleton(cls, robot, header["sizes"])
        stored = {name: arrays[name] for name in _named(skeleton)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole model file ({error}): get another copy.") from None
    if body is not None:
        _check_robot(path, robot, body)
    leaves = [_leaf(path, name, stored[name], like.shape) for name, like in _named(skeleton).items()]
    return jax.tree.unflatten(jax.tree.structure(skeleton), leaves)


def _header(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        header = json.loads(str(arrays["header"]))
        known = header["format"] == _FORMAT
    except (KeyError, TypeError, ValueError):
        known, header = False, {}
    if not known:
        raise ValueError(f"{path} is no model file: choose one that `save_model` wrote.")
    if not header.get("version", 0) <= _VERSION:
        raise ValueError(
            f"{path} has version {header['version']} of the model format, and only {_VERSION} is known: update sartor."
        )
    if header.get("class") not in _CLASSES:
        raise ValueError(f"{path} holds a {header.get('class')}, which is none of {', '.join(_CLASSES)}.")
    return header


def _check_robot(path: Path, stored: RigidBody, body: RigidBody) -> None:
    same = stored.names == body.names and stored.parents == body.parents and stored.slides == body.slides
    different = [] if same else ["joints"]
    for name in _ARRAYS if same else ():
        there, here = np.asarray(getattr(stored, name)), np.asarray(getattr(body, name))
        if there.shape != here.shape or not np.all(np.abs(there - here) <= _CLOSE * np.max(np.abs(here), initial=1e-9)):
            different.append(name)
    if different:
        raise ValueError(
            f"{path} is of another robot: {_describe(stored)}; body is {_describe(body)}. They differ in their"
            f" {', '.join(different)}."
        )


def _describe(body: RigidBody) -> str:
    return f"a robot of {body.nq} joints ({', '.join(body.names)}) and {float(np.sum(body.masses)):.4g} kg"


def _sizes(model: AbstractModel) -> dict[str, Any]:
    """The arguments of the class that give a model with the same shapes."""
    if isinstance(model, CaDeLaC | ResidualMLP):
        network, encoder = model.inertia if isinstance(model, CaDeLaC) else model.network, model.encoder
        return {
            "widths": [layer.out_features for layer in network.layers[:-1]],
            "num_contexts": encoder.readout.out_features,
            "hidden": encoder.cells[0].hidden_size,
            "num_layers": len(encoder.cells),
            "history_length": model.history_length,
        }
    return {"history_length": model.history_length}


def _skeleton(cls: Any, body: RigidBody, sizes: dict[str, Any]) -> Any:
    """A model with shapes in place of arrays."""
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    if cls is Nominal:
        return eqx.filter_eval_shape(lambda body: Nominal(body, **sizes), body)
    return eqx.filter_eval_shape(lambda body: cls(body, key=jax.random.key(0), **sizes), body)


def _named(model: Any) -> dict[str, Any]:
    """The leaves of a model by their place in it, such as `body.masses`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {jax.tree_util.keystr(path).removeprefix("."): leaf for path, leaf in leaves}


def _leaf(path: Path, name: str, stored: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    if stored.shape != shape:
        raise ValueError(f"{path} is not a whole model file ({name} is {stored.shape}, not {shape}): get another copy.")
    leaf = jnp.asarray(stored)
    if leaf.dtype != stored.dtype:
        raise ValueError(
            f"{path} is in {stored.dtype}, which JAX does not use now: jax.config.update('jax_enable_x64', True)."
        )
    return leaf


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
