"""What the UI shows of the groups, and when it is written."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from taskadapter.agent import events, showing
from taskadapter.agent.showing import MARK, Facts, Showing, describe_group, describe_pool, report_of
from taskadapter.coordination import store
from taskadapter.coordination.messages import Gained, Lost, Token
from taskadapter.coordination.overview import GroupStatus, NodeStatus, Status, Tenure
from taskadapter.prefect_api.pool import Domain
from tests.unit.given import node, tick, until

NOW = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
BY_TWO = Facts("node-1", 7, ("node-2", "node-3"))


def group(name: str = "group", holder: str | None = "node-1", term: int = 7) -> GroupStatus:
    return GroupStatus(
        group_id=name,
        holder=holder,
        term=term,
        heartbeat_age=0.5,
        held_for=60.0 if holder else None,
        reason="it was released in term 6" if holder else None,
        resign_requested=False,
    )


def other(name: str, seen: float = 1.0) -> NodeStatus:
    return NodeStatus(
        task_id=name, host="host", pid=1, group_ids=("first", "group"), last_seen_age=seen, up_for=100.0
    )


def test_a_queue_says_who_is_active_since_when_and_why():
    """And who stands by."""
    assert describe_group(group(), BY_TWO, NOW) == (
        "Active: node-1, term 7, since 2030-01-01 11:59:00 UTC (it was released in term 6). "
        "Standing by: node-2, node-3."
    )
    assert describe_group(group(holder=None), Facts(None, 7, ()), NOW) == (
        "Active: nobody, after term 7. Standing by: nobody."
    )


@pytest.mark.parametrize("own", [None, "", "Our pool.\n\nAsk Ada."])
def test_what_somebody_has_written_of_a_pool_stays(own):
    """However often ours is written behind it."""
    facts = {"group": BY_TWO}
    once = describe_pool(own, [group()], facts, NOW)
    assert once.startswith((own or "").strip() or MARK)
    assert once.count("• group: Active: node-1") == 1
    assert describe_pool(once, [group()], facts, NOW) == once


def test_many_groups_are_counted():
    """A description has little room."""
    groups = [group(f"group-{number}") for number in range(showing.NAMED + 3)]
    text = describe_pool(None, groups, {one.group_id: BY_TWO for one in groups}, NOW)
    assert text.endswith("• and 3 more groups")
    assert text.count("Active: ") == showing.NAMED


def test_the_report_has_what_was_before():
    """A term that was not given up has no end there: its node was silent."""
    why = "it was free"
    lost = Tenure(group_id="group", term=6, task_id="node|2", reason=why, began=90.0, released=None)
    given = Tenure(group_id="group", term=5, task_id="node-3", reason=why, began=99.0, released=95.0)
    text = report_of("pool", [group()], {"group": BY_TWO}, [lost, given], NOW)

    for row in (
        "| group | node-1 | 7 | 2030-01-01 11:59:00 UTC | it was released in term 6 | node-2, node-3 |",
        "| group | 6 | node\\|2 | 2030-01-01 11:58:30 UTC |  | it was free |",
        "| group | 5 | node-3 | 2030-01-01 11:58:21 UTC | 2030-01-01 11:58:25 UTC | it was free |",
    ):
        assert row in text


class Server:
    """An API with a pool and its queues, a database with its groups, and the node's part in them."""

    def __init__(self) -> None:
        nodes = (other("node-1"), other("node-2"), other("dead", 99.0))
        self.status = Status((group("first"), group()), nodes)
        self.written: list[tuple[str, str]] = []
        self.faults: list[Exception] = []
        self.ids = {"default": uuid4(), "first": uuid4(), "group": uuid4()}
        # As a membership.
        self.queues = set(self.ids)
        self.database_url = "sqlite://"
        self.domain = Domain(liveness_check_interval=30)
        self.held = {"first", "group"}

    def token(self, name: str) -> Token | None:
        return Token(name, "node-1", 7) if name in self.held else None

    def read(self, _: str) -> Status:
        if self.faults:
            raise self.faults.pop(0)
        return self.status

    async def read_work_queues(self, **_: object) -> Any:
        return [SimpleNamespace(name=name, id=queue_id) for name, queue_id in self.ids.items()]

    async def update_work_queue(self, queue_id: UUID, description: str) -> None:
        (name,) = (name for name, known in self.ids.items() if known == queue_id)
        self.written.append((name, description))

    async def read_work_pool(self, _: str) -> Any:
        return SimpleNamespace(description="Ours.")

    async def update_work_pool(self, _: str, update: Any) -> None:
        self.written.append(("the pool", update.description))

    async def create_artifact(self, artifact: Any) -> None:
        self.written.append((artifact.key, artifact.data))

    def showing(self) -> Showing:
        part: Any = self
        return Showing(node(self, SimpleNamespace(id=uuid4())), part)

    def news(self) -> list[str]:
        """Return what was written since the last time."""
        found, self.written = [name for name, _ in self.written], []
        return found


