"""Whether a job is paused or over: switches in the job's row, which runs read, and in Prefect.

What our commands switch, they switch in the row first, and then in Prefect. What somebody switches in
Prefect's UI, the agents carry over to the row as soon as they see it (`carry_over`).
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.actions import DeploymentUpdate
from prefect.exceptions import ObjectNotFound

from taskadapter.agent import events
from taskadapter.agent.plans import plan_of
from taskadapter.coordination import store
from taskadapter.coordination.executions import SWITCHED_OFF, Reading, Switches, moment
from taskadapter.errors import TaskError
from taskadapter.prefect_api.client import api_client
from taskadapter.prefect_api.deployments import DETACHED, deployments_of, is_on, trigger_of
from taskadapter.prefect_api.pool import Domain
from taskadapter.prefect_api.ticks import switch_off
from taskadapter.rules import ticks
from taskadapter.settings import TaskadapterSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

    from taskadapter.coordination.progress import JobRow
    from taskadapter.declare.triggers import TriggerConfiguration


WAS_DETACHED = "the service was detached"
"""Why a job is over whose service was."""


def reading_of(deployment: DeploymentResponse) -> Reading:
    """Return what a deployment that was read says."""
    trigger = trigger_of(deployment)
    moments = [deployment.updated, *(schedule.updated for schedule in deployment.schedules)]
    return Reading(
        job_id=deployment.id,
        trigger_slug="" if trigger is None else ticks.slug(trigger),
        switches=Switches(deployment.paused, is_on(deployment), _plan_in_words(deployment)),
        updated=max((moment(when) for when in moments if when is not None), default=""),
    )


def _plan_in_words(deployment: DeploymentResponse) -> str:
    plan = plan_of(deployment)
    return "" if plan is None else f"{plan.schedule_id} {plan.interval!r} from {moment(plan.anchor)}"


async def pause(client: PrefectClient, deployment: DeploymentResponse) -> None:
    """Let nothing of a job begin any more, until it is resumed."""
    url = await _database_of(await _pool_of(client, deployment))
    await asyncio.to_thread(store.pause, url, deployment.id, paused=True)
    await client.pause_deployment(deployment.id)
    await _take_note(client, url, deployment.id)


async def resume(client: PrefectClient, deployment: DeploymentResponse) -> None:
    """Let a job go on that is paused."""
    url = await _database_of(await _pool_of(client, deployment))
    await asyncio.to_thread(store.pause, url, deployment.id, paused=False)
    await client.resume_deployment(deployment.id)
    await _take_note(client, url, deployment.id)


async def end(
    client: PrefectClient, deployment: DeploymentResponse, reason: str, *, stays: bool = False
) -> None:
    """Let nothing of a job begin any more, until somebody switches it on again.

    Args:
        client: connected to the API.
        deployment: the job.
        reason: why it is over.
        stays: whether its deployment does: then count and state are kept, and with another trigger it goes
            on; else they are forgotten after a while.
    """
    url = await _database_of(await _pool_of(client, deployment))
    slug = reading_of(deployment).trigger_slug if stays else None
    await asyncio.to_thread(store.end_job, url, deployment.id, reason, slug)
    await switch_off(client, deployment, reason)
    await _take_note(client, url, deployment.id)


async def restart(client: PrefectClient, deployment: DeploymentResponse) -> str:
    """Let a job go on that is over, and return why it was.

    Its count goes on, or begins anew where the maximum was reached; the state of a service stays. No tick
    from while it was over is owed.

    Raises:
        TaskError: it is not over; or it would be over again at once.
    """
    pool, trigger, job = await _pool_of(client, deployment), trigger_of(deployment), deployment.name
    url = await _database_of(pool)
    if trigger is None:
        raise TaskError(f"job {job!r} has no trigger of taskadapter's; resume its schedule in Prefect.")
    slug = ticks.slug(trigger)
    own = next((schedule for schedule in deployment.schedules if schedule.slug == slug), None)
    row = (await asyncio.to_thread(store.jobs, url, {deployment.id: slug})).get(deployment.id)
    why = why_over(deployment, row)
    if why is None:
        raise TaskError(f"job {job!r} has not ended; see `taskadapter ledger`, and whether an agent is up.")
    if DETACHED in deployment.tags:
        raise TaskError(f"the service of job {job!r} was detached; attach it again, or deploy it.")
    if own is None:
        raise TaskError(
            f"job {job!r} has ended ({why}), and has no schedule; schedule, or deploy, it again."
        )
    if has_ended(trigger):
        raise TaskError(f"job {job!r} has ended ({why}); declare a later end_time, and deploy it.")
    # That it is off is seen first: it is from when it is switched on that ticks are owed.
    if own.active:
        await client.update_deployment_schedule(deployment.id, own.id, active=False)
    await _take_note(client, url, deployment.id)
    await asyncio.to_thread(store.restart, url, deployment.id, slug, anew=_is_exhausted(trigger, row))
    await client.update_deployment_schedule(deployment.id, own.id, active=True)
    await _take_note(client, url, deployment.id)
    if pool is not None:
        events.job_restarted(deployment, pool, why)
    return why


def why_over(deployment: DeploymentResponse, row: JobRow | None) -> str | None:
    """Say why a job is over; None if it is not.

    Args:
        deployment: as Prefect has it.
        row: its row, for this trigger; None if it has none.
    """
    trigger = trigger_of(deployment)
    if row is not None and row.ended not in {None, SWITCHED_OFF}:
        return row.ended
    if trigger is not None and _is_exhausted(trigger, row):
        return ticks.exhausted(trigger.max_count)
    if trigger is not None and trigger.end_time is not None and has_ended(trigger):
        return ticks.ended_at(trigger.end_time)
    is_off = not is_on(deployment) or (row is not None and row.ended is not None)
    return SWITCHED_OFF if is_off else None


async def what_is_over(client: PrefectClient, job_ids: Iterable[UUID]) -> dict[str, str]:
    """Say of those of a pool's jobs that are over why they are, by their names.

    Raises:
        CoordinationError: the database, which they share, cannot be reached from here.
        HTTPError: as any of `API_FAULTS`: the API failed.
    """
    found = await deployments_of(client, job_ids)
    if not found:
        return {}
    slugs = {deployment.id: reading_of(deployment).trigger_slug for deployment in found}
    url = await _database_of(await _pool_of(client, found[0]))
    rows = await asyncio.to_thread(store.jobs, url, slugs)
    reasons = {deployment.name: why_over(deployment, rows.get(deployment.id)) for deployment in found}
    return {name: why for name, why in reasons.items() if why is not None}


def is_paused(deployment: DeploymentResponse, row: JobRow | None) -> bool:
    """Return whether a job is paused, in Prefect or in its row alone: each keeps it from running."""
    return deployment.paused or (row is not None and row.paused)


def _is_exhausted(trigger: TriggerConfiguration, row: JobRow | None) -> bool:
    return row is not None and 0 < trigger.max_count <= row.count


def has_ended(trigger: TriggerConfiguration | None) -> bool:
    """Return whether the end of a trigger has passed, if it has one."""
    return trigger is not None and trigger.end_time is not None and trigger.end_time < datetime.now(UTC)


async def detach(job_id: UUID) -> None:
    """Unschedule a job whose deployment stays, and say so there.

    Raises:
        ApiUnavailableError: the API did not answer.
    """
    async with api_client() as client:
        with contextlib.suppress(ObjectNotFound):
            deployment = await client.read_deployment(job_id)
            await end(client, deployment, WAS_DETACHED, stays=True)
            # Only now: where that has failed, the job may go on, and the same call is repeated.
            tags = [*deployment.tags, *({DETACHED} - set(deployment.tags))]
            await client.update_deployment(job_id, DeploymentUpdate(tags=tags))


async def _take_note(client: PrefectClient, url: str, job_id: UUID) -> None:
    """Have an older reading of an agent's, which may still be under way, carry nothing over."""
    await asyncio.to_thread(store.see, url, [reading_of(await client.read_deployment(job_id))])


async def _pool_of(client: PrefectClient, deployment: DeploymentResponse) -> WorkPool | None:
    name = deployment.work_pool_name
    return None if name is None else await client.read_work_pool(name)


async def _database_of(pool: WorkPool | None) -> str:
    settings = TaskadapterSettings()
    return settings.default_database_url() if pool is None else await Domain.of(pool).database_url(settings)


async def carry_over(database_url: str, deployments: Iterable[DeploymentResponse]) -> None:
    """Carry over to the jobs' rows what somebody has changed in Prefect since anybody has looked.

    A row says what was seen last: other agents see changes too, and our commands make some.

    Raises:
        CoordinationError: the database failed; the same call may be repeated.
    """
    readings = [reading_of(deployment) for deployment in deployments]
    if not readings:
        return
    seen = await asyncio.to_thread(store.seen, database_url, [reading.job_id for reading in readings])
    news = [reading for reading in readings if _is_news(reading.switches, seen[reading.job_id])]
    if news:
        await asyncio.to_thread(store.see, database_url, news)


def _is_news(now: Switches, seen: Switches) -> bool:
    """Return whether a reading has something that is not seen; its plan, where it has one."""
    return (now.paused, now.on) != (seen.paused, seen.on) or now.plan not in {"", seen.plan}
