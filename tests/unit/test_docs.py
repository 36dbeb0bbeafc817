"""What the documentation names is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = "declare|rules|coordination|prefect_api|execution|agent|listener|scheduler|pools|deploy"


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"`((?:{ROOMS})\.[a-zA-Z_.]+)`", TEXT))))
def test_a_name_of_the_package(name):
    """A module, or what it has, by the path that the text gives it."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["taskadapter", *parts[:depth]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[depth:]:
            found = getattr(found, attribute)
        return
    pytest.fail(f"there is no {name}")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", TEXT))))
def test_a_test(name):
    """A file, and a test in it."""
    path, _, test = name.partition("::")
    assert not test or re.search(rf"def {test}\(", (ROOT / path).read_text())
    assert (ROOT / path).exists()