@pytest.fixture
def server(monkeypatch):
    """What the node finds, and no waits."""
    found = Server()
    monkeypatch.setattr(store, "status", found.read)
    monkeypatch.setattr(store, "tenures", lambda *_: [])
    monkeypatch.setattr(showing, "MERGE_SECONDS", 0)
    return found


def test_it_is_written_when_it_has_changed(server):
    """And not before; nodes that are gone do not stand by."""

    async def scenario() -> None:
        mine = server.showing()
        await mine.refresh()
        assert "Standing by: node-2." in server.written[0][1]
        assert server.news() == ["first", "group", "the pool", "taskadapter-pool"]
        await mine.refresh()
        assert server.news() == []
        server.status = Status((group("first"), group(term=8)), server.status.nodes)
        await mine.refresh()
        assert server.news() == ["group", "the pool", "taskadapter-pool"]
        server.status = Status(server.status.groups, server.status.nodes[:1])
        await mine.refresh()
        assert server.news() == ["first", "group", "the pool", "taskadapter-pool"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("held", "written"),
    [(set(), []), ({"group"}, ["group"]), ({"first"}, ["first", "the pool", "taskadapter-pool"])],
)
def test_each_active_node_writes_of_its_own_groups(server, held, written):
    """Of the pool the one that is active for the first of them."""
    server.held = held
    asyncio.run(server.showing().refresh())
    assert server.news() == written


def test_groups_of_other_pools_are_not_shown(server):
    """They have the same database."""
    server.queues = {"default", "group"}
    server.held = {"group"}
    asyncio.run(server.showing().refresh())
    assert all("first" not in text for _, text in server.written)


def test_a_fault_puts_it_off(server, monkeypatch):
    """It is written at the next look."""
    monkeypatch.setattr(showing, "REFRESH_SECONDS", 0)
    server.faults = [httpx.ConnectError("away")] * 3

    async def scenario() -> None:
        task = asyncio.create_task(server.showing().go_on())
        await until(lambda: len(server.written) > 3)
        task.cancel()

    asyncio.run(scenario())


# --- events ---------------------------------------------------------------------------------------


@pytest.fixture
def emitted(monkeypatch):
    """The events that were emitted: name, resource, reason, and the kinds of what is related."""
    found: list[tuple[Any, ...]] = []

    def emit(event: str, resource: Any, related: Any = (), payload: Any = None) -> None:
        roles = [one["prefect.resource.role"] for one in related]
        reason = None if payload is None else payload["reason"]
        found.append((event, resource["prefect.resource.name"], reason, roles))

    monkeypatch.setattr(events, "emit_event", emit)
    return found


def test_each_change_of_a_token_is_an_event(server, emitted):
    """For automations: what has happened to which group, and why."""
    token = Token("group", "node-1", 7)
    mine = server.showing()
    mine.hear(Gained(token, deadline=0.0, reason="it was free"))
    mine.hear(Lost(token, reason="handed over", asked=True))
    mine.hear(Lost(token, reason="not confirmed in time"))

    assert emitted == [
        ("taskadapter.token.acquired", "group", "it was free", ["work-pool"]),
        ("taskadapter.token.released", "group", "handed over", ["work-pool"]),
        ("taskadapter.token.lost", "group", "not confirmed in time", ["work-pool"]),
    ]


def test_a_skipped_tick_and_the_end_of_a_job_are_events(emitted):
    """Related to what somebody would look at then."""
    deployment = SimpleNamespace(id=uuid4(), name="hourly", flow_id=uuid4())
    job: Any = SimpleNamespace(deployment=deployment, flow_name="report")
    mine, run = node(pool=SimpleNamespace(id=uuid4())), tick(deployment.id, 0)
    events.tick_skipped(mine, run, job, "it is late")
    events.job_ended(mine, job, "it has run 5 times")

    assert emitted == [
        ("taskadapter.tick.skipped", run.name, "it is late", ["flow", "deployment", "work-pool"]),
        ("taskadapter.job.ended", "hourly", "it has run 5 times", ["flow", "work-pool"]),
    ]
