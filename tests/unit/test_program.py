"""How listeners join and leave the agent of their program."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from taskadapter.agent.program import Part, ProgramAgent
from taskadapter.agent.tasks import Tasks
from tests.unit.given import LOG, until

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID


class Worker:
    """What an agent has its parts join and leave; runs of a queue end when a test says so."""

    def __init__(self) -> None:
        self.drained: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.said: list[str] = []

    async def join(self, queue: str, *_: object) -> None:
        self.said.append(f"join {queue}")

    async def leave(self, queue: str | None, _: Collection[UUID], drain_seconds: float) -> None:
        self.said.append(f"leave {queue} within {drain_seconds:g}")
        await self.drained[str(queue)].wait()
        self.said.append(f"left {queue}")

    def stopped(self, queue: str, _: Collection[UUID]) -> None:
        self.said.append(f"stopped {queue}")

    def end_runs(self) -> None:
        self.said.append("end runs")


async def agent_of(worker: Worker, *queues: str) -> tuple[Any, list[Part]]:
    """An agent that works, with a part for each of some queues."""
    agent: Any = object.__new__(ProgramAgent)
    agent._worker, agent._tasks, agent._turn = worker, Tasks(LOG), asyncio.Condition()
    agent._parts, agent._leaving, agent.is_stopping = set(), set(), False
    agent._working = asyncio.create_task(asyncio.sleep(60))
    parts = [Part(queue, None, {}) for queue in queues]
    for part in parts:
        assert await agent._join(part)
    worker.said.clear()
    return agent, parts


def test_who_waits_no_longer_leaves_nothing_half_done():
    """A group that is given up, and not handed over, would be kept by a node that runs nothing of it."""

    async def scenario() -> None:
        agent, (one, another) = await agent_of(worker := Worker(), "one", "another")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(agent._leave([one], 30.0), 0.001)
        worker.drained["one"].set()
        await until(one.over.done)
        assert worker.said == ["leave one within 30", "left one"]
        assert agent._parts == {another}

    asyncio.run(scenario())


def test_listeners_come_and_go_while_the_runs_of_another_end():
    """It may have runs that take hours; only its own queue is not served again before."""

    async def scenario() -> None:
        agent, (one, another) = await agent_of(worker := Worker(), "one", "another")
        leaving = asyncio.create_task(agent._leave([one], 30.0))
        await until(lambda: worker.said)
        assert await agent._join(Part("third", None, {}))
        again = asyncio.create_task(agent._join(Part("one", None, {})))
        worker.drained["another"].set()
        await agent._leave([another], 0.0)
        assert another.over.done()
        assert worker.said[1:] == ["join third", "leave another within 0", "left another"]

        worker.drained["one"].set()
        await leaving
        assert await again
        assert worker.said[4:] == ["left one", "join one"]
        assert not agent.is_stopping

    asyncio.run(scenario())


def test_the_agent_ends_with_the_last_one():
    """One that stops at once ends no runs of one that is leaving, whose runs may end by themselves."""

    async def scenario() -> None:
        agent, (one, another) = await agent_of(worker := Worker(), "one", "another")
        leaving = asyncio.create_task(agent._leave([one], 30.0))
        await until(lambda: worker.said)
        late = asyncio.create_task(agent._join(Part("one", None, {})))
        worker.drained["another"].set()
        await agent._leave([another], 0.0)
        late.cancel()
        with suppress(asyncio.CancelledError):
            await late
        assert not agent.is_stopping
        assert worker.said == ["leave one within 30", "leave another within 0", "left another"]

        worker.drained["one"].set()
        await leaving
        assert agent.is_stopping
        assert not one.over.done(), "it is over when the agent has ended"
        assert not await agent._join(Part("third", None, {})), "it needs an agent of its own"
        await asyncio.wait([agent._working])
        assert agent._working.cancelled()

    asyncio.run(scenario())


@pytest.mark.parametrize(("drain_seconds", "said"), [(30.0, []), (0.0, ["end runs"])])
def test_all_leave_with_the_agent(drain_seconds, said):
    """It drains them together when it ends."""

    async def scenario() -> None:
        agent, parts = await agent_of(worker := Worker(), "one", "another")
        await agent._leave(parts, drain_seconds)
        assert (agent.is_stopping, worker.said) == (True, said)

    asyncio.run(scenario())
