"""Ticks that Prefect's scheduler has not planned are made: once each, in order, and no others."""

from __future__ import annotations

import asyncio
import logging
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Pending

from deployments.local import wait_until
from taskadapter.agent.plans import MADE_AHEAD
from taskadapter.agent.switches import carry_over, reading_of
from taskadapter.agent.timetable import Timetable
from taskadapter.coordination import store
from taskadapter.coordination.executions import Entered
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.client import PAGE, side_by_side
from taskadapter.prefect_api.ticks import Due, create_tick, due
from taskadapter.rules import ticks
from tests.acceptance.project import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

POOL = "test-timetable"
QUEUES = ["default"]
INTERVAL = timedelta(seconds=3600)


@flow
def idle() -> None: ...


@pytest.fixture
def job(prefect_client: SyncPrefectClient) -> UUID:
    """A job due every hour, whose tick 0 was four and a half hours ago, deployed just now."""
    ensure_work_pool(POOL)
    return deployed(prefect_client, datetime.now(UTC) - 4.5 * INTERVAL)


def deployed(client: SyncPrefectClient, anchor: datetime, *, pool: str = POOL) -> UUID:
    trigger = TriggerConfiguration(interval=INTERVAL)
    return client.create_deployment(
        client.create_flow(idle),
        uuid.uuid4().hex,
        work_pool_name=pool,
        job_variables={"trigger": trigger.model_dump(mode="json", exclude_defaults=True)},
        schedules=[
            DeploymentScheduleCreate(
                schedule=IntervalSchedule(interval=INTERVAL, anchor_date=anchor, timezone="UTC"),
                slug=ticks.slug(trigger),
            )
        ],
    )


def anchor_of(client: SyncPrefectClient, job: UUID) -> datetime:
    (schedule,) = client.read_deployment(job).schedules
    assert isinstance(schedule.schedule, IntervalSchedule)
    return ticks.in_utc(schedule.schedule.anchor_date)


async def nothing_begun(jobs: Collection[UUID]) -> dict[UUID, Entered]:
    """The ledger of jobs that have not begun anything."""
    return dict.fromkeys(jobs, Entered())


def complete(
    job: UUID,
    *,
    found: list[FlowRun] | None = None,
    entered: list[datetime] | None = None,
    queues: list[str] = QUEUES,
) -> list[FlowRun]:
    """What a new agent makes of what it finds."""

    async def in_the_ledger(jobs: Collection[UUID]) -> dict[UUID, Entered]:
        return dict.fromkeys(jobs, Entered(entered or []))

    async def look() -> list[FlowRun]:
        async with get_client() as client:
            timetable = Timetable(client, logging.getLogger("test"), in_the_ledger)
            timetable.learn([await client.read_deployment(job)])
            return await timetable.complete(Due(found or [], now := datetime.now(UTC)), queues, [], now)

    return asyncio.run(look())


class Node:
    """What agents that share a database, one after the other, make of a job."""

    def __init__(self, folder: Path, job: UUID) -> None:
        self.database = f"sqlite:///{folder / 'tasks.db'}"
        self.job = job

    def complete(self) -> list[FlowRun]:
        """Start a new agent, and return what it finds to be due."""

        async def entered(jobs: Collection[UUID]) -> dict[UUID, Entered]:
            return store.entered(self.database, jobs, 10)

        async def look() -> list[FlowRun]:
            async with get_client() as client:
                timetable = Timetable(client, logging.getLogger("test"), entered)
                deployment = await client.read_deployment(self.job)
                await carry_over(self.database, [deployment])
                timetable.learn([deployment])
                return await timetable.complete(Due([], now := datetime.now(UTC)), QUEUES, [], now)

        return asyncio.run(look())


@pytest.fixture
def node(tmp_path: Path, job: UUID, monkeypatch: pytest.MonkeyPatch) -> Node:
    """The database knows the job, whose schedule is not so new that it is not asked."""
    monkeypatch.setattr("taskadapter.agent.timetable.NEW", timedelta(0))
    found = Node(tmp_path, job)
    found.complete()
    return found


