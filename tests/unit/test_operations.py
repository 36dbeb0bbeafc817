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
LOUD = {"info", "warning", "error", "exception"}
BY_CAUSE = {"%s", "node %s: %s"}
"""Lines that are another's sentence as a whole."""

ROOT = Path(taskadapter.__file__).parent
OF_GROUPS = {
    "lease.py": {
        "step",
        "_expire",
        "_lose",
        "_recovered",
        "_superseded",
        "_confirmed",
        "_taker",
        "_watched",
    }
    | {"_acquired", "_joined"},
    "tokens.py": {"_why_free"},
}
"""The functions that write what a heartbeat says of groups, and why."""


def lines() -> set[str]:
    """Return what the package logs, with dots for what varies."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        module = ast.parse(path.read_text())
        named = {
            target.id: assign.value
            for assign in module.body
            if isinstance(assign, ast.Assign)
            for target in assign.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(module):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = [named.get(arg.id) if isinstance(arg, ast.Name) else arg for arg in node.args]
            texts = [arg.value for arg in given if isinstance(arg, ast.Constant)]
            is_loud = node.func.attr in LOUD or (node.func.attr == "log" and len(node.args) > 1)
            found |= {text for text in texts if is_loud and isinstance(text, str)}
    return {re.sub(r"%[.0-9]*[a-z]", "…", text).removesuffix(".") for text in found - BY_CAUSE}


def reasons() -> set[str]:
    """Return what a heartbeat says of groups, and why, with dots for what varies."""
    found: set[str] = set()
    for name, wanted in OF_GROUPS.items():
        for function in ast.walk(ast.parse((ROOT / "coordination" / name).read_text())):
            if isinstance(function, ast.FunctionDef) and function.name in wanted:
                body = function.body[1:] if ast.get_docstring(function) else function.body
                found.update(*map(texts_in, body))
    return {text for text in found if " " in text}


def texts_in(node: ast.AST) -> set[str]:
    """Return the texts in a statement, each as a whole."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr):
        return {"".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)}
    return set[str]().union(*map(texts_in, ast.iter_child_nodes(node)))


@pytest.mark.parametrize("line", sorted(lines()))
def test_a_line_of_the_log_is_explained(line):
    """What it means, and what to do; of a long one the first sentence is enough."""
    assert f"`{line}`" in TEXT or f"`{line}.`" in TEXT or f"`{line.partition('. ')[0]}. …`" in TEXT


@pytest.mark.parametrize("reason", sorted(reasons()))
def test_what_is_said_of_a_group_is_explained(reason):
    """Each sentence of the heartbeat, and each reason in it."""
    assert reason in TEXT


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
