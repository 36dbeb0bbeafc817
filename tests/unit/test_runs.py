"""The life of a run: what follows from all that may happen to it, and from what the ledger says."""

import pytest
from prefect.client.schemas.objects import StateType

from taskadapter.agent import runs
from taskadapter.agent.runs import (
    CANCEL_GRACE_SECONDS,
    Life,
    Phase,
    Signal,
    Todo,
    decide,
    outcome_of,
    settle,
    state_of,
    step,
)
from taskadapter.coordination.executions import ABANDONED, SKIPPED, Entry
from taskadapter.execution import protocol

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
        (PENDING, {"ended_here": True, "at_fault": True}, Todo.CRASH),
        # The engine takes an API that fails it for a crash.
        (CRASHED, {"ended_here": True}, Todo.PUT_BACK),
        (CRASHED, {}, Todo.LEAVE),
        # Its parameters are wrong, or a person has ended it.
        (FAILED, {"ended_here": True}, Todo.LEAVE),
        (CANCELLED, {"ended_here": True}, Todo.LEAVE),
        (None, {"ended_here": True}, Todo.LEAVE),
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
        (StateType.PAUSED, {"ended_here": True}, Todo.SUSPEND),
        (StateType.PAUSED, {}, Todo.SUSPEND),
        (CRASHED, {"ended_here": True}, Todo.ENTER),
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
        (COMPLETED, {"ended_here": True}, Todo.LEAVE),
        (FAILED, {"ended_here": True}, Todo.TELL),
        (CRASHED, {"ended_here": True}, Todo.TELL),
        # A person has done that.
        (FAILED, {}, Todo.LEAVE),
        (CANCELLED, {"ended_here": True}, Todo.LEAVE),
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
    assert decide(entry(outcome), known, ended_here=True) is Todo.LEAVE


def test_a_failure_that_shows_as_a_crash():
    """The engine could not tell of it; that an agent has ended a run, it can."""
    assert decide(entry("Failed"), CRASHED, ended_here=True) is Todo.TELL
    assert decide(entry("Cancelled"), CRASHED, ended_here=True) is Todo.LEAVE


def test_what_may_begin_again():
    """It is due again, as long as Prefect does not take it for ended."""
    assert decide(entry(ABANDONED), RUNNING) is Todo.PUT_BACK
    assert decide(entry(ABANDONED), COMPLETED) is Todo.LEAVE
    assert decide(entry(ABANDONED), CRASHED, ended_here=True) is Todo.PUT_BACK


@pytest.mark.parametrize("known", [COMPLETED, FAILED, CRASHED, CANCELLED])
def test_the_names_of_states(known):
    """A state that was entered is the one that is told."""
    assert state_of(entry(outcome_of(known))).type is known


def test_a_run_that_is_gone():
    """It is entered as crashed: nobody can say more."""
    assert outcome_of(None) == "Crashed"


# --- step -----------------------------------------------------------------------------------------

BEFORE_ITS_PROCESS = [Phase.FOUND, Phase.PLACED, Phase.CLAIMED]
WITH_PROCESS = [Phase.FORKED, Phase.BEGUN]


def test_a_run_goes_one_way():
    """From what is due to its body; nothing is to be done on the way."""
    life, phases = Life(), []
    for event in (runs.Placed(finishes=True), runs.Claimed(), runs.Forked(), protocol.Begun()):
        after = step(life, event)
        assert after == runs.Step(after.life)
        life = after.life
        phases.append(life.phase)

    assert phases == [Phase.PLACED, Phase.CLAIMED, Phase.FORKED, Phase.BEGUN]
    assert life.finishes


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    ("event", "signal"),
    [
        (runs.Dropped(), Signal.DROP),
        (runs.Deferred(), Signal.DROP),
        (runs.CalledOff("it is over"), Signal.DROP),
        (runs.TokenLost(), Signal.KILL),
        (runs.TimeUp(), Signal.KILL),
        (runs.GraceOver(), Signal.KILL),
        (runs.Cancelled(at=1.0), Signal.CANCEL),
    ],
)
def test_its_process_is_told_while_it_has_one(phase, event, signal):
    """What has begun may end in order where its time is up; all else is told at once."""
    after = step(Life(phase), event)
    told = after.signals
    if phase >= Phase.BEGUN and event == runs.TimeUp():
        signal = Signal.TERMINATE

    assert told == (() if phase in BEFORE_ITS_PROCESS else (signal,))
    assert after.life.phase is phase


@pytest.mark.parametrize(
    "event", [runs.Dropped(), runs.Deferred(), runs.CalledOff("it is over"), runs.TokenLost()]
)
def test_a_process_that_comes_too_late_is_killed(event):
    """What was dropped, called off or lost meanwhile does not begin in it."""
    after = step(step(Life(Phase.CLAIMED), event).life, runs.Forked())

    assert after.signals == (Signal.KILL,)
    assert not after.life.has_process


def test_what_may_finish_outlives_its_token():
    """If its policy says so; what becomes of it the next holder says all the same."""
    after = step(Life(Phase.BEGUN, finishes=True), runs.TokenLost())

    assert after.signals == ()
    assert after.life.lost


def test_a_cancelled_run_has_time_to_clean_up():
    """It is told once, and killed when its time is over."""
    life = step(Life(Phase.BEGUN), runs.Cancelled(at=100.0)).life

    assert step(life, runs.Cancelled(at=101.0)) == runs.Step(life)
    assert step(life, runs.Watched(at=100.0 + CANCEL_GRACE_SECONDS)) == runs.Step(life)
    assert step(life, runs.Watched(at=100.1 + CANCEL_GRACE_SECONDS)).signals == (Signal.KILL,)
    assert step(Life(Phase.BEGUN), runs.Watched(at=1e9)).signals == ()


