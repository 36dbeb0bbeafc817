"""When jobs are due, up to where their ticks are settled, and which are missing. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Self
from uuid import UUID

from prefect.client.schemas.schedules import IntervalSchedule

from taskadapter.declare.triggers import TriggerConfiguration, WaitingPolicy
from taskadapter.prefect_api.deployments import schedule_of, trigger_of
from taskadapter.prefect_api.ticks import MANY_LATE, Due
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

    from taskadapter.coordination.executions import Entered

MADE_AHEAD = 20
"""How many late ticks of one job the agent makes at most, the oldest first, until some are done."""

SHOWN = 100
"""How many ticks that a policy ignores are made, to be shown as skipped; those before are passed over."""


MADE_AT_ONCE = 64
"""How many late ticks of all jobs are made at one look, the oldest first, before it is acted on."""

LOOK_AHEAD = timedelta(seconds=3)
"""A tick that nobody has planned this long before its time is made: longer than from one look of an agent
to the next and the time by which it claims ahead, so that the ticks of a job are claimed in order."""

KNOWN_BEFORE = timedelta(seconds=10)
"""The agent must know of a run this long before its time: longer than the time by which it claims ahead."""


@dataclass(frozen=True)
class Plan:
    """When a job is due and where its runs wait, as Prefect has it: somebody may have edited it there.

    Attributes:
        queue: its work queue's name.
        queue_id: that queue, of this pool.
        schedule_id: its schedule.
        anchor: the moment of tick 0.
        interval: seconds between two ticks.
        trigger: as deployed.
        created: when the schedule was made.
    """

    queue: str
    queue_id: UUID | None
    schedule_id: UUID
    anchor: datetime
    interval: float
    # Deploying again touches these, and leaves the ticks what they are.
    trigger: TriggerConfiguration = field(compare=False)
    created: datetime = field(compare=False)

    def until(self, moment: datetime) -> datetime:
        """Return until when its ticks are due by a moment: no longer than its trigger says."""
        end = self.trigger.end_time
        return moment if end is None else min(moment, ticks.in_utc(end))


@dataclass
class Line:
    """A job's plan, and up to where its ticks are settled.

    Attributes:
        deployment_id: the job.
        name: its deployment's name.
        plan: its schedule and queue.
        through: every tick until then, itself included, is settled: claimed, skipped or ended.
        settled: later ones that are.
        left: those that are made, and wait until Prefect lists them.
        held: whether the job is paused.
        resumed: when it was resumed last, as far as the agent has seen a pause.
        is_new: whether the agent has not looked after it before.
        is_stale: whether what is settled is to be looked up again.
    """

    deployment_id: UUID
    name: str
    plan: Plan
    through: datetime
    settled: set[datetime] = field(default_factory=set)
    left: set[datetime] = field(default_factory=set)
    held: bool = False
    resumed: datetime | None = None
    is_new: bool = True
    is_stale: bool = False

    def owed(self, until: datetime) -> list[datetime]:
        """Return the ticks until then that are not settled, oldest first, as many as are made ahead."""
        until = self.plan.until(until)
        if self.plan.trigger.policy.waiting_policy is not WaitingPolicy.WAIT:
            ignored = timedelta(seconds=SHOWN * self.plan.interval)
            self.through = max(self.through, until - ignored)
        ticks = self._ticks(until)
        return list(islice((tick for tick in ticks if tick not in self.settled), MADE_AHEAD))

    def is_late(self, now: datetime) -> bool:
        """Return whether many of its ticks are late."""
        return len(self.owed(now)) >= MANY_LATE

    def unplanned(self, after: datetime, until: datetime, known: Collection[datetime]) -> datetime | None:
        """Return the first tick in a span of time that nobody has planned, settled ones aside."""
        until = self.plan.until(until)
        after = max(after, self.through)
        own = ticks.between(self.plan.anchor, self.plan.interval, after=after, until=until)
        return next((tick for tick in own if tick not in known and tick not in self.settled), None)

    def settle(self, tick: datetime) -> None:
        """Take note that a tick has been claimed, skipped or ended."""
        self.left.discard(tick)
        if tick <= self.through:
            return
        self.settled.add(tick)
        for following in self._ticks(max(self.settled)):
            if following not in self.settled:
                break
            self.settled.discard(following)
            self.through = following

    def _ticks(self, until: datetime) -> Iterator[datetime]:
        return ticks.between(self.plan.anchor, self.plan.interval, after=self.through, until=until)


@dataclass(frozen=True)
class Seen:
    """What a look at the runs that wait tells of the ticks that are made.

    Attributes:
        now: the moment of the look.
        until: up to when those that wait are listed.
        is_cut: whether more wait than are listed.
        behind: the jobs with more late ticks than are wanted at once, and up to when theirs are listed.
        planned: the ticks of each job that wait, or are in hand.
        listed: the jobs of which some wait.
    """

    now: datetime
    until: datetime
    is_cut: bool
    behind: Mapping[UUID, datetime]
    planned: Mapping[UUID | None, Collection[datetime]]
    listed: Collection[UUID | None]

    @classmethod
    def of(cls, found: Due, in_hand: Iterable[FlowRun], now: datetime) -> Self:
        """Return what those runs tell that were found, and are in hand, at a moment."""
        planned: dict[UUID | None, set[datetime]] = {}
        for run in (*found.runs, *in_hand):
            if (tick := ticks.tick_of(run)) is not None:
                planned.setdefault(run.deployment_id, set()).add(tick)
        listed = {run.deployment_id for run in found.runs}
        return cls(now, found.until, found.is_cut, found.behind, planned, listed)


@dataclass
class Missing:
    """Ticks that are owed and that nobody has made, and what that means for the next look.

    Attributes:
        complete_until: when there are more to be made, at the earliest.
        ticks: they, with their jobs, oldest first; no more than are made at one look.
        held_up: of some jobs the first tick that is still to be made: later ones wait for it.
        has_new: whether some are the first of a job, and others are to follow.
        is_cut: whether the list of runs was too short for jobs that are in time, besides late ones.
        has_left: whether some are made now, and wait until Prefect lists them.
    """

    complete_until: datetime
    ticks: list[tuple[datetime, Line]] = field(default_factory=list)
    held_up: dict[UUID | None, datetime] = field(default_factory=dict)
    has_new: bool = False
    is_cut: bool = False
    has_left: bool = False

    def hold_up(self, line: Line, tick: datetime) -> None:
        """Have a job's ticks from this one on wait: they begin in order."""
        self.held_up[line.deployment_id] = min(tick, self.held_up.get(line.deployment_id, tick))

    def holds_up(self, flow_run: FlowRun) -> bool:
        """Return whether a run waits for a tick of its job that is still to be made."""
        first, tick = self.held_up.get(flow_run.deployment_id), ticks.tick_of(flow_run)
        return first is not None and tick is not None and tick >= first


