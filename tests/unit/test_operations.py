"""Whoever reads a line in an agent's log at night finds it in the documentation."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

import taskadapter
from taskadapter.agent import metrics  # noqa: F401 - has them registered
from taskadapter.agent.health import Condition

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
LOUD = {"warning", "error", "exception"}
BY_CAUSE = {"%s", "node %s: %s"}
"""Lines that are another's sentence as a whole."""


def lines() -> set[str]:
    """Return what the package logs as a warning or worse, with dots for what varies."""
    found: set[str] = set()
    for path in Path(taskadapter.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            is_loud = node.func.attr in LOUD or (node.func.attr == "log" and len(node.args) > 1)
            found |= {text for text in texts if is_loud and isinstance(text, str)}
    return {re.sub(r"%[a-z]", "…", text).removesuffix(".") for text in found - BY_CAUSE}


@pytest.mark.parametrize("line", sorted(lines()))
def test_a_line_of_the_log_is_explained(line):
    """What it means, and what to do; of a long one the first sentence is enough."""
    assert f"`{line}`" in TEXT or f"`{line}.`" in TEXT or f"`{line.partition('. ')[0]}. …`" in TEXT


@pytest.mark.parametrize("condition", Condition)
def test_a_condition_of_health_is_explained(condition):
    assert f"| `{condition}` |" in TEXT


def test_each_metric_is_explained():
    """Those that are counted, and those that are read when somebody asks, and no other."""
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in REGISTRY.collect()
        if family.name.startswith("taskadapter_")
    }
    assert names == set(re.findall(r"`(taskadapter_[a-z_]+)(?:\{[a-z]+\})?`", TEXT))


def test_there_are_such_lines():
    """They are found in the code, not remembered."""
    assert len(lines()) > 25
