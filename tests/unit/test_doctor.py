"""What doctor says of a pool's groups, and of its jobs by their rows and their ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import DeploymentSchedule, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule

from taskadapter.coordination.executions import SWITCHED_OFF, Entry, Past
from taskadapter.coordination.overview import GivenUp, GroupStatus, NodeStatus, Status
from taskadapter.coordination.progress import JobRow
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.doctor import database, late, server
from taskadapter.doctor.findings import Finding, Level, ok
from taskadapter.doctor.jobs import look_at_jobs
from taskadapter.rules.ticks import slug

POOL = WorkPool(name="pool", type="warm-backup", default_queue_id=UUID(int=3))
JOB = DeploymentResponse(id=UUID(int=1), name="job", flow_id=UUID(int=2), labels={})
CAUSE = "The flow could not be loaded: ModuleNotFoundError: No module named 'gone'"


def past(n: int, outcome: str | None, *, is_tick: bool = True, lateness: float = 0.0) -> Past:
    """An execution; the first, with the highest number, is the newest."""
    due = f"2030-01-01T00:00:{n:02}" if is_tick else None
    entry = Entry(f"tick {n}", f"run-{n}", str(JOB.id), due, n, None, "node-1", None, "first", outcome)
    return Past(entry, lateness, 1.0, 1.0, CAUSE if outcome == "Crashed" else None)


@pytest.fixture
def said(monkeypatch):
    """What is said of a job that goes on, by its last executions."""

    def of(*executions: Past, row: JobRow | None = None) -> list[tuple[Level, str]]:
        monkeypatch.setattr(late, "transaction", lambda _: nullcontext())
        monkeypatch.setattr("taskadapter.coordination.ledger.history", lambda *_: list(executions))
        monkeypatch.setattr(
            late, "of_lines", lambda *_: [SimpleNamespace(level=Level.WARNING, text="late")]
        )
        monkeypatch.setattr(late, "history", lambda *_: [])
        seen: Any = SimpleNamespace(pool=POOL, queues=[], jobs=[JOB])
        engine: Any = None
        rows = {} if row is None else {str(JOB.id): row}
        found = late.look_at_late(engine, seen, rows, {str(JOB.id): datetime.now(UTC)})
        return [(finding.level, finding.text) for finding in found]

    return of


@pytest.mark.parametrize(("stale", "level"), [(0, Level.OK), (3, Level.OK), (4, Level.WARNING)])
def test_a_server_that_is_busy_renews_its_date_late(monkeypatch, stale, level):
    """It is asked again a while later; a clock that is wrong stays so."""
    monkeypatch.setattr(server, "CLOCK_PAUSE_SECONDS", 0)
    now = datetime.now(UTC)
    dates = [now - timedelta(minutes=1)] * stale + [now] * 4

    class Client:
        async def hello(self):
            return SimpleNamespace(headers={"date": format_datetime(dates.pop(0), usegmt=True)})

    client: Any = Client()
    assert asyncio.run(server.compare_clocks(client)).level is level


def test_a_job_that_fails_each_time(said):
    """That is an error, though its ticks begin on time; how late they were is not told besides."""
    for lateness in (0.0, 99.0):
        ticks = [past(9 - n, "Failed", lateness=lateness) for n in range(4)]
        assert said(*ticks, past(1, "Completed")) == [
            (
                Level.ERROR,
                "job 'job' fails each time: its last 4 ticks are Failed, the last one on node-1; see "
                "its log, `prefect flow-run logs run-9`, mend the job, and deploy it again.",
            )
        ]


def test_why_a_job_crashes_each_time(said):
    """The ledger knows it; skipped ticks, runs by hand and what goes on do not count."""
    ((level, text),) = said(
        past(9, None),
        past(8, "Skipped"),
        past(7, "Crashed"),
        past(6, "Abandoned"),
        past(5, "Completed", is_tick=False),
        past(4, "Failed"),
        past(3, "Crashed"),
    )
    assert level is Level.ERROR
    assert f"its last 3 ticks are Crashed or Failed, the last one on node-1 ({CAUSE}); see its" in text
    assert "`prefect flow-run logs run-7`" in text


def test_a_job_that_fails_at_times(said):
    """One that has had no three in a row, or has recovered since, is well."""
    assert said(past(9, "Failed"), past(8, "Crashed")) == []
    assert said(past(9, "Completed"), *(past(n, "Failed") for n in (8, 7, 6))) == []
    assert said(past(9, "Failed"), past(8, "Completed"), past(7, "Failed"), past(6, "Failed")) == []


def test_a_job_that_is_late_each_time(said):
    """Its last ticks began late, each of them, and completed."""
    assert said(*(past(n, "Completed", lateness=9.0) for n in (9, 8, 7))) == [(Level.WARNING, "late")]


@pytest.mark.parametrize("has_schedule", [True, False])
def test_a_job_whose_schedule_was_switched_off(has_schedule):
    """Perhaps by somebody who meant to pause it; one that has none is to be deployed again."""
    trigger = TriggerConfiguration(interval=60)
    own = DeploymentSchedule(
        schedule=IntervalSchedule(interval=timedelta(seconds=60)), active=False, slug=slug(trigger)
    )
    job = JOB.model_copy(
        update={"job_variables": {"trigger": {"interval": 60}}, "schedules": [own] * has_schedule}
    )
    off = JobRow(str(JOB.id), "", 3, 3, paused=False, ended=SWITCHED_OFF)
    texts = [finding.text for finding in look_at_jobs([job], 0, {str(JOB.id): off})]

    said = (
        "job 'job' is over: its schedule was switched off; where that is not meant, start it again with "
        "`taskadapter restart job`."
    )
    assert (said in texts) is has_schedule


PAUSED = JobRow(str(JOB.id), "", 3, 3, paused=True, ended=None)


def test_a_job_that_is_paused_in_its_row_alone(said):
    """It does not count as scheduled, nor as late: the switch in Prefect says nothing of it."""
    texts = [finding.text for finding in look_at_jobs([JOB], 0, {str(JOB.id): PAUSED})]

    assert texts[-2:] == [
        "0 jobs are scheduled.",
        "job 'job' is paused in the database, and Prefect was not told: it is not run, and shows as "
        "active; run `taskadapter pause job` again, or `taskadapter resume job`.",
    ]
    assert said(*(past(n, "Completed", lateness=9.0) for n in (9, 8, 7)), row=PAUSED) == []


def test_a_job_that_is_paused_in_prefect_too():
    """One sentence names all of them."""
    paused = JOB.model_copy(update={"paused": True})

    for rows in ({}, {str(JOB.id): PAUSED}):
        (found,) = (one for one in look_at_jobs([paused], 0, rows) if "paused" in one.text)
        assert found.text.startswith("paused, and not run until somebody resumes it: job; switch a")


@pytest.fixture
def of_reports(monkeypatch):
    """What is said of a database with the group `reports`, without a server that could be asked."""
    monkeypatch.setattr(database, "_tables", lambda *_: ok("tables"))

    def findings(
        *nodes: NodeStatus,
        holder: str | None = None,
        heartbeat_age: float | None = None,
        given_up: Collection[GivenUp] = (),
    ) -> list[Finding]:
        group = GroupStatus(
            group_id="reports",
            holder=holder,
            term=3,
            heartbeat_age=heartbeat_age,
            held_for=None,
            reason=None,
            resign_requested=False,
        )
        engine: Any = None
        facts = database.Facts(status=Status((group,), nodes), given_up=given_up)
        return list(database._findings(engine, facts, "pool", None))

    return findings


@pytest.mark.parametrize(
    ("age", "remedy"),
    [(1.0, "nodes that are up leave it while Prefect's API does not answer"), (99.0, "start an agent: ")],
)
def test_a_group_that_its_nodes_have_left_without_the_api(of_reports, age, remedy):
    """Another agent would leave it, too; where none is up, one is wanted."""
    node = NodeStatus(task_id="node-1", host="one", pid=1, group_ids=(), last_seen_age=age, up_for=9.0)
    said = [finding.text for finding in of_reports(node)]
    (about,) = [text for text in said if text.startswith("group 'reports'")]
    assert about.startswith(f"group 'reports' has no active node; {remedy}")


def test_a_standby_that_has_given_the_group_up_is_named(of_reports):
    """It would have it if the holder died, and might still not be able to run its jobs."""
    nodes = [
        NodeStatus(task_id=name, host=name, pid=1, group_ids=("reports",), last_seen_age=age, up_for=9.0)
        for name, age in (("node-1", 0.0), ("node-2", 0.0), ("node-3", 99.0), ("node-4", 0.0))
    ]
    given_up = [
        GivenUp(group_id=name, task_id=node, reason=f"no module {node}.", released=40.0)
        for node, name in (
            ("node-1", "reports"),
            ("node-2", "reports"),
            ("node-3", "reports"),
            ("node-4", "others"),
        )
    ]
    found = [
        one
        for one in of_reports(*nodes, holder="node-1", heartbeat_age=0.1, given_up=given_up)
        if "gave group" in one.text
    ]
    assert [(one.level, one.text) for one in found] == [
        (
            Level.WARNING,
            "node 'node-2' gave group 'reports' up 40 s ago: no module node-2. It takes the group all the "
            "same if the holder stops; see its log, and mend that.",
        )
    ]
