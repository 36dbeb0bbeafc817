"""The agent: a Prefect worker of type ``warm-backup``, which runs a pool's flows on warm hosts.

To start it on a node, run:

```bash
prefect worker start --pool taskadapter --type warm-backup --name node-1
```

It puts the parts of an agent together, starts them and stops them.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.settings import (
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLIENT_METRICS_ENABLED,
    PREFECT_WORKER_QUERY_SECONDS,
    temporary_settings,
)
from prefect.workers.base import BaseWorker, BaseWorkerResult

from taskadapter.agent import events, metrics
from taskadapter.agent.dispatcher import Dispatcher
from taskadapter.agent.ends import Ends
from taskadapter.agent.hand import Hand
from taskadapter.agent.health import Health
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.hosts import HostPool
from taskadapter.agent.jobs import Deployments, WarmBackupJobConfiguration, WarmBackupVariables
from taskadapter.agent.lookout import Lookout
from taskadapter.agent.looks import Pace
from taskadapter.agent.membership import Membership
from taskadapter.agent.node import Node, Share, has_group
from taskadapter.agent.showing import Showing
from taskadapter.agent.sight import Sight
from taskadapter.agent.signals import at_a_signal
from taskadapter.agent.succession import Succession
from taskadapter.agent.takeover import Takeover
from taskadapter.agent.tasks import Tasks
from taskadapter.agent.telling import Teller
from taskadapter.agent.terms import Terms
from taskadapter.agent.timetable import Timetable
from taskadapter.agent.upkeep import Upkeep
from taskadapter.agent.watch import Watch
from taskadapter.coordination import store
from taskadapter.coordination.executions import Entered
from taskadapter.coordination.messages import Gained, Lost, ResignAsked
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import ApiUnavailableError, CoordinationError, TaskError, innermost
from taskadapter.prefect_api import private
from taskadapter.prefect_api.client import API_FAULTS, PAGE
from taskadapter.prefect_api.pool import Domain, preload_of
from taskadapter.settings import PREFIX, TaskadapterSettings, misspelt

LOOP_SECONDS = 0.2
"""How often the agent sees whether it is time for a look."""

CLIENT_RETRIES = 1
"""How often Prefect's client repeats a call by itself, after two seconds, before the agent hears of it."""


def _settings() -> TaskadapterSettings:
    """Return the settings of this process.

    Raises:
        TaskError: one of them cannot be used.
    """
    settings = TaskadapterSettings()
    if settings.database_url is not None:
        from taskadapter.coordination.engines import url_of

        try:
            url_of(settings.database_url.get_secret_value())
        except CoordinationError as fault:
            raise CoordinationError(f"{PREFIX}DATABASE_URL: {fault}") from None
    return settings


class WarmBackupResult(BaseWorkerResult):
    """What became of a run's process."""


