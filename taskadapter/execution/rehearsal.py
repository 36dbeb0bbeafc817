"""What the nursery does once, for nothing, so that no run does it again: the first use of many things.

Prefect's models are completed when they are first used, expressions are compiled, a database's dialect
asks which server that is. A process that is forked has all that its nursery has made: of the CPU that a
short run takes, a sixth.
"""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import SyncClientContext
from prefect.exceptions import Abort
from prefect.flow_engine import run_flow
from prefect.settings import get_current_settings
from prefect.states import Pending

if TYPE_CHECKING:
    from collections.abc import Iterator


def rehearse_run() -> None:
    """Run a flow up to its body, with an API that is played here.

    From there on Prefect's engine uses threads, which no process that is forked would have.
    """

    @flow(name="rehearsal")
    def body() -> None:
        raise Abort("the rehearsal is over")

    flow_run = FlowRun(id=uuid4(), flow_id=uuid4(), state=Pending())
    storage = get_current_settings().results.local_storage_path
    played = {"transport": httpx.MockTransport(lambda request: _answer(request, flow_run))}
    with _unheard(), SyncClientContext(httpx_settings=played), contextlib.suppress(Abort):
        run_flow(body.with_options(result_storage=storage, persist_result=False), flow_run=flow_run)


def _answer(request: httpx.Request, flow_run: FlowRun) -> httpx.Response:
    """Answer a request of the engine's as the API would, if all is well."""
    if request.url.path.endswith("/set_state"):
        state = flow_run.model_dump(mode="json")["state"] | json.loads(request.content)["state"]
        return httpx.Response(
            201, json={"state": state, "status": "ACCEPT", "details": {"type": "accept_details"}}
        )
    return httpx.Response(200, json=flow_run.model_dump(mode="json"))


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Log nothing: nobody is to take this for a run."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
