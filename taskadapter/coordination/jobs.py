"""The durable progress of jobs: how often each ran, its state, and which runs are in flight.

Every function works inside the caller's transaction and takes effect when that commits; keep it
short, because on PostgreSQL and MySQL it locks the job's row, and on SQLite the whole file::

    with transaction(engine) as connection:
        count = begin_run(connection, job_id, "every-2s", max_count=5)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from taskadapter.coordination.dialects import database_now, ensure_row, seconds_since, upsert
from taskadapter.coordination.messages import Token
from taskadapter.coordination.schema import job_progress, run_in_flight
from taskadapter.coordination.tokens import require_token
from taskadapter.errors import AlreadyStartedError, CoordinationError, DatabaseUnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection, Row

__all__ = [
    "RunInFlight",
    "Token",
    "begin_run",
    "end_flight",
    "flights_before",
    "forget",
    "forget_flights",
    "load_state",
    "outcomes",
    "require_token",
    "save_state",
    "save_state_fenced",
    "start_flight",
]


@dataclass(frozen=True, slots=True)
class RunInFlight:
    """A flow run that a node executes, or executed when it died, and the token it started under."""

    flow_run_id: str
    job_id: str | None
    token: Token


def begin_run(connection: Connection, job_id: str, trigger_slug: str, max_count: int) -> int | None:
    """Count one execution of a job, and return its number: 1 for the first, 2 for the next.

    Returns None, and counts nothing, when `max_count` executions were counted already; a
    `max_count` of 0 or less is no limit. A `trigger_slug` other than the last one starts again at
    1. Callers that race get different numbers, none above `max_count`.
    """
    row = _locked_job(connection, job_id, trigger_slug)
    counted = row.run_count if row.trigger_slug == trigger_slug else 0
    if 0 < max_count <= counted:
        return None
    columns = job_progress.c
    written = connection.execute(
        update(job_progress)
        .where(columns.job_id == job_id, columns.run_count == row.run_count)
        .values(trigger_slug=trigger_slug, run_count=counted + 1, updated=database_now())
    )
    if written.rowcount != 1:
        raise DatabaseUnavailableError(
            f"job {job_id} was counted by another process at the same moment; try again, in a transaction"
        )
    return counted + 1


def _locked_job(connection: Connection, job_id: str, trigger_slug: str) -> Row[Any]:
    columns = job_progress.c
    query = (
        select(columns.trigger_slug, columns.run_count).where(columns.job_id == job_id).with_for_update()
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        first = {
            "job_id": job_id,
            "trigger_slug": trigger_slug,
            "run_count": 0,
            "updated": database_now(),
        }
        ensure_row(connection, job_progress, first)
        row = connection.execute(query).one()
    return row


def load_state(connection: Connection, job_id: str) -> dict[str, Any] | None:
    """Return the state that was saved last, or None if there is none.

    Raises:
        CoordinationError: the row holds something else than a JSON object.
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
        raise CoordinationError(
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
    values = {
        "state": json.dumps(state, allow_nan=False),
        "term": term,
        "updated": database_now(),
    }
    new = {"job_id": job_id, "trigger_slug": "", "run_count": 0, **values}
    upsert(connection, job_progress, new, values)


def save_state_fenced(connection: Connection, job_id: str, state: dict[str, Any], token: Token) -> None:
    """Replace the state of a job, if `token` is still held; see `require_token`, `save_state`.

    Raises:
        TokenLostError: it is not; nothing was written.
    """
    require_token(connection, token)
    save_state(connection, job_id, state, term=token.term)


def forget(connection: Connection, job_id: str) -> None:
    """Remove a job's count and state; nothing happens if there are none."""
    connection.execute(delete(job_progress).where(job_progress.c.job_id == job_id))


def start_flight(
    connection: Connection, run: RunInFlight, *, rerun: bool = False, retried: bool = False
) -> None:
    """Record that a flow run starts, if its token is still held.

    A flow run starts once. With `rerun` one that has not ended may start again in a later term; with
    `retried`, which means that a person asks for it, one that has ended may.

    Raises:
        TokenLostError: the token is not held.
        AlreadyStartedError: the flow run was started before.
    """
    require_token(connection, run.token)
    values = {
        "flow_run_id": run.flow_run_id,
        "job_id": run.job_id,
        "group_id": run.token.group_id,
        "task_id": run.token.task_id,
        "term": run.token.term,
        "started": database_now(),
        "ended": None,
        "outcome": None,
    }
    try:
        with connection.begin_nested():
            connection.execute(insert(run_in_flight).values(values))
    except IntegrityError:
        _start_again(connection, run, values, rerun=rerun, retried=retried)


def _start_again(
    connection: Connection, run: RunInFlight, values: dict[str, Any], *, rerun: bool, retried: bool
) -> None:
    columns = run_in_flight.c
    previous = connection.execute(
        select(columns.task_id, columns.term, columns.ended)
        .where(columns.flow_run_id == run.flow_run_id)
        .with_for_update()
    ).one()
    may = rerun and previous.term < run.token.term if previous.ended is None else retried
    if not may:
        raise AlreadyStartedError(
            f"flow run {run.flow_run_id} was started by node {previous.task_id!r} in term "
            f"{previous.term}; it must not start twice"
        )
    connection.execute(update(run_in_flight).where(columns.flow_run_id == run.flow_run_id).values(values))


def end_flight(connection: Connection, flow_run_id: str, outcome: str) -> None:
    """Record that a flow run is over; nothing happens if it was not in flight.

    `outcome` is the name of the state it came to, of which Prefect is told next: if its node dies in
    between, its successor tells it.
    """
    columns = run_in_flight.c
    open_flight = and_(columns.flow_run_id == flow_run_id, columns.ended.is_(None))
    connection.execute(
        update(run_in_flight).where(open_flight).values(ended=database_now(), outcome=outcome)
    )


def outcomes(connection: Connection, flow_run_ids: Collection[str]) -> dict[str, str | None]:
    """Return those of some flow runs that have been started, and what each came to if it has ended."""
    columns = run_in_flight.c
    rows = connection.execute(
        select(columns.flow_run_id, columns.outcome).where(columns.flow_run_id.in_(flow_run_ids))
    )
    return {row.flow_run_id: row.outcome for row in rows}


def forget_flights(connection: Connection, group_id: str, seconds: float) -> None:
    """Forget a group's runs that ended longer ago than so many seconds."""
    columns = run_in_flight.c
    old = and_(columns.group_id == group_id, seconds_since(columns.ended) > seconds)
    connection.execute(delete(run_in_flight).where(old))


def flights_before(connection: Connection, group_id: str, term: int) -> tuple[RunInFlight, ...]:
    """Return the runs of a group that started in an earlier term and have not ended.

    To the holder of `term` these are the runs that a former node left behind.
    """
    columns = run_in_flight.c
    rows = connection.execute(
        select(columns.flow_run_id, columns.job_id, columns.task_id, columns.term)
        .where(columns.group_id == group_id, columns.term < term, columns.ended.is_(None))
        .order_by(columns.started, columns.flow_run_id)
    )
    return tuple(
        RunInFlight(row.flow_run_id, row.job_id, Token(group_id, row.task_id, row.term)) for row in rows
    )
