"""The rooms of the library: each imports those above it only, has a façade without code, and is packaged."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "lazy errors files timing processes",
    "accounting",
    "noise",
    "constraints",
    "nn",
    "losses",
    "bounds",
    "sensitivity",
    "distributed",
    "batches",
    "privacy",
    "models",
    "testing",
    "data features",
    "training",
    "estimators",
    "audit certify planning",
    "comparison",
    "report integrations",
    "commands cli __main__ __init__",
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}
FILES = sorted([*(ROOT / "lipdp").rglob("*.py"), *(ROOT / "models").rglob("*.py")])


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "models" if parts[0] == "models" else parts[1].removesuffix(".py")


def imported(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and room of every import of the library, those within functions too."""
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names = [f"lipdp.{a.name}" for a in node.names] if module == "lipdp" else [module]
        found += [(node.lineno, n.split(".")[1]) for n in names if n.startswith("lipdp.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_the_rooms_above_it_only(path):
    if path == ROOT / "lipdp" / "__init__.py":
        return
    own = LEVEL[room_of(path)]
    up = [(line, room) for line, room in imported(ast.parse(path.read_text())) if LEVEL.get(room, -1) > own]
    assert not up


def test_an_arrow_up_is_seen():
    tree = ast.parse(
        "def f():\n    from lipdp.training import Trainer\nimport lipdp.bounds.rules\nfrom lipdp import nn"
    )
    assert imported(tree) == [(3, "bounds"), (4, "nn"), (2, "training")]


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_facade_holds_no_code(path):
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, kinds) for node in ast.parse(path.read_text()).body)


def test_all_packages_are_in_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in FILES if p.name == "__init__.py"}
    found = {".".join(f.parts) if f.parts[0] == "lipdp" else "lipdp." + ".".join(f.parts) for f in folders}
    assert set(listed) == found
