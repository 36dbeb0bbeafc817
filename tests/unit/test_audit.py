"""What is told of ticks that are due and have not begun."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import create_engine

from taskadapter import audit, tables
from taskadapter.agent.plans import Plan
from taskadapter.audit import WAITING, Line, not_begun, not_shown
from taskadapter.coordination import ledger
from taskadapter.coordination.executions import Entry, Past, moment
from taskadapter.declare.triggers import TriggerConfiguration

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


PLAN = Plan("default", UUID(int=1), UUID(int=1), NOON, 1.0, TriggerConfiguration(interval=1), created=NOON)


def told(*entered, now, last=50):
    """Return outcome and second of each tick that the ledger lacks; those of `entered` it has."""
    dues = {moment(NOON + timedelta(seconds=second)) for second in entered}
    since = NOON + timedelta(seconds=min(entered, default=0))
    lines = not_begun(PLAN, dues, since, NOON + timedelta(seconds=now), last)
    return [(line.outcome, (datetime.fromisoformat(line.due) - NOON).seconds, line.late) for line in lines]


def test_a_tick_is_missing_when_later_ones_have_begun():
    """The ticks of a job begin in their order: what has been passed over will not run."""
    assert told(1, 2, 5, now=5) == [("missing", 3, None), ("missing", 4, None)]


def test_a_tick_is_waiting_however_late_it_is():
    """A node that is slow, or down, has lost nothing yet."""
    assert told(1, 2, now=2.5) == []
    assert told(1, 2, now=4.5) == [("waiting", 3, 1.5), ("waiting", 4, 0.5)]


def test_all_ticks_of_a_job_that_has_never_run_wait():
    """None is missing: no later one has begun."""
    assert told(now=2.5) == [("waiting", 1, 1.5), ("waiting", 2, 0.5)]


def test_ticks_that_wait_are_told_up_to_some_number():
    """A job of every second that has waited for a year is not told tick by tick."""
    assert told(0, now=31_536_000, last=2) == [("waiting", 1, 31_535_999.0), ("waiting", 2, 31_535_998.0)]


def test_nothing_waits_beyond_the_end(monkeypatch):
    """Its schedule is switched off when an agent finds that, and perhaps there is none."""
    ends = NOON + timedelta(seconds=3)
    plan = replace(PLAN, trigger=TriggerConfiguration(interval=1, end_time=ends))
    monkeypatch.setattr(audit, "plan_of", lambda _: plan)
    lines = list(not_begun(plan, {moment(NOON)}, NOON, NOON + timedelta(seconds=9), 50))
    assert [line.due for line in lines] == [moment(NOON + timedelta(seconds=n)) for n in (1, 2, 3)]
    shown = [Line(moment(NOON + timedelta(seconds=1)), WAITING)]
    more = not_shown(None, shown, 1, NOON + timedelta(seconds=9))
    assert more == (2, moment(ends))


@pytest.mark.parametrize(("late", "told"), [(-0.8, 0.0), (1.5, 1.5), (None, None)])
def test_what_is_given_up_before_its_time_is_not_late(late, told, monkeypatch):
    """It was claimed ahead."""
    entry = Entry("tick", "", "", moment(NOON), None, None, "node-1", None, "", "Abandoned")
    monkeypatch.setattr(ledger, "history", lambda *_: [Past(entry, late, 1.0, None, None)])
    engine = create_engine("sqlite://")
    (line,) = audit.executed(engine, UUID(int=1), 50)
    engine.dispose()
    assert line.late == told


@pytest.mark.parametrize(
    ("waiting", "now", "said"),
    [
        (1, 9.5, None),
        (2, 2.9, None),
        (2, 3.0, "1 more waits, the newest due 2030-01-01 12:00:03 UTC."),
        (2, 9.5, "7 more wait, the newest due 2030-01-01 12:00:09 UTC."),
    ],
    ids=["all are shown, and the job pauses", "all are shown", "one is not", "many are not"],
)
def test_that_more_ticks_wait_than_are_shown_is_told(waiting, now, said, monkeypatch):
    """The oldest are shown: the newest tells that the job's schedule goes on."""
    monkeypatch.setattr(audit, "plan_of", lambda _: PLAN)
    lines = [Line(moment(NOON + timedelta(seconds=n)), WAITING) for n in range(waiting, 0, -1)]

    more = not_shown(None, lines, 2, NOON + timedelta(seconds=now))
    assert said == (more and tables.not_shown(*more))


def test_nothing_more_waits_of_a_job_that_is_over(monkeypatch):
    """Its ticks are not due any more."""
    monkeypatch.setattr(audit, "plan_of", lambda _: None)
    lines = [Line(moment(NOON), WAITING)]
    assert not_shown(None, lines, 1, NOON + timedelta(hours=1)) is None
