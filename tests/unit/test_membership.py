"""For which groups a node stands by, without a database or an API."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from prefect.exceptions import ObjectNotFound

from taskadapter.agent import membership
from taskadapter.agent.membership import Membership
from taskadapter.agent.node import Share
from taskadapter.agent.ownership import SILENT_SECONDS
from taskadapter.coordination import store
from taskadapter.coordination.heartbeat import Vitals
from taskadapter.coordination.messages import Gained, PoolKey, Refused, Token
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import CoordinationError
from taskadapter.prefect_api.pool import Domain, Queues
from taskadapter.settings import PREFIX
from tests.unit.given import node, tick

TOKEN = Token("group", "node-1", 1)


class Groups:
    """Stands by for what it is told to, and says what the test lets it say."""

    made: ClassVar[list[Groups]] = []

    def __init__(self, *args: Any) -> None:
        self.domain = Domain.of(args[2])
        self.board = Path("board")
        self.hear = args[-1]
        self.names: frozenset[str] = frozenset()
        self.database_url = ""
        self.held: dict[str, Token] = {}
        self.registered = False
        self.waits_for_its_predecessor = False
        self.vitals: Vitals | None = None
        self.is_stopped = False
        self.made.append(self)

    def stand_by(self, names: Any, database_url: str, why: str = "") -> None:
        self.why = why
        self.names, self.database_url = frozenset(names), database_url

    async def leave(self, name: str) -> None:
        self.names -= {name}

    def token(self, name: str) -> Token | None:
        return self.held.get(name)

    def is_registered(self, _: str) -> bool:
        return self.registered

    async def stop(self) -> None:
        self.is_stopped = True


class Server:
    """A work pool with its queues, the database of its groups, and those of other pools."""

    def __init__(self) -> None:
        self.queues = {DEFAULT_QUEUE, "group", "other"}
        self.domain = Domain(database="sqlite:////first.db")
        self.paused: set[str] = set()
        self.pool_id = "ours"
        self.claims: list[tuple[str | None, set[str]]] = []
        self.foreign: dict[str, str] = {}
        # Nodes that stand by for groups of pools that this server does not have.
        self.living: dict[str, list[str]] = {}
        self.other_pools: set[tuple[str, str]] = set()
        self.given_up: list[tuple[object, ...]] = []
        # Why a node is to take no part, and how often it was asked.
        self.stays_out: str | None = None
        self.looks: list[tuple[Any, ...]] = []

    @property
    def pool(self) -> Any:
        template: dict[str, Any] = {"variables": {"properties": {}}}
        return SimpleNamespace(id=self.pool_id, base_job_template=self.domain.put_into(template))

    async def read_work_pool(self, _: str) -> Any:
        return self.pool

    async def reason(self, *asked: Any) -> str | None:
        self.looks.append(asked[1:])
        return self.stays_out

    async def read_work_queue_by_name(self, name: str, pool: str) -> None:
        if (name, pool) not in self.other_pools:
            raise ObjectNotFound(ValueError(name))

    async def read(self, *_: object) -> Queues:
        words = frozenset(f"work queue {name!r}" for name in self.paused)
        return Queues(frozenset(self.queues), frozenset(self.paused), closed=words)

    def claim(self, _: str, pool: PoolKey, names: Any, former_id: str | None) -> dict[str, str]:
        self.claims.append((former_id, set(names)))
        return self.others(_, pool, names)

    def others(self, _: str, pool: PoolKey, names: Any) -> dict[str, str]:
        assert pool == PoolKey("pool", self.pool_id)
        return {name: other for name, other in self.foreign.items() if name in names}

    def take_over(self, _: str, pool: PoolKey, name: str, incarnation: str, within: float) -> list[str]:
        assert (pool, incarnation) == (PoolKey("pool", self.pool_id), "first")
        assert within >= max(SILENT_SECONDS, self.domain.liveness_check_interval)
        living = self.living.get(name, [])
        if not living:
            del self.foreign[name]
        return living


@pytest.fixture
def server(monkeypatch):
    """What the node finds."""
    found = Server()
    monkeypatch.setattr(membership, "Groups", Groups)
    monkeypatch.setattr(membership, "reason_to_stay_out", found.reason)
    monkeypatch.setattr(Queues, "read", found.read)
    monkeypatch.setattr(store, "claim_groups", found.claim)
    monkeypatch.setattr(store, "groups_of_others", found.others)
    monkeypatch.setattr(store, "take_over_group", found.take_over)
    monkeypatch.setattr(store, "give_up_tokens", lambda *given: found.given_up.append(given[1:]))
    monkeypatch.setattr(Groups, "made", [])
    return found


def new_membership(server: Any, *queues: str, told: list[Any] | None = None) -> Membership:
    """The membership of a node that serves some queues, or all."""
    told = [] if told is None else told
    mine = replace(node(server, share=Share(set(queues))), pool=lambda: server.pool)

    async def let_go() -> None:
        told.append([groups.is_stopped for groups in Groups.made])

    return Membership(mine, is_only=True, tell=told.append, let_go=let_go)


def stood_by_for(server: Any, *queues: str) -> frozenset[str]:
    asyncio.run(new_membership(server, *queues).refresh())
    return Groups.made[-1].names


def test_a_node_stands_by_for_every_group_of_its_pool(server):
    """The queue of jobs without a group is none."""
    assert stood_by_for(server) == {"group", "other"}


def test_a_node_stands_by_for_its_share_only(server):
    """A program's node runs its own listeners' queues."""
    assert stood_by_for(server, "group", DEFAULT_QUEUE) == {"group"}


def test_a_pause_in_prefect_is_said_once(server, caplog):
    """When it begins, and when it is over."""
    caplog.set_level("INFO")
    ours = new_membership(server)
    said = []
    for paused in (set(), {"group"}, {"group"}, set(), set()):
        server.paused = paused
        caplog.clear()
        asyncio.run(ours.refresh())
        said.append([line for line in caplog.messages if "in Prefect" in line])
        assert ours.withheld == paused

    begins = "Paused in Prefect, and nothing begins until it is resumed: work queue 'group'."
    assert said == [[], [begins], [], ["Resumed in Prefect: work queue 'group'."], []]


def test_a_group_of_another_pool_is_left_to_it(server, caplog):
    """Each would stand in for the other's jobs without running them; it is told once."""
    server.foreign = {"other": "their-pool"}
    server.other_pools = {("other", "their-pool")}

    async def scenario() -> None:
        mine = new_membership(server)
        await mine.refresh()
        await mine.refresh()

    asyncio.run(scenario())
    assert Groups.made[-1].names == {"group"}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "'their-pool'" in caplog.text


