"""What a run does from one attempt to the next: state, token, backoff, error policy, and the UI."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from logging import Logger, LoggerAdapter
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus, StateWaitDetails
from prefect.context import FlowRunContext
from prefect.exceptions import Abort, ObjectNotFound
from prefect.logging import get_run_logger
from prefect.logging.loggers import flow_run_logger
from prefect.states import AwaitingRetry, Retrying

from taskadapter.coordination.executions import Begun
from taskadapter.declare.jobs import JobId, Service
from taskadapter.declare.triggers import ErrorPolicy, TriggerConfiguration
from taskadapter.errors import CoordinationError, TaskError, TokenLostError, words_of
from taskadapter.execution import current, record
from taskadapter.prefect_api.client import API_FAULTS
from taskadapter.rules import retries, ticks

LOGGING = (ErrorPolicy.LOG_AND_TERMINATE, ErrorPolicy.LOG_AND_CONTINUE)

NOT_THE_JOBS_OWN = (CoordinationError, TokenLostError)
"""Errors of an attempt that end no job, though it raised them: of `fenced`, for example."""

_STARTED_ELSEWHERE = (
    "job {name!r} was started by something other than the taskadapter agent, which alone can count it "
    "and keep it to one machine. Start the agent with `prefect worker start --pool POOL --type "
    "warm-backup`, and end other workers on that pool."
)


class Pause:
    """A wait between two attempts, of which what the API takes is part.

    Args:
        seconds: how long it is, from now.
    """

    def __init__(self, seconds: float) -> None:
        self._start = time.monotonic()
        self._end = self._start + seconds

    def until_announced(self) -> float:
        """Return the seconds until the end is to be announced: that takes as long as the beginning did."""
        now = time.monotonic()
        return max(0.0, self._end - (now - self._start) - now)

    def rest(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self._end - time.monotonic())


class Attempts:
    """The attempts of one run of a job, from the first to the end of the last.

    Args:
        name: the job's name.
        trigger: the job's trigger, retries and policy.
        service: the initial state of a service, None for other jobs.
    """

    def __init__(self, name: str, trigger: TriggerConfiguration, service: Service | None) -> None:
        self.name = name
        self.trigger = trigger
        self.service = service
        self.policy = trigger.policy
        context = FlowRunContext.get()
        self.flow_run = None if context is None else context.flow_run
        self.execution = self._given_to_us()
        self.log: Logger | LoggerAdapter[Any] = get_run_logger()
        self.started = datetime.now(UTC)
        self.current = self._current_run()

    def _given_to_us(self) -> current.Execution | None:
        """Return the agent's execution if it is of this very flow run, and not of its parent."""
        execution = current.execution.get()
        if execution is None or self.flow_run is None:
            return None
        return execution if execution.assignment.flow_run.id == self.flow_run.id else None

    def _current_run(self) -> current.CurrentRun:
        if self.execution is None:
            return current.CurrentRun(job_id=None, scheduled_time=self.started, count=1, attempt=0)
        assignment, entered = self.execution.assignment, self.execution.entered
        number = entered.number if isinstance(entered, Begun) else None
        return current.CurrentRun(
            job_id=JobId(assignment.job_id) if assignment.job_id else None,
            scheduled_time=assignment.scheduled_time,
            count=number or 1,
            attempt=0,
            group_id=assignment.token.group_id if assignment.token else None,
            task_id=assignment.node,
            fencing_token=assignment.token.term if assignment.token else None,
        )

    def begin(self) -> None:
        """Tell of a run that begins.

        Raises:
            TaskError: the flow was deployed, and something other than our agent started it.
        """
        if self.execution is None:
            if self.flow_run is not None and self.flow_run.deployment_id is not None:
                raise TaskError(_STARTED_ELSEWHERE.format(name=self.name))
            return
        due, node = self.current.scheduled_time, self.current.task_id
        late = (self.started - due).total_seconds()
        number = f"Run {self.current.count}" if self.is_tick else "A run by hand"
        self.log.info("%s of %r on %s, %.3f s after its time", number, self.name, node, late)

    def subject(self) -> Service | None:
        """Return the service in its saved state, None for other jobs."""
        if self.service is None:
            return None
        saved = None
        if self.execution is not None:
            saved = record.saved_service(self.execution, type(self.service))
        return saved if saved is not None else self.service.model_copy(deep=True)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Make one attempt; `current_run` is known for its duration."""
        self.current = replace(self.current, attempt=self.current.attempt + 1)
        token = current.running.set(self.current)
        try:
            with current.in_body():
                yield
        finally:
            current.running.reset(token)

    def check(self, exc: Exception) -> None:
        """Check, immediately before a further attempt, the token and that the next tick is not due.

        Args:
            exc: what the attempt before raised, and is raised again if the next tick is due: waiting
                and telling the API may have taken longer than was thought.

        Raises:
            Abort: the node has lost the token; the one that holds it now says what became of the run.
        """
        if self._elapsed() >= self.trigger.interval:
            self._give_up(exc)
            raise exc
        if self.execution is not None:
            with _while_ours():
                record.check(self.execution)

    def _elapsed(self) -> float:
        """Return the seconds since this tick."""
        origin = retries.window_start(self.current.scheduled_time, self.started, self.trigger.interval)
        return (datetime.now(UTC) - origin).total_seconds()

    @property
    def is_tick(self) -> bool:
        """Whether the run is a tick of the job, and not one that somebody asked for."""
        return self.execution is not None and self.execution.assignment.is_tick

    def returned(self, subject: Service | None, result: Any) -> None:
        """Enter that the body has returned, and save the state of a service, if it succeeded.

        Args:
            subject: the service; None for other jobs.
            result: what it returned, which may be a state. One that has failed is the job's error, and
                is not tried again: it was no exception.

        Raises:
            Abort: the node has lost the token; nothing is saved.
        """
        if not isinstance(result, State) or result.is_completed():
            self._enter_end(subject, "Completed")
        elif result.is_failed():
            self._fail(result.message or f"it has returned state {result.name}")
        else:
            self._enter_end(None, result.type.value.capitalize())

    def _enter_end(self, subject: Service | None, outcome: str, ends: str | None = None) -> None:
        """Enter that the execution is over; `outcome` names the state that Prefect is told next."""
        if self.execution is not None:
            with _while_ours():
                record.enter_end(self.execution, subject, outcome, ends)
            self.execution.outcome = outcome

    def failed(self, exc: Exception) -> float | None:
        """Take note of a failed attempt.

        Returns:
            The seconds to wait before the next attempt; None when this was the last, and the error
            policy has been applied.

        Raises:
            Abort: as `returned`.
        """
        wait = retries.wait_before_retry(
            self.trigger.retry_config,
            attempt=self.current.attempt,
            interval=self.trigger.interval,
            elapsed=self._elapsed(),
        )
        if wait is not None:
            self.log.warning(
                "Attempt %d failed, next in %g s: %s", self.current.attempt, wait, words_of(exc)
            )
        else:
            self._give_up(exc)
        return wait

    def _give_up(self, exc: Exception) -> None:
        """Have the run fail with what its last attempt has raised."""
        retry = self.trigger.retry_config
        is_short = retry is not None and self.current.attempt <= retry.max_attempts
        self._fail(words_of(exc), is_own=not isinstance(exc, NOT_THE_JOBS_OWN), is_short=is_short)

    def _fail(self, error: str, *, is_own: bool = True, is_short: bool = False) -> None:
        """Enter the end of a run whose last attempt has failed, and apply the error policy to its job.

        Args:
            error: what it failed with.
            is_own: whether that is the job's error.
            is_short: whether more attempts are declared than there was time for.
        """
        policy, attempts = self.policy.error_policy, self.current.attempt
        is_tick = self.execution is None or self.is_tick
        reason = ticks.ended_by(self.current.count, policy, is_tick=is_tick) if is_own else None
        self._enter_end(None, "Failed", reason)
        if policy in LOGGING:
            said = consequence(self._job() if reason else None, is_short=is_short)
            self.log.error("Failed after %d attempt(s). %s The error: %s", attempts, said, error)
        if self.execution is not None and reason is not None:
            self.execution.ended = reason
            # At once: the next tick may be due before the API has taken note of this run's end.
            self.execution.tell_begun()

    def _job(self) -> str:
        """Return the job's name as commands know it: its deployment's, or the flow's in a direct call."""
        return self.name if self.execution is None else self.execution.assignment.deployment_name

    def _process(self) -> str | None:
        """Return where this process is, if an agent has made it, as Prefect's workers write it."""
        return None if self.execution is None else f"{self.execution.assignment.node}:{os.getpid()}"

    def announce_wait(self, seconds: float, exc: Exception) -> None:
        """Show in the UI that the next attempt is to come, in so many seconds, and why.

        Raises:
            Abort: the run is no longer ours to run.
        """
        due = datetime.now(UTC) + timedelta(seconds=seconds)
        self._announce(AwaitingRetry(scheduled_time=due, message=words_of(exc)))

    def announce_retry(self) -> None:
        """Show in the UI that the next attempt begins.

        Raises:
            Abort: the run is no longer ours to run.
        """
        self._announce(Retrying())

    def _announce(self, state: State[Any]) -> None:
        """Show a state in the UI; the API's faults do not stop a retry, a cancelled run does."""
        if self.flow_run is None:
            return
        try:
            with get_client(sync_client=True) as client:
                if state.is_scheduled():
                    # Keeps every worker's poll from seeing a scheduled run in what waits here.
                    policy = self.flow_run.empirical_policy
                    policy = policy.model_copy(update={"retry_type": "in_process"})
                    # With a process that Prefect knows of, one that is cancelled meanwhile is Cancelling,
                    # of which its node hears, and not Cancelled, of which it would not.
                    client.update_flow_run(
                        self.flow_run.id, empirical_policy=policy, infrastructure_pid=self._process()
                    )
                answer = client.set_flow_run_state(self.flow_run.id, state)
                # It took less time than the announcement before: the retry is not due yet for the API.
                while isinstance(answer.details, StateWaitDetails):
                    time.sleep(answer.details.delay_seconds)
                    answer = client.set_flow_run_state(self.flow_run.id, state)
        except (*API_FAULTS, ObjectNotFound) as fault:
            self.log.warning("Prefect's API could not be told of state %s: %s", state.name, fault)
            return
        if answer.status is not SetStateStatus.ACCEPT:
            raise Abort(f"the run may not go on: {answer.details}")


