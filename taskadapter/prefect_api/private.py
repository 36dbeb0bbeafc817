"""The private names of Prefect that we touch: all of them, each with its reason.

A test of each fails when Prefect moves it.
"""

from __future__ import annotations

import functools
import logging
import ssl
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from prefect import flow_engine, states
from prefect._internal import control_listener
from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.exceptions import Abort
from prefect.logging.handlers import APILogHandler

from taskadapter.errors import printable, words_of
from taskadapter.prefect_api.client import API_FAULTS, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from uuid import UUID

    import httpx
    from prefect.client.schemas.actions import StateCreate
    from prefect.client.schemas.objects import State


def intend_cancellation() -> None:
    """Tell Prefect's engine in this process that the coming SIGTERM means that the run is cancelled.

    Prefect's own runner says so over a socket that it opens for each process it starts; ours have one
    already. Without it the engine reports the run as Crashed, and runs the wrong hooks.
    """
    control_listener._set_intent("cancel")


def heed_sigterm_only_if(is_meant: Callable[[], bool]) -> None:
    """Have Prefect's engine end a run at a SIGTERM only if it is meant for the run, and go on otherwise.

    The engine ends it at any, also at one that all processes of a node get, whose agent lets its runs end.

    Args:
        is_meant: asked in the signal's handler.
    """
    from prefect.utilities import engine

    heed = engine._prefect_sigterm_handler

    @functools.wraps(heed)
    def handle(*args: Any) -> None:
        if is_meant():
            heed(*args)

    engine._prefect_sigterm_handler = handle  # type: ignore[assignment]


def abort_if_untold(flow_run_id: UUID, keep: Callable[[State[Any]], None]) -> None:
    """Have Prefect's engine end a run there where it cannot tell the API what its body came to.

    The engine takes that for a failure of the body: it tells that one instead, if it can by then, calls the
    hooks for it, and runs the body again if the flow has retries.

    Args:
        flow_run_id: the run; those that it starts itself are left to it.
        keep: gets the state that could not be told.
    """

    @contextmanager
    def guarded(state: State[Any], proposed_for: UUID) -> Iterator[None]:
        try:
            yield
        except API_FAULTS as fault:
            if proposed_for != flow_run_id or not (state.is_completed() or state.is_failed()):
                raise
            keep(state)
            raise Abort(f"state {state.name} could not be told: {in_words(fault)}") from fault

    engine: Any = flow_engine
    propose, propose_sync = engine.propose_state, engine.propose_state_sync

    async def propose_guarded(client: Any, state: State[Any], *, flow_run_id: UUID, **options: Any) -> Any:
        with guarded(state, flow_run_id):
            return await propose(client, state, flow_run_id=flow_run_id, **options)

    def propose_sync_guarded(client: Any, state: State[Any], *, flow_run_id: UUID, **options: Any) -> Any:
        with guarded(state, flow_run_id):
            return propose_sync(client, state, flow_run_id=flow_run_id, **options)

    engine.propose_state, engine.propose_state_sync = propose_guarded, propose_sync_guarded


def escape_what_cannot_be_sent() -> None:
    """Have this process send the states and logs of its run that hold what no encoding has.

    Such a text is that of an error with the name of a file that is not UTF-8. Prefect's client fails at it:
    the line is lost, and the engine goes out of its run without having told its end. It does the same where
    an error has no text, but one more error.
    """
    create, shown, lined = states.to_state_create, states.format_exception, logging.Handler.format

    def created(state: State[Any]) -> StateCreate:
        message = state.message and printable(state.message)
        return create(state.model_copy(update={"message": message}))

    def formatted(exc: BaseException, tb: TracebackType | None = None) -> str:
        try:
            return shown(exc, tb)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - it is the user's code
            return words_of(exc)

    def line(self: APILogHandler, record: logging.LogRecord) -> str:
        return printable(lined(self, record))

    states.to_state_create, states.format_exception = created, formatted
    APILogHandler.format = line  # type: ignore[assignment,method-assign]


def name_run(flow_run_id: UUID, name: str) -> None:
    """Have Prefect's engine name a run with the update that it makes of each, instead of with one more.

    Args:
        flow_run_id: the run.
        name: what it is called from then on, unless the flow names its runs itself.
    """

    def naming(update: Any) -> Any:
        @functools.wraps(update)
        def named(*args: Any, **changes: Any) -> Any:
            is_the_engines = changes.keys() >= {"flow_version", "empirical_policy"}
            if is_the_engines and changes.get("flow_run_id") == flow_run_id:
                changes = {"name": name, **changes}
            return update(*args, **changes)

        return named

    for kind in (PrefectClient, SyncPrefectClient):
        kind.update_flow_run = naming(kind.update_flow_run)  # type: ignore[method-assign]


_paused: set[UUID] = set()


def keep_paused(deployment_id: UUID) -> None:
    """Have ``prefect deploy`` leave a deployment paused, in this process: it resumes what it changes.

    Args:
        deployment_id: the deployment.
    """
    if not _paused:
        update = PrefectClient.update_deployment

        @functools.wraps(update)
        async def updating(self: PrefectClient, deployment_id: UUID, deployment: DeploymentUpdate) -> None:
            if deployment_id in _paused:
                deployment.paused = True
            await update(self, deployment_id, deployment)

        PrefectClient.update_deployment = updating  # type: ignore[method-assign,assignment]
    _paused.add(deployment_id)


def is_being_deployed() -> bool:
    """Return whether ``prefect deploy`` is what imports the flows of this process.

    It refuses a work pool that does not exist before any step of ``prefect.yaml`` can create it;
    importing the flow comes first.
    """
    return "prefect.cli.deploy._core" in sys.modules


def remember_time_zones() -> None:
    """Have Prefect's client list the time zones of the system once.

    It does so for each schedule that it reads, twice, to see whether that has a zone of them: 8 ms of CPU
    for each deployment, four fifths of what reading it costs.
    """
    from prefect._internal.schemas import validators

    ours: Any = validators
    ours.get_timezones = functools.cache(ours.get_timezones)


def count_requests(client: PrefectClient, count: Callable[[], None]) -> None:
    """Have each request of a client counted that is sent, repeated ones too."""

    async def hook(_: httpx.Request) -> None:
        count()

    client._client.event_hooks["request"].append(hook)


def share_tls_context() -> None:
    """Have Prefect's clients of this process, and of those forked from it, share one TLS context.

    Each client reads all certificates of the system anew: 26 ms of CPU, a fifth of a short run, and a run
    has two, one of them for its log.
    """
    from prefect.client import orchestration

    ours = vars(ssl) | {"create_default_context": functools.cache(ssl.create_default_context)}
    orchestration.ssl = SimpleNamespace(**ours)  # type: ignore[attr-defined,assignment]
