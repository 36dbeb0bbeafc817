"""What unit tests have: no API that hears of them, and a project of their own for what imports from one."""

import sys

import pytest
from prefect.logging.handlers import APILogHandler

from taskadapter.declare.registry import listeners


@pytest.fixture(scope="package", autouse=True)
def _no_log_for_the_api():
    """Else the thread that sends what runs log fails, and says so in the midst of another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(APILogHandler, "emit", lambda *_: None)
        yield


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
