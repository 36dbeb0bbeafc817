"""What is entered of a run, and what its agent hears, when the engine has returned."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled, Completed, Failed, Paused, Scheduled

from taskadapter.coordination.executions import Begun
from taskadapter.execution import conclusion, protocol
from taskadapter.execution.conclusion import conclude, enter_end
from taskadapter.execution.current import Execution
from tests.unit.test_hosts import ASSIGNMENT

TIMED_OUT: State[Any] = Failed(name="TimedOut", message="Flow run exceeded timeout of 2.0 second(s)")
NO_END = ", which is no end of a run"


def execution(*, outcome: str | None = None, has_waited: bool = False) -> Execution:
    """A run whose body has begun, and has come to something, or not."""
    return Execution(ASSIGNMENT, entered=Begun(1), outcome=outcome, has_waited=has_waited)


@pytest.fixture
def failures(monkeypatch):
    """Of each end that is entered for the engine, whether it counts as the job's failure."""
    found: list[bool] = []
    monkeypatch.setattr(conclusion, "enter_end_of_engine", lambda *_, is_failure: found.append(is_failure))
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
    assert conclude(execution(has_waited=has_waited), state, None) == protocol.Told()
    assert failures == [counts]


def test_a_fault_of_the_api_is_read_in_the_loop_of_an_async_flow(failures):
    """Its hooks are called there: the body has completed, and its job goes on."""
    state: State[Any] = Failed(data=httpx.ConnectError("no way to the storage"))

    async def hook() -> None:
        enter_end(execution(outcome="Completed"), state)

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
    assert conclude(execution(outcome=outcome), state, None) == end
    assert failures == []


@pytest.mark.parametrize(
    ("data", "counts"), [([Failed(), Completed()], True), (OSError("no storage"), False)]
)
def test_a_body_whose_tasks_have_failed_has_failed(failures, data, counts):
    """What it returns the engine waits for, after the ledger has that it has returned; that is all."""
    state: State[Any] = Failed(message="1/2 states failed.", data=data)
    assert conclude(execution(outcome="Completed"), state, None) == protocol.Told()
    assert failures == [True] * counts


def test_what_was_too_slow_before_its_body_is_given_back():
    """Nothing has begun."""
    assert conclude(Execution(ASSIGNMENT), TIMED_OUT, None) == protocol.Dropped()
    doubtful = Execution(ASSIGNMENT, in_doubt=True)
    assert conclude(doubtful, TIMED_OUT, None) == protocol.Dropped(in_doubt=True)
    assert conclude(doubtful, None, Abort("given back")) == protocol.Untold(in_doubt=True)


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
    assert conclude(Execution(ASSIGNMENT), None, fault) == end


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
    assert conclude(execution(outcome=outcome), state, fault) == end
