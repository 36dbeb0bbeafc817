"""What the process of a run says of its end."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled, Completed, Failed, Paused, Scheduled

from taskadapter.coordination.executions import Begun
from taskadapter.execution import host, protocol, workspace
from taskadapter.execution.current import Execution
from tests.unit.test_hosts import ASSIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from taskadapter.execution.assignment import Assignment

TIMED_OUT: State[Any] = Failed(name="TimedOut", message="Flow run exceeded timeout of 2.0 second(s)")
NO_END = ", which is no end of a run"


def execution(*, outcome: str | None = None, has_waited: bool = False) -> Execution:
    """A run whose body has begun, and has come to something, or not."""
    return Execution(ASSIGNMENT, entered=Begun(1), outcome=outcome, has_waited=has_waited)


@pytest.fixture
def failures(monkeypatch):
    """Of each end that is entered for the engine, whether it counts as the job's failure."""
    found: list[bool] = []
    monkeypatch.setattr(host, "enter_end_of_engine", lambda *_, is_failure: found.append(is_failure))
    return found


@pytest.mark.parametrize(
    ("state", "has_waited", "counts"),
    [
        (TIMED_OUT, False, True),
        (TIMED_OUT, True, False),
        (Failed(message="boom"), True, True),
        (Cancelled(), False, False),
    ],
    ids=["too slow", "the database was", "its own error", "cancelled"],
)
def test_what_is_the_jobs_own_failure(failures, state, has_waited, counts):
    """Not that it had to wait for the database: the timeout of an async one goes on meanwhile."""
    assert host._conclude(execution(has_waited=has_waited), state, None) == protocol.Told()
    assert failures == [counts]


def test_a_fault_of_the_api_is_read_in_the_loop_of_an_async_flow(failures):
    """Its hooks are called there: the body has completed, and its job goes on."""
    state: State[Any] = Failed(data=httpx.ConnectError("no way to the storage"))

    async def hook() -> None:
        host.enter_end(execution(outcome="Completed"), state)

    asyncio.run(hook())
    assert failures == []


@pytest.mark.parametrize(
    ("outcome", "state", "end"),
    [
        ("Completed", Completed(), protocol.Told()),
        ("Completed", TIMED_OUT, protocol.Untold()),
        ("Failed", TIMED_OUT, protocol.Told()),
    ],
)
def test_a_body_that_has_succeeded_is_not_too_slow(failures, outcome, state, end):
    """To enter that took more than was left: what is entered is told."""
    assert host._conclude(execution(outcome=outcome), state, None) == end
    assert failures == []


@pytest.mark.parametrize(
    ("data", "counts"), [([Failed(), Completed()], True), (OSError("no storage"), False)]
)
def test_a_body_whose_tasks_have_failed_has_failed(failures, data, counts):
    """What it returns the engine waits for, after the ledger has that it has returned; that is all."""
    state: State[Any] = Failed(message="1/2 states failed.", data=data)
    assert host._conclude(execution(outcome="Completed"), state, None) == protocol.Told()
    assert failures == [True] * counts


def told_without(
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    lack: Callable[[object], None],
    assignment: Assignment = ASSIGNMENT,
) -> list[protocol.Report]:
    """What a process tells its agent that lacks something at a step towards its flow."""
    told: list[protocol.Report] = []
    agent, ours = socket.socketpair()
    with agent, ours:
        process = host.Host(ours, ExitStack())
        monkeypatch.setattr(process, "_tell", told.append)
        monkeypatch.setattr(workspace, "enter", lambda _: None)
        monkeypatch.setattr(workspace, step, lack)
        process._carry_out(protocol.Run(assignment=assignment))
    return told


@pytest.mark.parametrize("step", ["enter", "load"])
def test_what_is_not_here_may_be_on_another_node(monkeypatch, step):
    """A folder, or a file: the agent asks whether one has it."""

    def lack(_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/no/such")

    (report,) = told_without(monkeypatch, step, lack)
    assert isinstance(report, protocol.Unloadable)
    assert "/no/such" in report.fault


@pytest.mark.parametrize("is_tick", [True, False])
def test_a_tick_waits_for_code_that_is_not_here(monkeypatch, is_tick):
    """Whoever has asked for a run is told at once."""

    def lack(_: object) -> None:
        raise workspace.LacksCodeError("folder /srv lacks flows/job.py")

    key = "scheduled 1 2 2026-11-29" if is_tick else None
    flow_run = ASSIGNMENT.flow_run.model_copy(update={"auto_scheduled": is_tick, "idempotency_key": key})
    assignment = ASSIGNMENT.model_copy(update={"flow_run": flow_run})
    told = told_without(monkeypatch, "load", lack, assignment)
    fault = "The flow could not be loaded: folder /srv lacks flows/job.py"
    assert told == [protocol.Unloadable(fault=fault, waits=is_tick)]


def test_no_timeout_of_a_users_module_ends_the_talk_with_the_agent():
    """One that is imported ahead may set it for all sockets."""
    agent, ours = socket.socketpair()
    with agent, ours:
        ours.settimeout(2.0)
        host.Host(ours, None)
        assert ours.gettimeout() is None


def test_what_was_too_slow_before_its_body_is_given_back():
    """Nothing has begun."""
    assert host._conclude(Execution(ASSIGNMENT), TIMED_OUT, None) == protocol.Dropped()
    doubtful = Execution(ASSIGNMENT, in_doubt=True)
    assert host._conclude(doubtful, TIMED_OUT, None) == protocol.Dropped(in_doubt=True)
    assert host._conclude(doubtful, None, Abort("given back")) == protocol.Untold(in_doubt=True)


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (SystemExit(4), protocol.Crashed(fault="SystemExit: 4")),
        (ValueError("no"), protocol.Crashed(fault="ValueError: no")),
        (httpx.ConnectError("away"), protocol.Untold()),
        (TerminationSignal(15), protocol.Untold()),
        (KeyboardInterrupt(), protocol.Untold()),
    ],
)
def test_a_flow_that_ends_its_run_before_the_body_has_crashed(fault, end):
    """As a hook for the beginning may; it began again and again. What comes from outside is put back."""
    assert host._conclude(Execution(ASSIGNMENT), None, fault) == end


@pytest.mark.parametrize(
    ("state", "fault", "outcome", "end"),
    [
        (None, ValueError("no end"), None, protocol.Crashed(fault="ValueError: no end")),
        (None, ValueError("no end"), "Failed", protocol.Untold()),
        (None, TerminationSignal(15), None, protocol.Untold()),
        (None, None, None, protocol.Untold()),
        (Scheduled(), None, None, protocol.Crashed(fault=f"its flow has returned state Scheduled{NO_END}")),
        (Paused(), None, None, protocol.Untold()),
    ],
    ids=["nothing is entered", "the ledger knows", "from outside", "nobody knows", "no end", "paused"],
)
def test_a_body_that_comes_to_no_end_has_crashed_by_its_own_fault(state, fault, outcome, end):
    """It was said of its process that this had exited with status 0."""
    assert host._conclude(execution(outcome=outcome), state, fault) == end


def test_only_the_process_of_a_run_speaks_for_it(monkeypatch):
    """A body may fork, and its child go on where the body ends: the run's own process is not over."""
    agent, ours = socket.socketpair()
    with agent, ours:
        process = host.Host(ours, None)
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: 2**22)
            process._tell(protocol.Told())
        process._tell(protocol.Untold())
        assert protocol.report(agent.recv(1000)) == protocol.Untold()