def hours(runs: list[FlowRun], anchor: datetime, interval: timedelta = INTERVAL) -> list[float]:
    return [
        (ticks.in_utc(run.expected_start_time) - anchor) / interval
        for run in runs
        if run.expected_start_time
    ]


def test_missing_ticks_are_made(prefect_client: SyncPrefectClient, job: UUID) -> None:
    """Every tick since the anchor that nobody has planned is made, in order, exactly at its time."""
    made = complete(job)

    assert hours(made, anchor_of(prefect_client, job)) == [0, 1, 2, 3, 4]
    assert {run.state_name for run in made} <= {"Scheduled", "Late"}
    assert all(ticks.is_tick(run) for run in made)


def test_what_is_missing_between_what_has_run_is_made(
    job: UUID, prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tick that nobody has run, and of which there is no run any more, is found by the ledger's gap."""
    monkeypatch.setattr("taskadapter.agent.timetable.NEW", timedelta(0))
    anchor = anchor_of(prefect_client, job)

    made = complete(job, entered=[anchor + 4 * INTERVAL, anchor + 2 * INTERVAL])

    assert [ticks.tick_of(run) for run in made] == [anchor + 3 * INTERVAL]


def test_a_tick_is_made_once(job: UUID) -> None:
    """Two agents that miss the same ticks get the same runs."""
    assert [run.id for run in complete(job)] == [run.id for run in complete(job)]


def test_what_waits_already_is_not_made(job: UUID) -> None:
    """A tick that was found is kept as it is, and only the others are added."""
    first, *others = complete(job)

    assert [run.id for run in complete(job, found=[first])] == [first.id, *(run.id for run in others)]


def test_what_was_claimed_is_settled(prefect_client: SyncPrefectClient, job: UUID) -> None:
    """A new agent goes on behind the last tick that some agent has claimed."""
    for run in complete(job)[:3]:
        prefect_client.set_flow_run_state(run.id, Pending())

    assert hours(complete(job), anchor_of(prefect_client, job)) == [3, 4]


def test_a_job_that_moves_takes_its_late_ticks_along(prefect_client: SyncPrefectClient, job: UUID) -> None:
    """Ticks that wait on its former queue are made anew on the one it is on now; claimed ones stay."""
    claimed, *waiting = complete(job)
    prefect_client.set_flow_run_state(claimed.id, Pending())
    elsewhere = f"{POOL}-elsewhere"
    ensure_work_pool(elsewhere)
    prefect_client.update_deployment(
        job, DeploymentUpdate(work_pool_name=elsewhere, work_queue_name="default")
    )

    moved = complete(job)

    assert hours(moved, anchor_of(prefect_client, job)) == [1, 2, 3, 4]
    assert {run.work_queue_id for run in moved} == {prefect_client.read_deployment(job).work_queue_id}
    left = {run.id for run in planned(prefect_client, job, 1)} & {run.id for run in [claimed, *waiting]}
    assert left == {claimed.id}
    assert [run.id for run in complete(job)] == [run.id for run in moved]


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("goes_on", [False, True], ids=["all claimed", "one waits"])
def test_what_was_claimed_on_a_queue_that_is_deleted_is_made_anew(
    prefect_client: SyncPrefectClient, job: UUID, has_begun: bool, goes_on: bool
) -> None:
    """Its node is gone, no takeover finds it in a queue, and its body has not begun: else it is settled."""
    update = DeploymentUpdate(work_pool_name=POOL, work_queue_name=uuid.uuid4().hex)
    prefect_client.update_deployment(job, update)
    queues = [update.work_queue_name or ""]
    due = complete(job, queues=queues)
    assert len(due) == 5
    for run in due[: 4 if goes_on else 5]:
        prefect_client.set_flow_run_state(run.id, Pending())
    for queue in prefect_client.read_work_queues(work_pool_name=POOL):
        if queue.name in queues:
            prefect_client.delete_work_queue_by_id(queue.id)
    prefect_client.update_deployment(job, update)

    begun = [tick for run in due if (tick := ticks.tick_of(run)) is not None][: 2 if has_begun else 0]
    found = complete(job, queues=queues, entered=begun[::-1])

    assert hours(found, anchor_of(prefect_client, job)) == [0, 1, 2, 3, 4][len(begun) :]
    assert {run.work_queue_id for run in found} == {prefect_client.read_deployment(job).work_queue_id}


def test_a_schedule_that_was_edited_in_the_ui_holds(prefect_client: SyncPrefectClient, job: UUID) -> None:
    """The ticks made are those of the schedule that Prefect has, from the moment of the edit."""
    deployment = prefect_client.read_deployment(job)
    (schedule,) = deployment.schedules
    assert schedule.created is not None
    wait_until(
        lambda: datetime.now(UTC) > schedule.created + timedelta(seconds=1), PATIENCE, "a second to pass"
    )
    edited = IntervalSchedule(
        interval=timedelta(seconds=7), anchor_date=anchor_of(prefect_client, job), timezone="UTC"
    )

    async def look() -> list[list[FlowRun]]:
        async with get_client() as client:
            timetable = Timetable(client, logging.getLogger("test"), nothing_begun)
            found = []
            for change in (False, True):
                if change:
                    await client.update_deployment_schedule(job, schedule.id, schedule=edited)
                timetable.learn([await client.read_deployment(job)])
                until = datetime.now(UTC) + timedelta(seconds=change * 21)
                found.append(await timetable.complete(Due([], until), QUEUES, [], until))
            return found

    before, after = asyncio.run(look())

    anchor = anchor_of(prefect_client, job)
    assert hours(before, anchor) == [0, 1, 2, 3, 4]
    first, *others = hours(after, anchor, timedelta(seconds=7))
    assert others
    assert others == [first + number for number in range(1, len(after))]
    assert first == int(first)


def test_a_paused_job_owes_nothing_until_it_is_resumed(
    prefect_client: SyncPrefectClient, job: UUID
) -> None:
    """While a job is paused no tick of it is made; all of them are when it goes on."""
    prefect_client.pause_deployment(job)
    assert complete(job) == []

    prefect_client.resume_deployment(job)
    assert len(complete(job)) == 5


def test_a_schedule_that_is_switched_on_again_begins_afresh(
    prefect_client: SyncPrefectClient, job: UUID, node: Node
) -> None:
    """What a job that had ended would have been due meanwhile is not made up for."""
    (schedule,) = prefect_client.read_deployment(job).schedules
    prefect_client.update_deployment_schedule(job, schedule.id, active=False)
    assert node.complete() == []
    prefect_client.update_deployment_schedule(job, schedule.id, active=True)
    assert node.complete() == []


def test_a_schedule_that_was_edited_while_no_agent_was_there(
    prefect_client: SyncPrefectClient, job: UUID, node: Node
) -> None:
    """None of its ticks from before the edit is owed, and each after it is."""
    (schedule,) = prefect_client.read_deployment(job).schedules
    edited = IntervalSchedule(
        interval=timedelta(seconds=1), anchor_date=anchor_of(prefect_client, job), timezone="UTC"
    )
    prefect_client.update_deployment_schedule(job, schedule.id, schedule=edited)
    updated = datetime.fromisoformat(reading_of(prefect_client.read_deployment(job)).updated)

    made = wait_until(node.complete, PATIENCE, "a tick")
    assert 0 < (ticks.in_utc(made[0].expected_start_time) - updated).total_seconds() <= 1


def test_what_is_deployed_again_owes_what_it_did(
    prefect_client: SyncPrefectClient, job: UUID, node: Node
) -> None:
    """Ticks that nobody has planned are not forgotten because the same declaration is deployed again."""
    (schedule,) = prefect_client.read_deployment(job).schedules
    prefect_client.pause_deployment(job)
    created = schedule.created
    assert created is not None
    same = schedule.schedule

    def deployed_again_later() -> bool:
        prefect_client.update_deployment_schedule(job, schedule.id, schedule=same, active=True)
        (now,) = prefect_client.read_deployment(job).schedules
        return now.updated is not None and now.updated - created > timedelta(seconds=1)

    wait_until(deployed_again_later, PATIENCE, "it to be deployed a second after it was made")
    prefect_client.resume_deployment(job)
    assert hours(node.complete(), anchor_of(prefect_client, job)) == [0, 1, 2, 3, 4]


def test_the_scheduler_does_not_plan_what_is_made(prefect_client: SyncPrefectClient) -> None:
    """A tick made ahead of its time has the scheduler's own key: there is one run of it."""
    ensure_work_pool(POOL)
    anchor = datetime.now(UTC) + timedelta(minutes=5)
    job = deployed(prefect_client, anchor)
    (schedule,) = prefect_client.read_deployment(job).schedules

    async def make() -> FlowRun:
        async with get_client() as client:
            return await create_tick(client, job, schedule.id, anchor)

    made = asyncio.run(make())
    runs = wait_until(lambda: planned(prefect_client, job, 3), PATIENCE, "the scheduler to plan")
    assert [run.id for run in runs if run.expected_start_time == anchor] == [made.id]


def planned(client: SyncPrefectClient, job: UUID, count: int) -> list[FlowRun]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    ours = DeploymentFilter(id=DeploymentFilterId(any_=[job]))
    runs: list[Any] = client.read_flow_runs(deployment_filter=ours)
    return runs if len(runs) >= count else []


def test_many_are_made_in_portions(prefect_client: SyncPrefectClient) -> None:
    """Of many missing ticks the oldest come first, and later ones wait until those are there."""
    ensure_work_pool(POOL)
    job = deployed(prefect_client, datetime.now(UTC) - 50.5 * INTERVAL)

    assert hours(complete(job), anchor_of(prefect_client, job)) == list(range(MADE_AHEAD))


def test_a_job_that_is_gone_holds_nothing_up(prefect_client: SyncPrefectClient, job: UUID) -> None:
    """A deployment that was deleted since it was read owes nothing, and is no error."""

    async def look() -> list[FlowRun]:
        async with get_client() as client:
            timetable = Timetable(client, logging.getLogger("test"), nothing_begun)
            timetable.learn([await client.read_deployment(job)])
            await client.delete_deployment(job)
            return await timetable.complete(Due([], now := datetime.now(UTC)), QUEUES, [], now)

    assert asyncio.run(look()) == []


def test_a_job_that_is_far_behind_hides_nothing_of_another(prefect_client: SyncPrefectClient) -> None:
    """Prefect lists two hundred runs: what somebody asks for comes behind more late ticks than that."""
    pool = "test-timetable-behind"
    ensure_work_pool(pool)
    behind, other = (deployed(prefect_client, datetime.now(UTC), pool=pool) for _ in range(2))
    (schedule,) = prefect_client.read_deployment(behind).schedules

    async def look() -> Due:
        async with get_client() as client:
            late = [datetime.now(UTC) - (hour + 1) * INTERVAL for hour in range(PAGE + 5)]
            await side_by_side(create_tick(client, behind, schedule.id, tick) for tick in late)
            await client.create_flow_run_from_deployment(other)
            soon = datetime.now(UTC) + timedelta(seconds=30)
            return await due(client, pool, None, soon, job_ids=[behind, other], late=list)

    found = asyncio.run(look())
    assert [run.deployment_id for run in found.runs if not ticks.is_tick(run)] == [other]
    # One that is being marked as late at this very moment may be left out of any list.
    assert len([run for run in found.runs if run.deployment_id == behind]) > PAGE / 2
    assert not found.is_cut
