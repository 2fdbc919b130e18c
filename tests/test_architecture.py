"""The tree is the architecture: imports point downward, public names are declared, light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import coldpress

SOURCE = Path(coldpress.__file__).parent
FLOORS = (
    {"errors"},
    {"described", "digest", "events", "registry", "hardware", "memory", "scores", "units"},
    {"kernels", "config", "record"},
    {"artifacts", "goals", "summary"},
    {"data", "model_card", "report"},
    {"nn", "graph"},
    {"passes", "evaluate"},
    {"parity", "systems", "chat"},
    {"engine"},
    {"search"},
    {"api", "testing"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in SOURCE.rglob("*.py") if "__pycache__" not in path.parts)


def room(path: Path) -> str:
    """The top-level module or package a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "coldpress" else [f"coldpress.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("coldpress.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path: Path) -> None:
    mine = room(path)
    if mine == "__init__":
        return
    for other in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
        if other != mine:
            assert FLOOR_OF[other] < FLOOR_OF[mine], (
                f"{mine} (floor {FLOOR_OF[mine]}) imports {other} (floor {FLOOR_OF[other]})"
            )


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in MODULES} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_public_names_are_declared(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name in ("__init__.py", "__main__.py"):
        return
    declared = {
        element.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AugAssign)
        and "__all__" in ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for element in node.value.elts  # type: ignore[attr-defined]
    }
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not [name for name in declared if name.startswith("_")]
    assert not {name for name in defined if not name.startswith("_")} - declared - TABLES.get(path.name, set()), (
        "public by name, but not in __all__"
    )


TABLES: dict[str, set[str]] = {}
FORBIDDEN_NAMES = ("utils", "common", "helpers", "misc")


def test_no_grab_bags() -> None:
    assert not [path for path in MODULES if path.stem in FORBIDDEN_NAMES]
    classes = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert not [name for name in classes if name.endswith(("Manager", "Handler"))]


def test_broad_excepts_stand_in_two_places() -> None:
    places = sorted(
        path.relative_to(SOURCE).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
    )
    assert places == ["cli/main.py", "engine/worker.py"]


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(out.splitlines()[-1].split())


FRAMEWORKS = {"torch", "transformers", "datasets", "onnxruntime", "onnx_ir", "numba", "peft", "bitsandbytes"}


def test_help_and_import_load_no_framework() -> None:
    loaded = loaded_after("import coldpress.cli.main")
    assert not loaded & (FRAMEWORKS | {"numpy", "pydantic", "rich", "jinja2", "plotly"})


def test_planning_loads_no_framework() -> None:
    loaded = loaded_after("import coldpress.api, coldpress.registry as r; [r.PASSES[name] for name in r.PASSES]")
    assert not loaded & (FRAMEWORKS | {"jinja2", "plotly", "tensorboard", "mlflow"})
