"""The work pool and its queues: made on first use, by whoever comes first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from prefect.blocks.system import Secret
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_logger

from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.coordination import store
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import TaskError, listed
from taskadapter.prefect_api.client import all_pages, api_client, run_sync
from taskadapter.prefect_api.locks import lock
from taskadapter.prefect_api.pool import Domain, PoolSize
from taskadapter.settings import TaskadapterSettings

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import WorkPool

_log = get_logger("taskadapter")


def ensure_work_pool(
    name: str,
    domain: Domain | None = None,
    password: str | None = None,
    *,
    size: PoolSize | None = None,
    queue: str | None = None,
) -> None:
    """Do what `aensure_work_pool` does, from code that is not async."""

    async def ensure() -> None:
        async with api_client() as client:
            await aensure_work_pool(client, name, domain, password, size=size, queue=queue)

    run_sync(ensure())


async def aensure_work_pool(
    client: PrefectClient,
    name: str,
    domain: Domain | None = None,
    password: str | None = None,
    *,
    size: PoolSize | None = None,
    queue: str | None = None,
) -> None:
    """Make the work pool unless it is there, and keep its coordination and size as declared.

    Args:
        client: connected to the API.
        name: the pool's name.
        domain: the database and timing of its groups; None leaves them as they are.
        password: of that database, for the `Secret` block that the domain names.
        size: what its nodes run at once; None leaves it as it is.
        queue: a queue that it is to have; None for none but its default one.

    Raises:
        TaskError: there is a pool of that name and another type: its workers would run the jobs
            without coordination. Or nodes coordinate through another database now: they would go on with
            counts, states and terms from the start, or stand still where they cannot reach the new one.
    """
    pool = await _read_or_make(client, name, domain or Domain())
    if pool.type != WarmBackupWorker.type:
        raise TaskError(
            f"work pool {name!r} is of type {pool.type!r}, and {WarmBackupWorker.type!r} is needed; "
            "name another pool with work_pool=, or delete that one."
        )
    if _differs(pool, domain, size):
        async with lock(client, f"the template of work pool {name}"):
            await _change(client, name, domain, size)
    if domain is not None and domain.password_block is not None and password is not None:
        await _keep_password(client, domain.password_block, password)
    if queue is not None:
        await _ensure_queue(client, name, queue)


async def _read_or_make(client: PrefectClient, name: str, domain: Domain) -> WorkPool:
    try:
        return await client.read_work_pool(name)
    except ObjectNotFound:
        template = domain.put_into(WarmBackupWorker.get_default_base_job_template())
        pool = WorkPoolCreate(name=name, type=WarmBackupWorker.type, base_job_template=template)
    try:
        return await client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return await client.read_work_pool(name)


def _differs(pool: WorkPool, domain: Domain | None, size: PoolSize | None) -> bool:
    return domain not in (None, Domain.of(pool)) or size not in (None, PoolSize.of(pool))


async def _refuse_another_database(pool: WorkPool, domain: Domain) -> None:
    before, settings = Domain.of(pool), TaskadapterSettings()
    # Where the environment names it, what the pool has is not what counts.
    if settings.database_url is not None or domain.database == before.database:
        return
    try:
        url = await before.database_url(settings)
    except TaskError:
        return  # its password is gone, and with it whoever could see the nodes
    nodes = await asyncio.to_thread(store.live_nodes, url, pool.name, before.liveness_check_interval)
    if nodes:
        raise TaskError(another_database(pool.name, nodes, before.database, domain.database))


def another_database(pool: str, nodes: list[str], known: str | None, wanted: str | None) -> str:
    """Say that nodes coordinate through one database, and that a listener wants another.

    Args:
        pool: the work pool's name.
        nodes: those that live in the one that it has.
        known: that database; None where the pool names none.
        wanted: the other one; None where the listener names none.
    """
    # What neither names is a file of each node's own machine.
    theirs = "the default database, as the pool names none" if known is None else f"database {known}"
    other = "The default one, which this listener wants," if wanted is None else f"Database {wanted}"
    remedy = "leave its database_config out" if known is None else "name the same database"
    return (
        f"the nodes of work pool {pool!r} ({listed(nodes)}) coordinate through {theirs}. {other} has "
        "none of their counts and states. Give this listener a work_pool= of its own, "
        f"{remedy}, or stop those nodes first."
    )


async def _change(client: PrefectClient, name: str, domain: Domain | None, size: PoolSize | None) -> None:
    """Change the pool's template, of which somebody else may have changed another part."""
    pool = await client.read_work_pool(name)
    template = pool.base_job_template
    if domain is not None:
        await _refuse_another_database(pool, domain)
        await _tell(client, name, Domain.of(pool), domain)
        template = domain.put_into(template)
    if size is not None:
        template = size.put_into(template)
    await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


async def _tell(client: PrefectClient, name: str, before: Domain, after: Domain) -> None:
    """Tell what changes for the groups that a pool has already: another project may have declared them."""
    queues = await all_pages(client.read_work_queues, work_pool_name=name)
    groups = sorted(queue.name for queue in queues if queue.name != DEFAULT_QUEUE)
    was = before.unlike(after)
    changes = [f"{what} {was[what]} → {value}" for what, value in after.unlike(before).items()]
    if groups and changes:
        _log.warning(
            "Work pool %s: %s, for all its groups: %s. A second project wants a pool of its own.",
            name,
            ", ".join(changes),
            ", ".join(groups),
        )


async def _keep_password(client: PrefectClient, block: str, password: str) -> None:
    if await _kept_password(block) != password:
        async with lock(client, f"block {block}"):
            await Secret(value=password).asave(block, overwrite=True)


async def _kept_password(block: str) -> str | None:
    try:
        kept: Any = await Secret.aload(block)
    except ValueError:  # there is no such block
        return None
    return str(kept.get())


async def _ensure_queue(client: PrefectClient, pool: str, queue: str) -> None:
    try:
        await client.read_work_queue_by_name(queue, pool)
    except ObjectNotFound:
        try:
            await client.create_work_queue(queue, work_pool_name=pool)
        except ObjectAlreadyExists:
            return
