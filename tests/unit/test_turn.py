"""Of the processes that leave a body, only the one that has entered it says what it came to."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow

from taskadapter.coordination.executions import Begun
from taskadapter.execution import current, turn
from taskadapter.execution.attempts import Attempts
from taskadapter.execution.current import CurrentRun, Execution
from tests.unit.test_hosts import ASSIGNMENT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


def forks() -> None:
    """Fork a child that leaves the body by an error; its parent waits for it."""
    if not (child := os.fork()):
        raise ValueError("child")
    assert status_of(child) == 1


def status_of(child: int) -> int:
    """Wait for the end of a child, and return its status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def body() -> None:
    forks()


def exits() -> None:
    """Fork children that leave the body as commands do, and one that returns."""
    for code, status in ((3, 3), (None, 0), ("no such file", 1)):
        if not (child := os.fork()):
            sys.exit(code)
        assert status_of(child) == status
    if child := os.fork():
        assert status_of(child) == 0


async def async_body() -> None:
    await asyncio.sleep(0)
    forks()


def generator() -> Iterator[int]:
    yield 1
    forks()


async def async_generator() -> AsyncIterator[int]:
    yield 1
    forks()


def called(body: Callable[[], Any]) -> None:
    """Call a flow's body as Prefect's engine does, once its execution is entered."""
    kept: Any = flow(body)
    turn.keep(kept, lambda *_: None)
    going_on = kept.fn()
    if kept.isgenerator:
        assert (asyncio.run(_listed(going_on)) if kept.isasync else [*going_on]) == [1]
    elif kept.isasync:
        asyncio.run(going_on)


async def _listed(items: AsyncIterator[int]) -> list[int]:
    return [item async for item in items]


def attempted(body: Callable[[], Any]) -> None:
    """Make an attempt of a declared job, which enters its end after it."""
    attempts: Any = object.__new__(Attempts)
    attempts.current = CurrentRun(job_id=None, scheduled_time=ASSIGNMENT.due, count=1, attempt=0)
    with attempts.attempt():
        body()


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (called, body),
        (called, exits),
        (called, async_body),
        (called, generator),
        (called, async_generator),
        (attempted, body),
    ],
    ids=["sync", "with a status", "async", "generator", "async generator", "declared"],
)
def test_a_child_that_leaves_the_body_ends_there(call, body):
    """It entered the run's end, and ended its job, while the body went on."""
    process, (reads, writes) = os.getpid(), os.pipe()
    assignment = ASSIGNMENT.model_copy(update={"token": None})
    token = current.execution.set(Execution(assignment, entered=Begun(1)))
    try:
        call(body)
    finally:
        if os.getpid() != process:
            os.write(writes, b"a child has come out")
            os._exit(1)
        current.execution.reset(token)
    os.close(writes)
    with os.fdopen(reads, "rb") as said:
        assert said.read() == b""
