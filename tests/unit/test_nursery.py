"""What the nursery imports for all runs, and what it refuses to."""

import sys

import pytest

from taskadapter.execution import nursery


@pytest.fixture
def modules(project, monkeypatch):
    """A module that can be preloaded, one that raises, and one that starts a thread."""
    monkeypatch.setattr(nursery, "LATE_IMPORTS", ("no_such_driver",))
    monkeypatch.syspath_prepend(project)
    (project / "plain_one.py").write_text("VALUE = 1\n")
    (project / "broken_one.py").write_text("raise RuntimeError('not today')\n")
    (project / "busy_one.py").write_text(
        "import threading\n"
        "STOP = threading.Event()\n"
        "THREAD = threading.Thread(target=STOP.wait, name='busy', daemon=True)\n"
        "THREAD.start()\n"
    )
    yield
    if "busy_one" in sys.modules:
        sys.modules["busy_one"].STOP.set()
        sys.modules["busy_one"].THREAD.join()


def test_modules_are_imported(modules):
    """What is named is there for every run; a driver that is not installed does not matter."""
    assert nursery._preload(["plain_one"]) is None
    assert "plain_one" in sys.modules


@pytest.mark.parametrize("name", ["broken_one", "no_such_module"])
def test_a_module_that_cannot_be_imported(modules, name):
    """The refusal names the setting, the module and the error."""
    refusal = nursery._preload([name])

    assert refusal is not None
    assert "PRELOAD" in refusal
    assert repr(name) in refusal
    assert "Error" in refusal


def test_a_module_that_starts_a_thread(modules):
    """A forked process would lose the thread: the refusal names it, and the remedy."""
    refusal = nursery._preload(["plain_one", "busy_one"])

    assert refusal is not None
    assert "'busy_one'" in refusal
    assert "(busy)" in refusal
    assert "Remove it from PRELOAD" in refusal


def test_a_command_line_is_shortened():
    """What is told of a process that a run left fits into a line; of one that is gone it is nothing."""
    assert nursery._command(0) == ""
    assert 0 < len(nursery._command(nursery.os.getpid())) <= nursery.COMMAND_LENGTH
