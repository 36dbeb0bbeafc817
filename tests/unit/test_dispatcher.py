"""What a claimed run goes back to that this agent does not begin."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Completed, Pending

from taskadapter.coordination.messages import Token
from taskadapter.deployments import Deployments
from taskadapter.dispatcher import Dispatcher, RunInHand

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
LOG = logging.getLogger("test")


class Api:
    """Has one run, as it is by now, and keeps the states that it is told."""

    def __init__(self, run_count):
        self.run = FlowRun(id=uuid4(), flow_id=uuid4(), expected_start_time=NOON, run_count=run_count)
        self.told = []

    async def read_flow_run(self, _):
        return self.run

    async def read_flow_run_states(self, _):
        return [Pending(), Completed(), Pending()]

    async def set_flow_run_state(self, _, state, force=False):
        self.told.append((state.type, force))


def put_back(api, token=None):
    """Give back a run that was found before anybody had run it."""
    node = SimpleNamespace(client=api, log=LOG)
    dispatcher = Dispatcher(node, None, Deployments(api, LOG), None)
    found = api.run.model_copy(update={"run_count": 0})
    asyncio.run(dispatcher._put_back(RunInHand(found, token)))
    return api.told


@pytest.mark.parametrize("token", [None, Token("group", "node-1", 1)])
def test_what_nobody_has_run_is_due_again(token):
    """It is made due for the next agent, whatever its group."""
    assert put_back(Api(run_count=0), token) == [(StateType.SCHEDULED, True)]


def test_what_another_agent_has_run_is_not_due_again():
    """Of two agents on one queue the slower may claim a run that is over: it gets its final state back."""
    assert put_back(Api(run_count=1)) == [(StateType.COMPLETED, True)]


# --- the order of a job's ticks -------------------------------------------------------------------


class Process:
    """Remembers whether it may go on."""

    released = False

    def go(self):
        self.released = True


def in_hand(*begun, planned=True):
    """A dispatcher with ticks of one job, a second apart; each has begun or not, and waits in a process."""
    deployments = Deployments(None, LOG)
    dispatcher = Dispatcher(SimpleNamespace(client=None, log=LOG), None, deployments, None)
    job_id = uuid4()
    runs = []
    for n, has in enumerate(begun):
        due = NOON + timedelta(seconds=n)
        flow_run = FlowRun(
            id=uuid4(),
            flow_id=uuid4(),
            deployment_id=job_id,
            expected_start_time=due,
            auto_scheduled=planned,
        )
        runs.append(RunInHand(flow_run, host=Process(), begun=has))
        dispatcher._in_hand[flow_run.id] = runs[-1]
    dispatcher._release()
    return [run.host.released for run in runs]


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
