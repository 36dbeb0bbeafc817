"""When jobs are due, which ticks a job owes, and which of them nobody has made."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from taskadapter.agent import plans
from taskadapter.agent.plans import (
    KNOWN_BEFORE,
    LOOK_AHEAD,
    MADE_AHEAD,
    MADE_AT_ONCE,
    SHOWN,
    Missing,
    Seen,
    find_missing,
)
from taskadapter.coordination.executions import Entered
from taskadapter.declare.triggers import TaskPolicy, TriggerConfiguration, WaitingPolicy
from taskadapter.prefect_api.ticks import Due
from taskadapter.rules import ticks
from taskadapter.rules.ticks import between
from tests.unit import given
from tests.unit.given import JOB, NOON, OTHER, SECOND, at, plan

line = partial(given.line, is_new=False)


def owed(job, seconds):
    return job.owed(NOON + timedelta(seconds=seconds))


def test_ticks_lie_on_the_anchor_and_whole_intervals_after_it():
    """No tick is before the anchor, the lower bound is left out, the upper one is not."""
    assert list(between(NOON, 5, after=NOON - 100 * SECOND, until=NOON + 10 * SECOND)) == at(0, 5, 10)
    assert list(between(NOON, 5, after=NOON, until=NOON + 9.9 * SECOND)) == at(5)
    assert list(between(NOON, 5, after=NOON + 5 * SECOND, until=NOON + 5 * SECOND)) == []


def test_ticks_do_not_drift():
    """A year of an interval that no float holds exactly ends where multiplication says."""
    far = NOON + timedelta(seconds=0.7) * 45_000_000

    assert list(between(NOON, 0.7, after=far - SECOND / 2, until=far)) == [far]


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


def test_the_first_tick_that_nobody_has_planned():
    """Neither settled nor known, after one moment and until another, and before the end."""
    job = line(end_time=NOON + 20 * SECOND)
    job.settle(NOON)

    def unplanned(after, until, *known):
        return job.unplanned(NOON + after * SECOND, NOON + until * SECOND, at(*known))

    assert unplanned(-10, 60) == NOON + 5 * SECOND
    assert unplanned(5, 60) == NOON + 10 * SECOND
    assert unplanned(0, 60, 5, 10) == NOON + 15 * SECOND
    assert unplanned(0, 4) is None
    assert unplanned(0, 60, 5, 10, 15, 20) is None


def test_what_is_settled_waits_no_longer_to_be_listed():
    """A tick that was made while its queue was paused, and has been claimed since."""
    job = line()
    job.left = {*at(0, 5)}
    job.settle(NOON)
    assert job.left == {*at(5)}


def test_the_bound_itself_is_settled_already():
    """Settling it again is not remembered."""
    job = line(through=NOON)
    job.settle(NOON)
    assert job.settled == set()


# --- what a look tells ----------------------------------------------------------------------------


def run(second, job_id=JOB):
    """A planned run of a job's tick."""
    return given.tick(job_id, second)


def by_hand():
    """A run that somebody has asked for."""
    return given.tick(JOB, 0, planned=False)


def test_a_look_tells_what_waits_and_what_is_in_hand():
    """Of each job its ticks; only what was found is listed, and runs by hand are no ticks."""
    found = Due([run(0), run(5), by_hand()], NOON + 60 * SECOND, is_cut=True, behind={OTHER: NOON})
    seen = Seen.of(found, [run(10), run(0, OTHER)], NOON)
    assert seen.planned == {JOB: {*at(0, 5, 10)}, OTHER: {*at(0)}}
    assert seen.listed == {JOB}
    assert (seen.now, seen.until) == (NOON, NOON + 60 * SECOND)
    assert (seen.is_cut, seen.behind) == (True, {OTHER: NOON})


# --- what is missing ------------------------------------------------------------------------------


def missing(*lines, now=0.0, until=60.0, is_cut=False, behind=None, listed=(), **planned):
    """Return what is missing at a look; `job` and `other` are the ticks of theirs that are made."""
    names = {"job": JOB, "other": OTHER}
    made = {names[name]: {*at(*seconds)} for name, seconds in planned.items()}
    seen = Seen(NOON + now * SECOND, NOON + until * SECOND, is_cut, behind or {}, made, listed)
    return find_missing(lines, seen)


def seconds(found: Missing):
    return [(tick - NOON).total_seconds() for tick, _ in found.ticks]


def test_nothing_is_missing_that_is_made():
    """Whether Prefect has planned it or it waits to be listed."""
    job = line()
    job.left = {*at(5)}
    assert seconds(missing(job, now=10, job=[0, 10])) == []
    assert seconds(missing(job, now=10, job=[0])) == [10]


