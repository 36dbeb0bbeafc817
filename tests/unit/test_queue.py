"""Which run is claimed next, and when: each job in its order, the earliest first."""

from datetime import UTC, timedelta
from uuid import UUID, uuid4

import pytest

from taskadapter.agent.queue import (
    BRIEF_SECONDS,
    CLAIM_AHEAD,
    LONGEST_LOAD_SECONDS,
    LONGEST_WAIT_SECONDS,
    MOST_HOLDS,
    Queue,
    any_run,
    due,
)
from taskadapter.prefect_api.client import backoff
from tests.unit.given import NOON, tick

ONE, OTHER = UUID(int=1), UUID(int=2)


def queue_of(*found, asked=0.0, taken=()):
    queue = Queue()
    queue.found(found, asked, taken)
    return queue


def test_the_earliest_is_the_first():
    """Of all that may start."""
    late, early = tick(ONE, 5), tick(OTHER, 3)
    queue = queue_of(late, early)

    assert queue.first(any_run, 0.0) is early
    assert queue.first(lambda run: run.deployment_id == ONE, 0.0) is late
    assert queue.first(lambda _: False, 0.0) is None


def test_a_tick_does_not_pass_an_earlier_one_of_its_job():
    """Not even where that one may not start; what somebody asked for waits for nobody."""
    first, second, by_hand = tick(ONE, 1), tick(ONE, 2), tick(ONE, 3, planned=False)
    for found in ((second, by_hand, first), (first, second, by_hand)):
        assert {run.id for run in queue_of(*found).firsts()} == {first.id, by_hand.id}


def test_what_is_taken_waits_no_longer():
    """An answer from before does not bring it back; one that is put back is there in any answer."""
    through, returned, other = (tick(uuid4(), n) for n in range(3))
    queue = queue_of(through, returned, other)
    for run in (through, returned):
        queue.take(run)
    queue.through(through.id, clock=10.0)
    queue.put_back(returned, clock=10.0)

    queue.found([through, other], asked=9.0, taken=())
    assert {run.id for run in queue.firsts()} == {returned.id, other.id}
    queue.found([through, other], asked=11.0, taken=[other.id])
    assert {run.id for run in queue.firsts()} == {through.id}


def test_a_run_that_is_put_back_is_not_through():
    """It waits here, and counts as such."""
    run = tick(ONE, 1)
    queue = queue_of(run)
    queue.through(run.id, clock=10.0)
    queue.found([run], asked=9.0, taken=())

    assert queue.firsts() == [run]
    assert len(queue) == 1


@pytest.mark.parametrize(
    ("loads", "ahead"),
    [(0.1, CLAIM_AHEAD), (2.0, timedelta(seconds=3)), (60.0, timedelta(seconds=LONGEST_LOAD_SECONDS))],
)
def test_a_run_is_claimed_so_early_that_its_code_is_loaded(loads, ahead):
    """As long before its time as loading took, and half as long again, within limits."""
    run = tick(ONE, 0)
    queue = queue_of(run)
    queue.loaded(ONE, loads)

    assert queue.claimed_at(run) == NOON - ahead


def test_what_is_forgotten_is_gone():
    """Some of it, or all."""
    queue = queue_of(tick(ONE, 1), tick(OTHER, 1))
    queue.forget(lambda run: run.deployment_id == ONE)
    assert [run.deployment_id for run in queue.firsts()] == [OTHER]
    queue.forget()

    assert len(queue) == 0


def test_a_run_that_was_ended_before_its_body_waits_longer_each_time():
    """As long as it is known; the next one is tried in the meantime."""
    run, other = tick(ONE, 1), tick(OTHER, 2)
    queue = queue_of(run, other)
    waits = []
    for _ in range(3):
        queue.try_later(run.id, clock=100.0)
        waits.append(queue.next_try(100.0))
        assert queue.first(any_run, 100.0) is other
    assert waits == [backoff(times, LONGEST_WAIT_SECONDS) for times in range(3)]

    assert queue.first(any_run, 100.0 + waits[-1]) is run
    assert queue.next_try(100.0 + waits[-1]) is None


def test_a_run_that_cannot_be_claimed_stops_its_job_for_so_often():
    """It waits for the next look each time, and later ticks behind it; at last they pass."""
    run, later = tick(ONE, 1), tick(ONE, 2)
    queue = queue_of(run, later)
    for clock in range(MOST_HOLDS):
        queue.take(run)
        assert queue.hold(run, float(clock))
        assert queue.first(any_run, 100.0) is None
        queue.found([run, later], clock + 0.5, ())
        assert queue.first(any_run, 100.0) is run
    queue.take(run)
    assert not queue.hold(run, 100.0)
    assert queue.first(any_run, 100.0) is later


