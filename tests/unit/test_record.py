"""What the process of a run does while the coordination database fails it, without one."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import Any

import pytest

from taskadapter.coordination import ledger, store
from taskadapter.coordination.board import clock
from taskadapter.coordination.executions import Begun, Entry, Paused, Skipped, Taken
from taskadapter.declare.triggers import TaskPolicy, TriggerConfiguration, WaitingPolicy
from taskadapter.errors import (
    AccessDeniedError,
    CoordinationError,
    DatabaseUnavailableError,
    TokenLostError,
)
from taskadapter.execution import protocol, record
from taskadapter.execution.current import Execution
from tests.unit.test_hosts import ASSIGNMENT

DENIED = AccessDeniedError("permission denied for table taskadapter_ledger")
BROKEN = CoordinationError("could not read block 0 in file: Input/output error")
AWAY = DatabaseUnavailableError("no answer")


class Given:
    """A run whose database fails so many times in some way, and answers then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *faults: Exception) -> None:
        self.faults = [*faults]
        self.told: list[protocol.Step] = []
        self.is_dropped = False
        self.execution = Execution(ASSIGNMENT, tell=self.told.append, is_dropped=lambda: self.is_dropped)
        monkeypatch.setattr(store, "ask", self._ask)
        monkeypatch.setattr(store, "RETRY_SECONDS", 0)

    def _ask(self, *_: object) -> Any:
        if self.faults:
            raise self.faults.pop(0)
        return Begun(1)

    @property
    def waits(self) -> list[str]:
        """The faults that the agent has heard of."""
        return [step.fault for step in self.told if isinstance(step, protocol.Waits)]


def test_nothing_is_told_of_a_database_that_answers(monkeypatch):
    """Each run asks it."""
    given = Given(monkeypatch)
    assert record.begin(given.execution) == Begun(1)
    assert given.told == []


def test_the_agent_hears_why_a_body_waits_and_when_it_need_not_any_more(monkeypatch, caplog):
    """A fault that lasts is a line of the log once; the agent hears for how long it has."""
    given = Given(monkeypatch, AWAY, AWAY, DENIED, BROKEN)
    assert record.begin(given.execution) == Begun(1)
    assert given.waits == [str(AWAY), str(AWAY), str(DENIED), str(BROKEN)]
    seconds = [step.seconds for step in given.told if isinstance(step, protocol.Waits)]
    assert seconds == sorted(seconds)
    assert given.told[-1] == protocol.Answered()
    assert len(given.told) == 5


def test_who_waits_gives_the_run_back_when_it_is_asked_to(monkeypatch):
    """Its body has not begun, and another node may be able to."""
    given = Given(monkeypatch, AWAY, DENIED)
    given.is_dropped = True
    with pytest.raises(record.NotWantedError):
        record.begin(given.execution)
    assert given.told == []


def test_what_is_dropped_begins_where_the_database_answers(monkeypatch):
    """The node holds the token still, and the ledger has an answer."""
    given = Given(monkeypatch)
    given.is_dropped = True
    assert record.begin(given.execution) == Begun(1)


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("is_own", [True, False])
def test_a_beginning_whose_commit_has_no_answer(monkeypatch, lost, is_own):
    """It is entered, and the process that asks again has begun it itself; what another has, it leaves."""
    execution = Execution(ASSIGNMENT)
    entry = entered_by("1" if is_own else "2")
    answers, faults = [Begun(3), *(Taken(entry) for _ in range(lost))], [AWAY] * lost

    def ask(_url, question):
        answer = question(None)
        if faults:
            raise faults.pop()
        return answer

    monkeypatch.setattr(ledger, "begin", lambda *_: answers.pop(0))
    monkeypatch.setattr(store, "ask", ask)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0)
    assert record.begin(execution) == (Begun(3) if is_own else Taken(entry))


def test_a_run_that_is_given_back_says_whether_it_may_be_entered(monkeypatch):
    """Its commit had no answer: the agent has it withdrawn, else it would be taken for interrupted."""
    execution = Execution(ASSIGNMENT, is_dropped=lambda: True)

    def ask(_url, question):
        question(None)
        raise AWAY

    monkeypatch.setattr(ledger, "begin", lambda *_: Begun(3))
    monkeypatch.setattr(store, "ask", ask)
    with pytest.raises(record.NotWantedError):
        record.begin(execution)
    assert execution.in_doubt


@pytest.mark.parametrize("answer", [Begun(1), Paused()])
def test_what_is_begun_or_refused_is_in_no_doubt(monkeypatch, answer):
    """The ledger has said so; the node may have lost its trust since, and then the body does not begin."""
    given = Given(monkeypatch)
    monkeypatch.setattr(store, "ask", lambda _url, question: question(None))
    monkeypatch.setattr(ledger, "begin", lambda *_: answer)
    assert record.begin(given.execution) == answer
    assert not given.execution.in_doubt

    def lose(_: object) -> None:
        raise TokenLostError("too late")

    monkeypatch.setattr(record, "require_trust", lose)
    with pytest.raises(TokenLostError):
        record.begin(given.execution)
    assert given.execution.in_doubt is (answer == Begun(1))


