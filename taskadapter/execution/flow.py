"""The Prefect flow around a job: check, attempts, settle.

A declared job is an ordinary `prefect.Flow`. Called directly, in a test or a shell, it runs its body
with its retries and nothing else. Given to the agent, the same flow counts the execution, loads and
saves the state of a `Service`, and applies the error policy. Deployed, but started by anything other
than our agent, it refuses: nothing would stop another machine from running it too.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import wraps
from logging import Logger, LoggerAdapter
from typing import Any

import httpx
from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import SetStateStatus, StateWaitDetails
from prefect.context import FlowRunContext
from prefect.exceptions import Abort
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Retrying

from taskadapter.coordination.executions import Begun
from taskadapter.declare.jobs import Job, JobId, Service
from taskadapter.declare.triggers import ErrorPolicy, TriggerConfiguration
from taskadapter.errors import CoordinationError, TaskError, TokenLostError
from taskadapter.execution import current, record
from taskadapter.rules import retries

TERMINATING = (ErrorPolicy.LOG_AND_TERMINATE, ErrorPolicy.TERMINATE)
LOGGING = (ErrorPolicy.LOG_AND_TERMINATE, ErrorPolicy.LOG_AND_CONTINUE)

NOT_THE_JOBS_OWN = (CoordinationError, TokenLostError)
"""Errors of an attempt that end no job, though it raised them: of `fenced`, for example."""

Body = Callable[[Service | None, tuple[Any, ...], dict[str, Any]], Any]


def function_flow(
    fn: Callable[..., Any], name: str, trigger: TriggerConfiguration, **options: Any
) -> Flow[..., Any]:
    """Return the flow ``name`` around a plain function, sync or async; its parameters stay.

    Args:
        fn: the job's body.
        name: the flow's name.
        trigger: when it runs, how it is retried, and what an error means.
        options: anything `prefect.flow` takes, such as ``timeout_seconds`` or hooks; ``log_prints``
            is on unless they say otherwise, so that what a job prints is in the UI.
    """

    def body(_: Service | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    return _as_flow(body, fn, name, trigger, is_async=inspect.iscoroutinefunction(fn), **options)


def service_flow(
    service: Service, name: str, trigger: TriggerConfiguration, **options: Any
) -> Flow[..., Any]:
    """Return the flow ``name`` around a service whose fields are its state.

    Every attempt starts from the state that the last successful run saved, or from the given service
    when there is none: a failed attempt leaves nothing behind. The arguments are those of
    `function_flow`.
    """

    def body(service: Service | None, _: tuple[Any, ...], __: dict[str, Any]) -> Any:
        return service.execute() if service is not None else None

    def execute() -> None: ...

    return _class_flow(type(service), execute, body, name, trigger, service=service, **options)


def job_flow(cls: type[Job], name: str, trigger: TriggerConfiguration, **options: Any) -> Flow[..., Any]:
    """Return the flow ``name`` around a job class; its fields are the flow's parameters.

    The arguments are those of `function_flow`.
    """

    def body(_: Service | None, __: tuple[Any, ...], fields: dict[str, Any]) -> Any:
        return cls(**fields).execute()

    def execute(**fields: Any) -> None: ...

    execute.__signature__ = _signature(cls)  # type: ignore[attr-defined]
    return _class_flow(cls, execute, body, name, trigger, **options)


def _signature(cls: type[Job]) -> inspect.Signature:
    """Return the fields of a job class as parameters, by the names under which their values are kept.

    A default that is made anew each time has no place in a deployment's schema, which is to stay the
    same: such a field is required there, and a deployment gives it.
    """
    fields = cls.model_fields
    names = {
        alias: name for name, field in fields.items() for alias in (field.alias, field.validation_alias)
    }
    parameters = []
    for parameter in inspect.signature(cls).parameters.values():
        name = names.get(parameter.name, parameter.name)
        made = name in fields and fields[name].default_factory is not None
        default = inspect.Parameter.empty if made else parameter.default
        parameters.append(parameter.replace(name=name, default=default))
    return inspect.Signature(parameters)


def _class_flow(
    cls: type[Job] | type[Service],
    execute: Callable[..., None],
    body: Body,
    name: str,
    trigger: TriggerConfiguration,
    **options: Any,
) -> Flow[..., Any]:
    execute.__doc__ = cls.__doc__
    execute.__module__, execute.__qualname__ = cls.__module__, cls.__qualname__
    is_async = inspect.iscoroutinefunction(cls.execute)
    return _as_flow(body, execute, name, trigger, is_async=is_async, **options)


def _as_flow(
    body: Body,
    like: Callable[..., Any],
    name: str,
    trigger: TriggerConfiguration,
    *,
    is_async: bool,
    service: Service | None = None,
    **options: Any,
) -> Flow[..., Any]:
    """Wrap the body's attempts into a flow that shows the parameters and the docstring of ``like``."""

    @wraps(like)
    def run(*args: Any, **kwargs: Any) -> Any:
        turn = Turn(name, trigger, service)
        turn.begin()
        while True:
            subject = turn.subject()
            try:
                with turn.attempt():
                    result = body(subject, args, kwargs)
            except Exception as exc:
                if (wait := turn.failed(exc)) is None:
                    raise
                pause = Pause(wait)
                turn.announce(AwaitingRetry(scheduled_time=_in(wait), message=_in_words(exc)))
                time.sleep(pause.until_announced())
                turn.announce(Retrying())
                time.sleep(pause.rest())
                turn.check(exc)
            else:
                turn.settle(subject, _outcome(result))
                return result

    @wraps(like)
    async def run_async(*args: Any, **kwargs: Any) -> Any:
        turn = Turn(name, trigger, service)
        turn.begin()
        while True:
            subject = await asyncio.to_thread(turn.subject)
            try:
                with turn.attempt():
                    result = await body(subject, args, kwargs)
            except Exception as exc:
                if (wait := await asyncio.to_thread(turn.failed, exc)) is None:
                    raise
                pause = Pause(wait)
                retry: State[Any] = AwaitingRetry(scheduled_time=_in(wait), message=_in_words(exc))
                await asyncio.to_thread(turn.announce, retry)
                await asyncio.sleep(pause.until_announced())
                await asyncio.to_thread(turn.announce, Retrying())
                await asyncio.sleep(pause.rest())
                await asyncio.to_thread(turn.check, exc)
            else:
                await asyncio.to_thread(turn.settle, subject, _outcome(result))
                return result

    options = {"log_prints": True, **options}
    return flow(name=name, **options)(run_async if is_async else run)


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


