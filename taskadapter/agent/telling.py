"""Tells Prefect's API what became of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from logging import Logger, LoggerAdapter
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateDetails, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from taskadapter.agent import runs
from taskadapter.coordination.executions import Entry
from taskadapter.errors import printable
from taskadapter.prefect_api.client import API_FAULTS, in_words, is_gone
from taskadapter.rules import ticks

RETRY_SECONDS = 2.0
"""How long to wait before the API is told again what it could not be told."""

_REFUSALS = {
    httpx.codes.BAD_REQUEST,
    httpx.codes.REQUEST_ENTITY_TOO_LARGE,
    httpx.codes.UNPROCESSABLE_ENTITY,
}
"""What is answered to a request that would be refused again; others may succeed later."""

_UNTELLABLE = "The agent's log has the message, which the API has refused."


class Teller:
    """Tells the API what an agent knows of a run.

    Args:
        client: connected to it.
        log: the agent's.
        patient: whether to repeat a call until the API has taken it, however long that takes; else a
            fault of the API is raised.
    """

    def __init__(
        self, client: PrefectClient, log: Logger | LoggerAdapter[Any], *, patient: bool = True
    ) -> None:
        self._client = client
        self._log = log
        self._patient = patient
        self._waiting: set[Any] = set()

    async def state_of(self, flow_run: FlowRun) -> StateType | None:
        """Return the type of the state that a run has now; None if it is gone."""
        now = await self.until_told(lambda: self._client.read_flow_run(flow_run.id))
        return None if now is None else now.state_type

    async def put_back(
        self,
        flow_run: FlowRun,
        due: datetime,
        message: str | None = None,
        *,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """Make a run that has begun nothing due again.

        Args:
            flow_run: the run.
            due: when it is due.
            message: why it has not begun; None if that needs no word.
            is_ours: as for `until_told`: it would begin again after another node has run it.
        """
        if ticks.is_tick(flow_run):
            # Once it has ended for Prefect, it would be taken for one that a person wants to be retried.
            policy = flow_run.empirical_policy.model_copy(update={"retry_type": None})
            await self.until_told(
                lambda: self._client.update_flow_run(flow_run.id, empirical_policy=policy), is_ours
            )
        state: State[Any] = Scheduled(scheduled_time=due, message=message)
        await self.report(flow_run, state, force=True, is_ours=is_ours)

    async def tell(self, flow_run: FlowRun, entry: Entry) -> None:
        """Tell the API what a run came to, as it knew it before if it did."""
        states = await self.until_told(lambda: self._client.read_flow_run_states(flow_run.id))
        told = runs.state_of(entry)
        final = [state for state in states or [] if state.type is told.type]
        await self.report(flow_run, max(final, key=lambda state: state.timestamp, default=told), force=True)

    async def skip(self, flow_run: FlowRun, reason: str) -> None:
        """Record that a tick was not run, and why."""
        await self.until_told(
            lambda: self._client.set_flow_run_state(flow_run.id, ticks.skipped(reason), force=True)
        )

    async def report(
        self,
        flow_run: FlowRun,
        state: State[Any],
        *,
        force: bool = False,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Tell the API of a state that only the agent knows; returns whether it has taken it.

        One that it refuses for good is told again in the barest form.

        Args:
            flow_run: the run.
            state: its state.
            force: whether it is so whatever the API has of the run.
            is_ours: as for `until_told`.

        Raises:
            HTTPError: as any of `API_FAULTS`: the API does not answer an impatient teller.
        """
        for told in (_printable(state), _bare(state)):
            try:
                answer = await self.until_told(
                    lambda told=told: self._client.set_flow_run_state(flow_run.id, told, force=force),
                    is_ours,
                )
            except httpx.HTTPStatusError as refusal:
                if not _is_for_good(refusal):
                    raise
                self._log.warning(
                    "Prefect's API refuses state %s of run %s: %s",
                    state.name,
                    flow_run.name,
                    in_words(refusal),
                )
            else:
                return answer is not None and answer.status is SetStateStatus.ACCEPT
        return False

    async def until_told(self, tell: Any, is_ours: Callable[[], bool] = lambda: True) -> Any:
        """Repeat a call while the API does not answer; returns None where what it is about is gone.

        A job that is over must not come back, and a run that is claimed must not be left.

        Args:
            tell: the call.
            is_ours: returns whether this node is still to make it; where it is not, None is returned.

        Raises:
            HTTPStatusError: the API refuses it for good.
            HTTPError: as any of `API_FAULTS`: the API does not answer an impatient one.
        """
        try:
            while is_ours():
                try:
                    return await tell()
                except (ObjectNotFound, *API_FAULTS) as fault:
                    if is_gone(fault):
                        return None
                    if not self._patient or _is_for_good(fault):
                        raise
                    self._wait(tell, fault)
                await asyncio.sleep(RETRY_SECONDS)
            return None
        finally:
            self._wait_no_more(tell)

    def _wait(self, tell: Any, fault: Exception) -> None:
        """Say that the API is not told, once for all that waits for it."""
        if not self._waiting:
            self._log.warning(
                "Prefect's API cannot be told of a run's state, trying again: %s", in_words(fault)
            )
        self._waiting.add(tell)

    def _wait_no_more(self, tell: Any) -> None:
        if tell in self._waiting:
            self._waiting.remove(tell)
            if not self._waiting:
                self._log.info("Nothing waits to be told to Prefect's API any more.")


def _printable(state: State[Any]) -> State[Any]:
    """Return the state with a message that can be sent, and that a database can keep."""
    message = state.message
    return state if message is None else state.model_copy(update={"message": printable(message)})


def _bare(state: State[Any]) -> State[Any]:
    """Return as little of the state as makes it what it is: one that is scheduled has its time."""
    details = StateDetails(scheduled_time=state.state_details.scheduled_time)
    return State(type=state.type, name=state.name, message=_UNTELLABLE, state_details=details)


def _is_for_good(fault: Exception) -> bool:
    """Return whether an answer would be the same the next time."""
    return isinstance(fault, httpx.HTTPStatusError) and fault.response.status_code in _REFUSALS
