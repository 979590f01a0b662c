"""The order of the modules, and that what is public says what it is."""

import ast
import inspect
from pathlib import Path

import equinox as eqx
import pytest

import sartor

ROOT = Path(sartor.__file__).parent
# Each imports only from those before it, or beside it.
ORDER = [
    {"problem"}, {"solution"}, {"kkt"}, {"riccati"}, {"sensitivity"}, {"solvers.base"},
    {"solvers.qp", "solvers.active_set"}, {"solvers.sqp", "solvers.box_ddp"}, {"solve"}, {"labels"}, {"mpc"}, {"files"},
    {"parameters"}, {"descent"}, {"imitate"}, {"policy_gradient"}, {"estimators"}, {"tuning"},
    {"bench", "correction"}, {"tune"}, {"stationarity"},
    {"models.spatial"}, {"models.links"}, {"models.torque_derivatives"}, {"models.rigid_body", "models.integrate"},
    {"models.mjcf"}, {"models.base"}, {"models.network"}, {"models.vehicle"}, {"models.lagrangian"}, {"models.mlp"},
    {"models.store"},
    {"data"}, {"logs", "lerobot_meta"}, {"lerobot"},
    {"weights"}, {"samples"}, {"train"}, {"labelling"}, {"truth"}, {"plant", "render"}, {"tracking"},
    {"track"}, {"track_generator", "track_files"}, {"systems"}, {"racing"}, {"racing_labels", "racing_training"},
    {"pairing"}, {"evaluate"}, {"figures"}, {"report_closed_loop"}, {"tables"}, {"report"},
    {"report_panda"}, {"experiments"}, {"report_imitation", "report_tuning", "report_racing"}, {"tailoring"}, {"cli"},
]  # fmt: skip


def place(module):
    """Index in `ORDER`; a package there stands for all that is in it."""
    for i, names in enumerate(ORDER):
        if any(module == name or module.startswith(name + ".") for name in names):
            return i
    return None


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "solvers", "models", "experiments"):
            yield name, path


def imports_of(path):
    """Modules of sartor that a file imports, submodules included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sartor":
            base = node.module.removeprefix("sartor").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix(".")
                yield whole if (ROOT / (whole.replace(".", "/") + ".py")).exists() else base


@pytest.mark.parametrize("name, path", list(modules()), ids=[name for name, _ in modules()])
def test_imports_go_one_way(name, path):
    assert place(name) is not None, f"add {name} to ORDER"
    for imported in imports_of(path):
        if imported:
            assert place(imported) is not None and place(imported) <= place(name), f"{name} imports {imported}"


def public():
    return sorted(
        name for name in vars(sartor) if not name.startswith("_") and not inspect.ismodule(vars(sartor)[name])
    )


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name):
    thing = getattr(sartor, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        arguments = [a for a in inspect.signature(thing).parameters]
        documented = inspect.getdoc(thing)
        missing = [
            a for a in arguments if len(arguments) > 2 and f"{a}:" not in documented and f"`{a}`" not in documented
        ]
        assert not missing, missing
    elif inspect.isclass(thing) and issubclass(thing, eqx.Module):
        source = inspect.getsource(thing)
        fields = [f for f in thing.__dataclass_fields__]
        body = ast.parse(source).body[0].body
        annotated = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
        undocumented = [
            body[i].target.id
            for i in annotated
            if not (i + 1 < len(body) and isinstance(body[i + 1], ast.Expr)) and body[i].target.id in fields
        ]
        assert not undocumented, undocumented
