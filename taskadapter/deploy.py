"""From declarations to deployments on the server."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger
from prefect.utilities.callables import parameter_schema

from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.declare.jobs import JobId
from taskadapter.declare.registry import listeners
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.listener import Listener
from taskadapter.prefect_api import private
from taskadapter.prefect_api.client import API_FAULTS, api_client
from taskadapter.prefect_api.deployments import DETACHED, TAG, has_schedule, trigger_of
from taskadapter.prefect_api.locks import lock
from taskadapter.prefect_api.ticks import create_tick
from taskadapter.rules import ticks
from taskadapter.services import Declared, description, entrypoint, job_variables, may_be_one

_log = get_logger("taskadapter")


async def prepare(
    job: str, slug: str, interval: float | None = None, start_time: str | None = None
) -> dict[str, str]:
    """A build step of ``prefect.yaml``, before a deployment is made or changed.

    It makes a deployment that is new, with its schedule, so that of two machines which deploy at once one
    makes it and the other finds it: ``prefect deploy`` would make it anew. Until that has told it its work
    pool, nobody runs it.

    Of one that is there it ends the triggers that the job had before: Prefect adds a schedule whose slug
    is new, and leaves those it knows, so that the job would go on by both. Schedules that somebody else
    has added stay.

    It warns where the file has another trigger than the flow, which has been imported, declares now, and
    where the job is counted from one again.

    It also finds the moment of tick 0 of a trigger without start time. That is when it is first
    deployed (and a little more, see `ticks.FIRST_TICK_LEAD`); each further deploy finds it on the
    server and leaves it as it is.

    Args:
        job: the name of the flow and of its deployment.
        slug: the slug of the trigger's schedule.
        interval: the trigger's, in seconds; without it, as in files of earlier versions, nothing is made.
        start_time: the trigger's, in ISO 8601, if it has one.

    Returns:
        ``{"first_tick": ...}``, in ISO 8601 with its offset.
    """
    first_tick = datetime.now(UTC) + ticks.FIRST_TICK_LEAD
    if start_time is not None:
        first_tick = datetime.fromisoformat(start_time)
    triggers = _declared_triggers(job)
    if triggers and slug not in triggers:
        _log.warning(
            "Job %s is deployed with another trigger than its flow declares (%s). Run "
            "`taskadapter render`, and deploy again; a moment that is computed from now is "
            "another one at each import.",
            job,
            next(iter(triggers)),
        )
    async with api_client() as client:
        deployed = await find(client, job, job)
        if deployed is None and interval is not None:
            deployed = await _make_alone(client, job, job, _schedule(interval, first_tick, slug))
        elif deployed is not None:
            if slug in triggers:
                _say_how_trigger_differs(deployed, triggers[slug])
            await _end_earlier_triggers(client, deployed, slug)
            if deployed.paused and private.is_being_deployed():
                private.keep_paused(deployed.id)
    known = None if deployed is None else _anchor(deployed, slug)
    return {"first_tick": (known or first_tick).isoformat()}


def _declared_triggers(job: str) -> dict[str, TriggerConfiguration]:
    """Return the triggers that the flows of this process declare for a job, by their slugs."""
    found = (listener.services[job].trigger for listener in listeners if job in listener.services)
    return {ticks.slug(trigger): trigger for trigger in found}


async def _make_alone(
    client: PrefectClient, flow_name: str, name: str, schedule: DeploymentScheduleCreate
) -> DeploymentResponse | None:
    async with lock(client, _lock_name(flow_name, name)):
        if (found := await find(client, flow_name, name)) is None:
            flow_id = await client.create_flow_from_name(flow_name)
            await client.create_deployment(flow_id, name, schedules=[schedule], tags=[TAG])
            found = await find(client, flow_name, name)
    return found


def _lock_name(flow_name: str, name: str) -> str:
    return f"deployment {flow_name}/{name}"


def _schedule(interval: float, anchor: datetime, slug: str) -> DeploymentScheduleCreate:
    seconds = timedelta(seconds=interval)
    planned = IntervalSchedule(interval=seconds, anchor_date=anchor, timezone="UTC")
    return DeploymentScheduleCreate(schedule=planned, slug=slug)


async def find(client: PrefectClient, flow_name: str, name: str) -> DeploymentResponse | None:
    """Return the deployment of that name of that flow; None where there is none."""
    try:
        return await client.read_deployment_by_name(f"{flow_name}/{name}")
    except ObjectNotFound:
        return None


async def _end_earlier_triggers(client: PrefectClient, deployed: DeploymentResponse, slug: str) -> None:
    """Delete the schedules of other triggers of ours, and that of a service which was detached."""
    for schedule in deployed.schedules:
        if ticks.is_slug(schedule.slug) and (schedule.slug != slug or DETACHED in deployed.tags):
            with suppress(ObjectNotFound):
                await client.delete_deployment_schedule(deployed.id, schedule.id)


def _anchor(deployed: DeploymentResponse, slug: str) -> datetime | None:
    """Return the moment of tick 0 of a schedule; None where a deployment does not have it."""
    for schedule in deployed.schedules if has_schedule(deployed, slug) else ():
        if schedule.slug == slug and isinstance(schedule.schedule, IntervalSchedule):
            return schedule.schedule.anchor_date.astimezone(UTC)
    return None


async def make_first_tick(
    client: PrefectClient, job_id: UUID, slug: str, anchor: datetime, since: datetime
) -> None:
    """Make the first tick of a new schedule where it is too near for Prefect's scheduler to plan it.

    Args:
        client: connected to the API.
        job_id: the job.
        slug: the schedule's.
        anchor: the moment of the tick.
        since: when the schedule was asked for: what was due before is no tick of it.
    """
    deployment = await client.read_deployment(job_id)
    if deployment.paused or not since <= anchor <= since + ticks.FIRST_TICK_LEAD:
        return
    for schedule in deployment.schedules:
        if schedule.slug == slug:
            await create_tick(client, job_id, schedule.id, anchor)


async def deploy(listener: Listener, names: Collection[str] | None = None) -> dict[str, JobId]:
    """Deploy a listener's services to the server, as ``prefect deploy`` would.

    Args:
        listener: the listener.
        names: which of its services; None for all.

    Returns:
        The job ids, by the services' names.

    Raises:
        TaskError: the work pool is of another type.
    """
    wanted = [listener.services[name] for name in listener.services if names is None or name in names]
    async with api_client() as client:
        await listener.aensure_work_pool(client)
        return {declared.name: JobId(await _deploy(client, listener, declared)) for declared in wanted}


async def _deploy(client: PrefectClient, listener: Listener, declared: Declared) -> UUID:
    now = datetime.now(UTC)
    anchor = listener.trigger.start_time or now
    done = await put(client, declared, wanted_of(declared, listener.work_pool, listener.group_id), anchor)
    if done.has_new_schedule:
        with suppress(*API_FAULTS):  # then an agent makes it: the job is there, and nodes run it
            await make_first_tick(client, done.job_id, ticks.slug(listener.trigger), anchor, now)
    return done.job_id


def wanted_of(declared: Declared, work_pool: str, group_id: str | None) -> dict[str, Any]:
    """Return the fields that the deployment of a job is to have, its schedule aside.

    Raises:
        DeclarationError: nodes could not import what was declared.
    """
    wanted: dict[str, Any] = {
        "entrypoint": entrypoint(declared),
        "description": description(declared),
        "tags": [TAG],
        "work_pool_name": work_pool,
        "work_queue_name": group_id or DEFAULT_QUEUE,
        "job_variables": job_variables(declared),
        "parameter_openapi_schema": parameter_schema(declared.flow).model_dump(exclude_unset=True),
    }
    return wanted if declared.parameters is None else wanted | {"parameters": declared.parameters}


@dataclass(frozen=True)
class Put:
    """What `put` has done.

    Attributes:
        job_id: the deployment's id.
        was_there: whether there was a deployment before.
        has_changed: whether anything had to be done.
        has_new_schedule: whether it was given the schedule of its trigger here and now, and by nobody else.
    """

    job_id: UUID
    was_there: bool
    has_changed: bool
    has_new_schedule: bool


async def put(
    client: PrefectClient, declared: Declared, wanted: dict[str, Any], anchor: datetime | None
) -> Put:
    """Create the deployment of a job, or change it if it differs.

    Of several that do the same at once, one creates it, or gives it its new schedule, and the others find
    that. A schedule of its trigger that is there stays as it is, anchor and pause included, unless the
    service was detached; one of an earlier trigger goes.

    Args:
        client: connected to the API.
        declared: the job.
        wanted: what `wanted_of` says of it.
        anchor: the moment of tick 0, if the schedule is new; None for a job without a schedule.
    """
    slug, flow_name = ticks.slug(declared.trigger), declared.flow.name
    planned = [] if anchor is None else [_schedule(declared.trigger.interval, anchor, slug)]
    if (deployed := await find(client, flow_name, declared.name)) is None:
        async with lock(client, _lock_name(flow_name, declared.name)):
            deployed = await find(client, flow_name, declared.name)
            if deployed is None:
                flow_id = await client.create_flow(declared.flow)
                job_id = await client.create_deployment(flow_id, declared.name, schedules=planned, **wanted)
                return Put(job_id, False, True, bool(planned))
    return await _change(client, deployed, declared, wanted, planned)


async def _change(
    client: PrefectClient,
    deployed: DeploymentResponse,
    declared: Declared,
    wanted: dict[str, Any],
    planned: list[DeploymentScheduleCreate],
) -> Put:
    slug = ticks.slug(declared.trigger)
    await _end_earlier_triggers(client, deployed, slug)
    differs = any(getattr(deployed, field) != value for field, value in wanted.items())
    if deployed.work_pool_name not in (None, wanted["work_pool_name"]):
        _log.warning(
            "Job %s moves from work pool %s to %s, and the nodes of %s run it no longer. If another "
            "project has a job of that name, give this one another name.",
            deployed.name,
            deployed.work_pool_name,
            wanted["work_pool_name"],
            deployed.work_pool_name,
        )
    _say_which_class(deployed, declared, wanted["entrypoint"])
    _say_how_trigger_differs(deployed, declared.trigger)
    if differs:
        await client.update_deployment(deployed.id, DeploymentUpdate(**wanted))
    # After that: agents know a job's schedule by its trigger, which is among these fields.
    lacks = bool(planned) and not has_schedule(deployed, slug)
    is_ours = lacks and await _add_schedules(client, deployed.id, planned)
    return Put(deployed.id, True, differs or lacks, is_ours)


def _say_which_class(deployed: DeploymentResponse, declared: Declared, place: str) -> None:
    """Say that a job is another class's from now on, which may have moved, or may have its name by chance.

    A listener's service may move to another module: its name is its own, and not that of a class.
    """
    if declared.parameters is None or not deployed.entrypoint or may_be_one(deployed.entrypoint, place):
        return
    _log.warning(
        "Job %s ran %s, and runs %s from now on. If these are two jobs, give one of them another name.",
        deployed.name,
        deployed.entrypoint,
        place,
    )


def _say_how_trigger_differs(deployed: DeploymentResponse, now: TriggerConfiguration) -> None:
    """Say that a job's count begins anew: that is easily done unawares, with a start computed from now."""
    before = trigger_of(deployed)
    if before is None or ticks.slug(before) == ticks.slug(now):
        return
    names = [name for name in ticks.COUNTED_BY if getattr(before, name) != getattr(now, name)]
    _log.warning(
        "Job %s is counted from one again, for it was deployed with %s, and has %s now. If that is "
        "not meant, declare it as it was; a moment that is computed from now is another one each time.",
        deployed.name,
        _values(before, names),
        _values(now, names),
    )


def _values(trigger: TriggerConfiguration, names: Iterable[str]) -> str:
    """Return some fields of a trigger as a message has them; a moment as a declaration may write it."""
    values = ((name, getattr(trigger, name)) for name in names)
    return ", ".join(
        f"{name}={value.isoformat() if isinstance(value, datetime) else value}" for name, value in values
    )


async def _add_schedules(
    client: PrefectClient, job_id: UUID, planned: list[DeploymentScheduleCreate]
) -> bool:
    """Give a deployment its schedules; returns False if somebody else was quicker."""
    try:
        await client.create_deployment_schedules(job_id, planned)
    except httpx.HTTPStatusError as fault:
        if fault.response.status_code != httpx.codes.CONFLICT:
            raise
        return False
    return True
