"""Which of a pool's jobs fail each time, are behind, or always late, and why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

from taskadapter.agent.plans import plan_of
from taskadapter.agent.switches import is_paused, why_over
from taskadapter.audit import MISSING, RUNNING, WAITING, history
from taskadapter.coordination import ledger
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.executions import ABANDONED, SKIPPED
from taskadapter.declare.triggers import TaskPolicy
from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.prefect_api.pool import PoolSize, Queues
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse
    from sqlalchemy import Connection, Engine

    from taskadapter.audit import Line
    from taskadapter.coordination.executions import Past
    from taskadapter.coordination.progress import JobRow
    from taskadapter.doctor.server import Seen

LATE_SECONDS = 30.0
"""A tick that waits for longer is worth a word: a takeover, with the default lease, takes about as long."""

LEAST_SECONDS = 2.0
"""A tick that begins this much after its time is not late, however short the pool's waiting time is."""

LAST = 3
"""How many ticks in a row must have begun late, or failed: one alone may have met a takeover."""

LOOKED_AT = 20
"""How many executions of each job are looked at for that: of some the tick is skipped, and some go on."""

CATCH_UP = 5
"""So many ticks in a row that began less late, each, are no chance."""

NOT_ENDED = {RUNNING, WAITING, MISSING, SKIPPED}
"""The outcomes of ticks whose body has not begun, or goes on."""

MOST = 100
"""How many ticks that wait are counted."""


def look_at_late(
    engine: Engine, seen: Seen, rows: Mapping[str, JobRow], lasts: Mapping[str, datetime]
) -> Iterator[Finding]:
    """Say which jobs go on and fail each time, have a tick that has been waiting for long, or are late.

    Args:
        engine: of the coordination database.
        seen: the pool and its jobs.
        rows: what the database has of the jobs, by their ids.
        lasts: the last tick of each that is entered, by their ids.

    Raises:
        CoordinationError: the database cannot be read.
    """
    closed, bound = Queues.of(seen.pool, seen.queues).paused, bound_of(seen.pool)
    going_on = [
        job
        for job in seen.jobs
        if not is_paused(job, rows.get(str(job.id)))
        and job.work_queue_name not in closed
        and str(job.id) in lasts
        and why_over(job, rows.get(str(job.id))) is None
    ]
    with transaction(engine) as connection:
        settled = [_settled(connection, job) for job in going_on]
    for job, past in zip(going_on, settled, strict=True):
        if len(failed := list(takewhile(_has_failed, past))) >= LAST:
            yield _fails(job, failed)
        elif _begin_late([one.late or 0.0 for one in past], bound) or _may_be_late(job, lasts):
            yield from of_lines(job, history(engine, job, MOST), bound)


def bound_of(pool: WorkPool) -> float:
    """Return from how many seconds on a tick of a pool is late."""
    return max(PoolSize.of(pool).waiting_time, LEAST_SECONDS)


def _settled(connection: Connection, job: DeploymentResponse) -> list[Past]:
    """Return the last ticks of a job whose body has ended, the newest first."""
    past = ledger.history(connection, str(job.id), LOOKED_AT)
    open_ones = (None, SKIPPED, ABANDONED)
    return [one for one in past if one.entry.due is not None and one.entry.outcome not in open_ones]


def _has_failed(past: Past) -> bool:
    return past.entry.outcome in {"Failed", "Crashed"}


def _fails(job: DeploymentResponse, failed: list[Past]) -> Finding:
    """Say that the last ticks of a job, the newest first, have all failed."""
    outcomes = " or ".join(sorted({one.entry.outcome or "" for one in failed}))
    last, reason = failed[0].entry, failed[0].reason
    return error(
        f"job {job.name!r} fails each time: its last {len(failed)} ticks are {outcomes}, the last one on "
        f"{last.task_id}{f' ({reason})' if reason else ''}; see its log, `prefect flow-run logs "
        f"{last.flow_run_id}`, mend the job, and deploy it again"
    )


