"""What `taskadapter doctor` looks at: each check says what it found, and how to put it right.

What is read, of the project, the server and the database, is apart from what is said of it. A check that
builds on something that fails is left out; all others are made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from taskadapter.doctor import server
from taskadapter.doctor.database import Facts, look_at_database
from taskadapter.doctor.findings import Finding, Level, error
from taskadapter.doctor.jobs import look_at_jobs
from taskadapter.doctor.pool import liveness_of, look_at_names, look_at_pool, source_of
from taskadapter.doctor.project import (
    declared_for,
    not_declared,
    not_deployed,
    read_project,
    read_settings,
    rendered_file,
)
from taskadapter.errors import CoordinationError, TaskError
from taskadapter.prefect_api.faults import FAULTS, explain
from taskadapter.prefect_api.pool import Domain
from taskadapter.settings import DEFAULT_WORK_POOL, TaskadapterSettings

__all__ = ["Finding", "Level", "examine"]


async def examine(pool_name: str | None, flows: Path, given: Path | None) -> AsyncIterator[Finding]:
    """Look at everything that a pool's jobs need.

    Args:
        pool_name: the work pool; None for the settings' one.
        flows: the folder of flow modules; the project is left out where there is none.
        given: the rendered prefect.yaml; None for one that we made and that is here.
    """
    file = rendered_file(given)
    settings, found = read_settings()
    declared, said = read_project(flows, file)
    for finding in found + said:
        yield finding
    name = pool_name or (settings.work_pool if settings else DEFAULT_WORK_POOL)
    seen, found = await server.read(name)
    for finding in found:
        yield finding
    found, facts = ([], Facts()) if settings is None else await _database(settings, name, seen)
    if seen is not None:
        living = facts.status.living(liveness_of(seen.pool))
        for finding in (*look_at_pool(seen, living), *look_at_jobs(seen.jobs, seen.others, facts.jobs)):
            yield finding
        if declared is not None:
            jobs = {job.name: job for job in seen.jobs}
            for finding in (
                *not_deployed(declared_for(declared, name), jobs, name, file),
                *not_declared(declared, seen, flows),
            ):
                yield finding
    for finding in found:
        yield finding


async def _database(
    settings: TaskadapterSettings, name: str, seen: server.Seen | None
) -> tuple[list[Finding], Facts]:
    """Look at the database, if this machine or the pool names one; return what was read, too."""
    pool = seen.pool if seen else None
    source = source_of(pool, settings)
    if pool is None:
        own = settings.database_url
        if own is None:
            return [], Facts()
        return look_at_database(own.get_secret_value(), source, name, None)
    named = list(look_at_names(pool, settings))
    try:
        url = await Domain.of(pool).database_url(settings)
    except CoordinationError as fault:
        return [*named, error(f"{source}: {fault}")], Facts()
    except TaskError as fault:
        return [*named, error(fault)], Facts()
    except FAULTS as fault:
        return [*named, error(explain(fault, is_prefect=True))], Facts()
    found, facts = look_at_database(url, source, name, seen, is_named=Domain.of(pool).is_named(settings))
    return [*named, *found], facts
