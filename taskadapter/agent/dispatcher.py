"""From a run that is due to a run that is over: decide, claim, run in a process, report.

The dispatcher is given the runs that the agent's polls find. It takes them a little before their time,
as many as there is room for, and looks after them until they have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkPool
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.logging.loggers import flow_run_logger
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Crashed, Pending

from taskadapter.agent import runs
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.hosts import Host, HostPool, Outcome, Progress
from taskadapter.agent.jobs import DeployedJob, Deployments
from taskadapter.agent.queue import Queue, Which, any_run, due
from taskadapter.agent.runs import Life, Phase, Todo
from taskadapter.agent.timetable import Timetable
from taskadapter.coordination import store
from taskadapter.coordination.executions import ABANDONED, Entry
from taskadapter.coordination.messages import Token
from taskadapter.declare.triggers import WaitingPolicy
from taskadapter.errors import CoordinationError, TokenLostError
from taskadapter.execution import protocol
from taskadapter.execution.assignment import Assignment
from taskadapter.prefect_api.client import API_FAULTS, in_words
from taskadapter.prefect_api.deployments import is_on
from taskadapter.prefect_api.pool import PoolSize
from taskadapter.rules import ticks
from taskadapter.rules.ticks import Verdict

WATCH_SECONDS = 2.0
"""How often the agent looks after its runs, and asks whether one is to be cancelled."""

HEARING_WATCHES = 8
"""An agent that hears of a cancellation asks at each eighth time only."""

TERMINATE_GRACE_SECONDS = 5.0
"""How long a run may take to end when its agent has to, before its process is killed."""

JUST_READ_SECONDS = 0.5
"""A deployment that was read so shortly before is as it was."""

PLENTY = 4
"""So many runs for each process are more than it begins before the agent looks again."""

PAUSE_SECONDS = 5.0
"""How long to wait before a run is tried again that no process could be started for."""


@dataclass
class RunInHand:
    """A run between its claim and its end.

    Attributes:
        flow_run: as polled.
        token: what the node held of the run's group when it took it; None for a run of no group.
        life: how far it has come, and what is to become of it.
        host: the process that has it, while one does.
        heartbeat: when its last heartbeat was, on the monotonic clock; None before it has started.
    """

    flow_run: FlowRun
    token: Token | None = None
    life: Life = field(default_factory=Life)
    host: Host | None = None
    heartbeat: float | None = None

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


@dataclass(frozen=True)
class AgentView:
    """What the dispatcher needs to know of its agent.

    Attributes:
        name: the node's name.
        incarnation: which of all processes that ever had it.
        client: connected to the API.
        log: the agent's log.
        pool: returns the work pool as it was last read.
        token: returns the token of a run's group; None for a run of no group.
        may_run: returns whether this node may run a run now: it has no group, or the token is held.
        database_url: returns the coordination database's URL.
        board: returns the file with the deadlines of tokens.
        hears: returns whether the agent hears of a cancellation.
        heard: is told what the agent is to look at.
    """

    name: str
    incarnation: str
    client: PrefectClient
    log: Logger | LoggerAdapter[Any]
    pool: Callable[[], WorkPool]
    token: Callable[[FlowRun], Token | None]
    may_run: Callable[[FlowRun], bool]
    database_url: Callable[[], str]
    board: Callable[[], Path | None]
    hears: Callable[[], bool]
    heard: Callable[[News], None]


class Dispatcher:
    """Has runs run, each at its time.

    Args:
        agent: whose runs they are.
        hosts: where they run.
        deployments: what they are runs of.
        timetable: which ticks are owed; it learns here which are settled.
    """

    def __init__(
        self, agent: AgentView, hosts: HostPool, deployments: Deployments, timetable: Timetable
    ) -> None:
        self._agent = agent
        self._client = agent.client
        self._log = agent.log
        self._hosts = hosts
        self._deployments = deployments
        self._teller = deployments.teller
        self._timetable = timetable
        self._queue = Queue()
        self._in_hand: dict[UUID, RunInHand] = {}
        self._handling: set[asyncio.Task[None]] = set()
        self._waits: set[asyncio.Timeout] = set()
        self._is_held_up = False
        self._news = asyncio.Event()

    # --- what the agent tells ---------------------------------------------------------------------

    def found(self, found: list[FlowRun], asked: float) -> None:
        """Take note of all runs that are due soon or late; they replace those that were known.

        Args:
            found: as the API had them.
            asked: when it was asked, on the monotonic clock: what has been through since is no news.
        """
        self._queue.found(found, asked, self._in_hand.keys())
        self._news.set()

    @property
    def in_hand(self) -> frozenset[UUID]:
        """The runs between their claim and their end."""
        return frozenset(self._in_hand)

    @property
    def runs_in_hand(self) -> list[FlowRun]:
        """The same, as they were found."""
        return [run.flow_run for run in self._in_hand.values()]

    @property
    def is_busy(self) -> bool:
        """Whether there is something to run, now or soon."""
        return bool(self._queue or self._in_hand)

    @property
    def has_plenty(self) -> bool:
        """Whether there is much more to run, now or soon, than there is room for."""
        return len(self._queue) > PLENTY * self._hosts.limit

    def forget(self, which: Which = any_run) -> None:
        """Start nothing more of what is known, or of some of it; what waits for its moment goes back."""
        self._queue.forget(which)
        self._drop(self._those(which))

    def _those(self, which: Which) -> list[RunInHand]:
        return [run for run in self._in_hand.values() if which(run.flow_run)]

    def _drop(self, dropped: Iterable[RunInHand]) -> None:
        for run in dropped:
            run.meet(runs.Dropped())

    def call_off(self, job_id: UUID, reason: str) -> None:
        """Have no tick of a job begin any more, which is over; one that was claimed is Skipped."""

        def is_tick_of_it(run: FlowRun) -> bool:
            return run.deployment_id == job_id and ticks.is_tick(run)

        for run in self._those(is_tick_of_it):
            run.meet(runs.CalledOff(reason))

    async def drain(self, seconds: float, which: Which = any_run) -> None:
        """Let runs end, all or some, for so long; then end them.

        What has not begun goes back to be claimed by another node.
        """
        those = self._those(which)
        if those:
            self._log.info("%d run(s) may still end, within %g s.", len(those), seconds)
        self._drop(those)
        await self._until_gone(those, seconds)
        self._end(those)
        await self._until_gone(those, TERMINATE_GRACE_SECONDS)

    async def _until_gone(self, those: list[RunInHand], seconds: float) -> None:
        wait = asyncio.timeout(seconds)
        self._waits.add(wait)
        with contextlib.suppress(TimeoutError):
            async with wait:
                while any(run.flow_run.id in self._in_hand for run in those):
                    await asyncio.wait(
                        self._handling or [asyncio.create_task(asyncio.sleep(0.1))],
                        return_when=asyncio.FIRST_COMPLETED,
                    )
        self._waits.discard(wait)

    def hurry(self) -> None:
        """End the runs that are being waited for, now, and wait no longer than they take to end."""
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    async def finish(self) -> None:
        """Wait until everything that is known has run."""
        while self._queue or self._handling:
            await asyncio.wait(self._handling or [asyncio.create_task(asyncio.sleep(0.1))])

    def end(self, which: Which = any_run) -> None:
        """End runs that go on, all or some: each shows as Crashed, unless its body has not begun."""
        self._end(self._those(which))

    def _end(self, ended: Iterable[RunInHand]) -> None:
        for run in ended:
            run.meet(runs.TimeUp())

    def lose(self, token: Token) -> None:
        """Stop the runs of a token that is lost, now: another node may start some."""
        self._queue.forget(lambda run: run.work_queue_name == token.group_id)
        for run in self._in_hand.values():
            if run.token == token:
                run.meet(runs.TokenLost())

    # --- claiming ---------------------------------------------------------------------------------

    async def dispatch(self) -> None:
        """Take one run after another, each a little before its time, while there is room."""
        while True:
            flow_run = await self._next_due()
            run = self._in_hand[flow_run.id] = RunInHand(flow_run, self._agent.token(flow_run))
            task = asyncio.create_task(self._handle(run))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

    async def _next_due(self) -> FlowRun:
        while True:
            clock = time.monotonic()
            wait = self._queue.next_try(clock)
            has_room = len(self._in_hand) < self._hosts.limit
            if has_room and (first := self._queue.first(self._may_start, clock)) is not None:
                seconds = (self._queue.claimed_at(first) - datetime.now(UTC)).total_seconds()
                if seconds <= 0:
                    self._queue.take(first)
                    return first
                wait = seconds if wait is None else min(wait, seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()
            self._news.clear()

    def _may_start(self, flow_run: FlowRun) -> bool:
        """Return whether the run's job goes on, here, with fewer runs in hand than it may have."""
        if self._deployments.is_ending(flow_run) or not self._agent.may_run(flow_run):
            return False
        if self._timetable.is_held(flow_run):
            return False
        job, siblings = self._deployments.known(flow_run), self._siblings(flow_run)
        return job is None or job.max_concurrent is None or len(siblings) < job.max_concurrent

    def _siblings(self, flow_run: FlowRun) -> list[RunInHand]:
        """Return the runs in hand of the same job, this one included."""
        job_id = flow_run.deployment_id
        return [run for run in self._in_hand.values() if run.flow_run.deployment_id == job_id]

    def _may_begin(self, run: RunInHand) -> bool:
        """Return whether it is a run's turn: ticks of a job of ours begin in their order."""
        job = self._deployments.known(run.flow_run)
        if not ticks.is_tick(run.flow_run) or (job is not None and job.trigger is None):
            return True
        return all(other.life.has_begun or other.due >= run.due for other in self._siblings(run.flow_run))

    def _release(self) -> None:
        """Let the processes go on that have waited for an earlier tick."""
        for run in self._in_hand.values():
            if run.host is not None and self._may_begin(run):
                run.host.go()

    async def _handle(self, run: RunInHand) -> None:
        try:
            await self._decide(run)
        except ObjectNotFound:
            self._log.info("Run %s or its deployment was deleted.", run.flow_run.name)
            self._agent.heard(News(Kind.DEPLOYMENT, run.flow_run.deployment_id))
        except (*API_FAULTS, CoordinationError) as fault:
            # One line is enough until a claim succeeds again.
            level = logging.DEBUG if self._is_held_up else logging.WARNING
            self._log.log(level, "Run %s is left for later: %s", run.flow_run.name, in_words(fault))
            self._is_held_up = True
            if run.life.phase >= Phase.CLAIMED:
                await self._give_back(run, runs.give_back(run.life))
            self._agent.heard(News(Kind.WAITS, run.flow_run.id))
        except Exception as exc:  # noqa: BLE001 - one run's trouble must not end the agent
            self._log.exception("Run %s could not be run.", run.flow_run.name)
            await self._teller.report(run.flow_run, Crashed(message=f"{exc}"))
        finally:
            del self._in_hand[run.flow_run.id]
            self._queue.through(run.flow_run.id, time.monotonic())
            self._release()
            self._news.set()

    async def _decide(self, run: RunInHand) -> None:
        """Apply what Prefect's schedule cannot express, then claim and run."""
        flow_run = run.flow_run
        if self._deployments.is_ending(flow_run):
            return
        job = await self._deployments.job_of(flow_run, self._agent.pool())
        # Decided already, or due before this one: they go first.
        others = [other for other in self._siblings(flow_run) if other is not run]
        ahead = sum(other.life.phase >= Phase.DECIDED or other.due < run.due for other in others)
        if job.max_concurrent is not None and ahead >= job.max_concurrent:
            # Only now is it known that its job allows no more: it waits its turn.
            self._queue.put(flow_run)
            return
        run.meet(runs.Decided(job.finishes))
        if await self._is_off(flow_run, job) or await self._is_put_away(run, job):
            return
        if not self._agent.may_run(flow_run):
            return
        claim: OrchestrationResult[Any] = await self._client.set_flow_run_state(flow_run.id, Pending())
        if claim.status is SetStateStatus.ACCEPT:
            run.meet(runs.Claimed())
            self._is_held_up = False
            self._timetable.settle(flow_run)
            await self._run(run, job)
        else:
            self._log.debug("Run %s is not to be had: %s", flow_run.name, claim.details)

    async def _is_off(self, flow_run: FlowRun, job: DeployedJob) -> bool:
        """Return whether the job of a tick is paused or over: ask, just before the claim, where it may be.

        When a job is paused or ended Prefect deletes what its scheduler has planned, and nothing else.
        """
        if flow_run.deployment_id is None or not ticks.is_tick(flow_run):
            return False
        if flow_run.auto_scheduled and not self._timetable.may_be_over(flow_run):
            return False
        deployment = job.deployment
        if time.monotonic() - job.reading.read_at > JUST_READ_SECONDS:
            deployment = await self._client.read_deployment(flow_run.deployment_id)
        if deployment.paused:
            self._timetable.hold(deployment)
        elif not is_on(deployment):
            # Perhaps one of many that were being planned when the job ended.
            self._deployments.end(job, "it ended before")
        return deployment.paused or not is_on(deployment)

    async def _is_put_away(self, run: RunInHand, job: DeployedJob) -> bool:
        """Return whether the tick is not to run by its trigger or its policy, and see to it then."""
        if job.trigger is None or not ticks.is_tick(run.flow_run):
            return False
        waiting_time = PoolSize.of(self._agent.pool()).waiting_time
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
            case Verdict.END:
                # Ticks before this one are in hand, perhaps, and are to run.
                self._deployments.end(job, judgement.reason)
                self._timetable.end(job.deployment.id)
            case Verdict.SKIP:
                await self._skip(run, job, judgement.reason)
        return judgement.verdict is not Verdict.RUN

    async def _skip(self, run: RunInHand, job: DeployedJob, reason: str) -> None:
        """Skip a tick that is too late for its policy, or whose job is over; say so if the policy asks."""
        try:
            assignment = self._assignment(run, job)
            url, execution, owner = self._agent.database_url(), assignment.execution, assignment.owner
            await asyncio.to_thread(store.skip, url, execution, owner, reason)
        except CoordinationError as fault:
            self._log.debug("The ledger does not say that run %s is skipped: %s", run.flow_run.name, fault)
        await self._teller.skip(run.flow_run, reason)
        self._timetable.settle(run.flow_run)
        if job.policy.waiting_policy is WaitingPolicy.LOG_AND_IGNORE:
            log = flow_run_logger(run.flow_run)
            log.warning("Job %s skips its tick of %s: %s.", job.name, run.tick.isoformat(), reason)

    # --- running ----------------------------------------------------------------------------------

    async def _run(self, run: RunInHand, job: DeployedJob) -> None:
        """Run a claimed run, and see to what follows from how it went."""
        has_storage = await self._deployments.server_has_storage()
        assignment = self._assignment(run, job, server_has_storage=has_storage)
        outcome = await self._in_a_process(run, assignment, job)
        for action in run.meet(outcome.end):
            match action:
                case runs.AskLedger(at_fault):
                    await self._settle(run, assignment, outcome.message, at_fault=at_fault)
                case _:
                    await self._do(run, job, action)
        if outcome.left:
            flow_run_logger(run.flow_run).warning(
                "The run left processes behind, which have been ended: %s", "; ".join(outcome.left)
            )

    async def _do(
        self,
        run: RunInHand,
        job: DeployedJob,
        action: runs.PutBack | runs.ShowSkipped | runs.Skip | runs.EndJob | runs.HoldJob,
    ) -> None:
        """Do what the life of a run asks for, other than asking the ledger."""
        match action:
            case runs.PutBack() | runs.ShowSkipped():
                await self._give_back(run, action)
            case runs.Skip(reason):
                await self._skip(run, job, reason)
            case runs.EndJob(reason):
                self._end_job(job, reason)
            case runs.HoldJob():
                self._timetable.hold(job.deployment.model_copy(update={"paused": True}))

    async def _give_back(self, run: RunInHand, action: runs.PutBack | runs.ShowSkipped) -> None:
        match action:
            case runs.PutBack(keep):
                await self._teller.put_back(run.flow_run, run.due)
                if keep:
                    self._queue.put_back(run.flow_run, time.monotonic())
            case runs.ShowSkipped(reason):
                await self._teller.skip(run.flow_run, reason)

    async def _settle(
        self, run: RunInHand, assignment: Assignment, message: str, *, at_fault: bool
    ) -> None:
        """Do about a run whose process has ended what the ledger says."""
        try:
            entry = await self._entry(run, assignment)
        except TokenLostError:
            return  # the next holder asks the same
        known = await self._teller.state_of(run.flow_run)
        match runs.settle(run.life, entry, known, self._agent.incarnation, at_fault=at_fault):
            case Todo.HAND_ON:
                self._log.warning("Run %s is left to the next holder of its group.", run.flow_run.name)
            case Todo.PUT_BACK:
                self._queue.try_later(run.flow_run.id, time.monotonic())
                await self._give_back(run, runs.give_back(run.life))
            case Todo.CRASH:
                await self._report_crash(run, assignment, message)
            case Todo.SUSPEND:
                await self._enter(run, assignment, ABANDONED)
            case Todo.ENTER:
                await self._enter(run, assignment, runs.outcome_of(known))
            case Todo.TELL if entry is not None:
                await self._teller.tell(run.flow_run, entry)

    async def _entry(self, run: RunInHand, assignment: Assignment) -> Entry | None:
        """Return a run's entry in the ledger, however long the database does not answer.

        Raises:
            TokenLostError: the token is lost.
        """
        key, url = assignment.execution.key, self._agent.database_url()
        while True:
            try:
                found = await asyncio.to_thread(store.entries, url, [key])
            except CoordinationError as fault:
                if run.life.lost:
                    raise TokenLostError(f"run {run.flow_run.name} is another node's") from fault
                self._log.debug("The end of run %s waits for the database: %s", run.flow_run.name, fault)
                await asyncio.sleep(store.RETRY_SECONDS)
            else:
                return found[0] if found else None

    async def _enter(self, run: RunInHand, assignment: Assignment, outcome: str) -> None:
        """Enter what a run came to; if the database does not answer now, a look at what is open will."""
        url, key = self._agent.database_url(), assignment.execution.key
        try:
            await asyncio.to_thread(store.end, url, key, outcome)
        except CoordinationError as fault:
            self._log.debug("The end of run %s is not entered yet: %s", run.flow_run.name, fault)

    def _assignment(
        self, run: RunInHand, job: DeployedJob, *, server_has_storage: bool = True
    ) -> Assignment:
        return Assignment(
            flow_run=run.flow_run,
            due=run.due,
            flow_name=job.flow_name,
            entrypoint=job.deployment.entrypoint or "",
            workspace=job.workspace_of(run.flow_run, self._agent.name),
            node=self._agent.name,
            incarnation=self._agent.incarnation,
            database_url=self._agent.database_url(),
            token=run.token,
            board=self._agent.board(),
            scratch=self._hosts.scratch(str(run.flow_run.id)),
            trigger_slug=job.slug,
            trigger=job.trigger,
            initial_state=job.configuration.initial_state,
            waiting_time=PoolSize.of(self._agent.pool()).waiting_time,
            server_has_storage=server_has_storage,
        )

    async def _in_a_process(self, run: RunInHand, assignment: Assignment, job: DeployedJob) -> Outcome:
        def begun(ended: str | None) -> None:
            actions = run.meet(protocol.Begun(ended=ended))
            self._release()
            for action in actions:
                if isinstance(action, runs.EndJob):
                    self._end_job(job, action.reason)

        def loaded(seconds: float) -> None:
            self._queue.loaded(run.flow_run.deployment_id, seconds)

        try:
            host = await self._hosts.fork()
        except OSError as fault:
            self._log.warning("No process can be started for run %s: %s", run.flow_run.name, fault)
            await asyncio.sleep(PAUSE_SECONDS)
            return Outcome(protocol.Dropped())
        run.host = host
        try:
            run.meet(runs.Forked())
            if not run.life.has_process:
                return Outcome(protocol.Dropped())
            if self._may_begin(run):
                host.go()
            return await host.carry_out(
                assignment, Progress(loaded, lambda: self._send_heartbeat(run), begun)
            )
        finally:
            run.host = None
            await self._hosts.clear(str(run.flow_run.id))

    def _end_job(self, job: DeployedJob, reason: str) -> None:
        """End a job for all nodes; its ticks that are claimed, but have not begun, do not begin."""
        self._deployments.end(job, reason)
        self._timetable.end(job.deployment.id)
        self.call_off(job.deployment.id, reason)

    async def _report_crash(self, run: RunInHand, assignment: Assignment, message: str) -> None:
        """Enter and report the end of a run whose process could not, and run the hooks it owes."""
        state: State[Any] = Crashed(message=f"On {self._agent.name}: {message}.")
        if run.life.cancelled is not None:
            state = Cancelled(message=f"Cancelled; on {self._agent.name} {message}.")
        await self._enter(run, assignment, state.type.value.capitalize())
        if await self._teller.report(run.flow_run, state, force=True):
            self._log.warning("Run %s: %s", run.flow_run.name, state.message)
            await self._run_hooks(run, assignment, state)

    async def _run_hooks(self, run: RunInHand, assignment: Assignment, state: State[Any]) -> None:
        try:
            host = await self._hosts.fork()
            await host.run_hooks(assignment, state)
        except OSError as fault:
            self._log.warning("The hooks of run %s could not be run: %s", run.flow_run.name, fault)
        finally:
            await self._hosts.clear(str(run.flow_run.id))

    async def run_now(self, flow_run: FlowRun) -> None:
        """Run a run that something other than a poll has claimed."""
        run = self._in_hand[flow_run.id] = RunInHand(flow_run, self._agent.token(flow_run))
        try:
            await self._run(run, await self._deployments.job_of(flow_run, self._agent.pool()))
        finally:
            del self._in_hand[flow_run.id]

    # --- watching ---------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look after the runs that are going on, as long as the agent lives."""
        for watch in itertools.count():
            await asyncio.sleep(WATCH_SECONDS)
            since = datetime.now(UTC) - timedelta(seconds=WATCH_SECONDS)
            in_hand = self._in_hand.items()
            going_on = {id_: run for id_, run in in_hand if run.host is not None and run.due < since}
            try:
                for run in going_on.values():
                    run.meet(runs.Watched(time.monotonic()))
                self._send_heartbeats(going_on.values())
                if going_on and (watch % HEARING_WATCHES == 0 or not self._agent.hears()):
                    await self._cancel_what_is_to_be(going_on)
            except API_FAULTS as fault:
                self._log.debug("Could not look for cancelled runs: %s", fault)
            except Exception:  # noqa: BLE001 - as above
                self._log.exception("Looking after the runs failed; trying again.")

    def _send_heartbeats(self, going_on: Iterable[RunInHand]) -> None:
        """Emit Prefect's heartbeat events: automations of its users detect dead runs by them."""
        seconds = get_current_settings().flows.heartbeat_frequency
        for run in going_on:
            if seconds and run.heartbeat is not None and time.monotonic() - run.heartbeat >= seconds:
                self._send_heartbeat(run)

    def _send_heartbeat(self, run: RunInHand) -> None:
        run.heartbeat = time.monotonic()
        if get_current_settings().flows.heartbeat_frequency is None:
            return
        emit_event(
            "prefect.flow-run.heartbeat",
            resource=_resource("flow-run", run.flow_run.id) | {"prefect.resource.name": run.flow_run.name},
            related=[
                _resource("flow", run.flow_run.flow_id) | {"prefect.resource.role": "flow"},
                _resource("deployment", run.flow_run.deployment_id)
                | {"prefect.resource.role": "deployment"},
            ],
        )

    async def _cancel_what_is_to_be(self, going_on: dict[UUID, RunInHand]) -> None:
        cancelling = await self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                id=FlowRunFilterId(any_=list(going_on)),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
            )
        )
        for flow_run in cancelling:
            self.cancel(flow_run.id)

    def cancel(self, run_id: UUID) -> None:
        """End a run that is to be cancelled, if it is going on here."""
        run = self._in_hand.get(run_id)
        if run is not None and run.host is not None:
            run.meet(runs.Cancelled(time.monotonic()))


def _resource(kind: str, object_id: UUID | None) -> dict[str, str]:
    return {"prefect.resource.id": f"prefect.{kind}.{object_id}"}
