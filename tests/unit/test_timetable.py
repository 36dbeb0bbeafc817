"""Which ticks a job owes, and what settling one does."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from taskadapter.model import TaskPolicy, TriggerConfiguration, WaitingPolicy
from taskadapter.schedules import ticks
from taskadapter.timetable import MADE_AHEAD, SHOWN, Line, Plan

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
ID = UUID(int=1)


def line(through=NOON - SECOND, **changes):
    trigger = TriggerConfiguration(**({"interval": 5} | changes))
    plan = Plan("default", ID, ID, NOON, trigger.interval, trigger, created=NOON)
    return Line(ID, "job", plan, through)


def at(*seconds):
    return [NOON + timedelta(seconds=second) for second in seconds]


def owed(job, seconds):
    return job.owed(NOON + timedelta(seconds=seconds))


def test_ticks_lie_on_the_anchor_and_whole_intervals_after_it():
    """No tick is before the anchor, the lower bound is left out, the upper one is not."""
    assert list(ticks(NOON, 5, after=NOON - 100 * SECOND, until=NOON + 10 * SECOND)) == at(0, 5, 10)
    assert list(ticks(NOON, 5, after=NOON, until=NOON + 9.9 * SECOND)) == at(5)
    assert list(ticks(NOON, 5, after=NOON + 5 * SECOND, until=NOON + 5 * SECOND)) == []


def test_ticks_do_not_drift():
    """A year of an interval that no float holds exactly ends where multiplication says."""
    far = NOON + timedelta(seconds=0.7) * 45_000_000

    assert list(ticks(NOON, 0.7, after=far - SECOND / 2, until=far)) == [far]


def test_what_is_due_and_not_settled_is_owed():
    """At a tick's moment it is owed, just before it is not."""
    assert owed(line(), 4.999) == at(0)
    assert owed(line(), 5) == at(0, 5)


def test_a_settled_tick_is_not_owed():
    """Settled ticks are left out, in whatever order they were settled, and those between stay owed."""
    job = line()
    for tick in at(10, 0):
        job.settle(tick)

    assert owed(job, 15) == at(5, 15)
    assert job.through == NOON


def test_settling_in_order_leaves_nothing_to_remember():
    """Once all ticks up to one are settled, only that moment is kept."""
    job = line()
    for tick in at(0, 10, 5):
        job.settle(tick)

    assert job.through == NOON + 10 * SECOND
    assert job.settled == set()


def test_an_old_tick_changes_nothing():
    """Settling what is settled already is harmless."""
    job = line(through=NOON + 10 * SECOND)
    job.settle(NOON)

    assert owed(job, 15) == at(15)


def test_nothing_is_owed_after_the_end():
    """A tick at the end is owed, one after it is not."""
    assert owed(line(end_time=NOON + 5 * SECOND), 60) == at(0, 5)


def test_many_are_owed_a_few_at_a_time():
    """Under WAIT the oldest come first, and none is passed over."""
    assert owed(line(), 86400) == at(*range(0, 5 * MADE_AHEAD, 5))


@pytest.mark.parametrize("policy", [WaitingPolicy.IGNORE, WaitingPolicy.LOG_AND_IGNORE])
def test_what_is_to_be_ignored_is_passed_over_beyond_what_is_shown(policy):
    """After a long outage only the last ticks are made, to be shown as skipped."""
    job = line(task_policy=TaskPolicy(waiting_policy=policy))

    assert owed(job, 86400)[0] == NOON + timedelta(seconds=86400 - 5 * (SHOWN - 1))
