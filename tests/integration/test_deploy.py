"""From declarations to deployments on a real server: the same again changes nothing."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger
from prefect.utilities.slugify import slugify
from pydantic import SecretStr
from sqlalchemy import make_url

from deployments.local import PrefectServer, environment, free_port, prefect_command
from taskadapter import (
    Job,
    JobId,
    Listener,
    PostgresqlConfig,
    RetryConfiguration,
    Service,
    TaskError,
    TriggerConfiguration,
    WarmBackupConfig,
    aschedule_job_recur_by_frequency,
    aschedule_one_time_job,
)
from taskadapter.agent.switches import detach
from taskadapter.coordination import nodes
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.messages import PoolKey
from taskadapter.coordination.schema import create_missing
from taskadapter.deploy import deploy, prepare
from taskadapter.pools import aensure_work_pool, ensure_work_pool
from taskadapter.prefect_api import locks
from taskadapter.prefect_api.pool import Domain, PoolSize, password_of
from taskadapter.render import render
from taskadapter.rules.ticks import FIRST_TICK_LEAD, slug
from taskadapter.settings import TaskadapterSettings
from tests import warm

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse

PROJECT = Path(__file__).parents[2]
POOL = "test-deploy"
TRIGGER = TriggerConfiguration(interval=3600)
NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


class Counter(Service):
    """Counts."""

    i: int = 1

    def execute(self) -> None:
        self.i += 1


class Greeting(Job):
    message: str = "hello"

    def execute(self) -> None: ...


def check_inbox(days: int = 7) -> None:
    """Look for new mail."""


@pytest.fixture
def name() -> str:
    """A job's name that no other test has."""
    return f"job-{uuid.uuid4().hex[:8]}"


def listener(trigger: TriggerConfiguration = TRIGGER, **more: Any) -> Listener:
    return Listener(trigger=trigger, work_pool=POOL, **more)