@pytest.mark.parametrize(
    ("seconds", "asked_for", "may"),
    [
        ([], False, False),
        ([BRIEF_SECONDS], False, False),
        ([BRIEF_SECONDS, 0.1], False, True),
        ([0.1], True, False),
    ],
    ids=["not known", "long", "brief", "somebody asks"],
)
def test_what_follows_a_brief_run_is_made_ready(seconds, asked_for, may):
    """Unless somebody has asked for a run of that job, which would have to wait for it."""
    run, other = tick(ONE, 1), tick(OTHER, 1, planned=False)
    queue = queue_of(run, other, *[tick(ONE, 2, planned=False)] * asked_for)
    for took in seconds:
        queue.ran(ONE, took)
        queue.ran(OTHER, took)

    assert queue.may_follow(run) is may
    assert not queue.may_follow(other)


@pytest.mark.parametrize("knows", ["the answer", "the agent"])
def test_it_is_forgotten_with_its_run(knows):
    """One that waits here, or is taken, is still tried later than the others."""
    run = tick(ONE, 1)
    queue = queue_of(run)
    queue.try_later(run.id, clock=100.0)
    queue.found([run] if knows == "the answer" else [], 100.0, [] if knows == "the answer" else [run.id])
    assert queue.next_try(100.0) is not None
    queue.found([], 100.0, [])
    assert queue.next_try(100.0) is None


def test_an_answer_of_the_same_moment_is_older():
    """What was asked for at the moment at which a run was over may have it still."""
    run = tick(ONE, 1)
    queue = queue_of(run)
    queue.take(run)
    queue.through(run.id, clock=10.0)
    queue.found([run], asked=10.0, taken=())
    assert queue.firsts() == []


def test_a_run_without_a_time_is_due_when_it_was_made():
    """And one that has neither, at once."""
    run = tick(ONE, 1).model_copy(update={"expected_start_time": None, "created": NOON})
    assert due(run) == NOON
    assert due(run.model_copy(update={"created": None})).tzinfo is UTC


def test_a_job_that_was_never_loaded_is_claimed_a_second_ahead():
    """That much is enough for most."""
    assert Queue().claimed_at(tick(ONE, 5)) == NOON + timedelta(seconds=5) - CLAIM_AHEAD


def test_of_other_jobs_nothing_is_remembered():
    """How long its code takes to load is found out again, should one come back."""
    queue = Queue()
    for job in (ONE, OTHER):
        queue.loaded(job, 4.0)
        queue.ran(job, 1.0)
    queue.retain({ONE})
    ours, other = tick(ONE, 0), tick(OTHER, 0)
    assert queue.claimed_at(ours) < queue.claimed_at(other)
    assert queue.may_follow(ours)
    assert not queue.may_follow(other)


def test_what_was_perhaps_claimed_is_asked_for_after_the_next_look():
    """Until it is taken, whether that lists it or not; a look from before says nothing of it."""
    first, other = tick(ONE, 0), tick(OTHER, 1)
    queue = queue_of(first, other, asked=1.0)
    queue.take(first)
    queue.doubt(first, clock=5.0)
    queue.found([other], 4.0, ())
    assert queue.first(any_run, 0.0) is other
    queue.found([other], 6.0, ())
    assert queue.first(any_run, 0.0) is first
    queue.found([other], 7.0, ())
    assert queue.first(any_run, 0.0) is first, "there was no room for it"
    queue.take(first)
    queue.through(first.id, clock=8.0)
    queue.found([other], 9.0, ())
    assert queue.first(any_run, 0.0) is other


def test_what_was_perhaps_claimed_and_is_in_hand_is_not_asked_for():
    """A look has found it since."""
    first = tick(ONE, 0)
    queue = queue_of()
    queue.doubt(first, clock=5.0)
    queue.found([], 6.0, {first.id})
    assert queue.first(any_run, 0.0) is None


def test_what_was_tried_is_no_reason_to_wait():
    """An agent that runs once leaves to others what could not begin here."""
    tried, other = tick(ONE, 1), tick(OTHER, 1)
    queue = queue_of(tried, other)
    assert queue.try_later(tried.id, clock=0.0) == 0
    assert queue.has_untried
    queue.take(other)
    assert not queue.has_untried
    assert queue.try_later(tried.id, clock=0.0) == 1
