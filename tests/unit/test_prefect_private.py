"""Prefect's private names: each is where we look for it and does what we rely on."""

import asyncio
import inspect
import json
import logging
import os
import signal
import ssl
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import flow, flow_engine, states
from prefect._internal import control_listener
from prefect._internal.schemas import validators
from prefect.cli.deploy import _commands
from prefect.client import orchestration
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.context import AsyncClientContext, SyncClientContext
from prefect.exceptions import Abort
from prefect.logging.handlers import APILogHandler
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
    PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
    get_current_settings,
    temporary_settings,
)
from prefect.states import Completed, Crashed, Failed, Pending, Running
from prefect.utilities import engine

from taskadapter.execution import rehearsal
from taskadapter.prefect_api import private


@pytest.fixture
def no_intent():
    """No intent before the test, and none left after it."""
    control_listener.clear_intent()
    yield
    control_listener.clear_intent()


def test_without_an_intent_there_is_none(no_intent):
    """A process that nobody cancels has no intent, so a SIGTERM is a crash."""
    assert control_listener.get_intent() is None


def test_intend_cancellation(no_intent):
    """The engine reads back the intent as the cancellation it acts on."""
    private.intend_cancellation()

    assert control_listener.get_intent() == "cancel"


def test_an_intent_is_cleared(no_intent):
    """The intent of one run does not outlive it, when cleared by Prefect's own function."""
    private.intend_cancellation()
    control_listener.clear_intent()

    assert control_listener.get_intent() is None


def test_the_engine_asks_the_module_that_we_tell():
    """Prefect's flow engine and its bridge from SIGTERM consult this very intent."""
    engines: Any = flow_engine
    assert engines.get_intent is control_listener.get_intent
    assert "control_listener.get_intent()" in inspect.getsource(engine.capture_sigterm)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_run_is_named_without_a_request_of_its_own(is_async, monkeypatch):
    """The engine updates each run that it is given once, before it begins, and reads it after that."""
    for client in (orchestration.PrefectClient, orchestration.SyncPrefectClient):
        monkeypatch.setattr(client, "update_flow_run", client.update_flow_run)  # and put back
    flow_run = FlowRun(id=uuid4(), flow_id=uuid4(), state=Pending())
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if request.method == "GET":
            raise Abort("as far as this")
        return rehearsal._answer(request, flow_run)

    def body() -> None: ...

    async def body_async() -> None: ...

    played = {"transport": httpx.MockTransport(answer)}
    private.name_run(flow_run.id, "job 2030-01-01T12:00:00Z")
    storage = get_current_settings().results.local_storage_path
    named: Any = flow(result_storage=storage, persist_result=False)(body_async if is_async else body)

    async def go() -> None:
        with SyncClientContext(httpx_settings=played):
            async with AsyncClientContext(httpx_settings=played):
                running: Any = flow_engine.run_flow(named, flow_run=flow_run)
                await running

    settings = {
        PREFECT_API_URL: "http://127.0.0.1:9/api",
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,
    }
    with temporary_settings(settings), pytest.raises(Abort):
        asyncio.run(go())

    update, *_, read = asked
    assert [request.method for request in asked].count("PATCH") == 1
    assert (update.method, read.method) == ("PATCH", "GET")
    assert json.loads(update.content)["name"] == "job 2030-01-01T12:00:00Z"


def test_this_process_does_not_deploy():
    """Where `prefect deploy` does not run, nothing is being deployed."""
    assert private.is_being_deployed() is False


def test_prefect_deploy_is_recognized(monkeypatch):
    """The module by which we know `prefect deploy` is the one that its command imports."""
    assert "from prefect.cli.deploy._core import" in inspect.getsource(_commands.deploy)
    assert find_spec("prefect.cli.deploy._core") is not None

    monkeypatch.setitem(sys.modules, "prefect.cli.deploy._core", ModuleType("_core"))
    assert private.is_being_deployed() is True


@pytest.mark.parametrize("command", ["worker start --help", "deploy --help"])
def test_other_commands_do_not_deploy(command):
    """Prefect's other commands, an agent's above all, do not look like a deploy."""
    script = (
        "import sys, contextlib, io\n"
        f"sys.argv = ['prefect', *{command.split()}]\n"
        "from prefect.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): app()\n"
        "from taskadapter.prefect_api import private\n"
        "print(private.is_being_deployed())\n"
    )

    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert run.stdout == "False\n"


def test_clients_share_a_tls_context(monkeypatch):
    """Two of Prefect's clients verify servers by one and the same context."""
    monkeypatch.setattr(orchestration, "ssl", ssl)
    private.share_tls_context()
    made = []
    load = ssl.SSLContext.load_verify_locations

    def loads(self, *args, **options):
        made.append(self)
        return load(self, *args, **options)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", loads)

    for _ in range(2):
        orchestration.PrefectClient("http://127.0.0.1:9/api")

    assert len(made) == 1
    assert made[0].verify_mode is ssl.CERT_REQUIRED


