"""What a job has executed, as its ledger has it, beside what it was to execute."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from taskadapter.agent.timetable import plan_of
from taskadapter.coordination import ledger, progress
from taskadapter.coordination.dialects import transaction
from taskadapter.coordination.executions import moment
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect.client.schemas.responses import DeploymentResponse
    from sqlalchemy import Engine

    from taskadapter.coordination.executions import Past

MISSING = "missing"
"""The outcome of a tick that was due and is not in the ledger."""

GRACE = timedelta(seconds=2)
"""A tick that was due so shortly before is on its way."""


@dataclass(frozen=True)
class Line:
    """One execution, or a tick that is missing.

    Attributes:
        due: the tick's time, in UTC; None for a run that somebody asked for.
        number: which execution of its trigger it was.
        outcome: what it came to, "running", or "missing".
        reason: why it was skipped.
        late: seconds after its time that it began.
        took: seconds that it took.
        node: where.
        group: the job's group.
        term: of the node's token.
        flow_run: its id.
    """

    due: str | None
    number: int | None = None
    outcome: str = MISSING
    reason: str | None = None
    late: float | None = None
    took: float | None = None
    node: str = ""
    group: str | None = None
    term: int | None = None
    flow_run: str = ""


def history(engine: Engine, deployment: DeploymentResponse, last: int) -> list[Line]:
    """Return the last executions of a job, the newest first, and between them what is missing.

    Args:
        engine: of the coordination database.
        deployment: the job.
        last: how many executions.

    Raises:
        CoordinationError: the database cannot be read.
    """
    with transaction(engine) as connection:
        past = ledger.history(connection, str(deployment.id), last)
        opened = progress.opened(connection, [str(deployment.id)]).get(str(deployment.id))
    lines = [*map(_line, past), *_missing(deployment, past, opened)]
    return sorted(lines, key=lambda line: line.due or "", reverse=True)


def _line(past: Past) -> Line:
    entry = past.entry
    return Line(
        due=entry.due,
        number=entry.number,
        outcome=entry.outcome or "running",
        reason=past.reason,
        late=past.late,
        took=past.took,
        node=entry.task_id,
        group=entry.group_id,
        term=entry.term,
        flow_run=entry.flow_run_id,
    )


def _missing(deployment: DeploymentResponse, past: Sequence[Past], opened: str | None) -> list[Line]:
    """Return the ticks of the job's present schedule that are not among its executions, but should be."""
    dues = {one.entry.due for one in past if one.entry.due is not None}
    plan = plan_of(deployment)
    if plan is None or not dues or deployment.paused:
        return []
    first = max(datetime.fromisoformat(max(min(dues), opened or "")), plan.created)
    owed = ticks.between(plan.anchor, plan.interval, after=first, until=datetime.now(UTC) - GRACE)
    return [Line(moment(tick)) for tick in owed if moment(tick) not in dues]
