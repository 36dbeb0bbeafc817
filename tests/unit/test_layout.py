"""A module imports from the rows above its own: the folders are named for where their code runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import taskadapter

ROWS = (
    ("errors",),
    ("declare",),
    ("rules",),
    ("settings",),
    ("coordination",),
    ("prefect_api",),
    ("execution",),
    ("agent",),
    ("listener", "scheduler", "services", "pools", "deploy", "render"),
    ("cli", "doctor", "audit", "tables"),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}

ROOT = Path(taskadapter.__file__).parent
MODULES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]

LATE = {
    ("declare/attached.py", "execution"),
    ("declare/attached.py", "rules"),
    ("declare/registry.py", "listener"),
}
"""A flow that is made when it is asked for; a type's name."""


def imported(path: Path) -> set[str]:
    """Return the rooms of this package from which a module imports."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "taskadapter":
            _, _, rest = (node.module or "").partition(".")
            rooms |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    """None from a row below, so that a line of code knows its room."""
    name = path.relative_to(ROOT)
    own = ROW[name.parts[0].removesuffix(".py")]
    below = {room for room in imported(path) if ROW[room] > own and (name.as_posix(), room) not in LATE}

    assert below == set()
