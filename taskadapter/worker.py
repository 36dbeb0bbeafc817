"""The agent: a Prefect worker of type ``warm-backup``, which runs a pool's flows on warm hosts.

To start it on a node, run:

```bash
prefect worker start --pool taskadapter --type warm-backup --name node-1
```

It looks for runs a little ahead of their time, claims those it can start, applies what Prefect's
schedules cannot express, and has each run started in a process that is warm already.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import anyio.abc
import httpx
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_WORKER_QUERY_SECONDS, get_current_settings, temporary_settings
from prefect.states import Cancelled, Crashed, Pending, Scheduled
from prefect.workers.base import BaseWorker, BaseWorkerResult

from taskadapter import schedules
from taskadapter.deployments import (
    DeployedJob,
    Deployments,
    WarmBackupJobConfiguration,
    WarmBackupVariables,
)
from taskadapter.hosts import Host, HostPool, Outcome
from taskadapter.runs import Assignment
from taskadapter.schedules import Verdict
from taskadapter.settings import TaskadapterSettings

CLAIM_AHEAD = timedelta(seconds=1)
"""A run is claimed, and its host made ready, this long before its time."""

WATCH_SECONDS = 2.0
"""How often the agent asks whether one of its runs is to be cancelled."""

CANCEL_GRACE_SECONDS = 30.0
"""How long a cancelled run may take to clean up before its process is killed."""

TERMINATE_GRACE_SECONDS = 5.0
"""How long a run may take to end when its agent has to, before its process is killed."""

PAUSE_SECONDS = 5.0
"""How long to wait before a run is tried again that no process could be started for."""


class WarmBackupResult(BaseWorkerResult):
    """What became of a run's process."""


@dataclass
class RunInHand:
    """A run between its claim and its end.

    Attributes:
        flow_run: as polled.
        host: the process that has it, once one does.
        decided: whether it takes one of the places of its job's `max_concurrent`.
        ended: why its job was over when its body began, if it was.
        over: why it is not to begin: its job has ended since it was claimed.
        cancelled: when it was cancelled, on the monotonic clock.
        heartbeat: when its last heartbeat was, on the monotonic clock.
    """

    flow_run: FlowRun
    host: Host | None = None
    decided: bool = False
    ended: str | None = None
    over: str | None = None
    cancelled: float | None = None
    heartbeat: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> datetime:
        """When the tick is to start."""
        return _due(self.flow_run)