def enter_end_of_engine(execution: current.Execution, state: State[Any], *, is_failure: bool) -> None:
    """Enter an end that Prefect's engine has made, and no attempt: at a timeout, for example.

    Args:
        execution: of a run whose body had begun.
        state: what the engine has told the API.
        is_failure: whether the error policy applies, as to the last attempt.

    Raises:
        CoordinationError: it could not be entered.
        TokenLostError: the node has lost the token; the one that holds it says what became of the run.
    """
    assignment, entered = execution.assignment, execution.entered
    policy, reason = assignment.policy.error_policy, None
    is_ours = is_failure and assignment.trigger is not None
    if is_ours:
        number = entered.number if isinstance(entered, Begun) else None
        reason = ticks.ended_by(number or 1, policy, is_tick=assignment.is_tick)
    outcome = state.type.value.capitalize()
    record.enter_end(execution, None, outcome, reason)
    execution.outcome = outcome
    if reason is not None:
        execution.ended = reason
        execution.tell_begun()
    if is_ours and policy in LOGGING:
        said = consequence(assignment.deployment_name if reason else None, is_short=False)
        log = flow_run_logger(assignment.flow_run)
        log.error("Ended by Prefect, and failed. %s The error: %s", said, state.message)


@contextmanager
def _while_ours() -> Iterator[None]:
    try:
        yield
    except TokenLostError as lost:
        raise Abort(str(lost)) from lost


def consequence(ended: str | None, *, is_short: bool) -> str:
    """Say what follows from the failure of the last attempt.

    Args:
        ended: the name of the job where it ends; None where it goes on.
        is_short: whether more attempts were declared than fit in before the next tick.
    """
    end = "The job goes on."
    if ended is not None:
        restart = f"`taskadapter restart {shlex.quote(ended)}`"
        end = f"The job ends on all nodes; {restart} starts it again."
    return f"No further one fits in before the next tick. {end}" if is_short else end
