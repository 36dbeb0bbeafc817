"""How far a job has come, in the coordination database: its executions, its count, its state.

One short transaction for each question, on an engine of this process's own. For a job of a group,
each begins by locking the token, and is refused when the node has lost it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from prefect.logging import get_logger

from taskadapter.coordination.board import DeadlineBoard, clock
from taskadapter.coordination.executions import Entered, Limits
from taskadapter.declare.jobs import Service, dump_state, load_state
from taskadapter.errors import (
    AccessDeniedError,
    CoordinationError,
    DatabaseUnavailableError,
    SchemaError,
    TaskError,
    TokenLostError,
)
from taskadapter.execution import current
from taskadapter.execution.assignment import Assignment

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from taskadapter.agent.switches import Reading
    from taskadapter.coordination.executions import Answer, Entry, Switches
    from taskadapter.coordination.messages import Token

RETRY_SECONDS = 0.5
"""How long to wait for a database that does not answer, before it is asked again."""

IDLE_SECONDS = 2.0
"""After how long the server ends a transaction of a host that is frozen or cut off.

Each here takes milliseconds, and holds the token's row: no other node could take the token over.
"""

T = TypeVar("T")

_FAULTS = (DatabaseUnavailableError, AccessDeniedError, SchemaError)
"""What a database raises that is away, or refuses for now: it is waited for."""

_log = get_logger("taskadapter.execution.record")


def begin(assignment: Assignment) -> Answer:
    """Enter the execution in the ledger, immediately before its body.

    Raises:
        TokenLostError: the node has lost the token of the job's group.
    """
    from taskadapter.coordination import ledger

    limits = Limits(assignment.trigger_slug or "", assignment.max_count)
    answer = _answer(
        assignment,
        lambda connection: ledger.begin(connection, assignment.execution, assignment.owner, limits),
    )
    require_trust(assignment)
    return answer


def prepare(assignment: Assignment) -> None:
    """Connect to the database ahead of the run's moment; a fault is left to that moment."""
    from taskadapter.coordination.dialects import translated

    engine = _engine(assignment.database_url.get_secret_value())
    with suppress(CoordinationError), translated(engine.url), engine.connect():
        pass


def require_trust(assignment: Assignment) -> None:
    """Check the deadline until which the agent may trust its token.

    Raises:
        TokenLostError: it has passed.
    """
    if clock() >= deadline(assignment):
        raise TokenLostError(f"node {assignment.node!r} has lost the token of its group.")


def deadline(assignment: Assignment) -> float:
    """Return until when the run may go on, on the board's clock; infinite without a group."""
    if assignment.token is None or assignment.board is None:
        return float("inf")
    return _board(str(assignment.board)).read(assignment.token)


def check(assignment: Assignment) -> None:
    """Check the token before a further attempt.

    Raises:
        TokenLostError: the node has lost it.
    """
    from taskadapter.coordination import progress

    token = assignment.token
    if token is not None:
        _answer(assignment, lambda connection: progress.require_token(connection, token))
        require_trust(assignment)


def saved_service(assignment: Assignment, cls: type[Service]) -> Service | None:
    """Return the service as its last successful run left it, None before the first.

    Raises:
        DeclarationError: the class has changed so that a saved value is not valid any more.
    """
    from taskadapter.coordination import progress

    state = _answer(assignment, lambda c: progress.load_state(c, str(assignment.job_id)))
    return None if state is None else load_state(cls, state)


def settle(assignment: Assignment, service: Service | None, outcome: str, ends: str | None = None) -> None:
    """Enter what the execution came to, and save what it made of its service, if it succeeded.

    Args:
        assignment: the run.
        service: to be saved; None if there is none, or it failed.
        outcome: the name of the state that Prefect is told next.
        ends: why its job is over, if it is with this execution.

    Raises:
        DeclarationError: a field holds what cannot be saved.
        TokenLostError: the node has lost the token; nothing is saved.
    """
    from taskadapter.coordination import ledger, progress

    state = None if service is None else dump_state(service)

    def write(connection: Connection) -> None:
        job_id, token = str(assignment.job_id), assignment.token
        if token is not None:
            progress.require_token(connection, token)
        if state is not None:
            progress.save_state(connection, job_id, state, term=token.term if token else None)
        if ends is not None:
            progress.end(connection, job_id, ends, assignment.trigger_slug)
        ledger.end(connection, assignment.execution.key, outcome, incarnation=assignment.incarnation)

    _answer(assignment, write)


