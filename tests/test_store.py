"""Model files: what comes back is what went in, and nothing else is taken for it."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from sartor.files import load_arrays, save_arrays
from sartor.models.base import Nominal
from sartor.models.lagrangian import CaDeLaC
from sartor.models.mjcf import from_mujoco
from sartor.models.mlp import ResidualMLP
from sartor.models.store import load_model, save_model

ARM = """
<mujoco>
  <worldbody>
    <body name="upper">
      <joint name="shoulder" axis="0 1 0" armature="0.1"/>
      <inertial mass="{mass}" pos="0 0 0.2" diaginertia="0.02 0.02 0.01"/>
      <body name="lower" pos="0 0 {length}">
        <joint name="{joint}" type="{kind}" axis="0 1 0"/>
        <inertial mass="0.7" pos="0 0 0.1" diaginertia="0.01 0.01 0.01"/>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
SIZES = {"widths": (5, 4, 3), "num_contexts": 2, "hidden": 3, "num_layers": 2, "history_length": 6}


def arm(mass=1.5, length=0.4, joint="elbow", kind="hinge"):
    return from_mujoco(mujoco.MjModel.from_xml_string(ARM.format(mass=mass, length=length, joint=joint, kind=kind)))


@functools.cache
def models():
    body, key = arm(), jax.random.key(1)
    return [
        CaDeLaC(body, key=key),
        CaDeLaC(body, **SIZES, key=key),
        ResidualMLP(body, **SIZES, key=key),
        Nominal(body),
        Nominal(body, history_length=4),
    ]


def same(a, b):
    """Structure (static fields included), values in every bit and types."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "arm.npz"
    save_model(path, models()[1])
    return path


def rewrite(path, arrays=(), **header):
    """Change a model file: some of its arrays (None removes one), some entries of its header."""
    stored = load_arrays(path)
    changed = json.loads(str(stored.pop("header"))) | header
    stored = {name: value for name, value in (stored | dict(arrays)).items() if value is not None}
    save_arrays(path, header=np.asarray(json.dumps(changed)), **stored)


@pytest.mark.parametrize("model", models(), ids=["published", "small", "mlp", "nominal", "nominal-past"])
@pytest.mark.parametrize("suffix", [".npz", ".model"])
def test_a_model_comes_back_in_every_bit(model, suffix, tmp_path):
    path = tmp_path / f"arm{suffix}"
    save_model(path, model)
    back = load_model(path, body=arm())
    assert type(back) is type(model) and same(back, model)
    save_model(path, back)  # over the file that is there
    assert same(load_model(str(path)), model)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_model_that_comes_back_computes_the_same(file):
    def outputs(model):
        past = jnp.ones((SIZES["history_length"], 6))
        z = model.context(past)
        return z, model.torque(*jnp.ones((3, 2)), z)

    before, after = eqx.filter_jit(outputs)(models()[1]), eqx.filter_jit(outputs)(load_model(file))
    assert same(before, after)


def test_single_precision_and_odd_values_are_kept(tmp_path):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), models()[2])
    odd = jnp.asarray([np.nan, np.inf, -0.0, 1e-45][: SIZES["num_contexts"]], jnp.float32)
    model = eqx.tree_at(lambda m: m.encoder.readout.bias, model, odd)
    save_model(tmp_path / "arm.npz", model)
    assert same(load_model(tmp_path / "arm.npz"), model)


def test_the_file_can_be_read_without_the_package(file):
    stored = np.load(file)
    header = json.loads(str(stored["header"]))
    assert header["format"] == "sartor model" and header["version"] == 1 and header["class"] == "CaDeLaC"
    assert header["sizes"] == {name: list(v) if isinstance(v, tuple) else v for name, v in SIZES.items()}
    assert header["body"]["names"] == ["shoulder", "elbow"]
    np.testing.assert_array_equal(stored["body.masses"], [1.5, 0.7])
    assert stored["inertia.layers[0].weight"].shape == (5, 6)


@pytest.mark.parametrize(
    "other, differ",
    [
        (arm(joint="wrist"), "joints"),
        (arm(kind="slide"), "joints"),
        (arm(mass=1.6), "masses"),
        (arm(length=0.41), "positions"),
    ],
    ids=["name", "kind", "mass", "length"],
)
def test_a_file_of_another_robot_is_refused_with_both_named(file, other, differ):
    with pytest.raises(ValueError, match="is of another robot") as error:
        load_model(file, body=other)
    message = str(error.value)
    assert "2 joints (shoulder, elbow) and 2.2 kg" in message and f"differ in their {differ}" in message
    assert f"body is a robot of 2 joints ({', '.join(other.names)})" in message


def test_another_number_of_joints_is_refused(file):
    body = from_mujoco(
        mujoco.MjModel.from_xml_string(
            "<mujoco><worldbody><body><joint name='only'/><geom size='0.1'/></body></worldbody></mujoco>"
        )
    )
    with pytest.raises(ValueError, match=r"of 2 joints \(shoulder, elbow\).*of 1 joints \(only\)"):
        load_model(file, body=body)


def test_a_robot_that_differs_by_rounding_is_the_same(file):
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), arm())
    assert same(load_model(file, body=single), models()[1])  # and the robot is that of the file
    load_model(file, body=arm(mass=1.50001))


def test_a_torn_file_is_named(file):
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"arm\.npz cannot be read, it is torn"):
            load_model(file)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"arm\.npz cannot be read"):
        load_model(file)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "other.npz"
    save_arrays(path, leaf_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz is no model file"):
        load_model(path)
    for header in ("not json", "[1]", "{}", '{"format": "of another program"}'):
        save_arrays(path, header=np.asarray(header))
        with pytest.raises(ValueError, match="is no model file: choose one that `save_model` wrote"):
            load_model(path)
    path.write_text("a text")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "missing.npz")


def test_a_newer_version_and_an_unknown_class_are_refused(file):
    rewrite(file, version=2)
    with pytest.raises(ValueError, match="has version 2 of the model format, and only 1 is known: update sartor"):
        load_model(file)
    rewrite(file, version=1, **{"class": "Transformer"})
    with pytest.raises(ValueError, match="holds a Transformer, which is none of Nominal, CaDeLaC, ResidualMLP"):
        load_model(file)


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": {"body.masses": None}},
        {"arrays": {"encoder.readout.bias": None}},
        {"arrays": {"encoder.readout.bias": np.zeros(7)}},
        {"sizes": SIZES | {"hidden": 4}},
        {"sizes": {}},
        {"body": {}},
    ],
    ids=["no-mass", "no-bias", "bias-of-7", "hidden", "no-sizes", "no-body"],
)
def test_a_file_whose_parts_do_not_fit_is_refused(file, change):
    rewrite(file, **change)
    with pytest.raises(ValueError, match=r"arm\.npz is not a whole model file"):
        load_model(file)


def test_a_file_in_double_precision_is_not_rounded_in_silence(file):
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="is in float64, which JAX does not use now"):
            load_model(file)
    finally:
        jax.config.update("jax_enable_x64", True)


class Mine(Nominal):
    """A user's own."""


def test_what_has_no_file_format_is_refused_before_anything_is_written(tmp_path):
    body, path = arm(), tmp_path / "arm.npz"
    with pytest.raises(ValueError, match="model is a Mine: only Nominal, CaDeLaC, ResidualMLP have a file format"):
        save_model(path, Mine(body))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), models()[1:4])
    for model in many:
        with pytest.raises(ValueError, match="one by one"):
            save_model(path, model)
    assert not path.exists()
