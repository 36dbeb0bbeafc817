"""Scheduling from a program on a real server: what is made, what is changed, and what is left alone."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import uuid
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, WorkPoolFilter
from prefect.client.schemas.filters import WorkPoolFilterName as PoolName
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Pending, Running
from pydantic import Field

import taskadapter
from deployments.local import PrefectServer, environment, wait_until
from taskadapter import (
    ErrorPolicy,
    Job,
    JobId,
    Listener,
    TaskError,
    TaskPolicy,
    TriggerConfiguration,
    WarmBackupConfig,
    aconfigure_worker_pool,
    aget_running_jobs,
    apause_all_jobs,
    apause_job,
    aresume_all_jobs,
    aresume_job,
    aschedule_job_recur_by_frequency,
    aschedule_one_time_job,
    aunschedule_job,
    configure_worker_pool,
    get_running_jobs,
    pause_all_jobs,
    pause_job,
    resume_all_jobs,
    resume_job,
    schedule_job_recur_by_frequency,
    schedule_one_time_job,
    scheduler,
    unschedule_job,
)
from taskadapter.deploy import deploy
from taskadapter.execution.flow import job_flow
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.deployments import jobs_of_pool
from taskadapter.prefect_api.pool import Domain, PoolSize
from taskadapter.rules.ticks import ONE_TIME, is_tick, slug, tick_key
from tests.acceptance.project import PATIENCE
from tests.pages import blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.client.schemas.responses import DeploymentResponse

PROJECT = Path(__file__).parents[2]
NOON = datetime(2090, 1, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


class Greeting(Job):
    """Says hello."""

    message: str
    times: int = 1

    def execute(self) -> None: ...


class Nightly(Job):
    day: str = "Monday"

    async def execute(self) -> None: ...


class Letter(Job):
    to: str = Field(alias="recipient")
    day: date = date(2030, 1, 1)
    lines: list[str] = Field(default_factory=list)
    within: timedelta = timedelta(hours=1)

    def execute(self) -> None: ...


HELLO = Greeting(message="hello")


def check_inbox() -> None: ...


@pytest.fixture
def pool() -> str:
    """A work pool's name that no other test has."""
    return f"pool-{uuid.uuid4().hex[:8]}"


def deployment(client: SyncPrefectClient, job_id: JobId) -> DeploymentResponse:
    return client.read_deployment(job_id.id)


def runs(client: SyncPrefectClient, job_id: JobId, *, planned_by_us: bool = False) -> list[FlowRun]:
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[job_id.id]))
    )
    return [run for run in found if not (planned_by_us and run.auto_scheduled)]


def only_run(client: SyncPrefectClient, job_id: JobId) -> FlowRun:
    """Return the one run that we made."""
    (only,) = runs(client, job_id, planned_by_us=True)
    return only


def jobs_in(client: SyncPrefectClient, pool: str) -> list[DeploymentResponse]:
    return client.read_deployments(work_pool_filter=WorkPoolFilter(name=PoolName(any_=[pool])))


# --- recurring jobs -------------------------------------------------------------------------------


