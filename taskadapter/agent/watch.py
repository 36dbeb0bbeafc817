"""What an agent does about runs that go on: Prefect's heartbeats, cancellations, those that do not end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.settings import get_current_settings

from taskadapter.agent import events, runs
from taskadapter.prefect_api.client import API_FAULTS

if TYPE_CHECKING:
    from taskadapter.agent.hand import Hand, RunInHand
    from taskadapter.agent.node import Node

WATCH_SECONDS = 2.0
"""How often the agent looks after its runs, and asks whether one is to be cancelled."""

HEARING_WATCHES = 8
"""An agent that hears of a cancellation asks at each eighth time only."""


class Watch:
    """Looks after the runs in hand.

    Args:
        node: whose runs they are.
        hand: the runs.
        hears: returns whether the agent hears of a cancellation.
    """

    def __init__(self, node: Node, hand: Hand, hears: Callable[[], bool]) -> None:
        self._client = node.client
        self._log = node.log
        self._hand = hand
        self._hears = hears

    async def watch(self) -> None:
        """Look after the runs that are going on, as long as the agent lives."""
        for watch in itertools.count():
            await asyncio.sleep(WATCH_SECONDS)
            since = datetime.now(UTC) - timedelta(seconds=WATCH_SECONDS)
            going_on = [run for run in self._hand if run.host is not None and run.due < since]
            try:
                for run in going_on:
                    run.meet(runs.Watched(time.monotonic()))
                self._send_heartbeats(going_on)
                if going_on and (watch % HEARING_WATCHES == 0 or not self._hears()):
                    await self._cancel_what_is_to_be(going_on)
            except API_FAULTS as fault:
                self._log.debug("Could not look for cancelled runs: %s", fault)

    def _send_heartbeats(self, going_on: Iterable[RunInHand]) -> None:
        seconds = get_current_settings().flows.heartbeat_frequency
        for run in going_on:
            if seconds and run.heartbeat is not None and time.monotonic() - run.heartbeat >= seconds:
                send_heartbeat(run)

    async def _cancel_what_is_to_be(self, going_on: list[RunInHand]) -> None:
        cancelling = await self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                id=FlowRunFilterId(any_=[run.flow_run.id for run in going_on]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
            )
        )
        for flow_run in cancelling:
            self._hand.cancel(flow_run.id)


def send_heartbeat(run: RunInHand) -> None:
    """Emit a run's heartbeat, and note when."""
    run.heartbeat = time.monotonic()
    events.run_goes_on(run.flow_run)
