"""Schedule jobs from a program: once, or again and again; pause, resume and end them.

The functions are those of Ballerina's ``task`` module. Each has a twin for async code, with an ``a`` in
front of its name; the others may be called anywhere, also while an event loop is running.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar, cast
from uuid import UUID, uuid4

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, ParameterBindError, ParameterTypeError
from prefect.utilities.slugify import slugify

from taskadapter.agent import switches
from taskadapter.declare.backup import WarmBackupConfig
from taskadapter.declare.base import Declaration, shown
from taskadapter.declare.civil import Civil, Instant
from taskadapter.declare.jobs import Job, JobId, dump_state
from taskadapter.declare.names import check_name, check_pool
from taskadapter.declare.registry import refuse_while_importing
from taskadapter.declare.triggers import TaskPolicy, TriggerConfiguration, WorkerPoolConfiguration
from taskadapter.deploy import Put, find, make_first_tick, put, wanted_of
from taskadapter.errors import ApiUnavailableError, TaskError, in_a_line, with_article
from taskadapter.execution import flow as flows
from taskadapter.pools import aensure_work_pool
from taskadapter.prefect_api.client import API_FAULTS, api_client, is_gone, run_sync
from taskadapter.prefect_api.deployments import TAG, find_job, has_schedule, jobs_of_pool, trigger_of
from taskadapter.prefect_api.faults import explain
from taskadapter.prefect_api.pool import PoolSize
from taskadapter.prefect_api.ticks import create_tick, remake_ticks, remove_ticks, unfinished
from taskadapter.rules import ticks
from taskadapter.services import Declared
from taskadapter.settings import TaskadapterSettings, check_interval

When = Civil | datetime | str
"""A moment: a `Civil`, an aware datetime, or an ISO 8601 string with its offset."""

Interval = float | Decimal | timedelta
"""A duration: seconds, or a timedelta."""

DEFAULT_POLICY = TaskPolicy()


class OneTime(Declaration):
    """When a one-time job runs."""

    called: ClassVar[str | None] = "schedule_one_time_job"

    trigger_time: Instant


# --- scheduling -----------------------------------------------------------------------------------


def schedule_one_time_job(
    job: Job,
    trigger_time: When,
    *,
    name: str | None = None,
    task_policy: TaskPolicy = DEFAULT_POLICY,
    group_id: str | None = None,
    work_pool: str | None = None,
) -> JobId:
    """Have a job run once.

    It runs also when no agent was there at its time, as soon as one is, unless its waiting policy says
    otherwise.

    Args:
        job: what to run; its class must be one that the nodes can import, its fields are kept with it.
        trigger_time: when, in the future.
        name: its name among the jobs of its class. The same name again is the same job: what differs is
            changed, and the same call changes nothing. Without one, each call makes another job.
        task_policy: what an error means, and a late start.
        group_id: the group whose active node alone runs it; None for every node.
        work_pool: by default the one that the settings name; made on first use.

    Returns:
        The job's id.

    Raises:
        TaskError: the time has passed, a value is none that its rule allows, the job is no `Job` or of a
            class that nodes cannot import, or the work pool is of another type. Nothing was made then.
    """
    return run_sync(
        aschedule_one_time_job(
            job,
            trigger_time,
            name=name,
            task_policy=task_policy,
            group_id=group_id,
            work_pool=work_pool,
        )
    )


async def aschedule_one_time_job(
    job: Job,
    trigger_time: When,
    *,
    name: str | None = None,
    task_policy: TaskPolicy = DEFAULT_POLICY,
    group_id: str | None = None,
    work_pool: str | None = None,
) -> JobId:
    """Do what `schedule_one_time_job` does, from async code."""
    when = OneTime(trigger_time=cast("Any", trigger_time)).trigger_time
    _refuse_past("trigger_time", when, datetime.now(UTC))
    trigger = TriggerConfiguration(
        interval=ticks.ONE_TIME, max_count=1, start_time=when, task_policy=task_policy
    )
    return await _schedule(job, trigger, name, group_id, work_pool, once=True)


def schedule_job_recur_by_frequency(
    job: Job,
    interval: Interval,
    max_count: int = -1,
    start_time: When | None = None,
    end_time: When | None = None,
    task_policy: TaskPolicy = DEFAULT_POLICY,
    *,
    name: str | None = None,
    group_id: str | None = None,
    work_pool: str | None = None,
) -> JobId:
    """Have a job run again and again.

    Args:
        job: what to run; its class must be one that the nodes can import, its fields are kept with it.
        interval: seconds between two ticks, or a timedelta; more than 0.
        max_count: executions in all, -1 for no limit.
        start_time: the first tick, in the future; None for at once. Of a job that has a name and this very
            trigger already, it may have passed.
        end_time: no tick is after it; None for no end.
        task_policy: what an error means, and a late start.
        name: its name among the jobs of its class. The same name again is the same job: what differs is
            changed, and the same call changes nothing. Without one, each call makes another job.
        group_id: the group whose active node alone runs it; None for every node.
        work_pool: by default the one that the settings name; made on first use.

    Returns:
        The job's id.

    Raises:
        TaskError: the start or the end has passed, the end is not after the start, a value is none that its
            rule allows, the job is no `Job` or of a class that nodes cannot import, or the work pool is of
            another type. Nothing was made then.
    """
    return run_sync(
        aschedule_job_recur_by_frequency(
            job,
            interval,
            max_count,
            start_time,
            end_time,
            task_policy,
            name=name,
            group_id=group_id,
            work_pool=work_pool,
        )
    )


async def aschedule_job_recur_by_frequency(
    job: Job,
    interval: Interval,
    max_count: int = -1,
    start_time: When | None = None,
    end_time: When | None = None,
    task_policy: TaskPolicy = DEFAULT_POLICY,
    *,
    name: str | None = None,
    group_id: str | None = None,
    work_pool: str | None = None,
) -> JobId:
    """Do what `schedule_job_recur_by_frequency` does, from async code."""
    trigger = TriggerConfiguration(
        interval=cast("Any", interval),
        max_count=max_count,
        start_time=cast("Any", start_time),
        end_time=cast("Any", end_time),
        task_policy=task_policy,
    )
    if trigger.end_time is not None:
        _refuse_past("end_time", trigger.end_time, datetime.now(UTC))
    check_interval(trigger.interval)
    return await _schedule(job, trigger, name, group_id, work_pool, once=False)


def _refuse_past(name: str, when: datetime, now: datetime) -> None:
    if when <= now:
        raise TaskError(
            f"{name}={when.isoformat()} has passed, it is {now.isoformat()} now; choose a later time."
        )


async def _schedule(
    job: Job,
    trigger: TriggerConfiguration,
    name: str | None,
    group_id: str | None,
    work_pool: str | None,
    *,
    once: bool,
) -> JobId:
    """Deploy a job whose values have been checked, after checking what is left."""
    refuse_while_importing("schedule_one_time_job()" if once else "schedule_job_recur_by_frequency()")
    declared = _declare(job, trigger, name)
    if group_id is not None:
        WarmBackupConfig(group_id=group_id)  # the rule for its name
    pool = _pool(work_pool)
    wanted = wanted_of(declared, pool, group_id)
    start, now = trigger.start_time, datetime.now(UTC)
    if start is not None and start <= now and (name is None or not await _is_deployed(declared)):
        _refuse_past("start_time", start, now)
    async with api_client() as client:
        await aensure_work_pool(client, pool, queue=group_id)
        put_it = _put_once if once else _put_recurring
        return JobId(await put_it(client, declared, wanted))


async def _is_deployed(declared: Declared) -> bool:
    """Return whether the job has this very trigger already: then its start has passed in its time."""
    async with api_client() as client:
        known = await find(client, declared.flow.name, declared.name)
    return known is not None and has_schedule(known, ticks.slug(declared.trigger))


def _declare(job: Job, trigger: TriggerConfiguration, name: str | None) -> Declared:
    if not isinstance(job, Job):
        given = f"class {job.__name__}" if isinstance(job, type) else with_article(type(job).__name__)
        raise TaskError(
            f"{given} cannot be scheduled: pass an instance of a subclass of Job; a Service or a function "
            "is declared on a Listener."
        )
    cls = type(job)
    if name is None:
        name = f"{slugify(cls.__name__)}-{uuid4().hex[:8]}"
    check_name(_text(name, "name"), "job")
    flow, fields = flows.job_flow(cls, cls.__name__, trigger), dump_state(job)
    _require_accepted(flow, fields)
    return Declared(name, flow, cls, trigger, parameters=fields)


def _require_accepted(flow: Flow[..., Any], fields: dict[str, Any]) -> None:
    """Refuse fields that Prefect would refuse as the parameters of each run."""
    try:
        flow.validate_parameters(fields)
    except (ParameterTypeError, ParameterBindError) as fault:
        reason = in_a_line(str(fault)).removeprefix("Flow run received invalid parameters: - ")
        raise TaskError(
            f"{flow.name} cannot be scheduled, for Prefect does not take its fields as JSON has them "
            f"({reason}); declare types that load what they write, without strict=True."
        ) from None


async def _put_once(client: PrefectClient, declared: Declared, wanted: dict[str, Any]) -> UUID:
    """Deploy a job without a schedule, and make its only tick."""
    done = await put(client, declared, wanted, None)
    if done.was_there and done.has_changed:
        await remove_ticks(client, done.job_id)
    when = cast("datetime", declared.trigger.start_time)
    async with _or_nothing(client, done):
        await create_tick(client, done.job_id, ticks.ONCE, when)
    return done.job_id


async def _put_recurring(client: PrefectClient, declared: Declared, wanted: dict[str, Any]) -> UUID:
    """Deploy a job with its schedule; make the tick that is too near for Prefect's scheduler to plan."""
    now, slug = datetime.now(UTC), ticks.slug(declared.trigger)
    anchor = declared.trigger.start_time or now
    done = await put(client, declared, wanted, anchor)
    if done.was_there and done.has_changed:
        deployment = await client.read_deployment(done.job_id)
        for schedule in deployment.schedules:
            if schedule.slug == slug:
                await remake_ticks(client, done.job_id, schedule.id)
    if done.has_new_schedule:
        async with _or_nothing(client, done):
            await make_first_tick(client, done.job_id, slug, anchor, now)
    return done.job_id


