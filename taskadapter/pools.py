"""The work pool: made on first use, by whoever comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect.blocks.system import Secret
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.utilities.asyncutils import run_coro_as_sync

from taskadapter.api import sync_api_client
from taskadapter.domain import Domain, PoolSize
from taskadapter.errors import TaskError
from taskadapter.worker import WarmBackupWorker

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool


def ensure_work_pool(
    name: str,
    domain: Domain | None = None,
    password: str | None = None,
    *,
    size: PoolSize | None = None,
) -> None:
    """Make the work pool unless it is there, and keep its coordination and size as declared.

    Args:
        name: the pool's name.
        domain: the database and timing of its groups; None leaves them as they are.
        password: of that database, for the `Secret` block that the domain names.
        size: what its nodes run at once; None leaves it as it is.

    Raises:
        TaskError: there is a pool of that name and another type: its workers would run the jobs
            without coordination.
    """
    with sync_api_client() as client:
        pool = _read_or_make(client, name, domain or Domain())
        if pool.type != WarmBackupWorker.type:
            raise TaskError(
                f"work pool {name!r} is of type {pool.type!r}, and {WarmBackupWorker.type!r} is needed; "
                "name another pool with work_pool=, or delete that one."
            )
        template = pool.base_job_template
        if domain is not None and Domain.of(pool) != domain:
            template = domain.put_into(template)
        if size is not None and PoolSize.of(pool) != size:
            template = size.put_into(template)
        if template is not pool.base_job_template:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    if domain is not None and domain.password_block is not None and password is not None:
        # Also called while an event loop is running, when `prefect deploy` imports a flow.
        run_coro_as_sync(Secret(value=password).asave(domain.password_block, overwrite=True))


def _read_or_make(client: SyncPrefectClient, name: str, domain: Domain) -> WorkPool:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        template = domain.put_into(WarmBackupWorker.get_default_base_job_template())
        pool = WorkPoolCreate(name=name, type=WarmBackupWorker.type, base_job_template=template)
    try:
        return client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return client.read_work_pool(name)
