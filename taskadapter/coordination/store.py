"""What this process asks the coordination database: one short transaction for each question.

Its engines are this process's own, one for each database.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from taskadapter.coordination.executions import Entered
from taskadapter.errors import CoordinationError, DatabaseUnavailableError, SchemaError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from taskadapter.coordination.executions import End, Entry, Execution, Owner, Reading, Switches
    from taskadapter.coordination.messages import PoolKey, Token
    from taskadapter.coordination.overview import Status, Tenure
    from taskadapter.coordination.progress import JobRow

RETRY_SECONDS = 0.5
"""How long to wait for a database that does not answer, before it is asked again."""

IDLE_SECONDS = 2.0
"""After how long the server ends a transaction of a host that is frozen or cut off.

Each here takes milliseconds, and holds the token's row: no other node could take the token over.
"""

T = TypeVar("T")


def entries(database_url: str, keys: Collection[str], flow_run_ids: Collection[str] = ()) -> list[Entry]:
    """Return those of some executions that have begun, and those that some flow runs were, oldest first."""
    from taskadapter.coordination import ledger

    return ask(database_url, lambda connection: ledger.entries(connection, keys, flow_run_ids))


def interrupted(database_url: str, tokens: Collection[Token]) -> list[Entry]:
    """Return what earlier holders of groups' tokens were executing when they lost them."""
    from taskadapter.coordination import ledger

    return ask(database_url, lambda connection: ledger.interrupted(connection, tokens))


def status(database_url: str) -> Status:
    """Return where all tokens are and which nodes there are."""
    from taskadapter.coordination.overview import read_status

    return ask(database_url, read_status)


def tenures(database_url: str, group_ids: Collection[str], last: int) -> list[Tenure]:
    """Return the last terms of some groups, of each the newest first."""
    from taskadapter.coordination.overview import read_tenures

    return ask(database_url, lambda connection: read_tenures(connection, group_ids, last))


def successors(database_url: str, group_id: str, within: float) -> list[str]:
    """Return the nodes that may run what a group's holder cannot; see `overview.read_successors`."""
    from taskadapter.coordination.overview import read_successors

    return ask(database_url, lambda connection: read_successors(connection, group_id, within))


def give_up_tokens(database_url: str, held: Collection[Token], reason: str | None) -> None:
    """Enter why this node cannot run the jobs of groups, and leaves them to others; None: it can again."""
    from taskadapter.coordination import tokens

    ask(database_url, lambda connection: tokens.give_up(connection, held, reason))


def orphaned(database_url: str, interval: float) -> list[Entry]:
    """Return what nodes that are gone were executing without a group."""
    from taskadapter.coordination import ledger

    return ask(database_url, lambda connection: ledger.orphaned(connection, interval))


def skip(database_url: str, execution: Execution, owner: Owner, reason: str) -> bool:
    """Enter that a tick is not run, and why; return whether it is not: its body may have begun."""
    from taskadapter.coordination import ledger

    return ask(database_url, lambda connection: ledger.skip(connection, execution, owner, reason))


def give_up(database_url: str, execution: Execution, owner: Owner, outcome: str, reason: str) -> None:
    """Enter what came of an execution whose process is gone, begun or not, and why."""
    from taskadapter.coordination import ledger

    ask(database_url, lambda connection: ledger.give_up(connection, execution, owner, outcome, reason))


def withdraw(database_url: str, execution: Execution, owner: Owner, trigger_slug: str) -> None:
    """Have an execution begin anew that was entered, and whose body has not begun."""
    from taskadapter.coordination import ledger

    ask(database_url, lambda connection: ledger.withdraw(connection, execution, owner, trigger_slug))


def settle_for(
    database_url: str, execution: Execution, owner: Owner, came_to: End, trigger_slug: str | None
) -> None:
    """Enter what a body came to whose own process cannot."""
    from taskadapter.coordination import ledger

    ask(
        database_url,
        lambda connection: ledger.settle_for(connection, execution, owner, came_to, trigger_slug),
    )