def entries(database_url: str, keys: Collection[str], flow_run_ids: Collection[str] = ()) -> list[Entry]:
    """Return those of some executions that have begun, and those that some flow runs were, oldest first."""
    from taskadapter.coordination import ledger

    return _ask(database_url, lambda connection: ledger.entries(connection, keys, flow_run_ids))


def interrupted(database_url: str, tokens: Collection[Token]) -> list[Entry]:
    """Return what earlier holders of groups' tokens were executing when they lost them."""
    from taskadapter.coordination import ledger

    return _ask(database_url, lambda connection: ledger.interrupted(connection, tokens))


def orphaned(database_url: str, interval: float) -> list[Entry]:
    """Return what nodes that are gone were executing without a group."""
    from taskadapter.coordination import ledger

    return _ask(database_url, lambda connection: ledger.orphaned(connection, interval))


def skip(assignment: Assignment, reason: str) -> None:
    """Enter that a tick is not run, and why."""
    from taskadapter.coordination import ledger

    url, execution, owner = assignment.database_url, assignment.execution, assignment.owner
    _ask(url.get_secret_value(), lambda connection: ledger.skip(connection, execution, owner, reason))


def end(database_url: str, key: str, outcome: str) -> None:
    """Enter what an execution came to whose process could not say so."""
    from taskadapter.coordination import ledger

    _ask(database_url, lambda connection: ledger.end(connection, key, outcome))


def prune(database_url: str, seconds: float) -> None:
    """Forget the executions, and the jobs, that ended longer ago than so many seconds."""
    from taskadapter.coordination import ledger, progress

    def forget(connection: Connection) -> None:
        ledger.prune(connection, seconds)
        progress.prune(connection, seconds)

    _ask(database_url, forget)


def entered(database_url: str, job_ids: Iterable[UUID], limit: int) -> dict[UUID, Entered]:
    """Return what is entered of the ticks of each job, of the last ones as many as `limit` says."""
    from taskadapter.coordination import ledger, progress

    ids = {str(job_id): job_id for job_id in job_ids}

    def look(connection: Connection) -> tuple[dict[str, list[str]], dict[str, str]]:
        return ledger.dues(connection, ids, limit), progress.opened(connection, ids)

    dues, opened = _ask(database_url, look)
    return {
        job_id: Entered(
            [datetime.fromisoformat(due) for due in dues.get(key, [])],
            datetime.fromisoformat(opened[key]) if key in opened else None,
        )
        for key, job_id in ids.items()
    }


def pause(database_url: str, job_id: UUID, *, paused: bool) -> None:
    """Let no tick of a job begin any more, or let them again."""
    from taskadapter.coordination import progress

    _ask(database_url, lambda connection: progress.pause(connection, str(job_id), paused=paused))


def resumed(database_url: str, job_ids: Collection[UUID]) -> set[UUID]:
    """Return those of some jobs that were paused and are not any more."""
    from taskadapter.coordination import progress

    ids = [str(job_id) for job_id in job_ids]
    return set(map(UUID, _ask(database_url, lambda connection: progress.resumed(connection, ids))))


def end_job(database_url: str, job_id: UUID, reason: str | None, trigger_slug: str | None = None) -> None:
    """End a job for all nodes, or let it go on, with None for a reason.

    Args:
        database_url: the coordination database.
        job_id: the job.
        reason: why it is over.
        trigger_slug: the trigger with which it is; with another one it goes on. None for every trigger.
    """
    from taskadapter.coordination import progress

    _ask(database_url, lambda connection: progress.end(connection, str(job_id), reason, trigger_slug))


def seen(database_url: str, job_ids: Collection[UUID]) -> dict[UUID, Switches]:
    """Return what Prefect had of each job when it was looked at last."""
    from taskadapter.coordination import progress

    ids = [str(job_id) for job_id in job_ids]
    found = _ask(database_url, lambda connection: progress.seen(connection, ids))
    return {UUID(job_id): switches for job_id, switches in found.items()}