class WarmBackupWorker(BaseWorker[WarmBackupJobConfiguration, WarmBackupVariables, WarmBackupResult]):
    """Runs a work pool's flows on warm hosts of this machine."""

    type = "warm-backup"
    job_configuration = WarmBackupJobConfiguration
    job_configuration_variables = WarmBackupVariables
    _display_name = "Warm backup"
    _description = "Run periodic jobs on warm processes, on exactly one of several machines."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = TaskadapterSettings()
        limit = self._limit or self._settings.worker_count
        self._hosts = HostPool(limit, self._settings.runs_per_host)
        self._room = asyncio.Semaphore(limit)
        self._upcoming: dict[UUID, FlowRun] = {}
        self._in_hand: dict[UUID, RunInHand] = {}
        self._handling: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()
        self._newest_run: datetime | None = None
        self._once = False

    # --- life cycle -----------------------------------------------------------------------------

    async def start(
        self,
        run_once: bool = False,
        with_healthcheck: bool = False,
        printer: Callable[..., None] = print,
    ) -> None:
        """Work until stopped; the arguments are those of `BaseWorker.start`."""
        self._once = run_once
        worker = get_current_settings().worker
        configured = "query_seconds" in worker.model_fields_set
        seconds = worker.query_seconds if configured else self._settings.poll_seconds
        with temporary_settings({PREFECT_WORKER_QUERY_SECONDS: seconds}):
            await super().start(run_once, with_healthcheck, printer)

    async def setup(self) -> None:
        """Connect to the API, start the hosts' nursery and the loops that use it."""
        await super().setup()
        self._deployments = Deployments(self.client, self._logger)
        await self._hosts.start()
        self._loops = [asyncio.create_task(loop()) for loop in (self._dispatch, self._watch)]

    async def teardown(self, *exc_info: Any) -> None:
        """Let runs finish for a while, give back what has not begun, end the hosts."""
        await self._drain()
        await self._deployments.settle()
        for loop in self._loops:
            loop.cancel()
        await self._hosts.close()
        await super().teardown(*exc_info)

    async def _drain(self) -> None:
        if self._once:
            await self._until_idle()
            return
        self._loops[0].cancel()
        self._upcoming.clear()
        for run in self._in_hand.values():
            if run.host is not None:
                run.host.drop()
        if self._in_hand:
            self._logger.info("Stopping; %d run(s) may still end.", len(self._in_hand))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._until_idle()
        self.end_runs()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERMINATE_GRACE_SECONDS):
                await self._until_idle()

    def end_runs(self) -> None:
        """End what is running now: each run shows as Crashed."""
        for run in self._in_hand.values():
            if run.host is not None:
                run.host.end(signal.SIGTERM)

    async def _until_idle(self) -> None:
        while self._upcoming or self._handling:
            await asyncio.wait(self._handling or [asyncio.create_task(asyncio.sleep(0.1))])

    # --- claiming -------------------------------------------------------------------------------

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Look for runs once; what is due is started by `_dispatch`. No fault ends the agent."""
        if not self._has_successfully_synced:
            return []
        try:
            responses = await self._get_scheduled_flow_runs()
        except httpx.HTTPError:
            raise  # Prefect's loop counts and reports these
        except Exception:
            self._logger.exception("Looking for runs failed; trying again.")
            return []
        self._last_polled_time = datetime.now(UTC)
        found = [response.flow_run for response in responses]
        self._upcoming = {run.id: run for run in found if run.id not in self._in_hand}
        made = [run.created for run in found if run.created is not None]
        self._newest_run = max([*made, self._newest_run] if self._newest_run else made, default=None)
        self._hosts.retire_idle()
        self._news.set()
        return found

    async def _dispatch(self) -> None:
        """Take one run after another, each a little before its time, while there is room."""
        while True:
            await self._room.acquire()
            run = RunInHand(await self._next_due())
            self._in_hand[run.flow_run.id] = run
            task = asyncio.create_task(self._handle(run))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

    async def _next_due(self) -> FlowRun:
        while True:
            wait = None
            if free := [run for run in self._upcoming.values() if self._may_start(run)]:
                first = min(free, key=_due)
                wait = (_due(first) - CLAIM_AHEAD - datetime.now(UTC)).total_seconds()
                if wait <= 0:
                    return self._upcoming.pop(first.id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()
            self._news.clear()

    def _may_start(self, flow_run: FlowRun) -> bool:
        """Return whether the run's job goes on, and has fewer runs in hand than it may have at once."""
        if self._deployments.is_ending(flow_run):
            return False
        job = self._deployments.known(flow_run)
        limit = None if job is None else job.max_concurrent
        return limit is None or self._going_on(flow_run) < limit

    def _going_on(self, flow_run: FlowRun) -> int:
        job_id = flow_run.deployment_id
        return sum(run.flow_run.deployment_id == job_id for run in self._in_hand.values())

    def _ahead_of(self, run: RunInHand) -> int:
        """Count the job's other runs in hand that go first: decided already, or due before this one."""
        job_id = run.flow_run.deployment_id
        others = (o for o in self._in_hand.values() if o is not run and o.flow_run.deployment_id == job_id)
        return sum(other.decided or other.due < run.due for other in others)

    async def _handle(self, run: RunInHand) -> None:
        try:
            await self._decide(run)
        except ObjectNotFound:
            self._logger.info("Run %s or its deployment was deleted.", run.flow_run.name)
        except httpx.HTTPError as fault:
            self._logger.warning("Run %s is left for later: %s", run.flow_run.name, fault)
        except Exception as exc:
            self._logger.exception("Run %s could not be run.", run.flow_run.name)
            await self._deployments.report(run.flow_run, Crashed(message=f"{exc}"))
        finally:
            del self._in_hand[run.flow_run.id]
            self._room.release()
            self._news.set()

    async def _decide(self, run: RunInHand) -> None:
        """Apply what Prefect's schedule cannot express, then claim and run."""
        flow_run = run.flow_run
        if self._deployments.is_ending(flow_run):
            return
        job = await self._deployments.job_of(flow_run, self.work_pool, self._newest_run)
        if job.max_concurrent is not None and self._ahead_of(run) >= job.max_concurrent:
            # Only now is it known that its job allows no more: it waits its turn.
            self._upcoming[flow_run.id] = flow_run
            return
        run.decided = True
        if job.trigger is not None and flow_run.auto_scheduled:
            judgement = schedules.judge(job.trigger, run.due)
            if judgement.verdict is Verdict.EARLY:
                await self.client.delete_flow_run(flow_run.id)
                return
            if judgement.verdict is Verdict.END:
                self._deployments.end(job, judgement.reason)
                return
        claim: OrchestrationResult[Any] = await self.client.set_flow_run_state(flow_run.id, Pending())
        if claim.status is SetStateStatus.ACCEPT:
            # Nobody starts a run before its time: ahead of it there is nothing to ask.
            is_late = datetime.now(UTC) >= run.due
            if not (is_late and await self._deployments.has_run_since(flow_run)):
                await self._run_job(run, job)
        else:
            self._logger.info("Run %s is not to be had: %s", flow_run.name, claim.details)

    # --- running --------------------------------------------------------------------------------

    async def _run_job(self, run: RunInHand, job: DeployedJob) -> None:
        assignment = self._assignment(run, job)
        outcome = await self._on_a_host(run, assignment, job)
        if outcome.ended is not None and run.ended is None:
            self._end_job(job, outcome.ended)
        if outcome.kind == "dropped":
            await self._put_back(run)
        elif outcome.kind == "crashed":
            await self._report_crash(run, assignment, outcome.message)

    def _assignment(self, run: RunInHand, job: DeployedJob) -> Assignment:
        return Assignment(
            flow_run=run.flow_run,
            due=run.due,
            flow_name=job.flow_name,
            entrypoint=job.deployment.entrypoint or "",
            workspace=job.workspace,
            node=self.name,
            database_url=self._settings.effective_database_url(),
            trigger_slug=job.slug,
            trigger=job.trigger,
            initial_state=job.configuration.initial_state,
        )

    async def _on_a_host(self, run: RunInHand, assignment: Assignment, job: DeployedJob) -> Outcome:
        def on_begin(ended: str | None) -> None:
            run.ended = ended
            if ended is not None:
                self._end_job(job, ended)

        while True:
            try:
                host = run.host = await self._hosts.take(assignment.workspace.key)
            except (OSError, EOFError) as fault:
                self._logger.warning("No process can be started for runs: %s", fault or "it ended at once")
                await asyncio.sleep(PAUSE_SECONDS)
                return Outcome("dropped")
            if run.over is not None:
                self._hosts.give_back(host)
                return Outcome("dropped")
            try:
                outcome = await host.carry_out(assignment, on_begin)
            except EOFError:
                outcome = Outcome("crashed", message=await self._hosts.how_it_ended(host))
            finally:
                run.host = None
            if outcome.host_stays:
                self._hosts.give_back(host)
            else:
                self._hosts.discard(host)
            if outcome.kind != "stale":
                return outcome

    def _end_job(self, job: DeployedJob, reason: str) -> None:
        """End a job for all nodes; its ticks that are claimed, but have not begun, do not begin."""
        self._deployments.end(job, reason)
        for run in self._in_hand.values():
            is_of_job = run.flow_run.deployment_id == job.deployment.id
            if is_of_job and run.flow_run.auto_scheduled:
                run.over = reason
                if run.host is not None:
                    run.host.drop()

    async def _put_back(self, run: RunInHand) -> None:
        """Give a claimed run that has not begun to the next agent, or skip it if its job is over."""
        if run.over is not None:
            await self._deployments.skip(run.flow_run, run.over)
        else:
            await self._deployments.report(run.flow_run, Scheduled(scheduled_time=run.due), force=True)

    async def _report_crash(self, run: RunInHand, assignment: Assignment, message: str) -> None:
        """Report the end of a run whose process could not, and run the hooks it owes."""
        state: State[Any] = Crashed(message=f"On {self.name}: {message}.")
        if run.cancelled is not None:
            state = Cancelled(message=f"Cancelled; on {self.name} {message}.")
        self._logger.warning("Run %s: %s", run.flow_run.name, state.message)
        await self._deployments.report(run.flow_run, state, force=run.cancelled is not None)
        try:
            host = await self._hosts.take(assignment.workspace.key)
            await host.run_hooks(assignment, state)
        except (OSError, EOFError) as fault:
            self._logger.warning("The hooks of run %s could not be run: %s", run.flow_run.name, fault)
        else:
            self._hosts.discard(host)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: WarmBackupJobConfiguration,  # noqa: ARG002 - read with the deployment
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> WarmBackupResult:
        """Run one flow run that something other than the poll has claimed."""
        run = self._in_hand[flow_run.id] = RunInHand(flow_run)
        if task_status is not None:
            task_status.started(0)
        async with self._room:
            try:
                job = await self._deployments.job_of(flow_run, self.work_pool, None)
                await self._run_job(run, job)
            finally:
                del self._in_hand[flow_run.id]
        return WarmBackupResult(identifier=str(flow_run.id), status_code=0)

    # --- watching -------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Look after the runs that are going on, as long as the agent lives."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            since = datetime.now(UTC) - timedelta(seconds=WATCH_SECONDS)
            going_on = {
                run_id: run
                for run_id, run in self._in_hand.items()
                if run.host is not None and run.due < since
            }
            try:
                self._kill_overdue(going_on.values())
                self._send_heartbeats(going_on.values())
                if going_on:
                    await self._cancel_what_is_to_be(going_on)
            except httpx.HTTPError as fault:
                self._logger.debug("Could not look for cancelled runs: %s", fault)
            except Exception:
                self._logger.exception("Looking after the runs failed; trying again.")

    def _kill_overdue(self, going_on: Iterable[RunInHand]) -> None:
        cutoff = time.monotonic() - CANCEL_GRACE_SECONDS
        for run in going_on:
            if run.cancelled is not None and run.cancelled < cutoff and run.host is not None:
                run.host.end(signal.SIGKILL)

    def _send_heartbeats(self, going_on: Iterable[RunInHand]) -> None:
        """Emit Prefect's heartbeat events: automations of its users detect dead runs by them."""
        seconds = get_current_settings().flows.heartbeat_frequency
        if seconds is None:
            return
        for run in going_on:
            if time.monotonic() - run.heartbeat >= seconds:
                run.heartbeat = time.monotonic()
                emit_event(
                    "prefect.flow-run.heartbeat",
                    resource=_resource("flow-run", run.flow_run.id)
                    | {"prefect.resource.name": run.flow_run.name},
                    related=[
                        _resource("flow", run.flow_run.flow_id) | {"prefect.resource.role": "flow"},
                        _resource("deployment", run.flow_run.deployment_id)
                        | {"prefect.resource.role": "deployment"},
                    ],
                )

    async def _cancel_what_is_to_be(self, going_on: dict[UUID, RunInHand]) -> None:
        cancelling = await self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                id=FlowRunFilterId(any_=list(going_on)),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
            )
        )
        for flow_run in cancelling:
            run = going_on[flow_run.id]
            if run.cancelled is None and run.host is not None:
                run.cancelled = time.monotonic()
                run.host.cancel()


def _due(flow_run: FlowRun) -> datetime:
    """Return when a run is to start: its scheduled time, or when it was made."""
    due = flow_run.next_scheduled_start_time or flow_run.expected_start_time or flow_run.created
    return due if due is not None else datetime.now(UTC)


def _resource(kind: str, object_id: UUID | None) -> dict[str, str]:
    return {"prefect.resource.id": f"prefect.{kind}.{object_id}"}