def test_a_recurring_job_is_a_deployment(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Flow, name, entrypoint, description, tag, pool, queue, parameters, schema and schedule are there."""
    policy = TaskPolicy(error_policy=ErrorPolicy.CONTINUE)

    job_id = schedule_job_recur_by_frequency(
        HELLO, HOUR, 5, NOON, NOON + 9 * HOUR, policy, group_id=f"group-of-{pool}", work_pool=pool
    )

    assert isinstance(job_id, JobId)
    found = deployment(prefect_client, job_id)
    assert prefect_client.read_flow(found.flow_id).name == "Greeting"
    assert re.fullmatch("greeting-[0-9a-f]{8}", found.name)
    assert found.entrypoint == "tests/integration/test_scheduler.py:Greeting"
    assert (found.description, found.tags) == ("Says hello.", ["taskadapter"])
    assert (found.work_pool_name, found.work_queue_name) == (pool, f"group-of-{pool}")
    assert found.parameters == {"message": "hello", "times": 1}
    assert {*found.parameter_openapi_schema["properties"]} == {"message", "times"}
    assert found.parameter_openapi_schema["required"] == ["message"]
    assert found.job_variables == {
        "trigger": {
            "interval": 3600.0,
            "max_count": 5,
            "start_time": "2090-01-01T12:00:00+00:00",
            "end_time": "2090-01-01T21:00:00+00:00",
            "task_policy": {"error_policy": "CONTINUE"},
        }
    }
    (schedule,) = found.schedules
    assert schedule.slug == slug(TriggerConfiguration.model_validate(found.job_variables["trigger"]))
    assert (schedule.active, schedule.schedule.interval) == (True, HOUR)
    assert (schedule.schedule.anchor_date, schedule.schedule.timezone) == (NOON, "UTC")
    assert runs(prefect_client, job_id, planned_by_us=True) == []


def test_the_first_tick_is_at_once(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Without a start time there is a run when the call returns, due at the moment of the call."""
    before = datetime.now(UTC)

    job_id = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool)

    first = only_run(prefect_client, job_id)
    assert is_tick(first)
    assert before <= first.expected_start_time <= datetime.now(UTC)
    assert first.parameters == {"message": "hello", "times": 1}
    assert first.work_queue_name == "default"
    (schedule,) = deployment(prefect_client, job_id).schedules
    assert schedule.schedule.anchor_date == first.expected_start_time


def test_prefects_scheduler_makes_no_second_run_of_a_tick(
    prefect_client: SyncPrefectClient, pool: str
) -> None:
    """A tick that we make and that it plans too is one run, whoever is first."""
    start = datetime.now(UTC) + timedelta(seconds=9, microseconds=123)

    job_id = schedule_job_recur_by_frequency(HELLO, 3600, start_time=start, work_pool=pool)

    assert start in [run.expected_start_time for run in runs(prefect_client, job_id)]
    wait_until(
        lambda: len(runs(prefect_client, job_id)) > 1, deadline=PATIENCE, what="the scheduler's next ticks"
    )
    due = sorted(run.expected_start_time for run in runs(prefect_client, job_id))
    assert due == [start + n * HOUR for n in range(len(due))]


def test_a_start_that_has_passed_is_that_of_a_job_that_has_a_name(
    prefect_client: SyncPrefectClient, pool: str
) -> None:
    """The same call again keeps its start, also later; with another interval the start is refused."""
    start, job_id = datetime.now(UTC), None

    def schedule(interval: float = 3600) -> JobId:
        return schedule_job_recur_by_frequency(
            HELLO, interval, start_time=start, name="report", work_pool=pool
        )

    for seconds in (2, 20, 200):  # a machine that stands still needs the longer ones
        start = datetime.now(UTC) + seconds * SECOND
        with suppress(TaskError):
            job_id = schedule()
            break
    wait_until(lambda: datetime.now(UTC) > start, deadline=PATIENCE, what="the start to pass")

    assert schedule() == job_id is not None
    with pytest.raises(TaskError, match=r"start_time=.* has passed, it is"):
        schedule(7200)
    assert [one.slug for one in deployment(prefect_client, job_id).schedules] == [
        slug(TriggerConfiguration(interval=3600, start_time=start))
    ]


