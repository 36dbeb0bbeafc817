"""Whether a node would coordinate apart from others that poll its pool, without a database or an API."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from taskadapter.agent import strangers
from taskadapter.agent.strangers import reason_to_stay_out
from taskadapter.coordination import store
from taskadapter.prefect_api.workers import LATELY, POLL_SECONDS
from taskadapter.settings import PREFIX
from tests.unit.given import node, until

LATELY_SECONDS = LATELY * POLL_SECONDS


class Elsewhere:
    """Who polls the pool, who is in the default database of this machine, and what it has of the group.

    Each look finds that all who poll have polled again, so many seconds later.
    """

    def __init__(self, monkeypatch: Any, *polling: str, later: float = 0) -> None:
        self.polling = [*polling]
        self.nodes = {"node-1"}
        # How many seconds ago its holder has shown life, and its last term was given up.
        self.heartbeat_age: float | None = None
        self.released: float | None = None
        self.later = later
        self.began = datetime.now(UTC)
        self.looks = 0
        monkeypatch.setattr(strangers, "workers_of", self._workers)
        monkeypatch.setattr(strangers, "LOOK_SECONDS", 0)
        monkeypatch.setattr(store, "status", self._status)
        monkeypatch.setattr(store, "tenures", self._tenures)

    async def reason(self) -> str | None:
        """Why node-1 is to take no part."""
        return await reason_to_stay_out(node(self), "url", "database a.db", {"group"})

    async def _workers(self, *_: object) -> list[Any]:
        polled = self.began + timedelta(seconds=self.looks * self.later)
        self.looks += 1
        polls = {"status": "ONLINE", "last_heartbeat_time": polled, "heartbeat_interval_seconds": 30}
        return [SimpleNamespace(name=name, **polls) for name in self.polling]

    def _status(self, _: str) -> Any:
        nodes = [SimpleNamespace(task_id=name) for name in self.nodes]
        holder = None if self.heartbeat_age is None else "node-0"
        group = SimpleNamespace(group_id="group", holder=holder, heartbeat_age=self.heartbeat_age)
        another = SimpleNamespace(group_id="another", holder="node-0", heartbeat_age=0.0)
        return SimpleNamespace(nodes=nodes, groups=[group, another])

    def _tenures(self, _: str, groups: Any, last: int) -> list[Any]:
        assert (groups, last) == ({"group"}, 1)
        return [SimpleNamespace(released=self.released)]


def test_a_node_is_not_the_first_in_a_database_where_the_others_are_not(monkeypatch):
    """Somebody has forgotten to name theirs: two would be active."""
    given = Elsewhere(monkeypatch, "node-1", "node-2", later=14)
    reason = asyncio.run(given.reason())
    assert given.looks == 3, "one that begins polls twice"
    assert reason is not None
    assert reason.startswith("worker node-2 polls work pool 'pool', and is no node in database a.db")
    assert f"with {PREFIX}DATABASE_URL or a listener's database_config" in reason


@pytest.mark.parametrize("ends", [True, False])
def test_who_begins_at_the_same_time_or_has_ended_is_waited_for(monkeypatch, caplog, ends):
    """The first polls a moment before it is entered in the database, the second does not poll any more."""
    given = Elsewhere(monkeypatch, "node-1", "node-2")

    async def begin() -> str | None:
        looking = asyncio.create_task(given.reason())
        await until(lambda: given.looks > 2)
        if ends:
            given.polling.remove("node-2")
        else:
            given.nodes.add("node-2")
        return await looking

    with caplog.at_level("INFO"):
        assert asyncio.run(begin()) is None
    said = "Waiting for worker node-2, which has polled the pool lately, to appear in database a.db or go."
    assert caplog.messages == [said]


def test_a_node_that_is_alone_looks_once(monkeypatch):
    """Nobody else polls the pool."""
    given = Elsewhere(monkeypatch, "node-1")
    assert asyncio.run(given.reason()) is None
    assert given.looks == 1


@pytest.mark.parametrize(
    ("heartbeat_age", "released", "may"),
    [
        (1.0, None, True),
        (None, LATELY_SECONDS - 1, True),
        (LATELY_SECONDS + 1, LATELY_SECONDS + 1, False),
        (None, None, False),
    ],
)
def test_a_node_may_begin_where_somebody_is_active(monkeypatch, heartbeat_age, released, may):
    """It is the other worker that is wrong then; a file that was used some time ago says nothing."""
    given = Elsewhere(monkeypatch, "node-2", later=14)
    given.heartbeat_age, given.released = heartbeat_age, released
    assert (asyncio.run(given.reason()) is None) is may
