"""The moment before a body: the ledger says whether it begins, whatever flow it is.

What is here finds its execution in its context: a flow travels to the processes of its task runner.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

from prefect.exceptions import Abort

from taskadapter.coordination.executions import Answer, Begun, Skipped
from taskadapter.errors import TokenLostError
from taskadapter.execution import current, record
from taskadapter.rules import ticks
from taskadapter.rules.ticks import Verdict

if TYPE_CHECKING:
    from prefect import Flow

    from taskadapter.execution.assignment import Assignment
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
    assignment = execution.assignment
    try:
        if execution.has_begun:
            record.check(execution)
            return
        execution.entered = _too_late(assignment) or record.begin(execution)
    except (TokenLostError, record.NotWantedError) as lost:
        raise Abort(str(lost)) from lost
    if not isinstance(execution.entered, Begun):
        raise Abort(f"the body is not to begin: {execution.entered}")
    if execution.entered.number == assignment.max_count:
        execution.ended = ticks.exhausted(assignment.max_count)
    execution.tell_begun()


def _too_late(assignment: Assignment) -> Answer | None:
    """Return why a tick does not begin that was claimed in time, and begins too late for its policy."""
    if assignment.trigger is None or not assignment.is_tick:
        return None
    judgement = ticks.judge(
        assignment.trigger,
        assignment.scheduled_time,
        now=datetime.now(UTC),
        waiting_time=assignment.waiting_time,
        begun=assignment.flow_run.run_count > 0,
    )
    return Skipped(judgement.reason) if judgement.verdict is Verdict.SKIP else None
