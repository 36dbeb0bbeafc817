"""From listeners to deployments: as a ``prefect.yaml``, or straight to the server."""

from __future__ import annotations

import asyncio
import inspect
import sys
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentScheduleUpdate,
    DeploymentUpdate,
)
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound, ScriptError
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import load_script_as_module

from taskadapter import schedules
from taskadapter.api import api_client
from taskadapter.domain import Domain
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.jobs import JobId
from taskadapter.listener import Declared, Listener, listeners
from taskadapter.planned import TAG
from taskadapter.ticks import create_tick
from taskadapter.worker import DEFAULT_QUEUE

HEADER = """\
# Made by `taskadapter render` from the declarations in {flows}/: change those, not this file.
# Deploy with: prefect --no-prompt deploy --prefect-file {file} --all
"""


def render(flows: Path, file: Path) -> str:
    """Return the ``prefect.yaml`` of every listener in a folder of flow modules.

    The same declarations give the same text.

    Args:
        flows: the folder; its modules are imported.
        file: where the text will be kept, for its first comment.

    Raises:
        DeclarationError: there is no such folder or no job in it, a module cannot be imported or holds
            an invalid declaration, or two jobs would be one deployment.
    """
    if not flows.is_dir():
        raise DeclarationError(f"{flows}/ is no folder; name the one with the flow modules.")
    for module in sorted(flows.glob("*.py")):
        _import(module)
    found = [(listener, declared) for listener in listeners for declared in listener.services.values()]
    if not found:
        raise DeclarationError(f"{flows}/ declares no job; decorate one with a listener's service().")
    found = _once_each(found)
    _refuse_duplicates(declared for _, declared in found)
    _refuse_disagreement(listener for listener, _ in found)
    content = {
        "pull": [],
        "deployments": [_entry(listener, declared) for listener, declared in found],
    }
    return HEADER.format(flows=flows, file=file) + yaml.safe_dump(content, sort_keys=False, width=100)


def _once_each(found: list[tuple[Listener, Declared]]) -> list[tuple[Listener, Declared]]:
    """Return the jobs by name; one whose module another one imports is declared twice, and is one."""
    places = {(declared.name, entrypoint(declared.source)): (on, declared) for on, declared in found}
    return [places[key] for key in sorted(places)]


def _import(module: Path) -> None:
    try:
        load_script_as_module(str(module))
    except ScriptError as error:
        raise DeclarationError(f"{module}{_what_broke(module, error.user_exc)}") from error


def _what_broke(module: Path, exc: Exception) -> str:
    """Say where in a module an error came from, and what it is; ours need no class to be clear."""
    if isinstance(exc, SyntaxError):
        place = "" if exc.lineno is None else f", line {exc.lineno}"
        return f"{place}: {type(exc).__name__}: {exc.msg}"
    frames = traceback.extract_tb(exc.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == module.resolve()]
    place = f", line {lines[-1]}" if lines else ""
    return f"{place}: {exc}" if isinstance(exc, TaskError) else f"{place}: {type(exc).__name__}: {exc}"


def _refuse_duplicates(found: Iterable[Declared]) -> None:
    seen: dict[str, Declared] = {}
    for declared in found:
        if declared.name in seen:
            places = f"{entrypoint(seen[declared.name].source)} and {entrypoint(declared.source)}"
            raise DeclarationError(
                f"service {declared.name!r} is declared twice, in {places}; its name is its "
                "deployment's, so give one another name."
            )
        seen[declared.name] = declared


def _refuse_disagreement(found: Iterable[Listener]) -> None:
    domains: dict[str, Domain] = {}
    for listener in found:
        domain = listener.domain
        if domain is None:
            continue
        other = domains.setdefault(listener.work_pool, domain)
        if other != domain:
            raise DeclarationError(
                f"two listeners disagree about work pool {listener.work_pool!r}, whose nodes share one "
                f"database and timing: {other} and {domain}; declare the same for both, or give one "
                "another work_pool."
            )