@asynccontextmanager
async def _or_nothing(client: PrefectClient, done: Put) -> AsyncIterator[None]:
    """Delete a job that was made here if what is still to do fails, or is cancelled: nobody has its id.

    Raises:
        ApiUnavailableError: the API has refused what was asked, or does not make sense.
    """
    try:
        yield
    except BaseException as fault:
        stays = "" if done.was_there else await _unmade(client, done.job_id)
        if not isinstance(fault, API_FAULTS):
            raise
        raise ApiUnavailableError(f"{explain(fault, is_prefect=True)}{stays}.") from fault


async def _unmade(client: PrefectClient, job_id: UUID) -> str:
    """Delete a job, and return what to say if that has failed, too."""
    try:
        await client.delete_deployment(job_id)
    except (*API_FAULTS, ObjectNotFound) as fault:
        return "" if is_gone(fault) else f"; job {job_id} was made all the same: unschedule it"
    return ""


# --- pausing and ending ---------------------------------------------------------------------------


def unschedule_job(job_id: JobId | str) -> None:
    """End a job at once: nothing of it starts any more. A run that has begun goes on; history stays.

    Args:
        job_id: its id, or its name: that of its deployment, or ``flow/deployment``.

    Raises:
        TaskError: there is no such job, or there are several of that name.
        CoordinationError: the coordination database cannot be reached from here; nothing has changed.
    """
    run_sync(aunschedule_job(job_id))