def deployed(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    return client.read_deployment_by_name(f"{name}/{name}")


def schedule_of(client: SyncPrefectClient, name: str) -> DeploymentSchedule:
    (only,) = deployed(client, name).schedules
    return only


def pause(client: SyncPrefectClient, name: str) -> None:
    """Pause a job's schedule, as the switch in the UI does."""
    client.update_deployment_schedule(deployed(client, name).id, schedule_of(client, name).id, active=False)


def deploy_function(name: str, **changes: Any) -> JobId:
    on = listener(**changes)
    on.service(name)(check_inbox)
    return asyncio.run(deploy(on))[name]


# --- from Python ----------------------------------------------------------------------------------


def test_a_deployment_is_what_was_declared(prefect_client: SyncPrefectClient, name: str) -> None:
    """Entrypoint, description, tag, pool, queue, job variables, parameters and schedule are there."""
    on = listener(warm_backup_config=WarmBackupConfig(group_id=f"group-of-{name}"))
    on.service(name)(check_inbox)

    job_id = asyncio.run(deploy(on))[name]

    found = prefect_client.read_deployment(job_id.id)
    assert (found.name, found.entrypoint) == (name, "tests/integration/test_deploy.py:check_inbox")
    assert (found.description, found.tags) == ("Look for new mail.", ["taskadapter"])
    assert (found.work_pool_name, found.work_queue_name) == (POOL, f"group-of-{name}")
    assert found.job_variables == {"trigger": {"interval": 3600.0}}
    assert [*found.parameter_openapi_schema["properties"]] == ["days"]
    assert [one.slug for one in found.schedules] == [slug(TRIGGER)]


def test_an_attached_services_state_travels(prefect_client: SyncPrefectClient, name: str) -> None:
    """The field values of an attached instance are in the deployment."""
    on = listener()
    on.attach(Counter(i=10), name)

    asyncio.run(deploy(on))

    assert deployed(prefect_client, name).job_variables["initial_state"] == {"i": 10}


def test_the_first_tick_is_in_the_near_future(prefect_client: SyncPrefectClient, name: str) -> None:
    """Without a start time, tick 0 is far enough ahead for Prefect's scheduler to plan it."""
    before = datetime.now(UTC)

    deploy_function(name)

    assert before < schedule_of(prefect_client, name).schedule.anchor_date
    assert schedule_of(prefect_client, name).schedule.anchor_date < datetime.now(UTC) + FIRST_TICK_LEAD


def test_a_start_time_is_the_anchor(prefect_client: SyncPrefectClient, name: str) -> None:
    """With a start time, tick 0 is at the start."""
    deploy_function(name, trigger=TriggerConfiguration(interval=3600, start_time=NOON))

    assert schedule_of(prefect_client, name).schedule.anchor_date == NOON


@pytest.mark.parametrize("start_time", [None, NOON])
@pytest.mark.parametrize("shape", ["class", "instance", "function"])
def test_deploying_twice_changes_nothing(
    prefect_client: SyncPrefectClient, name: str, shape: str, start_time: datetime | None
) -> None:
    """The second deploy of a declaration leaves the deployment untouched, to its time of update."""

    def once() -> DeploymentResponse:
        on = listener(
            TriggerConfiguration(
                interval=3600,
                max_count=5,
                start_time=start_time,
                end_time="2031-01-01T12:00:00+02:00",
                retry_config=RetryConfiguration(max_attempts=2, retry_interval=0.5),
            )
        )
        if shape == "instance":
            on.attach(Counter(i=10), name)
        else:
            on.service(name)(Counter if shape == "class" else check_inbox)
        asyncio.run(deploy(on))
        return deployed(prefect_client, name)

    assert once() == once()


def test_a_paused_schedule_stays_paused(prefect_client: SyncPrefectClient, name: str) -> None:
    """The second deploy does not resume what somebody has paused."""
    deploy_function(name)
    pause(prefect_client, name)
    before = deployed(prefect_client, name)

    deploy_function(name)

    assert deployed(prefect_client, name) == before
    assert schedule_of(prefect_client, name).active is False


def test_a_paused_schedule_stays_paused_when_something_else_changes(
    prefect_client: SyncPrefectClient, name: str
) -> None:
    """Other retries are deployed; the schedule keeps its pause and its first tick."""
    deploy_function(name)
    pause(prefect_client, name)
    before = schedule_of(prefect_client, name)

    retry = RetryConfiguration(max_attempts=1, retry_interval=1)
    deploy_function(name, retry_config=retry)

    after = schedule_of(prefect_client, name)
    assert (after.active, after.slug) == (False, before.slug)
    assert after.schedule.anchor_date == before.schedule.anchor_date
    assert deployed(prefect_client, name).job_variables["trigger"]["retry_config"]["max_attempts"] == 1


@pytest.mark.parametrize("paused", [False, True])
def test_a_changed_trigger_is_another_schedule(
    prefect_client: SyncPrefectClient, name: str, paused: bool
) -> None:
    """Another interval takes the old schedule's place, active and counted anew, paused or not before."""
    job_id = deploy_function(name)
    if paused:
        pause(prefect_client, name)
    changed, before = TriggerConfiguration(interval=7200), datetime.now(UTC)

    assert deploy_function(name, trigger=changed) == job_id

    after = schedule_of(prefect_client, name)
    assert (after.slug, after.active) == (slug(changed), True)
    assert after.schedule.interval == timedelta(hours=2)
    assert before < after.schedule.anchor_date


def test_a_schedule_that_somebody_added_stays(prefect_client: SyncPrefectClient, name: str) -> None:
    """Neither the same trigger nor another removes a schedule that is not of ours."""
    job_id = deploy_function(name).id
    prefect_client.create_deployment_schedules(
        job_id,
        [DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(days=1)), slug="by-hand")],
    )
    changed = TriggerConfiguration(interval=7200)

    deploy_function(name)
    assert slugs(prefect_client, name) == {slug(TRIGGER), "by-hand"}

    deploy_function(name, trigger=changed)
    assert slugs(prefect_client, name) == {slug(changed), "by-hand"}


def slugs(client: SyncPrefectClient, name: str) -> set[str | None]:
    return {schedule.slug for schedule in deployed(client, name).schedules}


