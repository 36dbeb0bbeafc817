"""The agent: a Prefect worker of type ``warm-backup``, which runs a pool's flows on warm hosts.

To start it on a node, run:

```bash
prefect worker start --pool taskadapter --type warm-backup --name node-1
```

It looks for runs a little ahead of their time, on the queues of the groups whose token it holds and on
the queue ``default``, and leaves the rest to its `Dispatcher`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.settings import (
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_WORKER_QUERY_SECONDS,
    get_current_settings,
    temporary_settings,
)
from prefect.workers.base import BaseWorker, BaseWorkerResult
from pydantic import SecretStr

from taskadapter.agent.dispatcher import AgentView, Dispatcher
from taskadapter.agent.groups import Groups
from taskadapter.agent.hearing import Hearing, Kind, News
from taskadapter.agent.hosts import HostPool
from taskadapter.agent.jobs import Deployments, WarmBackupJobConfiguration, WarmBackupVariables
from taskadapter.agent.looks import SHORTEST_PAUSE_SECONDS, Looks
from taskadapter.agent.signals import at_a_signal
from taskadapter.agent.switches import CarryOver
from taskadapter.agent.takeover import Takeover
from taskadapter.agent.timetable import POLL_LIMIT, Timetable
from taskadapter.coordination import store
from taskadapter.coordination.executions import Entered
from taskadapter.coordination.messages import FOREIGN_GROUP, Gained, Lost, Refused, ResignAsked, Token
from taskadapter.declare.triggers import DEFAULT_QUEUE
from taskadapter.errors import ApiUnavailableError, CoordinationError, TaskError
from taskadapter.prefect_api import private
from taskadapter.prefect_api.client import API_FAULTS, backoff, in_words
from taskadapter.prefect_api.deployments import deployments_of, deployments_of_pool, queue_names
from taskadapter.prefect_api.pool import Domain, PoolSize, preload_of
from taskadapter.prefect_api.ticks import due
from taskadapter.settings import TaskadapterSettings

LOOP_SECONDS = 0.2
"""How often the agent sees whether it is time for a look."""

PLENTY_SECONDS = 2.0
LISTENING_PLENTY_SECONDS = 10.0
"""How long there is between two looks at least, while there is more to do than there is room for: where
the agent does not know of what is to be done besides, and where it does."""

LISTENING_SECONDS = 30.0
"""How often the agent looks for runs that hears of what it cannot know ahead: it looks as far ahead."""

LISTENING_VISIT_SECONDS = 60.0
VISIT_SECONDS = 8.0
IDLE_VISIT_SECONDS = 2.0
"""How often the agent looks at the queues, which are groups, and deployments of its pool: while it hears
what changes; else at work, and idle."""

BUSY_POLLS = 3
"""At work, an agent that does not hear looks for runs at each third time only: it sees them well ahead."""

SWEEP_SECONDS = 15.0
"""How often an active node looks for runs of its groups that are nobody's."""

PAUSED_SECONDS = 0.5
"""How often the agent asks the database whether a job that is paused has been resumed."""

RESUMED_LOOKS = 6
"""How often the agent looks so for what a job is to do that has been resumed."""

HOSTS_SECONDS = 0.5
"""How often the agent looks whether it can start processes."""

SWEEPS_PER_PRUNING = 240
"""How often it does so before it looks for what is too old to be kept: about once an hour."""

CLIENT_RETRIES = 1
"""How often Prefect's client repeats a call by itself, after two seconds, before the agent hears of it."""

LONGEST_BACKOFF_SECONDS = 15.0
"""How long the agent waits at most between two tries of an API that does not answer."""


LIVES_WITHIN_BEATS = 4
"""A process of this node's name that lives has shown so after so many heartbeats: this one is refused."""

NAMED = 3
"""How many groups a line of the log names; it counts the others."""

JOIN_SECONDS = 0.02
"""How long to wait between two looks whether this node takes part already."""


class WarmBackupResult(BaseWorkerResult):
    """What became of a run's process."""