async def aunschedule_job(job_id: JobId | str) -> None:
    """Do what `unschedule_job` does, from async code."""
    async with _job(job_id) as (client, deployment):
        await switches.end(client, deployment, "the job was unscheduled")
        await client.delete_deployment(deployment.id)


def pause_job(job_id: JobId | str) -> None:
    """Pause a job on all nodes, until it is resumed; a run that has begun goes on.

    When this returns nothing of the job begins any more.

    Args:
        job_id: its id, or its name: that of its deployment, or ``flow/deployment``.

    Raises:
        TaskError: there is no such job, or there are several of that name.
        CoordinationError: the coordination database, where runs ask before they begin, cannot be reached
            from here; nothing has changed.
    """
    run_sync(apause_job(job_id))


async def apause_job(job_id: JobId | str) -> None:
    """Do what `pause_job` does, from async code."""
    async with _job(job_id) as (client, deployment):
        await _pause(client, deployment)


def resume_job(job_id: JobId | str) -> None:
    """Resume a job that is paused; for the ticks that it missed, its waiting policy says what happens.

    Args:
        job_id: its id, or its name: that of its deployment, or ``flow/deployment``.

    Raises:
        TaskError: there is no such job, or there are several of that name.
        CoordinationError: the coordination database cannot be reached from here; nothing has changed.
    """
    run_sync(aresume_job(job_id))


async def aresume_job(job_id: JobId | str) -> None:
    """Do what `resume_job` does, from async code."""
    async with _job(job_id) as (client, deployment):
        await switches.resume(client, deployment)


def pause_all_jobs(*, work_pool: str | None = None) -> None:
    """Pause all jobs of a work pool, those of listeners too.

    Args:
        work_pool: by default the one that the settings name.

    Raises:
        TaskError: there is no pool of the name that was given.
    """
    run_sync(apause_all_jobs(work_pool=work_pool))


async def apause_all_jobs(*, work_pool: str | None = None) -> None:
    """Do what `pause_all_jobs` does, from async code."""
    await _each_job(work_pool, _pause)


def resume_all_jobs(*, work_pool: str | None = None) -> None:
    """Resume all jobs of a work pool, those of listeners too.

    Args:
        work_pool: by default the one that the settings name.

    Raises:
        TaskError: there is no pool of the name that was given.
    """
    run_sync(aresume_all_jobs(work_pool=work_pool))


