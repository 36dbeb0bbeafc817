"""What a job has executed, as its ledger has it, beside what it was to execute."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING

from taskadapter.agent.plans import begin, plan_of
from taskadapter.agent.switches import is_paused, reading_of, why_over
from taskadapter.coordination import ledger, progress
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.executions import Entered, moment
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from uuid import UUID

    from prefect.client.schemas.responses import DeploymentResponse
    from sqlalchemy import Engine

    from taskadapter.agent.plans import Plan
    from taskadapter.coordination.executions import Past

RUNNING = "running"
"""The outcome of an execution that has none yet."""

MISSING = "missing"
"""The outcome of a tick that is not in the ledger, although later ones are: a job's begin in order."""

WAITING = "waiting"
"""The outcome of a tick that is due and later than all in the ledger, however long it has been waiting."""


@dataclass(frozen=True)
class Line:
    """One execution, or a tick of which there is none.

    Attributes:
        due: the tick's time, in UTC; None for a run that somebody asked for.
        number: which execution of its trigger it was.
        outcome: what it came to, "running", "waiting", or "missing".
        reason: why it was skipped.
        late: seconds after its time that it began; of one that waits, until now.
        took: seconds that it took.
        node: where.
        group: the job's group.
        term: of the node's token.
        flow_run: its id.
    """

    due: str | None
    outcome: str
    number: int | None = None
    reason: str | None = None
    late: float | None = None
    took: float | None = None
    node: str = ""
    group: str | None = None
    term: int | None = None
    flow_run: str = ""


def history(engine: Engine, deployment: DeploymentResponse, last: int) -> list[Line]:
    """Return the last executions of a job, the newest first, what is missing between them and what waits.

    Args:
        engine: of the coordination database.
        deployment: the job.
        last: how many executions, and how many ticks that wait for theirs, the oldest of them.

    Raises:
        CoordinationError: the database cannot be read.
    """
    with transaction(engine) as connection:
        past = ledger.history(connection, str(deployment.id), last)
        opened = progress.opened(connection, [str(deployment.id)]).get(str(deployment.id))
    lines = list(map(_line, past))
    dues = {one.entry.due for one in past if one.entry.due is not None}
    if not deployment.paused and (plan := plan_of(deployment)) is not None:
        entered = Entered(opened=None if opened is None else datetime.fromisoformat(opened))
        since, _ = begin(plan, entered, None)
        if dues:
            since = max(since, datetime.fromisoformat(min(dues)))
        lines += not_begun(plan, dues, since, datetime.now(UTC), last)
    return sorted(lines, key=lambda line: line.due or "", reverse=True)


def executed(engine: Engine, job_id: UUID, last: int) -> list[Line]:
    """Return the last executions of a job, the newest first: what is known of it without its deployment.

    Args:
        engine: of the coordination database.
        job_id: the job.
        last: how many.

    Raises:
        CoordinationError: the database cannot be read.
    """
    with transaction(engine) as connection:
        return list(map(_line, ledger.history(connection, str(job_id), last)))


def not_shown(
    deployment: DeploymentResponse, lines: list[Line], last: int, now: datetime | None = None
) -> tuple[int, str] | None:
    """Return how many more ticks wait than a history shows, and when the newest was due; None if none do.

    Args:
        deployment: the job.
        lines: its history, the newest tick first.
        last: how many ticks that wait it has at most.
        now: until when they are due; None for now.
    """
    waiting = [line.due for line in lines if line.outcome == WAITING and line.due is not None]
    plan = plan_of(deployment)
    if plan is None or len(waiting) < last:
        return None
    interval = timedelta(seconds=plan.interval)
    until = plan.until(now or datetime.now(UTC))
    more = (until - datetime.fromisoformat(waiting[0])) // interval
    newest = datetime.fromisoformat(waiting[0]) + more * interval
    return (more, moment(newest)) if more > 0 else None


def standing(engine: Engine, deployment: DeploymentResponse) -> str | None:
    """Say of a job that it is over, or paused; None if it goes on.

    Raises:
        CoordinationError: the database cannot be read.
    """
    job_id, slug = str(deployment.id), reading_of(deployment).trigger_slug
    with transaction(engine) as connection:
        row = progress.read(connection, {job_id: slug}).get(job_id)
    if (why := why_over(deployment, row)) is not None:
        return f"over: {why}"
    return "paused" if is_paused(deployment, row) else None


def _line(past: Past) -> Line:
    entry = past.entry
    return Line(
        due=entry.due,
        number=entry.number,
        outcome=entry.outcome or RUNNING,
        reason=past.reason,
        # Negative of what was given up before its time.
        late=None if past.late is None else max(0.0, past.late),
        took=past.took,
        node=entry.task_id,
        group=entry.group_id,
        term=entry.term,
        flow_run=entry.flow_run_id,
    )


def not_begun(
    plan: Plan, dues: Collection[str], since: datetime, now: datetime, last: int
) -> Iterator[Line]:
    """Yield the ticks of a job that are due and not in its ledger.

    Args:
        plan: the job's.
        dues: the moments of those that are; none of a job that has never run.
        since: the moment after which the ledger has all.
        now: until when they are due.
        last: how many of those that wait, the oldest first.
    """
    now = plan.until(now)
    latest = max(map(datetime.fromisoformat, dues), default=since)
    for tick in ticks.between(plan.anchor, plan.interval, after=since, until=min(latest, now)):
        if moment(tick) not in dues:
            yield Line(moment(tick), MISSING)
    waiting = ticks.between(plan.anchor, plan.interval, after=max(since, latest), until=now)
    for tick in islice(waiting, last):
        yield Line(moment(tick), WAITING, late=(now - tick).total_seconds())
