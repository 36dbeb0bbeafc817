"""What the nursery imports for all runs, and what it refuses to."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from taskadapter.coordination import store
from taskadapter.errors import DatabaseUnavailableError
from taskadapter.execution import nursery, protocol


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
    assert 0 < len(nursery._command(os.getpid())) <= nursery.COMMAND_LENGTH


@pytest.fixture
def idle():
    """A nursery that does not serve, and has no agent."""
    idle = nursery.Nursery(None, None)
    yield idle
    for ours in (idle._wakeup, idle._on_signal, idle._selector):
        ours.close()


@pytest.mark.parametrize("fault", [DatabaseUnavailableError("away"), RuntimeError("a mistake")], ids=repr)
def test_requests_are_done_in_their_order(monkeypatch, idle, fault):
    """However they arrive, a line in two parts or several at once; no fault of a database ends anything."""
    done = []

    def rehearse(url):
        done.append(url)
        raise fault

    monkeypatch.setattr(store, "rehearse", rehearse)
    monkeypatch.setattr(idle, "_fork", lambda descriptor, number: done.append((descriptor, number)))
    idle._descriptors = [7, 8]
    connect = protocol.Connect(database_url=SecretStr("sqlite://")).line()
    second = protocol.Fork(number=2).line()
    for part in (connect[:9], connect[9:] + protocol.Fork(number=1).line() + second[:3]):
        idle._heard += part
        idle._heed()
    assert done == ["sqlite://", (7, 1)]
    idle._heard += second[3:]
    idle._heed()

    assert done == ["sqlite://", (7, 1), (8, 2)]


def test_a_fork_that_the_system_refuses(monkeypatch, idle):
    """The agent is told why, and the nursery goes on with its runs."""

    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    kept, given = socket.socketpair()
    with kept:
        idle._heard = protocol.Fork(number=1).line()
        idle._descriptors = [given.detach()]
        idle._heed()
        fault = "[Errno 11] Resource temporarily unavailable"
        assert protocol.first(kept.recv(1000)) == protocol.Unforked(fault=fault)
        assert kept.recv(1) == b""
        assert not idle._runs


def test_a_process_that_cannot_go_on_is_that_run_alone(monkeypatch, idle, capsys):
    """An error that left it would be the nursery's, in a copy of it that ends all runs."""
    ended: list[int] = []

    def leave_to(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(idle, "_leave_to", leave_to)
    monkeypatch.setattr(os, "_exit", ended.append)
    idle._become_a_run(0, None)
    assert ended == [1]
    assert "RuntimeError: can't start new thread" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [True, False])
def test_no_two_runs_draw_the_same_numbers(monkeypatch, is_there):
    """A generator that was imported ahead is the same in each process that is forked."""
    seeded: list[bool] = []
    generator = SimpleNamespace(seed=lambda: seeded.append(True)) if is_there else None
    monkeypatch.setitem(sys.modules, "numpy.random", generator)
    nursery.make_random_anew()
    assert seeded == [True] * is_there