async def aresume_all_jobs(*, work_pool: str | None = None) -> None:
    """Do what `resume_all_jobs` does, from async code."""
    await _each_job(work_pool, switches.resume)


async def _each_job(
    work_pool: str | None, switch: Callable[[PrefectClient, DeploymentResponse], Awaitable[None]]
) -> None:
    """Switch all jobs of a work pool, but for those that are deleted meanwhile.

    Raises:
        TaskError: there is no pool of the name that was given, or that is no name of one.
    """
    pool = _pool(work_pool)
    async with api_client() as client:
        if work_pool is not None:
            await _require_pool(client, pool)
        for deployment in await jobs_of_pool(client, pool):
            with suppress(ObjectNotFound):
                await switch(client, deployment)


async def _require_pool(client: PrefectClient, pool: str) -> None:
    try:
        await client.read_work_pool(pool)
    except ObjectNotFound:
        raise TaskError(f"there is no work pool {pool!r}; correct its name.") from None


async def _pause(client: PrefectClient, deployment: DeploymentResponse) -> None:
    await switches.pause(client, deployment)
    await remove_ticks(client, deployment.id, recurring_only=True)


@asynccontextmanager
async def _job(job_id: JobId | str) -> AsyncIterator[tuple[PrefectClient, DeploymentResponse]]:
    """Yield a client and the deployment of a job, which may be gone any moment.

    Raises:
        TaskError: there is no such job of ours, or there are several of that name.
    """
    known = job_id if isinstance(job_id, JobId | str) else JobId(job_id)
    async with api_client() as client:
        try:
            if isinstance(known, JobId):
                deployment = await client.read_deployment(known.id)
            else:
                deployment = await find_job(client, known)
            _refuse_foreign(deployment)
            yield client, deployment
        except ObjectNotFound as gone:
            raise TaskError(
                f"there is no job {known}: it was never scheduled here, or has been unscheduled; "
                "get_running_jobs() tells which there are."
            ) from gone


def _refuse_foreign(deployment: DeploymentResponse) -> None:
    if TAG not in deployment.tags:
        raise TaskError(
            f"{deployment.id} is the deployment {deployment.name!r}, which is none of ours; pass the id "
            "that scheduling a job returned, or a job's name."
        )


# --- looking, and the pool ------------------------------------------------------------------------


def get_running_jobs(*, work_pool: str | None = None) -> list[JobId]:
    """Return the jobs of a work pool that still have something to do, paused ones included.

    Args:
        work_pool: by default the one that the settings name.
    """
    return run_sync(aget_running_jobs(work_pool=work_pool))


async def aget_running_jobs(*, work_pool: str | None = None) -> list[JobId]:
    """Do what `get_running_jobs` does, from async code."""
    pool = _pool(work_pool)
    async with api_client() as client:
        jobs = await jobs_of_pool(client, pool)
        recurring = {
            job.id: [
                schedule.active and not switches.has_ended(trigger_of(job))
                for schedule in job.schedules
                if ticks.is_slug(schedule.slug)
            ]
            for job in jobs
        }
        waiting = await unfinished(client, [job_id for job_id, ours in recurring.items() if not ours])
    return [JobId(job_id) for job_id, ours in recurring.items() if any(ours) or job_id in waiting]


def configure_worker_pool(
    worker_count: int = 5, waiting_time: Interval = 5, *, work_pool: str | None = None
) -> None:
    """Set for all nodes of a work pool how much they run at once; it is made on first use.

    Args:
        worker_count: runs at once on a node, at least 1; a node's ``--limit`` overrides it.
        waiting_time: seconds after its time, or a timedelta, within which a tick is not yet late; then its
            waiting policy says what happens.
        work_pool: by default the one that the settings name.

    Raises:
        TaskError: a value is none that its rule allows, or the work pool is of another type.
    """
    run_sync(aconfigure_worker_pool(worker_count, waiting_time, work_pool=work_pool))


async def aconfigure_worker_pool(
    worker_count: int = 5, waiting_time: Interval = 5, *, work_pool: str | None = None
) -> None:
    """Do what `configure_worker_pool` does, from async code."""
    given = WorkerPoolConfiguration(worker_count=worker_count, waiting_time=cast("Any", waiting_time))
    size = PoolSize(worker_count=given.worker_count, waiting_time=given.waiting_time)
    pool = _pool(work_pool)
    async with api_client() as client:
        await aensure_work_pool(client, pool, size=size)


def _pool(name: str | None) -> str:
    if name is None:
        return TaskadapterSettings().work_pool
    check_pool(_text(name, "work_pool"))
    return name


def _text(given: object, parameter: str) -> str:
    if not isinstance(given, str):
        raise TaskError(f"{parameter}={shown(given)} must be a string; choose one, or leave it out.")
    return given
