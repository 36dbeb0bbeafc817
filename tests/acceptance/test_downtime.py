"""What becomes of ticks that were due while the API, the coordination database or all agents were away."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest

from deployments.local import postgres, prefect_server, wait_until
from tests.acceptance.project import PATIENCE, Entry, Prefect, Project, due, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.local import Postgres, PrefectServer, Program

pytestmark = pytest.mark.slow

WAITING_TIME = 5.0
"""Seconds that a tick may be late before a policy ignores it."""

SLACK = 2.0
"""Seconds from a decision to the body."""

JOBS = """
    from ledger import note
    from taskadapter import Listener, TaskPolicy, TriggerConfiguration, WaitingPolicy, WarmBackupConfig
    from taskadapter import current_run

    def listener(policy):
        return Listener(
            trigger=TriggerConfiguration(interval={interval}),
            task_policy=TaskPolicy(waiting_policy=policy, max_concurrent=1),
            warm_backup_config=WarmBackupConfig(
                group_id="downtime", liveness_check_interval=3, heartbeat_frequency=0.5
            ),
        )

    def enter(job):
        run = current_run()
        note(job, "ran", due=run.scheduled_time.timestamp(), count=run.count)

    @listener(WaitingPolicy.WAIT).service("wait-{interval}")
    def wait() -> None:
        enter("wait-{interval}")

    @listener(WaitingPolicy.IGNORE).service("ignore-{interval}")
    def ignore() -> None:
        enter("ignore-{interval}")
"""


@dataclass
class Site:
    """Everything that can be away.

    Attributes:
        server: the API.
        database: what the agents coordinate through.
        agents: all of them.
    """

    server: PrefectServer
    database: Postgres
    agents: Sequence[Program]

    def programs(self, part: str) -> Sequence[Program]:
        """Return the programs of one part of it."""
        parts: dict[str, Sequence[Program]] = {
            "server": [self.server],
            "database": [self.database],
            "agents": self.agents,
        }
        return parts[part]


@dataclass(frozen=True)
class Outage:
    """When something was away (seconds since the epoch), and the ticks that a test looks at.

    Attributes:
        since: no tick that is due before is judged.
        down: when all of it was away.
        back: when it was there again.
        until: all ticks until then are settled.
        interval: seconds between two of them.
    """

    since: float
    down: float
    back: float
    until: float
    interval: int

    def judged(self, moment: float) -> bool:
        """Return whether a tick that is due then is one to look at."""
        return self.since <= moment <= self.until

    def expected(self, anchor: float) -> list[int]:
        """Return the numbers of all ticks to look at."""
        first, last = (int((moment - anchor) // self.interval) for moment in (self.since, self.until))
        return [n for n in range(first, last + 1) if self.judged(anchor + n * self.interval)]


@pytest.fixture(scope="module")
def server(postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server that may be stopped."""
    postgres_server.create_database("downtime")
    url = postgres_server.url("downtime", driver="asyncpg")
    with prefect_server(tmp_path_factory.mktemp("downtime-prefect"), url) as started:
        yield started


