"""From a run that is claimed to one that is over: have it run in a process, and do what follows."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.logging.loggers import flow_run_logger
from prefect.states import Cancelled, Crashed

from taskadapter.agent import events, metrics, runs
from taskadapter.agent.hand import Hand, RunInHand
from taskadapter.agent.hosts import HostPool
from taskadapter.agent.links import HOOKS_SECONDS, Outcome, Progress
from taskadapter.agent.runs import Phase, Todo
from taskadapter.agent.watch import send_heartbeat
from taskadapter.coordination import store
from taskadapter.coordination.executions import ABANDONED, End, Entry
from taskadapter.declare.triggers import WaitingPolicy
from taskadapter.errors import CoordinationError, TokenLostError
from taskadapter.execution import protocol
from taskadapter.execution.assignment import Assignment
from taskadapter.prefect_api.pool import PoolSize
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from taskadapter.agent.ends import Ends
    from taskadapter.agent.jobs import DeployedJob, Deployments
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.node import Node
    from taskadapter.agent.queue import Queue
    from taskadapter.agent.succession import Succession
    from taskadapter.agent.timetable import Timetable

T = TypeVar("T")

ANSWERS_WITHIN_SECONDS = 5.0
"""How long after the agent the process of a run reaches a database that was away."""

PAUSE_SECONDS = 5.0
"""How long to wait before a run is tried again that no process could be started for."""


class Runner:
    """Runs claimed runs.

    Args:
        node: whose runs they are.
        membership: which database and tokens they run under.
        hosts: where they run.
        deployments: what they are runs of.
        ends: what ends those whose jobs are over.
        timetable: which ticks are owed; it learns here which are settled.
        queue: where those go that are put back; it learns how long their code takes to load.
        hand: where they are meanwhile.
        succession: which nodes may be able to run what this one cannot.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        hosts: HostPool,
        deployments: Deployments,
        ends: Ends,
        timetable: Timetable,
        queue: Queue,
        hand: Hand,
        succession: Succession,
    ) -> None:
        self._node = node
        self._log = node.log
        self._membership = membership
        self._hosts = hosts
        self._deployments = deployments
        self._ends = ends
        self._teller = node.teller
        self._timetable = timetable
        self._queue = queue
        self._hand = hand
        self._succession = succession

    async def run(self, run: RunInHand, job: DeployedJob) -> None:
        """Run a claimed run, and do what follows from how it went."""
        has_storage = await self._deployments.server_has_storage()
        assignment = self._assignment(run, job, server_has_storage=has_storage)
        outcome = await self._in_a_process(run, assignment, job)
        for action in run.meet(outcome.end):
            match action:
                case runs.Withdraw():
                    await self._withdraw(run, assignment)
                case runs.AskLedger(at_fault):
                    await self._settle(run, assignment, outcome.message, at_fault=at_fault)
                case runs.PassOn(waits):
                    await self._pass_on(run, assignment, outcome.message, waits=waits)
                case runs.PutBack() | runs.ShowSkipped():
                    await self.give_back(run, action)
                case runs.Skip(reason):
                    if not await self.skip(run, job, reason):
                        await self._settle(run, assignment, outcome.message, at_fault=False)
                case runs.EndJob(reason):
                    self._end_job(job, reason)
                case runs.HoldJob():
                    self._timetable.hold(job.deployment.model_copy(update={"paused": True}))
        if outcome.hook is not None:
            flow_run_logger(run.flow_run).warning(
                "Hook %s took longer than %g s, and was ended with the run's process.",
                outcome.hook,
                HOOKS_SECONDS,
            )
        if outcome.left:
            flow_run_logger(run.flow_run).warning(
                "The run left these processes behind; they have been killed: %s", "; ".join(outcome.left)
            )

    async def give_back(self, run: RunInHand, action: runs.PutBack | runs.ShowSkipped) -> None:
        """Make a run that has begun nothing due again, or show that it is skipped."""
        match action:
            case runs.PutBack(keep):
                await self._teller.put_back(run.flow_run, run.due, is_ours=lambda: self._is_ours(run))
                if keep:
                    self._queue.put_back(run.flow_run, time.monotonic())
                    self._hand.hold_back(run)
            case runs.ShowSkipped(reason):
                await self._teller.skip(run.flow_run, reason)

    def _is_ours(self, run: RunInHand) -> bool:
        """Return whether this node may say what becomes of a run; else its group's next holder does."""
        return run.token is None or self._membership.holds(run.token)

    async def _pass_on(self, run: RunInHand, assignment: Assignment, message: str, *, waits: bool) -> None:
        """Have another node run what cannot be loaded here; if there is none it waits, or has crashed."""
        if await self._succession.pass_on(run, message):
            run.meet(runs.Dropped())
            await self.give_back(run, runs.give_back(run.life))
        elif waits and run.life.cancelled is None:
            if self._queue.try_later(run.flow_run.id, time.monotonic()) == 0:
                for log in self._log, flow_run_logger(run.flow_run):
                    log.warning("Run %s waits until its code is here. %s", run.flow_run.name, message)
            await self.give_back(run, runs.give_back(run.life))
        else:
            await self._settle(run, assignment, message, at_fault=True)

    async def _settle(
        self, run: RunInHand, assignment: Assignment, message: str, *, at_fault: bool
    ) -> None:
        """Do about a run whose process has ended what the ledger says."""
        if run.entering is not None:
            await asyncio.wait([run.entering])
        try:
            entry = await self._entry(run, assignment)
        except TokenLostError:
            return  # the next holder asks the same
        known = await self._teller.state_of(run.flow_run)
        match runs.settle(run.life, entry, known, self._node.incarnation, at_fault=at_fault):
            case Todo.HAND_ON:
                self._log.warning(
                    "Run %s ended after its group was lost; the group's next holder settles it.",
                    run.flow_run.name,
                )
            case Todo.PUT_BACK:
                self._queue.try_later(run.flow_run.id, time.monotonic())
                await self.give_back(run, runs.give_back(run.life))
            case Todo.CRASH:
                await self._report_crash(run, assignment, message)
            case Todo.SUSPEND if entry is not None:
                await self._enter(run, store.end_as_found, entry, ABANDONED)
            case Todo.ENTER if entry is not None:
                await self._enter(run, store.end_as_found, entry, runs.outcome_of(known))
            case Todo.TELL if entry is not None:
                await self._teller.tell(run.flow_run, entry)

    async def _withdraw(self, run: RunInHand, assignment: Assignment) -> None:
        """Have a run that was entered at a moment at which the database did not answer begin anew."""
        with suppress(TokenLostError):  # the next holder takes it for interrupted
            slug = assignment.trigger_slug or ""
            await self._asked(run, store.withdraw, assignment.execution, assignment.owner, slug)

    async def _entry(self, run: RunInHand, assignment: Assignment) -> Entry | None:
        """Return a run's entry in the ledger.

        Raises:
            TokenLostError: the token is lost.
        """
        found = await self._asked(run, store.entries, [assignment.execution.key])
        return found[0] if found else None

    async def _asked(self, run: RunInHand, ask: Callable[..., T], *what: object) -> T:
        """Return what the ledger answers about a run that has ended, however long it does not.

        Raises:
            TokenLostError: the token is lost, and it does not answer.
        """
        level = logging.WARNING
        while True:
            try:
                return await asyncio.to_thread(ask, self._membership.database_url, *what)
            except CoordinationError as fault:
                if run.life.lost:
                    raise TokenLostError(f"run {run.flow_run.name} is another node's") from fault
                self._log.log(
                    level, "The end of run %s waits for the database: %s", run.flow_run.name, fault
                )
                level = logging.DEBUG  # one line is enough
                await asyncio.sleep(store.RETRY_SECONDS)

    def _met(self, run: RunInHand, job: DeployedJob, begun: protocol.Begun) -> None:
        """Take note that a body has begun, and whether its job is over."""
        for action in run.meet(begun):
            if isinstance(action, runs.EndJob):
                self._end_job(job, action.reason)

    async def _enter_for(
        self, run: RunInHand, assignment: Assignment, job: DeployedJob, end: protocol.Unentered
    ) -> None:
        """Enter what a body came to, whose process cannot; and end that, if it cannot either then."""
        came_to = End(end.outcome, end.state, end.ends)
        slug = assignment.trigger_slug
        try:
            await self._asked(run, store.settle_for, assignment.execution, assignment.owner, came_to, slug)
        except TokenLostError:
            return  # the next holder takes it for interrupted
        self._met(run, job, protocol.Begun(ended=end.ends))
        # A database that was away answers its process now, too, which has to tell Prefect, and its hooks.
        await asyncio.sleep(ANSWERS_WITHIN_SECONDS)
        if run.life.phase is Phase.BEGUN and run.host is not None:
            self._log.warning(
                "Run %s has come to its end, but its process does not reach the database, and is ended: %s",
                run.flow_run.name,
                end.fault,
            )
            run.host.end(signal.SIGKILL)

    async def _enter(self, run: RunInHand, write: Callable[..., None], *what: object) -> None:
        """Enter what an open entry came to; if the database does not answer now, a look at those will."""
        try:
            await asyncio.to_thread(write, self._membership.database_url, *what)
        except CoordinationError as fault:
            self._log.debug("The end of run %s is not entered yet: %s", run.flow_run.name, fault)

    def _assignment(
        self, run: RunInHand, job: DeployedJob, *, server_has_storage: bool = True
    ) -> Assignment:
        return Assignment(
            flow_run=run.flow_run,
            due=run.due,
            flow_name=job.flow_name,
            deployment_name=job.deployment.name,
            entrypoint=job.deployment.entrypoint or "",
            workspace=job.workspace_of(run.flow_run, self._node.name),
            node=self._node.name,
            incarnation=self._node.incarnation,
            database_url=self._membership.database_url,
            token=run.token,
            board=self._membership.board,
            scratch=self._hosts.scratch(str(run.flow_run.id)),
            trigger_slug=job.slug,
            trigger=job.trigger,
            initial_state=job.configuration.initial_state,
            waiting_time=PoolSize.of(self._node.pool()).waiting_time,
            server_has_storage=server_has_storage,
        )

    async def _in_a_process(self, run: RunInHand, assignment: Assignment, job: DeployedJob) -> Outcome:
        begun_at: float | None = None

        def begun(ended: str | None) -> None:
            nonlocal begun_at
            if begun_at is None and ticks.is_tick(run.flow_run):
                late = (datetime.now(UTC) - run.tick).total_seconds()
                metrics.begun(self._node.work_pool, late, assignment.waiting_time)
            begun_at = begun_at or time.monotonic()
            self._met(run, job, protocol.Begun(ended=ended))
            self._hand.let_begin()

        def loaded(seconds: float) -> None:
            self._queue.loaded(run.flow_run.deployment_id, seconds)

        def came_to(
            report: protocol.Waits | protocol.Unentered | protocol.Answered | protocol.Settled,
        ) -> None:
            match report:
                case protocol.Unentered():
                    run.entering = self._node.tasks.spawn(self._enter_for(run, assignment, job, report))
                case protocol.Waits():
                    run.meet(report)
                    self._succession.waited(run, report)
                case _:
                    run.meet(report)

        try:
            host = await self._hosts.fork()
        except OSError as fault:
            self._log.warning(
                "No process could be started for run %s, which is put back: %s", run.flow_run.name, fault
            )
            await asyncio.sleep(PAUSE_SECONDS)
            return Outcome(protocol.Dropped())
        run.host = host
        try:
            run.meet(runs.Forked())
            if not run.life.has_process:
                return Outcome(protocol.Dropped())
            if self._hand.is_its_turn(run):
                host.go()
            progress = Progress(loaded, lambda: send_heartbeat(run), begun, came_to)
            return await host.carry_out(assignment, progress)
        finally:
            run.host = None
            host.end(signal.SIGKILL)  # if it goes on: what was not foreseen has ended only this
            if begun_at is not None:
                self._queue.ran(run.flow_run.deployment_id, time.monotonic() - begun_at)
            await self._hosts.clear(str(run.flow_run.id))

    async def _report_crash(self, run: RunInHand, assignment: Assignment, message: str) -> None:
        """Enter and report the end of a run whose process could not, and run the hooks it owes.

        It is entered first, however long that takes: nothing else would know of one that has not begun, and
        its tick would be made, and run, again.
        """
        words = message.removesuffix(".")
        state: State[Any] = Crashed(message=f"On {self._node.name}: {words}.")
        if run.life.cancelled is not None:
            state = Cancelled(message=f"Cancelled; on {self._node.name} {words}.")
        outcome = runs.outcome_of(state.type)
        try:
            await self._asked(run, store.give_up, assignment.execution, assignment.owner, outcome, message)
        except TokenLostError:
            return  # the next holder of its group says what becomes of it
        is_told = await self._teller.report(
            run.flow_run, state, force=True, is_ours=lambda: self._is_ours(run)
        )
        if is_told:
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

    def _end_job(self, job: DeployedJob, reason: str) -> None:
        """End a job for all nodes; its ticks that are claimed, but have not begun, do not begin.

        With another trigger, with which it was deployed meanwhile, it goes on.
        """
        self._ends.end(job, reason)
        self._timetable.end(job.deployment.id, job.slug)

        def is_its_own(run: FlowRun) -> bool:
            now = self._deployments.known(run)
            return now is None or now.slug == job.slug or not now.has_planned(run)

        self._hand.call_off(job.deployment.id, reason, is_its_own)

    async def skip(self, run: RunInHand, job: DeployedJob, reason: str) -> bool:
        """Skip a tick that is too late for its policy, or whose job is over; say so if the policy asks.

        Returns:
            Whether it is skipped. It is not where another node has begun it, or holds the token now.
        """
        try:
            assignment = self._assignment(run, job)
            url, execution, owner = self._membership.database_url, assignment.execution, assignment.owner
            if not await asyncio.to_thread(store.skip, url, execution, owner, reason):
                return False
        except TokenLostError:
            return False
        except CoordinationError as fault:
            self._log.debug("The ledger does not say that run %s is skipped: %s", run.flow_run.name, fault)
        await self._teller.skip(run.flow_run, reason)
        metrics.skipped(self._node.work_pool)
        events.tick_skipped(self._node, run.flow_run, job, reason)
        self._timetable.settle(run.flow_run)
        if job.policy.waiting_policy is WaitingPolicy.LOG_AND_IGNORE:
            log = flow_run_logger(run.flow_run)
            log.warning("Job %s skips its tick of %s: %s.", job.name, run.tick.isoformat(), reason)
        return True