def test_a_job_leaves_others_alone(prefect_client: SyncPrefectClient, name: str) -> None:
    """Deploying one listener does not touch the job of another."""
    deploy_function(name)
    before = deployed(prefect_client, name)

    deploy_function(f"{name}-other")

    assert deployed(prefect_client, name) == before


def test_a_job_that_another_pool_had_is_named(
    prefect_client: SyncPrefectClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be another project's, whose nodes run it no longer; a pool's own job is no news."""
    deploy_function(name)
    deploy_function(name, retry_config=RetryConfiguration(max_attempts=1, retry_interval=1))
    assert caplog.messages == []

    on = Listener(trigger=TRIGGER, work_pool=f"{POOL}-two")
    on.service(name)(check_inbox)
    asyncio.run(deploy(on))

    (told,) = caplog.messages
    assert told.startswith(f"Job {name} moves from work pool {POOL} to {POOL}-two, ")
    assert deployed(prefect_client, name).work_pool_name == f"{POOL}-two"


def test_pools_of_like_names_have_a_password_each(prefect_client: SyncPrefectClient, name: str) -> None:
    """One that an earlier version has deployed is found, by the block that it had."""

    def declare(pool: str, password: str, block: str | None = None) -> None:
        database = PostgresqlConfig(host="db", user="tasks", password=SecretStr(password), database="tasks")
        config = WarmBackupConfig(group_id="group", database_config=database)
        domain = Domain.declared(config, pool)
        domain = domain if block is None else replace(domain, password_block=block)
        ensure_work_pool(pool, domain, password_of(config))

    def password(pool: str) -> str | None:
        domain = Domain.of(prefect_client.read_work_pool(pool))
        return make_url(asyncio.run(domain.database_url(TaskadapterSettings()))).password

    upper, lower = f"ETL {name}", slugify(f"ETL {name}")
    declare(upper, "first", f"taskadapter-{lower}")
    assert password(upper) == "first"
    declare(upper, "first")
    declare(lower, "second")
    declare(f"etl_{name}", "third")

    assert [password(pool) for pool in (upper, lower, f"etl_{name}")] == ["first", "second", "third"]


def test_a_trigger_that_is_another_one_is_named(
    prefect_client: SyncPrefectClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The count begins anew, unawares where a start is computed from now; what differs is told."""
    for minute in (0, 0, 7):
        start = datetime(2020, 1, 1, 12, minute, tzinfo=UTC)
        on = Listener(trigger=TriggerConfiguration(interval=60, start_time=start), work_pool=POOL)
        on.service(name)(check_inbox)
        asyncio.run(deploy(on))

    assert caplog.messages == [
        f"Job {name} is counted from one again, for it was deployed with "
        "start_time=2020-01-01T12:00:00+00:00, and has start_time=2020-01-01T12:07:00+00:00 now. If that "
        "is not meant, declare it as it was; a moment that is computed from now is another one each time."
    ]


def test_the_work_pool_is_made(prefect_client: SyncPrefectClient, name: str) -> None:
    """The first deploy makes the work pool, of our type, and its runs are scheduled on it."""
    on = Listener(trigger=TRIGGER, work_pool=f"pool-of-{name}")
    on.service(name)(check_inbox)

    asyncio.run(deploy(on))

    assert prefect_client.read_work_pool(f"pool-of-{name}").type == "warm-backup"


def test_a_pool_of_another_type_is_refused(prefect_client: SyncPrefectClient, name: str) -> None:
    """A process pool's workers would run jobs uncoordinated: refused, with both types and the remedy."""
    prefect_client.create_work_pool(WorkPoolCreate(name=f"process-of-{name}", type="process"))
    on = Listener(trigger=TRIGGER, work_pool=f"process-of-{name}")
    on.service(name)(check_inbox)

    with pytest.raises(TaskError) as refused:
        asyncio.run(deploy(on))

    message = str(refused.value)
    assert "'process'" in message
    assert "'warm-backup'" in message
    assert "work_pool=" in message
    with pytest.raises(ObjectNotFound):
        deployed(prefect_client, name)


def test_a_pool_that_is_there_is_left_alone(prefect_client: SyncPrefectClient, name: str) -> None:
    """What somebody has set on the pool stays."""
    ensure_work_pool(f"pool-of-{name}")
    before = prefect_client.read_work_pool(f"pool-of-{name}")

    ensure_work_pool(f"pool-of-{name}")

    assert prefect_client.read_work_pool(f"pool-of-{name}") == before


def test_a_pool_with_live_nodes_keeps_its_database(
    prefect_client: SyncPrefectClient, name: str, tmp_path: Path
) -> None:
    """Another one would have them count from the start; when they have left, it may be named."""
    before, after = (Domain(database=f"sqlite:///{tmp_path}/{one}.db") for one in ("before", "after"))
    ensure_work_pool(name, before)
    engine = open_engine(before.database or "")
    with engine.connect() as connection:
        create_missing(connection)
    node = nodes.Node("node-1", "first", "host", 1)
    with transaction(engine) as connection:
        nodes.claim_groups(connection, PoolKey(name), ["group"])
        nodes.register(connection, node, ["group"], 30)

    for other in (after, Domain()):
        with pytest.raises(TaskError, match=r"\(node-1\) .*before.db.*work_pool="):
            ensure_work_pool(name, other)
        assert Domain.of(prefect_client.read_work_pool(name)) == before
    ensure_work_pool(name, replace(before, liveness_check_interval=12))

    with transaction(engine) as connection:
        nodes.unregister(connection, node)
    engine.dispose()
    ensure_work_pool(name, after)
    assert Domain.of(prefect_client.read_work_pool(name)) == after


# --- several at once ------------------------------------------------------------------------------


def at_once(works: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Do several things at the same time, as several nodes do."""

    async def together() -> list[Any]:
        return await asyncio.gather(*works)

    return asyncio.run(together())


def ticks_of_ours(client: SyncPrefectClient, name: str) -> list[datetime | None]:
    """Return the times of the ticks of a job that we have made, and not Prefect's scheduler."""
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployed(client, name).id]))
    found = client.read_flow_runs(deployment_filter=ours)
    return [run.expected_start_time for run in found if not run.auto_scheduled]


