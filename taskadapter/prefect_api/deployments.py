"""The deployments of a work pool, as Prefect has them, and what we keep in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    DeploymentFilterName,
    DeploymentFilterTags,
    FlowFilter,
    FlowFilterId,
    FlowFilterName,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import DeploymentSort
from prefect.exceptions import ObjectNotFound

from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.errors import DeclarationError, TaskError, listed
from taskadapter.prefect_api.client import all_pages
from taskadapter.rules import ticks

TAG = "taskadapter"
"""What every deployment of ours is tagged with."""

DETACHED = "detached"
"""What the deployment of a detached service is tagged with: the next deploy switches it on again."""


async def deployments_of_pool(client: PrefectClient, work_pool: str) -> list[DeploymentResponse]:
    """Return the deployments of a work pool."""
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[work_pool]))
    return await _deployments(client, work_pool_filter=pool)


async def find_job(client: PrefectClient, name: str) -> DeploymentResponse:
    """Return a job by its name, ``flow/deployment``, or its id.

    Raises:
        TaskError: there is none, or there are several; it names those that there are.
    """
    with suppress(ValueError, ObjectNotFound):
        return await client.read_deployment(UUID(name))
    flow, _, own = name.rpartition("/")
    filters: dict[str, Any] = {"deployment_filter": DeploymentFilter(name=DeploymentFilterName(any_=[own]))}
    if flow:
        filters["flow_filter"] = FlowFilter(name=FlowFilterName(any_=[flow]))
    found = await _deployments(client, **filters)
    if len(found) == 1:
        return found[0]
    if found:
        raise TaskError(f"several jobs are named {name!r}; name one of {await _listed(client, found)}.")
    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    others = await _listed(client, await _deployments(client, deployment_filter=tagged))
    raise TaskError(f"there is no job {name!r}; " + (f"there are: {others}." if others else "deploy some."))


async def _listed(client: PrefectClient, deployments: Collection[DeploymentResponse]) -> str:
    flows = await flow_names(client, {found.flow_id for found in deployments})
    names = sorted(f"{flows.get(found.flow_id, '?')}/{found.name}" for found in deployments)
    return listed(names)


async def deployments_of(client: PrefectClient, ids: Iterable[UUID]) -> list[DeploymentResponse]:
    """Return some deployments, without those that are gone."""
    ids_filter = DeploymentFilter(id=DeploymentFilterId(any_=list(ids)))
    return await _deployments(client, deployment_filter=ids_filter)


async def _deployments(client: PrefectClient, **filters: Any) -> list[DeploymentResponse]:
    return await all_pages(client.read_deployments, sort=DeploymentSort.CREATED_DESC, **filters)


async def jobs_of_pool(client: PrefectClient, work_pool: str) -> list[DeploymentResponse]:
    """Return those of them that are ours."""
    return [found for found in await deployments_of_pool(client, work_pool) if TAG in found.tags]


async def flow_names(client: PrefectClient, ids: Collection[UUID]) -> dict[UUID, str]:
    """Return the names of some flows, without those that are gone."""
    some = FlowFilter(id=FlowFilterId(any_=list(ids)))
    return {flow.id: flow.name for flow in await all_pages(client.read_flows, flow_filter=some)}


def stored_trigger(variables: Mapping[str, Any] | None) -> TriggerConfiguration | None:
    """Return the trigger among the job variables of a deployment of ours, None of another.

    Raises:
        DeclarationError: it was edited into something invalid.
    """
    stored = (variables or {}).get("trigger")
    return None if stored is None else TriggerConfiguration.model_validate(stored)


def trigger_of(deployment: DeploymentResponse) -> TriggerConfiguration | None:
    """Return the trigger of a deployment of ours, None for others and for one edited into nonsense."""
    try:
        return stored_trigger(deployment.job_variables)
    except DeclarationError:
        return None  # a run of it will say so


def is_on(deployment: DeploymentResponse) -> bool:
    """Return whether a job goes on: a one-time job does until it has run, others until they are ended."""
    trigger = trigger_of(deployment)
    if trigger is None:  # none of ours: its schedules are what its owner makes of them
        return not deployment.schedules or any(schedule.active for schedule in deployment.schedules)
    return not deployment.schedules or schedule_of(deployment, trigger) is not None


def switched_on_at(deployment: DeploymentResponse) -> datetime | None:
    """Return when a job's schedule was last changed; None where it has none, or it is switched off."""
    schedule = schedule_of(deployment, trigger_of(deployment))
    return None if schedule is None else schedule.updated


def has_schedule(deployment: DeploymentResponse, slug: str) -> bool:
    """Return whether a deployment has the schedule; that of a detached service is none any more."""
    return DETACHED not in deployment.tags and slug in [known.slug for known in deployment.schedules]


def schedule_of(
    deployment: DeploymentResponse, trigger: TriggerConfiguration | None
) -> DeploymentSchedule | None:
    """Return the schedule of a job's trigger while it is switched on."""
    slug = None if trigger is None else ticks.slug(trigger)
    active = (found for found in deployment.schedules if found.slug == slug and found.active)
    return next(active, None)