class WarmBackupWorker(BaseWorker[WarmBackupJobConfiguration, WarmBackupVariables, WarmBackupResult]):
    """Runs a work pool's flows, each run in a process of its own, if it is this machine's turn."""

    type = "warm-backup"
    job_configuration = WarmBackupJobConfiguration
    job_configuration_variables = WarmBackupVariables
    _display_name = "Warm backup"
    _description = "Run periodic jobs at their moment, on exactly one of several machines."

    def __init__(self, *args: Any, is_only: bool = True, is_command: bool = True, **kwargs: Any) -> None:
        """Make an agent; the arguments are those of `BaseWorker`.

        Args:
            args: see there.
            is_only: whether this process has no agent of that name for another pool.
            is_command: whether Prefect's command runs it: an error of ours that ends it is one line then,
                and exit status 1.
            kwargs: see there.

        Raises:
            TaskError: a setting of this process cannot be used, which only a restart can mend.
        """
        super().__init__(*args, **kwargs)
        self._is_only = is_only
        self._is_command = is_command
        with self._as_one_line():
            self._settings = _settings()
        self._pace = Pace.of(self._settings)  # before `start` has Prefect poll more often
        self._hosts = HostPool(self._limit or self._settings.worker_count)
        self._share = Share(self._work_queues)  # the very set that Prefect's own code reads
        self._is_up = asyncio.Event()
        self._once = False

    # --- life cycle -------------------------------------------------------------------------------

    async def start(
        self,
        run_once: bool = False,
        with_healthcheck: bool = False,
        printer: Callable[..., None] = print,
    ) -> None:
        """Work until stopped, by SIGTERM or Ctrl-C; the arguments are those of `BaseWorker.start`."""
        self._once = run_once
        if threading.current_thread() is threading.main_thread():  # else it is somebody's program
            # What the imports have made stays: a collector that went through it would stop all threads,
            # the heartbeat's as well, for a tenth of a second each time.
            gc.collect()
            gc.freeze()
        task = asyncio.current_task()

        def stop() -> None:
            self._logger.info("Stopping: this node starts no more runs.")
            if task is not None:
                task.cancel()

        # Prefect's command turns SIGTERM into an interrupt, which a process ignores that a script has
        # started in the background.
        # The agent's own waits tell of an API that does not answer, and are shorter than the client's.
        settings = {PREFECT_WORKER_QUERY_SECONDS: LOOP_SECONDS, PREFECT_CLIENT_MAX_RETRIES: CLIENT_RETRIES}
        if not metrics.can_serve(self._logger):
            settings[PREFECT_CLIENT_METRICS_ENABLED] = False  # else it would end the agent
        with temporary_settings(settings), at_a_signal(stop), self._as_one_line():
            await super().start(run_once, with_healthcheck, printer)

    @contextmanager
    def _as_one_line(self) -> Iterator[None]:
        """End Prefect's command with the sentence of an error of ours: it would print a traceback."""
        try:
            yield
        except Exception as exc:
            failure = innermost(exc)
            if not self._is_command or not isinstance(failure, TaskError):
                raise
            raise SystemExit(f"Agent {self.name!r} has ended: {failure}") from None

    async def setup(self) -> None:
        """Connect to the API, and make the nursery ready from which runs are forked.

        Raises:
            TaskError: a module that is to be preloaded cannot be.
        """
        private.remember_time_zones()
        for sentence in misspelt():
            self._logger.warning("A setting is misspelt: %s", sentence)
        try:
            await super().setup()
            # While the API is away there is no pool; its modules are then imported run by run.
            shared = preload_of(self.work_pool) if self._has_successfully_synced else ()
            await self._hosts.start([*self._settings.preload, *shared])
        except BaseException:
            await self._hosts.close()
            raise
        self._put_together()
        self._dispatching = self._tasks.keep_up(self._dispatcher.dispatch)
        self._tasks.keep_up(self._watch.watch)
        self._taking_over = self._tasks.keep_up(self._terms.take_over)
        self._tasks.keep_up(self._showing.go_on)
        self._upkeep.begin()
        private.count_requests(self.client, metrics.REQUESTS.labels(self._work_pool_name).inc)
        metrics.show(self._source)
        self._is_up.set()

    def _put_together(self) -> None:
        """Make the parts of the agent; each knows those before it, and can call functions of later ones."""
        self._tasks = Tasks(self._logger)
        node = Node(
            name=self.name,
            incarnation=str(uuid4()),
            work_pool=self._work_pool_name,
            pool=lambda: self.work_pool,
            has_pool=lambda: self._has_successfully_synced,
            client=self.client,
            log=self._logger,
            settings=self._settings,
            share=self._share,
            tasks=self._tasks,
            teller=Teller(self.client, self._logger),
        )
        self._membership = Membership(
            node,
            is_only=self._is_only,
            tell=self._on_change,
            let_go=lambda: self._terms.let_go(has_group),
        )
        self._showing = Showing(node, self._membership)
        self._deployments = Deployments(node.client)
        self._ends = Ends(node, lambda job, reason: events.job_ended(node, job, reason), self._on_put_away)
        self._timetable = Timetable(node.client, node.log, self._entered)
        self._hand = Hand(self._deployments.known)
        self._succession = Succession(
            node, self._membership, self._hand, lambda token: self._terms.hear(ResignAsked(token))
        )
        self._dispatcher = Dispatcher(
            node,
            self._membership,
            self._hosts,
            self._deployments,
            self._ends,
            self._timetable,
            self._hand,
            self._succession,
            look_for=lambda news: self._lookout.look_for(news),
        )
        self._watch = Watch(node, self._hand, hears=lambda: self._lookout.hears)
        sight = Sight(node)
        self._lookout = Lookout(
            node,
            sight,
            self._membership,
            self._hosts,
            self._deployments,
            self._timetable,
            self._hand,
            self._dispatcher,
            pace=self._pace,
            limit=self._limit,
            prefetch_seconds=self._prefetch_seconds,
        )
        self._terms = Terms(
            node,
            self._membership,
            self._dispatcher,
            self._timetable,
            self._lookout,
            self._new_takeover,
        )
        self._upkeep = Upkeep(
            node,
            self._membership,
            self._hosts,
            self._timetable,
            self._hand,
            self._lookout,
            sight,
            self._succession,
            self._new_takeover,
        )
        self._health = Health(self._membership, self._hosts, sight)
        self._source = metrics.Source(
            self._work_pool_name,
            self._membership,
            self._hosts,
            self._hand,
            self._health,
            self._dispatcher,
        )

    def _on_change(self, change: Gained | Lost | ResignAsked) -> None:
        self._terms.hear(change)
        self._showing.hear(change)

    def _on_put_away(self, job_id: UUID) -> None:
        self._deployments.forget(job_id)
        self._lookout.look_for(News(Kind.DEPLOYMENT, job_id))

    def is_worker_still_polling(self, query_interval_seconds: float) -> bool:
        """Return whether this node can run jobs, or stand by for them: what the health check serves.

        Args:
            query_interval_seconds: the agent has looked for work within thirty times that.
        """
        is_ready = self._is_up.is_set() and not self._health.unmet()
        return super().is_worker_still_polling(query_interval_seconds) and is_ready

    def _new_takeover(self) -> Takeover:
        return Takeover(
            self.client,
            self._deployments,
            self._work_pool_name,
            self._membership.database_url,
            self._logger,
        )

    async def _entered(self, job_ids: Collection[UUID]) -> dict[UUID, Entered]:
        """Return what the database has of the ticks of some jobs."""
        return await asyncio.to_thread(store.entered, self._membership.database_url, job_ids, PAGE)

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
        metrics.hide(self._source)
        self._dispatching.cancel()
        self._taking_over.cancel()
        self._upkeep.end()
        self._dispatcher.forget()
        with at_a_signal(self.hurry):
            await self._stop(*exc_info)

    async def _stop(self, *exc_info: Any) -> None:
        await self._terms.let_go()
        await self._ends.wait()
        await self._membership.stop()
        self._tasks.cancel()
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
        self._share.take_up(queue, job_ids)
        end = time.monotonic() + within
        if self._membership.domain is not None and domain not in (None, self._membership.domain):
            self._lookout.want_visit()  # nobody has declared one before
        await self._lookout.look_at_once(queue, job_ids, end)
        if queue != DEFAULT_QUEUE:
            await self._membership.until_registered(queue, end)
        else:
            await asyncio.to_thread(store.require_database, self._membership.database_url, within)

    async def look_again(self, queue: str, job_ids: Collection[UUID]) -> None:
        """Look at once for what jobs that are new, or were left out before, are to do."""
        self._share.take_up(None, job_ids)
        with suppress(ApiUnavailableError):  # then the next look will see it
            await self._lookout.look_at_once(queue, job_ids, time.monotonic())

    def call_off(self, job_id: UUID, reason: str) -> None:
        """Begin nothing more of a job, which is over; what is running goes on."""
        self._share.give_up(None, [job_id])
        self._timetable.leave_out([job_id])
        self._hand.call_off(job_id, reason)

    async def leave(self, queue: str | None, job_ids: Collection[UUID], drain_seconds: float) -> None:
        """Leave jobs to other nodes: begin nothing more of them, let what is running end, hand over.

        Args:
            queue: a queue that is left as a whole; None if others of its jobs go on here.
            job_ids: the jobs.
            drain_seconds: how long runs may go on before they are ended.
        """
        await self._terms.leave(queue, job_ids, drain_seconds)

    def stopped(self, queue: str, job_ids: Collection[UUID]) -> None:
        """Hand a group over of which this node does not run some jobs any more."""
        self._succession.stopped(queue, job_ids)

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
        if self._membership.refused is not None:
            raise CoordinationError(self._membership.refused)
        return await self._lookout.poll()
