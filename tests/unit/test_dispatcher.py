"""In which order the ticks of a job begin."""

import logging
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from taskadapter.deployments import Deployments
from taskadapter.dispatcher import Dispatcher, RunInHand

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
LOG = logging.getLogger("test")


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