@pytest.mark.parametrize("group", [True, False])
def test_nodes_that_deploy_at_once(prefect_client: SyncPrefectClient, name: str, group: bool) -> None:
    """On a server that has nothing one makes pool, queue, block, deployment, schedule and first tick."""

    def node() -> Listener:
        url = PostgresqlConfig(host="db", user="tasks", password="secret", database="tasks")
        backup = WarmBackupConfig(group_id=f"group-of-{name}", database_config=url)
        on = Listener(
            trigger=TRIGGER, work_pool=f"pool-of-{name}", warm_backup_config=backup if group else None
        )
        on.service(name)(check_inbox)
        return on

    ids = at_once(deploy(on) for on in [node() for _ in range(6)])

    assert {job_id for found in ids for job_id in found.values()} == {
        JobId(deployed(prefect_client, name).id)
    }
    anchor = schedule_of(prefect_client, name).schedule.anchor_date
    assert ticks_of_ours(prefect_client, name) == [anchor]


def test_nodes_that_deploy_a_changed_trigger_at_once(prefect_client: SyncPrefectClient, name: str) -> None:
    """One gives the deployment its new schedule and the first tick of that; the old one is gone."""
    deploy_function(name)
    changed = TriggerConfiguration(interval=7200)

    def node() -> Listener:
        on = listener(changed)
        on.service(name)(check_inbox)
        return on

    at_once(deploy(on) for on in [node() for _ in range(6)])

    schedule = schedule_of(prefect_client, name)
    assert schedule.slug == slug(changed)
    assert schedule.schedule.anchor_date in ticks_of_ours(prefect_client, name)
    assert len(ticks_of_ours(prefect_client, name)) == 2


