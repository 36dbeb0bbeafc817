"""A project of its own for tests that import modules from one."""

import sys

import pytest

from taskadapter.declare.registry import listeners


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder as the working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    elsewhere = {*listeners}
    listeners.clear()
    yield tmp_path
    listeners.clear()
    listeners.update(elsewhere)
    for name, module in [*sys.modules.items()]:
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