def see(database_url: str, readings: Iterable[Reading]) -> None:
    """Carry over what has changed in Prefect since it was looked at last."""
    from taskadapter.coordination import progress

    def carry_over(connection: Connection) -> None:
        for reading in readings:
            job_id, switches = str(reading.job_id), reading.switches
            progress.see(connection, job_id, reading.trigger_slug, switches, reading.updated)

    _ask(database_url, carry_over)


def claim_groups(database_url: str, work_pool: str, group_ids: Collection[str]) -> dict[str, str]:
    """Enter groups as a work pool's, and return those that are another pool's, with its name."""
    from taskadapter.coordination import tokens

    return _ask(database_url, lambda connection: tokens.claim_groups(connection, work_pool, group_ids))


def give_up_group(database_url: str, work_pool: str, group_id: str) -> None:
    """Let a group be another pool's that was this one's."""
    from taskadapter.coordination import tokens

    _ask(database_url, lambda connection: tokens.give_up_group(connection, work_pool, group_id))


def require_database(database_url: str, within: float) -> None:
    """Check that the database is there, and has or gets its tables.

    Args:
        database_url: the coordination database.
        within: for how many seconds it is asked again while it does not answer.

    Raises:
        CoordinationError: it cannot be used.
    """
    end = time.monotonic() + within
    while True:
        try:
            _create_tables(database_url)
        except DatabaseUnavailableError:
            if time.monotonic() >= end:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            return


def fenced(connection: Connection) -> None:
    """Join a transaction of the caller's to the token of the run that is going on.

    It locks the token's row in that transaction: no other node can take the token over before the
    transaction ends, and a node that was paused while it lost the token cannot write after its
    successor. On PostgreSQL the server ends the transaction if it is idle for longer than the lease.

    Args:
        connection: of SQLAlchemy, to the coordination database, in a transaction.

    Raises:
        TaskError: no run of a coordinated job is going on here.
        TokenLostError: the node has lost the token; roll back.
    """
    from taskadapter.coordination.tokens import fence

    execution = current.execution.get()
    token = None if execution is None else execution.assignment.token
    if execution is None or token is None:
        raise TaskError(
            "fenced() was called outside a run of a coordinated job; declare the job on a Listener with "
            "a warm_backup_config, and let the agent run it."
        )
    require_trust(execution.assignment)
    fence(connection, token, deadline(execution.assignment) - clock())


def _answer(assignment: Assignment, ask: Callable[[Connection], T]) -> T:
    """Ask until the database answers: its faults are not the job's, and end with the node's trust."""
    faults: set[str] = set()
    while True:
        try:
            return _ask(assignment.database_url.get_secret_value(), ask)
        except _FAULTS as fault:
            require_trust(assignment)
            if str(fault) not in faults:
                _log.warning("Waiting for the coordination database: %s", fault)
            faults.add(str(fault))
            time.sleep(RETRY_SECONDS)


def _ask(database_url: str, ask: Callable[[Connection], T]) -> T:
    """Ask in a transaction; where tables are missing, make them, unless others just did, and ask again."""
    try:
        with _transaction(database_url) as connection:
            return ask(connection)
    except SchemaError:
        _create_tables(database_url)
    with _transaction(database_url) as connection:
        return ask(connection)


@contextmanager
def _transaction(database_url: str) -> Iterator[Connection]:
    from taskadapter.coordination.dialects import transaction

    with transaction(_engine(database_url)) as connection:
        yield connection


def _engine(url: str) -> Engine:
    """Return this process's engine: for SQLite one for each file that ever had the name."""
    from sqlalchemy import make_url

    from taskadapter.coordination.dialects import file_of

    return _engine_on(url, file_of(make_url(url)))


@lru_cache(maxsize=8)
def _engine_on(url: str, _file: tuple[int, int] | None) -> Engine:
    """Make an engine.

    SQLAlchemy is imported here, by the processes that use it: Prefect imports our modules for each of
    its commands.
    """
    from taskadapter.coordination.dialects import Timeouts, open_engine

    return open_engine(url, timeouts=Timeouts(idle=IDLE_SECONDS))


def _create_tables(database_url: str) -> None:
    """Create the tables that the database lacks."""
    from taskadapter.coordination import schema
    from taskadapter.coordination.dialects import translated

    engine = _engine(database_url)
    with translated(engine.url), engine.connect() as connection:
        schema.create_missing(connection)


@lru_cache(maxsize=1)
def _board(path: str) -> DeadlineBoard:
    return DeadlineBoard.open(path)