def test_what_is_due_soon_is_made_ahead():
    """As far as the next look is away, so that the ticks of a job are claimed in order."""
    ahead = LOOK_AHEAD.total_seconds()
    assert seconds(missing(line(), now=5 - ahead)) == [0, 5]
    assert seconds(missing(line(), now=4.99 - ahead)) == [0]
    assert seconds(missing(line(), now=0, until=4)) == [0]


def test_of_a_new_job_first_only_what_is_due_now():
    """It need not wait for what is to follow, which the next look sees to, at once."""
    new, old = line(is_new=True), line(job_id=OTHER)
    found = missing(new, old, now=2)
    assert seconds(found) == [0, 0, 5]
    assert found.has_new
    assert not new.is_new
    assert not missing(new, old, now=2).has_new


def test_the_next_look_is_before_what_nobody_has_planned():
    """Of all jobs the first such tick counts, where that is before the end of what was looked at."""
    made = {"job": range(0, 60, 5), "other": [*range(0, 30, 5), *range(35, 60, 5)]}
    assert missing(line(), now=0, until=55, job=made["job"]).complete_until == NOON + 55 * SECOND
    found = missing(line(), line(job_id=OTHER), now=0, until=55, **made)
    assert found.complete_until == NOON + 30 * SECOND - LOOK_AHEAD
    found = missing(line(job_id=OTHER), line(), now=0, until=55, **made)
    assert found.complete_until == NOON + 30 * SECOND - LOOK_AHEAD


def test_after_a_list_that_is_cut_the_next_look_is_early():
    """What follows must be known before it is to be claimed."""
    found = missing(line(), now=0, until=55, is_cut=True, job=range(0, 60, 5))
    assert found.complete_until == NOON + 55 * SECOND - KNOWN_BEFORE


def test_a_job_that_owes_many_waits_for_them():
    """No later tick of it begins before those are made, though it is planned; those of another job do."""
    far = 5 * MADE_AHEAD + 60
    late, other = line(), line(job_id=OTHER, through=NOON + far * SECOND)
    found = missing(late, other, now=far, until=far)
    assert seconds(found) == [*range(0, 5 * MADE_AHEAD, 5)]
    last = 5 * (MADE_AHEAD - 1)
    assert found.held_up == {JOB: NOON + last * SECOND + timedelta.resolution}
    assert not found.holds_up(run(last))
    assert found.holds_up(run(last + 5))
    assert not found.holds_up(run(last + 5, OTHER))
    assert not found.holds_up(by_hand())


def test_a_job_that_owes_one_fewer_waits_for_nothing():
    """All that it owes is made at this look."""
    late = line()
    found = missing(late, now=5 * (MADE_AHEAD - 2), until=5 * (MADE_AHEAD - 2))
    assert len(found.ticks) == MADE_AHEAD - 1
    assert found.held_up == {}


def test_a_tick_that_is_held_up_is_held_up_itself():
    """And it stays so if a later one of its job is, too."""
    found = Missing(NOON)
    job = line()
    for tick in at(10, 5, 15):
        found.hold_up(job, tick)
    assert [found.holds_up(run(second)) for second in (0, 5, 10)] == [False, True, True]


def test_only_so_many_are_made_at_one_look():
    """The oldest of all jobs; a job of which some are left waits for those."""
    jobs = [line(job_id=UUID(int=number)) for number in range(1, 10)]
    found = missing(*jobs, now=40)
    assert len(found.ticks) == MADE_AT_ONCE
    assert seconds(found) == sorted(seconds(found))
    assert {*found.held_up.values()} <= {*at(35, 40)}
    left = 9 * 9 - MADE_AT_ONCE
    assert len(found.held_up) == min(9, left)


def test_a_job_in_time_is_seen_to_behind_a_list_of_late_ones():
    """The list ends before now: what is not on it has no run, up to now; what is may have more."""
    late, other = line(), line(job_id=OTHER, through=NOON + 50 * SECOND)
    found = missing(late, other, now=60, until=5, is_cut=True, listed={JOB}, job=[0, 5])
    assert seconds(found) == [55, 60]
    assert found.is_cut
    assert seconds(missing(other, late, now=60, until=5, listed={JOB}, job=[0, 5])) == [55, 60]
    idle = line(job_id=UUID(int=3), through=NOON + 90 * SECOND)
    assert missing(other, late, idle, now=60, until=5, listed={JOB}, job=[0, 5]).is_cut
    assert not missing(late, other, now=60, until=5, is_cut=True, listed={JOB, OTHER}, job=[0, 5]).is_cut