@pytest.mark.parametrize("other", ["pool", "their-pool"])
def test_a_group_whose_other_pool_is_gone_is_taken(server, caplog, other):
    """Its queue was deleted there, or its pool was made anew, and has another id; that is said."""
    caplog.set_level("INFO")
    server.foreign, server.other_pools = {"other": other}, {("other", "pool")}
    assert stood_by_for(server) == {"group", "other"}
    said = (
        f"Group 'other' was another work pool's, {other!r}, of which no node lives, and is this one's now."
    )
    assert [line for line in caplog.messages if "'other'" in line] == [said]


def test_a_pool_that_another_node_has_seen_made_anew_is_no_others(server, monkeypatch):
    """This node reads it again before it gives its groups up: its runs would be ended."""

    def others(_: str, pool: PoolKey, names: Any, *__: object) -> dict[str, str]:
        return {} if pool.id == "anew" else dict.fromkeys(names, "pool")

    async def scenario() -> None:
        mine, before = new_membership(server), server.pool
        await mine.refresh()
        mine._node = replace(mine._node, pool=lambda: before)
        server.pool_id = "anew"
        monkeypatch.setattr(store, "claim_groups", others)
        monkeypatch.setattr(store, "groups_of_others", others)
        for _ in range(2):
            await mine.refresh()
            assert Groups.made[-1].names == {"group", "other"}

    asyncio.run(scenario())


