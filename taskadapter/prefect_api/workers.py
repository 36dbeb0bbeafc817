"""The workers that poll a work pool, and those of them that do not coordinate with its nodes."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from taskadapter.prefect_api.client import all_pages

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import Worker

POLL_SECONDS = 30
"""How often a worker polls that does not say."""

LATELY = 1.5
"""After so many times as long it does not poll any more."""


async def workers_of(client: PrefectClient, work_pool: str) -> list[Worker]:
    """Return all that have ever polled a work pool."""
    return await all_pages(client.read_workers_for_work_pool, work_pool_name=work_pool)


def polled_ago(worker: Worker) -> float | None:
    """Return how many seconds ago a worker has polled its pool, as the server has it; None if never."""
    last = worker.last_heartbeat_time
    return None if last is None else max(0.0, (datetime.now(UTC) - last).total_seconds())


def polls(worker: Worker) -> bool:
    """Return whether a worker polls its pool; Prefect takes one that was stopped for online for longer."""
    age, every = polled_ago(worker) or 0.0, worker.heartbeat_interval_seconds or POLL_SECONDS
    return worker.status == "ONLINE" and age <= LATELY * every


def strangers(workers: Collection[Worker], nodes: Collection[str]) -> list[Worker]:
    """Return the workers that poll a pool now and are not among the nodes of its database."""
    return [worker for worker in workers if worker.name not in nodes and polls(worker)]
