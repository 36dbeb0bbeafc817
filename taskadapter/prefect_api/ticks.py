"""The runs of a pool's deployments, as Prefect has them: those that are due, and the ticks that we make."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from taskadapter.prefect_api.client import PAGE, all_pages
from taskadapter.rules import ticks

MANY_LATE = 10
"""A job that is late with so many ticks has enough to begin with: others are looked for without it."""


@dataclass(frozen=True)
class Due:
    """Runs that are due, as far as the API lists them.

    Attributes:
        runs: them, in no order.
        until: up to when all are listed.
        is_cut: whether more are due than are listed.
        behind: the jobs with more late ticks than are wanted at once, and up to when theirs are listed.
    """

    runs: list[FlowRun]
    until: datetime
    is_cut: bool = False
    behind: Mapping[UUID, datetime] = field(default_factory=dict)


async def due(
    client: PrefectClient,
    work_pool: str,
    queues: list[str] | None,
    until: datetime,
    *,
    job_ids: Iterable[UUID],
    late: Callable[[], Collection[UUID]],
    withheld: Collection[str] = (),
) -> Due:
    """Return the runs on the queues of a work pool that are due until some moment.

    The API lists so many at once, and those first whose queue comes first, however late others are. Where
    more are due, jobs are asked for by themselves: what some are late with hides no run of another.

    Args:
        client: connected to the API.
        work_pool: the pool's name.
        queues: the names of the queues; None for all of the pool.
        until: the moment.
        job_ids: the jobs on these queues, but for those that are withheld.
        late: returns those of them that are known to be late with many ticks.
        withheld: the queues of which Prefect lists not all, by a pause or a limit.

    Raises:
        ObjectNotFound: a queue, or the pool, is gone.
    """
    page = await _listed(client, work_pool, queues, until)
    if len(page) < PAGE:
        return Due(page, until)
    others = await _listed(client, work_pool, [*withheld], until) if withheld else []
    behind = late()
    parts = [
        await _due_of(client, work_pool, jobs, until, least)
        for jobs, least in ((behind, 1), (set(job_ids).difference(behind), MANY_LATE))
    ]
    runs = {run.id: run for part in ([*page, *others], *(part.runs for part in parts)) for run in part}
    return Due(
        [*runs.values()],
        min(part.until for part in parts),
        is_cut=any(part.is_cut for part in parts),
        behind={job_id: until for part in parts for job_id, until in part.behind.items()},
    )


async def _due_of(
    client: PrefectClient, work_pool: str, jobs: Collection[UUID], until: datetime, least: int
) -> Due:
    """Return the runs of jobs, which are left out one after another when so many late ticks are listed."""
    left, runs, behind = set(jobs), list[FlowRun](), dict[UUID, datetime]()
    while left:
        page = await client.get_scheduled_flow_runs_for_deployments([*left], until)
        runs += [run for run in page if run.work_pool_name == work_pool and not _has_process(run)]
        if len(page) < PAGE:
            break
        if not (more_behind := _behind(page, least)):
            # They are listed by time: perhaps others are due at the very moment of the last one.
            last = max(filter(None, (run.next_scheduled_start_time for run in page)), default=until)
            return Due(runs, last - timedelta.resolution, is_cut=True, behind=behind)
        behind |= more_behind
        left -= more_behind.keys()
    return Due(runs, until, behind=behind)


async def _listed(
    client: PrefectClient, work_pool: str, queues: list[str] | None, until: datetime
) -> list[FlowRun]:
    found = await client.get_scheduled_flow_runs_for_work_pool(
        work_pool, work_queue_names=queues, scheduled_before=until
    )
    return [response.flow_run for response in found]


def _has_process(flow_run: FlowRun) -> bool:
    """Return whether a run waits for its next attempt in the process that has it: no pool lists it."""
    return flow_run.empirical_policy.retry_type == "in_process"


def _behind(runs: Iterable[FlowRun], least: int) -> dict[UUID, datetime]:
    """Return the jobs that have so many late ticks among some runs, and the moment of the last of these."""
    late, now = defaultdict[UUID, list[datetime]](list), datetime.now(UTC)
    for run in runs:
        tick = ticks.tick_of(run)
        if run.deployment_id is not None and tick is not None and tick < now:
            late[run.deployment_id].append(tick)
    return {job_id: max(missed) for job_id, missed in late.items() if len(missed) >= least}


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
        HTTPStatusError: the API refuses it; with status 404, there is no such deployment.
    """
    state: State[Any] = Scheduled(scheduled_time=due)
    key = ticks.tick_key(deployment_id, schedule_id, due)
    return await client.create_flow_run_from_deployment(deployment_id, state=state, idempotency_key=key)