def test_what_was_entered_before_does_not_begin_again(monkeypatch):
    """Though it is of this very run: a process of the node has begun it, and has ended."""
    entry, faults = entered_by("1"), [AWAY]

    def ask(_url, question):
        if faults:
            raise faults.pop()
        return question(None)

    monkeypatch.setattr(ledger, "begin", lambda *_: Taken(entry))
    monkeypatch.setattr(store, "ask", ask)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0)
    assert record.begin(Execution(ASSIGNMENT)) == Taken(entry)


def test_a_tick_gets_too_late_while_its_process_waits_for_the_database(monkeypatch):
    """Whatever its run was before, the ledger hears each time how late it is now."""
    run, due = ASSIGNMENT.flow_run, datetime.now(UTC)
    seen, waited = [], iter([1, 6])
    trigger = TriggerConfiguration(interval=60, task_policy=TaskPolicy(waiting_policy=WaitingPolicy.IGNORE))
    tick = run.model_copy(update={"auto_scheduled": True, "expected_start_time": due, "run_count": 1})
    assignment = ASSIGNMENT.model_copy(update={"flow_run": tick, "trigger": trigger})

    def now(_: tzinfo) -> datetime:
        return due + timedelta(seconds=next(waited))

    def begin(_connection, _execution, _owner, limits):
        seen.append(limits.too_late)
        if len(seen) == 1:
            raise AWAY
        return Skipped(limits.too_late)

    monkeypatch.setattr(record, "datetime", SimpleNamespace(now=now))
    monkeypatch.setattr(ledger, "begin", begin)
    monkeypatch.setattr(store, "ask", lambda _url, question: question(None))
    monkeypatch.setattr(store, "RETRY_SECONDS", 0)
    reason = "it could start 6.0 s late, and IGNORE allows 5 s"
    assert record.begin(Execution(assignment)) == Skipped(reason)
    assert seen == [None, reason]


def entered_by(incarnation: str) -> Entry:
    """Return the entry of a run that goes on."""
    mine = ASSIGNMENT.execution
    return Entry(mine.key, mine.flow_run_id, None, None, 3, None, "node", None, incarnation, None)


@pytest.mark.parametrize(("fault", "told"), [(AWAY, []), (DENIED, [str(DENIED)])])
def test_an_end_waits_for_a_database_that_is_away(monkeypatch, fault, told):
    """No other node could enter it, and would take it for interrupted; a refusal may be this node's."""
    given = Given(monkeypatch, fault)
    given.execution.entered = Begun(1)
    given.is_dropped = True
    record.enter_end(given.execution, None, "Completed")
    assert given.waits == told
    assert given.told[-1] == protocol.Settled(), "nothing of the body is left"


def test_the_agent_enters_what_the_process_of_a_body_cannot(monkeypatch):
    """It hears once, after a while, what the body came to; the process goes on trying."""
    given = Given(monkeypatch, AWAY, AWAY, AWAY)
    given.execution.entered = Begun(1)
    monkeypatch.setattr(record, "UNENTERED_SECONDS", 0)
    record.enter_end(given.execution, None, "Failed", "run 1 failed")
    unentered = protocol.Unentered(fault=str(AWAY), outcome="Failed", ends="run 1 failed")
    assert given.told == [unentered, protocol.Answered(), protocol.Settled()]


def test_who_has_lost_the_token_waits_no_longer(monkeypatch):
    """Another node may run it by now."""
    given = Given(monkeypatch, AWAY)

    def lost(_: object) -> None:
        raise TokenLostError("lost")

    monkeypatch.setattr(record, "require_trust", lost)
    with pytest.raises(TokenLostError):
        record.begin(given.execution)
    assert given.told == []


def test_a_beginning_that_is_answered_after_the_deadline_is_none(monkeypatch):
    """The row was this node's when the database looked, and may be another's when the answer is there."""
    given = Given(monkeypatch)
    monkeypatch.setattr(record, "deadline", lambda _: clock() - 1)
    with pytest.raises(TokenLostError):
        record.begin(given.execution)


def test_the_timeout_of_a_flow_stands_still_for_the_database(monkeypatch):
    """Prefect sets an alarm: a body that has to wait has as much time left as before."""
    given = Given(monkeypatch, AWAY, AWAY)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.2)
    rung: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert record.begin(given.execution) == Begun(1)
        assert (rung, given.execution.has_waited) == ([], True)
        while not rung:
            assert time.monotonic() < began + 10.0
            time.sleep(0.01)
        assert rung[0] >= began + 0.5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_a_timeout_that_is_not_set_is_not_set_by_that(monkeypatch):
    """Nor is one touched in another thread, where there is none."""
    given = Given(monkeypatch, AWAY)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(record.begin, given.execution).result() == Begun(1)
    assert record.begin(given.execution) == Begun(1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
