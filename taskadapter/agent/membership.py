"""For which groups of its work pool a node stands by, and for which it is active.

A group is a queue of the pool. Whoever declares one may declare another database or timing with it, for the
whole pool: then the node leaves all groups, and stands by anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.client.schemas.objects import FlowRun

from taskadapter.agent.groups import Groups
from taskadapter.agent.node import Node, queue_of
from taskadapter.agent.ownership import Ownership
from taskadapter.agent.strangers import reason_to_stay_out
from taskadapter.coordination import store
from taskadapter.coordination.messages import (
    NAMED,
    STOPPING,
    Gained,
    Lost,
    Refused,
    ResignAsked,
    Token,
)
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import CoordinationError, listed
from taskadapter.prefect_api.pool import Domain, Queues

if TYPE_CHECKING:
    from taskadapter.coordination.heartbeat import Vitals

LIVES_WITHIN_BEATS = 4
"""After so many heartbeats a live process of this node's name has shown itself: this one is refused."""

JOIN_SECONDS = 0.02
"""How long to wait between two looks whether this node takes part already."""


class Membership:
    """A node's part in the groups of its work pool.

    Args:
        node: the node.
        is_only: whether this process takes part in the groups of no other pool.
        tell: hears, on the event loop, of tokens that are gained, lost, or asked for.
        let_go: lets the runs of all groups end, before the node leaves them.

    Attributes:
        queues: the pool's queues, as they were last looked at.
        database_url: the coordination database.
        stands_back: whether this node begins nothing for the time being, and leaves the groups to others.
        refused: why this node can never be active; None while it can.
    """

    def __init__(
        self,
        node: Node,
        *,
        is_only: bool,
        tell: Callable[[Gained | Lost | ResignAsked], None],
        let_go: Callable[[], Awaitable[None]],
    ) -> None:
        self._node = node
        self._is_only = is_only
        self._tell = tell
        self._let_go = let_go
        self._groups: Groups | None = None
        self.queues: set[str] = {DEFAULT_QUEUE}
        # Those of which Prefect lists no run, or only some, by a pause or a limit.
        self.withheld: AbstractSet[str] = frozenset()
        self._paused: AbstractSet[str] = frozenset()
        self.database_url = node.settings.default_database_url()
        self._active: dict[str, Token] = {}
        self.refused: str | None = None
        # Whether others may coordinate through another database, and nobody has looked yet.
        self._may_be_apart = False
        self._ownership = Ownership(node)
        # Groups that are to be left once their runs have ended.
        self._leaving: set[str] = set()
        self.stands_back = False
        self._given_up: list[Token] = []
        # When it was first seen that another process has, or had, this node's name.
        self._waits_since = float("inf")

    # --- what it is -------------------------------------------------------------------------------

    @property
    def domain(self) -> Domain | None:
        """Database and timing of the groups; None before the node has looked at the pool."""
        return None if self._groups is None else self._groups.domain

    @property
    def where(self) -> str:
        """The database, in words, without a secret."""
        from taskadapter.coordination.engines import url_of
        from taskadapter.coordination.faults import where

        return where(url_of(self.database_url))

    @property
    def board(self) -> Path | None:
        """The file with the deadlines of this node's tokens."""
        return None if self._groups is None else self._groups.board

    @property
    def groups(self) -> frozenset[str]:
        """The groups for which this node is active, or stands by."""
        return frozenset() if self._groups is None else self._groups.names

    @property
    def vitals(self) -> Vitals | None:
        """How the node is, as its heartbeat has it; None before the first."""
        return None if self._groups is None else self._groups.vitals

    @property
    def served(self) -> list[str]:
        """The queues whose jobs this node runs now."""
        return [name for name in (DEFAULT_QUEUE, *self._active) if self._node.share.serves(name)]

    @property
    def active(self) -> Mapping[str, Token]:
        """The groups whose jobs this node runs, and under which tokens."""
        return self._active

    def activate(self, token: Token) -> None:
        """Run the jobs of a group from now on, as long as its token is held."""
        self._active[token.group_id] = token

    def retire(self, name: str) -> None:
        """Run a group's jobs no longer, whoever has its token."""
        self._active.pop(name, None)

    def token(self, name: str) -> Token | None:
        """Return the token of a group if this node may trust now that it holds it."""
        return None if self._groups is None else self._groups.token(name)

    def seconds_left(self, token: Token) -> float:
        """Return for how long this node may trust that it holds a token, if it is not renewed."""
        return 0.0 if self._groups is None else self._groups.seconds_left(token.group_id)

    def holds(self, token: Token) -> bool:
        """Return whether this node may trust now that it holds this very token."""
        return self.token(token.group_id) == token

    def token_of(self, flow_run: FlowRun) -> Token | None:
        """Return the token under which a run is to be run; None if it has no group."""
        return self._active.get(queue_of(flow_run))

    def may_run(self, flow_run: FlowRun) -> bool:
        """Return whether a run is this node's to run, which holds the token if it has a group."""
        name = queue_of(flow_run)
        if (
            self.stands_back
            or not self._node.share.serves(name)
            or not self._node.share.has_job_of(flow_run)
        ):
            return False
        if name == DEFAULT_QUEUE:
            return True
        token = self._active.get(name)
        return token is not None and self.holds(token)

    # --- which groups there are -------------------------------------------------------------------

    async def refresh(self) -> None:
        """Look at the pool's queues, and stand by for the groups among them."""
        found = await Queues.read(self._node.client, self._node.work_pool)
        self.queues, self.withheld = {*found.names}, found.withheld
        self._say_paused(found.closed)
        groups = self._groups
        names = {name for name in self.queues if self._node.share.serves(name)} - {DEFAULT_QUEUE}
        if groups is not None:
            names |= groups.names & self._leaving
        # Whoever declares a new group may have declared another database or timing with it.
        if (
            groups is None
            or (names - self._ownership.foreign.keys() != groups.names and not self.stands_back)
            or Domain.of(self._node.pool()) != groups.domain
        ):
            groups = await self._groups_as_declared()
        await self._stand_by(groups, names)

    def _say_paused(self, paused: AbstractSet[str]) -> None:
        """Say once which queues, or that the pool, let nothing begin, and when that is over."""
        for what, sentence in [
            (paused - self._paused, "Paused in Prefect, and nothing begins until it is resumed: %s."),
            (self._paused - paused, "Resumed in Prefect: %s."),
        ]:
            if what:
                self._node.log.info(sentence, listed(sorted(what), NAMED))
        self._paused = paused

    async def add(self, queue: str) -> None:
        """Stand by for one more group, if the queue is one, without a look at the others."""
        groups = self._groups
        if groups is not None:
            self.queues.add(queue)
            await self._stand_by(groups, groups.names | {queue} - {DEFAULT_QUEUE})

    async def _stand_by(self, groups: Groups, names: AbstractSet[str]) -> None:
        ours = await self._ownership.ours(names)
        if ours and self._may_be_apart:
            # So that nodes which begin at the same time find each other.
            groups.stand_by((), self.database_url)
            reason = await reason_to_stay_out(self._node, self.database_url, self.where, ours)
            self._may_be_apart = reason is not None
            self.refused = self.refused or reason
        if self.refused is None:
            groups.stand_by(ours & groups.names if self.stands_back else ours, self.database_url)

    async def _groups_as_declared(self) -> Groups:
        """Return the pool's groups with the database and timing that the pool has now."""
        node = self._node
        pool = await node.client.read_work_pool(node.work_pool)
        domain = Domain.of(pool)
        if self._groups is not None and self._groups.domain == domain:
            return self._groups
        database_url = await domain.database_url(node.settings)
        if self._groups is not None:
            node.log.info(
                "The work pool's database or timing has changed. Its groups are joined anew, with a "
                "heartbeat each %g s, and taken for dead after %g s without one.",
                domain.heartbeat_frequency,
                domain.liveness_check_interval,
            )
            await self._let_go()
            await self._groups.stop()
        self.database_url = database_url
        self._ownership.begin(database_url)
        self._groups = Groups(node.name, node.incarnation, pool, node.log, self._is_only, self._on_change)
        self._may_be_apart = not domain.is_named(node.settings)
        self._say_where(is_default=self._may_be_apart)
        return self._groups

    def _say_where(self, *, is_default: bool) -> None:
        """Say what this node takes part in: two that are to stand in for each other must say the same."""
        node = self._node
        node.log.info(
            "Node %s of work pool %s, in folder %s, takes part through %s.",
            node.name,
            node.work_pool,
            Path.cwd(),
            self.where,
        )
        if is_default:
            node.log.warning(
                "Nobody has named a database, and the default is a file of this machine. Nodes on other "
                "machines do not see it, and would run the same jobs."
            )

    async def until_registered(self, queue: str, end: float) -> None:
        """Wait until this node stands by for a group, or waits for a dead process of its name.

        Args:
            queue: the group.
            end: when to give up, on the monotonic clock.

        Raises:
            CoordinationError: what keeps this node from standing by.
        """
        groups = self._groups
        while groups is not None and not groups.is_registered(queue):
            if self.refused is not None:
                raise CoordinationError(self.refused)
            if queue in self._ownership.foreign:
                raise CoordinationError(self._ownership.foreign[queue])
            now = time.monotonic()
            if groups.waits_for_its_predecessor:
                self._waits_since = min(now, self._waits_since)
                if now - self._waits_since > LIVES_WITHIN_BEATS * groups.domain.heartbeat_frequency:
                    return
            elif now >= end:
                vitals = groups.vitals
                fault = (vitals and vitals.fault) or "the coordination database does not answer"
                raise CoordinationError(f"group {queue!r} cannot be joined: {fault}")
            await asyncio.sleep(JOIN_SECONDS)
        self._waits_since = float("inf")

    # --- leaving ----------------------------------------------------------------------------------

    async def stand_back(self, but: AbstractSet[str], why: str) -> None:
        """Begin nothing for the time being, and leave the groups to other nodes.

        Args:
            but: groups that are kept.
            why: what who has one of the others next says of this node.
        """
        self.stands_back = True
        groups = self._groups
        if groups is None:
            return
        tokens = [token for name in groups.names - but if (token := groups.token(name)) is not None]
        if tokens:
            self._given_up += tokens
            with suppress(CoordinationError):  # then they are left without a word
                await asyncio.to_thread(store.give_up_tokens, self.database_url, tokens, why)
        groups.stand_by(groups.names & but, self.database_url, why)

    async def come_forward(self) -> None:
        """Take part again; the next visit does it. Why groups were given up does not hold any more."""
        self.stands_back = False
        given_up, self._given_up = self._given_up, []
        if given_up:
            with suppress(CoordinationError):  # then it is no successor for five minutes
                await asyncio.to_thread(store.give_up_tokens, self.database_url, given_up, None)

    def keep_only(self, names: AbstractSet[str]) -> None:
        """Leave all other groups to other nodes: this one stops."""
        if self._groups is not None and self._groups.names - names:
            self._groups.stand_by(self._groups.names & names, self.database_url, STOPPING)

    def is_to_leave(self, name: str) -> None:
        """Keep a group that this node serves no longer until its runs have ended: then it is left."""
        self._leaving.add(name)

    async def leave(self, name: str) -> None:
        """Stand by for a group no longer; returns when its token is released, if the database answers."""
        self._leaving.discard(name)
        if self._groups is not None:
            await self._groups.leave(name)

    def release(self, name: str) -> None:
        """Hand a group over whose runs have ended."""
        if self._groups is not None:
            self._groups.release(name)

    async def stop(self) -> None:
        """Release every token, for good."""
        if self._groups is not None:
            await self._groups.stop()

    def _on_change(self, change: Gained | Lost | ResignAsked | Refused) -> None:
        if isinstance(change, Refused):
            self.refused = change.reason
        else:
            self._tell(change)
