"""What the agent tells the API of runs whose process could not."""

import asyncio
import logging
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelled, Completed, Crashed, Running

from taskadapter import deployments
from taskadapter.deployments import Deployments

LOG = logging.getLogger("test")


class Api:
    """Has one run in a state, keeps what it is told, and refuses as often as it is asked to."""

    def __init__(self, state=None, *, status=None, refusals=0):
        self.state = state
        self.status = status
        self.refusals = refusals
        self.told = []

    async def read_flow_run(self, run_id):
        return FlowRun(id=run_id, flow_id=uuid4(), state=self.state)

    async def set_flow_run_state(self, _, state, force=False):
        self.told.append((state.name, state.message, force))
        if self.refusals:
            self.refusals -= 1
            request = httpx.Request("POST", "http://api")
            response = httpx.Response(self.status, request=request)
            raise PrefectHTTPStatusError("refused", request=request, response=response)
        return SimpleNamespace(status=SetStateStatus.ACCEPT)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody waits before the API is asked again."""
    monkeypatch.setattr(deployments, "RETRY_SECONDS", 0)


RUN = FlowRun(id=uuid4(), flow_id=uuid4())


def report(api, state, **options):
    return asyncio.run(Deployments(api, LOG).report(RUN, state, **options))


def test_a_nul_is_written_out():
    """A message that PostgreSQL could not keep is told in a form that it can."""
    api = Api()

    assert report(api, Crashed(message="byte \0 in the header"))
    assert api.told == [("Crashed", "byte \\0 in the header", False)]


def test_a_message_that_is_refused_for_good():
    """The state is told without its message; nothing is repeated for ever."""
    api = Api(status=422, refusals=1)

    assert report(api, Crashed(message="too long"))
    assert [name for name, _, _ in api.told] == ["Crashed", "Crashed"]
    assert api.told[-1][1] == deployments._UNTELLABLE


def test_a_state_that_is_refused_for_good():
    """It is told twice, then no more."""
    api = Api(status=422, refusals=9)

    assert not report(api, Crashed(message="no"))
    assert len(api.told) == 2


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_refusal_that_passes(status):
    """What may be different the next time is told again until it is."""
    api = Api(status=status, refusals=3)

    assert report(api, Crashed(message="boom"))
    assert [message for _, message, _ in api.told] == ["boom"] * 4


@pytest.mark.parametrize("final", [Completed(), Crashed(message="told by the engine"), Cancelled()])
def test_a_run_that_has_ended_stays_so(final):
    """The process has told its end, and has run its hooks: neither happens again."""
    api = Api(final)

    assert not asyncio.run(Deployments(api, LOG).report_end(RUN, Crashed(message="exited with status 1")))
    assert api.told == []


@pytest.mark.parametrize(("state", "force"), [(Crashed(message="boom"), False), (Cancelled(), True)])
def test_the_end_of_a_run_that_goes_on(state, force):
    """Its end is told, and is news."""
    api = Api(Running())

    assert asyncio.run(Deployments(api, LOG).report_end(RUN, state))
    assert api.told == [(state.name, state.message, force)]
