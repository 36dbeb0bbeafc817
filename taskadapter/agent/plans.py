"""When a job is due, and up to where its ticks are settled: what a timetable has of each job. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.schedules import IntervalSchedule

from taskadapter.declare.triggers import TriggerConfiguration, WaitingPolicy
from taskadapter.prefect_api.deployments import schedule_of, trigger_of
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

    from taskadapter.coordination.executions import Entered

MADE_AHEAD = 20
"""How many late ticks of one job the agent makes at most, the oldest first, until some are done."""

SHOWN = 100
"""How many ticks that a policy ignores are made, to be shown as skipped; those before are passed over."""


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


@dataclass
class Line:
    """A job's plan, and up to where its ticks are settled.

    Attributes:
        deployment_id: the job.
        name: its deployment's name.
        plan: its schedule and queue.
        through: every tick until then, itself included, is settled: claimed, skipped or ended.
        settled: later ones that are.
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
    held: bool = False
    resumed: datetime | None = None
    is_new: bool = True
    is_stale: bool = False

    def owed(self, until: datetime) -> list[datetime]:
        """Return the ticks until then that are not settled, oldest first, as many as are made ahead."""
        end = self.plan.trigger.end_time
        until = until if end is None else min(until, end)
        if self.plan.trigger.policy.waiting_policy is not WaitingPolicy.WAIT:
            ignored = timedelta(seconds=SHOWN * self.plan.interval)
            self.through = max(self.through, until - ignored)
        ticks = self._ticks(until)
        return list(islice((tick for tick in ticks if tick not in self.settled), MADE_AHEAD))

    def unplanned(self, after: datetime, until: datetime, known: Collection[datetime]) -> datetime | None:
        """Return the first tick in a span of time that nobody has planned, settled ones aside."""
        end = self.plan.trigger.end_time
        until = until if end is None else min(until, end)
        after = max(after, self.through)
        own = ticks.between(self.plan.anchor, self.plan.interval, after=after, until=until)
        return next((tick for tick in own if tick not in known and tick not in self.settled), None)

    def settle(self, tick: datetime) -> None:
        """Take note that a tick has been claimed, skipped or ended."""
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