def _entry(listener: Listener, declared: Declared) -> dict[str, Any]:
    slug = schedules.slug(listener.trigger)
    _refuse_templates(declared, description(declared), declared.initial_state)
    entry: dict[str, Any] = {
        "name": declared.name,
        "entrypoint": entrypoint(declared.source),
        "description": description(declared),
        "tags": [TAG],
        "work_pool": {
            "name": listener.work_pool,
            "work_queue_name": listener.group_id or DEFAULT_QUEUE,
            "job_variables": _job_variables(declared),
        },
    }
    step = {"job": declared.name, "slug": slug, "id": "prepared"}
    entry["build"] = [{"taskadapter.deploy.prepare": step}]
    anchor = listener.trigger.start_time or "{{ prepared.first_tick }}"
    entry["schedules"] = [schedules.schedule(listener.trigger, anchor)]
    return entry


def _refuse_templates(declared: Declared, *texts: object) -> None:
    """Refuse what ``prefect deploy`` would take for a template, and change."""
    for text in map(str, texts):
        if "{{" in text:
            raise DeclarationError(
                f"service {declared.name!r}: {text!r} has '{{{{', which `prefect deploy` fills in as a "
                "template; write it without, or deploy with Listener.start()."
            )


def _job_variables(declared: Declared) -> dict[str, Any]:
    trigger = declared.trigger.model_dump(mode="json", exclude_defaults=True)
    if declared.initial_state is None:
        return {"trigger": trigger}
    return {"trigger": trigger, "initial_state": declared.initial_state}


def description(declared: Declared) -> str:
    """Return the docstring of what was declared; what it inherits from `Service` is not about it."""
    if own := inspect.cleandoc(declared.source.__doc__ or ""):
        return own
    # Of an empty one `prefect deploy` would make "None".
    return f"Job {declared.name} in {entrypoint(declared.source)}"


def entrypoint(source: Any) -> str:
    """Return where Prefect finds a function or class: ``flows/counter.py:Counter``.

    Relative to the working directory, so that nodes may have the project elsewhere; what lies outside
    is named as an importable module.

    Raises:
        DeclarationError: it has no name in its module by which a node could import it, or is of no file,
            or of the script that is run and that lies outside.
    """
    if "<" in source.__qualname__:
        raise DeclarationError(
            f"{source.__qualname__} in {_file_of(source)} cannot be deployed: nodes import what "
            "they run, and cannot import a lambda, nor what is defined inside a function. Define it at "
            "module level."
        )
    file = _file_of(source)
    here = Path.cwd().resolve()
    if file.is_relative_to(here) and not file.is_relative_to(Path(sys.prefix).resolve()):
        return f"{file.relative_to(here).as_posix()}:{source.__qualname__}"
    if source.__module__ == "__main__":
        raise DeclarationError(
            f"{source.__qualname__} in {file} cannot be deployed from {here}: nodes import what they run, "
            "and this script lies outside the working directory. Start it in the project's folder, or move "
            "the definition to a module that the nodes can import."
        )
    return f"{source.__module__}.{source.__qualname__}"


def _file_of(source: Any) -> Path:
    try:
        return Path(inspect.getfile(source)).resolve()
    except (OSError, TypeError) as error:
        raise DeclarationError(
            f"{source.__qualname__} cannot be deployed: nodes import what they run, and it is in no file. "
            "Define it in a module of the project."
        ) from error


async def prepare(job: str, slug: str) -> dict[str, str]:
    """A build step of ``prefect.yaml``, before a deployment is made or changed.

    It ends the triggers that the job had before: Prefect adds a schedule whose slug is new, and leaves
    those it knows, so that the job would go on by both. Schedules that somebody else has added stay.

    It also finds the moment of tick 0 of a trigger without start time. That is when it is first
    deployed (and a little more, see `schedules.FIRST_TICK_LEAD`); each further deploy finds it on the
    server and leaves it as it is.

    Args:
        job: the name of the flow and of its deployment.
        slug: the slug of the trigger's schedule.

    Returns:
        ``{"first_tick": ...}``, in ISO 8601 with its offset.
    """
    async with api_client() as client:
        deployed = await find(client, job, job)
        if deployed is not None:
            await _end_earlier_triggers(client, deployed, slug)
    return {"first_tick": _first_tick(deployed, slug).isoformat()}


async def find(client: PrefectClient, flow_name: str, name: str) -> DeploymentResponse | None:
    """Return the deployment of that name of that flow; None where there is none."""
    try:
        return await client.read_deployment_by_name(f"{flow_name}/{name}")
    except ObjectNotFound:
        return None


