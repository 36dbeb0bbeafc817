"""What a node does with a token: it takes the group over, is active for it, and hands it over.

A group that is gained is not active at once: first is put in order what former holders have left. One that
cannot be put in order within a lease is given back, for another node may be able to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from taskadapter.agent.node import LONGEST_BACKOFF_SECONDS, Node, queue_of
from taskadapter.agent.queue import Which, any_run
from taskadapter.coordination.messages import NAMED, Gained, Lost, ResignAsked, Token
from taskadapter.errors import listed
from taskadapter.prefect_api.client import backoff, in_words

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from taskadapter.agent.dispatcher import Dispatcher
    from taskadapter.agent.lookout import Lookout
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.takeover import Takeover
    from taskadapter.agent.timetable import Timetable

PAUSE_SECONDS = 0.1
"""How long to wait between two looks which groups have a run that goes on."""


class Terms:
    """A node's terms as the holder of its groups' tokens.

    Args:
        node: the node.
        membership: its part in the groups; which are active is written there.
        dispatcher: has their runs run.
        timetable: knows which of their ticks are owed.
        lookout: looks for their runs.
        new_takeover: returns what puts groups in order, on the database of now.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        dispatcher: Dispatcher,
        timetable: Timetable,
        lookout: Lookout,
        new_takeover: Callable[[], Takeover],
    ) -> None:
        self._node = node
        self._membership = membership
        self._dispatcher = dispatcher
        self._timetable = timetable
        self._lookout = lookout
        self._new_takeover = new_takeover
        # Tokens that were gained, and since when what former holders left is being put in order.
        self._gained: dict[Token, float] = {}
        self._has_gained = asyncio.Event()
        self._cleaning: asyncio.Task[None] | None = None

    def hear(self, change: Gained | Lost | ResignAsked) -> None:
        """React to a token that is gained, lost, or asked for."""
        match change:
            case Gained(token):
                self._gained[token] = time.monotonic()
                self._has_gained.set()
            case Lost(token):
                self._gained.pop(token, None)
                if not self._gained and self._cleaning is not None:
                    self._cleaning.cancel()
                if self._membership.active.get(token.group_id) == token:
                    self._retire(token.group_id)
                self._dispatcher.lose(token)
            case ResignAsked(token):
                self._node.tasks.spawn(self.hand_over(token))

    # --- taking over ------------------------------------------------------------------------------

    async def take_over(self) -> None:
        """Clean up what former holders left in the groups just gained, then run the groups' jobs.

        All at once, again and again until it succeeds, as long as the agent lives.
        """
        takeover, faults, told = self._new_takeover(), 0, ""
        while True:
            tokens = [token for token in self._gained if self._membership.holds(token)]
            if not tokens:
                self._gained.clear()
                self._has_gained.clear()
                await self._has_gained.wait()
                takeover, faults, told = self._new_takeover(), 0, ""
                continue
            self._lookout.want()  # it finds out whether the API answers this node
            try:
                await self._clean_up(takeover, tokens)
                await self._be_active(tokens)
            except Exception as fault:  # noqa: BLE001 - whoever holds a token runs its jobs, or says why not
                if (words := in_words(fault)) != told:
                    self._node.log.warning("Taking over %s failed, trying again: %s", _names(tokens), words)
                told, faults = words, faults + 1
                await self._give_up(tokens, told)
                await asyncio.sleep(backoff(faults, LONGEST_BACKOFF_SECONDS))

    async def _clean_up(self, takeover: Takeover, tokens: Collection[Token]) -> None:
        """Put groups in order, as long as a token is held that was gained: a call may hang for minutes."""
        cleaning = self._cleaning = asyncio.create_task(takeover.clean_up(tokens))
        try:
            if not (await asyncio.wait([cleaning], timeout=self._lease))[0]:
                self._node.log.warning(
                    "Taking over %s takes longer than %g s: what former holders left is being settled, and "
                    "Prefect's API or the database is slow.",
                    _names([*tokens]),
                    self._lease,
                )
                await asyncio.wait([cleaning])
        finally:
            cleaning.cancel()
        if not cleaning.cancelled():
            cleaning.result()

    async def _be_active(self, tokens: Collection[Token]) -> None:
        """Run the jobs of groups that are in order."""
        for token in tokens:
            if self._gained.pop(token, None) is not None and self._node.share.serves(token.group_id):
                self._membership.activate(token)
        self._lookout.want()
        if any(token.term > 1 for token in tokens):
            await self._lookout.poll()  # what was due meanwhile need not even wait for that

    async def _give_up(self, tokens: Collection[Token], reason: str) -> None:
        """Leave those groups to other nodes that could not be taken over within a lease."""
        for token in tokens:
            if time.monotonic() - self._gained.get(token, float("inf")) > self._lease:
                del self._gained[token]
                self._node.log.warning(
                    "Giving group %s back, for another node to take over: %s", token.group_id, reason
                )
                await self.hand_over(token)

    @property
    def _lease(self) -> float:
        domain = self._membership.domain
        return 0.0 if domain is None else domain.liveness_check_interval

    # --- handing over -----------------------------------------------------------------------------

    async def hand_over(self, token: Token) -> None:
        """Start nothing more of a group, let its runs end, and give its token to a standby."""
        self._retire(token.group_id)
        await self._dispatcher.drain(
            self._node.settings.drain_seconds, lambda run: queue_of(run) == token.group_id
        )
        if self._membership.holds(token):  # else it was lost meanwhile, and perhaps gained anew
            self._membership.release(token.group_id)

    async def leave(self, queue: str | None, job_ids: Collection[UUID], drain_seconds: float) -> None:
        """Leave jobs to other nodes: begin nothing more of them, let what is running end, hand over.

        Args:
            queue: a queue that is left as a whole; None if others of its jobs go on here.
            job_ids: the jobs.
            drain_seconds: how long runs may go on before they are ended.
        """
        if queue is not None:
            self._membership.is_to_leave(queue)
        self._node.share.give_up(queue, job_ids)
        self._timetable.leave_out(job_ids)
        if queue is not None:
            self._retire(queue)

        def is_left(run: FlowRun) -> bool:
            return run.deployment_id in job_ids or queue_of(run) == queue

        self._dispatcher.forget(is_left)
        await self._dispatcher.drain(drain_seconds, is_left)
        if queue is not None:
            await self._membership.leave(queue)

    async def let_go(self, which: Which = any_run) -> None:
        """Let runs end, and leave each group to others as soon as none of it goes on here, or if none does.

        Args:
            which: the runs; those of all groups are among them.
        """
        for name in list(self._membership.active):
            self._retire(name)
        draining = asyncio.create_task(self._dispatcher.drain(self._node.settings.drain_seconds, which))
        try:
            while not draining.done():
                self._membership.keep_only(self._dispatcher.queues)
                await asyncio.wait([draining], timeout=PAUSE_SECONDS)
        finally:
            draining.cancel()
        draining.result()

    def _retire(self, name: str) -> None:
        """Be active for a group no longer."""
        self._membership.retire(name)
        self._timetable.forget(name)


def _names(tokens: Sequence[Token]) -> str:
    """Return which groups those tokens are of, as far as a line has room."""
    names = listed([token.group_id for token in tokens], NAMED)
    return f"group {names}" if len(tokens) == 1 else f"groups {names}"