class Turn:
    """One run of a job on its way through its attempts.

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
            saved = record.saved_service(self.execution.assignment, type(self.service))
        return saved if saved is not None else self.service.model_copy(deep=True)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Make one attempt; `current_run` is known for its duration."""
        self.current = replace(self.current, attempt=self.current.attempt + 1)
        token = current.running.set(self.current)
        try:
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
            self._fail(exc)
            raise exc
        if self.execution is not None:
            with _while_ours():
                record.check(self.execution.assignment)

    def _elapsed(self) -> float:
        """Return the seconds since this tick."""
        origin = retries.window_start(self.current.scheduled_time, self.started, self.trigger.interval)
        return (datetime.now(UTC) - origin).total_seconds()

    @property
    def is_tick(self) -> bool:
        """Whether the run is a tick of the job, and not one that somebody asked for."""
        return self.execution is not None and self.execution.assignment.is_tick

    def settle(self, subject: Service | None, outcome: str, ends: str | None = None) -> None:
        """Record that the execution is over, and save the state of a service that succeeded.

        Args:
            subject: the service; None if there is none, or it failed.
            outcome: the name of the state that Prefect is told next.
            ends: why the job is over with it.

        Raises:
            Abort: the node has lost the token; nothing is saved.
        """
        if self.execution is not None:
            with _while_ours():
                record.enter_end(self.execution.assignment, subject, outcome, ends)
            self.execution.outcome = outcome

    def failed(self, exc: Exception) -> float | None:
        """Take note of a failed attempt.

        Returns:
            The seconds to wait before the next attempt; None when this was the last, and the error
            policy has been applied.

        Raises:
            Abort: as `settle`.
        """
        wait = retries.wait_before_retry(
            self.trigger.retry_config,
            attempt=self.current.attempt,
            interval=self.trigger.interval,
            elapsed=self._elapsed(),
        )
        if wait is not None:
            self.log.warning(
                "Attempt %d failed, next in %g s: %s", self.current.attempt, wait, _in_words(exc)
            )
        else:
            self._fail(exc)
        return wait

    def _fail(self, exc: Exception) -> None:
        """Settle a run whose last attempt has failed, and apply the error policy to its job."""
        policy, attempts = self.policy.error_policy, self.current.attempt
        terminates = policy in TERMINATING and not isinstance(exc, NOT_THE_JOBS_OWN)
        # A run by hand ends nothing.
        ends = terminates and (self.execution is None or self.is_tick)
        reason = f"run {self.current.count} failed, and the error policy is {policy}" if ends else None
        self.settle(None, "Failed", reason)
        if policy in LOGGING:
            consequence = "the job ends on all nodes" if ends else "the job goes on"
            self.log.error("Failed after %d attempt(s), %s: %s", attempts, consequence, _in_words(exc))
        if self.execution is not None and reason is not None:
            self.execution.ended = reason
            # At once: the next tick may be due before the API has taken note of this run's end.
            self.execution.on_progress()

    def announce(self, state: State[Any]) -> None:
        """Show a retry in the UI; the API's faults do not stop it, a cancelled run does.

        Raises:
            Abort: the run is no longer ours to run.
        """
        if self.flow_run is None:
            return
        try:
            with get_client(sync_client=True) as client:
                if state.is_scheduled():
                    # Keeps every worker's poll from seeing a scheduled run in what waits here.
                    policy = self.flow_run.empirical_policy
                    policy = policy.model_copy(update={"retry_type": "in_process"})
                    client.update_flow_run(self.flow_run.id, empirical_policy=policy)
                answer = client.set_flow_run_state(self.flow_run.id, state)
                # It took less time than the announcement before: the retry is not due yet for the API.
                while isinstance(answer.details, StateWaitDetails):
                    time.sleep(answer.details.delay_seconds)
                    answer = client.set_flow_run_state(self.flow_run.id, state)
        except httpx.HTTPError as fault:
            self.log.warning("Prefect's API could not be told of state %s: %s", state.name, fault)
            return
        if answer.status is not SetStateStatus.ACCEPT:
            raise Abort(f"the run may not go on: {answer.details}")


@contextmanager
def _while_ours() -> Iterator[None]:
    try:
        yield
    except TokenLostError as lost:
        raise Abort(str(lost)) from lost


def _outcome(result: Any) -> str:
    """Return the name of the state that a body's result comes to: it may be one itself."""
    return result.type.value.capitalize() if isinstance(result, State) else "Completed"


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def _in_words(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


_STARTED_ELSEWHERE = (
    "job {name!r} was started by something other than the taskadapter agent, which alone can count it "
    "and keep it to one machine. Start the agent with `prefect worker start --pool POOL --type "
    "warm-backup`, and end other workers on that pool."
)
