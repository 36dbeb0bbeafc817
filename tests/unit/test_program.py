"""How listeners leave the agent of their program."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from taskadapter.agent.program import ProgramAgent
from taskadapter.agent.tasks import Tasks
from tests.unit.given import LOG


def test_who_waits_no_longer_leaves_nothing_half_done():
    """A group that is given up, and not handed over, would be kept by a node that runs nothing of it."""
    agent: Any = object.__new__(ProgramAgent)
    taken_off: list[list[str]] = []

    async def take_off(parts: list[str], _: float) -> None:
        await drained.wait()
        taken_off.append(parts)

    async def scenario() -> None:
        agent._turn, agent._tasks, agent._parts = asyncio.Lock(), Tasks(LOG), {"one", "another"}
        agent._take_off = take_off
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(agent._leave(["one"], 30.0), 0.001)
        drained.set()
        await agent._leave(["another"], 30.0)

    drained = asyncio.Event()
    asyncio.run(scenario())
    assert taken_off == [["one"], ["another"]]