def end_as_found(database_url: str, entry: Entry, outcome: str) -> None:
    """Enter what an execution came to that was found open, unless it has ended, or begun again, since."""
    from taskadapter.coordination import ledger

    ask(database_url, lambda connection: ledger.end_as_found(connection, entry, outcome))


def prune(database_url: str, seconds: float) -> None:
    """Forget what is over for longer than so many seconds: executions, jobs, and who took part."""
    from taskadapter.coordination import ledger, progress, pruning

    while ask(database_url, lambda connection: ledger.prune(connection, seconds)):
        pass
    ask(database_url, lambda connection: progress.prune(connection, seconds))
    for forget in (pruning.nodes, pruning.heartbeats, pruning.terms):
        while ask(database_url, partial(forget, seconds=seconds)):
            pass


def entered(database_url: str, job_ids: Iterable[UUID], limit: int) -> dict[UUID, Entered]:
    """Return what is entered of the ticks of each job, of the last ones as many as `limit` says."""
    from taskadapter.coordination import ledger, progress

    ids = {str(job_id): job_id for job_id in job_ids}

    def look(connection: Connection) -> tuple[dict[str, list[str]], dict[str, str]]:
        return ledger.dues(connection, ids, limit), progress.opened(connection, ids)

    dues, opened = ask(database_url, look)
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

    ask(database_url, lambda connection: progress.pause(connection, str(job_id), paused=paused))


def resumed(database_url: str, job_ids: Collection[UUID]) -> set[UUID]:
    """Return those of some jobs that were paused and are not any more."""
    from taskadapter.coordination import progress

    ids = [str(job_id) for job_id in job_ids]
    return set(map(UUID, ask(database_url, lambda connection: progress.resumed(connection, ids))))


def end_job(database_url: str, job_id: UUID, reason: str | None, trigger_slug: str | None = None) -> None:
    """End a job for all nodes, or let it go on, with None for a reason.

    Args:
        database_url: the coordination database.
        job_id: the job.
        reason: why it is over.
        trigger_slug: the trigger with which it is; with another one it goes on. None for every trigger.
    """
    from taskadapter.coordination import progress

    ask(database_url, lambda connection: progress.end(connection, str(job_id), reason, trigger_slug))


def jobs(database_url: str, slugs: Mapping[UUID, str]) -> dict[UUID, JobRow]:
    """Return the rows of those of some jobs that have one; `slugs` names each job's trigger."""
    from taskadapter.coordination import progress

    by_text = {str(job_id): slug for job_id, slug in slugs.items()}
    found = ask(database_url, lambda connection: progress.read(connection, by_text))
    return {UUID(job_id): row for job_id, row in found.items()}


def restart(database_url: str, job_id: UUID, trigger_slug: str, *, anew: bool) -> None:
    """Let a job go on that is over; `anew`: its executions are counted from one again."""
    from taskadapter.coordination import progress

    ask(database_url, lambda connection: progress.restart(connection, str(job_id), trigger_slug, anew=anew))


def seen(database_url: str, job_ids: Collection[UUID]) -> dict[UUID, Switches]:
    """Return what Prefect had of each job when it was looked at last."""
    from taskadapter.coordination import progress

    ids = [str(job_id) for job_id in job_ids]
    found = ask(database_url, lambda connection: progress.seen(connection, ids))
    return {UUID(job_id): switches for job_id, switches in found.items()}


def see(database_url: str, readings: Iterable[Reading]) -> None:
    """Carry over what has changed in Prefect since it was looked at last."""
    from taskadapter.coordination import progress

    def carry_over(connection: Connection) -> None:
        for reading in readings:
            job_id, switches = str(reading.job_id), reading.switches
            progress.see(connection, job_id, reading.trigger_slug, switches, reading.updated)

    ask(database_url, carry_over)