def test_programs_that_schedule_a_named_job_at_once(prefect_client: SyncPrefectClient, name: str) -> None:
    """The same call on several nodes makes one job, with one first tick, or its only one."""
    later = datetime.now(UTC) + timedelta(hours=1)
    recurring = [
        aschedule_job_recur_by_frequency(Greeting(), 3600, name=name, group_id=name, work_pool=POOL)
        for _ in range(4)
    ]
    once = [
        aschedule_one_time_job(Greeting(), later, name=f"{name}-once", work_pool=POOL) for _ in range(4)
    ]

    ids = at_once([*recurring, *once])

    assert len(set(ids)) == 2
    for job_id in set(ids):
        ours = DeploymentFilter(id=DeploymentFilterId(any_=[job_id.id]))
        runs = prefect_client.read_flow_runs(deployment_filter=ours)
        assert len([run for run in runs if not run.auto_scheduled]) == 1


def test_a_lock_of_a_process_that_died_is_taken(
    prefect_client: SyncPrefectClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it on the server holds nobody up for long, and is gone at the end."""
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)

    async def die() -> None:
        async with get_client() as client:
            await locks.lock(client, f"deployment {name}/{name}").__aenter__()

    asyncio.run(die())
    left = [variable.name for variable in prefect_client.read_variables()]
    deploy_function(name)

    assert deployed(prefect_client, name).name == name
    assert set(left) & {variable.name for variable in prefect_client.read_variables()} == set()


def test_settings_of_a_pool_do_not_undo_each_other(prefect_client: SyncPrefectClient, name: str) -> None:
    """Size and timing are parts of one template, which several programs change at the same moment."""
    domain, size = Domain(liveness_check_interval=12), PoolSize(worker_count=2)
    ensure_work_pool(name)

    async def change(**part: Any) -> None:
        async with get_client() as client:
            await aensure_work_pool(client, name, **part)

    at_once(change(domain=domain) if k % 2 else change(size=size) for k in range(6))

    pool = prefect_client.read_work_pool(name)
    assert (Domain.of(pool), PoolSize.of(pool)) == (domain, size)


def test_another_timing_is_told_to_whoever_deploys(
    prefect_client: SyncPrefectClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is that of all groups of the pool, which another project may have declared."""
    get_logger("taskadapter").addHandler(caplog.handler)
    pool = f"pool-of-{name}"
    for lease, queue in [(6, "mine"), (6, "slow"), (3, "mine")]:
        ensure_work_pool(pool, Domain(liveness_check_interval=lease), queue=queue)
    get_logger("taskadapter").removeHandler(caplog.handler)

    (told,) = {text for record in caplog.records if pool in (text := record.getMessage())}
    assert told.startswith(
        f"Work pool {pool}: liveness_check_interval 6 → 3, for all its groups: mine, slow."
    )


def test_a_detached_job_is_switched_on_by_the_next_deploy(
    prefect_client: SyncPrefectClient, name: str
) -> None:
    """Detached, it stays, with its schedule off and nothing planned; deployed again, it begins afresh."""
    job_id = deploy_function(name)
    before = schedule_of(prefect_client, name)

    asyncio.run(detach(job_id.id))
    assert schedule_of(prefect_client, name).active is False
    assert ticks_of_ours(prefect_client, name) == []
    assert "detached" in deployed(prefect_client, name).tags

    assert deploy_function(name) == job_id
    after = schedule_of(prefect_client, name)
    assert (after.active, after.slug) == (True, before.slug)
    assert ticks_of_ours(prefect_client, name) == [after.schedule.anchor_date]
    assert after.schedule.anchor_date > before.schedule.anchor_date
    assert deployed(prefect_client, name).tags == ["taskadapter"]


# --- the build step -------------------------------------------------------------------------------


def test_the_first_tick_of_what_is_not_deployed(prefect_client: SyncPrefectClient, name: str) -> None:
    """The step of the first deploy gives a moment in the near future, with its offset."""
    before = datetime.now(UTC)

    date = datetime.fromisoformat(asyncio.run(prepare(name, slug(TRIGGER)))["first_tick"])

    assert before < date <= datetime.now(UTC) + FIRST_TICK_LEAD
    assert date.utcoffset() == timedelta(0)


def test_the_first_tick_of_what_is_deployed(prefect_client: SyncPrefectClient, name: str) -> None:
    """Later deploys of the same trigger find the first tick where it was, paused or not."""
    deploy_function(name)
    anchor = schedule_of(prefect_client, name).schedule.anchor_date
    step = {"first_tick": anchor.astimezone(UTC).isoformat()}

    assert asyncio.run(prepare(name, slug(TRIGGER))) == step
    pause(prefect_client, name)
    assert asyncio.run(prepare(name, slug(TRIGGER))) == step


def test_the_first_tick_of_a_changed_trigger(prefect_client: SyncPrefectClient, name: str) -> None:
    """A trigger that is deployed for the first time has its first tick in the near future."""
    deploy_function(name)
    anchor = schedule_of(prefect_client, name).schedule.anchor_date

    changed = slug(TriggerConfiguration(interval=7200))
    date = datetime.fromisoformat(asyncio.run(prepare(name, changed))["first_tick"])

    assert anchor < date


# --- from the shell -------------------------------------------------------------------------------


def prefect(server: PrefectServer, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Prefect's, as a person at a terminal of that width would."""
    env = environment(server.env, {"COLUMNS": "400", "PYTHONPATH": str(PROJECT)})
    return warm.run(prefect_command(), "--no-prompt", *args, cwd=cwd, env=env)


@pytest.fixture
def clean(prefect_client: SyncPrefectClient) -> Iterator[None]:
    """A server without the project's own pool and jobs, before the test and after it."""

    def remove() -> None:
        rendered = yaml.safe_load((PROJECT / "deployments/prefect.yaml").read_text())
        for job in [entry["name"] for entry in rendered["deployments"]]:
            with suppress(ObjectNotFound):
                prefect_client.delete_deployment(deployed(prefect_client, job).id)
        with suppress(ObjectNotFound):
            prefect_client.delete_work_pool("taskadapter")

    remove()
    yield
    remove()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "options",
    [["--prefect-file", "deployments/prefect.yaml"], []],
    ids=["the rendered file", "the project's root"],
)
def test_prefect_deploy(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, options: list[str]
) -> None:
    """On a server that has nothing yet, `prefect deploy` makes the pool and the jobs; twice is once."""
    before = datetime.now(UTC)
    run = prefect(prefect_api, PROJECT, "deploy", *options, "--all")

    assert run.returncode == 0, run.stdout + run.stderr
    assert prefect_client.read_work_pool("taskadapter").type == "warm-backup"
    first = schedule_of(prefect_client, "counter")
    assert first.active is True
    assert before <= first.schedule.anchor_date <= datetime.now(UTC) + FIRST_TICK_LEAD
    assert deployed(prefect_client, "counter").pull_steps in (None, [])

    pause(prefect_client, "counter")
    again = prefect(prefect_api, PROJECT, "deploy", *options, "--all")

    assert again.returncode == 0, again.stdout + again.stderr
    second = schedule_of(prefect_client, "counter")
    assert second.active is False
    assert (second.slug, second.schedule) == (first.slug, first.schedule)


@pytest.mark.usefixtures("clean")
def test_prefect_deploy_and_python_agree(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient
) -> None:
    """What `prefect deploy` has deployed, `deploy()` finds unchanged."""
    run = prefect(prefect_api, PROJECT, "deploy", "--all")
    assert run.returncode == 0, run.stdout + run.stderr
    before = [deployed(prefect_client, name) for name in ("counter", "flaky")]

    script = (
        "import asyncio, flows.counter, flows.flaky\n"
        "from taskadapter.deploy import deploy\n"
        "asyncio.run(deploy(flows.counter.task_listener))\n"
        "asyncio.run(deploy(flows.flaky.flaky_listener))\n"
    )
    env = environment(prefect_api.env)
    run = warm.run(sys.executable, "-c", script, cwd=PROJECT, env=env)

    assert run.returncode == 0, run.stderr
    assert [deployed(prefect_client, name) for name in ("counter", "flaky")] == before


def project(folder: Path, name: str, pool: str, group: str | None = None, **trigger: Any) -> None:
    """Write a project of one job, and render it."""
    backup = f"warm_backup_config=WarmBackupConfig(group_id={group!r})" if group else ""
    arguments = ", ".join(f"{key}={value!r}" for key, value in trigger.items())
    (folder / "flows").mkdir(exist_ok=True)
    (folder / "flows" / "job.py").write_text(
        "from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig\n"
        f"on = Listener(trigger=TriggerConfiguration({arguments}), work_pool={pool!r}, {backup})\n\n\n"
        f"@on.service({name!r})\ndef job(): ...\n"
    )
    with chdir(folder):
        Path("prefect.yaml").write_text(render(Path("flows"), Path("prefect.yaml")))


@pytest.mark.parametrize("start_time", [None, NOON.isoformat()])
def test_prefect_deploy_of_a_changed_trigger(
    prefect_api: PrefectServer,
    prefect_client: SyncPrefectClient,
    name: str,
    tmp_path: Path,
    start_time: str | None,
) -> None:
    """`prefect deploy` puts a changed trigger's schedule in the place of the one before."""
    for interval in (3600, 7200):
        project(tmp_path, name, POOL, interval=interval, start_time=start_time)
        run = prefect(prefect_api, tmp_path, "deploy", "--all")
        assert run.returncode == 0, run.stdout + run.stderr

    after = schedule_of(prefect_client, name)
    assert after.slug == slug(TriggerConfiguration(interval=7200, start_time=start_time))
    assert (after.active, after.schedule.interval) == (True, timedelta(hours=2))
    assert "is counted from one again" in run.stdout + run.stderr


def test_a_file_that_is_older_than_its_flow(
    prefect_client: SyncPrefectClient, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It was not rendered again: the job is deployed as the file has it, and who deploys is told."""
    on = listener(TriggerConfiguration(interval=7200))
    on.service(name)(check_inbox)
    older, declared = (TriggerConfiguration(interval=interval) for interval in (3600, 7200))

    asyncio.run(prepare(name, slug(older), 3600))
    assert caplog.messages == [
        f"Job {name} is deployed with another trigger than its flow declares ({slug(declared)}). Run "
        "`taskadapter render`, and deploy again; a moment that is computed from now is another one at each "
        "import."
    ]
    caplog.clear()
    asyncio.run(prepare(name, slug(declared), 7200))
    assert caplog.messages == []


def test_listeners_that_disagree_change_no_pool(
    prefect_client: SyncPrefectClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the modules that `prefect deploy` imports each would give it another timing, and all its nodes."""
    one, other = (WarmBackupConfig(group_id=name, heartbeat_frequency=seconds) for seconds in (1, 2))
    on = Listener(trigger=TRIGGER, warm_backup_config=one, work_pool=f"pool-of-{name}")
    on.ensure_work_pool()
    before = prefect_client.read_work_pool(f"pool-of-{name}")
    monkeypatch.setattr("taskadapter.prefect_api.private.is_being_deployed", lambda: True)

    with pytest.raises(SystemExit, match=f"two listeners disagree about work pool 'pool-of-{name}'"):
        Listener(trigger=TRIGGER, warm_backup_config=other, work_pool=f"pool-of-{name}")

    assert prefect_client.read_work_pool(f"pool-of-{name}") == before


@pytest.mark.parametrize("interval", [3600, 7200])
def test_prefect_deploy_of_a_paused_job(
    prefect_api: PrefectServer,
    prefect_client: SyncPrefectClient,
    name: str,
    tmp_path: Path,
    interval: int,
) -> None:
    """It stays paused, whatever is changed; others are deployed as ever."""
    project(tmp_path, name, POOL, interval=3600)
    assert prefect(prefect_api, tmp_path, "deploy", "--all").returncode == 0
    prefect_client.pause_deployment(deployed(prefect_client, name).id)
    project(tmp_path, name, POOL, interval=interval)
    run = prefect(prefect_api, tmp_path, "deploy", "--all")
    assert run.returncode == 0, run.stdout + run.stderr
    assert deployed(prefect_client, name).paused is True
    assert schedule_of(prefect_client, name).schedule.interval == timedelta(seconds=interval)
    prefect_client.resume_deployment(deployed(prefect_client, name).id)
    assert prefect(prefect_api, tmp_path, "deploy", "--all").returncode == 0
    assert deployed(prefect_client, name).paused is False


def test_prefect_deploy_of_an_existing_flow(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, tmp_path: Path
) -> None:
    """As its page has it, the deployment names no folder of the machine that deploys."""
    page = (PROJECT / "docs/existing-flows.md").read_text()
    blocks = re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', page, re.DOTALL)
    for file, text in blocks:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text.replace("name: taskadapter", f"name: {POOL}"))
    ensure_work_pool(POOL)

    run = prefect(prefect_api, tmp_path, "deploy", "--all")

    assert run.returncode == 0, run.stdout + run.stderr
    assert deployed(prefect_client, "nightly").pull_steps in (None, [])
    prefect_client.delete_deployment(deployed(prefect_client, "nightly").id)


def test_prefect_deploy_from_two_machines_at_once(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, name: str, tmp_path: Path
) -> None:
    """Neither fails on a server that has nothing of it, and both agree on the one schedule."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        project(folder, name, f"pool-of-{name}", group=f"group-of-{name}", interval=3600)
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(prefect, prefect_api, folder, "deploy", "--all") for folder in folders]

    for run in [future.result() for future in runs]:
        assert run.returncode == 0, run.stdout + run.stderr
    found = deployed(prefect_client, name)
    assert (found.work_queue_name, found.tags) == (f"group-of-{name}", ["taskadapter"])
    assert found.entrypoint == "flows/job.py:job"
    assert schedule_of(prefect_client, name).active is True


def test_the_build_step_makes_what_nobody_runs_yet(prefect_client: SyncPrefectClient, name: str) -> None:
    """Steps that are taken at once make one deployment, of no work pool, and tell the same first tick."""
    told = at_once(prepare(name, slug(TRIGGER), interval=3600.0) for _ in range(4))

    found = deployed(prefect_client, name)
    anchor = schedule_of(prefect_client, name).schedule.anchor_date
    assert [datetime.fromisoformat(step["first_tick"]) for step in told] == [anchor] * 4
    assert (found.work_pool_name, found.entrypoint) == (None, None)


def test_prefect_deploy_to_a_pool_of_another_type(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, name: str, tmp_path: Path
) -> None:
    """`prefect deploy` fails on a process pool, and says what to do."""
    pool = f"process-of-{name}"
    prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    project(tmp_path, name, pool, interval=3600)

    run = prefect(prefect_api, tmp_path, "deploy", "--all")

    assert run.returncode != 0
    assert "'warm-backup' is needed" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    with pytest.raises(ObjectNotFound):
        deployed(prefect_client, name)


def test_prefect_deploy_of_a_program_that_begins_at_once(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, name: str, tmp_path: Path
) -> None:
    """It says where its call belongs, and does not run the jobs in the command that deploys them."""
    project(tmp_path, name, POOL, interval=3600)
    with (tmp_path / "flows" / "job.py").open("a") as file:
        file.write("\n\non.start()\n")

    run = prefect(prefect_api, tmp_path, "deploy", "--all")

    assert run.returncode == 1
    assert 'put the call under `if __name__ == "__main__":`' in run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    with pytest.raises(ObjectNotFound):
        deployed(prefect_client, name)


def test_prefect_deploy_without_a_server(prefect_api: PrefectServer, name: str, tmp_path: Path) -> None:
    """It fails with one sentence, and with no traceback around it."""
    project(tmp_path, name, POOL, interval=3600)
    away = f"http://127.0.0.1:{free_port()}/api"
    env = environment(prefect_api.env, {"PREFECT_API_URL": away})

    run = subprocess.run(
        [prefect_command(), "--no-prompt", "deploy", "--all"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 1
    assert f"taskadapter: Prefect's API at {away} does not answer" in run.stderr
    assert len((run.stdout + run.stderr).splitlines()) == 1
