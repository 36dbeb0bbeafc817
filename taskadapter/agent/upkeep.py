"""What an agent looks after besides runs, from time to time, as long as it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID

from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.node import Node, has_group, queue_of
from taskadapter.agent.runs import Dropped
from taskadapter.agent.strangers import strangers_to
from taskadapter.coordination import store
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import CoordinationError
from taskadapter.prefect_api.client import API_FAULTS, in_words

if TYPE_CHECKING:
    from taskadapter.agent.hand import Hand
    from taskadapter.agent.hosts import HostPool
    from taskadapter.agent.lookout import Lookout
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.sight import Sight
    from taskadapter.agent.succession import Succession
    from taskadapter.agent.takeover import Takeover
    from taskadapter.agent.timetable import Timetable

ABLE_SECONDS = 0.5
"""How often the agent looks whether it can run the jobs of its groups."""

PAUSED_SECONDS = 0.5
"""How often the agent asks the database whether a job that is paused has been resumed."""

RESUMED_LOOKS = 6
"""How often the agent looks so for what a job is to do that has been resumed."""

STRANGERS_SECONDS = 60.0
"""How often the agent looks whether workers poll its pool that coordinate elsewhere."""

SWEEP_SECONDS = 15.0
"""How often an active node looks for runs of its groups that are nobody's."""

SWEEPS_PER_PRUNING = 240
"""How often it does so before it looks for what is too old to be kept: about once an hour."""

DAY_SECONDS = 86400.0


class Upkeep:
    """Four things that an agent does for ever.

    Args:
        node: the node.
        membership: its part in the pool's groups.
        hosts: the processes.
        timetable: knows which jobs are paused.
        hand: the runs that are taken.
        lookout: looks for runs.
        sight: what its looks come to.
        succession: which nodes may be able to do what this one cannot.
        new_takeover: returns what settles runs, on the database of now.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        hosts: HostPool,
        timetable: Timetable,
        hand: Hand,
        lookout: Lookout,
        sight: Sight,
        succession: Succession,
        new_takeover: Callable[[], Takeover],
    ) -> None:
        self._node = node
        self._membership = membership
        self._hosts = hosts
        self._timetable = timetable
        self._hand = hand
        self._lookout = lookout
        self._sight = sight
        self._succession = succession
        self._new_takeover = new_takeover
        self._going_on: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Do all of it from now on."""
        for work in (
            self._look_after_ability,
            self._look_after_paused,
            self._look_after_claimed,
            self._look_for_strangers,
        ):
            self._going_on.append(self._node.tasks.keep_up(work))

    def end(self) -> None:
        """Do nothing of it any more: the node stops."""
        for work in self._going_on:
            work.cancel()

    async def _look_after_ability(self) -> None:
        """Leave the groups to others while this node can run no jobs, and take part again after that."""
        tried = 0.0
        while True:
            await asyncio.sleep(ABLE_SECONDS)
            domain = self._membership.domain
            if domain is None:
                continue
            lack = self._lack(domain.liveness_check_interval)
            if lack is not None:
                await self._stand_back(*lack)
            elif self._membership.stands_back:
                self._node.log.info("This node can run jobs again, and takes part in its groups.")
                await self._membership.come_forward()
                self._lookout.want_visit()  # which takes part again
            elif self._sight.failing_for > max(domain.liveness_check_interval, tried):
                await self._leave_unseen()
                tried = self._sight.failing_for + domain.liveness_check_interval
            if self._sight.failing_for == 0:
                tried = 0.0

    async def _leave_unseen(self) -> None:
        """Leave groups whose runs the database does not let this node look for."""
        fault = self._sight.fault
        for token in list(self._membership.active.values()):
            if fault is not None:
                await self._succession.leave(token, "This node cannot look for runs", in_words(fault))

    def _lack(self, lease: float) -> tuple[str, str] | None:
        """Return what this node cannot do that all runs need, and why; None if there is no such thing."""
        if self._hosts.broken_for > lease / 2:
            return "start processes", self._hosts.fault
        if self._sight.blind_for > lease and (fault := self._sight.fault) is not None:
            return "look for runs", in_words(fault)
        return None

    async def _stand_back(self, lack: str, why: str) -> None:
        """Begin nothing, and leave the groups of which nothing goes on here: what has begun may end."""
        if not self._membership.stands_back:
            self._node.log.error("This node cannot %s, and leaves its groups to others: %s", lack, why)
            for run in self._hand.those(has_group):
                run.meet(Dropped())
            kept = self._membership.groups  # until what was about to begin has heard of it
        else:
            kept = frozenset(queue_of(run.flow_run) for run in self._hand if run.life.goes_on)
        await self._membership.stand_back(kept, f"it cannot {lack}: {why}")

    async def _look_after_paused(self) -> None:
        """Look for runs at once when a job has been resumed, which its row says first."""
        looks: dict[UUID, int] = {}
        while True:
            await asyncio.sleep(PAUSED_SECONDS)
            held = self._timetable.held
            looks = {job_id: times for job_id, times in looks.items() if job_id in held}
            if not held:
                continue
            with suppress(CoordinationError):
                resumed = await asyncio.to_thread(store.resumed, self._membership.database_url, held)
                # Prefect follows; where it does not, the usual looks will do.
                if any(looks.get(job_id, 0) < RESUMED_LOOKS for job_id in resumed):
                    for job_id in resumed:
                        self._lookout.look_for(News(Kind.DEPLOYMENT, job_id))
                    self._lookout.want()
                    await self._lookout.poll()
                looks |= {job_id: looks.get(job_id, 0) + 1 for job_id in resumed}

    async def _look_after_claimed(self) -> None:
        """Settle what is nobody's and what nodes that are gone have left, and forget what is old."""
        takeover, sweeps = None, 0
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            domain, url = self._membership.domain, self._membership.database_url
            if domain is None:
                continue
            if takeover is None or takeover.database_url != url:
                takeover = self._new_takeover()
            try:
                if self._node.share.serves(DEFAULT_QUEUE):
                    await takeover.end_orphans(domain.liveness_check_interval)
                await takeover.sweep(self._membership.served, lambda: self._hand.ids)
                sweeps += 1
                if sweeps % SWEEPS_PER_PRUNING == 1:
                    seconds = self._node.settings.ledger_days * DAY_SECONDS
                    await asyncio.to_thread(store.prune, url, seconds)
            except (*API_FAULTS, CoordinationError) as fault:
                self._node.log.debug("What is claimed is looked after later: %s", fault)

    async def _look_for_strangers(self) -> None:
        """Name the workers of the pool that are no nodes of its database: they may run the same jobs.

        One that is found once only may have just begun, or ended.
        """
        suspected, told = set[str](), set[str]()
        while True:
            await asyncio.sleep(STRANGERS_SECONDS)
            if not self._membership.groups:
                continue
            try:
                others = await strangers_to(self._node, self._membership.database_url)
                found = {worker.name for worker in others}
            except (*API_FAULTS, CoordinationError):
                continue
            for name in sorted((found & suspected) - told):
                self._node.log.error(
                    "Worker %s polls work pool %s, and is no node in this node's database, %s: both may "
                    "run the same jobs. Stop it, and start it with the database and the type of this one.",
                    name,
                    self._node.work_pool,
                    self._membership.where,
                )
                told.add(name)
            suspected = found
