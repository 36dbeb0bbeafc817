"""What is to be done about a run whose process has ended, or whose node is gone: the ledger says.

A run without an entry has begun nothing, whoever claimed it: it is put back. One with an open entry was
being executed. One with an outcome has ended so, and Prefect is told until it knows.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.objects import TERMINAL_STATES, State, StateType

from taskadapter.coordination.executions import ABANDONED, SKIPPED
from taskadapter.rules.ticks import skipped

if TYPE_CHECKING:
    from taskadapter.coordination.executions import Entry


_OF_BODIES = {"Completed", "Failed"}
"""What a body comes to, if it comes to an end."""


class Todo(Enum):
    """What is to be done about a run.

    LEAVE: nothing, or somebody else does it. PUT_BACK: make it due again. AGAIN: so, once the ledger allows
    a second beginning. SUSPEND: let it begin again when somebody resumes it. CRASH: enter and tell that it
    was interrupted. ENTER: enter what Prefect knows. TELL: tell Prefect what was entered.
    """

    LEAVE = "leave"
    PUT_BACK = "put back"
    AGAIN = "again"
    SUSPEND = "suspend"
    CRASH = "crash"
    ENTER = "enter"
    TELL = "tell"


def decide(
    entry: Entry | None,
    known: StateType | None,
    *,
    lives: bool = False,
    ours: bool = False,
    at_fault: bool = False,
    reruns: bool = False,
) -> Todo:
    """Decide what is to be done about a run.

    Args:
        entry: of what it is an execution of, if that has begun.
        known: the state that Prefect has; None if it has no such run any more.
        lives: whether the process that executes it may still be there.
        ours: whether it has just ended here, without telling Prefect of its end.
        at_fault: whether it ended by itself, before its body.
        reruns: whether an interrupted execution is to be made again.
    """
    is_final = known is None or known in TERMINAL_STATES
    if entry is None or entry.outcome == ABANDONED:
        # The engine takes an API that fails it before the body for a crash.
        if is_final and not (ours and known is StateType.CRASHED):
            return Todo.LEAVE
        return Todo.CRASH if at_fault or known is StateType.CANCELLING else Todo.PUT_BACK
    if entry.outcome is None:
        if lives:
            return Todo.LEAVE
        if is_final:
            return Todo.ENTER
        if known is StateType.PAUSED:
            return Todo.SUSPEND
        return Todo.AGAIN if reruns else Todo.CRASH
    if not is_final:
        return Todo.TELL
    # It takes it for the body's failure, or a crash, that it cannot tell what the body came to.
    told_wrong = known in {StateType.FAILED, StateType.CRASHED} and entry.outcome != outcome_of(known)
    return Todo.TELL if ours and told_wrong and entry.outcome in _OF_BODIES else Todo.LEAVE


def outcome_of(known: StateType | None) -> str:
    """Return the name under which the ledger has a final state; a run that is gone has crashed."""
    return "Crashed" if known is None else known.value.capitalize()


def state_of(entry: Entry) -> State[Any]:
    """Return the state that an execution came to, for a run that shows none."""
    if entry.outcome == SKIPPED:
        return skipped("another run of this tick was")
    kind = StateType((entry.outcome or "Crashed").upper())
    return State(type=kind, message=f"Executed {entry.where}, which could not report it.")
