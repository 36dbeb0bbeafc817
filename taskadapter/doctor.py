"""What `taskadapter doctor` looks at: each check says what it found, and how to put it right."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import prefect
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from sqlalchemy import Engine

from taskadapter import deploy
from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.coordination import schema
from taskadapter.coordination.dialects import open_engine, transaction
from taskadapter.coordination.messages import FOREIGN_GROUP
from taskadapter.coordination.tokens import Status, groups_of_others, read_status
from taskadapter.declare.triggers import DEFAULT_QUEUE
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.prefect_api.client import api_client
from taskadapter.prefect_api.deployments import jobs_of_pool, queue_names, stored_trigger
from taskadapter.prefect_api.pool import Domain
from taskadapter.settings import TaskadapterSettings, check_interval

if TYPE_CHECKING:
    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

CLOCK_SECONDS = 2.0
"""How far this machine's clock may be from the server's; the server tells its own in whole seconds."""


class Level(StrEnum):
    """How much a finding matters: a warning works today, an error does not."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What one check found; `text` has the remedy where one is needed."""

    level: Level
    text: str


async def examine(pool_name: str, flows: Path, file: Path) -> AsyncIterator[Finding]:
    """Look at everything that a pool's jobs need; what builds on something that fails is not looked at.

    Args:
        pool_name: the work pool.
        flows: the folder of flow modules; nothing is said of it where there is none.
        file: the rendered prefect.yaml.
    """
    for finding in _project(flows, file):
        yield finding
    try:
        async with api_client() as client:
            yield await _server(client)
            yield await _clock(client)
            try:
                pool = await client.read_work_pool(pool_name)
            except ObjectNotFound:
                yield _error(
                    f"there is no work pool {pool_name!r}; deploy, or start an agent, which makes it, or "
                    "name another with --pool"
                )
                return
            yield _pool(pool)
            jobs = await jobs_of_pool(client, pool_name)
            for finding in _jobs(jobs):
                yield finding
            queues = await queue_names(client, pool_name)
            url = await Domain.of(pool).database_url(TaskadapterSettings())
        groups = sorted(queues - {DEFAULT_QUEUE})
        for finding in _database(open_engine(url), groups, pool):
            yield finding
    except TaskError as error:
        yield _error(str(error))


def _project(flows: Path, file: Path) -> Iterator[Finding]:
    if not flows.is_dir():
        return
    try:
        text = deploy.render(flows, file)
    except DeclarationError as error:
        yield _error(str(error))
        return
    if file.exists() and file.read_text(encoding="utf-8") == text:
        yield _ok(f"{file} is what {flows}/ declares")
    else:
        yield _warning(f"{file} is not what {flows}/ declares; run `taskadapter render`, and deploy")


async def _server(client: PrefectClient) -> Finding:
    url, theirs, ours = get_current_settings().api.url, await client.api_version(), prefect.__version__
    if theirs != ours:
        return _warning(
            f"Prefect's API at {url} has version {theirs}, and {ours} is installed here; install the same"
        )
    return _ok(f"Prefect's API at {url} answers, in version {theirs}")


async def _clock(client: PrefectClient) -> Finding:
    answer = await client.hello()
    seconds = (datetime.now(UTC) - parsedate_to_datetime(answer.headers["date"])).total_seconds()
    # It is cut to a second, and the answer took its time.
    if not -CLOCK_SECONDS < seconds < 1 + CLOCK_SECONDS:
        return _warning(
            f"this machine's clock is {seconds:+.0f} s from the server's, and runs start by it; keep both "
            "right, with NTP"
        )
    return _ok("this machine's clock agrees with the server's")


def _pool(pool: WorkPool) -> Finding:
    if pool.type != WarmBackupWorker.type:
        return _error(
            f"work pool {pool.name!r} is of type {pool.type!r}, whose workers run jobs uncoordinated; name "
            "another pool, or delete that one and deploy again"
        )
    if pool.is_paused:
        return _warning(f"work pool {pool.name!r} is paused; `prefect work-pool resume {pool.name}`")
    return _ok(f"work pool {pool.name!r} is of type {pool.type!r}")


def _jobs(jobs: list[DeploymentResponse]) -> Iterator[Finding]:
    for job in jobs:
        try:
            trigger = stored_trigger(job.job_variables)
            if trigger is None:
                yield _error(f"job {job.name!r} has lost its trigger; deploy it again")
            elif job.schedules:
                check_interval(trigger.interval)
        except DeclarationError as error:
            yield _error(f"job {job.name!r}: {error}, and deploy it again")
    if not jobs:
        yield _warning("the pool has no jobs; deploy some")
        return
    paused = sorted(job.name for job in jobs if job.paused)
    yield _ok(f"{len(jobs)} job(s)" + (f", paused: {', '.join(paused)}" if paused else ""))


def _database(engine: Engine, groups: list[str], pool: WorkPool) -> Iterator[Finding]:
    where = engine.url.render_as_string()  # without the password
    with transaction(engine) as connection:
        if 0 < (found := schema.version(connection)) != schema.VERSION:
            yield _error(
                f"{where} has tables of version {found}, and this release needs {schema.VERSION}; run "
                "`taskadapter db upgrade`, with the newest release that a node has"
            )
            return
        missing = schema.missing_tables(connection)
        if missing:
            yield _warning(
                f"{where} lacks {', '.join(missing)}; `taskadapter db init` makes them, as an agent does "
                "that may"
            )
            return
        narrow = schema.upgrades(connection)
        status = read_status(connection)
        foreign = groups_of_others(connection, pool.name, groups)
    if narrow:
        yield _warning(f"{where} has narrower columns than it should; run `taskadapter db upgrade`")
    elif engine.dialect.name == "sqlite" and groups:
        yield _warning(f"{where} coordinates the agents of this machine only; name a server for more")
    else:
        yield _ok(f"{where} answers, with its tables")
    for name in groups:
        if name in foreign:
            yield _error(FOREIGN_GROUP.format(name=name, other=foreign[name]))
        else:
            yield _group(name, status, Domain.of(pool))


def _group(name: str, status: Status, domain: Domain) -> Finding:
    holder = next((group.holder for group in status.groups if group.group_id == name), None)
    alive = {
        node.task_id
        for node in status.nodes
        if name in node.group_ids and node.last_seen_age < domain.liveness_check_interval
    }
    if holder is None:
        return _error(f"group {name!r} has no active node; start an agent")
    if not alive - {holder}:
        return _warning(f"group {name!r}: {holder!r} is active, and nobody stands by; start another agent")
    return _ok(f"group {name!r}: {holder!r} is active, {len(alive - {holder})} standing by")


def _ok(text: str) -> Finding:
    return Finding(Level.OK, f"{text}.")


def _warning(text: str) -> Finding:
    return Finding(Level.WARNING, f"{text}.")


def _error(text: str) -> Finding:
    return Finding(Level.ERROR, f"{text.removesuffix('.')}.")
