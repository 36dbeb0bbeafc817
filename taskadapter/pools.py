"""The work pool: made on first use, by whoever comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from taskadapter.errors import TaskError
from taskadapter.worker import WarmBackupWorker

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEFAULT_QUEUE = "default"
"""The queue of jobs without a group: every agent polls it."""


def ensure_work_pool(name: str) -> None:
    """Make the work pool unless it is there.

    Args:
        name: the pool's name.

    Raises:
        TaskError: there is a pool of that name and another type: its workers would run the jobs
            without coordination.
    """
    with get_client(sync_client=True) as client:
        kind = _kind_of(client, name)
    if kind != WarmBackupWorker.type:
        raise TaskError(
            f"work pool {name!r} is of type {kind!r}, and {WarmBackupWorker.type!r} is needed; name "
            "another pool with work_pool=, or delete that one."
        )


def _kind_of(client: SyncPrefectClient, name: str) -> str:
    try:
        return client.read_work_pool(name).type
    except ObjectNotFound:
        pool = WorkPoolCreate(
            name=name,
            type=WarmBackupWorker.type,
            base_job_template=WarmBackupWorker.get_default_base_job_template(),
        )
    try:
        return client.create_work_pool(pool).type
    except ObjectAlreadyExists:
        return client.read_work_pool(name).type