def test_the_key_of_a_tick_is_the_schedulers(prefect_client: SyncPrefectClient, pool: str) -> None:
    """What Prefect's scheduler plans has the key that we give to the same tick."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600.25, start_time=NOON, work_pool=pool)

    wait_until(lambda: runs(prefect_client, job_id), deadline=PATIENCE, what="the scheduler's ticks")

    (schedule,) = deployment(prefect_client, job_id).schedules
    for run in runs(prefect_client, job_id):
        assert run.idempotency_key == tick_key(job_id.id, schedule.id, run.expected_start_time)


# --- one-time jobs --------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [NOON, "2090-01-01T17:30:00+05:30"])
def test_a_one_time_job_is_one_run(
    prefect_client: SyncPrefectClient, pool: str, when: datetime | str
) -> None:
    """There is no schedule, and one run at exactly the time, with a trigger of one execution."""
    job_id = schedule_one_time_job(HELLO, when, work_pool=pool)

    found = deployment(prefect_client, job_id)
    assert found.schedules == []
    trigger = TriggerConfiguration.model_validate(found.job_variables["trigger"])
    assert (trigger.interval, trigger.max_count, trigger.start_time) == (ONE_TIME, 1, NOON)
    only = only_run(prefect_client, job_id)
    assert (only.expected_start_time, is_tick(only)) == (NOON, True)
    assert only.parameters == {"message": "hello", "times": 1}


def test_a_fraction_of_a_second_is_kept(prefect_client: SyncPrefectClient, pool: str) -> None:
    """The run is due at the microsecond that was asked for."""
    when = NOON + timedelta(microseconds=1)

    job_id = schedule_one_time_job(HELLO, when, work_pool=pool)

    assert only_run(prefect_client, job_id).expected_start_time == when


def test_the_parameters_are_what_the_nodes_take(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Whatever a field's alias, type or default: what is kept as JSON is the job again on the node."""
    letter = Letter(recipient="Ann", lines=["Hello,"])  # type: ignore[call-arg]

    job_id = schedule_one_time_job(letter, NOON, work_pool=pool)

    kept = only_run(prefect_client, job_id).parameters
    assert kept == {"to": "Ann", "day": "2030-01-01", "lines": ["Hello,"], "within": "PT1H"}
    flow = job_flow(Letter, "Letter", TriggerConfiguration(interval=5))
    assert Letter(**flow.validate_parameters(kept)) == letter
    assert {*deployment(prefect_client, job_id).parameter_openapi_schema["properties"]} == {*kept}


# --- twice ----------------------------------------------------------------------------------------


