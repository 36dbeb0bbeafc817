"""What is told of ticks that are due and have not begun."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from taskadapter.agent.plans import Plan
from taskadapter.audit import not_begun
from taskadapter.coordination.executions import moment
from taskadapter.declare.triggers import TriggerConfiguration

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


def told(*entered, now, last=50):
    """Return outcome and second of each tick that the ledger lacks; those of `entered` it has."""
    plan = Plan(
        "default", UUID(int=1), UUID(int=1), NOON, 1.0, TriggerConfiguration(interval=1), created=NOON
    )
    dues = {moment(NOON + timedelta(seconds=second)) for second in entered}
    since = NOON + timedelta(seconds=min(entered))
    lines = not_begun(plan, dues, since, NOON + timedelta(seconds=now), last)
    return [(line.outcome, (datetime.fromisoformat(line.due) - NOON).seconds, line.late) for line in lines]


def test_a_tick_is_missing_when_later_ones_have_begun():
    """The ticks of a job begin in their order: what has been passed over will not run."""
    assert told(1, 2, 5, now=5) == [("missing", 3, None), ("missing", 4, None)]


def test_a_tick_is_waiting_however_late_it_is():
    """A node that is slow, or down, has lost nothing yet."""
    assert told(1, 2, now=2.5) == []
    assert told(1, 2, now=4.5) == [("waiting", 3, 1.5), ("waiting", 4, 0.5)]


def test_ticks_that_wait_are_told_up_to_some_number():
    """A job of every second that has waited for a year is not told tick by tick."""
    assert told(0, now=31_536_000, last=2) == [("waiting", 1, 31_535_999.0), ("waiting", 2, 31_535_998.0)]
