"""Which run is claimed next, and when: each job in its order, the earliest first."""

from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from taskadapter.agent.queue import CLAIM_AHEAD, LONGEST_LOAD_SECONDS, Queue, any_run
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


def test_what_fails_before_its_body_is_tried_later_each_time():
    """And forgotten once the run is gone."""
    run = tick(ONE, 1)
    queue = queue_of(run)
    waits = []
    for _ in range(3):
        queue.try_later(run.id, 100.0)
        waits.append(queue.next_try(100.0))
        assert queue.first(any_run, 100.0) is None
        assert queue.first(any_run, 100.0 + waits[-1]) is run

    assert waits == sorted(waits)
    assert waits[0] < waits[-1]
    queue.found([], asked=200.0, taken=())
    assert queue.next_try(100.0) is None


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
