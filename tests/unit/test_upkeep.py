"""What an agent looks after from time to time."""

from __future__ import annotations

import asyncio
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from taskadapter.agent import upkeep
from taskadapter.agent.hand import RunInHand
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.runs import Life, Phase
from taskadapter.agent.upkeep import RESUMED_LOOKS, Upkeep
from taskadapter.coordination import store
from taskadapter.coordination.messages import Token
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import CoordinationError
from taskadapter.execution import protocol
from taskadapter.prefect_api.pool import Domain
from tests.unit.given import node, tick, until

if TYPE_CHECKING:
    from collections.abc import Iterator

JOB = uuid4()
TOKEN = Token("group", "node-1", 1)


class Agent:
    """All that surrounds the upkeep, and what it is asked to do, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.troubles: list[Exception] = []
        # As a membership.
        self.domain: Domain | None = Domain(liveness_check_interval=10)
        self.database_url = "sqlite://"
        self.served = [DEFAULT_QUEUE, "group"]
        self.stands_back = False
        self.active = {"group": TOKEN}
        self.groups = frozenset({"group"})
        self.where = "database a.db"
        # As hosts, sight, a timetable and a hand.
        self.broken_for, self.blind_for, self.fault = 0.0, 0.0, "no memory"
        self.failing_for = 0.0
        self.runs: list[RunInHand] = []
        self.held: set[Any] = set()
        self.ids: frozenset[Any] = frozenset()
        part: Any = self
        self.node = node()
        self.upkeep = Upkeep(self.node, part, part, part, part, part, part, part, self.new_takeover)

    async def leave(self, token: Token, what: str, fault: str) -> bool:
        self.asked.append(("leave", token, what, fault))
        return False

    async def stand_back(self, but: frozenset[str], why: str) -> None:
        self.stands_back = True
        self.asked.append(("stand back", *but, why))

    def __iter__(self) -> Iterator[RunInHand]:
        return iter(self.runs)

    def those(self, which: Any) -> list[RunInHand]:
        return [run for run in self.runs if which(run.flow_run)]

    async def come_forward(self) -> None:
        self.stands_back = False
        self.asked.append(("come forward",))

    def want(self) -> None:
        self.asked.append(("want",))

    def want_visit(self) -> None:
        self.asked.append(("visit",))

    def look_for(self, news: News) -> None:
        self.asked.append(("look for", news))

    async def poll(self) -> None:
        self.asked.append(("poll",))

    def new_takeover(self) -> Any:
        self.asked.append(("a takeover on", self.database_url))
        return SimpleNamespace(
            database_url=self.database_url, end_orphans=self.end_orphans, sweep=self.sweep
        )

    async def end_orphans(self, interval: float) -> None:
        self.asked.append(("orphans", interval))
        if self.troubles:
            raise self.troubles.pop(0)

    async def sweep(self, queues: list[str], _: object) -> None:
        self.asked.append(("sweep", *queues))

    async def passes(self, turns: int = 20) -> None:
        """Let the upkeep have some turns."""
        for _ in range(turns):
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Each look follows the one before."""
    for name in ("ABLE_SECONDS", "PAUSED_SECONDS", "SWEEP_SECONDS"):
        monkeypatch.setattr(upkeep, name, 0)


@pytest.fixture(autouse=True)
def pruned(monkeypatch):
    """For how long what is older is kept, each time that the rest is forgotten."""
    found: list[float] = []
    monkeypatch.setattr(store, "prune", lambda _, seconds: found.append(seconds))
    return found


def run(scenario: Any) -> Any:
    """Let a scenario act on an agent whose upkeep goes on."""

    async def go() -> Any:
        agent = Agent()
        agent.upkeep.begin()
        await scenario(agent)
        agent.node.tasks.cancel()
        return agent

    return asyncio.run(go())


def test_a_node_without_processes_stands_back_until_it_has_some(caplog):
    """After half a lease; and says both, once."""
    caplog.set_level("INFO")

    async def scenario(agent: Agent) -> None:
        agent.broken_for = 5.0
        await agent.passes()
        assert not agent.stands_back, "it may be over in a moment"
        agent.broken_for = 5.1
        await until(lambda: agent.stands_back)
        await agent.passes()
        agent.broken_for = 0.0
        await until(lambda: not agent.stands_back)
        await agent.passes()

    said = "it cannot start processes: no memory"
    assert standing(run(scenario)) == [
        ("stand back", "group", said),
        ("stand back", said),
        ("come forward",),
        ("visit",),
    ]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert "no memory" in caplog.text


def standing(agent: Agent) -> list[tuple[object, ...]]:
    """Return how the node stood in its groups, from one change to the next."""
    kinds = {"stand back", "come forward", "visit"}
    return [what for what, _ in groupby(what for what in agent.asked if what[0] in kinds)]


def test_a_node_that_sees_nothing_stands_back_after_a_lease():
    """Another one may have a way to the API."""

    async def scenario(agent: Agent) -> None:
        agent.fault, agent.blind_for = httpx.HTTPError("refused"), 10.0  # type: ignore[assignment]
        await agent.passes()
        assert not agent.stands_back, "it may be over in a moment"
        agent.blind_for = 10.1
        await until(lambda: standing(agent)[1:])

    said = "it cannot look for runs: refused"
    assert standing(run(scenario)) == [("stand back", "group", said), ("stand back", said)]


