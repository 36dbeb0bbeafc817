"""Runs of ticks that Prefect's scheduler does not plan, made so that it plans none of them twice."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.states import Scheduled

from taskadapter.rules import ticks

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, State


async def create_tick(
    client: PrefectClient, deployment_id: UUID, schedule_id: UUID | str, due: datetime
) -> FlowRun:
    """Make the run of a tick, unless it is there already.

    Args:
        client: connected to the API.
        deployment_id: the job.
        schedule_id: the schedule of Prefect's that the tick is of; "once" for a one-time job.
        due: the tick's scheduled time, aware.

    Returns:
        The run, made now or before, by us or by Prefect's scheduler.

    Raises:
        ObjectNotFound: there is no such deployment.
    """
    state: State[Any] = Scheduled(scheduled_time=due)
    key = ticks.tick_key(deployment_id, schedule_id, due)
    return await client.create_flow_run_from_deployment(deployment_id, state=state, idempotency_key=key)