def test_a_sigterm_is_heeded_only_if_it_is_meant(monkeypatch):
    """The engine's handler, which it installs by this name, ends a run only where we say so."""
    monkeypatch.setattr(engine, "_prefect_sigterm_handler", engine._prefect_sigterm_handler)
    answers = iter([False, True])
    private.heed_sigterm_only_if(lambda: next(answers))

    with pytest.raises(SystemExit), engine.capture_sigterm():  # noqa: PT012
        assert signal.getsignal(signal.SIGTERM) is engine._prefect_sigterm_handler
        os.kill(os.getpid(), signal.SIGTERM)
        went_on = True
        monkeypatch.setattr(os, "kill", lambda *_: sys.exit(0))
        signal.raise_signal(signal.SIGTERM)
    assert went_on


class TestUntold:
    """Where the engine cannot tell the API of a state that a run has come to."""

    RUN = uuid4()

    @pytest.fixture(params=["sync", "async"])
    def propose(self, request, monkeypatch):
        """Propose a state as either engine does, to an API that does not answer."""

        def refuse(*_, **__):
            raise httpx.ConnectError("nobody there")

        async def refuse_async(*_, **__):
            refuse()

        monkeypatch.setattr(flow_engine, "propose_state_sync", refuse)
        monkeypatch.setattr(flow_engine, "propose_state", refuse_async)
        kept: list[State] = []
        private.abort_if_untold(self.RUN, kept.append)
        is_sync = request.param == "sync"
        engine: Any = (flow_engine.FlowRunEngine if is_sync else flow_engine.AsyncFlowRunEngine)(
            flow(lambda: 1)
        )
        engine._client, engine._is_started = object(), True

        def propose(state, run=self.RUN):
            engine.flow_run = SimpleNamespace(id=run, state=Running())
            done = engine.set_state(state)
            if not is_sync:
                asyncio.run(done)

        return propose, kept

    @pytest.mark.parametrize("state", [Completed(), Failed()], ids=str)
    def test_what_the_body_came_to_is_kept(self, propose, state):
        """And the engine ends there: it would take the fault for the body's."""
        propose, kept = propose

        with pytest.raises(Abort, match="nobody there"):
            propose(state)

        assert kept == [state]

    @pytest.mark.parametrize(("state", "run"), [(Running(), RUN), (Crashed(), RUN), (Completed(), uuid4())])
    def test_all_else_is_left_to_the_engine(self, propose, state, run):
        """What is no outcome of the body, and runs that the run has started."""
        propose, kept = propose

        with pytest.raises(httpx.ConnectError):
            propose(state, run)

        assert kept == []


@pytest.fixture
def escaping(monkeypatch):
    """As in the process of a run; not after the test."""
    for name in ("to_state_create", "format_exception"):
        monkeypatch.setattr(states, name, getattr(states, name))
    monkeypatch.setattr(APILogHandler, "format", APILogHandler.format)
    private.escape_what_cannot_be_sent()


@pytest.mark.parametrize("is_sync", [True, False], ids=["sync", "async"])
def test_a_state_is_sent_whatever_its_message_holds(escaping, is_sync):
    """Prefect's clients read what makes the request of it in the module that we tell."""
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content)["state"]["message"])
        return httpx.Response(201, json={"status": "ACCEPT", "details": {}, "state": None})

    state: State[Any] = Failed(message="ValueError: caf\udce9")
    settings = {
        PREFECT_API_URL: "http://api.test/api",
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False,
        PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,
    }
    with temporary_settings(settings):
        client: Any = orchestration.get_client(sync_client=is_sync)
        client._client._transport, client._client._mounts = httpx.MockTransport(answer), {}
        told = client.set_flow_run_state(uuid4(), state)
        if not is_sync:
            asyncio.run(told)
    assert sent == [r"ValueError: caf\udce9"]
    assert state.message == "ValueError: caf\udce9"


def test_a_failure_has_words_whatever_its_error_does(escaping):
    """The engine has them of the module that we tell."""

    class WordlessError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    state = asyncio.run(states.exception_to_failed_state(WordlessError()))
    assert state.message == "WordlessError: <its text cannot be shown>"


def test_a_line_is_sent_whatever_it_holds(escaping):
    """Prefect's worker for logs fails at it."""
    record = logging.LogRecord("run", logging.INFO, __file__, 1, "file %s", ("caf\udce9\0",), None)
    record.flow_run_id = uuid4()
    line = APILogHandler().prepare(record)
    assert line["message"] == r"file caf\udce9\0"


def test_time_zones_are_listed_once(monkeypatch):
    """Prefect's client looks at them for each schedule that it reads, in the module that we tell."""
    listed = []

    def zones():
        listed.append(1)
        return "UTC", "Europe/Berlin"

    monkeypatch.setattr(validators, "get_timezones", zones)
    private.remember_time_zones()
    for zone in ("UTC", "Europe/Berlin", "UTC"):
        assert IntervalSchedule(interval=timedelta(seconds=1), timezone=zone).timezone == zone

    assert listed == [1]


def test_requests_of_a_client_are_counted():
    """Each that is sent, whatever becomes of it."""
    sent = []

    async def ask() -> None:
        async with orchestration.get_client() as client:
            private.count_requests(client, lambda: sent.append(1))
            client._client._transport = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
            client._client._mounts = {}
            await client._client.get("/health")
            await client._client.get("/health")

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        asyncio.run(ask())
    assert len(sent) == 2
