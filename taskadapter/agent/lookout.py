"""What an agent looks at in Prefect's API: the runs that are due soon, and what has changed of its jobs.

A *look* is for runs, a *visit* for all queues and deployments of the pool as well. `Looks` remembers when
either is wanted: because a run is planned, because of news, or because time has passed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from taskadapter.agent.hearing import Hearing, Kind, News
from taskadapter.agent.looks import SHORTEST_PAUSE_SECONDS, Looks, Pace
from taskadapter.agent.node import Node, queue_of
from taskadapter.agent.switches import carry_over
from taskadapter.coordination import store
from taskadapter.declare.attached import FETCH_CODE, file_of
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import ApiUnavailableError, CoordinationError, TaskError
from taskadapter.prefect_api.client import API_FAULTS, in_words
from taskadapter.prefect_api.deployments import deployments_of, deployments_of_pool
from taskadapter.prefect_api.pool import PoolSize, working_dir_of
from taskadapter.prefect_api.ticks import Due, due

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

    from taskadapter.agent.dispatcher import Dispatcher
    from taskadapter.agent.hand import Hand
    from taskadapter.agent.hosts import HostPool
    from taskadapter.agent.jobs import Deployments
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.sight import Sight
    from taskadapter.agent.timetable import Timetable

RETRY_SECONDS = 0.02
"""How long to wait before the API is asked again on behalf of somebody who waits for it."""


class Lookout:
    """Looks at the API on behalf of an agent.

    Args:
        node: the node.
        sight: what the looks come to.
        membership: its part in the pool's groups.
        hosts: the processes; how many there may be, the pool says.
        deployments: what runs are runs of.
        timetable: learns here which jobs there are, and makes the ticks that are missing.
        hand: the runs that are taken, which are not looked for.
        dispatcher: is told which runs are due.
        pace: how often to look.
        limit: how many runs at once the agent's command allows; None if it does not say.
        prefetch_seconds: how long before its time a run is to be known at least.
    """

    def __init__(
        self,
        node: Node,
        sight: Sight,
        membership: Membership,
        hosts: HostPool,
        deployments: Deployments,
        timetable: Timetable,
        hand: Hand,
        dispatcher: Dispatcher,
        *,
        pace: Pace,
        limit: int | None,
        prefetch_seconds: float,
    ) -> None:
        self._node = node
        self._sight = sight
        self._membership = membership
        self._hosts = hosts
        self._deployments = deployments
        self._timetable = timetable
        self._hand = hand
        self._dispatcher = dispatcher
        self._pace = pace
        self._limit = limit
        self._prefetch_seconds = prefetch_seconds
        self._looks = Looks()
        self._looking = asyncio.Lock()
        self._hearing = Hearing(node.log, self._hear, lambda: sight.is_api_away)
        self._listening: asyncio.Task[None] | None = None
        self._heard_pool: UUID | None = None
        # The pool's deployments, as they were last looked at, and jobs of runs that are none of them.
        self._deployed: dict[UUID, DeploymentResponse] = {}
        self._gone: set[UUID] = set()
        # The files of code that are not here, by the folder in which they should be.
        self._lacking: dict[Path, set[str]] = {}
        # Whether there have been jobs, or it was said that there are none.
        self._had_jobs = False
        # Whether there was more to do than there was room for at the last look, and still is.
        self._had_plenty = False

    @property
    def hears(self) -> bool:
        """Whether the agent hears of what it cannot know ahead."""
        return self._hearing.hears

    def want(self) -> None:
        """Have a look made at once."""
        self._looks.want()

    def want_visit(self) -> None:
        """Have a visit made at once."""
        self._looks.want_visit()

    def look_for(self, news: News) -> None:
        """Have a look made for what somebody in the agent has found out."""
        self._looks.hear(news)

    def _hear(self, news: News | None) -> None:
        """Act on an event of Prefect's; None: some events may have been missed."""
        about = None if news is None else news.about
        if news is not None and news.kind is Kind.CANCELLING and about is not None:
            self._hand.cancel(about)
        elif about not in self._hand.ids:  # what becomes of those is known here first
            self._looks.hear(news)

    # --- a look -----------------------------------------------------------------------------------

    async def poll(self) -> list[FlowRun]:
        """Look for runs if it is time to; the dispatcher starts them. No fault of the API is raised."""
        if self._had_plenty and not self._dispatcher.has_plenty:
            self._had_plenty = False
            self._looks.want()
        if not self._node.has_pool() or not self._looks.is_due(self._pause):
            return []
        async with self._looking:  # a takeover looks at once, perhaps in the middle of another look
            return await self._look_once()

    async def _look_once(self) -> list[FlowRun]:
        with self._sight.looking() as asked:
            try:
                found = await self._look()
            except Exception as fault:
                words = in_words(fault)
                if isinstance(fault, ObjectNotFound):
                    words = f"work pool {self._node.work_pool!r} is gone from Prefect; deploy again"
                elif not isinstance(fault, (*API_FAULTS, TaskError)):
                    self._node.log.exception("Looking for runs failed.")
                    words = type(fault).__name__
                await asyncio.sleep(self._sight.fail(fault, words, asked))
                return []
        if self._sight.succeed(asked):
            # An API whose broker was away has told nothing, though the stream of its events was open.
            self._looks.hear(None)
        self._dispatcher.found(found, asked)
        by_hand = {run.id: run.created for run in found if not run.auto_scheduled}
        self._hearing.compare(by_hand | {id_: deployed.created for id_, deployed in self._deployed.items()})
        self._had_plenty = self._dispatcher.has_plenty
        self._looks.looked(asked, self._enough_for())
        return found

    def _enough_for(self) -> float:
        """Return for how many seconds what a look has found is enough."""
        ahead = (self._timetable.complete_until - datetime.now(UTC)).total_seconds()
        if self._timetable.has_new:
            least = 0.0
        elif self._had_plenty:
            least = self._pace.at_plenty(knows_all=self.hears and not self._timetable.is_cut)
        else:
            least = SHORTEST_PAUSE_SECONDS
        return max(ahead, least)

    @property
    def _pause(self) -> float:
        return self._pace.of_looks(hears=self.hears, is_busy=self._dispatcher.is_busy)

    async def _look(self) -> list[FlowRun]:
        # Has a paused job been resumed? Its missed ticks are late already.
        is_busy = self._dispatcher.is_busy and not self._timetable.held
        # A node that serves nothing now would ask nothing, and take that for an answer.
        is_blind = self._sight.blind_for > 0 and not self._membership.served
        if is_blind or self._looks.is_visit_due(self._pace.of_visits(hears=self.hears, is_busy=is_busy)):
            await self._visit()
        elif changed := self._looks.changed:
            await self._look_at(changed)
        wanted = self._membership.served
        if not wanted:
            return []
        now = datetime.now(UTC)
        try:
            found = await self._due(wanted, now + timedelta(seconds=self._pause + self._prefetch_seconds))
        except ObjectNotFound:
            self._looks.want_visit()  # a queue, or the pool, was deleted
            return []
        # A new job's first ticks may not be planned: it must be known before one of them is started.
        if self._timetable.strangers(found.runs) - self._gone:
            await self._visit()
            self._gone = self._timetable.strangers(found.runs)
        runs = await self._timetable.complete(
            found, wanted, self._hand.flow_runs, now, self._membership.withheld
        )
        await self._deployments.prepare(runs)
        return runs

    async def _due(self, wanted: list[str], before: datetime) -> Due:
        """Return the runs of this node's jobs that are due until some moment.

        Raises:
            ObjectNotFound: a queue, or the pool, is gone.
        """
        withheld = self._membership.withheld & set(wanted)
        asked_for = set(wanted) - withheld
        # Those that have ended, too: somebody may ask for a run of them.
        job_ids = {id_ for id_, job in self._deployed.items() if job.work_queue_name in asked_for}
        job_ids -= self._node.share.left_out
        found = await due(
            self._node.client,
            self._node.work_pool,
            # The server looks up each queue by its name, but not those of the whole pool.
            None if self._membership.queues <= set(wanted) else wanted,
            before,
            job_ids=job_ids,
            late=lambda: self._timetable.late(datetime.now(UTC)) & job_ids,
            withheld=withheld,
        )
        runs = [run for run in found.runs if queue_of(run) in wanted and self._node.share.has_job_of(run)]
        return replace(found, runs=runs)

    # --- a visit ----------------------------------------------------------------------------------

    async def _visit(self) -> None:
        """Look at the pool's queues and deployments: at its groups, and at what its jobs are to do."""
        node, asked = self._node, time.monotonic()
        await self._membership.refresh()
        self._listen()
        found = await deployments_of_pool(node.client, node.work_pool)
        self._deployed = {deployment.id: deployment for deployment in found}
        self._say_empty()
        await self._take_note(found)
        self._forget_others()
        size = PoolSize.of(node.pool())
        self._hosts.limit = self._limit or size.worker_count or node.settings.worker_count
        self._looks.visited(asked)

    def _forget_others(self) -> None:
        """Have jobs forgotten that are the pool's no more, and of which nothing goes on."""
        going_on = {run.deployment_id for run in self._hand.flow_runs if run.deployment_id is not None}
        known = self._deployed.keys() | going_on
        for part in (self._deployments, self._dispatcher):
            part.retain(known)

    def _say_empty(self) -> None:
        """Say once that there are no jobs, of an agent that was started before any was deployed."""
        if not self._deployed and not self._had_jobs:
            self._node.log.info("Work pool %r has no jobs yet.", self._node.work_pool)
        self._had_jobs = True

    def _listen(self) -> None:
        """Hear of what happens in the pool, which may have been deleted and made anew."""
        pool_id = self._node.pool().id
        if self._heard_pool != pool_id:
            self._heard_pool = pool_id
            if self._listening is not None:
                self._listening.cancel()
            self._listening = self._node.tasks.spawn(self._hearing.listen(pool_id))

    async def _look_at(self, job_ids: Collection[UUID]) -> None:
        """Look at some deployments of which there is news."""
        found = await deployments_of(self._node.client, job_ids)
        ours = [deployment for deployment in found if deployment.work_pool_name == self._node.work_pool]
        rest = {id_: deployment for id_, deployment in self._deployed.items() if id_ not in job_ids}
        self._deployed = rest | {deployment.id: deployment for deployment in ours}
        await self._take_note(ours)

    async def _take_note(self, news: Collection[DeploymentResponse]) -> None:
        """Carry over what has changed in some deployments, and see what all jobs are to do."""
        url = self._membership.database_url
        if news:
            await carry_over(url, news)
            self._hosts.use(SecretStr(url))
        left_out = self._node.share.left_out
        found = [deployment for id_, deployment in self._deployed.items() if id_ not in left_out]
        self._look_for_code(found)
        if gone := self._timetable.learn(found):
            self._node.tasks.spawn(self._end_gone(gone))

    def _look_for_code(self, found: Collection[DeploymentResponse]) -> None:
        """Say which folders lack the code of jobs of this node, whose ticks wait here; once."""
        default = working_dir_of(self._node.pool())
        lacking: dict[Path, set[str]] = {}
        for deployment in found:
            if not self._node.share.serves(deployment.work_queue_name or DEFAULT_QUEUE):
                continue
            folder = (deployment.job_variables or {}).get("working_dir") or default or deployment.path
            file, place = file_of(deployment.entrypoint or ""), _absolute(Path(folder or ""))
            if file is not None and not deployment.pull_steps and not _has(place, file):
                lacking.setdefault(place, set()).add(str(file))
        for place, files in lacking.items():
            if files - self._lacking.get(place, set()):
                self._node.log.warning(
                    "Folder %s lacks %s, and its ticks wait here; %s.",
                    place,
                    ", ".join(sorted(files)),
                    FETCH_CODE,
                )
        self._lacking = lacking

    async def _end_gone(self, job_ids: set[UUID]) -> None:
        """Have nothing of jobs begin that were deleted."""
        for job_id in job_ids:
            # Whatever claims a run of it later finds no deployment.
            with suppress(*API_FAULTS, CoordinationError):
                try:
                    await self._node.client.read_deployment(job_id)
                except ObjectNotFound:
                    reason = "its deployment was deleted"
                    await asyncio.to_thread(store.end_job, self._membership.database_url, job_id, reason)

    # --- for somebody who waits for it ------------------------------------------------------------

    async def look_at_once(self, queue: str, job_ids: Collection[UUID], end: float) -> None:
        """Look at a queue and some jobs now; repeat it until then while the API does not answer.

        Args:
            queue: the queue.
            job_ids: jobs of it, which may be new.
            end: when to give up, on the monotonic clock.

        Raises:
            ApiUnavailableError: it has not answered.
        """
        while True:
            try:
                if self._node.has_pool():
                    async with self._looking:
                        await self._learn(queue, job_ids)
                    break
                fault = "Prefect's API does not answer"
            except API_FAULTS as exc:
                fault = in_words(exc)
            if time.monotonic() >= end:
                raise ApiUnavailableError(f"{fault}.")
            await asyncio.sleep(RETRY_SECONDS)
        self._looks.want()

    async def _learn(self, queue: str, job_ids: Collection[UUID]) -> None:
        """Look at one queue of the pool and some of its jobs, as a visit does at all of them."""
        asked = time.monotonic()
        if self._membership.domain is None or self._looks.is_visit_due(float("inf")):
            await self._visit()
            return
        await self._membership.add(queue)
        found = await deployments_of(self._node.client, job_ids)
        await carry_over(self._membership.database_url, found)
        self._deployed |= {deployment.id: deployment for deployment in found}
        self._timetable.add(found)
        # To list all deployments is dear, and many may join one after the other.
        self._looks.visited(asked)


def _absolute(folder: Path) -> Path:
    """Return the whole path of a folder, if the folder in which the agent was started is still there."""
    try:
        return folder.absolute()
    except FileNotFoundError:
        return folder


def _has(folder: Path, file: Path) -> bool:
    """Return whether a file is there, in a folder that this user may enter."""
    try:
        return (folder / file).is_file()
    except OSError:
        return False