@pytest.mark.parametrize("other", ["pool", "their-pool"])
def test_a_group_of_another_servers_pool_is_left_to_it(server, caplog, other):
    """As long as nodes of it live: its server is not seen from here. It is told once, with the remedy."""
    server.foreign, server.other_pools = {"other": other}, {("other", "pool")}
    server.living = {"other": ["their-node"]}

    async def scenario() -> list[Any]:
        mine = new_membership(server)
        names = []
        for _ in range(2):
            await mine.refresh()
            names.append(Groups.made[-1].names)
        with pytest.raises(CoordinationError, match=f"belongs to work pool '{other}'.* their-node .*stop"):
            await mine.until_registered("other", time.monotonic())
        del server.living["other"]
        await mine.refresh()
        return [*names, Groups.made[-1].names]

    assert asyncio.run(scenario()) == [{"group"}, {"group"}, {"group", "other"}]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert f"group 'other' belongs to work pool '{other}' of another Prefect server" in errors[0]


def test_a_pool_that_was_made_anew_keeps_its_groups(server):
    """Whichever of its nodes sees it first says which id it had; they are claimed once for each."""

    async def scenario() -> None:
        mine = new_membership(server)
        for pool_id in ("ours", "ours", "anew", "anew"):
            server.pool_id = pool_id
            await mine.refresh()
        await mine.add("new")

    asyncio.run(scenario())
    both = {"group", "other"}
    assert server.claims == [(None, both), ("ours", both), (None, {*both, "new"})]
    assert Groups.made[-1].names == {*both, "new"}


def test_a_group_that_was_taken_over_meanwhile_is_left(server):
    """This node stood still for so long that another server's nodes took it for dead."""

    async def scenario() -> None:
        mine = new_membership(server)
        await mine.refresh()
        server.foreign, server.living = {"other": "pool"}, {"other": ["their-node"]}
        await mine.refresh()

    asyncio.run(scenario())
    assert Groups.made[-1].names == {"group"}


def test_a_group_that_was_another_pools_meanwhile_is_not_joined_again(server):
    """Its queue was deleted here, and that pool has taken it for good before it was made again."""

    async def scenario() -> None:
        mine = new_membership(server)
        await mine.refresh()
        server.queues.discard("other")
        await mine.refresh()
        server.queues.add("other")
        server.foreign, server.other_pools = {"other": "their-pool"}, {("other", "their-pool")}
        await mine.refresh()

    asyncio.run(scenario())
    assert Groups.made[-1].names == {"group"}


def test_a_new_group_is_joined_without_a_look_at_the_others(server):
    """As a listener does that is started after others."""

    async def scenario() -> Membership:
        mine = new_membership(server)
        await mine.refresh()
        await mine.add("new")
        await mine.add(DEFAULT_QUEUE)
        return mine

    mine = asyncio.run(scenario())
    assert Groups.made[-1].names == {"group", "other", "new"}
    assert "new" in mine.queues


def test_another_database_is_joined_anew(server):
    """After the runs of all groups have ended, and their tokens have been released."""
    told: list[Any] = []

    async def scenario() -> Membership:
        mine = new_membership(server, told=told)
        await mine.refresh()
        server.domain = Domain(database="sqlite:////second.db", liveness_check_interval=7)
        await mine.refresh()
        return mine

    mine = asyncio.run(scenario())
    first, second = Groups.made
    assert told == [[False]], "they are let go before they are stopped"
    assert first.is_stopped
    assert not second.is_stopped
    assert mine.database_url == second.database_url == "sqlite:////second.db"
    assert mine.domain == second.domain == server.domain


