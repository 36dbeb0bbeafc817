"""The runs that a node has taken and not finished, and whose turn it is among them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from taskadapter.agent import runs
from taskadapter.agent.queue import Which, any_run, due
from taskadapter.agent.runs import Life
from taskadapter.coordination.messages import Token
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from taskadapter.agent.jobs import DeployedJob
    from taskadapter.agent.links import HostLink


@dataclass
class RunInHand:
    """A run from the moment at which it is taken from the queue until it is over.

    Attributes:
        flow_run: as polled.
        token: what the node held of the run's group when it took it; None for a run of no group.
        life: how far it has come, and what is to become of it.
        host: the process that has it, while one does.
        heartbeat: when its last heartbeat was, on the monotonic clock; None before it has started.
        entering: what enters its end, where its process cannot.
    """

    flow_run: FlowRun
    token: Token | None = None
    life: Life = field(default_factory=Life)
    host: HostLink | None = None
    heartbeat: float | None = None
    entering: asyncio.Task[None] | None = None

    @property
    def due(self) -> datetime:
        """When the run is to start, as Prefect has it now."""
        return due(self.flow_run)

    @property
    def tick(self) -> datetime:
        """When the tick was due, whenever Prefect has put it since."""
        return ticks.tick_of(self.flow_run) or self.due

    def meet(self, event: runs.Event) -> tuple[runs.Action, ...]:
        """Take note of what happens, tell the process what it must know, return what else is to be done."""
        after = runs.step(self.life, event)
        self.life = after.life
        if self.host is not None:
            for signal in after.signals:
                self.host.heed(signal)
        return after.actions


class Hand:
    """The runs in hand, in the order in which they were taken.

    Args:
        known: returns the deployment of a run as it was last read, if it was.
    """

    def __init__(self, known: Callable[[FlowRun], DeployedJob | None]) -> None:
        self._known = known
        self._runs: dict[UUID, RunInHand] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._runs)

    def __iter__(self) -> Iterator[RunInHand]:
        """Those that are in hand now, whatever becomes of them meanwhile."""
        return iter(list(self._runs.values()))

    def __contains__(self, run: RunInHand) -> bool:
        """Whether a run is in hand still."""
        return run.flow_run.id in self._runs

    @property
    def ids(self) -> frozenset[UUID]:
        """Their ids."""
        return frozenset(self._runs)

    @property
    def flow_runs(self) -> list[FlowRun]:
        """The same, as they were found."""
        return [run.flow_run for run in self]

    def take(self, flow_run: FlowRun, token: Token | None) -> RunInHand:
        """Take a run in hand, under the token of its group if it has one."""
        run = self._runs[flow_run.id] = RunInHand(flow_run, token)
        return run

    def put_down(self, run: RunInHand) -> None:
        """Have a run in hand no longer; it is perhaps the turn of another one."""
        del self._runs[run.flow_run.id]
        self.let_begin()

    def those(self, which: Which) -> list[RunInHand]:
        """Return some of them."""
        return [run for run in self if which(run.flow_run)]

    def siblings(self, flow_run: FlowRun) -> list[RunInHand]:
        """Return those of a run's job; the run itself is one of them if it is in hand."""
        return self.those(lambda run: run.deployment_id == flow_run.deployment_id)

    def is_its_turn(self, run: RunInHand) -> bool:
        """Return whether a run may begin: ticks of a job of ours do so in order, so many at once."""
        if not self._has_order(run):
            return True
        in_order = all(
            other.life.has_begun or other.due >= run.due for other in self.siblings(run.flow_run)
        )
        return in_order and not self._waits_behind(run)

    def _waits_behind(self, run: RunInHand) -> bool:
        """Return whether a tick waits for others of its job to be over, which may have no more at once."""
        job = self._known(run.flow_run)
        if job is None or job.max_concurrent is None or run.life.has_begun or not self._has_order(run):
            return False
        others = [other for other in self.siblings(run.flow_run) if other is not run]
        before = [other for other in others if not self._has_order(other) or other.due < run.due]
        return len(before) >= job.max_concurrent

    def hold_back(self, run: RunInHand) -> None:
        """Have later ticks of a run's job given back that have not begun: it waits in the queue again."""
        if not self._has_order(run):
            return
        for other in self.siblings(run.flow_run):
            if other.due > run.due and self._has_order(other) and not other.life.has_begun:
                other.meet(runs.Deferred())

    def make_room(self) -> None:
        """Have ticks given back that wait for others of their job to be over: another job's could begin."""
        for run in self:
            if self._waits_behind(run) and not run.life.deferred:
                run.meet(runs.Deferred())

    def _has_order(self, run: RunInHand) -> bool:
        job = self._known(run.flow_run)
        return ticks.is_tick(run.flow_run) and (job is None or job.trigger is not None)

    def let_begin(self) -> None:
        """Let the processes go on that have waited for an earlier tick."""
        for run in self:
            if run.host is not None and self.is_its_turn(run):
                run.host.go()

    def call_off(self, job_id: UUID, reason: str, which: Which = any_run) -> None:
        """Have no tick of a job begin any more, or none of some; one that was claimed is Skipped."""
        for run in self.those(
            lambda run: run.deployment_id == job_id and ticks.is_tick(run) and which(run)
        ):
            run.meet(runs.CalledOff(reason))

    def cancel(self, run_id: UUID) -> None:
        """End a run that is to be cancelled, if it is going on here."""
        run = self._runs.get(run_id)
        if run is not None and run.host is not None:
            run.meet(runs.Cancelled(time.monotonic()))