def _begin_late(lates: Sequence[float], bound: float) -> bool:
    """Return whether the last ticks, the newest first, each began so many seconds after their time."""
    return len(lates) >= LAST and min(lates[:LAST]) >= bound


def _catch_up(lates: Sequence[float]) -> bool:
    """Return whether the last ticks, the newest first, each began less late than the one before it."""
    return len(lates) == CATCH_UP and all(newer < older for newer, older in pairwise(lates))


def _may_be_late(job: DeploymentResponse, lasts: Mapping[str, datetime]) -> bool:
    """Return whether a tick after the last one that is entered has been due for long."""
    plan, last = plan_of(job), lasts.get(str(job.id))
    if plan is None or last is None:
        return False
    until = datetime.now(UTC) - timedelta(seconds=LATE_SECONDS)
    return next(ticks.between(plan.anchor, plan.interval, after=last, until=until), None) is not None


def of_lines(job: DeploymentResponse, lines: list[Line], bound: float) -> Iterator[Finding]:
    """Say what a job waits for, or why it is late, by its ledger, the newest tick first.

    Args:
        job: the job.
        lines: its executions, and the ticks that wait.
        bound: from how many seconds on a tick is late.
    """
    waiting = [line for line in lines if line.outcome == WAITING]
    longest = max((line.late or 0.0 for line in waiting), default=0.0)
    wait = "1 tick waits" if len(waiting) == 1 else f"{len(waiting)} ticks wait"
    begins = f"job {job.name!r}: {wait}, the oldest for {longest:.0f} s"
    running = next((line for line in lines if line.outcome == RUNNING and line.due is not None), None)
    ended = [line for line in lines if line.due is not None and line.outcome not in NOT_ENDED]
    lates, ended = [line.late or 0.0 for line in ended[:CATCH_UP]], ended[:LAST]
    is_behind = longest >= LATE_SECONDS
    if is_behind and running is not None and _goes_on_for(running) >= LATE_SECONDS:
        yield warning(
            f"{begins}; the run of {running.due} goes on, on {running.node}: if it hangs, `prefect "
            f"flow-run cancel {running.flow_run}`, and give the service timeout_seconds="
        )
    elif _begin_late(lates, bound):
        behind = f", and {wait}" if waiting else ""
        if _catch_up(lates):
            yield ok(
                f"job {job.name!r} makes up for what it has missed: its last {CATCH_UP} ticks began "
                f"{max(lates):.0f} s and then {min(lates):.0f} s after their time{behind}"
            )
            return
        yield warning(
            f"job {job.name!r} is late each time: its last {LAST} ticks began up to "
            f"{max(lates[:LAST]):.0f} s after their time{behind}; "
            f"{_why_late(job, ended)}"
        )
    elif is_behind and running is not None:
        yield warning(f"{begins}; the run of {running.due} goes on, on {running.node}")
    elif is_behind:
        yield warning(
            f"{begins}; the log of the group's active node says why, such as runs of other jobs that take "
            "all places, unless there is no such node"
        )


def _goes_on_for(line: Line) -> float:
    """Return for how many seconds a run has been going on."""
    began = datetime.fromisoformat(line.due or "") + timedelta(seconds=line.late or 0.0)
    return (datetime.now(UTC) - began).total_seconds()


def _why_late(job: DeploymentResponse, ended: list[Line]) -> str:
    """Say why a job is late each time, as far as its own ledger tells, and what to do."""
    plan, nodes = plan_of(job), sorted({line.node for line in ended})
    places = None if plan is None else (plan.trigger.task_policy or TaskPolicy()).max_concurrent
    took = min(line.took or 0.0 for line in ended)
    if plan is not None and places is not None and took >= places * plan.interval:
        return (
            f"a run takes {took:.1f} s, every {plan.interval:g} s one is due, and max_concurrent={places} "
            "may overlap: declare a longer interval, or a higher max_concurrent, or make the body faster"
        )
    return (
        f"more is due on {', '.join(nodes)} than its processes can do, or Prefect's API is slow: raise the "
        "agent's `--limit`, or worker_count with `configure_worker_pool`; see the server's load"
    )
