"""Many jobs on one server: what their number costs under the agent, and under Prefect's process worker."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, LogCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Cancelling, Completed, Pending, Running

from deployments.local import agent, wait_until
from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig, pause_job, resume_job
from taskadapter.declare.jobs import JobId
from taskadapter.deploy import deploy
from taskadapter.prefect_api.client import side_by_side
from tests.api_proxy import ApiProxy
from tests.benchmarks import ledger
from tests.benchmarks.bench import Figures
from tests.benchmarks.crowded import Crowded, Endless
from tests.benchmarks.measure import percentile, ratio
from tests.benchmarks.runners import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient, SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Postgres, PrefectServer, Program
    from taskadapter import Service

DATABASE_VARIABLE = "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL"
DAY = 86400.0
LEASE = 3.0  # seconds
BEAT = 1.0
STANDBY = "crowd"  # the group of all jobs of which each has no group of its own
BEGUN_WITHIN = 60.0
SETTLED_SECONDS = 30.0
WINDOW = 60.0
REACTION_WITHIN = 30.0
STARTED_SECONDS = 30.0
A_FEW = 10  # jobs that are deployed together show what each of many takes


class Planned(NamedTuple):
    """A job to be deployed: when its first tick is due, and the seconds between two."""

    name: str
    first: datetime
    interval: float
    group: str = STANDBY
    service: type[Service] = Crowded


class Begun(NamedTuple):
    """A run by hand that has begun, so many seconds after it was asked for."""

    run: FlowRun
    seconds: float


@dataclass(frozen=True)
class Way:
    """A way to run many jobs, as `Runner` is for one.

    Attributes:
        name: what tables call it.
        kind: the type of its worker.
        deploy: deploys jobs to the pool of the name `kind`, which is made with the first.
    """

    name: str
    kind: str
    deploy: Callable[[SyncPrefectClient, Sequence[Planned]], list[UUID]]


def deploy_declared(_: SyncPrefectClient, jobs: Sequence[Planned]) -> list[UUID]:
    """Deploy attached services as their listeners would."""

    async def deploy_one(job: Planned) -> UUID:
        listener = Listener(
            trigger=TriggerConfiguration(interval=job.interval, start_time=job.first),
            warm_backup_config=WarmBackupConfig(
                group_id=job.group, liveness_check_interval=LEASE, heartbeat_frequency=BEAT
            ),
            work_pool="warm-backup",
        )
        listener.attach(job.service(), job.name)
        return (await deploy(listener))[job.name].id

    return asyncio.run(side_by_side(map(deploy_one, jobs)))


def deploy_plain(client: SyncPrefectClient, jobs: Sequence[Planned]) -> list[UUID]:
    """Deploy a plain flow as often as there are jobs."""
    client.create_work_pool(WorkPoolCreate(name="process", type="process"), overwrite=True)
    flow = client.create_flow_from_name("tick")
    here = {"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT)}}

    def deploy_one(job: Planned) -> UUID:
        every = IntervalSchedule(interval=timedelta(seconds=job.interval), anchor_date=job.first)
        return client.create_deployment(
            flow,
            job.name,
            schedules=[DeploymentScheduleCreate(schedule=every, active=True)],
            work_pool_name="process",
            entrypoint="tests/benchmarks/plain.py:tick",
            pull_steps=[here],
        )

    return list(map(deploy_one, jobs))


AGENT = Way("taskadapter", "warm-backup", deploy_declared)
PROCESS = Way("process", "process", deploy_plain)


class Crowd:
    """A server and a coordination database for many jobs.

    Args:
        server: Prefect's.
        client: a client of it that nobody counts.
        database: where nodes coordinate.
        home: for ledgers.
    """

    def __init__(
        self, server: PrefectServer, client: SyncPrefectClient, database: Postgres, home: Path
    ) -> None:
        self._server = server
        self._client = client
        self._home = home
        self._rounds = 0
        self._seconds_a_job = 0.3
        database.create_database("crowd")
        # Jobs are paused from here: the nodes, and this process, coordinate in one database.
        self._coordination = {DATABASE_VARIABLE: database.url("crowd")}
        os.environ.update(self._coordination)

    def at_once(self, way: Way, jobs: int) -> Figures:
        """Return how jobs begin that are due in the same second, ten at once."""
        due = self._after_deploying(jobs)
        planned = [Planned(f"crowd-{n}", due, DAY) for n in range(jobs)]
        with self._deployed(way, planned), self._node(way, "--limit", "10") as (_, proxy):
            _sleep_until(due)
            sent = len(proxy.requests)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: len(self._lines()) >= jobs, BEGUN_WITHIN, "all to begin")
            late = sorted(line.began - due.timestamp() for line in self._lines())
            time.sleep(2)  # the last ones tell the API of their ends
            requests = len(proxy.requests) - sent
        return {
            "due": jobs,
            "begun": len(late),
            "first": late[0] if late else math.nan,
            "p50": percentile(late, 0.5),
            "last": late[-1] if late else math.nan,
            "rate": ratio(len(late), late[-1]) if late else 0.0,
            "requests": ratio(requests, len(late)),
        }

    def ceiling(self, jobs: int) -> float:
        """Return how many runs a second the server takes from clients that only send their requests."""
        planned = [Planned(f"crowd-{n}", _in(DAY), DAY) for n in range(jobs)]
        with self._deployed(PROCESS, planned) as ids:
            runs = [self._client.create_flow_run_from_deployment(id_) for id_ in ids]

            async def send(client: PrefectClient, run: FlowRun) -> None:
                await client.set_flow_run_state(run.id, Pending())
                await client.update_flow_run(run.id, empirical_policy=run.empirical_policy)
                await client.set_flow_run_state(run.id, Running())
                await client.read_flow_run(run.id)
                await client.create_logs([log(run) for _ in range(4)])
                await client.set_flow_run_state(run.id, Completed())

            def log(run: FlowRun) -> LogCreate:
                now = datetime.now(UTC)
                return LogCreate(
                    name="bench", level=20, message="as a run's", timestamp=now, flow_run_id=run.id
                )

            async def send_all() -> float:
                async with get_client() as client:
                    began = time.monotonic()
                    await side_by_side(send(client, run) for run in runs)
                    return time.monotonic() - began

            return jobs / asyncio.run(send_all())

    def spread(self, way: Way, jobs: int) -> Figures:
        """Return how late jobs begin of which each runs once a minute, evenly spread."""
        start = self._after_deploying(jobs)
        planned = [Planned(f"crowd-{n}", start + timedelta(seconds=60 * n / jobs), 60) for n in range(jobs)]
        with self._deployed(way, planned), self._node(way, "--limit", "10") as (node, _):
            opens = start + timedelta(seconds=SETTLED_SECONDS)
            _sleep_until(opens)
            before = _own_cpu(node)
            _sleep_until(opens + timedelta(seconds=WINDOW))
            cpu = _own_cpu(node) - before
            time.sleep(5)  # the last ticks may be so late
            since, until = opens.timestamp(), opens.timestamp() + WINDOW
            late = [line.began - line.due for line in self._lines() if since <= line.due < until]
        return {"cpu": cpu / WINDOW, **_lateness(late, jobs)}

    def idle(self, way: Way, jobs: int) -> Figures:
        """Return how often two nodes that have nothing to do ask the API a minute."""
        tomorrow = _in(DAY)
        with (
            self._deployed(way, [Planned(f"crowd-{n}", tomorrow, DAY) for n in range(jobs)]),
            self._node(way) as (_, first),
        ):
            time.sleep(5)
            with self._node(way) as (_, second):
                time.sleep(SETTLED_SECONDS)
                before = len(first.requests), len(second.requests)
                time.sleep(2 * WINDOW)
                sent = len(first.requests) - before[0], len(second.requests) - before[1]
        return {"active": sent[0] * 30 / WINDOW, "standby": sent[1] * 30 / WINDOW}

    def reactions(self, jobs: int) -> Figures:
        """Return how many seconds an idle agent takes to do what somebody asks for now."""
        tomorrow = _in(DAY)
        planned = [Planned(f"crowd-{n}", tomorrow, DAY) for n in range(jobs)]
        planned.append(Planned("crowd-endless", tomorrow, DAY, service=Endless))
        with self._deployed(AGENT, planned) as (quick, *_, endless), self._node(AGENT):
            time.sleep(SETTLED_SECONDS)
            by_hand = self._begin(quick).seconds
            cancelled = self._cancel(self._begin(endless).run)
            new, resumed = self._add()
        return {"by hand": by_hand, "cancelled": cancelled, "new": new, "resumed": resumed}

    def _begin(self, job: UUID) -> Begun:
        """Start a run by hand, and return it, and after how many seconds it has begun."""
        asked = time.time()
        run = self._client.create_flow_run_from_deployment(job)
        return Begun(run, self._next_line(asked) - asked)

    def _cancel(self, run: FlowRun) -> float:
        """Return after how many seconds a run is cancelled."""
        asked = time.time()
        self._client.set_flow_run_state(run.id, Cancelling())

        def is_cancelled() -> bool:
            return self._client.read_flow_run(run.id).state_type is StateType.CANCELLED

        wait_until(is_cancelled, REACTION_WITHIN, "the run to be cancelled")
        return time.time() - asked

    def _add(self) -> tuple[float, float]:
        """Return how late a new job's first tick is, and after how many seconds it goes on when resumed."""
        often = Planned("crowd-often", _in(1), 1.0)
        (job,) = AGENT.deploy(self._client, [often])
        due = often.first.timestamp()
        late = self._next_line(due) - due
        pause_job(JobId(job))
        time.sleep(3)
        asked = time.time()
        resume_job(JobId(job))
        resumed = self._next_line(asked) - asked
        self._client.delete_deployment(job)
        return late, resumed

    def takeover(self, jobs: int) -> Figures:
        """Return how late ticks begin that are due after a node is killed, each of a group of its own."""
        start = self._after_deploying(jobs)
        planned = [
            Planned(f"crowd-{n}", start + timedelta(seconds=60 * n / jobs), 60, f"group-{n}")
            for n in range(jobs)
        ]
        with self._deployed(AGENT, planned), self._node(AGENT, "--limit", "10") as (dying, _):
            time.sleep(10)
            with self._node(AGENT, "--limit", "10"):
                _sleep_until(start + timedelta(seconds=SETTLED_SECONDS))
                killed = time.time()
                os.kill(dying.pid, signal.SIGKILL)
                time.sleep(WINDOW + 10)
                until = killed + WINDOW
                late = [line.began - line.due for line in self._lines() if killed <= line.due < until]
        return _lateness(late, jobs)

    # --- jobs and nodes ---------------------------------------------------------------------------

    def _after_deploying(self, jobs: int) -> datetime:
        """Return a moment at which so many jobs are deployed, and an agent has started."""
        return _in(STARTED_SECONDS + self._seconds_a_job * jobs)

    @contextlib.contextmanager
    def _deployed(self, way: Way, jobs: Sequence[Planned]) -> Iterator[list[UUID]]:
        self._rounds += 1
        began = time.monotonic()
        ids = way.deploy(self._client, jobs)
        if len(jobs) >= A_FEW:
            # A slow machine takes longer, and a window that closes before the agent is there shows nothing.
            self._seconds_a_job = max(self._seconds_a_job, 1.2 * (time.monotonic() - began) / len(jobs))
        try:
            yield ids
        finally:
            for id_ in ids:
                self._client.delete_deployment(id_)
            self._client.delete_work_pool(way.kind)

    @contextlib.contextmanager
    def _node(self, way: Way, *options: str) -> Iterator[tuple[Program, ApiProxy]]:
        with ApiProxy(self._server.port).running() as proxy:
            ours = {
                "PREFECT_API_URL": proxy.api_url,
                **self._coordination,
                ledger.VARIABLE: str(self._ledger),
            }
            name = f"crowd-{self._rounds}-{proxy.port}"
            env = {**self._server.env, **ours}
            with agent(name, way.kind, env, PROJECT, *options, kind=way.kind) as node:
                yield node, proxy

    @property
    def _ledger(self) -> Path:
        return self._home / f"crowd-{self._rounds}.ledger"

    def _lines(self) -> list[ledger.Line]:
        return ledger.read(self._ledger)

    def _next_line(self, since: float) -> float:
        """Return when the first body began after some moment."""

        def begun() -> list[float]:
            return [line.began for line in self._lines() if line.began >= since]

        wait_until(begun, REACTION_WITHIN, "a body to begin")
        return min(begun())


def _lateness(late: Sequence[float], jobs: int) -> Figures:
    return {
        "due": jobs,
        "begun": len(late),
        "p50": percentile(late, 0.5),
        "p99": percentile(late, 0.99),
        "max": max(late, default=math.nan),
    }


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _sleep_until(moment: datetime) -> None:
    time.sleep(max(0.0, (moment - datetime.now(UTC)).total_seconds()))


def _own_cpu(node: Program) -> float:
    """Return the CPU seconds of a node's process alone, its runs' aside."""
    times = psutil.Process(node.pid).cpu_times()
    return times.user + times.system