def find_missing(lines: Iterable[Line], seen: Seen) -> Missing:
    """Return the ticks of some jobs that are due, or soon will be, and that nobody has made.

    Args:
        lines: the jobs; each is no new one after this.
        seen: what is made.
    """
    missing = Missing(seen.until - KNOWN_BEFORE if seen.is_cut else seen.until)
    for line in lines:
        # What a new job is due to do at once need not wait for what is to follow.
        soon = seen.now if line.is_new else seen.now + LOOK_AHEAD
        missing.has_new |= line.is_new
        line.is_new = False
        until = seen.behind.get(line.deployment_id, seen.until)
        owed = line.owed(min(until, soon))
        if not owed and seen.until < seen.now and line.deployment_id not in seen.listed:
            # However late others are: its ticks are there, or are made.
            owed = line.owed(soon)
            missing.is_cut |= bool(owed)
        planned = {*seen.planned.get(line.deployment_id, ()), *line.left}
        missing.ticks += [(tick, line) for tick in owed if tick not in planned]
        last = owed[-1] if len(owed) == MADE_AHEAD else seen.behind.get(line.deployment_id)
        if last is not None:
            missing.hold_up(line, last + timedelta.resolution)
        if (tick := line.unplanned(seen.now + LOOK_AHEAD, until, planned)) is not None:
            missing.complete_until = min(missing.complete_until, tick - LOOK_AHEAD)
    missing.ticks.sort(key=lambda one: one[0])
    for tick, line in missing.ticks[MADE_AT_ONCE:]:
        missing.hold_up(line, tick)
    del missing.ticks[MADE_AT_ONCE:]
    return missing


def plan_of(deployment: DeploymentResponse) -> Plan | None:
    """Return a job's plan while its schedule is switched on."""
    trigger = trigger_of(deployment)
    schedule = schedule_of(deployment, trigger)
    if trigger is None or schedule is None or not isinstance(schedule.schedule, IntervalSchedule):
        return None
    return Plan(
        queue=deployment.work_queue_name or "",
        queue_id=deployment.work_queue_id,
        schedule_id=schedule.id,
        anchor=ticks.in_utc(schedule.schedule.anchor_date),
        interval=schedule.schedule.interval.total_seconds(),
        trigger=trigger,
        created=ticks.in_utc(schedule.created or datetime.now(UTC)),
    )


def is_off(plan: Plan, flow_run: FlowRun) -> bool:
    """Return whether Prefect has planned a run of a schedule for a moment that is no tick of it any more.

    Somebody has edited the schedule since.
    """
    tick = ticks.tick_of(flow_run)
    if tick is None or not flow_run.auto_scheduled or not ticks.is_of(flow_run, plan.schedule_id):
        return False
    return not ticks.is_on(plan.anchor, plan.interval, tick)


def begin(plan: Plan, entered: Entered | None, last: datetime | None) -> tuple[datetime, set[datetime]]:
    """Return the moment until which all ticks of a job are settled, and later ones that are.

    Nothing is owed from before the schedule was made, edited or switched on again; but its first tick is,
    where that is to come at once. Since then the ledger says what has run: whatever is missing between its
    entries has been lost.

    Args:
        plan: the job's.
        entered: what the ledger has of it.
        last: its last tick that is settled, where the ledger has none.
    """
    start = plan.created
    if plan.trigger.start_time is None:
        start = min(start, plan.anchor - timedelta(microseconds=1))
    if entered is None:
        return start, set()
    start = max(start, entered.opened or start)
    if entered.dues:
        return max(start, entered.dues[-1]), set(entered.dues)
    # Ticks of one job are claimed in order.
    return max(start, last or start), set()
