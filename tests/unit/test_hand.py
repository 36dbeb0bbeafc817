"""In which order the ticks of a job begin, and what reaches those that have not."""

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent.hand import Hand
from taskadapter.agent.runs import Life, Phase, PutBack, Signal, give_back
from taskadapter.coordination.messages import Token
from tests.unit.given import tick


class Process:
    """Remembers whether it may go on."""

    released = False

    def go(self):
        self.released = True

    def heed(self, sign):
        self.told = sign


def in_hand(*begun, planned=True):
    """Ticks of one job, a second apart; each has begun or not, and waits in a process."""
    hand, job_id = Hand(lambda _: None), uuid4()
    hosts: list[Any] = []
    for n, has in enumerate(begun):
        run = hand.take(tick(job_id, n, planned), None)
        run.life = Life(Phase.BEGUN if has else Phase.FORKED)
        process: Any = Process()
        run.host = process
        hosts.append(process)
    hand.let_begin()
    return [host.released for host in hosts]


@pytest.mark.parametrize(
    ("begun", "released"),
    [
        ([False, False, False], [True, False, False]),
        ([True, False, False], [True, True, False]),
        ([True, True, False], [True, True, True]),
    ],
)
def test_ticks_begin_in_their_order(begun, released):
    """A tick whose process is ready waits for the body of the one before it."""
    assert in_hand(*begun) == released


def serial(_):
    """A job that allows one run at once."""
    job: Any = SimpleNamespace(trigger="ours", max_concurrent=1)
    return job


def test_a_tick_waits_until_those_before_it_are_over():
    """As many as its job allows; that they have begun is not enough."""
    hand, job_id = Hand(serial), uuid4()
    first, second = (hand.take(tick(job_id, seconds), None) for seconds in (0, 1))
    process: Any = Process()
    second.host = process
    assert hand.is_its_turn(first)
    first.life = Life(Phase.BEGUN)
    hand.let_begin()
    assert not process.released
    hand.put_down(first)
    assert process.released


def test_a_tick_waits_for_what_somebody_asked_for():
    """Such a run has one of the places of the job, whenever it was to begin."""
    hand, job_id = Hand(serial), uuid4()
    by_hand = hand.take(tick(job_id, 5, planned=False), None)
    follower = hand.take(tick(job_id, 1), None)

    assert not hand.is_its_turn(follower)
    hand.put_down(by_hand)
    assert hand.is_its_turn(follower)


def test_room_is_made_of_what_waits_for_others_of_its_job():
    """It is given back, and is taken here again; what has its place goes on."""
    hand, job_id, other = Hand(serial), uuid4(), uuid4()
    taken = [hand.take(tick(id_, n), None) for id_, n in ((job_id, 0), (job_id, 1), (other, 2))]
    processes: list[Any] = [Process() for _ in taken]
    for run, process in zip(taken, processes, strict=True):
        run.host, run.life = process, Life(Phase.FORKED)
    hand.make_room()

    assert [run.life.deferred for run in taken] == [False, True, False]
    assert processes[1].told is Signal.DROP
    assert give_back(taken[1].life) == PutBack(keep=True)


def test_runs_by_hand_wait_for_nobody():
    """What somebody asks for has no place in the order."""
    assert in_hand(False, False, planned=False) == [True, True]


def test_runs_of_a_plain_deployment_have_no_order():
    """Its schedule is no trigger of ours."""
    plain: Any = SimpleNamespace(trigger=None)
    job_id = uuid4()
    ours: Any = SimpleNamespace(trigger="ours")
    hand = Hand(lambda run: plain if run.deployment_id == job_id else ours)
    hand.take(tick(job_id, 0), None)
    second = hand.take(tick(job_id, 1), None)

    assert hand.is_its_turn(second)


def test_a_run_that_is_over_lets_the_next_one_begin():
    """It need not have begun itself."""
    hand, job_id = Hand(lambda _: None), uuid4()
    first, second = (hand.take(tick(job_id, seconds), None) for seconds in (0, 1))
    process: Any = Process()
    second.host = process
    hand.let_begin()
    assert not process.released
    hand.put_down(first)
    assert process.released
    assert first not in hand
    assert [run.flow_run for run in hand] == hand.flow_runs == [second.flow_run]
    assert len(hand) == 1


def test_a_job_that_is_over_has_its_ticks_called_off():
    """Runs by hand go on, and those of other jobs."""
    hand, job_id = Hand(lambda _: None), uuid4()
    runs = [hand.take(tick(job_id, 0), None), hand.take(tick(job_id, 0, planned=False), None)]
    runs.append(hand.take(tick(uuid4(), 0), Token("group", "node-1", 1)))
    hand.call_off(job_id, "it is over")

    assert [run.life.called_off for run in runs] == ["it is over", None, None]
    planned_anew = hand.take(tick(job_id, 9), None)
    hand.call_off(job_id, "it is over", lambda run: run is not planned_anew.flow_run)
    assert planned_anew.life.called_off is None


def test_siblings_are_of_the_same_job():
    """Also of a run that is not in hand."""
    hand, job_id = Hand(lambda _: None), uuid4()
    mine, _ = hand.take(tick(job_id, 0), None), hand.take(tick(uuid4(), 0), None)

    assert hand.siblings(tick(job_id, 1)) == [mine]


def test_a_cancellation_is_for_a_run_that_has_a_process():
    """Before, and for a run that is elsewhere, there is nothing to cancel."""
    hand = Hand(lambda _: None)
    run = hand.take(tick(uuid4(), 0), None)
    hand.cancel(run.flow_run.id)
    hand.cancel(uuid4())
    assert run.life.cancelled is None
    process: Any = Process()
    run.host, run.life = process, Life(Phase.FORKED)
    hand.cancel(run.flow_run.id)
    assert run.life.cancelled is not None
    assert process.told is Signal.CANCEL


def test_a_run_is_taken_under_the_token_of_now():
    """It goes on under that one, whatever the node gains later."""
    token = Token("group", "node-1", 1)
    assert Hand(lambda _: None).take(tick(uuid4(), 0), token).token == token
