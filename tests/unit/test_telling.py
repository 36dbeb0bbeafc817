"""What the agent tells the API of runs whose process could not."""

import asyncio
import logging
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Completed, Crashed, Running

from taskadapter.agent import telling
from taskadapter.agent.telling import Teller

LOG = logging.getLogger("test")


class Api:
    """Has one run in a state, keeps what it is told, and refuses as often as it is asked to."""

    def __init__(self, state=None, *, status=None, refusals=0):
        self.state = state
        self.status = status
        self.refusals = refusals
        self.told = []
        self.times = []

    async def read_flow_run(self, run_id):
        return FlowRun(id=run_id, flow_id=uuid4(), state=self.state)

    async def set_flow_run_state(self, _, state, force=False):
        self.told.append((state.name, state.message, force))
        self.times.append(state.state_details.scheduled_time)
        if self.refusals:
            self.refusals -= 1
            request = httpx.Request("POST", "http://api")
            response = httpx.Response(self.status, request=request)
            raise PrefectHTTPStatusError("refused", request=request, response=response)
        return SimpleNamespace(status=SetStateStatus.ACCEPT)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nobody waits before the API is asked again."""
    monkeypatch.setattr(telling, "RETRY_SECONDS", 0)


RUN = FlowRun(id=uuid4(), flow_id=uuid4())
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def report(api, state, **options):
    return asyncio.run(Teller(api, LOG).report(RUN, state, **options))


@pytest.mark.parametrize("patient", [True, False])
def test_a_run_that_was_deleted_is_not_put_back(patient):
    """Prefect's client raises one fault for an update of it, and another for a new state."""

    class Empty(Api):
        async def update_flow_run(self, *_, **__):
            request = httpx.Request("PATCH", "http://api")
            response = httpx.Response(404, request=request)
            raise PrefectHTTPStatusError("gone", request=request, response=response)

        async def set_flow_run_state(self, *_, **__):
            raise ObjectNotFound(ValueError("gone"))

    tick = RUN.model_copy(update={"auto_scheduled": True})
    api: Any = Empty()

    async def put_back() -> None:
        async with asyncio.timeout(5):
            await Teller(api, LOG, patient=patient).put_back(tick, NOON)

    asyncio.run(put_back())


@pytest.mark.parametrize(
    ("said", "told"),
    [("byte \0 in the header", r"byte \0 in the header"), ("no caf\udce9", r"no caf\udce9")],
    ids=["NUL", "a file's name that is not UTF-8"],
)
def test_what_cannot_be_kept_is_written_out(said, told):
    """A message that PostgreSQL could not keep, or that cannot be sent, is told in a form that can be."""
    api = Api()

    assert report(api, Crashed(message=said))
    assert api.told == [("Crashed", told, False)]


def test_a_message_that_is_refused_for_good():
    """The state is told without its message; nothing is repeated for ever."""
    api = Api(status=422, refusals=1)

    assert report(api, Crashed(message="too long"))
    assert [name for name, _, _ in api.told] == ["Crashed", "Crashed"]
    assert api.told[-1][1] == telling._UNTELLABLE


def test_what_is_due_again_keeps_its_time():
    """Whatever of it is refused."""
    api: Any = Api(status=422, refusals=1)

    asyncio.run(Teller(api, LOG).put_back(RUN, NOON))
    assert api.times == [NOON, NOON]


def test_an_api_that_fails_refuses_nothing():
    """Whoever is impatient hears of it, and tells all of it the next time."""
    api: Any = Api(status=500, refusals=1)
    teller = Teller(api, LOG, patient=False)

    with pytest.raises(httpx.HTTPStatusError):
        asyncio.run(teller.put_back(RUN, NOON))
    assert api.times == [NOON]


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


def test_a_run_that_is_another_nodes_by_now_is_not_put_back():
    """It would begin again there, if somebody has asked for it and it has run meanwhile."""
    api: Any = Api(status=503, refusals=9)

    def is_ours() -> bool:
        return len(api.told) < 3

    asyncio.run(Teller(api, LOG).put_back(RUN, NOON, is_ours=is_ours))
    assert len(api.told) == 3


def test_runs_that_cannot_be_told_of_are_one_line(caplog):
    """However many wait, it is said once that they do, and once that none does any more."""
    caplog.set_level(logging.INFO)
    api: Any = Api(status=503, refusals=6)
    teller = Teller(api, LOG)

    async def tell_of_three() -> None:
        await asyncio.gather(*(teller.report(RUN, Crashed(message="boom")) for _ in range(3)))

    asyncio.run(tell_of_three())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


# --- what a run is told to have come to -----------------------------------------------------------


class History(Api):
    """Knows which states its run has had."""

    def __init__(self, *states):
        super().__init__()
        self.states = states

    async def read_flow_run_states(self, _):
        return list(self.states)


def tell(api, outcome):
    entry: Any = SimpleNamespace(outcome=outcome, where="on node 'node-1'")
    asyncio.run(Teller(api, LOG).tell(RUN, entry))
    return api.told


def test_a_run_that_has_been_claimed_after_its_end():
    """It gets the very state back that it had come to."""
    once: State = Completed(message="All well")
    assert tell(History(Running(), once, Running()), "Completed") == [("Completed", "All well", True)]


def test_a_run_whose_end_was_never_told():
    """It is told where the run was executed."""
    ((name, message, force),) = tell(History(Running(), Crashed()), "Completed")
    assert (name, "node-1" in message, force) == ("Completed", True, True)
