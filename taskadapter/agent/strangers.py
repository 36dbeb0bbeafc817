"""Whether others poll a node's work pool who are not in its database: both would run the same jobs.

Somebody has forgotten to name the database on this machine, or on theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from taskadapter.agent.node import Node
from taskadapter.coordination import store
from taskadapter.coordination.messages import NAMED
from taskadapter.errors import listed
from taskadapter.prefect_api.workers import LATELY, POLL_SECONDS, strangers, workers_of
from taskadapter.settings import PREFIX

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Worker

    from taskadapter.coordination.overview import Status

ELSEWHERE = (
    "worker {names} polls work pool {pool!r}, and is no node in {where}, the default of this machine, in "
    "which nobody is active: both would run the same jobs. Name one database for all nodes, with {setting} "
    "or a listener's database_config; or stop {names}, and start this node again"
)
"""Why a node takes no part that would be active beside others."""

ALIVE_FOR = timedelta(seconds=15)
"""A worker that polls so long after it was first seen lives, and is not about to appear in the database."""

LOOK_SECONDS = 1.0
"""How long to wait between two looks whether they have."""


async def strangers_to(node: Node, database_url: str) -> list[Worker]:
    """Return the workers that poll a node's pool, and are no nodes in its database."""
    return await _strangers_to(node, await asyncio.to_thread(store.status, database_url))


async def _strangers_to(node: Node, status: Status) -> list[Worker]:
    workers = await workers_of(node.client, node.work_pool)
    return strangers(workers, {node.name, *(other.task_id for other in status.nodes)})


async def reason_to_stay_out(
    node: Node, database_url: str, where: str, names: Collection[str]
) -> str | None:
    """Return why a node is not to be active in a database that nobody has named; None if it may.

    It may where nobody else polls the pool, and where somebody is active. What has polled may have just
    begun, and appear here; or have ended, and poll no more: that is waited for.

    Args:
        node: the node, which stands by there for nothing yet.
        database_url: the database, the default of this machine.
        where: the same in words.
        names: the groups that it is to stand by for.
    """
    first_seen: dict[str, datetime] = {}
    while others := await _who_would_be_apart(node, database_url, names):
        if not first_seen:
            node.log.info(
                "Waiting for worker %s, which has polled the pool lately, to appear in %s or go.",
                listed([worker.name for worker in others], NAMED),
                where,
            )
        lives = [worker.name for worker in others if _lives(worker, first_seen)]
        if lives:
            known = listed(lives, NAMED)
            setting = f"{PREFIX}DATABASE_URL"
            return ELSEWHERE.format(names=known, pool=node.work_pool, where=where, setting=setting)
        await asyncio.sleep(LOOK_SECONDS)
    return None


async def _who_would_be_apart(node: Node, database_url: str, names: Collection[str]) -> list[Worker]:
    """Return the strangers to a database, unless somebody is active there for one of some groups."""
    status = await asyncio.to_thread(store.status, database_url)
    others = await _strangers_to(node, status)
    if not others:
        return []
    # A node was active until its last heartbeat, or until it has released the token.
    ages = [one.heartbeat_age for one in status.groups if one.group_id in names and one.holder]
    tenures = await asyncio.to_thread(store.tenures, database_url, names, last=1)
    ages += [one.released for one in tenures]
    # As lately as a stranger has polled that counts.
    is_active = any(age is not None and age <= LATELY * POLL_SECONDS for age in ages)
    return [] if is_active else others


def _lives(worker: Worker, first_seen: dict[str, datetime]) -> bool:
    """Return whether a worker has polled again since it was first seen, and not as one does that begins."""
    last = worker.last_heartbeat_time
    return last is not None and last - first_seen.setdefault(worker.name, last) >= ALIVE_FOR
