"""The ledger: a row for each execution, which decides whether a tick has run.

Prefect's run objects can be deleted, made anew, claimed by two, retried by a person and forced into any
state. So what an execution is *of* has a key, a tick's from its job and its time, and a row is inserted
under that key immediately before the body. A second insertion is refused.

Every function works inside the caller's transaction and takes effect when that commits::

    with transaction(engine) as connection:
        entered = begin(connection, execution, owner, limits=limits)
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, exists, func, insert, or_, select, union_all, update
from sqlalchemy.exc import IntegrityError

from taskadapter.coordination import progress
from taskadapter.coordination.dialects import (
    ROWS_AT_ONCE,
    database_now,
    ensure_rows,
    remove,
    seconds_since,
    storable,
)
from taskadapter.coordination.executions import (
    ABANDONED,
    SKIPPED,
    Begun,
    Ended,
    Entry,
    Exhausted,
    Past,
    Paused,
    Skipped,
    Taken,
    moment,
    times_asked,
)
from taskadapter.coordination.schema import ledger, node
from taskadapter.coordination.tokens import require_token

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sqlalchemy import ColumnElement, Connection, Row

    from taskadapter.coordination.executions import Answer, End, Execution, Limits, Owner
    from taskadapter.coordination.messages import Token
    from taskadapter.coordination.progress import JobRow

AGAIN = "begun again"
"""What is said of an execution that was interrupted, or suspended, and has begun once more."""

JOBS_AT_ONCE = 100
"""Of how many jobs one statement asks: SQLite takes no more than 500 parts."""


def begin(connection: Connection, execution: Execution, owner: Owner, limits: Limits) -> Answer:
    """Enter an execution, immediately before its body, unless something forbids it.

    A tick is counted, and begins only while its job's row allows it. A run that somebody asked for counts
    for nothing, and begins whatever has become of the job.

    Args:
        connection: in a transaction; the body may begin once that has committed.
        execution: what begins.
        owner: who executes it.
        limits: what a tick has to keep to.

    Raises:
        TokenLostError: the owner's token is not held any more.
    """
    _require_token(connection, owner)
    job = None
    if execution.job_id is not None and execution.due is not None:
        job = progress.lock(connection, execution.job_id, limits.trigger_slug)
    if (row := _locked(connection, execution.key)) is not None:
        return _again(connection, row, job, execution, owner)
    if execution.due is None and (rival := _rival(connection, execution)) is not None:
        return Taken(rival)
    if job is not None and (refusal := _refusal(job, limits)) is not None:
        return refusal
    number = None if job is None else job.count + 1
    try:
        with connection.begin_nested():
            connection.execute(insert(ledger).values(_values(execution, owner, number)))
    except IntegrityError:
        row = _locked(connection, execution.key)
        assert row is not None  # noqa: S101 - rows that are so young are not removed
        return Taken(_entry(row))
    if job is not None:
        progress.count(connection, job)
    return Begun(number)


def _require_token(connection: Connection, owner: Owner) -> None:
    if owner.token is not None:
        require_token(connection, owner.token)


def _rival(connection: Connection, execution: Execution) -> Entry | None:
    """Return an entry of the same run, which somebody has asked for, that goes on or was begun later.

    A node that could not reach the database for a while may have had its run taken away, and put back.
    """
    columns, times = ledger.c, times_asked(execution.key)
    others = _found(connection, and_(columns.flow_run_id == execution.flow_run_id, columns.due.is_(None)))
    rivals = (other for other in others if other.outcome is None or times_asked(other.key) > times)
    return next(rivals, None)


def _refusal(job: JobRow, limits: Limits) -> Answer | None:
    if job.ended is not None:
        return Ended(job.ended)
    if job.paused:
        return Paused()
    if 0 < limits.max_count <= job.count:
        return Exhausted()
    return None if limits.too_late is None else Skipped(limits.too_late)


def _again(
    connection: Connection, row: Row[Any], job: JobRow | None, execution: Execution, owner: Owner
) -> Answer:
    """Begin an interrupted execution that is to be made again; no other has a second beginning.

    It has been counted, and its job may have ended with it.
    """
    if row.outcome != ABANDONED:
        return Taken(_entry(row))
    if job is not None and job.paused:
        return Paused()
    values = {**_values(execution, owner, row.number), "reason": AGAIN}
    connection.execute(update(ledger).where(ledger.c.execution == execution.key).values(values))
    return Begun(row.number)


def _values(execution: Execution, owner: Owner, number: int | None) -> dict[str, Any]:
    return {
        "execution": execution.key,
        "flow_run_id": execution.flow_run_id,
        "job_id": execution.job_id,
        "due": None if execution.due is None else moment(execution.due),
        "number": number,
        "group_id": owner.token.group_id if owner.token else None,
        "task_id": owner.task_id,
        "term": owner.term,
        "incarnation": owner.incarnation,
        "late": None if execution.due is None else (datetime.now(UTC) - execution.due).total_seconds(),
        "begun": database_now(),
        "ended": None,
        "outcome": None,
    }


def _locked(connection: Connection, key: str) -> Row[Any] | None:
    return connection.execute(_entries().where(ledger.c.execution == key).with_for_update()).one_or_none()


def _entries() -> Any:
    columns = ledger.c
    return select(
        columns.execution,
        columns.flow_run_id,
        columns.job_id,
        columns.due,
        columns.number,
        columns.group_id,
        columns.task_id,
        columns.term,
        columns.incarnation,
        columns.outcome,
    )


def _entry(row: Row[Any]) -> Entry:
    return Entry(
        key=row.execution,
        flow_run_id=row.flow_run_id,
        job_id=row.job_id,
        due=row.due,
        number=row.number,
        group_id=row.group_id,
        task_id=row.task_id,
        term=row.term,
        incarnation=row.incarnation,
        outcome=row.outcome,
    )


def skip(connection: Connection, execution: Execution, owner: Owner, reason: str) -> bool:
    """Enter that a tick is not run, and why; return whether it is not: its body may have begun.

    Raises:
        TokenLostError: the owner's token is not held any more.
    """
    _require_token(connection, owner)
    if (row := _locked(connection, execution.key)) is None:
        _enter_unbegun(connection, execution, owner, SKIPPED, reason)
        row = _locked(connection, execution.key)
    return row is not None and row.outcome == SKIPPED


def give_up(connection: Connection, execution: Execution, owner: Owner, outcome: str, reason: str) -> None:
    """Enter what came of an execution whose process is gone, and why; what has an end keeps it.

    A tick that has not begun is over, too: nobody begins it later. A run that somebody asked for is not
    entered: whoever has it retried gets it. What another node is executing is that one's.

    Raises:
        TokenLostError: the owner's token is not held any more.
    """
    _require_token(connection, owner)
    row = _locked(connection, execution.key)
    if row is None:
        if execution.due is not None:
            _enter_unbegun(connection, execution, owner, outcome, reason)
    elif row.outcome == ABANDONED or (row.outcome is None and row.incarnation == owner.incarnation):
        ours = ledger.c.execution == execution.key
        values = {"ended": database_now(), "outcome": outcome, "reason": storable(reason)}
        connection.execute(update(ledger).where(ours).values(values))


def withdraw(connection: Connection, execution: Execution, owner: Owner, trigger_slug: str) -> None:
    """Take back an open entry of this very run, whose body has not begun, and will not by it.

    It was committed, and its process has not heard of that; or a tick's COMMIT is on its way, and is waited
    for with the job's row. What has an end keeps it; what was made again is to be made again.
    """
    job = None
    if execution.job_id is not None and execution.due is not None:
        job = progress.lock(connection, execution.job_id, trigger_slug)
    row = _locked(connection, execution.key)
    if row is None or row.outcome is not None or not _entry(row).is_of(execution, owner):
        return
    if _enter_outcome(connection, execution.key, ABANDONED, ledger.c.reason == AGAIN):
        return
    connection.execute(delete(ledger).where(ledger.c.execution == execution.key))
    if job is not None and job.count:  # else it was counted for another trigger
        progress.uncount(connection, job)


def _enter_unbegun(
    connection: Connection, execution: Execution, owner: Owner, outcome: str, reason: str
) -> None:
    values = {"begun": None, "ended": database_now(), "outcome": outcome, "reason": storable(reason)}
    ensure_rows(connection, ledger, {**_values(execution, owner, None), **values})


def history(connection: Connection, job_id: str, limit: int) -> list[Past]:
    """Return the last executions of a job, the newest first, as many as `limit` says."""
    columns = ledger.c
    begun, ended = seconds_since(columns.begun), seconds_since(columns.ended)
    query = (
        _entries()
        .add_columns(columns.late, columns.reason, begun.label("age"), (begun - ended).label("took"))
        .where(columns.job_id == job_id)
        .order_by(func.coalesce(columns.due, "").desc(), columns.execution.desc())
        .limit(limit)
    )
    return [Past(_entry(row), row.late, row.age, row.took, row.reason) for row in connection.execute(query)]


def dues(connection: Connection, job_ids: Collection[str], limit: int) -> dict[str, list[str]]:
    """Return the times of the last ticks of each job that have begun, or are skipped, the newest first.

    Args:
        connection: in a transaction.
        job_ids: the jobs; those of which there is none are left out.
        limit: how many of each job.
    """
    columns = ledger.c
    ticks = select(columns.job_id, columns.due).where(columns.due.is_not(None))
    newest, ids = ticks.order_by(columns.due.desc()).limit(limit), list(job_ids)
    found: dict[str, list[str]] = {}
    for start in range(0, len(ids), JOBS_AT_ONCE):
        # Each job's own are read from the index, however many there are.
        some = ids[start : start + JOBS_AT_ONCE]
        parts = [select(newest.where(columns.job_id == job_id).subquery()) for job_id in some]
        for job_id, due in connection.execute(union_all(*parts)):
            found.setdefault(job_id, []).append(due)
    return {job_id: sorted(times, reverse=True) for job_id, times in found.items()}


def end_as_found(connection: Connection, entry: Entry, outcome: str) -> None:
    """Enter what an execution came to that was found open, unless it has ended, or begun again, since."""
    columns = ledger.c
    _enter_outcome(
        connection, entry.key, outcome, columns.incarnation == entry.incarnation, columns.ended.is_(None)
    )


def end(connection: Connection, key: str, outcome: str, *, incarnation: str) -> bool:
    """Enter what an execution came to, and return whether that is news.

    Args:
        connection: in a transaction.
        key: the execution.
        outcome: the name of the state that Prefect is told next: if the node dies in between, another one
            tells it.
        incarnation: of the process that executed it, which knows better than another that took it for
            dead.
    """
    columns = ledger.c
    unsettled = or_(columns.ended.is_(None), columns.incarnation == incarnation)
    return _enter_outcome(connection, key, outcome, unsettled)


def settle(
    connection: Connection, execution: Execution, owner: Owner, came_to: End, trigger_slug: str | None
) -> None:
    """Enter what a body came to, with what it made of its job's state, and whether that is over.

    Nothing is written where that has been entered: the job's state may be the next run's by now.

    Raises:
        TokenLostError: the owner's token is not held any more.
    """
    _require_token(connection, owner)
    if came_to.state is not None or came_to.ends is not None:
        row = _locked_with_job(connection, execution, trigger_slug)
        if row is not None and (row.outcome, row.incarnation) == (came_to.outcome, owner.incarnation):
            return
    _settle(connection, execution, owner, came_to, trigger_slug)


def settle_for(
    connection: Connection, execution: Execution, owner: Owner, came_to: End, trigger_slug: str | None
) -> None:
    """Do what `settle` does, for a process that cannot; what has an end by now keeps it.

    Raises:
        TokenLostError: the owner's token is not held any more.
    """
    _require_token(connection, owner)
    row = _locked_with_job(connection, execution, trigger_slug)
    if row is not None and row.outcome is None:
        _settle(connection, execution, owner, came_to, trigger_slug)


def _locked_with_job(
    connection: Connection, execution: Execution, trigger_slug: str | None
) -> Row[Any] | None:
    progress.lock(connection, str(execution.job_id), trigger_slug or "")
    return _locked(connection, execution.key)


def _settle(
    connection: Connection, execution: Execution, owner: Owner, came_to: End, trigger_slug: str | None
) -> None:
    job_id = str(execution.job_id)
    if came_to.state is not None:
        progress.save_state(connection, job_id, came_to.state, term=owner.term)
    if came_to.ends is not None:
        progress.end(connection, job_id, came_to.ends, trigger_slug)
    end(connection, execution.key, came_to.outcome, incarnation=owner.incarnation)


def _enter_outcome(connection: Connection, key: str, outcome: str, *where: ColumnElement[bool]) -> bool:
    """Enter what an execution came to if its row is so, and return whether it was."""
    written = connection.execute(
        update(ledger)
        .where(ledger.c.execution == key, *where)
        .values(ended=database_now(), outcome=outcome)
    )
    return bool(written.rowcount)


def entries(
    connection: Connection, keys: Collection[str], flow_run_ids: Collection[str] = ()
) -> list[Entry]:
    """Return those of some executions that have begun, and those that some flow runs were, oldest first."""
    columns = ledger.c
    wanted = or_(columns.execution.in_(keys), columns.flow_run_id.in_(flow_run_ids))
    return _found(connection, wanted)


def interrupted(connection: Connection, tokens: Iterable[Token]) -> list[Entry]:
    """Return the executions of groups that began in an earlier term and have not ended.

    To the holder of `tokens` these are the ones that former holders left behind.
    """
    columns, terms = ledger.c, {token.group_id: token.term for token in tokens}
    unsettled = _found(connection, and_(columns.group_id.in_(terms), columns.ended.is_(None)))
    return [entry for entry in unsettled if (entry.term or 0) < terms.get(entry.group_id or "", 0)]


def orphaned(connection: Connection, interval: float) -> list[Entry]:
    """Return the executions without a group that have not ended, and whose node is gone.

    A node may execute before it is registered: while its predecessor of the same name is not yet stale.

    Args:
        connection: in a transaction.
        interval: seconds after which a node that has not shown that it lives is taken for dead.
    """
    columns = ledger.c
    lives = exists().where(
        node.c.incarnation == columns.incarnation, seconds_since(node.c.last_seen) <= interval
    )
    is_old = seconds_since(columns.begun) > 2 * interval
    return _found(connection, and_(columns.group_id.is_(None), columns.ended.is_(None), is_old, ~lives))


def _found(connection: Connection, wanted: ColumnElement[bool]) -> list[Entry]:
    query = _entries().where(wanted).order_by(ledger.c.begun, ledger.c.execution)
    return [_entry(row) for row in connection.execute(query)]


def prune(connection: Connection, seconds: float, at_most: int = ROWS_AT_ONCE) -> bool:
    """Remove what ended longer ago than so many seconds.

    The newest tick of each job stays: it says how far the job is.

    Args:
        connection: in a transaction.
        seconds: since its end.
        at_most: how many rows are removed.

    Returns:
        Whether there may be more.
    """
    columns, newer = ledger.c, ledger.alias()
    has_newer = exists().where(newer.c.job_id == columns.job_id, newer.c.due > columns.due)
    is_old = seconds_since(columns.ended) > seconds
    return remove(connection, ledger, is_old, at_most, or_(columns.due.is_(None), has_newer))
