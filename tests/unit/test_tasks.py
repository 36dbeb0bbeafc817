"""What an agent does in the background."""

from __future__ import annotations

import asyncio

from taskadapter.agent import tasks
from taskadapter.agent.tasks import Tasks
from tests.unit.given import LOG, until


def test_what_is_kept_up_goes_on_whatever_it_raises(monkeypatch, caplog):
    """And the log has each error, with where it comes from."""
    monkeypatch.setattr(tasks, "PAUSE_SECONDS", 0)
    tries: list[int] = []

    async def work() -> None:
        tries.append(len(tries))
        raise ValueError(f"the {len(tries)}. time")

    async def scenario() -> None:
        mine = Tasks(LOG)
        mine.keep_up(work)
        await until(lambda: len(tries) > 2)
        mine.cancel()

    asyncio.run(scenario())

    errors = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert errors[:2] == ["the 1. time", "the 2. time"]


def test_no_task_fails_unseen(caplog):
    """One that is to do something once tells of its error as well."""

    async def work() -> None:
        raise ValueError("what has happened")

    async def scenario() -> None:
        task = Tasks(LOG).spawn(work())
        await asyncio.wait([task])
        await asyncio.sleep(0)

    asyncio.run(scenario())

    assert "what has happened" in caplog.text


def test_what_is_cancelled_ends_and_is_no_error(caplog):
    """An agent that stops has nothing left over."""

    async def scenario() -> bool:
        mine = Tasks(LOG)
        running = mine.keep_up(lambda: asyncio.sleep(3600))
        await asyncio.sleep(0)
        mine.cancel()
        await asyncio.wait([running])
        return running.cancelled()

    assert asyncio.run(scenario())
    assert caplog.text == ""