def test_a_group_is_kept_until_its_runs_have_ended(server):
    """The node serves it no longer, and a look meanwhile does not leave it: that would end the runs."""

    async def scenario() -> list[Any]:
        mine = await _looked(server, "group", "other")
        mine.is_to_leave("group")
        mine._node.share.give_up("group", [])
        names = []
        for _ in range(2):
            await mine.refresh()
            names.append(Groups.made[-1].names)
            await mine.leave("group")
        return names

    assert asyncio.run(scenario()) == [{"group", "other"}, {"other"}]


def test_a_node_that_stands_back_comes_forward_again(server):
    """It has no group meanwhile, and runs nothing."""
    mine = asyncio.run(_looked(server))
    groups = Groups.made[-1]
    groups.held["group"] = TOKEN
    asyncio.run(mine.stand_back(frozenset({"group"}), "no memory"))
    assert groups.names == {"group"}, "a run of it goes on"
    assert not mine.may_run(tick(uuid4(), 0))
    asyncio.run(mine.refresh())
    assert groups.names == {"group"}, "a look does not change that"
    assert server.given_up == []
    asyncio.run(mine.stand_back(frozenset(), "no memory"))
    assert groups.names == frozenset()
    assert groups.why == "no memory"
    assert server.given_up == [([TOKEN], "no memory")]
    asyncio.run(mine.come_forward())
    assert server.given_up[1:] == [([TOKEN], None)], "it is no worse a successor than others"
    asyncio.run(mine.refresh())
    assert groups.names == {"group", "other"}
    assert mine.may_run(tick(uuid4(), 0))


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_node_stands_back_from_groups_whatever_the_database_says(server, monkeypatch, token):
    """Why it does is a word for whoever has the group next; of a group that it has not, there is none."""
    mine = asyncio.run(_looked(server))
    asked: list[Any] = []

    def fail(_: str, tokens: Any, __: str) -> None:
        asked.extend(tokens)
        raise CoordinationError("away")

    monkeypatch.setattr(store, "give_up_tokens", fail)
    if token is not None:
        Groups.made[-1].held["group"] = token
    asyncio.run(mine.stand_back(frozenset(), "no memory"))
    assert Groups.made[-1].names == frozenset()
    assert asked == ([] if token is None else [token])


async def _looked(server: Any, *queues: str, told: list[Any] | None = None) -> Membership:
    mine = new_membership(server, *queues, told=told)
    await mine.refresh()
    return mine


@pytest.mark.parametrize(
    ("active", "held", "queue", "may"),
    [
        (TOKEN, TOKEN, "group", True),
        (TOKEN, None, "group", False),
        (None, TOKEN, "group", False),
        (TOKEN, Token("group", "node-1", 2), "group", False),
        (TOKEN, TOKEN, "other", False),
        (None, None, None, True),
    ],
    ids=["active", "past the deadline", "not in order yet", "a later term", "another", "without a group"],
)
def test_a_run_of_a_group_needs_its_token(server, active, held, queue, may):
    """The one under which the group is active, at this moment."""
    mine = asyncio.run(_looked(server))
    if active is not None:
        mine.activate(active)
    if held is not None:
        Groups.made[-1].held["group"] = held
    run = tick(uuid4(), 0)
    run.work_queue_name = queue

    assert mine.may_run(run) is may


def test_a_run_of_a_job_that_is_left_out_is_not_run(server):
    """Nor one of a queue that is not served."""
    mine = asyncio.run(_looked(server, DEFAULT_QUEUE, "group"))
    job = uuid4()
    mine._node.share.give_up(None, [job])
    elsewhere = tick(uuid4(), 0)
    elsewhere.work_queue_name = "other"

    assert not mine.may_run(tick(job, 0))
    assert not mine.may_run(elsewhere)