@pytest.mark.parametrize(
    ("end", "actions"),
    [
        (protocol.Told(), ()),
        (protocol.Told(ended="over"), (runs.EndJob("over"),)),
        (protocol.Untold(), (runs.AskLedger(at_fault=False),)),
        (protocol.Untold(ended="over"), (runs.EndJob("over"), runs.AskLedger(at_fault=False))),
        (protocol.Skipped(reason="late"), (runs.Skip("late"),)),
        (protocol.Skipped(reason="late", ended="over"), (runs.EndJob("over"), runs.Skip("late"))),
        (protocol.Untold(in_doubt=True), (runs.Withdraw(), runs.AskLedger(at_fault=False))),
        (protocol.Dropped(), (runs.PutBack(keep=True),)),
        (protocol.Dropped(in_doubt=True), (runs.Withdraw(), runs.PutBack(keep=True))),
        (protocol.Paused(), (runs.HoldJob(), runs.PutBack(keep=True))),
        (protocol.Crashed(fault="no"), (runs.AskLedger(at_fault=True),)),
        (protocol.Unloadable(fault="no", waits=True), (runs.PassOn(waits=True),)),
        (protocol.Unloadable(fault="no"), (runs.PassOn(waits=False),)),
        (runs.Killed(), (runs.AskLedger(at_fault=False),)),
    ],
)
def test_what_its_end_asks_for(end, actions):
    """Prefect knows, or the ledger is to say, or it has not begun and goes back."""
    after = step(Life(Phase.BEGUN), end)
    assert after.actions == actions
    assert after.life.phase is Phase.BEGUN


def test_what_waits_for_the_database_does_not_go_on():
    """Whether it has begun or not, until the database answers."""
    life = Life(Phase.BEGUN)
    assert life.goes_on
    assert not Life(Phase.FORKED).goes_on
    waiting = step(life, protocol.Waits(fault="permission denied", seconds=1)).life
    assert not waiting.goes_on
    assert step(waiting, protocol.Answered()).life == life


def test_what_is_settled_does_not_go_on():
    """Nor does it again when its job is over, which its process says after that."""
    settled = step(Life(Phase.BEGUN), protocol.Settled()).life
    assert settled.has_begun
    assert not settled.goes_on
    assert step(settled, protocol.Begun(ended="over")).life.phase is Phase.SETTLED


def test_a_job_ends_once():
    """The process says so when the body has failed, and once more when it ends."""
    after = step(Life(Phase.FORKED), protocol.Begun(ended="over"))

    assert after.actions == (runs.EndJob("over"),)
    assert step(after.life, protocol.Told(ended="over")).actions == ()


@pytest.mark.parametrize(
    ("event", "given_back"),
    [
        (runs.Dropped(), runs.PutBack(keep=False)),
        (runs.TokenLost(), runs.PutBack(keep=False)),
        (runs.CalledOff("over"), runs.ShowSkipped("over")),
    ],
)
@pytest.mark.parametrize("phase", WITH_PROCESS)
def test_what_is_not_wanted_here_is_not_kept(phase, event, given_back):
    """Another node has it next; what its job's end has overtaken shows so."""
    assert step(step(Life(phase), event).life, protocol.Dropped()).actions == (given_back,)


@pytest.mark.parametrize("phase", WITH_PROCESS)
def test_what_is_deferred_is_kept(phase):
    """It is the next of its job on this node, unless the node is to begin nothing more of it."""
    life = step(Life(phase), runs.Deferred()).life

    assert step(life, protocol.Dropped()).actions == (runs.PutBack(keep=True),)
    assert step(step(life, runs.Dropped()).life, protocol.Dropped()).actions == (runs.PutBack(keep=False),)


# --- settle ---------------------------------------------------------------------------------------


def test_what_is_lost_is_the_next_holders():
    """Unless Prefect knows how it ended."""
    lost = Life(Phase.BEGUN, lost=True)

    assert settle(lost, entry(), RUNNING, "incarnation", at_fault=False) is Todo.HAND_ON
    assert settle(lost, entry("Completed"), COMPLETED, "incarnation", at_fault=False) is Todo.LEAVE


def test_what_another_process_executes_is_left_to_it():
    """A tick that was begun elsewhere meanwhile goes on there."""
    life = Life(Phase.FORKED)

    assert settle(life, entry(), RUNNING, "another", at_fault=False) is Todo.LEAVE
    assert settle(life, entry(), RUNNING, "incarnation", at_fault=False) is Todo.CRASH
    assert settle(life, None, PENDING, "incarnation", at_fault=False) is Todo.PUT_BACK
    assert settle(life, None, PENDING, "incarnation", at_fault=True) is Todo.CRASH


def test_what_the_engine_takes_for_a_crash_before_the_body_is_put_back():
    """It could not reach the API; only here, and now, is it known that nobody else has ended it."""
    assert settle(Life(Phase.FORKED), None, CRASHED, "incarnation", at_fault=False) is Todo.PUT_BACK


# --- what Prefect is told -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [("Completed", COMPLETED), ("Failed", FAILED), ("Crashed", CRASHED), (None, CRASHED)],
)
def test_a_run_is_told_as_what_it_came_to(outcome, kind):
    """With where it was; one without an outcome was interrupted."""
    state = state_of(entry(outcome))

    assert state.type is kind
    assert (
        state.message == "Executed on node 'node-1' in term 7 of group 'group', which could not report it."
    )


def test_a_run_whose_tick_was_skipped_is_skipped():
    """It was another run of the same tick that the ledger has as skipped."""
    state = state_of(entry(SKIPPED))

    assert state.name == "Skipped"
    assert state.message is not None
    assert "another run of this tick was" in state.message
