"""Whether another node is to have a group that this one holds, and of which it cannot run a job.

A node's copy of the project may be old, its installation may lack a module, its database user a right on
the ledger. Its runs would crash, or wait, one after the other, while a standby could run them. So the group
is handed to one that has not given it up lately. If there is none it stays: code that no node can load is
at fault itself, and a database that fails all of them is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from taskadapter.coordination import store
from taskadapter.coordination.messages import NAMED, Token
from taskadapter.errors import CoordinationError, listed

if TYPE_CHECKING:
    from taskadapter.agent.hand import Hand, RunInHand
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.node import Node
    from taskadapter.execution import protocol


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
        self._one_at_a_time = asyncio.Lock()

    def waited(self, run: RunInHand, wait: protocol.Waits) -> None:
        """Hand over the group of a run that has waited for the coordination database for a whole lease."""
        domain = self._membership.domain
        if domain is not None and wait.seconds >= domain.liveness_check_interval:
            self._node.tasks.spawn(self.pass_on(run, wait.fault))

    async def pass_on(self, run: RunInHand, fault: str) -> bool:
        """Hand over the group of a run that this node cannot run, and return whether that is done.

        It is not done while other runs of the group go on here, which a handover would end.
        """
        if run.token is None:
            return False
        async with self._one_at_a_time:
            if self._handed_over.get(run.token.group_id) == run.token:
                return True
            return await self._pass_on(run, run.token, fault)

    async def _pass_on(self, run: RunInHand, token: Token, fault: str) -> bool:
        domain, url = self._membership.domain, self._membership.database_url
        if domain is None:
            return False
        within = domain.liveness_check_interval
        try:
            able = await asyncio.to_thread(store.successors, url, token.group_id, within)
            if not able or not self._may_go(token):
                return False
            await asyncio.to_thread(store.give_up_tokens, url, [token], fault)
        except CoordinationError:
            return False
        if not self._may_go(token):
            return False
        self._handed_over[token.group_id] = token
        self._node.log.warning(
            "Run %s cannot go on here, and group %s goes to a standby (%s): %s",
            run.flow_run.name,
            token.group_id,
            listed(able, NAMED),
            fault,
        )
        self._hand_over(token)
        return True

    def _may_go(self, token: Token) -> bool:
        is_needed = any(other.token == token and other.life.goes_on for other in self._hand)
        return self._membership.holds(token) and not is_needed
