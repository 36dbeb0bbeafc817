"""Whether a run that has a place is to be claimed: what trigger, policies, pauses and plans say of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.client.schemas.objects import FlowRun, StateType

from taskadapter.agent.ends import OVER_ALREADY
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.plans import is_off, plan_of
from taskadapter.prefect_api.deployments import is_on
from taskadapter.prefect_api.pool import PoolSize
from taskadapter.prefect_api.ticks import runs_of
from taskadapter.rules import ticks
from taskadapter.rules.ticks import Verdict

if TYPE_CHECKING:
    from taskadapter.agent.ends import Ends
    from taskadapter.agent.hand import Hand, RunInHand
    from taskadapter.agent.jobs import DeployedJob
    from taskadapter.agent.node import Node
    from taskadapter.agent.queue import Queue
    from taskadapter.agent.runner import Runner
    from taskadapter.agent.timetable import Timetable
    from taskadapter.declare.triggers import TriggerConfiguration

JUST_READ_SECONDS = 0.5
"""A deployment that was read so shortly before is as it was."""

NOT_BEGUN = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
"""What Prefect may have of a run whose body has not begun: its engine says Running before that."""


class Judge:
    """Judges runs as Prefect's schedule cannot.

    Args:
        node: whose runs they may become.
        ends: what ends those whose jobs are over.
        timetable: which ticks are owed, and which jobs paused.
        queue: where those go that wait for earlier ones.
        hand: the runs that are taken.
        runner: has ticks skipped.
        look_for: has a look made for what some news is about.
    """

    def __init__(
        self,
        node: Node,
        ends: Ends,
        timetable: Timetable,
        queue: Queue,
        hand: Hand,
        runner: Runner,
        look_for: Callable[[News], None],
    ) -> None:
        self._node = node
        self._client = node.client
        self._ends = ends
        self._timetable = timetable
        self._queue = queue
        self._hand = hand
        self._runner = runner
        self._look_for = look_for

    async def leaves(self, run: RunInHand, job: DeployedJob) -> bool:
        """Do about a run that is not to be claimed what that asks for; return whether it is one."""
        if await self._is_off(run.flow_run, job) or await self._is_unwanted(run, job):
            return True
        return await self._is_off_plan(run.flow_run)

    async def _is_off(self, flow_run: FlowRun, job: DeployedJob) -> bool:
        """Return whether a run is a tick of a job that is paused or over: ask the API where it may be.

        When a job is paused or ended Prefect deletes what its scheduler has planned, and nothing else.
        """
        if flow_run.deployment_id is None or not ticks.is_tick(flow_run):
            return False
        if flow_run.auto_scheduled and not self._timetable.may_be_over(flow_run):
            return False
        deployment = job.deployment
        if time.monotonic() - job.snapshot.read_at > JUST_READ_SECONDS:
            deployment = await self._client.read_deployment(flow_run.deployment_id)
        if deployment.paused:
            self._timetable.hold(deployment)
        elif not is_on(deployment):
            # Perhaps one of many that were being planned when the job ended.
            self._ends.end(job, OVER_ALREADY)
        return deployment.paused or not is_on(deployment)

    async def _is_off_plan(self, flow_run: FlowRun) -> bool:
        """Delete what was planned before its schedule was edited, and return whether it is such a run."""
        if flow_run.run_count or not self._timetable.is_off_plan(flow_run):
            return False
        assert flow_run.deployment_id is not None  # noqa: S101 - it has a plan
        deployment = await self._client.read_deployment(flow_run.deployment_id)
        plan = plan_of(deployment)
        if plan is None or not is_off(plan, flow_run):
            # It has been edited since the last look, of which Prefect tells nobody.
            self._look_for(News(Kind.DEPLOYMENT, flow_run.deployment_id))
            return False
        await self._client.delete_flow_run(flow_run.id)
        return True

    async def _is_unwanted(self, run: RunInHand, job: DeployedJob) -> bool:
        """Skip, delete or leave a tick that trigger or policy do not want; return whether it is one.

        One that another node has begun meanwhile is not skipped: Prefect, or the ledger, refuses it next.
        """
        if job.trigger is None or not ticks.is_tick(run.flow_run):
            return False
        waiting_time = PoolSize.of(self._node.pool()).waiting_time
        judgement = ticks.judge(
            job.trigger,
            run.tick,
            now=datetime.now(UTC),
            waiting_time=waiting_time,
            paused=self._timetable.fell_into_pause(run.flow_run),
            begun=run.flow_run.run_count > 0,
        )
        match judgement.verdict:
            case Verdict.EARLY:
                await self._client.delete_flow_run(run.flow_run.id)
            case Verdict.END if await self._is_owed_before(run, job.trigger):
                self._queue.put(run.flow_run)
                self._queue.try_later(run.flow_run.id, time.monotonic())
                self._look_for(News(Kind.WAITS, run.flow_run.id))
            case Verdict.END:
                self._ends.end(job, judgement.reason)
                self._timetable.end(job.deployment.id, job.slug)
            case Verdict.SKIP:
                return await self._runner.skip(run, job, judgement.reason)
        return judgement.verdict is not Verdict.RUN

    async def _is_owed_before(self, run: RunInHand, trigger: TriggerConfiguration) -> bool:
        """Return whether earlier ticks of a run's job are still to begin, here or on another node.

        When the job ends Prefect deletes what is planned of it, and the ledger refuses what is claimed.
        """
        job_id, siblings = run.flow_run.deployment_id, self._hand.siblings(run.flow_run)
        assert job_id is not None  # noqa: S101 - a tick has one
        if any(other.tick < run.tick and not other.life.has_begun for other in siblings):
            return True
        if self._timetable.owes(job_id, run.tick - timedelta.resolution):
            return True
        begun = {other.flow_run.id for other in siblings if other.life.has_begun}
        left = await runs_of(self._client, [job_id], NOT_BEGUN)
        dues = filter(None, (ticks.tick_of(one) for one in left if one.id not in begun))
        return any(
            due < run.tick and ticks.judge(trigger, due).verdict is not Verdict.EARLY for due in dues
        )
