"""What an agent does about what it finds at Prefect's API, and about an API that fails it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound

from taskadapter.agent import lookout, looks, sight
from taskadapter.agent.hearing import Hearing, Kind, News
from taskadapter.agent.lookout import Lookout
from taskadapter.agent.looks import Pace
from taskadapter.agent.node import Share
from taskadapter.agent.sight import Sight
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import ApiUnavailableError, CoordinationError
from taskadapter.prefect_api.ticks import Due
from tests.unit.given import PATIENCE_SECONDS, node, tick, until

OURS, OTHERS = uuid4(), uuid4()


class Timetable:
    """Knows our job, and makes no ticks."""

    def __init__(self) -> None:
        self.complete_until = datetime.now(UTC) + timedelta(seconds=60)
        self.has_new = self.is_cut = False
        self.held: set[Any] = set()

    def strangers(self, found: Any) -> set[Any]:
        return {run.deployment_id for run in found} - {OURS}

    def learn(self, _: object) -> set[Any]:
        return set()

    def add(self, _: object) -> None: ...

    async def complete(self, found: Any, *_: object) -> Any:
        return found.runs

    def late(self, _: object) -> set[Any]:
        return {OURS, OTHERS}


class Agent:
    """All that surrounds the lookout: an API with some runs, and parts that remember what they are told."""

    def __init__(self, *runs: Any) -> None:
        self.runs = list(runs)
        self.troubles: list[Exception] = []
        self.answers: asyncio.Event | None = None
        self.asked: list[tuple[object, ...]] = []
        self.share = Share(left_out={OTHERS})
        # As a membership.
        self.served = [DEFAULT_QUEUE]
        self.withheld: frozenset[str] = frozenset()
        self.queues = {DEFAULT_QUEUE}
        self.database_url = "sqlite://"
        self.domain: Any = object()
        # As a dispatcher, and as hosts.
        self.has_plenty = self.is_busy = False
        hand: Any = SimpleNamespace(ids=frozenset(), flow_runs=[], cancel=self.cancel)
        self.hand = hand
        self.limit = 0
        part: Any = self
        timetable: Any = Timetable()
        pool = SimpleNamespace(id=uuid4(), base_job_template={})
        mine = node(self, pool, self.share)
        self.sight = Sight(mine)
        self.lookout = Lookout(
            mine,
            self.sight,
            part,
            part,
            part,
            timetable,
            hand,
            part,
            pace=Pace(0.6, 1.8),
            limit=None,
            prefetch_seconds=10,
        )

    async def refresh(self) -> None:
        self.asked.append(("visit",))
        if self.answers is not None:
            await self.answers.wait()
        if self.troubles:
            raise self.troubles.pop(0)

    async def add(self, queue: str) -> None:
        self.asked.append(("join", queue))

    async def prepare(self, _: object) -> None: ...

    def found(self, runs: Any, _: float) -> None:
        self.asked.append(("found", *runs))

    def cancel(self, run_id: Any) -> None:
        self.asked.append(("cancel", run_id))

    def use(self, _: object) -> None: ...

    def retain(self, job_ids: Any) -> None:
        self.retained = set(job_ids)

    def polls(self, times: int = 1) -> list[tuple[object, ...]]:
        """Return what is asked for while the agent polls so often."""

        async def go() -> None:
            for _ in range(times):
                await self.lookout.poll()

        asyncio.run(go())
        return self.asked


def of_looks(caplog: Any) -> list[Any]:
    """The lines about looks themselves, not about what they find."""
    return [record for record in caplog.records if record.getMessage().startswith("Looking for runs")]


@pytest.fixture(autouse=True)
def server(monkeypatch):
    """An API that lists as many runs as it has, and an agent that never hears, nor waits."""
    lists: dict[str, Any] = {"fault": None, "names": []}

    async def due(client: Any, pool: str, names: Any, until: datetime, **which: Any) -> Due:
        assert pool == "pool"
        lists["names"].append(names)
        lists["which"] = which
        if isinstance(lists["fault"], Exception):
            raise lists["fault"]
        return Due(client.runs, until)

    async def nothing(*_: object) -> list[Any]:
        return []

    monkeypatch.setattr(lookout, "due", due)
    monkeypatch.setattr(lookout, "deployments_of_pool", nothing)
    monkeypatch.setattr(lookout, "deployments_of", nothing)
    monkeypatch.setattr(Hearing, "listen", nothing)
    monkeypatch.setattr(sight, "backoff", lambda *_: 0.0)
    return lists


def test_the_first_look_is_a_visit_and_the_next_is_not_due():
    """What is due until then is known."""
    run = tick(OURS, 0)
    assert Agent(run).polls(3) == [("visit",), ("found", run)]


def test_a_pool_without_jobs_is_told_once(monkeypatch, caplog):
    """An agent that does nothing has nothing to do; once there are jobs it is not said again."""
    caplog.set_level("INFO")
    found: list[Any] = []

    async def deployments_of_pool(*_: object) -> list[Any]:
        return found

    async def nothing(*_: object) -> None: ...

    monkeypatch.setattr(lookout, "deployments_of_pool", deployments_of_pool)
    monkeypatch.setattr(Lookout, "_take_note", nothing)
    agent = Agent()
    for deployed in ([], [], [SimpleNamespace(id=OURS, created=None, work_queue_name=DEFAULT_QUEUE)], []):
        found[:] = deployed
        agent.lookout.want_visit()
        agent.polls()

    assert caplog.messages == ["Work pool 'pool' has no jobs yet."]


def test_jobs_that_are_gone_are_forgotten(monkeypatch):
    """A program that schedules jobs, and unschedules them, has an agent that does not grow by it."""
    found = [SimpleNamespace(id=OURS, created=None, work_queue_name=DEFAULT_QUEUE)]

    async def deployments_of_pool(*_: object) -> list[Any]:
        return found

    async def nothing(*_: object) -> None: ...

    monkeypatch.setattr(lookout, "deployments_of_pool", deployments_of_pool)
    monkeypatch.setattr(Lookout, "_take_note", nothing)
    agent, going_on = Agent(), uuid4()
    agent.hand.flow_runs = [tick(going_on, 0), tick(OURS, 0)]
    agent.polls()
    assert agent.retained == {OURS, going_on}


def test_jobs_and_queues_of_others_are_left_to_them():
    """Though the list of the pool has them."""
    ours, others, elsewhere = tick(OURS, 0), tick(OTHERS, 0), tick(OURS, 0)
    elsewhere.work_queue_name = "group"
    assert Agent(ours, others, elsewhere).polls()[-1] == ("found", ours)


@pytest.mark.parametrize("is_withheld", [False, True])
def test_a_list_that_is_too_short_is_made_longer_by_our_jobs(server, is_withheld):
    """Those that have ended, too; those of a queue that is withheld come as Prefect lets them through."""
    agent = Agent()
    agent.withheld = frozenset({DEFAULT_QUEUE, "elsewhere"} if is_withheld else {"elsewhere"})
    jobs = {OURS: DEFAULT_QUEUE, OTHERS: DEFAULT_QUEUE, uuid4(): "elsewhere"}
    deployed: Any = {id_: SimpleNamespace(work_queue_name=queue) for id_, queue in jobs.items()}
    agent.lookout._deployed = deployed
    asyncio.run(agent.lookout._due([DEFAULT_QUEUE], datetime.now(UTC)))
    wanted = set() if is_withheld else {OURS}
    withheld = {DEFAULT_QUEUE} if is_withheld else set()
    assert server["which"].pop("late")() == wanted
    assert server["which"] == {"job_ids": wanted, "withheld": withheld}


@pytest.mark.parametrize(("queues", "names"), [({DEFAULT_QUEUE}, None), ({"group"}, [DEFAULT_QUEUE])])
def test_queues_are_named_where_not_all_are_served(server, queues, names):
    """The server looks each of them up."""
    agent = Agent()
    agent.queues = queues
    agent.polls()
    assert server["names"] == [names]


def test_a_new_jobs_run_waits_for_a_visit():
    """Its first ticks may not be planned; a job that no visit finds is no reason for another."""
    agent = Agent(tick(uuid4(), 0))
    agent.polls()
    assert [what[0] for what in agent.asked] == ["visit", "visit", "found"]
    agent.asked.clear()
    agent.lookout.want()
    assert [what[0] for what in agent.polls()] == ["found"]


@pytest.mark.parametrize("fault", [httpx.ConnectError("away"), ValueError("nonsense")])
def test_no_fault_ends_it_or_fills_the_log(fault, caplog):
    """One line when it begins, and one when it is over."""
    caplog.set_level("INFO")
    agent = Agent()
    agent.troubles = [fault] * 5

    assert [what[0] for what in agent.polls(6)] == [*["visit"] * 6, "found"]
    lines = [record.getMessage() for record in of_looks(caplog) if not record.exc_info]
    assert lines[0].startswith("Looking for runs failed, trying again: ")
    assert lines[1:] == ["Looking for runs succeeds again, after 5 failures."]


def test_a_look_without_an_answer_is_told_and_goes_on(monkeypatch, caplog):
    """A frozen server takes connections, and a client waits for a minute; told once, and its end."""
    caplog.set_level("INFO")
    monkeypatch.setattr(sight, "SILENT_SECONDS", 0.0)
    agent, answers = Agent(), asyncio.Event()
    agent.answers = answers

    async def go() -> None:
        look = asyncio.create_task(agent.lookout.poll())
        await until(lambda: caplog.messages)
        assert agent.sight.is_api_away
        answers.set()
        await look

    asyncio.run(go())

    begun, over = (record.getMessage() for record in of_looks(caplog))
    assert begun.startswith("Looking for runs has had no answer for 0 s")
    assert over.startswith("Looking for runs has an answer, after 0 s")
    assert not agent.sight.is_api_away
    assert agent.asked[-1] == ("found",)


def test_a_silence_that_ends_in_a_fault_is_over_with_it(monkeypatch, caplog):
    """That it succeeds again is told once."""
    caplog.set_level("INFO")
    monkeypatch.setattr(sight, "SILENT_SECONDS", 0.0)
    agent, answers = Agent(), asyncio.Event()
    agent.answers, agent.troubles = answers, [httpx.ReadTimeout("")]

    async def go() -> None:
        look = asyncio.create_task(agent.lookout.poll())
        await until(lambda: caplog.messages)
        answers.set()
        await look
        monkeypatch.setattr(sight, "SILENT_SECONDS", PATIENCE_SECONDS)
        await agent.lookout.poll()

    asyncio.run(go())

    lines = [record.getMessage() for record in of_looks(caplog)]
    assert [line.partition(",")[0].partition(":")[0] for line in lines] == [
        "Looking for runs has had no answer for 0 s",
        "Looking for runs failed",
        "Looking for runs succeeds again",
    ]


@pytest.mark.parametrize(
    ("trouble", "is_blind"),
    [
        (httpx.ConnectError("away"), True),
        (ValueError("nonsense"), True),
        (CoordinationError("away"), False),
    ],
)
def test_a_node_is_blind_that_has_no_answer_from_the_api(trouble, is_blind):
    """Whatever keeps it from that; but the coordination database is the heartbeat's to judge."""
    agent = Agent()
    agent.troubles = [httpx.ConnectError("away"), trouble]
    agent.polls()
    assert agent.sight.blind_for > 0
    agent.polls()
    assert (agent.sight.blind_for > 0) is is_blind
    agent.polls()
    assert agent.sight.blind_for == 0


