"""The moment before a body: the ledger says whether it begins, whatever flow it is.

What is here finds its execution in its context: a flow travels to the processes of its task runner.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from prefect.exceptions import Abort

from taskadapter.coordination.executions import Begun
from taskadapter.errors import TokenLostError
from taskadapter.execution import current, record
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect import Flow

    from taskadapter.execution.current import Execution


def keep(flow: Flow[..., Any]) -> None:
    """Have a flow enter its execution before its body, and call its hooks for a crash only after that.

    A run that ends before its body is made again: it has not crashed.
    """
    body = flow.fn

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        if (execution := current.execution.get()) is not None:
            _enter(execution)
        return body(*args, **kwargs)

    flow.fn = run
    flow.on_crashed_hooks = [_after_beginning(hook) for hook in flow.on_crashed_hooks]


def _after_beginning(hook: Any) -> Any:
    @wraps(hook)
    def call(*args: Any) -> Any:
        execution = current.execution.get()
        return hook(*args) if execution is None or execution.has_begun else None

    return call


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
