"""What a node does with the runs that its predecessor left behind, before it starts any of its own."""

from __future__ import annotations

import asyncio
from logging import Logger, LoggerAdapter
from typing import TYPE_CHECKING, Any
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

if TYPE_CHECKING:
    from taskadapter.coordination.jobs import RunInFlight

CLAIMED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]

ENDED = {"Completed": Completed, "Failed": Failed}


class Takeover:
    """Puts a group's house in order, at the beginning of a term.

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

    async def clean_up(self, token: Token) -> None:
        """End what earlier holders were executing, and make due again what they had only claimed.

        A run that has begun is in the database as in flight; one that was only claimed is not. It may
        be repeated: each step is done once.

        Raises:
            CoordinationError: the database failed.
            HTTPError: the API failed.
        """
        flights = await asyncio.to_thread(progress.left_behind, self._database_url, token)
        for flight in flights:
            await self._end(flight)
        begun = {flight.flow_run_id for flight in flights}
        for flow_run in await self._claimed(token.group_id):
            if str(flow_run.id) not in begun:
                self._log.info("Run %s was claimed and not started; it is due again.", flow_run.name)
                await self._make_due(flow_run)

    async def _end(self, flight: RunInFlight) -> None:
        former = flight.token
        try:
            flow_run = await self._client.read_flow_run(UUID(flight.flow_run_id))
        except ObjectNotFound:
            flow_run = None
        if flow_run is None or (flow_run.state and flow_run.state.is_final()):
            pass
        elif flight.outcome is not None:
            message = f"Node {former.task_id!r} ended this run in term {former.term}, and could not say so."
            state: State[Any] = ENDED[flight.outcome](message=message)
            await self._client.set_flow_run_state(flow_run.id, state, force=True)
        else:
            message = (
                f"Node {former.task_id!r} was executing this run in term {former.term} of group "
                f"{former.group_id!r} when it lost the token."
            )
            self._log.warning("Run %s: %s", flow_run.name, message)
            if await self._deployments.reruns(flow_run):
                await self._make_due(flow_run, message)
                return
            await self._client.set_flow_run_state(flow_run.id, Crashed(message=message), force=True)
        await asyncio.to_thread(progress.forget_flight, self._database_url, flight.flow_run_id)

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
