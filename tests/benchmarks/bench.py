"""One runner at a time against one server, watched from the outside."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Scheduled

from deployments.local import HOST, Program, agent, wait_until
from tests.benchmarks.measure import (
    cpu_seconds,
    percentile,
    proportional_memory,
    ratio,
    read_ledger,
)
from tests.benchmarks.proxy import CountingProxy, Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

    from deployments.local import PrefectServer
    from tests.benchmarks.measure import Line

HERE = Path(__file__).parent
INTERVAL = 2.0  # seconds between two ticks of the job
FIRST_RUN_WITHIN = 60.0
DRAIN_WITHIN = 60.0
Figures = dict[str, float]


@dataclass(frozen=True)
class Runner:
    """A way to run the job: `prefect worker start --type KIND OPTIONS`."""

    name: str
    kind: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """The deployed job: where it is run from, and where its runs leave their lines."""

    pool: str
    deployment: UUID
    ledger: Path


class Bench:
    """A server, a client of it that nobody counts, and a directory for ledgers and logs."""

    def __init__(self, server: PrefectServer, client: SyncPrefectClient, home: Path) -> None:
        self._server = server
        self._client = client
        self._home = home
        self._jobs = 0
        self.requests: collections.Counter[str] = collections.Counter()

    def steady(self, runner: Runner, seconds: float) -> Figures:
        """Return what a runner did and used in about `seconds` of its steady state.

        The window opens two ticks after the first run began, or `FIRST_RUN_WITHIN` after the start
        of a runner that begins none. It opens and closes half-way between two ticks.
        """
        with (
            self._job(runner.kind, scheduled=True) as job,
            self._started(runner, job) as (node, proxy),
        ):
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: read_ledger(job.ledger), FIRST_RUN_WITHIN, "a first run")
            start = _between_ticks(time.time() + 2 * INTERVAL)
            end = _between_ticks(start + seconds)
            used = self._watch(node, start, end)
            time.sleep(INTERVAL)  # the last ticks may be as late as this
            lines = read_ledger(job.ledger)
        began = sum(start <= line.began < end for line in lines)
        self.requests = collections.Counter(
            _kind(request) for request in proxy.requests if start <= request.at < end
        )
        return {
            **punctuality(lines, start, end),
            **used,
            "cpu_per_run": ratio(used["cpu"], began),
            "requests_per_run": ratio(self.requests.total(), began),
        }

    def backlog(self, runner: Runner, ticks: int) -> Figures:
        """Return how a runner gets through `ticks` that became due while it was away.

        The first poll after its start sees them all; the clock starts with that request.
        """
        with self._job(runner.kind, scheduled=False) as job:
            self._miss(job, ticks)
            with self._started(runner, job) as (_, proxy):
                seen = wait_until(lambda: _first_poll(proxy), FIRST_RUN_WITHIN, "the first poll")
                with contextlib.suppress(TimeoutError):
                    wait_until(
                        lambda: len(read_ledger(job.ledger)) >= ticks, DRAIN_WITHIN, "all runs"
                    )
                began = sorted(line.began for line in read_ledger(job.ledger))
        return {
            "first": began[0] - seen if began else math.nan,
            "rate": ratio(len(began) - 1, began[-1] - began[0]) if began else 0.0,
            "started": len(began),
        }

    def _watch(self, node: Program, start: float, end: float) -> Figures:
        """Return the CPU time and the largest memory of a runner between two moments."""
        time.sleep(max(0.0, start - time.time()))
        before = cpu_seconds(node.pid)
        memory = 0.0
        while (left := end - time.time()) > 0:
            memory = max(memory, proportional_memory(node.pid))
            time.sleep(min(1.0, left))
        return {"cpu": cpu_seconds(node.pid) - before, "memory": memory}

    @contextlib.contextmanager
    def _job(self, kind: str, *, scheduled: bool) -> Iterator[Job]:
        """Deploy the job to a work pool of its own, and remove both."""
        self._jobs += 1
        pool = f"bench-{self._jobs}"
        ledger = self._home / f"{pool}.ledger"
        self._client.create_work_pool(WorkPoolCreate(name=pool, type=kind))
        every = IntervalSchedule(
            interval=dt.timedelta(seconds=INTERVAL),
            anchor_date=dt.datetime.fromtimestamp(0, dt.UTC),
        )
        directory = {"prefect.deployments.steps.set_working_directory": {"directory": str(HERE)}}
        deployment = self._client.create_deployment(
            self._client.create_flow_from_name("tick"),
            pool,
            schedules=[DeploymentScheduleCreate(schedule=every, active=scheduled)],
            parameters={"ledger": str(ledger)},
            work_pool_name=pool,
            entrypoint="flows.py:tick",
            pull_steps=[directory],
        )
        try:
            yield Job(pool, deployment, ledger)
        finally:
            self._client.delete_deployment(deployment)
            self._client.delete_work_pool(pool)

    @contextlib.contextmanager
    def _started(self, runner: Runner, job: Job) -> Iterator[tuple[Program, CountingProxy]]:
        """Start a runner on the job's pool, with the counting proxy as its server."""
        with CountingProxy(self._server.port).running() as proxy:
            env = {**self._server.env, "PREFECT_API_URL": f"http://{HOST}:{proxy.port}/api"}
            name = f"{job.pool}-node"
            with agent(name, job.pool, env, HERE, *runner.options, kind=runner.kind) as node:
                yield node, proxy

    def _miss(self, job: Job, ticks: int) -> None:
        """Create runs that were due at the last `ticks` moments of the schedule."""
        now = time.time()
        for n in range(ticks, 0, -1):
            due = dt.datetime.fromtimestamp(now - n * INTERVAL, dt.UTC)
            self._client.create_flow_run_from_deployment(
                job.deployment, state=Scheduled(scheduled_time=due)
            )


def punctuality(lines: Sequence[Line], start: float, end: float) -> Figures:
    """Return the figures that the ledger gives for a window.

    A tick due in the window counts as run when its body began before the end or at most one
    interval after it. Lateness is that of all bodies that began in the window, whenever they
    were due; a negative one would be a run that began early.
    """
    late = [line.began - line.due for line in lines if start <= line.began < end]
    run = {line.due for line in lines if start <= line.due < end and line.began < end + INTERVAL}
    return {
        "due": round((end - start) / INTERVAL),
        "run": len(run),
        "bodies": len(late),
        "earliest": min(late, default=math.nan),
        "p50": percentile(late, 0.50),
        "p99": percentile(late, 0.99),
        "max": max(late, default=math.nan),
    }


def _between_ticks(moment: float) -> float:
    """Return the first moment from then on that is half-way between two ticks."""
    return math.ceil(moment / INTERVAL - 0.5) * INTERVAL + INTERVAL / 2


def _first_poll(proxy: CountingProxy) -> float | None:
    polls = (r.at for r in proxy.requests if r.path.endswith("/get_scheduled_flow_runs"))
    return next(polls, None)


def _kind(request: Request) -> str:
    """Return what a request was for, without the names and ids in its path."""
    path = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|bench-\d+(-node)?", "*", request.path)
    return f"{request.method} {path}"
