"""What a run has come to, when the engine has returned: what is entered of it, and what its agent hears.

The engine has told Prefect, or has not, and may take for the body's failure what has failed beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from prefect.exceptions import ExternalSignal, PrefectSignal

from taskadapter.coordination.executions import Begun, Ended, Exhausted, Paused, Skipped, Taken
from taskadapter.errors import CoordinationError, TokenLostError, words_of
from taskadapter.execution import current, protocol
from taskadapter.execution.attempts import enter_end_of_engine
from taskadapter.prefect_api.client import API_FAULTS
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

_SIGNALS = (PrefectSignal, ExternalSignal, KeyboardInterrupt, asyncio.CancelledError)
"""What ends a run that something other than its flow ends."""


def conclude(
    execution: current.Execution, state: State[Any] | None, fault: BaseException | None
) -> protocol.End:
    """Enter what came of a body, where nobody has yet, and return what came of its run."""
    match execution.entered:
        case None if _is_users(fault):
            return protocol.Crashed(fault=words_of(fault))
        case None if _has_timed_out(state):
            # It has waited for the database for so long.
            return protocol.Dropped(in_doubt=execution.in_doubt)
        case None:
            is_told = _is_told(state) and not _is_crashed(state)
            return protocol.Told() if is_told else protocol.Untold(in_doubt=execution.in_doubt)
        case Begun():
            is_told = enter_end(execution, state)
            if execution.outcome is None and (why := _lacks_end(state, fault)) is not None:
                return protocol.Crashed(fault=why)
            return (protocol.Told if is_told else protocol.Untold)(ended=execution.ended)
        case Paused():
            return protocol.Paused()
        case Skipped(reason):
            return protocol.Skipped(reason=reason)
        case Ended(reason):
            return protocol.Skipped(reason=reason, ended=reason)
        case Exhausted():
            reason = ticks.exhausted(execution.assignment.max_count)
            return protocol.Skipped(reason=reason, ended=reason)
        case Taken():
            return protocol.Untold()


def enter_end(execution: current.Execution, state: State[Any] | None) -> bool:
    """Enter what came of a body that has begun, where nobody has yet.

    Args:
        execution: of the run.
        state: what the engine made of it, if anything.

    Returns:
        Whether Prefect has been told what came of it.
    """
    is_told = _is_told(state) and not _was_spoilt(execution, state)
    end = state if is_told else execution.untold
    is_corrected = is_told and execution.outcome == "Completed" and _has_returned_failures(state)
    if end is not None and (execution.outcome is None or is_corrected):
        is_own = not (execution.has_waited and _has_timed_out(end)) and not _is_api_fault(end)
        with contextlib.suppress(CoordinationError, TokenLostError):
            enter_end_of_engine(execution, end, is_failure=end.is_failed() and is_own)
    return is_told


def _lacks_end(state: State[Any] | None, fault: BaseException | None) -> str | None:
    """Return why a body has come to no end, if that is its flow's own fault; one that is paused goes on."""
    if _is_users(fault):
        return words_of(fault)
    if state is not None and state.is_scheduled():
        return f"its flow has returned state {state.name}, which is no end of a run"
    return None


def _is_told(state: State[Any] | None) -> bool:
    """Return whether the API has a final state of the run."""
    return state is not None and state.is_final()


def _is_crashed(state: State[Any] | None) -> bool:
    return state is not None and state.is_crashed()


def _has_timed_out(state: State[Any] | None) -> bool:
    """Return whether the flow has taken longer than its timeout allows."""
    return state is not None and state.is_failed() and state.name == "TimedOut"


def _is_users(fault: BaseException | None) -> bool:
    """Return whether it is the flow's own mistake that its body was not reached: no signal, and no API.

    A hook for the beginning may even exit.
    """
    return fault is not None and not isinstance(fault, (*API_FAULTS, *_SIGNALS))


def _was_spoilt(execution: current.Execution, state: State[Any] | None) -> bool:
    """Return whether the engine took for the body's failure what has failed after its end.

    The API could not be told of it; or to enter it took more than was left of the timeout.
    """
    return execution.outcome == "Completed" and (_is_api_fault(state) or _has_timed_out(state))


def _has_returned_failures(state: State[Any] | None) -> bool:
    """Return whether a body has returned what has failed, as tasks, which the engine waits for.

    What fails after that is no failure of the job's: the engine tells the error of it then.
    """
    result = _result_of_failure(state)
    return result is not None and not isinstance(result, BaseException)


def _is_api_fault(state: State[Any] | None) -> bool:
    return isinstance(_result_of_failure(state), API_FAULTS)


def _result_of_failure(state: State[Any] | None) -> object:
    """Return what a run failed with: an error, or what its body returned; None if that cannot be read."""
    if state is not None and state.is_failed():
        with contextlib.suppress(Exception):
            # Not to be awaited, though the hooks of an async flow are called in its loop.
            return state.result(raise_on_failure=False, _sync=True)  # type: ignore[call-overload]
    return None
