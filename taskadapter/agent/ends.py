"""The end of a job, for all nodes: its schedule stops, and nothing that is planned of it begins."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

import httpx
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse

from taskadapter.agent.jobs import DeployedJob, is_of_any
from taskadapter.agent.looks import PLANNED_SECONDS
from taskadapter.agent.node import Node
from taskadapter.prefect_api.client import in_words
from taskadapter.prefect_api.ticks import delete_run, runs_of
from taskadapter.rules import ticks

OVER_ALREADY = "it is over already"
"""Why a tick is skipped whose job had been ended before, by another node or by somebody in the UI."""

SETTLE_SECONDS = 5.0
"""How long a stopping agent waits until jobs that are over have been put away."""


class Ends:
    """Ends jobs.

    Args:
        node: what it does is done for this node.
        tell: hears of each job that is over, and why.
        put_away: hears of each whose schedule has been stopped, of which Prefect tells nobody.
    """

    def __init__(
        self, node: Node, tell: Callable[[DeployedJob, str], None], put_away: Callable[[UUID], None]
    ) -> None:
        self._client = node.client
        self._log = node.log
        self._tasks = node.tasks
        self._teller = node.teller
        self._tell = tell
        self._tell_put_away = put_away
        self._ending: dict[UUID, asyncio.Task[None]] = {}
        # Jobs of which it has been said that they are over.
        self._over: set[UUID] = set()

    def retain(self, job_ids: AbstractSet[UUID]) -> None:
        """Remember nothing of other jobs, most of which are deleted by now."""
        self._over &= job_ids

    def is_ending(self, flow_run: FlowRun) -> bool:
        """Return whether the run's job is over and its planned runs are being put away."""
        return ticks.is_tick(flow_run) and flow_run.deployment_id in self._ending

    def end(self, job: DeployedJob, reason: str) -> None:
        """End a job for all nodes: its schedule stops, what is late is skipped. Ends in background."""
        if job.deployment.id not in self._ending:
            self._say_ended(job, reason)
            self._ending[job.deployment.id] = self._tasks.spawn(self._end(job, reason))

    def _say_ended(self, job: DeployedJob, reason: str) -> None:
        """Say that a job is over; of one that was over already once, however much of it is planned."""
        if reason != OVER_ALREADY:
            self._log.info("Job %s has ended: %s.", job.name, reason)
        elif job.deployment.id in self._over:
            return
        else:
            self._log.info("Job %s is over already; what is planned of it is skipped.", job.name)
        self._over.add(job.deployment.id)
        self._tell(job, reason)

    async def _end(self, job: DeployedJob, reason: str) -> None:
        tries = itertools.count()
        try:
            await self._teller.until_told(lambda: self._put_away(job, reason, is_late=next(tries) > 0))
            self._tasks.spawn(self._look_once_more(job, reason))
        except httpx.HTTPStatusError as refusal:
            self._log.error(
                "Job %s is over, but Prefect refuses to show it as over: %s",
                job.name,
                in_words(refusal),
            )
        finally:
            del self._ending[job.deployment.id]
            # Seen to be off, it can be seen to be switched on again.
            self._tell_put_away(job.deployment.id)

    async def _look_once_more(self, job: DeployedJob, reason: str) -> None:
        """See to what the scheduler plans that had read the schedule before it was stopped."""
        await asyncio.sleep(PLANNED_SECONDS)
        with suppress(httpx.HTTPStatusError):  # what is left is skipped when it is due
            await self._teller.until_told(lambda: self._end_remains(job, reason))

    async def _put_away(self, job: DeployedJob, reason: str, *, is_late: bool) -> None:
        """Stop a job's schedule, and end what is planned of it, unless somebody has started it again.

        Args:
            job: as it was read before it ended.
            reason: why it is over.
            is_late: whether the API was told before, and did not answer.
        """
        deployment = await self._client.read_deployment(job.deployment.id)
        before = {schedule.id: schedule.updated for schedule in job.deployment.schedules}
        for schedule in _schedules_of(job, deployment):
            if not schedule.active:
                continue
            if is_late and schedule.updated != before.get(schedule.id):
                self._log.info("Job %s was started again before Prefect knew that it had ended.", job.name)
                return
            await self._client.update_deployment_schedule(deployment.id, schedule.id, active=False)
        await self._end_planned(await self._planned(job), job, deployment, reason)

    async def _end_remains(self, job: DeployedJob, reason: str) -> None:
        """End what has been planned of a job since it was put away, unless it was started again."""
        # Asked for first, nothing is among them that belongs to a start after the next answer.
        flow_runs = await self._planned(job)
        deployment = await self._client.read_deployment(job.deployment.id)
        if not any(schedule.active for schedule in _schedules_of(job, deployment)):
            await self._end_planned(flow_runs, job, deployment, reason)

    async def _planned(self, job: DeployedJob) -> list[FlowRun]:
        found = await runs_of(self._client, [job.deployment.id], [StateType.SCHEDULED])
        # One that waits for its next attempt is Scheduled too.
        return [run for run in found if ticks.is_tick(run) and run.run_count == 0]

    async def _end_planned(
        self, flow_runs: Iterable[FlowRun], job: DeployedJob, deployment: DeploymentResponse, reason: str
    ) -> None:
        """Skip what is due, and delete what Prefect has planned beyond, as it does itself.

        Of a job that is started again that is planned anew, and what has been skipped is not.
        """
        # It may have been deployed with another trigger, with which it goes on.
        others = [schedule for schedule in deployment.schedules if schedule.slug != job.slug]
        now = datetime.now(UTC)
        for flow_run in flow_runs:
            if is_of_any(flow_run, others):
                continue
            if flow_run.auto_scheduled and (flow_run.expected_start_time or now) > now:
                await delete_run(self._client, flow_run)
            else:
                await self._teller.skip(flow_run, reason)

    async def wait(self) -> None:
        """Wait until every job that is over has been put away, but not for an API that is away."""
        if self._ending:
            await asyncio.wait(self._ending.values(), timeout=SETTLE_SECONDS)


def _schedules_of(job: DeployedJob, deployment: DeploymentResponse) -> list[DeploymentSchedule]:
    return [schedule for schedule in deployment.schedules if schedule.slug == job.slug]