def test_scheduling_twice_makes_two_jobs(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Without a name, each call makes a job."""
    ids = {schedule_one_time_job(HELLO, NOON, work_pool=pool) for _ in range(2)}
    ids |= {schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool) for _ in range(2)}

    assert {found.id for found in jobs_in(prefect_client, pool)} == {job_id.id for job_id in ids}
    assert len(ids) == 4


def snapshot(client: SyncPrefectClient, job_id: JobId) -> Any:
    """Return all that is known of a job, for comparing."""
    planned = runs(client, job_id, planned_by_us=True)
    return deployment(client, job_id), {(run.id, run.expected_start_time) for run in planned}


@pytest.mark.parametrize("paused", [False, True])
def test_the_same_recurring_job_by_name(prefect_client: SyncPrefectClient, pool: str, paused: bool) -> None:
    """The second call returns the id and changes nothing: neither anchor and pause nor the first tick."""

    def once() -> JobId:
        return schedule_job_recur_by_frequency(HELLO, 3600, 5, name=pool, work_pool=pool)

    job_id = once()
    if paused:
        pause_job(job_id)
    before = snapshot(prefect_client, job_id)

    assert once() == job_id
    assert snapshot(prefect_client, job_id) == before
    assert before[0].name == pool
    assert before[0].paused is paused


def test_a_paused_schedule_stays_paused(prefect_client: SyncPrefectClient, pool: str) -> None:
    """What somebody has switched off in the UI stays off, also when something else changes."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, name=pool, work_pool=pool)
    (schedule,) = deployment(prefect_client, job_id).schedules
    prefect_client.update_deployment_schedule(job_id.id, schedule.id, active=False)

    other = Greeting(message="other")
    assert schedule_job_recur_by_frequency(other, 3600, name=pool, work_pool=pool) == job_id

    (after,) = deployment(prefect_client, job_id).schedules
    assert (after.id, after.active, after.schedule) == (schedule.id, False, schedule.schedule)
    assert deployment(prefect_client, job_id).parameters["message"] == "other"


def test_other_parameters_by_name(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Other fields are deployed, for the tick that waits too; the schedule stays as it is."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, name=pool, work_pool=pool)
    before = deployment(prefect_client, job_id).schedules
    due = only_run(prefect_client, job_id).expected_start_time

    other = Greeting(message="other", times=2)
    assert schedule_job_recur_by_frequency(other, 3600, name=pool, work_pool=pool) == job_id

    assert deployment(prefect_client, job_id).parameters == {"message": "other", "times": 2}
    assert deployment(prefect_client, job_id).schedules == before
    waiting = only_run(prefect_client, job_id)
    assert (waiting.expected_start_time, waiting.parameters["message"]) == (due, "other")


def test_another_trigger_by_name(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Another interval replaces the schedule, and the tick of the one before by a first tick at once."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, name=pool, work_pool=pool)
    first = only_run(prefect_client, job_id)

    assert schedule_job_recur_by_frequency(HELLO, 7200, name=pool, work_pool=pool) == job_id

    (schedule,) = deployment(prefect_client, job_id).schedules
    assert (schedule.active, schedule.schedule.interval) == (True, 2 * HOUR)
    assert only_run(prefect_client, job_id).expected_start_time == schedule.schedule.anchor_date
    assert first.expected_start_time < schedule.schedule.anchor_date


def test_the_same_one_time_job_by_name(prefect_client: SyncPrefectClient, pool: str) -> None:
    """The same time changes nothing; a new time, or other fields, replace the run that waits."""

    def once(job: Greeting, when: datetime) -> JobId:
        return schedule_one_time_job(job, when, name=pool, work_pool=pool)

    job_id = once(HELLO, NOON)
    before = snapshot(prefect_client, job_id)
    assert once(HELLO, NOON) == job_id
    assert snapshot(prefect_client, job_id) == before

    assert once(HELLO, NOON + HOUR) == job_id
    assert only_run(prefect_client, job_id).expected_start_time == NOON + HOUR
    assert once(Greeting(message="other"), NOON + HOUR) == job_id
    assert only_run(prefect_client, job_id).parameters["message"] == "other"


def test_a_run_that_has_ended_stays(prefect_client: SyncPrefectClient, pool: str) -> None:
    """A new time for a one-time job that has run is another run; the former is history."""
    job_id = schedule_one_time_job(HELLO, NOON, name=pool, work_pool=pool)
    former = only_run(prefect_client, job_id)
    prefect_client.set_flow_run_state(former.id, Completed(), force=True)

    schedule_one_time_job(HELLO, NOON + HOUR, name=pool, work_pool=pool)

    by_id = {run.id: run.expected_start_time for run in runs(prefect_client, job_id)}
    assert by_id.pop(former.id) == NOON
    assert [*by_id.values()] == [NOON + HOUR]


@pytest.mark.parametrize("once_first", [False, True])
def test_from_one_kind_to_the_other_by_name(
    prefect_client: SyncPrefectClient, pool: str, once_first: bool
) -> None:
    """A name may change from a one-time to a recurring job and back; nothing of the former is left."""
    for once in (once_first, not once_first):
        if once:
            job_id = schedule_one_time_job(HELLO, NOON, name=pool, work_pool=pool)
        else:
            job_id = schedule_job_recur_by_frequency(HELLO, 3600, name=pool, work_pool=pool)

    assert len(jobs_in(prefect_client, pool)) == 1
    assert len(deployment(prefect_client, job_id).schedules) == (1 if once_first else 0)
    assert (only_run(prefect_client, job_id).expected_start_time == NOON) is not once_first


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"interval": -1},
        {"interval": 0.1},
        {"interval": 5, "max_count": 0},
        {"interval": 5, "end_time": "2020-01-01T00:00:00Z"},
        {"interval": 5, "start_time": NOON, "end_time": NOON},
        {"interval": 5, "name": "a/b"},
        {"interval": 5, "group_id": ""},
    ],
)
def test_what_is_refused_creates_nothing(
    prefect_client: SyncPrefectClient, pool: str, arguments: dict[str, Any]
) -> None:
    """After an error there is neither a job nor a work pool."""
    with pytest.raises(TaskError):
        schedule_job_recur_by_frequency(HELLO, **arguments, work_pool=pool)

    refuse_pool(prefect_client, pool)


def test_a_one_time_job_in_the_past_creates_nothing(prefect_client: SyncPrefectClient, pool: str) -> None:
    """After the error there is neither a job nor a work pool."""
    with pytest.raises(TaskError):
        schedule_one_time_job(HELLO, datetime.now(UTC) - SECOND, work_pool=pool)

    refuse_pool(prefect_client, pool)