@pytest.fixture(scope="module")
def project(server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on that server, without a job yet."""
    return Project(tmp_path_factory.mktemp("downtime"), server, "acceptance-downtime")


@pytest.fixture(scope="module")
def prefect(server: PrefectServer) -> Iterator[Prefect]:
    """The API of that server."""
    with server.client() as client:
        yield Prefect(client)


@pytest.fixture(scope="module")
def site(project: Project, server: PrefectServer) -> Iterator[Site]:
    """A database of its own for the agents, and two of them."""
    with ExitStack() as stack:
        database = stack.enter_context(postgres())
        env = {"PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": database.url()}
        (project.folder / "flows").mkdir()
        deploy(project, 2)
        names = ("node-1", "node-2")
        agents = [stack.enter_context(project.agent(name, "--limit", "4", env=env)) for name in names]
        yield Site(server, database, agents)


def deploy(project: Project, interval: int) -> None:
    """Deploy the jobs of an interval; those of another stay deployed."""
    module = f"flows/every_{interval}.py"
    if not (project.folder / module).exists():
        project.write(module, JOBS.format(interval=interval))
        project.deploy()


def let_pass(until: float) -> None:
    """Wait for a moment."""
    wait_until(lambda: time.time() >= until, max(1.0, until - time.time() + 1), "the time to pass")


def run_of(entries: list[Entry], after: float) -> bool:
    """Return whether a tick has run that was due after a moment."""
    return any(entry["due"] > after for entry in entries)


def has_run(project: Project, job: str, after: float) -> bool:
    """Return whether a job's tick has run that was due after a moment."""
    return run_of(project.entries(job), after)


def go_through(project: Project, site: Site, part: str, seconds: float, interval: int) -> Outage:
    """Have a part of the site fail at once, for so long, and wait until what was due then is settled."""
    deploy(project, interval)
    jobs = [f"wait-{interval}", f"ignore-{interval}"]
    ready = time.time()
    for job in jobs:
        wait_until(partial(has_run, project, job, ready), PATIENCE, f"{job} to run")
    since = max(project.entries(job)[-1]["due"] for job in jobs) - 0.5
    programs = site.programs(part)
    for program in programs:
        program.kill() if part == "agents" else program.stop()
    down = time.time()
    let_pass(down + seconds)
    for program in programs:
        program.start()
    back = time.time()
    settled = back + WAITING_TIME + interval
    for job in jobs:
        wait_until(partial(has_run, project, job, settled), 2 * PATIENCE, f"{job} to go on")
    until = min(project.entries(job)[-1]["due"] for job in jobs) + 0.5 * interval
    return Outage(since, down, back, min(until, time.time()), interval)


def ran(project: Project, job: str, outage: Outage) -> list[Entry]:
    """Return what a job has run of the ticks to look at, in the order of running."""
    return [entry for entry in project.entries(job, "ran") if outage.judged(entry["due"])]


def ticks_in(prefect: Prefect, job: str, outage: Outage, *states: str) -> list[int]:
    """Return the numbers of the ticks to look at whose runs are in one of the states."""
    moments = [due(run).timestamp() for run in prefect.runs(job, *states)]
    return [number(prefect, job, moment) for moment in moments if outage.judged(moment)]


def anchor_of(prefect: Prefect, job: str) -> float:
    """Return the moment of tick 0."""
    (schedule,) = prefect.deployment(job).schedules
    moment: float = schedule.schedule.anchor_date.timestamp()
    return moment


def number(prefect: Prefect, job: str, moment: float) -> int:
    """Return which tick is due at a moment, which must be exactly one."""
    elapsed = moment - anchor_of(prefect, job)
    interval = int(job.rpartition("-")[2])
    nearest = round(elapsed / interval)
    assert abs(elapsed - nearest * interval) < 0.001, f"{job} has no tick at {moment}"
    return nearest


@pytest.mark.parametrize(("seconds", "interval"), [(35, 5)])
@pytest.mark.parametrize("part", ["server", "database", "agents"])
def test_ticks_of_a_downtime_follow_the_waiting_policy(
    project: Project, prefect: Prefect, site: Site, part: str, seconds: float, interval: int
) -> None:
    """Afterwards WAIT runs every missed tick once, in order; IGNORE skips those that are too late."""
    outage = go_through(project, site, part, seconds, interval)
    expected = outage.expected(anchor_of(prefect, f"wait-{interval}"))

    waited = ran(project, f"wait-{interval}", outage)
    numbers = [number(prefect, f"wait-{interval}", entry["due"]) for entry in waited]
    assert numbers == sorted(set(numbers)), "in order, and none twice"
    # The body of a run that was killed in its first moments has entered nothing.
    crashed = ticks_in(prefect, f"wait-{interval}", outage, "Crashed")
    assert len(crashed) <= 1
    assert sorted({*numbers, *crashed}) == expected
    counts = [entry["count"] for entry in waited]
    assert counts[-1] - counts[0] == expected[-1] - expected[0], "counted once each"

    ignoring = f"ignore-{interval}"
    on_time = ran(project, ignoring, outage)
    assert [entry for entry in on_time if entry.at - entry["due"] > WAITING_TIME + SLACK] == []
    skipped = wait_until_settled(prefect, ignoring, outage)
    executed = [number(prefect, ignoring, entry["due"]) for entry in on_time]
    assert len(set(executed)) == len(executed)
    assert set(executed) & set(skipped) == set()
    crashed = ticks_in(prefect, ignoring, outage, "Crashed")
    assert sorted({*executed, *skipped, *crashed}) == outage.expected(anchor_of(prefect, ignoring))
    certain = range_of(outage, anchor_of(prefect, ignoring), part)
    assert certain <= set(skipped)
    assert len(certain) >= 1


def wait_until_settled(prefect: Prefect, job: str, outage: Outage) -> list[int]:
    """Return the ticks that were skipped, once none of those to look at is still to be decided."""
    wait_until(
        lambda: not ticks_in(prefect, job, outage, "Scheduled", "Late", "Pending", "Running"),
        PATIENCE,
        f"{job} to have no tick left",
    )
    skipped = [run for run in prefect.runs(job, "Skipped") if outage.judged(due(run).timestamp())]
    assert all("allows 5 s" in str(state_of(run).message) for run in skipped)
    return [number(prefect, job, due(run).timestamp()) for run in skipped]


def range_of(outage: Outage, anchor: float, part: str) -> set[int]:
    """Return the ticks that nobody could run until they were too late."""
    # An agent goes on until its lease ends, without the database.
    first = outage.down + (4 if part == "database" else 1)
    moments = {n: anchor + n * outage.interval for n in outage.expected(anchor)}
    return {n for n, moment in moments.items() if first < moment < outage.back - WAITING_TIME - 1}
