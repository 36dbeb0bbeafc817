"""How far a job has come, in the coordination database: its count, its state, its runs in flight.

One short transaction for each question, on an engine of this process's own. For a job of a group,
each begins by locking the token, and is refused when the node has lost it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from taskadapter import runs, schedules
from taskadapter.coordination.board import DeadlineBoard, clock
from taskadapter.errors import (
    CoordinationError,
    DatabaseUnavailableError,
    SchemaError,
    TaskError,
    TokenLostError,
)
from taskadapter.jobs import Service, dump_state, load_state
from taskadapter.runs import Assignment

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from taskadapter.coordination.jobs import RunInFlight
    from taskadapter.coordination.messages import Token

MEMORY_SECONDS = 3600.0
"""For how long it is remembered that a run has started: far longer than any answer is under way."""

RETRY_SECONDS = 0.5
"""How long to wait for a database that does not answer, before it is asked again."""

IDLE_SECONDS = 2.0
"""After how long the server ends a transaction of a host that is frozen or cut off.

Each here takes milliseconds, and holds the token's row: no other node could take the token over.
"""

T = TypeVar("T")


def begin(assignment: Assignment) -> int | None:
    """Count one execution of the job, immediately before it, and enter it as in flight.

    Returns:
        Its number, 1 for the first; None when the trigger allows no further one.

    Raises:
        TokenLostError: the node has lost the token of the job's group.
        AlreadyStartedError: the run has been started before, here or on another node.
    """
    from taskadapter.coordination import jobs

    def ask(connection: Connection) -> int | None:
        if assignment.token is not None:
            flight = jobs.RunInFlight(str(assignment.flow_run.id), str(assignment.job_id), assignment.token)
            jobs.start_flight(
                connection,
                flight,
                rerun=assignment.policy.on_takeover == "rerun",
                retried=schedules.is_retry(assignment.flow_run),
            )
        count = jobs.begin_run(
            connection, str(assignment.job_id), assignment.trigger_slug or "", assignment.max_count
        )
        if count is None and assignment.token is not None:
            jobs.end_flight(connection, str(assignment.flow_run.id), "Skipped")
        return count

    count = _answer(assignment, ask)
    require_trust(assignment)
    return count


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
    from taskadapter.coordination import jobs

    token = assignment.token
    if token is not None:
        _answer(assignment, lambda connection: jobs.require_token(connection, token))
        require_trust(assignment)


def saved_service(assignment: Assignment, cls: type[Service]) -> Service | None:
    """Return the service as its last successful run left it, None before the first.

    Raises:
        DeclarationError: the class has changed so that a saved value is not valid any more.
    """
    from taskadapter.coordination import jobs

    state = _answer(assignment, lambda c: jobs.load_state(c, str(assignment.job_id)))
    return None if state is None else load_state(cls, state)


def settle(assignment: Assignment, service: Service | None, outcome: str) -> None:
    """Record that the execution is over, and save what it made of its service, if it succeeded.

    Args:
        assignment: the run.
        service: to be saved; None if there is none, or it failed.
        outcome: the name of the state that Prefect is told next.

    Raises:
        DeclarationError: a field holds what cannot be saved.
        TokenLostError: the node has lost the token; nothing is saved.
    """
    from taskadapter.coordination import jobs

    state = None if service is None else dump_state(service)

    def write(connection: Connection) -> None:
        job_id, token = str(assignment.job_id), assignment.token
        if state is not None and token is not None:
            jobs.save_state_fenced(connection, job_id, state, token)
        elif state is not None:
            jobs.save_state(connection, job_id, state)
        elif token is not None:
            jobs.require_token(connection, token)
        if token is not None:
            jobs.end_flight(connection, str(assignment.flow_run.id), outcome)

    if state is not None or assignment.token is not None:
        _answer(assignment, write)


def has_started(assignment: Assignment) -> bool:
    """Return whether the run has been started, on whichever node."""
    from taskadapter.coordination import jobs

    flow_run_id = str(assignment.flow_run.id)
    return bool(_answer(assignment, lambda c: jobs.outcomes(c, [flow_run_id])))


def left_behind(database_url: str, token: Token) -> tuple[RunInFlight, ...]:
    """Return the runs that earlier holders of a group's token were executing when they lost it."""
    from taskadapter.coordination import jobs

    with _transaction(database_url) as connection:
        jobs.forget_flights(connection, token.group_id, MEMORY_SECONDS)
        return jobs.flights_before(connection, token.group_id, token.term)


def outcomes(database_url: str, flow_run_ids: Collection[str]) -> dict[str, str | None]:
    """Return those of some runs that have been started, and what each came to if it has ended."""
    from taskadapter.coordination import jobs

    with _transaction(database_url) as connection:
        return jobs.outcomes(connection, flow_run_ids)


def end_flight(database_url: str, flow_run_id: str) -> None:
    """Record that a run is over whose process could not, and so is Crashed."""
    from taskadapter.coordination import jobs

    with _transaction(database_url) as connection:
        jobs.end_flight(connection, flow_run_id, "Crashed")


def forget(database_url: str, job_id: UUID) -> None:
    """Remove the count and the state of a job that is gone."""
    from taskadapter.coordination import jobs

    with _transaction(database_url) as connection:
        jobs.forget(connection, str(job_id))


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

    current = runs.execution.get()
    token = None if current is None else current.assignment.token
    if current is None or token is None:
        raise TaskError(
            "fenced() was called outside a run of a coordinated job; declare the job on a Listener with "
            "a warm_backup_config, and let the agent run it."
        )
    require_trust(current.assignment)
    fence(connection, token, deadline(current.assignment) - clock())


def _answer(assignment: Assignment, ask: Callable[[Connection], T]) -> T:
    """Ask until the database answers: its faults are not the job's, and end with the node's trust."""
    while True:
        try:
            with _transaction(assignment.database_url.get_secret_value()) as connection:
                return ask(connection)
        except SchemaError:
            if not _create_tables(assignment.database_url.get_secret_value()):
                raise
        except DatabaseUnavailableError:
            require_trust(assignment)
            time.sleep(RETRY_SECONDS)


@contextmanager
def _transaction(database_url: str) -> Iterator[Connection]:
    from taskadapter.coordination.dialects import transaction

    with transaction(_engine(database_url)) as connection:
        yield connection


@lru_cache(maxsize=8)
def _engine(url: str) -> Engine:
    """Return this process's engine.

    SQLAlchemy is imported here, by the processes that use it: Prefect imports our modules for each of
    its commands.
    """
    from taskadapter.coordination.dialects import Timeouts, open_engine

    return open_engine(url, timeouts=Timeouts(idle=IDLE_SECONDS))


def _create_tables(database_url: str) -> bool:
    """Create the tables that the database lacks; returns whether there were any."""
    from taskadapter.coordination import schema
    from taskadapter.coordination.dialects import translated

    engine = _engine(database_url)
    with translated(engine.url), engine.connect() as connection:
        return bool(schema.create_missing(connection))


@lru_cache(maxsize=1)
def _board(path: str) -> DeadlineBoard:
    return DeadlineBoard.open(path)
