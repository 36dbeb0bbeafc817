"""One runner at a time against one server, watched from the outside."""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import math
import re
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Scheduled

from deployments.local import Program, agent, wait_until
from tests.api_proxy import ApiProxy, Request
from tests.benchmarks import ledger
from tests.benchmarks.measure import cpu_seconds, holdings, percentile, proportional_memory, ratio
from tests.benchmarks.runners import INTERVAL, PROJECT, Runner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

    from deployments.local import PrefectServer
    from tests.benchmarks.ledger import Line

FIRST_RUN_WITHIN = 60.0
DRAIN_WITHIN = 40.0
EVERY = 100
Figures = dict[str, float]


class Job(NamedTuple):
    """The deployed job: its id, a moment at which it is due, the file where its runs leave lines."""

    deployment: UUID
    anchor: float
    ledger: Path

    def between_ticks(self, moment: float) -> float:
        """Return the first moment from then on that is half-way between two ticks."""
        middle = self.anchor + INTERVAL / 2
        return middle + math.ceil((moment - middle) / INTERVAL) * INTERVAL


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
        with self._job(runner) as job, self._started(runner, job) as (node, proxy):
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: ledger.read(job.ledger), FIRST_RUN_WITHIN, "a first run")
            start = job.between_ticks(time.time() + 2 * INTERVAL)
            end = job.between_ticks(start + seconds)
            used = self._watch(node, start, end)
            time.sleep(INTERVAL)  # the last ticks may be as late as this
            lines = ledger.read(job.ledger)
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
        with self._job(runner) as job:
            late = self._miss(job, ticks)

            def drained() -> list[float]:
                return sorted(line.began for line in ledger.read(job.ledger) if line.due in late)

            with self._started(runner, job) as (_, proxy):
                wait_until(lambda: _polls(proxy), FIRST_RUN_WITHIN, "the first poll")
                with contextlib.suppress(TimeoutError):
                    wait_until(lambda: len(drained()) >= ticks, DRAIN_WITHIN, "all to be drained")
                began = drained()
        return {
            "first": began[0] - _polls(proxy)[0] if began else math.nan,
            "rate": ratio(len(began) - 1, began[-1] - began[0]) if began else 0.0,
            "started": len(began),
        }

    def endurance(self, runner: Runner, runs: int) -> list[Figures]:
        """Return what a node and its nursery hold after each hundred of so many runs in a row."""
        samples: list[Figures] = []
        with self._job(runner) as job, self._started(runner, job) as (node, _):
            for done in range(EVERY, runs + 1, EVERY):
                self._miss(job, EVERY)
                within = DRAIN_WITHIN + EVERY
                wait_until(partial(_has, job, done), within, f"{done} runs")
                samples.append({"runs": done, **holdings(node.pid)})
        return samples

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
    def _job(self, runner: Runner) -> Iterator[Job]:
        """Deploy the job as the runner likes it, and remove it with its work pool."""
        self._jobs += 1
        deployment = runner.deploy(self._client)
        every = self._client.read_deployment(deployment).schedules[0].schedule
        assert isinstance(every, IntervalSchedule)
        anchor = every.anchor_date.timestamp()
        try:
            yield Job(deployment, anchor, self._home / f"{self._jobs}.ledger")
        finally:
            self._client.delete_deployment(deployment)
            self._client.delete_work_pool(runner.pool)

    @contextlib.contextmanager
    def _started(self, runner: Runner, job: Job) -> Iterator[tuple[Program, ApiProxy]]:
        """Start a runner, with the counting proxy as its server."""
        with ApiProxy(self._server.port).running() as proxy:
            ours = {"PREFECT_API_URL": proxy.api_url, ledger.VARIABLE: str(job.ledger)}
            env = {**self._server.env, **ours, **runner.env}
            name = f"node-{self._jobs}"
            with agent(name, runner.pool, env, PROJECT, *runner.options, kind=runner.kind) as node:
                yield node, proxy

    def _miss(self, job: Job, ticks: int) -> set[float]:
        """Create runs that were due before now, one interval apart; return when they were."""
        now = round(time.time())
        late = [now - n * INTERVAL for n in range(ticks, 0, -1)]
        for due in late:
            state: State[None] = Scheduled(scheduled_time=dt.datetime.fromtimestamp(due, dt.UTC))
            self._client.create_flow_run_from_deployment(job.deployment, state=state)
        return set(late)


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


def _polls(proxy: ApiProxy) -> list[float]:
    """Return when the runner asked for runs."""
    return [r.at for r in proxy.requests if r.path.endswith("/get_scheduled_flow_runs")]


def _has(job: Job, runs: int) -> bool:
    """Return whether so many runs have begun."""
    return len(ledger.read(job.ledger)) >= runs


def _kind(request: Request) -> str:
    """Return what a request was for, without the names and ids in its path."""
    path = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|(?<=/)(bench|taskadapter|node-\d+)\b", "*", request.path)
    return f"{request.method} {path}"
