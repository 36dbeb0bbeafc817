"""What is durable of a job: how often it ran, its state, whether it is paused or over.

Every function works inside the caller's transaction and takes effect when that commits; keep it
short, because on PostgreSQL and MySQL it locks the job's row, and on SQLite the whole file::

    with transaction(engine) as connection:
        job = lock(connection, job_id, "every-2s")
        count(connection, job)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, select, update

from taskadapter.coordination.dialects import database_now, ensure_rows, seconds_since, upsert
from taskadapter.coordination.executions import SWITCHED_OFF, Switches
from taskadapter.coordination.schema import job_progress
from taskadapter.coordination.tokens import require_token
from taskadapter.errors import DatabaseUnavailableError, TaskError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sqlalchemy import Connection, Row

__all__ = [
    "JobRow",
    "count",
    "end",
    "load_state",
    "lock",
    "pause",
    "prune",
    "read",
    "require_token",
    "restart",
    "resumed",
    "save_state",
    "see",
    "seen",
    "uncount",
]


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job's row, as it is for one trigger.

    Attributes:
        job_id: the job.
        trigger_slug: names the trigger.
        count: how many executions of it there have been.
        written: the count as it stands in the row, perhaps of another trigger.
        paused: whether the job is paused.
        ended: why it is over, with this trigger.
    """

    job_id: str
    trigger_slug: str
    count: int
    written: int
    paused: bool
    ended: str | None


def lock(connection: Connection, job_id: str, trigger_slug: str) -> JobRow:
    """Return a job's row, made on first use, which nobody else changes before the transaction ends.

    A trigger other than that of the row has neither been counted nor ended.
    """
    return _as_of(_locked_job(connection, job_id, trigger_slug), trigger_slug)


def read(connection: Connection, slugs: Mapping[str, str]) -> dict[str, JobRow]:
    """Return the rows of those of some jobs that have one; `slugs` names each job's trigger."""
    rows = connection.execute(_rows().where(job_progress.c.job_id.in_(slugs)))
    return {row.job_id: _as_of(row, slugs[row.job_id]) for row in rows}


def _as_of(row: Row[Any], trigger_slug: str) -> JobRow:
    same = row.trigger_slug == trigger_slug
    return JobRow(
        job_id=row.job_id,
        trigger_slug=trigger_slug,
        count=row.run_count if same else 0,
        written=row.run_count,
        paused=bool(row.paused),
        ended=row.ended if row.ended_trigger in {None, trigger_slug} else None,
    )


def count(connection: Connection, job: JobRow) -> None:
    """Count one execution of a job that is locked."""
    columns = job_progress.c
    written = connection.execute(
        update(job_progress)
        .where(columns.job_id == job.job_id, columns.run_count == job.written)
        .values(
            trigger_slug=job.trigger_slug,
            run_count=job.count + 1,
            updated=database_now(),
        )
    )
    if written.rowcount != 1:
        raise DatabaseUnavailableError(
            f"job {job.job_id} was counted by another process at the same moment; try again"
        )


def uncount(connection: Connection, job: JobRow) -> None:
    """Count one execution less of a job that is locked."""
    _write(connection, job.job_id, {"run_count": job.count - 1})


def pause(connection: Connection, job_id: str, *, paused: bool) -> None:
    """Let no tick of a job begin, or let them again."""
    _write(connection, job_id, {"paused": int(paused)})


def resumed(connection: Connection, job_ids: Collection[str]) -> set[str]:
    """Return those of some jobs that were paused and are not any more."""
    columns = job_progress.c
    query = select(columns.job_id).where(columns.job_id.in_(job_ids), columns.paused == 0)
    return {job_id for (job_id,) in connection.execute(query)}


def end(connection: Connection, job_id: str, reason: str | None, trigger_slug: str | None = None) -> None:
    """End a job, or let it go on, with None for a reason.

    Args:
        connection: in a transaction.
        job_id: the job.
        reason: why it is over.
        trigger_slug: the trigger with which it is; with another one it goes on. None for every trigger.
    """
    _write(connection, job_id, {"ended": reason, "ended_trigger": trigger_slug})


def restart(connection: Connection, job_id: str, trigger_slug: str, *, anew: bool) -> None:
    """Let a job go on that is over; `anew`: its executions are counted from one again. Its state stays."""
    values: dict[str, Any] = {"ended": None, "ended_trigger": None}
    if anew:
        values |= {"trigger_slug": trigger_slug, "run_count": 0}
    _write(connection, job_id, values)


def _write(connection: Connection, job_id: str, values: dict[str, Any]) -> None:
    values = {**values, "updated": database_now()}
    new = {"job_id": job_id, "trigger_slug": "", "run_count": 0, **values}
    connection.execute(upsert(connection.dialect, job_progress, new, values))


