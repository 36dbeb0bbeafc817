"""What a node does with the runs that its predecessor left behind, before it starts any of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Failed, Scheduled

from taskadapter import progress
from taskadapter.coordination.messages import Token
from taskadapter.deployments import Deployments

CLAIMED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


class Takeover:
    """Puts a group's house in order: at the beginning of a term, and from time to time in it.

    Args:
        client: connected to the API.
        deployments: reads the policies of the jobs.
        pool_name: the work pool's name.
        database_url: the coordination database.
        log: the agent's.
    """

    def __init__(
        self,
        client: PrefectClient,
        deployments: Deployments,
        pool_name: str,
        database_url: str,
        log: Logger | LoggerAdapter[Any],
    ) -> None:
        self._client = client
        self._deployments = deployments
        self._pool_name = pool_name
        self._database_url = database_url
        self._log = log
        self._suspects: dict[UUID, UUID | None] = {}

    async def clean_up(self, token: Token) -> None:
        """End what earlier holders were executing, and make due again what they had only claimed.

        It may be repeated: each step is done once.

        Raises:
            CoordinationError: the database failed.
            HTTPError: the API failed.
        """
        for flight in await asyncio.to_thread(progress.left_behind, self._database_url, token):
            await self._end(flight.flow_run_id, flight.token)
        await self._release(await self._claimed(token.group_id))

    async def sweep(self, token: Token, in_hand: Callable[[], frozenset[UUID]]) -> None:
        """Do the same for runs that are nobody's: a former holder's claim came too late to be seen.

        Only a run that was in the same state, and not in hand, at two sweeps in a row is nobody's.

        Args:
            token: held by this node.
            in_hand: returns the runs that this node has claimed.

        Raises:
            CoordinationError: the database failed.
            HTTPError: the API failed.
        """
        busy = in_hand()
        claimed = await self._claimed(token.group_id)
        idle = [run for run in claimed if run.id not in busy | in_hand()]
        await self._release([run for run in idle if self._suspects.get(run.id) == run.state_id])
        self._suspects = {run.id: run.state_id for run in idle}

    async def _release(self, claimed: list[FlowRun]) -> None:
        """Make claimed runs due again; of one that has been started the database knows how it ended."""
        if not claimed:
            return
        ids = [str(run.id) for run in claimed]
        started = await asyncio.to_thread(progress.outcomes, self._database_url, ids)
        for flow_run in claimed:
            if str(flow_run.id) in started:
                state = _state(started[str(flow_run.id)])
                await self._client.set_flow_run_state(flow_run.id, state, force=True)
            else:
                self._log.info("Run %s was claimed and not started; it is due again.", flow_run.name)
                await self._make_due(flow_run)

    async def _end(self, flow_run_id: str, former: Token) -> None:
        try:
            flow_run = await self._client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            flow_run = None
        if flow_run is not None and not (flow_run.state and flow_run.state.is_final()):
            message = (
                f"Node {former.task_id!r} was executing this run in term {former.term} of group "
                f"{former.group_id!r} when it lost the token."
            )
            self._log.warning("Run %s: %s", flow_run.name, message)
            if await self._deployments.reruns(flow_run):
                await self._make_due(flow_run, message)
                return
            await self._client.set_flow_run_state(flow_run.id, Crashed(message=message), force=True)
        await asyncio.to_thread(progress.end_flight, self._database_url, flow_run_id)

    async def _make_due(self, flow_run: FlowRun, message: str | None = None) -> None:
        due = flow_run.expected_start_time or flow_run.created
        policy = flow_run.empirical_policy.model_copy(update={"retry_type": None})
        await self._client.update_flow_run(flow_run.id, empirical_policy=policy)
        state: State[Any] = Scheduled(scheduled_time=due, message=message)
        await self._client.set_flow_run_state(flow_run.id, state, force=True)

    async def _claimed(self, group_id: str) -> list[FlowRun]:
        return await self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=CLAIMED))
            ),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._pool_name])),
            work_queue_filter=WorkQueueFilter(name=WorkQueueFilterName(any_=[group_id])),
        )


def _state(outcome: str | None) -> State[Any]:
    """Return the state that a run had come to when its node was lost."""
    message = "Its node was lost before it could report this."
    match outcome:
        case "Completed":
            return Completed(message=message)
        case "Failed":
            return Failed(message=message)
        case _:
            return Crashed(message=message)
