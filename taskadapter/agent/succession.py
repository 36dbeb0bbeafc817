"""Whether another node is to have a group, of which this one cannot load a job's code.

The copy of the project that a node has may be old, or its installation may lack a module. Runs of such a
node would crash one after the other, while a standby could run them. So the group is handed to one that has
not given it up lately; if there is none the code is at fault, and its runs crash.
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


class Succession:
    """Hands groups to nodes that may be able to load what this one cannot.

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

    async def pass_on(self, run: RunInHand, fault: str) -> bool:
        """Hand over the group of a run whose code cannot be loaded here, and return whether that is done.

        It is not done while other runs of the group go on here, which a handover would end.
        """
        token, domain = run.token, self._membership.domain
        if token is None or domain is None:
            return False
        url, within = self._membership.database_url, domain.liveness_check_interval
        try:
            able = await asyncio.to_thread(store.successors, url, token.group_id, within)
            if not able or not self._may_go(token):
                return False
            await asyncio.to_thread(store.give_up_token, url, token, fault)
        except CoordinationError:
            return False
        if not self._may_go(token):
            return False
        self._node.log.warning(
            "Run %s is put back, and group %s goes to a standby (%s): %s",
            run.flow_run.name,
            token.group_id,
            listed(able, NAMED),
            fault,
        )
        self._hand_over(token)
        return True

    def _may_go(self, token: Token) -> bool:
        is_needed = any(other.token == token and other.life.has_begun for other in self._hand)
        return self._membership.holds(token) and not is_needed
