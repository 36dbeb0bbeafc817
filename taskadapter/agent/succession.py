"""Whether another node is to have a group that this one holds, and of which it cannot run a job.

A node's copy of the project may be old, its installation may lack a module, its database user a right on
the ledger. Its runs would crash, or wait, one after the other, while a standby could run them. So the group
is handed to one that has not given it up lately. If there is none it stays: code that no node can load is
at fault itself, and a database that fails all of them is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from uuid import UUID

from taskadapter.coordination import store
from taskadapter.coordination.messages import NAMED, Token
from taskadapter.errors import CoordinationError, listed

if TYPE_CHECKING:
    from taskadapter.agent.hand import Hand, RunInHand
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.node import Node
    from taskadapter.execution import protocol

AGAIN_SECONDS = 2.0
"""How often it is seen whether a group can be left of which this node does not run all jobs."""

STOPPED = "a listener of its program has stopped"
"""Why it does not."""


class Succession:
    """Hands groups to nodes that may be able to run what this one cannot.

    Args:
        node: this node.
        membership: its part in the groups.
        hand: the runs that it has taken.
        hand_over: gives a token to a standby.
    """

    def __init__(
        self, node: Node, membership: Membership, hand: Hand, hand_over: Callable[[Token], None]
    ) -> None:
        self._node = node
        self._membership = membership
        self._hand = hand
        self._hand_over = hand_over
        # The token of each group that was handed over last.
        self._handed_over: dict[str, Token] = {}
        # The last handover that has failed, and with what.
        self._failed: tuple[Token, str] | None = None
        self._one_at_a_time = asyncio.Lock()

    def waited(self, run: RunInHand, wait: protocol.Waits) -> None:
        """Hand over the group of a run that has waited for the coordination database for a whole lease."""
        domain = self._membership.domain
        if domain is not None and wait.seconds >= domain.liveness_check_interval:
            self._node.tasks.spawn(self.pass_on(run, wait.fault))

    def stopped(self, queue: str, job_ids: Collection[UUID]) -> None:
        """Hand over a group of which this node does not run some jobs any more, as long as that is so.

        Args:
            queue: the group.
            job_ids: the jobs.
        """
        self._node.tasks.spawn(self._leave_to_whole_ones(queue, frozenset(job_ids)))

    async def _leave_to_whole_ones(self, queue: str, job_ids: frozenset[UUID]) -> None:
        share = self._node.share
        while share.serves(queue) and job_ids & share.left_out:
            if (token := self._membership.token(queue)) is not None:
                await self.leave(token, "This node does not run all jobs of a group", STOPPED)
            await asyncio.sleep(AGAIN_SECONDS)

    async def pass_on(self, run: RunInHand, fault: str) -> bool:
        """Hand over the group of a run that this node cannot run, and return whether that is done."""
        what = f"Run {run.flow_run.name} cannot go on here"
        return run.token is not None and await self.leave(run.token, what, fault)

    async def leave(self, token: Token, what: str, fault: str) -> bool:
        """Hand over a group of which this node cannot run all, and return whether that is done.

        It is not done while runs of the group go on here, which a handover would end.

        Args:
            token: the group's.
            what: what this node cannot do.
            fault: why.
        """
        async with self._one_at_a_time:
            if self._handed_over.get(token.group_id) == token:
                return True
            return await self._leave(token, what, fault)

    async def _leave(self, token: Token, what: str, fault: str) -> bool:
        domain, url = self._membership.domain, self._membership.database_url
        if domain is None:
            return False
        within = domain.liveness_check_interval
        try:
            able = await asyncio.to_thread(store.successors, url, token.group_id, within)
            if not able or not self._may_go(token):
                return False
            await asyncio.to_thread(store.give_up_tokens, url, [token], fault)
        except CoordinationError as failure:
            self._tell_of_failure(token, what, failure)
            return False
        if not self._may_go(token):
            return False
        self._handed_over[token.group_id] = token
        self._node.log.warning(
            "%s, and group %s goes to a standby (%s): %s",
            what,
            token.group_id,
            listed(able, NAMED),
            fault,
        )
        self._hand_over(token)
        return True

    def _tell_of_failure(self, token: Token, what: str, failure: CoordinationError) -> None:
        """Say why a group stays here that was to be left; once, however often it is tried."""
        if self._failed != (token, str(failure)):
            self._node.log.warning(
                "%s, and group %s cannot be handed over: %s", what, token.group_id, failure
            )
        self._failed = token, str(failure)

    def _may_go(self, token: Token) -> bool:
        is_needed = any(other.token == token and other.life.goes_on for other in self._hand)
        return self._membership.holds(token) and not is_needed
