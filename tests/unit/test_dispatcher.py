"""In which order the ticks of a job begin."""

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent.dispatcher import Dispatcher, RunInHand
from taskadapter.agent.jobs import Deployments
from taskadapter.agent.runs import Life, Phase, give_back
from tests.unit.given import tick

LOG = logging.getLogger("test")


class Process:
    """Remembers whether it may go on."""

    released = False

    def go(self):
        self.released = True


def new_dispatcher() -> Any:
    """A dispatcher that has nothing to do."""
    agent: Any = SimpleNamespace(client=None, log=LOG)
    return Dispatcher(agent, None, Deployments(None, LOG), None)


def in_hand(*begun, planned=True):
    """A dispatcher with ticks of one job, a second apart; each has begun or not, and waits in a process."""
    dispatcher = new_dispatcher()
    job_id = uuid4()
    runs = []
    for n, has in enumerate(begun):
        flow_run = tick(job_id, n, planned)
        process: Any = Process()
        runs.append(RunInHand(flow_run, life=Life(Phase.BEGUN if has else Phase.FORKED), host=process))
        dispatcher._in_hand[flow_run.id] = runs[-1]
    dispatcher._release()
    hosts: list[Any] = [run.host for run in runs]
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


def test_runs_by_hand_wait_for_nobody():
    """What somebody asks for has no place in the order."""
    assert in_hand(False, False, planned=False) == [True, True]


@pytest.mark.parametrize("waits", [True, False])
def test_a_tick_that_waits_for_its_turn_is_not_passed_over(waits):
    """The answer to a look from before it was put off has it still, and one that is through not."""
    dispatcher = new_dispatcher()
    first, second = (tick(uuid4(), seconds) for seconds in (1, 2))
    dispatcher._in_hand[first.id] = RunInHand(first)

    async def decide(run):
        if waits:
            dispatcher._queue.put(run.flow_run)

    dispatcher._decide = decide
    asked = time.monotonic()
    asyncio.run(dispatcher._handle(dispatcher._in_hand[first.id]))
    dispatcher.found([first, second], asked)

    waiting = {run.id for run in dispatcher._queue.firsts()}
    assert waiting == ({first.id, second.id} if waits else {second.id})


@pytest.mark.parametrize("dropped", [True, False])
def test_a_tick_that_is_put_back_is_not_passed_over(dropped):
    """It stays the first of its job, unless this agent is to begin nothing more: older answers lack it."""
    dispatcher = new_dispatcher()
    job_id = uuid4()
    first, second = (tick(job_id, seconds) for seconds in (1, 2))
    run = dispatcher._in_hand[first.id] = RunInHand(first, life=Life(dropped=dropped))

    async def told(*_):
        pass

    dispatcher._teller.put_back = told
    dispatcher._decide = lambda run: dispatcher._give_back(run, give_back(run.life))
    asked = time.monotonic()
    asyncio.run(dispatcher._handle(run))
    dispatcher.found([second], asked)

    assert [found.id for found in dispatcher._queue.firsts()] == [second.id if dropped else first.id]
    dispatcher.found([second], time.monotonic())
    assert [found.id for found in dispatcher._queue.firsts()] == [second.id]
