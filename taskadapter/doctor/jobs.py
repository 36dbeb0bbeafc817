"""What a pool's jobs say, as Prefect has them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prefect.client.schemas.schedules import IntervalSchedule

from taskadapter.agent.switches import is_paused, why_over
from taskadapter.coordination.executions import SWITCHED_OFF
from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.errors import DeclarationError
from taskadapter.prefect_api.deployments import DETACHED, has_schedule, stored_trigger, trigger_of
from taskadapter.rules import ticks
from taskadapter.settings import check_interval

if TYPE_CHECKING:
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse

    from taskadapter.coordination.progress import JobRow
    from taskadapter.declare.triggers import TriggerConfiguration


def look_at_jobs(
    jobs: list[DeploymentResponse], others: int, rows: Mapping[str, JobRow]
) -> Iterator[Finding]:
    """Say what is wrong with each of a pool's jobs, and which go on.

    Args:
        jobs: the pool's deployments that are ours.
        others: how many it has besides, whose schedules are what their owners make of them.
        rows: what the database has of the jobs, by their ids; of none where it cannot be read.
    """
    if not jobs and not others:
        yield warning("the pool has no jobs; deploy some")
        return
    over, paused = {}, []
    for job in jobs:
        row = rows.get(str(job.id))
        yield from _trigger(job)
        yield from _rest(job)
        if (why := why_over(job, row)) is not None:
            over[job.name] = why
            yield from _to_be_restarted(job, why)
        elif is_paused(job, row):
            paused.append(job)
    yield ok(_in_numbers(len(jobs) - len(over) - len(paused), over, others))
    yield from _paused(sorted(job.name for job in paused if job.paused))
    for job in paused:
        if not job.paused:
            name = shlex.quote(job.name)
            yield warning(
                f"job {job.name!r} is paused in the database, and Prefect was not told: it is not run, and "
                f"shows as active; run `taskadapter pause {name}` again, or `taskadapter resume {name}`"
            )


def _paused(names: list[str]) -> Iterator[Finding]:
    if names:
        yield warning(
            f"paused, and not run until somebody resumes {'it' if len(names) == 1 else 'them'}: "
            f"{', '.join(names)}; switch a deployment on in the UI, or run `taskadapter resume JOB`"
        )


def _to_be_restarted(job: DeploymentResponse, why: str) -> Iterator[Finding]:
    trigger = trigger_of(job)
    can_be = trigger is not None and has_schedule(job, ticks.slug(trigger))
    if why == SWITCHED_OFF and can_be:
        yield warning(
            f"job {job.name!r} is over: {why}; where that is not meant, start it again with `taskadapter "
            f"restart {shlex.quote(job.name)}`"
        )
    if ticks.is_failure(why):
        yield error(
            f"job {job.name!r} is over: {why}; see that run's log, mend the job, and start it again with "
            f"`taskadapter restart {shlex.quote(job.name)}`"
        )


def _in_numbers(scheduled: int, over: Mapping[str, str], others: int) -> str:
    parts = [f"{scheduled} jobs are scheduled" if scheduled != 1 else "1 job is scheduled"]
    if over:
        parts.append(f"over: {', '.join(f'{name} ({over[name]})' for name in sorted(over))}")
    if others:
        parts.append(f"{others} deployment{'s' * (others > 1)} that taskadapter did not declare")
    return "; ".join(parts)


def _trigger(job: DeploymentResponse) -> Iterator[Finding]:
    try:
        trigger = stored_trigger(job.job_variables)
        if trigger is None:
            yield error(f"job {job.name!r} has lost its trigger; deploy it again")
            return
        if job.schedules:
            check_interval(trigger.interval)
    except DeclarationError as fault:
        yield error(f"job {job.name!r}: {fault}, and deploy it again")
        return
    if DETACHED not in job.tags:  # else all that is left of it is to be seen in the UI
        yield from _schedules(job, trigger)


def _schedules(job: DeploymentResponse, trigger: TriggerConfiguration) -> Iterator[Finding]:
    slug = ticks.slug(trigger)
    own = next((found for found in job.schedules if found.slug == slug), None)
    if own is not None and (differing := _differing(own, trigger)):
        yield warning(
            f"job {job.name!r} runs {differing}, as its schedule was edited in Prefect, and its trigger "
            f"says every {trigger.interval:g} s; delete that schedule in the UI and deploy again, or "
            "declare what is wanted"
        )
    if own is None and trigger.interval != ticks.ONE_TIME:
        yield error(
            f"job {job.name!r} has no schedule for its trigger, every {trigger.interval:g} s; deploy it "
            "again"
        )
    for found in job.schedules:
        if found.active and found is not own and ticks.is_slug(found.slug):
            yield warning(
                f"job {job.name!r} also runs by the schedule of an earlier trigger, {found.slug!r}; deploy "
                "it again, or delete that schedule in the UI"
            )


def _differing(found: DeploymentSchedule, trigger: TriggerConfiguration) -> str:
    """Say how a schedule differs from the trigger that it was made for; nothing if it does not."""
    if not isinstance(found.schedule, IntervalSchedule):
        return f"by a {type(found.schedule).__name__}"
    seconds = found.schedule.interval.total_seconds()
    # Prefect keeps microseconds.
    return f"every {seconds:g} s" if abs(seconds - trigger.interval) > 1e-6 else ""


def _rest(job: DeploymentResponse) -> Iterator[Finding]:
    if not job.entrypoint:
        yield error(f"job {job.name!r} has no entrypoint, and no node can load its flow; deploy it again")
    limit = job.global_concurrency_limit
    if limit is not None and limit.active and limit.limit == 0:
        yield error(
            f"job {job.name!r} has a concurrency limit of 0, and its runs wait; "
            f"`prefect gcl update {limit.name} --limit 1`"
        )