class WarmBackupWorker(BaseWorker[WarmBackupJobConfiguration, WarmBackupVariables, WarmBackupResult]):
    """Runs a work pool's flows, each run in a process of its own, if it is this machine's turn."""

    type = "warm-backup"
    job_configuration = WarmBackupJobConfiguration
    job_configuration_variables = WarmBackupVariables
    _display_name = "Warm backup"
    _description = "Run periodic jobs at their moment, on exactly one of several machines."

    def __init__(self, *args: Any, is_only: bool = True, **kwargs: Any) -> None:
        """Make an agent; the arguments are those of `BaseWorker`.

        Args:
            args: see there.
            is_only: whether this process has no agent of that name for another pool.
            kwargs: see there.
        """
        self._is_only = is_only
        super().__init__(*args, **kwargs)
        self._settings = TaskadapterSettings()
        self._hosts = HostPool(self._limit or self._settings.worker_count)
        self._groups: Groups | None = None
        self._incarnation = str(uuid4())
        self._carry_over = CarryOver()
        self._database_url = self._settings.default_database_url()
        # Tokens that were gained, and since when what former holders left is being put in order.
        self._gained: dict[Token, float] = {}
        self._has_gained = asyncio.Event()
        # The groups that this node is active for, once that is done.
        self._active: dict[str, Token] = {}
        # Groups that are known to be this pool's, and those that are another's.
        self._claimed: AbstractSet[str] = frozenset()
        self._foreign: dict[str, str] = {}
        # Whether no process can be started here.
        self._stands_back = False
        # The pool's queues, as they were last looked at.
        self._queues: set[str] = {DEFAULT_QUEUE}
        # Jobs of its queues that this node leaves to others.
        self._left_out: set[UUID] = set()
        self._is_up = asyncio.Event()
        # When it was first seen that another process has, or had, this node's name.
        self._waits_since = float("inf")
        self._looks = Looks()
        # Whether there was more to do than there was room for at the last look, and still is.
        self._had_plenty = False
        self._looking = asyncio.Lock()
        # The pool's deployments, as they were last looked at.
        self._deployed: dict[UUID, DeploymentResponse] = {}
        self._gone: set[UUID] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults = 0
        self._refused: str | None = None
        self._once = False
        self._hearing = Hearing(self._logger, self._hear, lambda: self._faults > 0)
        self._listening: asyncio.Task[None] | None = None
        self._heard_pool: UUID | None = None
        self._poll_seconds = self._settings.poll_seconds
        self._busy_poll_seconds = BUSY_POLLS * self._poll_seconds

    # --- life cycle -------------------------------------------------------------------------------

    async def start(
        self,
        run_once: bool = False,
        with_healthcheck: bool = False,
        printer: Callable[..., None] = print,
    ) -> None:
        """Work until stopped, by SIGTERM or Ctrl-C; the arguments are those of `BaseWorker.start`."""
        self._once = run_once
        worker = get_current_settings().worker
        if "query_seconds" in worker.model_fields_set:
            self._poll_seconds = self._busy_poll_seconds = worker.query_seconds
        task = asyncio.current_task()

        def stop() -> None:
            self._logger.info("Asked to stop.")
            if task is not None:
                task.cancel()

        # Prefect's command turns SIGTERM into an interrupt, which a process ignores that a script has
        # started in the background.
        # The agent's own waits tell of an API that does not answer, and are shorter than the client's.
        settings = {PREFECT_WORKER_QUERY_SECONDS: LOOP_SECONDS, PREFECT_CLIENT_MAX_RETRIES: CLIENT_RETRIES}
        with temporary_settings(settings), at_a_signal(stop):
            await super().start(run_once, with_healthcheck, printer)

    async def setup(self) -> None:
        """Connect to the API, and make the nursery ready from which runs are forked.

        Raises:
            TaskError: a module that is to be preloaded cannot be.
        """
        private.remember_time_zones()
        try:
            await super().setup()
            # While the API is away there is no pool; its modules are then imported run by run.
            shared = preload_of(self.work_pool) if self._has_successfully_synced else ()
            await self._hosts.start([*self._settings.preload, *shared])
        except BaseException:
            await self._hosts.close()
            raise
        self._deployments = Deployments(self.client, self._logger)
        self._timetable = Timetable(self.client, self._logger, self._entered)
        view = AgentView(
            self.name,
            self._incarnation,
            self.client,
            self._logger,
            pool=lambda: self.work_pool,
            token=lambda flow_run: self._active.get(_queue_of(flow_run)),
            may_run=self._may_run,
            database_url=lambda: self._database_url,
            board=lambda: self._groups.board if self._groups else None,
            hears=lambda: self._hearing.hears,
            heard=self._looks.hear,
        )
        self._dispatcher = Dispatcher(view, self._hosts, self._deployments, self._timetable)
        self._dispatching = asyncio.create_task(self._for_ever(self._dispatcher.dispatch))
        self._watching = asyncio.create_task(self._for_ever(self._dispatcher.watch))
        self._spawn(self._for_ever(self._take_over))
        self._spawn(self._for_ever(self._look_after_claimed))
        self._spawn(self._for_ever(self._look_after_hosts))
        self._spawn(self._for_ever(self._look_after_paused))
        self._is_up.set()

    async def teardown(self, *exc_info: Any) -> None:
        """Let runs finish for a while, give back what has not begun, hand over, end the hosts.

        A signal meanwhile ends the runs; the rest is done all the same.
        """
        # What stops a worker is a cancellation; in a task that still counts as cancelled, no timeout
        # works before Python 3.11.3, and the rest of this needs some.
        task = asyncio.current_task()
        while task is not None and task.cancelling():
            task.uncancel()
        if self._once:
            await self._dispatcher.finish()
        self._dispatching.cancel()
        self._dispatcher.forget()
        with at_a_signal(self.hurry):
            await self._stop(*exc_info)

    async def _stop(self, *exc_info: Any) -> None:
        await self._dispatcher.drain(self._settings.drain_seconds)
        await self._deployments.settle()
        if self._groups is not None:
            await self._groups.stop()
        for task in self._tasks:
            task.cancel()
        self._watching.cancel()
        await self._hosts.close()
        await super().teardown(*exc_info)

    def end_runs(self) -> None:
        """End what is running now: each run shows as Crashed."""
        if self._is_up.is_set():
            self._dispatcher.end()

    def hurry(self) -> None:
        """End the runs that are being waited for, and wait no longer than they take to end."""
        if self._is_up.is_set():
            self._dispatcher.hurry()

    # --- queues that come and go, as the listeners of a program do --------------------------------

    async def join(
        self, queue: str, job_ids: Collection[UUID], domain: Domain | None, within: float
    ) -> None:
        """Take part for one more queue; returns when this node runs its jobs, or may stand by for them.

        Args:
            queue: the queue, which is there.
            job_ids: its jobs that are run here from now on, if they were left out before.
            domain: what is declared for it; None for a queue that is no group.
            within: how many seconds that may take.

        Raises:
            TaskError: what keeps this node from taking part.
        """
        await self._is_up.wait()
        self._work_queues.add(queue)
        self._left_out -= set(job_ids)
        end = time.monotonic() + within
        if self._groups is not None and domain not in (None, self._groups.domain):
            self._looks.want_visit()  # nobody has declared one before
        await self._look_at_once(queue, job_ids, end)
        if queue != DEFAULT_QUEUE:
            await self._until_registered(queue, end)
        else:
            await asyncio.to_thread(store.require_database, self._database_url, within)

    async def look_again(self, queue: str, job_ids: Collection[UUID]) -> None:
        """Look at once for what jobs that are new, or were left out before, are to do."""
        self._left_out -= set(job_ids)
        with suppress(ApiUnavailableError):  # then the next look will see it
            await self._look_at_once(queue, job_ids, time.monotonic())

    def call_off(self, job_id: UUID, reason: str) -> None:
        """Begin nothing more of a job, which is over; what is running goes on."""
        self._left_out.add(job_id)
        self._timetable.leave_out([job_id])
        self._dispatcher.call_off(job_id, reason)

    async def _look_at_once(self, queue: str, job_ids: Collection[UUID], end: float) -> None:
        """Look at a queue and some jobs now; repeat it until then while the API does not answer.

        Raises:
            ApiUnavailableError: it has not answered.
        """
        while True:
            try:
                if self._has_successfully_synced:
                    async with self._looking:
                        await self._learn(queue, job_ids)
                    break
                fault = ""
            except API_FAULTS as exc:
                fault = f": {in_words(exc)}"
            if time.monotonic() >= end:
                raise ApiUnavailableError(f"Prefect's API does not answer{fault}.")
            await asyncio.sleep(JOIN_SECONDS)
        self._looks.want()

    async def _learn(self, queue: str, job_ids: Collection[UUID]) -> None:
        """Look at one queue of the pool and some of its jobs, as a visit does at all of them."""
        groups, asked = self._groups, time.monotonic()
        if groups is None or self._looks.is_visit_due(float("inf")):
            await self._visit()
            return
        self._queues.add(queue)
        names = await self._claim(groups.names | {queue} - {DEFAULT_QUEUE})
        groups.stand_by(frozenset() if self._stands_back else names, self._database_url)
        found = await deployments_of(self.client, job_ids)
        await self._carry_over.look(self._database_url, found)
        self._deployed |= {deployment.id: deployment for deployment in found}
        self._timetable.add(found)
        # To list all deployments is dear, and many may join one after the other.
        self._looks.visited(asked)

    async def _until_registered(self, queue: str, end: float) -> None:
        groups = self._groups
        while groups is not None and not groups.is_registered(queue):
            if self._refused is not None:
                raise CoordinationError(self._refused)
            if queue in self._foreign:
                raise CoordinationError(FOREIGN_GROUP.format(name=queue, other=self._foreign[queue]))
            now = time.monotonic()
            if groups.waits_for_its_predecessor:
                self._waits_since = min(now, self._waits_since)
                if now - self._waits_since > LIVES_WITHIN_BEATS * groups.domain.heartbeat_frequency:
                    return
            elif now >= end:
                fault = groups.fault or "the coordination database does not answer"
                raise CoordinationError(f"group {queue!r} cannot be joined: {fault}")
            await asyncio.sleep(JOIN_SECONDS)
        self._waits_since = float("inf")

    async def leave(self, queue: str | None, job_ids: Collection[UUID], drain_seconds: float) -> None:
        """Leave jobs to other nodes: begin nothing more of them, let what is running end, hand over.

        Args:
            queue: a queue that is left as a whole; None if others of its jobs go on here.
            job_ids: the jobs.
            drain_seconds: how long runs may go on before they are ended.
        """
        self._left_out |= set(job_ids)
        self._timetable.leave_out(job_ids)
        if queue is not None:
            self._work_queues.discard(queue)
            self._active.pop(queue, None)
            self._timetable.forget(queue)

        def is_left(run: FlowRun) -> bool:
            return run.deployment_id in job_ids or _queue_of(run) == queue

        self._dispatcher.forget(is_left)
        await self._dispatcher.drain(drain_seconds, is_left)
        if queue is not None and self._groups is not None:
            await self._groups.leave(queue)

    async def resign(self, queue: str) -> None:
        """Hand a group over, if this node holds its token, to one that runs all of its jobs."""
        token = None if self._groups is None else self._groups.token(queue)
        if token is not None:
            await self._hand_over(token)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: WarmBackupJobConfiguration,  # noqa: ARG002 - read with the deployment
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> WarmBackupResult:
        """Run one flow run that something other than the poll has claimed."""
        if task_status is not None:
            task_status.started(0)
        await self._dispatcher.run_now(flow_run)
        return WarmBackupResult(identifier=str(flow_run.id), status_code=0)

    # --- polling ----------------------------------------------------------------------------------

    async def sync_with_backend(self) -> None:
        """Send the agent's heartbeat to the API, whose faults do not end an agent that works."""
        try:
            await super().sync_with_backend()
        except API_FAULTS as fault:
            if not self.is_setup:
                raise
            self._logger.debug("The API could not be told that this agent lives: %s", fault)

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Look for runs once; the dispatcher starts them. No fault of the API ends the agent.

        Raises:
            CoordinationError: another live process uses this node's name.
        """
        self._last_polled_time = datetime.now(UTC)
        if self._refused is not None:
            raise CoordinationError(self._refused)
        if self._had_plenty and not self._dispatcher.has_plenty:
            self._had_plenty = False
            self._looks.want()
        if not self._has_successfully_synced or not self._looks.is_due(self._pause):
            return []
        async with self._looking:  # a takeover looks at once, perhaps in the middle of another look
            return await self._look_once()

    async def _look_once(self) -> list[FlowRun]:
        asked = time.monotonic()
        try:
            found = await self._look()
        except (*API_FAULTS, TaskError) as fault:
            await self._back_off(in_words(fault))
            return []
        except Exception as exc:
            self._logger.exception("Looking for runs failed.")
            await self._back_off(type(exc).__name__)
            return []
        if self._faults:
            self._logger.info("Looking for runs succeeds again, after %d failures.", self._faults)
            self._faults = 0
        self._dispatcher.found(found, asked)
        by_hand = {run.id: run.created for run in found if not run.auto_scheduled}
        self._hearing.compare(by_hand | {id_: deployed.created for id_, deployed in self._deployed.items()})
        ahead = (self._timetable.complete_until - datetime.now(UTC)).total_seconds()
        self._had_plenty = self._dispatcher.has_plenty
        shortest = self._plenty_pause if self._had_plenty else SHORTEST_PAUSE_SECONDS
        self._looks.looked(asked, max(ahead, 0.0 if self._timetable.has_new else shortest))
        return found

    @property
    def _pause(self) -> float:
        """How many seconds there are between two looks: what is due until the next one is seen before."""
        if self._hearing.hears:
            return LISTENING_SECONDS
        return self._busy_poll_seconds if self._dispatcher.is_busy else self._poll_seconds

    @property
    def _plenty_pause(self) -> float:
        is_known = self._hearing.hears and not self._timetable.is_cut
        return LISTENING_PLENTY_SECONDS if is_known else PLENTY_SECONDS

    @property
    def _visit_pause(self) -> float:
        if self._hearing.hears:
            return LISTENING_VISIT_SECONDS
        # Has a job been resumed? Its missed ticks are late already.
        is_busy = self._dispatcher.is_busy and not self._timetable.held
        return VISIT_SECONDS if is_busy else IDLE_VISIT_SECONDS

    def _listen(self) -> None:
        """Hear of what happens in the pool, which may have been deleted and made anew."""
        if self._heard_pool != self.work_pool.id:
            self._heard_pool = self.work_pool.id
            if self._listening is not None:
                self._listening.cancel()
            self._listening = self._spawn(self._hearing.listen(self._heard_pool))

    def _hear(self, news: News | None) -> None:
        """Do about some news what is to be done, or look at what it is about."""
        about = None if news is None else news.about
        if news is not None and news.kind is Kind.CANCELLING and about is not None:
            self._dispatcher.cancel(about)
        elif about not in self._dispatcher.in_hand:
            self._looks.hear(news)

    async def _back_off(self, fault: str) -> None:
        """Say once why, and wait longer each time."""
        if not self._faults:
            self._logger.warning("Looking for runs failed, trying again: %s", fault)
        self._faults += 1
        await asyncio.sleep(backoff(self._faults, LONGEST_BACKOFF_SECONDS))

    async def _look(self) -> list[FlowRun]:
        if self._looks.is_visit_due(self._visit_pause):
            await self._visit()
        elif changed := self._looks.changed:
            await self._look_at(changed)
        wanted = self._polled_queues()
        if not wanted:
            return []
        now = datetime.now(UTC)
        before = now + timedelta(seconds=self._pause + self._prefetch_seconds)
        try:
            # The server looks up each queue by its name, but not those of the whole pool.
            names = None if self._queues <= set(wanted) else wanted
            found, until = await due(self.client, self._work_pool_name, names, before)
        except ObjectNotFound:
            self._looks.want_visit()  # a queue, or the pool, was deleted
            return []
        runs = [run for run in found if _queue_of(run) in wanted and self._runs_job_of(run)]
        if len(runs) < len(found) and (until < before or len(found) >= POLL_LIMIT):
            # Those that are left out could fill the list for ever.
            ours, until = self._timetable.jobs_of(wanted), before
            runs = await self.client.get_scheduled_flow_runs_for_deployments(ours, before)
            runs = [run for run in runs if _queue_of(run) in wanted]
        # A new job's first ticks may not be planned: it must be known before one of them is started.
        if self._timetable.strangers(runs) - self._gone:
            await self._visit()
            self._gone = self._timetable.strangers(runs)
        runs = await self._timetable.complete(runs, wanted, self._dispatcher.runs_in_hand, now, until)
        await self._deployments.prepare(runs)
        return runs

    def _polled_queues(self) -> list[str]:
        return [name for name in (DEFAULT_QUEUE, *self._active) if self._polls(name)]

    def _runs_job_of(self, flow_run: FlowRun) -> bool:
        return flow_run.deployment_id not in self._left_out

    def _polls(self, queue: str) -> bool:
        return not self._work_queues or queue in self._work_queues

    async def _visit(self) -> None:
        """Look at the pool's queues and deployments: at its groups, and at what its jobs are to do."""
        asked = time.monotonic()
        await self._stand_by()
        self._listen()
        found = await deployments_of_pool(self.client, self._work_pool_name)
        self._deployed = {deployment.id: deployment for deployment in found}
        await self._take_note(found)
        size = PoolSize.of(self.work_pool)
        self._hosts.limit = self._limit or size.worker_count or self._settings.worker_count
        self._looks.visited(asked)

    async def _look_at(self, job_ids: Collection[UUID]) -> None:
        """Look at some deployments of which there is news."""
        found = await deployments_of(self.client, job_ids)
        ours = [deployment for deployment in found if deployment.work_pool_name == self._work_pool_name]
        rest = {id_: deployment for id_, deployment in self._deployed.items() if id_ not in job_ids}
        self._deployed = rest | {deployment.id: deployment for deployment in ours}
        await self._take_note(ours)

    async def _take_note(self, news: Collection[DeploymentResponse]) -> None:
        """Carry over what has changed in some deployments, and see what all jobs are to do."""
        await self._carry_over.look(self._database_url, news)
        if news:
            self._hosts.use(SecretStr(self._database_url))
        found = [deployment for id_, deployment in self._deployed.items() if id_ not in self._left_out]
        if gone := self._timetable.learn(found):
            self._spawn(self._end_gone(gone))

    async def _end_gone(self, job_ids: set[UUID]) -> None:
        """Have nothing of jobs begin that were deleted."""
        for job_id in job_ids:
            # Whatever claims a run of it later finds no deployment.
            with suppress(*API_FAULTS, CoordinationError):
                try:
                    await self.client.read_deployment(job_id)
                except ObjectNotFound:
                    reason = "its deployment was deleted"
                    await asyncio.to_thread(store.end_job, self._database_url, job_id, reason)

    async def _entered(self, job_ids: Collection[UUID]) -> dict[UUID, Entered]:
        """Return what the database has of the ticks of some jobs."""
        return await asyncio.to_thread(store.entered, self._database_url, job_ids, POLL_LIMIT)

    async def _stand_by(self) -> None:
        """Stand by for the groups that the pool has, which are its queues."""
        self._queues = await queue_names(self.client, self._work_pool_name)
        names = {name for name in self._queues if self._polls(name)} - {DEFAULT_QUEUE}
        groups = self._groups
        # Whoever declares a new group may have declared another database or timing with it.
        if (
            groups is None
            or (names - self._foreign.keys() != groups.names and not self._stands_back)
            or Domain.of(self.work_pool) != groups.domain
        ):
            groups = await self._groups_as_declared()
        ours = await self._claim(names)
        groups.stand_by(frozenset() if self._stands_back else ours, self._database_url)

    async def _claim(self, names: AbstractSet[str]) -> AbstractSet[str]:
        """Return those of some groups that are this pool's, for good, and say which are another's."""
        if names <= self._claimed:
            return names
        url, pool = self._database_url, self._work_pool_name
        foreign = await asyncio.to_thread(store.claim_groups, url, pool, names)
        for name, other in list(foreign.items()):
            if not await self._has_queue(other, name):
                await asyncio.to_thread(store.give_up_group, url, other, name)
                foreign = await asyncio.to_thread(store.claim_groups, url, pool, names)
            elif name not in self._foreign:
                self._logger.error("%s", FOREIGN_GROUP.format(name=name, other=other))
        self._foreign = foreign
        self._claimed = names - foreign.keys()
        return self._claimed

    async def _has_queue(self, pool: str, name: str) -> bool:
        try:
            await self.client.read_work_queue_by_name(name, pool)
        except ObjectNotFound:
            return False
        return True

    async def _groups_as_declared(self) -> Groups:
        """Return the pool's groups with the database and timing that the pool has now."""
        pool = await self.client.read_work_pool(self._work_pool_name)
        domain = Domain.of(pool)
        if self._groups is not None and self._groups.domain == domain:
            return self._groups
        database_url = await domain.database_url(self._settings)
        if self._groups is not None:
            self._logger.info("Database or timing of the pool has changed: %s", domain)
            for name in list(self._active):
                self._active.pop(name)
                await self._dispatcher.drain(self._settings.drain_seconds, _is_on(name))
            await self._groups.stop()
        self._claimed = frozenset()
        self._database_url = database_url
        self._groups = Groups(
            self.name, self._incarnation, pool, self.client, self._logger, self._is_only, self._on_change
        )
        return self._groups

    # --- coordination -----------------------------------------------------------------------------

    def _may_run(self, flow_run: FlowRun) -> bool:
        """Return whether a run is this node's to run, which holds the token if it has a group."""
        name = _queue_of(flow_run)
        if self._stands_back or not self._polls(name) or not self._runs_job_of(flow_run):
            return False
        if name == DEFAULT_QUEUE:
            return True
        token = self._active.get(name)
        return token is not None and self._holds(token)

    def _on_change(self, change: Gained | Lost | ResignAsked | Refused) -> None:
        match change:
            case Gained(token):
                self._gained[token] = time.monotonic()
                self._has_gained.set()
            case Lost(token):
                self._gained.pop(token, None)
                if self._active.get(token.group_id) == token:
                    del self._active[token.group_id]
                    self._timetable.forget(token.group_id)
                self._dispatcher.lose(token)
            case ResignAsked(token):
                self._spawn(self._hand_over(token))
            case Refused(reason):
                self._refused = reason

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._has_ended)
        return task

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._logger.error("A task of this agent's has ended, which should not be.", exc_info=fault)

    async def _for_ever(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something as long as the agent lives, whatever it raises."""
        while True:
            try:
                await work()
            except Exception:
                self._logger.exception("The agent goes on after an error that should not be.")
                await asyncio.sleep(1)

    async def _take_over(self) -> None:
        """Put in order what former holders of groups left that were gained, then run the groups' jobs.

        All at once, again and again until it succeeds. A token is given back when it has not within a
        lease: another node may be able to.
        """
        takeover, faults, told = self._new_takeover(), 0, ""
        while True:
            tokens = [token for token in self._gained if self._holds(token)]
            if not tokens:
                self._gained.clear()
                self._has_gained.clear()
                await self._has_gained.wait()
                takeover, faults, told = self._new_takeover(), 0, ""
                continue
            try:
                await takeover.clean_up(tokens)
                await self._be_active(tokens)
            except Exception as fault:  # noqa: BLE001 - whoever holds a token runs its jobs, or says why not
                if str(fault) != told:
                    self._logger.warning("%s held up: %s", _in_words(tokens), in_words(fault))
                told, faults = str(fault), faults + 1
                await self._give_up(tokens, told)
                await asyncio.sleep(backoff(faults, LONGEST_BACKOFF_SECONDS))

    async def _give_up(self, tokens: Collection[Token], reason: str) -> None:
        """Leave those groups to other nodes that could not be taken over within a lease."""
        lease = 0.0 if self._groups is None else self._groups.domain.liveness_check_interval
        for token in tokens:
            if time.monotonic() - self._gained.get(token, float("inf")) > lease:
                del self._gained[token]
                self._logger.warning("Group %s is left to another node: %s", token.group_id, reason)
                await self._hand_over(token)

    async def _be_active(self, tokens: Collection[Token]) -> None:
        """Run the jobs of groups that are in order."""
        for token in tokens:
            if self._gained.pop(token, None) is not None and self._polls(token.group_id):
                self._active[token.group_id] = token
        self._looks.want()
        if any(token.term > 1 for token in tokens):
            await self.get_and_submit_flow_runs()  # what was due meanwhile need not even wait for that

    def _new_takeover(self) -> Takeover:
        return Takeover(
            self.client, self._deployments, self._work_pool_name, self._database_url, self._logger
        )

    async def _look_after_hosts(self) -> None:
        """Leave the groups to others while this node can start no process, and take part again after."""
        while True:
            await asyncio.sleep(HOSTS_SECONDS)
            groups = self._groups
            if groups is None:
                continue
            is_broken = self._hosts.broken_for > groups.domain.liveness_check_interval / 2
            if is_broken and not self._stands_back:
                self._logger.error("This node can start no process: %s", self._hosts.fault)
                groups.stand_by((), self._database_url)
            elif self._stands_back and not self._hosts.broken_for:
                self._logger.info("Processes can be started here again.")
                self._looks.want_visit()  # which takes part again
            self._stands_back = is_broken

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
                resumed = await asyncio.to_thread(store.resumed, self._database_url, held)
                # Prefect follows; where it does not, the usual looks will do.
                if any(looks.get(job_id, 0) < RESUMED_LOOKS for job_id in resumed):
                    for job_id in resumed:
                        self._looks.hear(News(Kind.DEPLOYMENT, job_id))
                    self._looks.want()
                    await self.get_and_submit_flow_runs()
                looks |= {job_id: looks.get(job_id, 0) + 1 for job_id in resumed}

    async def _look_after_claimed(self) -> None:
        """Settle what is nobody's and what nodes that are gone have left, and forget what is old."""
        takeover, sweeps = None, 0
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            if self._groups is None:
                continue
            if takeover is None or takeover.database_url != self._database_url:
                takeover = self._new_takeover()
            try:
                if self._polls(DEFAULT_QUEUE):
                    await takeover.end_orphans(self._groups.domain.liveness_check_interval)
                await takeover.sweep(self._polled_queues(), lambda: self._dispatcher.in_hand)
                if sweeps % SWEEPS_PER_PRUNING == 0:
                    seconds = self._settings.ledger_days * 86400.0
                    await asyncio.to_thread(store.prune, self._database_url, seconds)
                sweeps += 1
            except (*API_FAULTS, CoordinationError) as fault:
                self._logger.debug("What is claimed is looked after later: %s", fault)

    def _holds(self, token: Token) -> bool:
        return self._groups is not None and self._groups.token(token.group_id) == token

    async def _hand_over(self, token: Token) -> None:
        """Start nothing more of a group, let its runs end, and give its token to a standby."""
        self._active.pop(token.group_id, None)
        self._timetable.forget(token.group_id)
        await self._dispatcher.drain(self._settings.drain_seconds, _is_on(token.group_id))
        if self._groups is not None:
            self._groups.release(token.group_id)


def _queue_of(flow_run: FlowRun) -> str:
    return flow_run.work_queue_name or DEFAULT_QUEUE


def _in_words(tokens: Sequence[Token]) -> str:
    """Return which groups those tokens are of, as far as a line has room, and the verb."""
    names = ", ".join(token.group_id for token in tokens[:NAMED])
    if len(tokens) > NAMED:
        names += f" and {len(tokens) - NAMED} more"
    return f"Group {names} is" if len(tokens) == 1 else f"Groups {names} are"


def _is_on(queue: str) -> Callable[[FlowRun], bool]:
    return lambda flow_run: _queue_of(flow_run) == queue
