"""The Prefect flow around a job: its parameters, and its attempts in a loop.

A declared job is an ordinary `prefect.Flow`. Called directly, in a test or a shell, it runs its body
with its retries and nothing else. Given to the agent, the same flow counts the execution, loads and
saves the state of a `Service`, and applies the error policy. Deployed, but started by anything other
than our agent, it refuses: nothing would stop another machine from running it too.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from prefect import Flow, flow

from taskadapter.declare.jobs import Job, Service
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.execution.attempts import Attempts, Pause

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
        attempts = Attempts(name, trigger, service)
        attempts.begin()
        while True:
            subject = attempts.subject()
            try:
                with attempts.attempt():
                    result = body(subject, args, kwargs)
                    if inspect.iscoroutine(result):  # a decorator that is not async has hidden what it is
                        result = asyncio.run(result)
            except Exception as exc:
                if (wait := attempts.failed(exc)) is None:
                    raise
                pause = Pause(wait)
                attempts.announce_wait(wait, exc)
                time.sleep(pause.until_announced())
                attempts.announce_retry()
                time.sleep(pause.rest())
                attempts.check(exc)
            else:
                attempts.returned(subject, result)
                return result

    @wraps(like)
    async def run_async(*args: Any, **kwargs: Any) -> Any:
        attempts = Attempts(name, trigger, service)
        attempts.begin()
        while True:
            subject = await asyncio.to_thread(attempts.subject)
            try:
                with attempts.attempt():
                    result = await body(subject, args, kwargs)
            except Exception as exc:
                if (wait := await asyncio.to_thread(attempts.failed, exc)) is None:
                    raise
                pause = Pause(wait)
                await asyncio.to_thread(attempts.announce_wait, wait, exc)
                await asyncio.sleep(pause.until_announced())
                await asyncio.to_thread(attempts.announce_retry)
                await asyncio.sleep(pause.rest())
                await asyncio.to_thread(attempts.check, exc)
            else:
                await asyncio.to_thread(attempts.returned, subject, result)
                return result

    # The listener has the retries: Prefect's, which a setting may ask for, would follow the run's end.
    options = {"log_prints": True, "retries": 0, "retry_delay_seconds": 0, **options}
    return flow(name=name, **options)(run_async if is_async else run)
