"""From a run that is due to one that is claimed: which is next, whether it is to run, and whose it is.

The dispatcher is given the runs that the agent's looks find. It takes them in hand a little before their
time, as many as there is room for, and has the runner run them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, Pending

from taskadapter.agent import runs
from taskadapter.agent.crowding import Crowding
from taskadapter.agent.ends import Ends
from taskadapter.agent.hand import Hand, RunInHand
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.hosts import HostPool
from taskadapter.agent.jobs import Deployments
from taskadapter.agent.judging import Judge
from taskadapter.agent.membership import Membership
from taskadapter.agent.node import Node, queue_of
from taskadapter.agent.queue import Queue, Which, any_run
from taskadapter.agent.runner import Runner
from taskadapter.agent.runs import Phase
from taskadapter.agent.succession import Succession
from taskadapter.agent.timetable import Timetable
from taskadapter.agent.unrunnable import Unrunnable
from taskadapter.coordination.messages import Token
from taskadapter.errors import CoordinationError, DeclarationError
from taskadapter.prefect_api.client import API_FAULTS, in_words
from taskadapter.rules import ticks

TERMINATE_GRACE_SECONDS = 5.0
"""How long a run may take to end when its agent has to, before its process is killed."""

SLOW_CLAIM_SECONDS = 5.0
"""A claim that has had no answer for so long is a reason for a look."""

CLAIMED_BY = "Claimed by {node}."
"""What a run says that a node has claimed."""

PLENTY = 4
"""So many runs for each process are more than it begins before the agent looks again."""


class Dispatcher:
    """Has runs run, each at its time.

    Args:
        node: whose runs they are.
        membership: whether a run is this node's, and under which token.
        hosts: where they run.
        deployments: what they are runs of.
        ends: what ends those whose jobs are over.
        timetable: which ticks are owed; it learns here which are settled.
        hand: the runs that it has taken from the queue, until they are over.
        succession: which nodes may be able to run what this one cannot.
        look_for: has a look made for what some news is about.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        hosts: HostPool,
        deployments: Deployments,
        ends: Ends,
        timetable: Timetable,
        hand: Hand,
        succession: Succession,
        look_for: Callable[[News], None],
    ) -> None:
        self._node = node
        self._membership = membership
        self._client = node.client
        self._log = node.log
        self._look_for = look_for
        self._hosts = hosts
        self._deployments = deployments
        self._ends = ends
        self._teller = node.teller
        self._timetable = timetable
        self._queue = Queue()
        self._hand = hand
        self._runner = Runner(
            node, membership, hosts, deployments, ends, timetable, self._queue, hand, succession
        )
        self._judge = Judge(node, ends, timetable, self._queue, hand, self._runner, look_for)
        self._handling: set[asyncio.Task[None]] = set()
        self._waits: set[asyncio.Timeout] = set()
        self._is_held_up = False
        self._crowding = Crowding(node.log, deployments, hand)
        self._unrunnable = Unrunnable(node, deployments, timetable)
        self._news = asyncio.Event()

    # --- what the agent tells ---------------------------------------------------------------------

    def found(self, found: list[FlowRun], asked: float) -> None:
        """Take note of all runs that are due soon or late; they replace those that were known.

        Args:
            found: as the API had them.
            asked: when it was asked, on the monotonic clock: what has been through since is no news.
        """
        self._queue.found(found, asked, self._hand.ids)
        self._news.set()

    @property
    def is_busy(self) -> bool:
        """Whether there is something to run, now or soon."""
        return bool(self._queue or self._hand)

    @property
    def queues(self) -> frozenset[str]:
        """The queues of the runs that are taken, and not over."""
        return frozenset(queue_of(run.flow_run) for run in self._hand)

    def longest_late(self, now: datetime) -> float:
        """Return for how many seconds the oldest tick is due that has not begun; 0 where none is late."""
        claimed = [run.flow_run for run in self._hand if not run.life.has_begun]
        waiting = [run for run in self._queue.runs if not self._timetable.is_held(run)]
        dues = filter(None, map(ticks.tick_of, (*claimed, *waiting)))
        return max([0.0, *((now - tick).total_seconds() for tick in dues)])

    @property
    def has_plenty(self) -> bool:
        """Whether there is much more to run, now or soon, than there is room for."""
        return len(self._queue) > PLENTY * self._hosts.limit

    def forget(self, which: Which = any_run) -> None:
        """Start nothing more of what is known, or of some of it; what waits for its moment goes back."""
        self._queue.forget(which)
        self._tell(self._hand.those(which), runs.Dropped())

    def retain(self, job_ids: AbstractSet[UUID]) -> None:
        """Remember nothing of other jobs."""
        self._ends.retain(job_ids)
        self._queue.retain(job_ids)
        self._unrunnable.retain(job_ids)

    def _tell(self, those: Iterable[RunInHand], event: runs.Event) -> None:
        for run in those:
            run.meet(event)

    async def drain(self, seconds: float, which: Which = any_run) -> None:
        """Let runs end, all or some, for so long; then end them, and kill what does not end.

        What has not begun goes back to be claimed by another node.
        """
        those = self._hand.those(which)
        if those:
            self._log.info("%d run(s) may still end, within %g s.", len(those), seconds)
        self._tell(those, runs.Dropped())
        await self._until_gone(those, seconds)
        for event in (runs.TimeUp(), runs.GraceOver()):
            left = [run for run in those if run in self._hand]
            self._tell(left, event)
            await self._until_gone(left, TERMINATE_GRACE_SECONDS)

    async def _until_gone(self, those: list[RunInHand], seconds: float) -> None:
        wait = asyncio.timeout(seconds)
        self._waits.add(wait)
        try:
            async with wait:
                while any(run in self._hand for run in those):
                    await asyncio.wait(
                        self._handling or [asyncio.create_task(asyncio.sleep(0.1))],
                        return_when=asyncio.FIRST_COMPLETED,
                    )
        except TimeoutError:
            pass
        finally:
            self._waits.discard(wait)

    def hurry(self) -> None:
        """End the runs that are being waited for, now, and wait no longer than they take to end."""
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    async def finish(self) -> None:
        """Wait until everything that is known has run, but for what could not begin here."""
        while self._queue.has_untried or self._handling:
            await asyncio.wait(self._handling or [asyncio.create_task(asyncio.sleep(0.1))])

    def end(self, which: Which = any_run) -> None:
        """End runs that go on, all or some: each shows as Crashed, unless its body has not begun."""
        self._tell(self._hand.those(which), runs.TimeUp())

    def lose(self, token: Token) -> None:
        """Stop the runs of a token that is lost, now: another node may start some."""
        self._queue.forget(lambda run: queue_of(run) == token.group_id)
        for run in self._hand:
            if run.token == token:
                run.meet(runs.TokenLost())

    # --- claiming ---------------------------------------------------------------------------------

    async def dispatch(self) -> None:
        """Take one run after another, each a little before its time, while there is room."""
        while True:
            flow_run = await self._next_due()
            run = self._hand.take(flow_run, self._membership.token_of(flow_run))
            task = asyncio.create_task(self._handle(run))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

    async def _next_due(self) -> FlowRun:
        while True:
            clock = time.monotonic()
            found, seconds = self._choose(clock)
            if found is not None and seconds <= 0:
                self._queue.take(found)
                return found
            waits = [self._queue.next_try(clock), None if found is None else seconds]
            wait = min((wait for wait in waits if wait is not None), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()
            self._news.clear()

    def _choose(self, clock: float) -> tuple[FlowRun | None, float]:
        """Return the run that is to be taken next, and in how many seconds; None while there is no room.

        A tick that can begin only when others of its job are over is taken where there is room to spare.
        """
        room = self._hosts.limit - len(self._hand)
        first = self._queue.first(self._may_start, clock)
        seconds = self._until_claimed(first)
        self._crowding.note(clock, room, is_due=seconds <= 0)
        if seconds <= 0 and room <= 0:
            self._hand.make_room()
            return None, seconds
        if seconds > 0 and room > 1:
            following = self._queue.first(self._may_follow, clock)
            if (sooner := self._until_claimed(following)) < seconds:
                return following, sooner
        return first, seconds

    def _until_claimed(self, flow_run: FlowRun | None) -> float:
        if flow_run is None:
            return float("inf")
        return (self._queue.claimed_at(flow_run) - datetime.now(UTC)).total_seconds()

    def _may_follow(self, flow_run: FlowRun) -> bool:
        """Return whether a run may be taken that has to wait for others of its job."""
        return self._may_start(flow_run, behind=1) and self._queue.may_follow(flow_run)

    def _may_start(self, flow_run: FlowRun, behind: int = 0) -> bool:
        """Return whether the run's job goes on, here, with fewer runs in hand than it may have.

        Args:
            flow_run: the run.
            behind: how many more than it may have.
        """
        if self._ends.is_ending(flow_run) or not self._membership.may_run(flow_run):
            return False
        if self._timetable.is_held(flow_run):
            return False
        job, siblings = self._deployments.known(flow_run), self._hand.siblings(flow_run)
        return job is None or job.max_concurrent is None or len(siblings) < job.max_concurrent + behind

    async def _handle(self, run: RunInHand) -> None:
        try:
            await self._decide(run)
        except ObjectNotFound:
            await self._unrunnable.is_gone(run.flow_run)
            self._look_for(News(Kind.DEPLOYMENT, run.flow_run.deployment_id))
        except (*API_FAULTS, CoordinationError) as fault:
            # One line is enough until a claim succeeds again.
            level = logging.DEBUG if self._is_held_up else logging.WARNING
            self._log.log(
                level, "Handling run %s failed, trying again: %s", run.flow_run.name, in_words(fault)
            )
            self._is_held_up = True
            if run.life.phase >= Phase.CLAIMED:
                await self._runner.give_back(run, runs.give_back(run.life))
            elif self._queue.hold(run.flow_run, time.monotonic()):
                self._hand.hold_back(run)
            self._look_for(News(Kind.WAITS, run.flow_run.id))
        except DeclarationError as fault:
            await self._unrunnable.cannot_be_read(run.flow_run, in_words(fault))
        except Exception as exc:  # noqa: BLE001 - one run's trouble must not end the agent
            self._log.exception("Run %s could not be run, and is marked Crashed.", run.flow_run.name)
            self._timetable.settle(run.flow_run)
            await self._teller.report(run.flow_run, Crashed(message=f"{exc}"))
        finally:
            self._hand.put_down(run)
            self._queue.through(run.flow_run.id, time.monotonic())
            self._news.set()

    async def _decide(self, run: RunInHand) -> None:
        """Give a run a place among its job's, have it judged, claim and run it."""
        flow_run = run.flow_run
        if self._ends.is_ending(flow_run):
            return
        job = await self._deployments.job_of(flow_run, self._node.pool())
        self._unrunnable.was_read(flow_run)
        # They have a place already, or are due before this one: they go first.
        others = [other for other in self._hand.siblings(flow_run) if other is not run]
        ahead = sum(other.life.phase >= Phase.PLACED or other.due < run.due for other in others)
        behind = 1 if self._queue.may_follow(flow_run) else 0
        if job.max_concurrent is not None and ahead >= job.max_concurrent + behind:
            # Only now is it known that its job allows no more: it waits its turn.
            self._queue.put(flow_run)
            return
        run.meet(runs.Placed(job.finishes))
        if job.trigger is not None and ticks.is_tick(flow_run):
            flow_run.name = ticks.run_name(job.deployment.name, run.tick)
        if await self._judge.leaves(run, job) or not self._membership.may_run(flow_run):
            return
        if run.life.deferred:
            self._queue.put_back(flow_run, time.monotonic())
            return
        if await self._claim(flow_run):
            run.meet(runs.Claimed())
            self._is_held_up = False
            self._timetable.settle(flow_run)
            await self._runner.run(run, job)

    async def _claim(self, flow_run: FlowRun) -> bool:
        """Ask the API for a run, and return whether this node has it.

        While there is no answer, a look finds out whether the API answers at all. One that is lost may have
        been a yes: the run is Pending then, which no look lists, and says whose it is.
        """
        mine: State[Any] = Pending(message=CLAIMED_BY.format(node=self._node.name))
        loop = asyncio.get_running_loop()
        slow = loop.call_later(SLOW_CLAIM_SECONDS, self._look_for, News(Kind.WAITS, flow_run.id))
        try:
            claim = await self._client.set_flow_run_state(flow_run.id, mine)
            known = None
            if claim.status is SetStateStatus.ABORT:
                known = (await self._client.read_flow_run(flow_run.id)).state
        except API_FAULTS:
            self._queue.doubt(flow_run, time.monotonic())
            raise
        finally:
            slow.cancel()
        if known is not None and (known.type, known.message) == (mine.type, mine.message):
            return True
        if claim.status is not SetStateStatus.ACCEPT:
            self._log.debug("Prefect's API refuses the claim of run %s: %s", flow_run.name, claim.details)
        return claim.status is SetStateStatus.ACCEPT

    async def run_now(self, flow_run: FlowRun) -> None:
        """Run a run that something other than a poll has claimed."""
        run = self._hand.take(flow_run, self._membership.token_of(flow_run))
        try:
            await self._runner.run(run, await self._deployments.job_of(flow_run, self._node.pool()))
        finally:
            self._hand.put_down(run)
