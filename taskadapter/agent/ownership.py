"""Which groups of the coordination database are this node's work pool's, and which another's.

A group is one pool's only: the nodes of two pools would stand in for each other, and run none of each
other's jobs. It is entered under the pool's name and id; another server's pool may have the same name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from prefect.exceptions import ObjectNotFound

from taskadapter.agent.node import Node
from taskadapter.coordination import store
from taskadapter.coordination.messages import FOREIGN_GROUP, NAMED, UNSEEN_GROUP, PoolKey
from taskadapter.errors import listed
from taskadapter.prefect_api.pool import Domain

SILENT_SECONDS = 60.0
"""After so long without life, at least, a node of another server's pool is taken for dead.

That pool's timing is not seen from here.
"""


class Ownership:
    """The groups that are entered as those of a node's pool.

    Args:
        node: the node.

    Attributes:
        foreign: those that are another pool's as of the last look, each with the reason in words.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._database_url = ""
        self.foreign: Mapping[str, str] = {}
        # Groups that were this pool's at the last look, and its id at that.
        self._claimed: AbstractSet[str] = frozenset()
        self._pool_id: str | None = None

    def begin(self, database_url: str) -> None:
        """Take note of the database, of which nothing is known yet."""
        self._database_url, self._claimed = database_url, frozenset()

    async def ours(self, names: AbstractSet[str]) -> AbstractSet[str]:
        """Return those of some groups that are this pool's, and say which are another's.

        What was this pool's may be another server's by now: this node stood still, and was taken for dead.
        """
        foreign = {}
        pool, others = await self._owners(names)
        for name, other in others.items():
            refusal = await self._take_over(pool, name, other)
            if refusal is not None:
                foreign[name] = refusal
                if name not in self.foreign:
                    self._node.log.error("%s", refusal)
        self.foreign = foreign
        self._claimed = names - foreign.keys()
        return self._claimed

    async def _owners(self, names: AbstractSet[str]) -> tuple[PoolKey, dict[str, str]]:
        """Return the pool, with which of some groups are another's; those that are nobody's are claimed."""
        pool = PoolKey(self._node.work_pool, str(self._node.pool().id))
        if not names:
            return pool, {}
        others = await asyncio.to_thread(self._others, pool, names)
        if pool.name in others.values():
            # It is another server's, or this one's, made anew, and another node has seen that first.
            known = await self._node.client.read_work_pool(pool.name)
            pool = PoolKey(pool.name, str(known.id))
            others = await asyncio.to_thread(self._others, pool, names)
        self._pool_id = pool.id
        return pool, others

    def _others(self, pool: PoolKey, names: AbstractSet[str]) -> dict[str, str]:
        """Claim those groups that are not known to be this pool's, and return those that are another's."""
        if names <= self._claimed and pool.id == self._pool_id:
            return store.groups_of_others(self._database_url, pool, names)
        former_id = None if pool.id == self._pool_id else self._pool_id
        return store.claim_groups(self._database_url, pool, names, former_id)

    async def _take_over(self, pool: PoolKey, name: str, other: str) -> str | None:
        """Enter a group as this pool's that is another's, if nobody of that one needs it; else say why not.

        Where this server does not have that pool, another one may: only its nodes tell.
        """
        if other != pool.name and await self._has_queue(other, name):
            return FOREIGN_GROUP.format(name=name, other=other)
        within = max(SILENT_SECONDS, Domain.of(self._node.pool()).liveness_check_interval)
        me = self._node.incarnation
        living = await asyncio.to_thread(store.take_over_group, self._database_url, pool, name, me, within)
        if living:
            return UNSEEN_GROUP.format(name=name, other=other, nodes=listed(living, NAMED))
        self._node.log.info(
            "Group %r was another work pool's, %r, of which no node lives, and is this one's now.",
            name,
            other,
        )
        return None

    async def _has_queue(self, pool: str, name: str) -> bool:
        try:
            await self._node.client.read_work_queue_by_name(name, pool)
        except ObjectNotFound:
            return False
        return True