async def _end_earlier_triggers(client: PrefectClient, deployed: DeploymentResponse, slug: str) -> None:
    for schedule in deployed.schedules:
        if schedule.slug != slug and schedules.is_slug(schedule.slug):
            await client.delete_deployment_schedule(deployed.id, schedule.id)


def _first_tick(
    deployed: DeploymentResponse | None, slug: str, lead: timedelta = schedules.FIRST_TICK_LEAD
) -> datetime:
    for schedule in [] if deployed is None else deployed.schedules:
        if schedule.slug == slug and isinstance(schedule.schedule, IntervalSchedule):
            return schedule.schedule.anchor_date.astimezone(UTC)
    return datetime.now(UTC) + lead


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
    (schedule_id,) = (schedule.id for schedule in deployment.schedules if schedule.slug == slug)
    if not deployment.paused and since <= anchor <= since + schedules.FIRST_TICK_LEAD:
        await create_tick(client, job_id, schedule_id, anchor)


async def deploy(listener: Listener) -> dict[str, JobId]:
    """Deploy a listener's services to the server, as ``prefect deploy`` would.

    Returns:
        The job ids, by the services' names.

    Raises:
        TaskError: the work pool is of another type.
    """
    await asyncio.to_thread(listener.ensure_work_pool)
    async with api_client() as client:
        return {
            name: JobId(await _deploy(client, listener, declared))
            for name, declared in listener.services.items()
        }


async def _deploy(client: PrefectClient, listener: Listener, declared: Declared) -> UUID:
    now, slug = datetime.now(UTC), schedules.slug(listener.trigger)
    deployed = await find(client, declared.flow.name, declared.name)
    anchor = listener.trigger.start_time or _first_tick(deployed, slug, lead=timedelta(0))
    wanted = wanted_of(declared, listener.work_pool, listener.group_id)
    job_id, _ = await put(client, declared, deployed, wanted, anchor)
    if deployed is None or slug not in [schedule.slug for schedule in deployed.schedules]:
        await make_first_tick(client, job_id, slug, anchor, now)
    return job_id


def wanted_of(declared: Declared, work_pool: str, group_id: str | None) -> dict[str, Any]:
    """Return the fields that the deployment of a job is to have, its schedule aside.

    Raises:
        DeclarationError: nodes could not import what was declared.
    """
    wanted: dict[str, Any] = {
        "entrypoint": entrypoint(declared.source),
        "description": description(declared),
        "tags": [TAG],
        "work_pool_name": work_pool,
        "work_queue_name": group_id or DEFAULT_QUEUE,
        "job_variables": _job_variables(declared),
        "parameter_openapi_schema": parameter_schema(declared.flow).model_dump(exclude_unset=True),
    }
    return wanted if declared.parameters is None else wanted | {"parameters": declared.parameters}


async def put(
    client: PrefectClient,
    declared: Declared,
    deployed: DeploymentResponse | None,
    wanted: dict[str, Any],
    anchor: datetime | None,
) -> tuple[UUID, bool]:
    """Create the deployment of a job, or change it if it differs.

    A schedule of its trigger that is there stays as it is, anchor and pause included; one of an earlier
    trigger goes.

    Args:
        client: connected to the API.
        declared: the job.
        deployed: its deployment as it is, None where there is none.
        wanted: what `wanted_of` says of it.
        anchor: the moment of tick 0; None for a job without a schedule.

    Returns:
        Its id, and whether anything had to be done.
    """
    slug = schedules.slug(declared.trigger)
    planned = None
    if anchor is not None:
        interval = timedelta(seconds=declared.trigger.interval)
        planned = IntervalSchedule(interval=interval, anchor_date=anchor, timezone="UTC")
    if deployed is None:
        flow_id = await client.create_flow(declared.flow)
        new = [] if planned is None else [DeploymentScheduleCreate(schedule=planned, slug=slug)]
        return await client.create_deployment(flow_id, declared.name, schedules=new, **wanted), True
    await _end_earlier_triggers(client, deployed, slug)
    if planned is not None and slug not in [known.slug for known in deployed.schedules]:
        wanted = wanted | {"schedules": [DeploymentScheduleUpdate(schedule=planned, slug=slug)]}
    if all(getattr(deployed, field) == value for field, value in wanted.items()):
        return deployed.id, False
    await client.update_deployment(deployed.id, DeploymentUpdate(**wanted))
    return deployed.id, True
