"""What the coordination database says: its tables, its rights, its groups and nodes."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from taskadapter.agent.switches import reading_of
from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.coordination import ledger, progress, schema
from taskadapter.coordination.engines import open_engine, transaction, would_make_file
from taskadapter.coordination.faults import where
from taskadapter.coordination.messages import FOREIGN_GROUP, NAMED, UNSEEN_GROUP, PoolKey
from taskadapter.coordination.nodes import FORGOTTEN_SECONDS, groups_of_others
from taskadapter.coordination.overview import (
    GivenUp,
    Status,
    check_rights,
    given_up_lately,
    read_status,
    seen_lately,
)
from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.doctor.late import look_at_late
from taskadapter.doctor.pool import groups_of, liveness_of, start_command
from taskadapter.errors import CoordinationError, SchemaError, listed
from taskadapter.prefect_api.pool import Domain
from taskadapter.prefect_api.workers import LATELY, POLL_SECONDS, polled_ago, polls, strangers
from taskadapter.settings import PREFIX

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Worker, WorkPool
    from sqlalchemy import Engine

    from taskadapter.coordination.progress import JobRow
    from taskadapter.doctor.server import Seen


BLIND = (
    "nodes that are up leave it while Prefect's API does not answer, and take it when it does: mend that"
)
"""What there is to do about a group without an active node, where the API is away."""


@dataclass(frozen=True)
class Facts:
    """What was read of a database.

    Attributes:
        missing: the tables that it lacks; without them there is nothing else.
        is_new: whether it has none of ours yet; else what is missing is gone.
        is_narrow: whether columns have less room than ours.
        status: groups and nodes.
        foreign: groups of another pool, by name, with that pool's.
        jobs: the rows of the pool's jobs, by their ids.
        lasts: the last tick of each job that is entered.
        given_up: which nodes have given which group up lately.
    """

    missing: tuple[str, ...] = ()
    is_new: bool = True
    is_narrow: bool = False
    status: Status = field(default_factory=lambda: Status((), ()))
    foreign: dict[str, str] | None = None
    jobs: Mapping[str, JobRow] = field(default_factory=dict)
    lasts: Mapping[str, datetime] = field(default_factory=dict)
    given_up: Collection[GivenUp] = ()


def look_at_database(
    url: str, source: str, work_pool: str, seen: Seen | None, *, is_named: bool = True
) -> tuple[list[Finding], Facts]:
    """Say what is wrong with a database, and with the groups and nodes in it; return what was read, too.

    Args:
        url: with its password.
        source: where it is named.
        work_pool: the work pool's name.
        seen: the work pool; None where the server cannot be asked: then the database says which groups it
            has, and its timing is that of a pool that declares none.
        is_named: whether pool or settings name it; else it is this machine's own, and perhaps no node's.
    """
    try:
        engine = open_engine(url)
    except CoordinationError as fault:
        return [error(f"{source}: {fault}")], Facts()
    try:
        facts = _read(engine, work_pool, seen)
        if not is_named and seen is not None and (said := not_named(engine, seen.pool, seen.workers)):
            return [error(said)], Facts()
        found = list(_findings(engine, facts, work_pool, seen))
        if seen is not None and facts.lasts:
            found += look_at_late(engine, seen, facts.jobs, facts.lasts)
    except CoordinationError as fault:
        return [error(fault)], Facts()
    finally:
        engine.dispose()
    return found, facts


def _findings(engine: Engine, facts: Facts, work_pool: str, seen: Seen | None) -> Iterator[Finding]:
    groups = groups_of(seen.queues) if seen else [group.group_id for group in facts.status.groups]
    yield _tables(engine, facts, groups)
    if facts.missing:
        return
    within = liveness_of(seen.pool) if seen else Domain().liveness_check_interval
    if seen is None and facts.status.nodes:
        yield ok(f"groups and nodes are by the database alone; one counts as dead after {within:g} s")
    # Nodes that live leave their groups while Prefect's API does not answer.
    is_blind = seen is None and bool(facts.status.living(within))
    for name in groups:
        is_used = seen is None or name in seen.used
        yield _group(name, facts, work_pool, within, is_used=is_used, is_blind=is_blind)
        yield from _unable(name, facts, within)
    workers = (
        {worker.name for worker in seen.workers} if seen else {one.task_id for one in facts.status.nodes}
    )
    yield from _silent(workers, groups, facts.status, within)
    if seen is not None:
        yield from _strangers(seen.workers, facts.status)


def _read(engine: Engine, work_pool: str, seen: Seen | None) -> Facts:
    """Read all at once.

    Raises:
        CoordinationError: the database fails, refuses, or has tables of another release.
    """
    if would_make_file(engine.url):
        return Facts(tuple(sorted(schema.metadata.tables)))
    with transaction(engine) as connection:
        try:
            schema.require_version(connection, new=True)
        except SchemaError as fault:
            raise SchemaError(f"{where(engine.url)}: {fault}") from None
        if missing := schema.missing_tables(connection):
            return Facts(missing, is_new=not schema.has_had_tables(connection))
        check_rights(connection)
        is_narrow = bool(schema.upgrades(connection))
        pool = PoolKey(work_pool, str(seen.pool.id) if seen else None)
        foreign = groups_of_others(connection, pool, groups_of(seen.queues) if seen else [])
        readings = map(reading_of, seen.jobs if seen else ())
        slugs = {str(reading.job_id): reading.trigger_slug for reading in readings}
        jobs = progress.read(connection, slugs)
        dues = ledger.dues(connection, slugs, 1).items() if slugs else ()
        lasts = {job_id: datetime.fromisoformat(last) for job_id, (last, *_) in dues}
        # Without the pool's queues nothing else says which of the groups are its own.
        status = read_status(connection, work_pool if seen is None else None)
        own = {one.group_id for one in status.groups} - foreign.keys()
        return Facts((), False, is_narrow, status, foreign, jobs, lasts, given_up_lately(connection, own))


def _tables(engine: Engine, facts: Facts, groups: list[str]) -> Finding:
    name = where(engine.url)
    if facts.missing and not facts.is_new:
        return error(f"{name}: {schema.LOST.format(missing=', '.join(facts.missing))}")
    if facts.missing:
        return warning(
            f"{name} lacks {', '.join(facts.missing)}; `taskadapter db init` makes them, as an agent does "
            "that may"
        )
    if facts.is_narrow:
        return warning(f"{name} has narrower columns than it should; run `taskadapter db upgrade`")
    if engine.dialect.name == "sqlite" and groups:
        return warning(f"{name} coordinates the agents of this machine only; name a server for more")
    return ok(f"{name} answers, with its tables")


def _group(
    name: str, facts: Facts, work_pool: str, within: float, *, is_used: bool, is_blind: bool
) -> Finding:
    """Say who is active for a group, and who stands by.

    Args:
        name: the group.
        facts: what the database has.
        work_pool: its work pool's name.
        within: a node that has shown life in so many seconds is not dead.
        is_used: whether a deployment is in it.
        is_blind: whether nodes are up that, as far as is known, do not reach the API.
    """
    if facts.foreign and (other := facts.foreign.get(name)) is not None:
        if other != work_pool:
            return error(FOREIGN_GROUP.format(name=name, other=other))
        if living := [
            one.task_id for one in facts.status.nodes if name in one.group_ids and one.lives(within)
        ]:
            return error(UNSEEN_GROUP.format(name=name, other=other, nodes=listed(living, NAMED)))
    start = start_command(work_pool)
    remedy = f"start an agent: {start}" if not is_blind else BLIND
    found = next((group for group in facts.status.groups if group.group_id == name), None)
    has_node = found is not None and found.holder is not None and (found.heartbeat_age or 0) <= within
    if not is_used and not has_node:
        return warning(
            f"group {name!r} has no deployment, and no active node; `prefect work-queue delete "
            f"{shlex.quote(name)} --pool {shlex.quote(work_pool)}`"
        )
    if found is None or found.holder is None:
        return error(f"group {name!r} has no active node; {remedy}")
    if found.heartbeat_age is None or found.heartbeat_age > within:
        since = "never" if found.heartbeat_age is None else f"{found.heartbeat_age:.0f} s ago"
        return error(
            f"group {name!r} has no active node: {found.holder!r} was last seen {since}, and nobody took "
            f"over; {remedy}"
        )
    standing_by = len(facts.status.standing_by(within).get(name, []))
    if not standing_by:
        return warning(
            f"group {name!r}: {found.holder!r} is active, and nobody stands by; start another agent, on "
            f"another machine: {start}"
        )
    return ok(f"group {name!r}: {found.holder!r} is active, {standing_by} standing by")


def _unable(name: str, facts: Facts, within: float) -> Iterator[Finding]:
    """Name the nodes that stand by for a group, and have given it up lately."""
    given_up = {one.task_id: one for one in facts.given_up if one.group_id == name}
    for node in facts.status.standing_by(within).get(name, []):
        if (last := given_up.get(node)) is not None:
            yield warning(
                f"node {node!r} gave group {name!r} up {last.released:.0f} s ago: "
                f"{last.reason.removesuffix('.')}. It takes the group all the same if the holder stops; "
                "see its log, and mend that"
            )


def _silent(ours: Collection[str], groups: list[str], status: Status, within: float) -> Iterator[Finding]:
    """Name the nodes of a pool, its workers or in its groups, that have not left, and show no life."""
    for node in status.nodes:
        is_ours = node.task_id in ours or not set(groups).isdisjoint(node.group_ids)
        if is_ours and not node.lives(within) and node.last_seen_age < FORGOTTEN_SECONDS:
            yield warning(
                f"node {node.task_id!r} is silent for {node.last_seen_age:.0f} s (process {node.pid} on "
                f"host {node.host!r}): it was killed, stands still, or does not reach the database; see "
                "its log and its machine, and start it again"
            )


def not_named(engine: Engine, pool: WorkPool, workers: Collection[Worker]) -> str | None:
    """Say that the workers which poll a pool have another database than this machine's own; None if not.

    Raises:
        CoordinationError: the database cannot be read.
    """
    names = sorted(worker.name for worker in workers if polls(worker))
    if not names or not _seen_lately(engine, pool).isdisjoint(names):
        return None
    return (
        f"the database of {', '.join(names)} is not named here, nor in the work pool, and what is told of "
        f"it would be this machine's own, {where(engine.url)}; set {PREFIX}DATABASE_URL as it is set for "
        "them, unless they have been stopped since."
    )


def _seen_lately(engine: Engine, pool: WorkPool) -> set[str]:
    """Return the nodes that a database has seen while they may have polled a pool: others may be old."""
    if would_make_file(engine.url):
        return set()
    with transaction(engine) as connection:
        if schema.missing_tables(connection):
            return set()
        return seen_lately(connection, max(liveness_of(pool), LATELY * POLL_SECONDS))


def _strangers(workers: list[Worker], status: Status) -> Iterator[Finding]:
    """Name the workers that poll the pool and do not coordinate with its nodes."""
    for worker in strangers(workers, {node.task_id for node in status.nodes}):
        yield warning(
            f"worker {worker.name!r} has polled the pool {polled_ago(worker) or 0:.0f} s ago, and is no "
            "node in its database; unless it was stopped since, it has another type or another database, "
            f"and both may run the same jobs: stop it, and start it with --type {WarmBackupWorker.type} "
            "and the settings of the other nodes"
        )