def opened(connection: Connection, job_ids: Collection[str]) -> dict[str, str]:
    """Return since when the ticks of each job are owed, without those for which their schedule says it."""
    columns = job_progress.c
    query = select(columns.job_id, columns.opened).where(columns.opened.is_not(None))
    return {row.job_id: row.opened for row in connection.execute(query.where(columns.job_id.in_(job_ids)))}


def seen(connection: Connection, job_ids: Collection[str]) -> dict[str, Switches]:
    """Return what Prefect had of each job when it was looked at last."""
    columns = job_progress.c
    query = select(columns.job_id, columns.seen_paused, columns.seen_on, columns.seen_plan).where(
        columns.job_id.in_(job_ids)
    )
    return dict.fromkeys(job_ids, Switches()) | {
        row.job_id: _switches(row) for row in connection.execute(query)
    }


def see(connection: Connection, job_id: str, trigger_slug: str, now: Switches, updated: str) -> None:
    """Carry over what has changed in Prefect since it was looked at last, unless that was later.

    Args:
        connection: in a transaction.
        job_id: the job.
        trigger_slug: its trigger.
        now: what Prefect has of it.
        updated: when it was last changed there: text that sorts as time.
    """
    row = _locked_job(connection, job_id, trigger_slug)
    if updated < (row.seen_updated or ""):
        return
    before = _switches(row)
    values: dict[str, Any] = {
        "seen_paused": int(now.paused),
        "seen_on": int(now.on),
        "seen_plan": now.plan or before.plan,
        "seen_updated": updated,
    }
    if now.paused != before.paused:
        values["paused"] = int(now.paused)
    if now.on and not before.on:
        values |= {"ended": None, "ended_trigger": None}
    elif before.on and not now.on and _as_of(row, trigger_slug).ended is None:
        # Else it is known better why it is over, and with which trigger.
        values |= {"ended": SWITCHED_OFF, "ended_trigger": trigger_slug}
    if (now.on and not before.on) or _is_edited(before.plan, now.plan):
        values["opened"] = updated
    _write(connection, job_id, values)


def _is_edited(before: str, now: str) -> bool:
    """Return whether the ticks of a schedule are others by now; those of a new one are new anyhow."""
    return bool(now) and before != now and before.split()[:1] == now.split()[:1]


def _switches(row: Row[Any]) -> Switches:
    return Switches(bool(row.seen_paused), row.seen_on != 0, row.seen_plan or "")


def prune(connection: Connection, seconds: float) -> None:
    """Forget jobs that ended, whatever their trigger, longer ago than so many seconds.

    Their deployments are gone. Where one stays, as that of a detached service, its job ends with a trigger.
    """
    columns = job_progress.c
    is_over = and_(columns.ended.is_not(None), columns.ended_trigger.is_(None))
    connection.execute(delete(job_progress).where(is_over, seconds_since(columns.updated) > seconds))


def _locked_job(connection: Connection, job_id: str, trigger_slug: str) -> Row[Any]:
    query = _rows().where(job_progress.c.job_id == job_id).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        first = {
            "job_id": job_id,
            "trigger_slug": trigger_slug,
            "run_count": 0,
            "updated": database_now(),
        }
        ensure_rows(connection, job_progress, first)
        row = connection.execute(query).one()
    return row


def _rows() -> Any:
    columns = job_progress.c
    return select(
        columns.job_id,
        columns.trigger_slug,
        columns.run_count,
        columns.paused,
        columns.ended,
        columns.ended_trigger,
        columns.seen_paused,
        columns.seen_on,
        columns.seen_plan,
        columns.seen_updated,
    )


def load_state(connection: Connection, job_id: str) -> dict[str, Any] | None:
    """Return the state that was saved last, or None if there is none.

    Raises:
        TaskError: the row holds something else than a JSON object.
    """
    columns = job_progress.c
    text = connection.execute(select(columns.state).where(columns.job_id == job_id)).scalar()
    if text is None:
        return None
    try:
        state = json.loads(text)
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise TaskError(
            f"taskadapter_job.state of job {job_id} is not a JSON object; repair the row, or set "
            "its state to NULL to start again from the declaration"
        )
    return state


def save_state(
    connection: Connection, job_id: str, state: dict[str, Any], *, term: int | None = None
) -> None:
    """Replace the state of a job, which must be JSON; `term` is recorded beside it.

    Raises:
        ValueError, TypeError: the state holds a value that JSON has not.
    """
    _write(connection, job_id, {"state": json.dumps(state, allow_nan=False), "term": term})
