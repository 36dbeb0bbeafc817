"""How far a job has come: its count and its state, in the coordination database.

One short transaction for each question, on an engine of this process's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from taskadapter.jobs import Service, dump_state, load_state
from taskadapter.runs import Assignment

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine


def begin(assignment: Assignment) -> int | None:
    """Count one execution of the job.

    Returns:
        Its number, 1 for the first; None when the trigger allows no further one.
    """
    from taskadapter.coordination import jobs

    with _transaction(assignment) as connection:
        return jobs.begin_run(
            connection, str(assignment.job_id), assignment.trigger_slug or "", assignment.max_count
        )


def saved_service(assignment: Assignment, cls: type[Service]) -> Service | None:
    """Return the service as its last successful run left it, None before the first.

    Raises:
        DeclarationError: the class has changed so that a saved value is not valid any more.
    """
    from taskadapter.coordination import jobs

    with _transaction(assignment) as connection:
        state = jobs.load_state(connection, str(assignment.job_id))
    return None if state is None else load_state(cls, state)


def save_service(assignment: Assignment, service: Service) -> None:
    """Save the service for its next run, on whichever node that is.

    Raises:
        DeclarationError: a field holds what cannot be saved.
    """
    from taskadapter.coordination import jobs

    state = dump_state(service)
    with _transaction(assignment) as connection:
        jobs.save_state(connection, str(assignment.job_id), state)


@contextmanager
def _transaction(assignment: Assignment) -> Iterator[Connection]:
    from taskadapter.coordination.dialects import transaction

    with transaction(_engine(assignment.database_url.get_secret_value())) as connection:
        yield connection


@lru_cache(maxsize=1)
def _engine(url: str) -> Engine:
    """Return this process's engine, with the tables in place.

    SQLAlchemy is imported here, by the processes that use it: Prefect imports our modules for each of
    its commands.
    """
    from taskadapter.coordination import schema
    from taskadapter.coordination.dialects import open_engine, transaction

    engine = open_engine(url)
    with transaction(engine) as connection:
        schema.create_missing(connection)
    return engine
