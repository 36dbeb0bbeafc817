"""What is to be done about a run that has no process any more: all that the ledger and Prefect may say."""

import pytest
from prefect.client.schemas.objects import StateType

from taskadapter.agent.settling import Todo, decide, outcome_of, state_of
from taskadapter.coordination.executions import ABANDONED, Entry

PENDING, RUNNING, CANCELLING = StateType.PENDING, StateType.RUNNING, StateType.CANCELLING
COMPLETED, FAILED, CRASHED, CANCELLED = (
    StateType.COMPLETED,
    StateType.FAILED,
    StateType.CRASHED,
    StateType.CANCELLED,
)


def entry(outcome=None):
    return Entry("key", "run", "job", None, 1, "group", "node-1", 7, "incarnation", outcome)


@pytest.mark.parametrize(
    ("known", "options", "todo"),
    [
        (PENDING, {}, Todo.PUT_BACK),
        (RUNNING, {}, Todo.PUT_BACK),
        # It was to be cancelled: nobody wants it to run.
        (CANCELLING, {}, Todo.CRASH),
        # Its process has ended of itself, and would again.
        (PENDING, {"ours": True, "at_fault": True}, Todo.CRASH),
        # The engine takes an API that fails it for a crash.
        (CRASHED, {"ours": True}, Todo.PUT_BACK),
        (CRASHED, {}, Todo.LEAVE),
        # Its parameters are wrong, or a person has ended it.
        (FAILED, {"ours": True}, Todo.LEAVE),
        (CANCELLED, {"ours": True}, Todo.LEAVE),
        (None, {"ours": True}, Todo.LEAVE),
    ],
)
def test_what_has_not_begun(known, options, todo):
    """It is made again, unless that it did not begin is its own fault or somebody's wish."""
    assert decide(None, known, **options) is todo


@pytest.mark.parametrize(
    ("known", "options", "todo"),
    [
        (RUNNING, {"lives": True}, Todo.LEAVE),
        (RUNNING, {}, Todo.CRASH),
        (CANCELLING, {}, Todo.CRASH),
        # Between two attempts.
        (StateType.SCHEDULED, {}, Todo.CRASH),
        (RUNNING, {"reruns": True}, Todo.AGAIN),
        (COMPLETED, {"reruns": True}, Todo.ENTER),
        # Somebody will resume it, or not.
        (StateType.PAUSED, {"ours": True}, Todo.SUSPEND),
        (StateType.PAUSED, {}, Todo.SUSPEND),
        (CRASHED, {"ours": True}, Todo.ENTER),
        (None, {}, Todo.ENTER),
    ],
)
def test_what_was_being_executed(known, options, todo):
    """It has crashed, unless its process lives, Prefect knows better, or it is to be made again."""
    assert decide(entry(), known, **options) is todo


@pytest.mark.parametrize(
    ("known", "options", "todo"),
    [
        (PENDING, {"lives": True}, Todo.TELL),
        (RUNNING, {}, Todo.TELL),
        (COMPLETED, {"ours": True}, Todo.LEAVE),
        (FAILED, {"ours": True}, Todo.TELL),
        (CRASHED, {"ours": True}, Todo.TELL),
        # A person has done that.
        (FAILED, {}, Todo.LEAVE),
        (CANCELLED, {"ours": True}, Todo.LEAVE),
        (None, {}, Todo.LEAVE),
    ],
)
def test_what_has_succeeded(known, options, todo):
    """Prefect is told until it knows, and no success becomes a failure because it could not be told."""
    assert decide(entry("Completed"), known, **options) is todo


@pytest.mark.parametrize("outcome", ["Failed", "Crashed", "Cancelled"])
def test_what_has_not_succeeded(outcome):
    """Prefect is told, and then knows."""
    assert decide(entry(outcome), RUNNING) is Todo.TELL
    known = StateType(outcome.upper())
    assert decide(entry(outcome), known, ours=True) is Todo.LEAVE


def test_a_failure_that_shows_as_a_crash():
    """The engine could not tell of it; that an agent has ended a run, it can."""
    assert decide(entry("Failed"), CRASHED, ours=True) is Todo.TELL
    assert decide(entry("Cancelled"), CRASHED, ours=True) is Todo.LEAVE


def test_what_may_begin_again():
    """It is due again, as long as Prefect does not take it for ended."""
    assert decide(entry(ABANDONED), RUNNING) is Todo.PUT_BACK
    assert decide(entry(ABANDONED), COMPLETED) is Todo.LEAVE
    assert decide(entry(ABANDONED), CRASHED, ours=True) is Todo.PUT_BACK


@pytest.mark.parametrize("known", [COMPLETED, FAILED, CRASHED, CANCELLED])
def test_the_names_of_states(known):
    """A state that was entered is the one that is told."""
    assert state_of(entry(outcome_of(known))).type is known


def test_a_run_that_is_gone():
    """It is entered as crashed: nobody can say more."""
    assert outcome_of(None) == "Crashed"