def test_only_a_refusal_is_kept(server):
    """The rest is for whoever runs the groups."""
    told: list[Any] = []
    mine = asyncio.run(_looked(server, told=told))
    gained = Gained(TOKEN, deadline=0.0, reason="a test")
    Groups.made[-1].hear(gained)
    Groups.made[-1].hear(Refused("it is in use"))

    assert told == [gained]
    assert mine.refused == "it is in use"


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"registered": True}, None),
        (
            {"vitals": Vitals(False, "it is read-only", lacks_tables=False)},
            "'group' cannot be joined: it is read-only",
        ),
        ({}, "'group' cannot be joined: the coordination database does not answer"),
    ],
)
def test_whoever_joins_hears_what_is_in_the_way(server, state, error):
    """At the end of the time that it has."""

    async def scenario() -> None:
        mine = await _looked(server)
        vars(Groups.made[-1]).update(state)
        await mine.until_registered("group", time.monotonic())

    if error is None:
        asyncio.run(scenario())
    else:
        with pytest.raises(CoordinationError, match=error):
            asyncio.run(scenario())


def test_whoever_joins_hears_of_a_refusal_at_once(server):
    """Another live process has this node's name."""

    async def scenario() -> None:
        mine = await _looked(server)
        Groups.made[-1].hear(Refused("task_id node-1 is in use"))
        await mine.until_registered("group", time.monotonic() + 3600)

    with pytest.raises(CoordinationError, match="in use"):
        asyncio.run(scenario())


def test_whoever_joins_does_not_wait_for_a_dead_process_of_its_name(server, monkeypatch):
    """One that lived would have shown it by now; the token comes when the dead one's lease is over."""
    monkeypatch.setattr(membership, "LIVES_WITHIN_BEATS", 0)

    async def scenario() -> None:
        mine = await _looked(server)
        Groups.made[-1].waits_for_its_predecessor = True
        await mine.until_registered("group", time.monotonic())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("database", "own", "shown", "warns"),
    [
        ("postgresql://me:hunter2@db/tasks", None, "database me@db/tasks", False),
        ("postgresql://db/tasks", "postgresql://me:hunter2@other/tasks", "database me@other/tasks", False),
        (None, "sqlite:////var/tasks.db", "database /var/tasks.db", False),
        (None, None, "taskadapter.db", True),
    ],
)
def test_a_node_says_once_what_it_takes_part_in(server, caplog, monkeypatch, database, own, shown, warns):
    """Pool, database and folder, without a password; with a warning where each machine has its own."""
    if own is not None:
        monkeypatch.setenv(PREFIX + "DATABASE_URL", own)
    server.domain = Domain(database=database)
    mine = new_membership(server)

    with caplog.at_level("INFO"):
        asyncio.run(twice(mine.refresh))

    said = [record.getMessage() for record in caplog.records if "takes part" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("Node node-1 of work pool pool, in folder ")
    assert str(Path.cwd()) in said[0]
    assert said[0].endswith(f"{shown}.")
    assert "hunter2" not in caplog.text
    assert ("Nobody has named a database" in caplog.text) is warns


async def twice(function: Any) -> None:
    await function()
    await function()


def test_a_node_that_would_be_apart_from_others_takes_no_part(server):
    """It is entered in its database while it looks, so that nodes which begin at once find each other."""
    server.domain, server.stays_out = Domain(), "worker node-2 is elsewhere"
    mine = new_membership(server)
    asyncio.run(mine.refresh())
    assert Groups.made[0].database_url == mine.database_url
    assert Groups.made[0].names == frozenset()
    assert mine.refused == server.stays_out
    assert server.looks == [(mine.database_url, mine.where, {"group", "other"})]


@pytest.mark.parametrize(("database", "looks"), [(None, 1), ("sqlite:////first.db", 0)])
def test_whether_it_would_be_apart_is_asked_once(server, database, looks):
    """And only where nobody has named the database."""
    server.domain = Domain(database=database)
    mine = new_membership(server)
    for _ in range(2):
        asyncio.run(mine.refresh())
    assert (mine.refused, len(server.looks)) == (None, looks)
    assert Groups.made[-1].names == {"group", "other"}
