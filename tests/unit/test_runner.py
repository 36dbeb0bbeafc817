"""What is told of a run whose process could not tell it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from taskadapter.agent.runner import Runner
from taskadapter.errors import TokenLostError
from tests.unit.given import node
from tests.unit.test_hosts import ASSIGNMENT


@pytest.mark.parametrize("message", ["process 7 exited with status 0", "ValueError: it is a sentence."])
@pytest.mark.parametrize(
    ("cancelled", "begins"),
    [(None, "On node-1: "), (1.0, "Cancelled; on node-1 ")],
    ids=["crashed", "cancelled"],
)
def test_a_crash_is_told_in_one_sentence(message, cancelled, begins):
    """With one full stop, whatever the error ends with."""
    told: list[str] = []

    async def report(_run: object, state: Any, **_: object) -> bool:
        told.append(state.message)
        return False

    async def enter(*_: object) -> None: ...

    runner: Any = object.__new__(Runner)
    runner._membership = SimpleNamespace(database_url="")
    runner._node, runner._teller, runner._asked = node(), SimpleNamespace(report=report), enter
    run = SimpleNamespace(flow_run=ASSIGNMENT.flow_run, life=SimpleNamespace(cancelled=cancelled))
    asyncio.run(runner._report_crash(run, ASSIGNMENT, message))
    assert told == [f"{begins}{message.removesuffix('.')}."]


@pytest.mark.parametrize("has_entered", [True, False])
def test_an_end_that_is_being_entered_is_waited_for(has_entered):
    """Else its open entry would be taken for that of a crash."""
    done: list[str] = []

    async def enter_for() -> None:
        await asyncio.sleep(0)
        done.append("entered")

    async def entry(*_: object) -> None:
        done.append("asked")
        raise TokenLostError("enough")

    async def settle() -> None:
        runner: Any = object.__new__(Runner)
        runner._entry = entry
        entering = asyncio.create_task(enter_for()) if has_entered else None
        await runner._settle(SimpleNamespace(entering=entering), ASSIGNMENT, "killed", at_fault=False)

    asyncio.run(settle())
    assert done == ["entered", "asked"][not has_entered :]
