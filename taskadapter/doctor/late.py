"""Which of a pool's jobs are behind, and what they wait for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from taskadapter.agent.plans import plan_of
from taskadapter.agent.switches import why_over
from taskadapter.audit import RUNNING, WAITING, history
from taskadapter.doctor.findings import Finding, warning
from taskadapter.prefect_api.pool import Queues
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect.client.schemas.responses import DeploymentResponse
    from sqlalchemy import Engine

    from taskadapter.audit import Line
    from taskadapter.coordination.progress import JobRow
    from taskadapter.doctor.server import Seen

LATE_SECONDS = 30.0
"""A tick that waits for longer is worth a word: a takeover, with the default lease, takes about as long."""

MOST = 100
"""How many ticks that wait are counted."""


def look_at_late(
    engine: Engine, seen: Seen, rows: Mapping[str, JobRow], lasts: Mapping[str, datetime]
) -> Iterator[Finding]:
    """Say which jobs go on and have a tick that has been waiting for long.

    Args:
        engine: of the coordination database.
        seen: the pool and its jobs.
        rows: what the database has of the jobs, by their ids.
        lasts: the last tick of each that is entered, by their ids.

    Raises:
        CoordinationError: the database cannot be read.
    """
    closed = Queues.of(seen.pool, seen.queues).paused
    for job in seen.jobs:
        is_off = job.paused or job.work_queue_name in closed
        if not is_off and why_over(job, rows.get(str(job.id))) is None and _may_be_late(job, lasts):
            yield from of_lines(job, history(engine, job, MOST))


def _may_be_late(job: DeploymentResponse, lasts: Mapping[str, datetime]) -> bool:
    """Return whether a tick after the last one that is entered has been due for long."""
    plan, last = plan_of(job), lasts.get(str(job.id))
    if plan is None or last is None:
        return False
    until = datetime.now(UTC) - timedelta(seconds=LATE_SECONDS)
    return next(ticks.between(plan.anchor, plan.interval, after=last, until=until), None) is not None


def of_lines(job: DeploymentResponse, lines: list[Line]) -> Iterator[Finding]:
    """Say what a job waits for, by its ledger, the newest tick first."""
    waiting = [line for line in lines if line.outcome == WAITING]
    longest = max((line.late or 0.0 for line in waiting), default=0.0)
    if longest < LATE_SECONDS:
        return
    begins = f"job {job.name!r}: no tick has begun for {longest:.0f} s, and {len(waiting)} wait"
    running = next((line for line in lines if line.outcome == RUNNING and line.due is not None), None)
    if running is not None:
        yield warning(
            f"{begins}; the run of {running.due} goes on, on {running.node}: if it hangs, `prefect "
            f"flow-run cancel {running.flow_run}`, and give the service timeout_seconds="
        )
    else:
        yield warning(f"{begins}; see the other findings, and the log of the active node")
