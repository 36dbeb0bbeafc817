"""What a work pool's own settings say: its type, its switches and limits, its timing, who polls it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL

from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.coordination.engines import url_of
from taskadapter.coordination.faults import where
from taskadapter.declare.backup import DEFAULT_QUEUE, WarmBackupConfig
from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.errors import CoordinationError, DeclarationError
from taskadapter.prefect_api.pool import OTHER_TYPE, Domain
from taskadapter.prefect_api.workers import polled_ago

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool, WorkQueue

    from taskadapter.doctor.server import Seen
    from taskadapter.settings import TaskadapterSettings

NEEDED = ("trigger", "initial_state")
"""What a template must hand on to the agent; without them a job of ours is run as any other flow."""


def start_command(pool: str) -> str:
    """Return the command that starts an agent."""
    return f"`prefect worker start --pool {shlex.quote(pool)} --type {WarmBackupWorker.type}`"


def groups_of(queues: list[WorkQueue]) -> list[str]:
    """Return the groups among a pool's queues."""
    return sorted({queue.name for queue in queues} - {DEFAULT_QUEUE})


def look_at_pool(seen: Seen, living: Collection[str]) -> Iterator[Finding]:
    """Say what is wrong with a work pool and its queues, and whether agents poll it.

    Args:
        seen: the pool.
        living: the nodes that show life in the coordination database.
    """
    pool = seen.pool
    if pool.type != WarmBackupWorker.type:
        yield error(OTHER_TYPE.format(name=pool.name, type=pool.type))
        return
    has_jobs = bool(seen.jobs or seen.others)
    found = [
        *_template(pool),
        *_timing(pool),
        *_closed("work-pool", pool, is_used=has_jobs),
        *_queues(seen),
    ]
    yield from found or [ok(f"work pool {pool.name!r} is of type {pool.type!r}")]
    if has_jobs and not any(worker.status == "ONLINE" for worker in seen.workers):
        yield _not_polled(seen, living)


def _not_polled(seen: Seen, living: Collection[str]) -> Finding:
    """Say that no agent polls a pool: after a server was away its record of them is older than they are."""
    name, ages = seen.pool.name, map(polled_ago, seen.workers)
    names = sorted(worker.name for worker in seen.workers if worker.name in living)
    if not names:
        return error(f"no agent polls work pool {name!r}; start one: {start_command(name)}")
    since = min((age for age in ages if age is not None), default=0.0)
    return warning(
        f"no agent has polled work pool {name!r} for {since:.0f} s, though {', '.join(names)} "
        f"show{'s' * (len(names) == 1)} life in the database: wait a minute if the server was away; else "
        "the agents do not reach it, and their log says why"
    )


def _template(pool: WorkPool) -> Iterator[Finding]:
    handed_on: dict[str, Any] = pool.base_job_template.get("job_configuration") or {}
    lost = [name for name in NEEDED if name not in handed_on]
    if lost:
        lines = ", ".join(f'"{name}": "{{{{ {name} }}}}"' for name in lost)
        yield error(
            f"the template of work pool {pool.name!r} does not hand on {' and '.join(lost)}, and agents "
            f"run its jobs without; write {lines} into its job_configuration, in the UI or with `prefect "
            "work-pool update --base-job-template`"
        )


def _timing(pool: WorkPool) -> Iterator[Finding]:
    try:
        _checked_timing(pool)
    except DeclarationError as fault:
        yield error(f"the variables of work pool {pool.name!r}: {fault}")


def _checked_timing(pool: WorkPool) -> WarmBackupConfig:
    """Return the timing of a pool, in which somebody may have edited what a declaration is not allowed.

    Raises:
        DeclarationError: somebody has.
    """
    domain = Domain.of(pool)
    return WarmBackupConfig(
        group_id="any",
        task_id="any",
        liveness_check_interval=domain.liveness_check_interval,
        heartbeat_frequency=domain.heartbeat_frequency,
    )


def liveness_of(pool: WorkPool) -> float:
    """Return after how many seconds without heartbeat a node of a pool is taken for dead."""
    try:
        return _checked_timing(pool).liveness_check_interval
    except DeclarationError:  # which is a finding of its own
        return Domain().liveness_check_interval


def _queues(seen: Seen) -> Iterator[Finding]:
    option = f" --pool {shlex.quote(seen.pool.name)}"
    for queue in sorted(seen.queues, key=lambda queue: queue.name):
        yield from _closed("work-queue", queue, option, is_used=queue.name in seen.used)


def _closed(
    kind: str, found: WorkPool | WorkQueue, option: str = "", *, is_used: bool
) -> Iterator[Finding]:
    """Say that a pool, or a queue, lets nothing through; nothing waits for it where no job is in it."""
    what = f"{kind.replace('-', ' ')} {found.name!r}"
    of, said = f"{shlex.quote(found.name)}{option}", error if is_used else warning
    if found.is_paused:
        yield said(f"{what} is paused, and its jobs wait; `prefect {kind} resume {of}`")
    if found.concurrency_limit == 0:
        yield said(
            f"{what} has a concurrency limit of 0, and its jobs wait; "
            f"`prefect {kind} clear-concurrency-limit {of}`"
        )


def source_of(pool: WorkPool | None, settings: TaskadapterSettings) -> str:
    """Say where the database is named."""
    if settings.database_url is not None or pool is None:
        return "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL"
    return f"the variable database of work pool {pool.name!r}"


def look_at_names(pool: WorkPool, settings: TaskadapterSettings) -> Iterator[Finding]:
    """Say what is wrong with how a pool and this machine name the database."""
    named = _url(Domain.of(pool).database)
    if named is not None and named.password is not None:
        yield warning(
            f"the variable database of work pool {pool.name!r} has a password, which everybody who sees "
            "the pool can read; declare it in a listener's database_config, which has a Secret block for it"
        )
    own = _url(settings.database_url.get_secret_value()) if settings.database_url else None
    if named is not None and own is not None and _place(own) != _place(named):
        yield warning(
            f"PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL names {where(own)}, and work pool "
            f"{pool.name!r} {where(named)}: nodes with different ones run the same "
            "jobs; unset it, or set it on all nodes"
        )


def _place(url: URL) -> tuple[object, ...]:
    return url.drivername, url.host, url.port, url.database


def _url(text: str | None) -> URL | None:
    """Return a URL; None for one that cannot be used, which is told where it is used."""
    try:
        return None if text is None else url_of(str(text))
    except CoordinationError:
        return None
