"""Which ticks of its jobs an agent owes, and those that nobody has planned.

Prefect's scheduler plans ticks ahead of their time only. One that fell into an outage of the server, a
pause, or the moment in which a deployment was changed, is never planned. An agent knows when ticks are
due, sees which of them wait, and makes the missing ones; what then becomes of a late one, the waiting
policy says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from taskadapter.agent.making import Maker, is_stranded
from taskadapter.agent.plans import Line, Plan, Seen, begin, find_missing, is_off, plan_of
from taskadapter.coordination.executions import Entered
from taskadapter.prefect_api.client import PAGE
from taskadapter.prefect_api.deployments import is_on, switched_on_at
from taskadapter.prefect_api.ticks import Due
from taskadapter.rules import ticks

NEW = timedelta(seconds=5)
"""The history of a schedule that was made so shortly before is not asked for."""


class Timetable:
    """The schedules of a pool's jobs, as one agent keeps them.

    Args:
        client: connected to the API.
        log: the agent's.
        entered: returns what the database has of the ticks of some jobs.

    Attributes:
        has_new: whether only the first ticks of a job have been made, and others are to follow.
        is_cut: whether the list of runs was too short for jobs that are in time, besides late ones.
        complete_until: when it is to be completed again.
    """

    def __init__(
        self,
        client: PrefectClient,
        log: Logger | LoggerAdapter[Any],
        entered: Callable[[Collection[UUID]], Awaitable[Mapping[UUID, Entered]]],
    ) -> None:
        self._client = client
        self._log = log
        self._entered = entered
        self._maker = Maker(client, log, self._has_begun, self._keeps)
        self._deployments: dict[UUID, DeploymentResponse] = {}
        # Read from them once for each visit: most jobs of a pool may be over, and each look goes over all.
        self._plans: dict[UUID, Plan] = {}
        self._lines: dict[UUID, Line] = {}
        # Queues that are another agent's since their lines were begun here.
        self._forgotten: set[str] = set()
        # Jobs that are over, and when their schedule had been switched on; None without one.
        self._ended: dict[UUID, datetime | None] = {}
        self.has_new = self.is_cut = False
        self.complete_until = datetime.now(UTC)

    def learn(self, deployments: Iterable[DeploymentResponse]) -> set[UUID]:
        """Take note of all deployments of the pool as they are now; returns those that are gone."""
        known = {deployment.id: deployment for deployment in deployments}
        gone = (self._deployments.keys() | self._ended.keys()) - known.keys()
        self._ended = {
            id_: since for id_, since in self._ended.items() if id_ in known and self._is_over(known[id_])
        }
        before, self._deployments = (
            self._deployments,
            {id_: known[id_] for id_ in known.keys() - self._ended.keys()},
        )
        plans = {
            id_: self._plans.get(id_) if before.get(id_) is deployment else plan_of(deployment)
            for id_, deployment in self._deployments.items()
        }
        self._plans = {id_: plan for id_, plan in plans.items() if plan is not None}
        for deployment_id, line in list(self._lines.items()):
            plan = self._plans.get(deployment_id)
            if plan is None or plan != line.plan:
                # Gone, ended, changed or moved. A schedule that is switched on again begins afresh.
                del self._lines[deployment_id]
                continue
            deployment, line.plan = self._deployments[deployment_id], plan
            if line.held and not deployment.paused:
                line.resumed = ticks.in_utc(deployment.updated or datetime.now(UTC))
                # What was claimed when it was paused was given back, and then perhaps deleted.
                line.is_stale = True
            line.held = deployment.paused
        return gone

    def add(self, deployments: Iterable[DeploymentResponse]) -> None:
        """Take note of some deployments as they are now, which may be new."""
        for deployment in deployments:
            if not self._is_over(deployment):
                self._deployments[deployment.id] = deployment
                if (plan := plan_of(deployment)) is not None:
                    self._plans[deployment.id] = plan

    def is_held(self, flow_run: FlowRun) -> bool:
        """Return whether a run is a tick of a job that was paused when it was last looked at."""
        deployment = self._deployments.get(flow_run.deployment_id) if flow_run.deployment_id else None
        return deployment is not None and deployment.paused and ticks.is_tick(flow_run)

    def may_be_over(self, flow_run: FlowRun) -> bool:
        """Return whether the job of a tick has ended, as far as is known here.

        Prefect's scheduler may have been planning it at the moment in which its schedule was ended.
        """
        deployment = self._deployments.get(flow_run.deployment_id) if flow_run.deployment_id else None
        return flow_run.deployment_id in self._ended or (deployment is not None and not is_on(deployment))

    def is_off_plan(self, flow_run: FlowRun) -> bool:
        """Return whether a run was planned for no tick of its schedule, as that was last looked at."""
        plan = self._plans.get(flow_run.deployment_id) if flow_run.deployment_id else None
        return plan is not None and is_off(plan, flow_run)

    def fell_into_pause(self, flow_run: FlowRun) -> bool:
        """Return whether a tick was due while its job was paused."""
        line, tick = self._lines.get(flow_run.deployment_id or UUID(int=0)), ticks.tick_of(flow_run)
        if line is None or line.resumed is None or tick is None:
            return False
        return not flow_run.auto_scheduled and tick <= line.resumed

    def hold(self, deployment: DeploymentResponse) -> None:
        """Take note of one deployment that has been found to be paused."""
        self._deployments[deployment.id] = deployment
        if (line := self._lines.get(deployment.id)) is not None:
            line.held = True

    @property
    def held(self) -> set[UUID]:
        """The jobs of this agent that were paused when they were last looked at."""
        return {id_ for id_, line in self._lines.items() if line.held}

    def strangers(self, found: Iterable[FlowRun]) -> set[UUID]:
        """Return the jobs of some runs that were not there at the last look."""
        known = self._deployments.keys() | self._ended.keys()
        return {run.deployment_id for run in found if run.deployment_id is not None} - known

    def end(self, deployment_id: UUID, slug: str | None) -> None:
        """Take note that a job is over: none of its ticks is owed any more.

        Args:
            deployment_id: the job.
            slug: of the trigger with which it is; deployed with another one since, it goes on.
        """
        deployment, plan = self._deployments.get(deployment_id), self._plans.get(deployment_id)
        if plan is not None and ticks.slug(plan.trigger) != slug:
            return
        self._ended.setdefault(deployment_id, None if deployment is None else switched_on_at(deployment))
        self.leave_out([deployment_id])

    def _is_over(self, deployment: DeploymentResponse) -> bool:
        """Return whether a job has ended here, and nobody has switched it on again since.

        It shows as active until the API has been told, and in what was read before.
        """
        if deployment.id not in self._ended or not is_on(deployment):
            return False
        ended, now = self._ended[deployment.id], switched_on_at(deployment)
        return ended is None or now is None or now <= ended

    def leave_out(self, job_ids: Iterable[UUID]) -> None:
        """Take note that this agent does not run some jobs any more, whatever their queue."""
        for job_id in job_ids:
            self._lines.pop(job_id, None)
            self._deployments.pop(job_id, None)
            self._plans.pop(job_id, None)

    def late(self, now: datetime) -> set[UUID]:
        """Return the jobs that are late with many ticks, of those that the agent has looked after."""
        return {id_ for id_, line in self._lines.items() if line.is_late(now)}

    def forget(self, queue: str) -> None:
        """Forget how far the jobs of a queue are: from now on another agent runs them."""
        self._lines = {id_: line for id_, line in self._lines.items() if line.plan.queue != queue}
        self._forgotten.add(queue)

    def settle(self, flow_run: FlowRun) -> None:
        """Take note that a tick has been claimed, skipped or ended."""
        line = self._lines.get(flow_run.deployment_id) if flow_run.deployment_id else None
        if line is not None and (tick := ticks.tick_of(flow_run)) is not None:
            line.settle(tick)

    def owes(self, job_id: UUID, until: datetime) -> bool:
        """Return whether a tick of a job until some moment is still to be claimed, skipped or ended."""
        line = self._lines.get(job_id)
        return line is not None and bool(line.owed(until))

    async def complete(
        self,
        found: Due,
        queues: Collection[str],
        in_hand: Iterable[FlowRun],
        now: datetime,
        withheld: Collection[str] = (),
    ) -> list[FlowRun]:
        """Add the ticks that are due, or soon will be, and that nobody has planned.

        Args:
            found: the runs that wait on the queues.
            queues: the ones that this agent runs.
            in_hand: the runs that it has taken and not finished.
            now: the moment of the look.
            withheld: those of the queues of which Prefect lists not all, by a pause or a limit.

        Returns:
            The runs to be started; without those of a job that has earlier ones still to be made.

        Raises:
            HTTPError: the API failed; the same call may be repeated.
        """
        await self._open_lines(queues)
        self._maker.see_planned(run.deployment_id for run in found.runs if run.auto_scheduled)
        seen = Seen.of(found, in_hand, now)
        lines = [line for line in self._lines.values() if line.plan.queue in queues and not line.held]
        for line in lines:
            if line.plan.queue not in withheld:
                line.left.clear()
        missing = find_missing(lines, seen)
        self.has_new, self.is_cut = missing.has_new, missing.is_cut
        self.complete_until = missing.complete_until
        made = await self._maker.make_all(missing, withheld)
        if missing.held_up or missing.has_left:
            self.complete_until = min(self.complete_until, seen.now)
        return [run for run in (*found.runs, *made) if not missing.holds_up(run)]

    def _keeps(self, line: Line) -> bool:
        """Return whether a job's line is still the one that it was: else the job has ended, or changed."""
        return self._lines.get(line.deployment_id) is line

    async def _has_begun(self, job_id: UUID, tick: datetime) -> bool:
        return tick in (await self._entered([job_id]))[job_id].dues

    async def _open_lines(self, queues: Collection[str]) -> None:
        """Begin the lines of the jobs that have none yet, or a stale one."""
        lines = {id_: self._lines.get(id_) for id_, plan in self._plans.items() if plan.queue in queues}
        plans = {id_: self._plans[id_] for id_, line in lines.items() if line is None or line.is_stale}
        self._forgotten.clear()
        entered, last = await self._settled(plans)
        for deployment_id, plan in plans.items():
            line, deployment = lines[deployment_id], self._deployments.get(deployment_id)
            # Else it has ended meanwhile, or is another agent's.
            if deployment is not None and plan.queue not in self._forgotten:
                through, settled = begin(plan, entered.get(deployment_id), last.get(deployment_id))
                self._lines[deployment_id] = Line(
                    deployment_id,
                    deployment.name,
                    plan,
                    through,
                    settled,
                    held=deployment.paused,
                    resumed=None if line is None else line.resumed,
                    is_new=line is None,
                )

    async def _settled(
        self, plans: Mapping[UUID, Plan]
    ) -> tuple[Mapping[UUID, Entered], Mapping[UUID, datetime]]:
        """Return what is entered of some jobs and, where nothing is, their last tick that is settled."""
        # The few ticks of a schedule that is new show for themselves whether they are settled.
        old = [id_ for id_, plan in plans.items() if datetime.now(UTC) - plan.created >= NEW]
        entered = await self._entered(old) if old else {}
        unknown = {id_: plans[id_].schedule_id for id_, found in entered.items() if not found.dues}
        return entered, await self._last_settled(unknown)

    async def _last_settled(self, schedule_ids: Mapping[UUID, UUID]) -> dict[UUID, datetime]:
        """Return the last tick of each job that is settled, as Prefect has it."""
        types = [kind for kind in StateType if kind is not StateType.SCHEDULED]
        left, last = set(schedule_ids), dict[UUID, datetime]()
        while left:
            runs = await self._client.read_flow_runs(
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=list(left))),
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)),
                    expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
                ),
                sort=FlowRunSort.EXPECTED_START_TIME_DESC,
                limit=PAGE,
            )
            for run in runs:
                job_id, tick = run.deployment_id, ticks.tick_of(run)
                if job_id not in left or tick is None or is_stranded(run):
                    continue
                if ticks.is_of(run, schedule_ids[job_id]):
                    last.setdefault(job_id, tick)
            if len(runs) < PAGE:
                break
            left -= {run.deployment_id for run in runs}
        return last