def claim_groups(
    database_url: str, pool: PoolKey, group_ids: Collection[str], former_id: str | None = None
) -> dict[str, str]:
    """Enter groups as a work pool's, and return those that are another's; see `nodes.claim_groups`."""
    from taskadapter.coordination import nodes

    return ask(database_url, lambda connection: nodes.claim_groups(connection, pool, group_ids, former_id))


def groups_of_others(database_url: str, pool: PoolKey, group_ids: Collection[str]) -> dict[str, str]:
    """Return those of some groups that are another pool's than this one, with its name."""
    from taskadapter.coordination import nodes

    return ask(database_url, lambda connection: nodes.groups_of_others(connection, pool, group_ids))


def take_over_group(
    database_url: str, pool: PoolKey, group_id: str, incarnation: str, within: float
) -> list[str]:
    """Enter a group as a pool's, unless live nodes of another have it; see `nodes.take_over_group`."""
    from taskadapter.coordination.nodes import take_over_group

    return ask(
        database_url, lambda connection: take_over_group(connection, pool, group_id, incarnation, within)
    )


def live_nodes(database_url: str, work_pool: str, within: float) -> list[str]:
    """Return the nodes that take part in groups of a work pool; none where that cannot be seen from here.

    Args:
        database_url: a database that is perhaps not used any more, and in which nothing is made.
        work_pool: the pool.
        within: in how many seconds they were seen.
    """
    from taskadapter.coordination.engines import url_of, would_make_file
    from taskadapter.coordination.overview import read_status

    try:
        if would_make_file(url_of(database_url)):
            return []
        with _transaction(database_url) as connection:
            nodes = read_status(connection, work_pool).nodes
    except CoordinationError:
        return []
    return [node.task_id for node in nodes if node.group_ids and node.lives(within)]


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


def connect(database_url: str) -> None:
    """Open a connection, ahead of the first question.

    Raises:
        CoordinationError: the database does not answer, or refuses.
    """
    from taskadapter.coordination.engines import connected

    with connected(_engine(database_url)):
        pass


def rehearse(database_url: str) -> None:
    """Find out once about a server what each process would that is forked from this one.

    It asks for nothing that another transaction could have locked: who calls this has others waiting.

    Raises:
        CoordinationError: the database does not answer, or refuses.
    """
    try:
        connect(database_url)
    finally:
        _engine(database_url).dispose()


def ask(database_url: str, question: Callable[[Connection], T]) -> T:
    """Ask in a transaction; where there are no tables yet, make them, or let others, and ask again."""
    try:
        with _transaction(database_url) as connection:
            return question(connection)
    except SchemaError:
        _create_tables(database_url)
    with _transaction(database_url) as connection:
        return question(connection)


@contextmanager
def _transaction(database_url: str) -> Iterator[Connection]:
    from taskadapter.coordination.engines import transaction

    with transaction(_engine(database_url)) as connection:
        yield connection


def _engine(url: str) -> Engine:
    """Return this process's engine: for SQLite one for each file that ever had the name."""
    from taskadapter.coordination.engines import identity_of, url_of

    return _engine_on(url, identity_of(url_of(url)))


@lru_cache(maxsize=8)
def _engine_on(url: str, _file: tuple[int, int] | None) -> Engine:
    """Make an engine.

    SQLAlchemy is imported here, by the processes that use it: Prefect imports our modules for each of
    its commands.
    """
    from taskadapter.coordination.engines import Timeouts, open_engine

    return open_engine(url, timeouts=Timeouts(idle=IDLE_SECONDS), pool_files=False)


def _create_tables(database_url: str) -> None:
    """Create the tables of a new database.

    Raises:
        SchemaError: it has some of them, and others are gone.
    """
    from taskadapter.coordination import schema
    from taskadapter.coordination.engines import connected

    with connected(_engine(database_url)) as connection:
        schema.create_missing(connection)
