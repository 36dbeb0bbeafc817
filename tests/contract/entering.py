"""What the tests of jobs and of the ledger share: a token, a job, and entering one tick after another."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import insert, select, update

from taskadapter.coordination import ledger
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.executions import Begun, Execution, Limits, Owner, tick_key
from taskadapter.coordination.messages import Token
from taskadapter.coordination.schema import job_progress, token_holder

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from taskadapter.coordination.executions import Answer

JOB = "11111111-1111-4111-8111-111111111111"
RUN = "22222222-2222-4222-8222-222222222222"
TOKEN, NEXT = Token("group", "node-1", 7), Token("group", "node-2", 8)
ALONE = Owner("node-1", "incarnation-1")
FOREVER = -1

_ticks = itertools.count()


class Row(NamedTuple):
    """What a job's row says of whether it goes on."""

    paused: bool
    ended: str | None


def hold(engine: Engine, token: Token) -> None:
    with transaction(engine) as connection:
        row = {"group_id": token.group_id, "task_id": token.task_id, "term": token.term}
        connection.execute(insert(token_holder).values(row))


def take_over(engine: Engine) -> None:
    with transaction(engine) as connection:
        connection.execute(update(token_holder).values(task_id=NEXT.task_id, term=NEXT.term))


def owner(token: Token) -> Owner:
    return Owner(token.task_id, f"incarnation of {token.task_id}", token)


def tick(number: int, job_id: str = JOB, flow_run_id: str = RUN) -> Execution:
    due = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    return Execution(tick_key(job_id, due), flow_run_id, job_id, due)


def count_one(
    engine: Engine, slug: str = "every-2s", max_count: int = FOREVER, job_id: str = JOB
) -> int | str | None:
    """Enter the next tick; returns its number, or what was answered instead."""
    with transaction(engine) as connection:
        execution, limits = tick(next(_ticks), job_id), Limits(slug, max_count)
        return told(ledger.begin(connection, execution, ALONE, limits))


def told(answer: Answer) -> int | str | None:
    return answer.number if isinstance(answer, Begun) else type(answer).__name__


def row_of(connection: Connection, job_id: str) -> Row | None:
    columns = job_progress.c
    query = select(columns.paused, columns.ended).where(columns.job_id == job_id)
    row = connection.execute(query).one_or_none()
    return None if row is None else Row(bool(row.paused), row.ended)