def refuse_pool(client: SyncPrefectClient, pool: str) -> None:
    assert jobs_in(client, pool) == []
    with pytest.raises(ObjectNotFound):
        client.read_work_pool(pool)


def test_a_pool_of_another_type_is_refused(prefect_client: SyncPrefectClient, pool: str) -> None:
    """A process pool's workers would run jobs uncoordinated: nothing is made in it, or set."""
    prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"))

    for refused in (
        lambda: schedule_one_time_job(HELLO, NOON, work_pool=pool),
        lambda: configure_worker_pool(work_pool=pool),
    ):
        with pytest.raises(TaskError, match="'warm-backup' is needed"):
            refused()
    assert jobs_in(prefect_client, pool) == []


def test_a_job_that_runs_another_class_says_so(
    prefect_client: SyncPrefectClient,
    pool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two classes of one name may take turns in it; the same class again is no news."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    first, second = (f"{module}_{pool[5:]}" for module in ("sales", "stock"))
    for module in (first, second):
        (tmp_path / f"{module}.py").write_text(
            "from taskadapter import Job\n\n\nclass Report(Job):\n    def execute(self) -> None: ...\n"
        )

    def schedule(module: str) -> JobId:
        job = import_module(module).Report()
        return schedule_job_recur_by_frequency(job, 3600, name=pool, work_pool=pool)

    with caplog.at_level("WARNING", "prefect.taskadapter"):
        job_id = schedule(first)
        assert schedule(first) == job_id
        assert caplog.messages == []
        assert schedule(second) == job_id
    assert caplog.messages == [
        f"Job {pool} ran {first}.py:Report, and runs {second}.py:Report from now on. "
        "If these are two jobs, give one of them another name."
    ]
    assert deployment(prefect_client, job_id).entrypoint == f"{second}.py:Report"


@pytest.mark.parametrize("function", [unschedule_job, pause_job, resume_job])
def test_a_job_that_is_unknown(prefect_client: SyncPrefectClient, function: Any) -> None:
    """An id that names nothing is refused with the id and where to look."""
    job_id = JobId(uuid.uuid4())

    with pytest.raises(TaskError, match=f"there is no job {job_id}.*get_running_jobs"):
        function(job_id)


@pytest.mark.parametrize("function", [unschedule_job, pause_job, resume_job])
def test_a_deployment_of_somebody_else(prefect_client: SyncPrefectClient, pool: str, function: Any) -> None:
    """A deployment that is none of ours is left alone."""
    flow_id = prefect_client.create_flow_from_name("theirs")
    theirs = prefect_client.create_deployment(flow_id, pool)
    before = prefect_client.read_deployment(theirs)

    with pytest.raises(TaskError, match="none of ours"):
        function(JobId(theirs))

    assert prefect_client.read_deployment(theirs) == before


# --- pausing and ending ---------------------------------------------------------------------------


def test_a_job_by_its_name(prefect_client: SyncPrefectClient, pool: str) -> None:
    """A declared job has returned no id: its name, or flow/deployment, will do."""
    on = Listener(trigger=TriggerConfiguration(interval=3600), work_pool=pool)
    on.service(pool)(check_inbox)
    job_id = asyncio.run(deploy(on))[pool]

    pause_job(pool)
    assert deployment(prefect_client, job_id).paused is True
    resume_job(f"{pool}/{pool}")
    assert deployment(prefect_client, job_id).paused is False
    pause_job(str(job_id))
    assert deployment(prefect_client, job_id).paused is True
    unschedule_job(pool)
    with pytest.raises(TaskError, match=f"there is no job '{pool}'"):
        pause_job(pool)


def test_a_name_that_several_jobs_have(prefect_client: SyncPrefectClient, pool: str) -> None:
    """None of them is touched; the message names them."""
    ids = [
        schedule_job_recur_by_frequency(job, 3600, name=pool, work_pool=pool) for job in (HELLO, Nightly())
    ]

    with pytest.raises(TaskError, match=f"several jobs are named '{pool}'; name one of .*Nightly/{pool}"):
        pause_job(pool)

    assert [deployment(prefect_client, job_id).paused for job_id in ids] == [False, False]


def test_pause_and_resume(prefect_client: SyncPrefectClient, pool: str) -> None:
    """A paused job shows as paused and has no run that waits; a resumed one is as before."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool)
    before = deployment(prefect_client, job_id)
    wait_until(
        lambda: len(runs(prefect_client, job_id)) > 1, deadline=PATIENCE, what="the scheduler's ticks"
    )
    pausing = datetime.now(UTC)

    pause_job(job_id)

    assert deployment(prefect_client, job_id).paused is True
    # What Prefect's scheduler is planning at that moment comes afterwards.
    assert [run for run in runs(prefect_client, job_id) if run.created < pausing] == []
    resume_job(job_id)
    after = deployment(prefect_client, job_id)
    assert (after.paused, after.schedules) == (False, before.schedules)
    wait_until(lambda: runs(prefect_client, job_id), deadline=PATIENCE, what="the scheduler's ticks")


def test_a_pause_leaves_what_has_begun(prefect_client: SyncPrefectClient, pool: str) -> None:
    """A first tick that is claimed, and one that somebody started by hand, stay."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool)
    claimed = only_run(prefect_client, job_id).id
    prefect_client.set_flow_run_state(claimed, Pending())
    by_hand = prefect_client.create_flow_run_from_deployment(job_id.id).id

    pausing = datetime.now(UTC)

    pause_job(job_id)

    found = [run for run in runs(prefect_client, job_id) if run.created < pausing]
    assert {run.id for run in found} == {claimed, by_hand}


def test_a_paused_one_time_job_keeps_its_run(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Its only tick could not be made again: it stays."""
    job_id = schedule_one_time_job(HELLO, NOON, work_pool=pool)

    pause_job(job_id)

    assert deployment(prefect_client, job_id).paused is True
    assert only_run(prefect_client, job_id).expected_start_time == NOON


def test_pausing_and_resuming_all(prefect_client: SyncPrefectClient, pool: str) -> None:
    """All jobs of the pool are paused and resumed, those of a listener too; other pools are not."""
    on = Listener(trigger=TriggerConfiguration(interval=3600), work_pool=pool)
    on.service(pool)(check_inbox)
    ids = [
        schedule_one_time_job(HELLO, NOON, work_pool=pool),
        schedule_job_recur_by_frequency(Nightly(), 3600, work_pool=pool),
        asyncio.run(deploy(on))[pool],
    ]
    other = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=f"{pool}-other")

    pause_all_jobs(work_pool=pool)
    assert [deployment(prefect_client, job_id).paused for job_id in [*ids, other]] == [True] * 3 + [False]

    pause_job(other)
    resume_all_jobs(work_pool=pool)
    assert [deployment(prefect_client, job_id).paused for job_id in [*ids, other]] == [False] * 3 + [True]


def test_unscheduling_stops_at_once_and_keeps_history(prefect_client: SyncPrefectClient, pool: str) -> None:
    """The deployment and what waits go, what is claimed is Skipped, what runs or has run stays."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool)
    waiting = only_run(prefect_client, job_id).id
    kept = {}
    states: list[State] = [Pending(), Running(), Completed()]
    for state in states:
        run = prefect_client.create_flow_run_from_deployment(job_id.id)
        prefect_client.set_flow_run_state(run.id, state, force=True)
        kept[state.type] = run.id

    unschedule_job(job_id)

    for read in (
        lambda: prefect_client.read_deployment(job_id.id),
        lambda: prefect_client.read_flow_run(waiting),
    ):
        with pytest.raises(ObjectNotFound):
            read()
    after = {kind: prefect_client.read_flow_run(run_id).state for kind, run_id in kept.items()}
    skipped = after[StateType.PENDING]
    assert (skipped.type, skipped.name) == (StateType.CANCELLED, "Skipped")
    assert skipped.message == "Skipped: the job was unscheduled."
    assert after[StateType.RUNNING].type is StateType.RUNNING
    assert after[StateType.COMPLETED].type is StateType.COMPLETED


def test_unscheduling_twice(prefect_client: SyncPrefectClient, pool: str) -> None:
    """The second time there is no such job, and other jobs of the class stay."""
    job_id = schedule_one_time_job(HELLO, NOON, work_pool=pool)
    other = schedule_one_time_job(HELLO, NOON, work_pool=pool)

    unschedule_job(job_id)

    with pytest.raises(TaskError, match=f"there is no job {job_id}"):
        unschedule_job(job_id)
    assert only_run(prefect_client, other).expected_start_time == NOON


# --- what there is --------------------------------------------------------------------------------


@pytest.mark.usefixtures("prefect_client")
def test_an_unknown_pool_has_no_jobs(pool: str) -> None:
    """Asking makes no pool, and is no error."""
    assert get_running_jobs(work_pool=pool) == []


@pytest.mark.parametrize("switch", [pause_all_jobs, resume_all_jobs])
@pytest.mark.usefixtures("prefect_client")
def test_all_jobs_of_a_pool_that_is_not_there(switch: Callable[..., None]) -> None:
    """Somebody has mistyped its name, and would take the jobs for paused."""
    with pytest.raises(TaskError, match="there is no work pool 'nope'"):
        switch(work_pool="nope")


def test_a_job_that_vanishes_while_all_are_paused(
    prefect_client: SyncPrefectClient, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are paused all the same."""
    gone, stays = (schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool, name=n) for n in "ab")
    listed = jobs_of_pool

    async def list_and_delete(*pool_of: Any) -> Any:
        found = sorted(await listed(*pool_of), key=lambda job: job.name)
        prefect_client.delete_deployment(gone.id)
        return found

    monkeypatch.setattr(scheduler, "jobs_of_pool", list_and_delete)
    pause_all_jobs(work_pool=pool)
    assert deployment(prefect_client, stays).paused is True


def test_a_job_whose_end_has_passed_is_not_running(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Also where no agent was up to switch its schedule off."""
    for seconds in (2, 20, 200):  # a busy server needs the longer ones
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        job = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool, end_time=end)
        running = get_running_jobs(work_pool=pool)
        if datetime.now(UTC) < end:
            break
    assert running == [job]
    wait_until(lambda: datetime.now(UTC) > end, 300, "the end")
    assert get_running_jobs(work_pool=pool) == []


def test_running_jobs(prefect_client: SyncPrefectClient, pool: str) -> None:
    """A job counts until its schedule has ended, or its only run; a pause does not end it."""
    recurring = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool)
    once = schedule_one_time_job(HELLO, NOON, work_pool=pool)
    schedule_job_recur_by_frequency(HELLO, 3600, work_pool=f"{pool}-other")

    assert set(get_running_jobs(work_pool=pool)) == {recurring, once}
    pause_all_jobs(work_pool=pool)
    assert set(get_running_jobs(work_pool=pool)) == {recurring, once}

    run = only_run(prefect_client, once)
    prefect_client.set_flow_run_state(run.id, Running(), force=True)
    assert set(get_running_jobs(work_pool=pool)) == {recurring, once}
    prefect_client.set_flow_run_state(run.id, Completed(), force=True)
    assert get_running_jobs(work_pool=pool) == [recurring]

    (schedule,) = deployment(prefect_client, recurring).schedules
    prefect_client.update_deployment_schedule(recurring.id, schedule.id, active=False)
    assert get_running_jobs(work_pool=pool) == []


def test_more_jobs_than_a_page(
    prefect_client: SyncPrefectClient, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs are found, however many the API returns at a time: none, a part and a full last page."""
    monkeypatch.setattr("taskadapter.prefect_api.client.PAGE", 2)
    ids: set[JobId] = set()
    for _ in range(5):
        ids.add(schedule_one_time_job(HELLO, NOON, work_pool=pool))

        assert sorted(map(str, get_running_jobs(work_pool=pool))) == sorted(map(str, ids))
    assert len(ids) == len(jobs_in(prefect_client, pool)) == 5


# --- the pool -------------------------------------------------------------------------------------


def test_the_size_of_a_pool(prefect_client: SyncPrefectClient, pool: str) -> None:
    """The first use makes the pool; its variables have the size, and keep it when the domain changes."""
    configure_worker_pool(work_pool=pool)
    assert PoolSize.of(prefect_client.read_work_pool(pool)) == PoolSize(worker_count=5, waiting_time=5.0)

    configure_worker_pool(2, timedelta(seconds=1.5), work_pool=pool)
    wanted = PoolSize(worker_count=2, waiting_time=1.5)
    assert PoolSize.of(prefect_client.read_work_pool(pool)) == wanted

    backup = WarmBackupConfig(group_id="group", liveness_check_interval=6)
    domain = Domain.declared(backup, pool)
    ensure_work_pool(pool, domain)
    after = prefect_client.read_work_pool(pool)
    assert (PoolSize.of(after), Domain.of(after)) == (wanted, domain)

    configure_worker_pool(3, work_pool=pool)
    assert Domain.of(prefect_client.read_work_pool(pool)) == domain


def test_the_pool_of_the_settings(
    prefect_client: SyncPrefectClient, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no pool is named, it is the one of the settings."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_WORK_POOL", pool)

    job_id = schedule_one_time_job(HELLO, NOON)

    assert deployment(prefect_client, job_id).work_pool_name == pool
    assert get_running_jobs() == [job_id]


# --- the two forms --------------------------------------------------------------------------------


def test_the_async_twins(prefect_client: SyncPrefectClient, pool: str) -> None:
    """Each twin has the effect of its function."""

    async def all_of_them() -> JobId:
        await aconfigure_worker_pool(2, 1, work_pool=pool)
        once = await aschedule_one_time_job(HELLO, NOON, work_pool=pool)
        recurring = await aschedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool)
        assert set(await aget_running_jobs(work_pool=pool)) == {once, recurring}
        await apause_job(once)
        await apause_all_jobs(work_pool=pool)
        await aresume_job(once)
        assert [deployment(prefect_client, job_id).paused for job_id in (once, recurring)] == [False, True]
        await aresume_all_jobs(work_pool=pool)
        await aunschedule_job(once)
        return recurring

    recurring = asyncio.run(all_of_them())

    assert PoolSize.of(prefect_client.read_work_pool(pool)) == PoolSize(worker_count=2, waiting_time=1.0)
    assert [found.id for found in jobs_in(prefect_client, pool)] == [recurring.id]
    assert deployment(prefect_client, recurring).paused is False


def test_sync_functions_in_a_running_event_loop(prefect_client: SyncPrefectClient, pool: str) -> None:
    """The plain functions may also be called where an event loop runs, as in a notebook or an async job."""

    async def schedule() -> JobId:
        return schedule_one_time_job(HELLO, NOON, work_pool=pool)

    job_id = asyncio.run(schedule())

    assert only_run(prefect_client, job_id).expected_start_time == NOON


# --- the guide ------------------------------------------------------------------------------------


def test_the_guides_example_runs(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, pool: str, tmp_path: Path
) -> None:
    """The program under "Schedule from a program" runs as it stands, and uses every function."""
    _, program = blocks("programs", "python")
    (tmp_path / "jobs.py").write_text(program)
    env = environment(
        prefect_api.env,
        {"PYTHONPATH": str(PROJECT), "PREFECT_INTEGRATIONS_TASKADAPTER_WORK_POOL": pool},
    )

    run = subprocess.run(
        [sys.executable, "-W", "error", "jobs.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )

    assert run.returncode == 0, run.stderr
    assert PoolSize.of(prefect_client.read_work_pool(pool)) == PoolSize(worker_count=3, waiting_time=2.0)
    (left,) = jobs_in(prefect_client, pool)
    assert (left.name, left.entrypoint, left.paused) == ("reminder", "jobs.py:Greeting", False)
    assert run.stdout.split() == ["reminder"]
    twins = {name[1:] for name in taskadapter.__all__ if name[1:] in taskadapter.__all__}
    assert [function for function in twins if f"{function}(" not in program] == []