def test_a_node_that_the_database_lets_see_nothing_leaves_its_groups_to_those_that_may():
    """It takes its heartbeats all the same; once for each lease, for there may be no such node."""

    async def scenario(agent: Agent) -> None:
        agent.fault = CoordinationError("permission denied")  # type: ignore[assignment]
        for seconds in (10.0, 10.1, 20.0, 20.2, 0.0, 10.1):
            agent.failing_for = seconds
            await agent.passes()
            agent.asked.append(("after", seconds))

    asked = [what for what in run(scenario).asked if what[0] in {"leave", "after"}]
    left = ("leave", TOKEN, "This node cannot look for runs", "permission denied")
    assert asked == [
        ("after", 10.0),
        left,
        ("after", 10.1),
        ("after", 20.0),
        left,
        ("after", 20.2),
        ("after", 0.0),
        left,
        ("after", 10.1),
    ]


def test_a_group_is_left_when_nothing_of_it_goes_on():
    """A body may end first; what has not begun is dropped, and what is settled others can tell."""
    phases = Phase.BEGUN, Phase.SETTLED, Phase.FORKED, Phase.FORKED

    async def scenario(agent: Agent) -> None:
        for queue, phase in zip(["going on", "settled", "waits", None], phases, strict=True):
            flow_run = tick(uuid4(), 0)
            flow_run.work_queue_name = queue
            agent.runs.append(RunInHand(flow_run, life=Life(phase)))
        agent.groups, agent.broken_for = frozenset({"going on", "settled", "waits"}), 6.0
        await until(lambda: len(standing(agent)) > 1)
        agent.runs[0].meet(protocol.Settled())
        await until(lambda: len(standing(agent)) > 2)

    agent = run(scenario)
    first, *later = (set(what[1:-1]) for what in standing(agent))
    assert first == agent.groups
    assert later == [{"going on"}, set()]
    dropped = [run.life.dropped for run in agent.runs]
    assert dropped == [True, True, True, False], "jobs without a group are nobody else's"


def test_a_job_that_is_resumed_is_looked_at_at_once(monkeypatch):
    """Prefect may show it later than its row: a few times, and then with all others."""
    monkeypatch.setattr(store, "resumed", lambda _, job_ids: set(job_ids))

    async def scenario(agent: Agent) -> None:
        agent.held = {JOB}
        await until(lambda: agent.asked.count(("poll",)) >= RESUMED_LOOKS)
        await agent.passes()

    agent = run(scenario)
    assert agent.asked.count(("poll",)) == RESUMED_LOOKS
    assert agent.asked.count(("look for", News(Kind.DEPLOYMENT, JOB))) == RESUMED_LOOKS


def test_a_job_that_stays_paused_costs_no_request(monkeypatch):
    """Nor does a database that does not answer end anything."""
    answers: list[Any] = [CoordinationError("away"), set()]

    def resumed(*_: Any) -> Any:
        answer = answers.pop(0) if answers else set()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(store, "resumed", resumed)

    async def scenario(agent: Agent) -> None:
        agent.held = {JOB}
        await until(lambda: not answers)
        await agent.passes()

    assert ("poll",) not in run(scenario).asked


def test_what_is_nobodys_is_settled_again_and_again(pruned):
    """On the queues that this node runs now; what is old is forgotten at the first time."""

    async def scenario(agent: Agent) -> None:
        await until(lambda: agent.asked.count(("sweep", DEFAULT_QUEUE, "group")) > 3)

    agent = run(scenario)
    assert agent.asked[:2] == [("a takeover on", "sqlite://"), ("orphans", 10)]
    assert pruned == [7 * 86400.0]


@pytest.mark.parametrize("trouble", [CoordinationError("away"), ConnectionError("away")])
def test_a_fault_puts_it_off(trouble):
    """Until the next time."""

    async def scenario(agent: Agent) -> None:
        agent.troubles = [trouble]
        await until(lambda: ("sweep", DEFAULT_QUEUE, "group") in agent.asked)

    assert run(scenario).troubles == []


def test_on_another_database_it_begins_anew():
    """What was suspected on the former one counts for nothing."""

    async def scenario(agent: Agent) -> None:
        await until(lambda: ("orphans", 10) in agent.asked)
        agent.database_url = "sqlite:///another"
        await until(lambda: ("a takeover on", "sqlite:///another") in agent.asked)

    run(scenario)


def test_nothing_is_looked_after_before_the_pool_is_known():
    """There is no database to ask."""

    async def scenario(agent: Agent) -> None:
        agent.domain = None
        await agent.passes()

    assert run(scenario).asked == []


def test_a_worker_that_coordinates_elsewhere_is_named_once(monkeypatch, caplog):
    """Not before the second look at it, for it may have just begun."""
    looks: list[str] = []
    monkeypatch.setattr(upkeep, "STRANGERS_SECONDS", 0)

    async def scenario(_: Agent) -> None:
        await until(lambda: len(looks) > 5)

    async def look(*_: object) -> list[Any]:
        looks.append(caplog.text)
        if len(looks) == 2:
            raise httpx.ConnectError("away")
        return [SimpleNamespace(name="elsewhere")]

    monkeypatch.setattr(upkeep, "strangers_to", look)
    run(scenario)
    assert [text == "" for text in looks[:4]] == [True, True, True, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "Worker elsewhere polls work pool pool, and is no node in this node's database, "
    )
    assert "database a.db: " in said
