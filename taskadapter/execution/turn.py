"""The moments before a body and after it, whatever flow it is: the ledger says whether it begins.

What is here finds its execution in its context: a flow travels to the processes of its task runner.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import isasyncgen, iscoroutine, isgenerator
from typing import TYPE_CHECKING, Any

from prefect.exceptions import Abort

from taskadapter.coordination.executions import Begun
from taskadapter.errors import TokenLostError
from taskadapter.execution import current, protocol, record
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import State

    from taskadapter.execution.current import Execution


AtEnd = Callable[["Execution", "State[Any]"], object]


def keep(flow: Flow[..., Any], at_end: AtEnd) -> None:
    """Have a flow enter its execution before its body, and call its hooks for a crash only after that.

    A run that ends before its body is made again: it has not crashed.

    Args:
        flow: the flow; the agent is told of each hook for the end of its run.
        at_end: called before such a hook, which can hang, with the state that Prefect has been told.
    """
    body = flow.fn

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        if (execution := current.execution.get()) is not None:
            _enter(execution)
        if flow.isasync or flow.isgenerator:
            return _in_body(body(*args, **kwargs))
        with current.in_body():
            return body(*args, **kwargs)

    flow.fn = run
    flow.on_crashed_hooks = [_after_beginning(hook) for hook in flow.on_crashed_hooks]
    for name in ("on_completion_hooks", "on_failure_hooks", "on_cancellation_hooks", "on_crashed_hooks"):
        setattr(flow, name, [_told_of(hook, at_end) for hook in getattr(flow, name)])


def _in_body(going_on: Any) -> Any:
    """Return what goes on after the call of a body, with an eye on what this forks."""
    if iscoroutine(going_on):
        return _awaited_in_body(going_on)
    if isgenerator(going_on):
        return _generated_in_body(going_on)
    return _generated_async_in_body(going_on) if isasyncgen(going_on) else going_on


async def _awaited_in_body(coroutine: Awaitable[Any]) -> Any:
    with current.in_body():
        return await coroutine


def _generated_in_body(generator: Iterator[Any]) -> Any:
    with current.in_body():
        return (yield from generator)


async def _generated_async_in_body(generator: AsyncIterator[Any]) -> AsyncIterator[Any]:
    with current.in_body():
        async for item in generator:
            yield item


def _after_beginning(hook: Any) -> Any:
    @wraps(hook)
    def call(*args: Any) -> Any:
        execution = current.execution.get()
        return hook(*args) if execution is None or execution.has_begun else None

    return call


def _told_of(hook: Any, at_end: AtEnd) -> Any:
    @wraps(hook)
    def call(flow: Any, run: Any, state: State[Any]) -> Any:
        execution = current.execution.get()
        if execution is None or execution.assignment.flow_run.id != run.id:  # the flow calls itself
            return hook(flow, run, state)
        if execution.has_begun:
            at_end(execution, state)
        with calling(hook, execution.tell):
            outcome = hook(flow, run, state)
        return _awaited(outcome, hook, execution) if asyncio.iscoroutine(outcome) else outcome

    call.__name__ = name_of(hook)
    return call


async def _awaited(outcome: Awaitable[Any], hook: Any, execution: Execution) -> Any:
    with calling(hook, execution.tell):
        return await outcome


@contextmanager
def calling(hook: Any, tell: Callable[[protocol.Step], None]) -> Iterator[None]:
    """Tell the agent, which ends what hangs, when a hook is called and when it has returned."""
    tell(protocol.Hook(name=name_of(hook)))
    try:
        yield
    finally:
        tell(protocol.Hook())


def name_of(hook: Any) -> str:
    """Return a hook's name, as Prefect has it in its logs."""
    function = hook.func if isinstance(hook, partial) else hook
    return getattr(function, "__name__", type(function).__name__)


def _enter(execution: Execution) -> None:
    """Enter an execution immediately before its body or, before a further attempt, check its token.

    Raises:
        Abort: the body is not to begin: `Execution.entered` says why, unless the token is lost.
    """
    try:
        if execution.has_begun:
            record.check(execution)
            return
        execution.entered = record.begin(execution)
    except (TokenLostError, record.NotWantedError) as lost:
        raise Abort(str(lost)) from lost
    if not isinstance(execution.entered, Begun):
        raise Abort(f"the body is not to begin: {execution.entered}")
    max_count = execution.assignment.max_count
    if execution.entered.number == max_count:
        execution.ended = ticks.exhausted(max_count)
    execution.tell_begun()