def test_of_a_job_that_is_behind_nothing_is_made_that_may_be_there():
    """What it was not planned to do before the last tick that is listed is made, for it comes first."""
    late, other = line(), line(job_id=OTHER)
    found = missing(late, other, now=60, until=60, behind={JOB: NOON + 15 * SECOND}, job=[0, 10, 15])
    assert [
        (one.deployment_id, second) for second, (_, one) in zip(seconds(found), found.ticks, strict=True)
    ][:3] == [(OTHER, 0), (JOB, 5), (OTHER, 5)]
    assert {(tick - NOON).total_seconds() for tick, one in found.ticks if one is late} == {5}
    assert {(tick - NOON).total_seconds() for tick, one in found.ticks if one is other} == {
        *range(0, 61, 5)
    }
    assert found.complete_until == NOON + 60 * SECOND


def test_a_list_that_reaches_to_now_is_long_enough():
    """What is not on it is not due."""
    other = line(job_id=OTHER, through=NOON + 60 * SECOND)
    found = missing(other, now=60, until=60)
    assert (seconds(found), found.is_cut) == ([], False)


# --- a job's plan, and where it begins ------------------------------------------------------------


def deployment(slug=None, schedule=None, trigger=None, active=True) -> Any:
    """A deployment as Prefect has it: the trigger is among its variables, and names the schedule."""
    trigger = trigger or TriggerConfiguration(interval=5)
    one = SimpleNamespace(
        id=OTHER,
        slug=slug or ticks.slug(trigger),
        active=active,
        schedule=schedule or IntervalSchedule(interval=timedelta(seconds=7), anchor_date=NOON),
        created=NOON + SECOND,
    )
    variables = {"trigger": trigger.model_dump(mode="json", exclude_defaults=True)}
    return SimpleNamespace(
        id=JOB,
        name="job",
        schedules=[one],
        job_variables=variables,
        paused=False,
        work_queue_name="group",
        work_queue_id=UUID(int=3),
    )


def test_a_plan_is_what_prefect_has():
    """Somebody may have edited interval and anchor there; the trigger is as deployed."""
    plan = plans.plan_of(deployment())
    assert (plan.queue, plan.queue_id, plan.schedule_id) == ("group", UUID(int=3), OTHER)
    assert (plan.anchor, plan.interval, plan.created) == (NOON, 7.0, NOON + SECOND)
    assert plan.trigger.interval == 5


def test_a_job_that_is_off_or_of_another_kind_has_none():
    """Switched off, without its schedule, or with one that is none of ours."""
    assert plans.plan_of(deployment(active=False)) is None
    assert plans.plan_of(deployment(slug="by-hand")) is None
    assert plans.plan_of(deployment(schedule=CronSchedule(cron="* * * * *"))) is None


def test_a_run_that_was_planned_before_an_edit_is_no_tick():
    """Of the schedule as it is now; one that somebody asks for, or of another schedule, is left alone."""

    def planned(second, schedule_id=JOB, auto_scheduled=True):
        due = NOON + second * SECOND
        key = ticks.tick_key(JOB, schedule_id, due)
        flow_run = run(second)
        return flow_run.model_copy(update={"idempotency_key": key, "auto_scheduled": auto_scheduled})

    assert [plans.is_off(plan(), planned(second)) for second in (0, 2, 5, 6, 500.0005)] == [
        *(False, True, False, True, False)
    ]
    assert not plans.is_off(plan(), planned(2, schedule_id=OTHER))
    assert not plans.is_off(plan(), planned(2, auto_scheduled=False))
    assert not plans.is_off(plan(), by_hand())


def test_a_new_job_owes_its_first_tick():
    """Where that is to come at once, though the schedule was made a little later; else what comes after."""
    at_once = plans.begin(plan(created=NOON + SECOND), None, None)
    assert at_once == (NOON - timedelta(microseconds=1), set())
    assert plans.begin(plan(created=NOON - SECOND), None, None) == (NOON - SECOND, set())
    started = plan(created=NOON + SECOND, start_time=NOON)
    assert plans.begin(started, None, None) == (NOON + SECOND, set())


def test_what_was_switched_on_again_owes_nothing_from_before():
    """By Prefect's clock; and what is later than that counts from the schedule."""
    opened = NOON + 30 * SECOND
    assert plans.begin(plan(), Entered([], opened), None) == (opened, set())
    early = Entered([], NOON - 30 * SECOND)
    assert plans.begin(plan(created=NOON), early, None) == (NOON - timedelta(microseconds=1), set())


def test_the_ledger_says_how_far_a_job_is():
    """All between its entries is owed; without any, what is after the last tick that was settled here."""
    dues = [*reversed(at(10, 15, 20))]
    assert plans.begin(plan(), Entered(dues, None), None) == (NOON + 10 * SECOND, {*dues})
    opened = NOON + 12 * SECOND
    assert plans.begin(plan(), Entered(dues, opened), None) == (opened, {*dues})
    assert plans.begin(plan(), Entered([], None), NOON + 25 * SECOND) == (NOON + 25 * SECOND, set())
    before = NOON - timedelta(microseconds=1)
    assert plans.begin(plan(), Entered([], None), NOON - 25 * SECOND) == (before, set())