async def unfinished(client: PrefectClient, job_ids: Iterable[UUID]) -> set[UUID]:
    """Return those of the jobs that have a run which is planned, or goes on."""
    states = [kind for kind in StateType if kind not in TERMINAL_STATES]
    found = await runs_of(client, job_ids, states)
    return {flow_run.deployment_id for flow_run in found if flow_run.deployment_id is not None}


async def remove_ticks(client: PrefectClient, job_id: UUID, *, recurring_only: bool = False) -> None:
    """Delete the ticks that were made by us and that nobody has claimed; Prefect deletes its own.

    Args:
        client: connected to the API.
        job_id: the job.
        recurring_only: leave that of a one-time job.
    """
    for flow_run in await _ticks_of_ours(client, job_id):
        if not recurring_only or _place(flow_run)[0] != ticks.ONCE:
            await delete_run(client, flow_run)


async def remake_ticks(client: PrefectClient, job_id: UUID, schedule_id: UUID) -> None:
    """Make anew the ticks that were made by us, for a deployment that has changed.

    Those of schedules that it no longer has go.

    Args:
        client: connected to the API.
        job_id: the job.
        schedule_id: the schedule that it has.
    """
    for flow_run in await _ticks_of_ours(client, job_id):
        of, due = _place(flow_run)
        await delete_run(client, flow_run)
        if of == str(schedule_id):
            await create_tick(client, job_id, schedule_id, due)


async def switch_off(client: PrefectClient, deployment: DeploymentResponse, reason: str) -> None:
    """Switch the schedules of a job off, and have nothing of it begin that is planned."""
    for schedule in deployment.schedules:
        if schedule.active:
            with contextlib.suppress(ObjectNotFound):
                await client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    await _end_planned(client, deployment.id, reason)


async def _end_planned(client: PrefectClient, job_id: UUID, reason: str) -> None:
    """Have nothing more of a job begin: what is claimed is Skipped, what is not is deleted."""
    for flow_run in await runs_of(client, [job_id], [StateType.PENDING, StateType.SCHEDULED]):
        if flow_run.state_type is StateType.PENDING:
            with contextlib.suppress(ObjectNotFound):  # the run's, which is not that the job is gone
                await client.set_flow_run_state(flow_run.id, ticks.skipped(reason), force=True)
        elif flow_run.state_name != "AwaitingRetry":  # that one has begun
            await delete_run(client, flow_run)


async def _ticks_of_ours(client: PrefectClient, job_id: UUID) -> list[FlowRun]:
    return [
        flow_run
        for flow_run in await runs_of(client, [job_id], [StateType.SCHEDULED])
        if ticks.is_tick(flow_run) and not flow_run.auto_scheduled and flow_run.run_count == 0
    ]


def _place(flow_run: FlowRun) -> tuple[str, datetime]:
    """Return what a tick of ours is of, and its time, from its key."""
    _, _, of, due = (flow_run.idempotency_key or "").split(" ", 3)
    return of, datetime.fromisoformat(due)


async def runs_of(client: PrefectClient, job_ids: Iterable[UUID], states: list[StateType]) -> list[FlowRun]:
    """Return the runs of jobs that are in one of some states."""
    wanted = list(job_ids)
    if not wanted:
        return []
    return await all_runs(
        client,
        FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=wanted)),
    )


async def all_runs(client: PrefectClient, which: FlowRunFilter, **filters: Any) -> list[FlowRun]:
    """Return all runs that some filters let through, which `read_flow_runs` has as well."""
    return await all_pages(
        client.read_flow_runs, flow_run_filter=which, sort=FlowRunSort.ID_DESC, **filters
    )


async def delete_run(client: PrefectClient, flow_run: FlowRun) -> None:
    """Delete a run, unless somebody else was quicker."""
    with contextlib.suppress(ObjectNotFound):
        await client.delete_flow_run(flow_run.id)