def test_a_node_that_serves_nothing_asks_whether_the_api_is_back():
    """There is nothing of which it would see that; standing back, it serves no group."""
    agent = Agent()
    agent.polls()
    agent.troubles = [httpx.ConnectError("away")] * 2
    agent.lookout.want_visit()
    agent.polls()
    agent.served = []
    agent.lookout._looks.visited(time.monotonic() + PATIENCE_SECONDS)  # a visit is not due by itself
    agent.lookout.want()
    agent.polls()
    assert agent.sight.blind_for > 0
    agent.polls()
    assert agent.sight.blind_for == 0


@pytest.mark.parametrize(
    ("answer", "is_blind"),
    [
        (None, False),
        (ObjectNotFound(ValueError("gone")), False),
        (httpx.ConnectError("refused"), True),
        (TimeoutError(), True),
    ],
    ids=["it answers", "the pool is gone", "it refuses", "it does not answer either"],
)
def test_a_look_without_an_answer_has_the_api_asked_otherwise(monkeypatch, answer, is_blind):
    """It may be slow, or it is the coordination database that the look waits for."""
    monkeypatch.setattr(sight, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(sight, "DOUBT_SECONDS", 0.0 if isinstance(answer, TimeoutError) else 9.0)
    agent = Agent()
    agent.answers, asked = asyncio.Event(), asyncio.Event()

    async def read_work_pool(_: str) -> None:
        asked.set()
        if isinstance(answer, TimeoutError):
            await asyncio.Event().wait()
        if answer is not None:
            raise answer

    agent.read_work_pool = read_work_pool  # type: ignore[attr-defined]

    async def go() -> None:
        look = asyncio.create_task(agent.lookout.poll())
        await asked.wait()
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert (agent.sight.blind_for > 0) is is_blind
        assert (agent.sight.fault is not None) is is_blind
        assert agent.answers is not None
        agent.answers.set()
        await look
        assert agent.sight.blind_for == 0

    asyncio.run(go())


def test_an_api_that_was_away_has_perhaps_told_nothing():
    """The stream of its events may have been open all the while: all is looked at again."""
    agent = Agent()
    agent.polls()
    agent.troubles = [httpx.ConnectError("away")]
    agent.lookout.want_visit()
    agent.polls(2)
    agent.asked.clear()
    end = time.monotonic() + PATIENCE_SECONDS
    while ("visit",) not in agent.polls() and time.monotonic() < end:
        time.sleep(0.01)
    assert ("visit",) in agent.asked


def test_a_queue_that_is_gone_is_a_reason_for_a_visit(server):
    """Nothing runs from it."""
    server["fault"] = ObjectNotFound(ValueError("gone"))
    agent = Agent(tick(OURS, 0))
    agent.polls()
    assert agent.asked[-1] == ("found",)
    server["fault"] = None
    assert ("visit",) in agent.polls()[2:]


def test_a_node_that_serves_nothing_finds_nothing(server):
    """It holds no token, and leaves the jobs without a group to others."""
    agent = Agent(tick(OURS, 0))
    agent.served = []
    assert agent.polls() == [("visit",), ("found",)]
    assert server["names"] == []


def test_a_cancellation_is_acted_on_without_a_look():
    """The run's process is here."""
    agent = Agent()
    agent.polls()
    run_id = uuid4()
    agent.asked.clear()
    agent.lookout._hear(News(Kind.CANCELLING, run_id))
    assert agent.polls() == [("cancel", run_id)]


@pytest.mark.parametrize(("by", "is_looked_for"), [("stream", False), ("agent", True)])
def test_a_run_in_hand_is_no_news_unless_the_agent_says_so(by, is_looked_for, monkeypatch):
    """What becomes of it is known here first; but one that could not be claimed is to be found again."""
    monkeypatch.setattr(looks, "SHORTEST_PAUSE_SECONDS", 0)
    agent = Agent()
    agent.polls()
    agent.asked.clear()
    run_id = uuid4()
    agent.hand.ids = frozenset({run_id})
    news = News(Kind.WAITS, run_id)
    if by == "stream":
        agent.lookout._hear(news)
    else:
        agent.lookout.look_for(news)

    assert bool(agent.polls()) is is_looked_for


def test_whoever_waits_for_a_look_hears_that_the_api_is_away():
    """At the end of the time that it has."""
    agent = Agent()
    agent.domain = None  # it has not been up for a moment
    agent.troubles = [httpx.ConnectError("away")] * 1000

    async def go() -> None:
        await agent.lookout.look_at_once("group", [OURS], time.monotonic() + 0.1)

    with pytest.raises(ApiUnavailableError, match=r"^Prefect's API.* does not answer: away\.$"):
        asyncio.run(go())


def test_one_more_queue_costs_no_visit():
    """To list all deployments is dear, and many may join one after the other."""
    agent = Agent()
    agent.polls()
    agent.asked.clear()

    asyncio.run(agent.lookout.look_at_once("group", [OURS], time.monotonic()))
    assert agent.asked == [("join", "group")]


# --- code that is not here ------------------------------------------------------------------------


def deployed(entrypoint: str | None, **changes: Any) -> Any:
    """A deployment as `prefect deploy` makes it in a project."""
    given: dict[str, Any] = {
        "id": uuid4(),
        "entrypoint": entrypoint,
        "path": ".",
        "pull_steps": None,
        "job_variables": {},
        "work_queue_name": DEFAULT_QUEUE,
        "work_pool_name": "pool",
        "created": None,
    }
    return SimpleNamespace(**(given | changes))


def warnings_about(monkeypatch: Any, caplog: Any, *found: Any, visits: int = 1) -> list[str]:
    """Return what an agent says of deployments that it finds at its visits."""

    async def deployments(*_: object) -> list[Any]:
        return list(found)

    async def look(*_: object) -> None: ...

    monkeypatch.setattr(lookout, "deployments_of_pool", deployments)
    monkeypatch.setattr(lookout, "carry_over", look)
    agent = Agent()

    async def go() -> None:
        for _ in range(visits):
            agent.lookout.want_visit()
            await agent.lookout.poll()

    with caplog.at_level("WARNING"):
        asyncio.run(go())
    return [record.getMessage() for record in caplog.records if "lacks" in record.getMessage()]


@pytest.mark.parametrize("folder", ["a" * 300, "gone"])
def test_a_folder_that_cannot_be_entered_lacks_its_code(monkeypatch, caplog, tmp_path, folder):
    """It fails no look: most jobs of the pool are elsewhere."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    there = "" if folder == "gone" else f"/{folder}"
    (told,) = warnings_about(
        monkeypatch, caplog, deployed("job.py:job", job_variables={"working_dir": there})
    )
    assert "lacks job.py, and its ticks wait here" in told


def test_a_folder_that_lacks_code_is_named_once(monkeypatch, caplog, tmp_path):
    """All files of a folder in one line; what is there, or is fetched, is not named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").touch()
    other = tmp_path / "other"
    found = [
        deployed("here.py:job"),
        deployed("flows/appender.py:append"),
        deployed("flows/counters.py:Counter.as_service.ten"),
        deployed("flows/fetched.py:job", pull_steps=[{"prefect.deployments.steps.git_clone": {}}]),
        deployed("package.module.job"),
        deployed(None),
        deployed("elsewhere.py:job", job_variables={"working_dir": str(other)}),
    ]

    first, second = warnings_about(monkeypatch, caplog, *found, visits=3)

    assert first.startswith(f"Folder {tmp_path} lacks flows/appender.py, flows/counters.py, ")
    assert second.startswith(f"Folder {other} lacks elsewhere.py, ")


def test_code_of_a_queue_that_others_serve_is_not_missed(monkeypatch, caplog, tmp_path):
    """A program has the code of its own jobs, perhaps of no others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Share, "serves", lambda _, queue: queue == DEFAULT_QUEUE)

    assert warnings_about(monkeypatch, caplog, deployed("x.py:job", work_queue_name="group")) == []
