"""What `taskadapter doctor` finds, in a system that lacks one thing after another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import prefect
import pytest
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    temporary_settings,
)
from sqlalchemy import make_url, text

from deployments.local import environment, free_port, wait_until
from taskadapter import TaskPolicy, audit, cli, deploy, doctor, render, schedule_job_recur_by_frequency
from taskadapter.coordination import nodes, store, tokens
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.executions import Execution, Owner
from taskadapter.coordination.messages import PoolKey
from taskadapter.coordination.schema import create_missing
from taskadapter.declare.registry import listeners
from taskadapter.doctor import late, server
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.deployments import trigger_of
from taskadapter.prefect_api.pool import Domain
from taskadapter.rules import ticks
from taskadapter.settings import TaskadapterSettings
from tests import warm
from tests.acceptance.project import PATIENCE
from tests.api_proxy import ApiProxy, Request, refusal
from tests.integration.test_command import take_part
from tests.integration.test_scheduler import HELLO

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

    from deployments.local import Postgres, PrefectServer

PROJECT = Path(__file__).resolve().parents[2]

GROUP = "a-group"
LEASE = 300.0
"""Seconds: a slow machine, too, has looked at nodes before they are silent for so long."""


@pytest.fixture
def pool() -> str:
    """A work pool's name that no other test has."""
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty database, which the settings name."""
    url = f"sqlite:///{tmp_path / 'doctor.db'}"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL", url)
    return url


def findings(pool: str, folder: Path) -> list[str]:
    """Return what is found, each with its level in front."""

    async def look() -> list[str]:
        found = doctor.examine(pool, folder / "flows", folder / "prefect.yaml")
        return [f"{finding.level} {finding.text}" async for finding in found]

    return [text for text in asyncio.run(look()) if "the project is left out" not in text]


def about(word: str, found: list[str]) -> str:
    """Return the one finding in which a word stands."""
    (only,) = (text for text in found if word in text)
    return only


def test_an_api_that_does_not_answer(pool: str, tmp_path: Path) -> None:
    """That is all that is said."""
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        (only,) = findings(pool, tmp_path)
    assert only.startswith("error Prefect's API at")


def test_the_database_while_the_api_does_not_answer(pool: str, tmp_path: Path, database: str) -> None:
    """What it says of the pool's groups and nodes is said all the same, and nothing of another pool's."""
    take_part(database, pool, "group", "node-1", "node-2")
    take_part(database, pool, "alone", "node-3")
    take_part(database, f"{pool}-other", "theirs", "node-4")
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        found = findings(pool, tmp_path)
        go_silent(database)
        later = findings(pool, tmp_path)

    assert about("Prefect's API", found).startswith("error ")
    assert [text for text in found if text.startswith("error")] == [about("Prefect's API", found)]
    assert about("the agents of this machine only", found).startswith("warning ")
    assert about("by the database alone", found).startswith("ok ")
    assert "ok group 'group': 'node-1' is active, 1 standing by." in found
    assert about("group 'alone'", found).startswith("warning group 'alone': 'node-3' is active, and nobody")
    assert [text for text in found if "theirs" in text or "node-4" in text] == []
    assert about("group 'group'", later).startswith("error group 'group' has no active node: 'node-1' was")
    assert about("node 'node-2'", later).startswith("warning node 'node-2' is silent for ")


def go_silent(url: str) -> None:
    """Have all nodes been silent for a minute."""
    minute_ago = datetime.now(UTC) - timedelta(minutes=1)
    engine = open_engine(url)
    with engine.begin() as connection:
        for table, column in (("health_check", "last_heartbeat"), ("taskadapter_node", "last_seen")):
            connection.execute(text(f"UPDATE {table} SET {column} = '{minute_ago:%Y-%m-%d %H:%M:%S.000}'"))
    engine.dispose()


def test_no_pool(prefect_client: SyncPrefectClient, pool: str, tmp_path: Path) -> None:
    """The API and the clock are well, and the pool is named with what makes it."""
    server, clock, missing = findings(pool, tmp_path)

    assert server.startswith("ok Prefect's API at")
    assert clock.startswith("ok this machine's clock")
    assert missing.startswith(f"error there is no work pool '{pool}'; deploy")


def test_a_pool_of_another_type(
    prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, database: str
) -> None:
    """Its workers would run jobs uncoordinated."""
    prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"))

    assert about("of type 'process'", findings(pool, tmp_path)).startswith("error")


def test_a_new_pool(prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, database: str) -> None:
    """Nothing is deployed, and the tables are still to be made."""
    ensure_work_pool(pool)

    found = findings(pool, tmp_path)

    assert about("of type 'warm-backup'", found).startswith("ok")
    assert about("no jobs", found).startswith("warning")
    assert about("taskadapter_job", found).startswith("warning")
    assert "taskadapter db init" in found[-1]


def test_a_job_whose_trigger_was_edited(
    prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, database: str
) -> None:
    """The rule that it breaks is named, and the job; others are counted, with those that are paused."""
    wrong, paused = (schedule_job_recur_by_frequency(HELLO, 60, work_pool=pool) for _ in range(2))
    edited = DeploymentUpdate(job_variables={"trigger": {"interval": -1}})
    prefect_client.update_deployment(wrong.id, edited)
    prefect_client.pause_deployment(paused.id)

    found = findings(pool, tmp_path)

    name = prefect_client.read_deployment(wrong.id).name
    assert about(name, found).startswith(f"error job {name!r}: TriggerConfiguration: interval=-1")
    assert about("1 job is scheduled", found) == "ok 1 job is scheduled."
    assert about("paused", found) == (
        "warning paused, and not run until somebody resumes it: "
        f"{prefect_client.read_deployment(paused.id).name}; switch a deployment on in the UI, or run "
        "`taskadapter resume JOB`."
    )


def test_a_job_that_is_behind(
    prefect_client: SyncPrefectClient,
    pool: str,
    tmp_path: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its ticks wait, and nothing else is wrong."""
    monkeypatch.setattr(late, "LATE_SECONDS", 0.5)
    job_id = schedule_job_recur_by_frequency(HELLO, 1, work_pool=pool).id
    schedule = prefect_client.read_deployment(job_id).schedules[0].schedule
    assert isinstance(schedule, IntervalSchedule)
    first = Execution("a tick", "a run", str(job_id), schedule.anchor_date)
    store.skip(database, first, Owner("node-1", "first"), "a test's")

    def behind() -> list[str]:
        return [text for text in findings(pool, tmp_path) if "the oldest for" in text]

    (found,) = wait_until(behind, PATIENCE, "a tick to wait")
    assert found.startswith(f"warning job {prefect_client.read_deployment(job_id).name!r}: ")
    prefect_client.pause_deployment(job_id)
    assert behind() == []


def test_a_run_that_later_ticks_wait_for() -> None:
    """It may hang: the command that ends it is there."""
    job: Any = SimpleNamespace(name="slow")
    lines = [audit.Line(f"2020-01-01T00:00:{10 - k:02}", audit.WAITING, late=50.0 + k) for k in range(9)]
    running = audit.Line("2020-01-01T00:00:01+00:00", audit.RUNNING, node="node-1", flow_run="an-id")
    lines.append(running)

    (found,) = late.of_lines(job, lines, 5.0)

    assert "9 ticks wait, the oldest for 58 s; the run of" in found.text
    assert "on node-1: if it hangs, `prefect flow-run cancel an-id`" in found.text
    assert [*late.of_lines(job, lines[-1:], 5.0)] == []


@pytest.mark.parametrize(
    ("places", "took", "remedy"),
    [
        (None, 7.0, "raise the agent's `--limit`, or worker_count with `configure_worker_pool`"),
        (1, 0.9, "raise the agent's `--limit`"),
        (1, 1.5, "a run takes 1.5 s, every 1 s one is due, and max_concurrent=1 may overlap: declare a"),
        (2, 1.5, "raise the agent's `--limit`"),
    ],
)
def test_a_job_that_is_late_each_time(
    prefect_client: SyncPrefectClient, pool: str, places: int | None, took: float, remedy: str
) -> None:
    """Its ticks begin, and late: what stands in their way is named, as far as the ledger tells."""
    policy = TaskPolicy(max_concurrent=places)
    job = prefect_client.read_deployment(
        schedule_job_recur_by_frequency(HELLO, 1, work_pool=pool, task_policy=policy).id
    )
    lines = [audit.Line("2030-01-01T00:00:04", audit.WAITING, late=0.5)]
    lines += [
        audit.Line(
            f"2030-01-01T00:00:0{3 - k}", "Completed", number=3 - k, late=30.0 - k, took=took, node="node-1"
        )
        for k in range(3)
    ]

    (found,) = late.of_lines(job, lines, 5.0)

    assert (
        "is late each time: its last 3 ticks began up to 30 s after their time, and 1 tick waits; "
        in found.text
    )
    assert remedy in found.text
    assert [*late.of_lines(job, lines, 28.5)] == []


def test_a_job_that_makes_up_for_what_it_has_missed() -> None:
    """Each of its last ticks began less late than the one before it, and nothing is to be done."""
    job: Any = SimpleNamespace(name="behind")
    lines = [
        audit.Line(f"2030-01-01T00:00:0{9 - k}", "Completed", late=28.0 + k, took=0.1, node="node-1")
        for k in range(5)
    ]

    (found,) = late.of_lines(job, lines, 5.0)

    assert found.level is doctor.Level.OK
    assert "its last 5 ticks began 32 s and then 28 s after their time" in found.text


def test_a_job_is_found_late_by_its_ledger(
    prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, database: str
) -> None:
    """Though no tick waits for long: it is the time at which the last ones began."""
    job_id = schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool).id
    schedule = prefect_client.read_deployment(job_id).schedules[0].schedule
    assert isinstance(schedule, IntervalSchedule)
    engine = open_engine(database)
    with engine.connect() as connection:
        create_missing(connection)
    for n in range(3):
        due = schedule.anchor_date + n * timedelta(hours=1)
        store.skip(
            database, Execution(f"tick {n}", f"run {n}", str(job_id), due), Owner("n", "i"), "a test's"
        )

    def late_ones(late: float) -> list[str]:
        update = f"UPDATE taskadapter_ledger SET outcome='Completed', number=1, reason=NULL, late={late}"
        with transaction(engine) as connection:
            connection.execute(text(update))
        return [said for said in findings(pool, tmp_path) if "late each time" in said]

    assert late_ones(4.9) == []
    (found,) = late_ones(5.1)
    assert found.startswith("warning job ")


def test_a_group_and_its_nodes(
    prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, database: str
) -> None:
    """Without an active node that is an error, without a standby a warning; with both all is well."""
    ensure_work_pool(pool, Domain(liveness_check_interval=LEASE))
    prefect_client.create_work_queue(GROUP, work_pool_name=pool)
    engine = open_engine(database)
    with engine.connect() as connection:
        create_missing(connection)
    said = [about(f"group {GROUP!r}", findings(pool, tmp_path))]
    flow_id = prefect_client.create_flow_from_name(pool)
    prefect_client.create_deployment(flow_id, "nightly", work_pool_name=pool, work_queue_name=GROUP)
    said.append(about(f"group {GROUP!r}", findings(pool, tmp_path)))
    for name in ("node-1", "node-2"):
        node = nodes.Node(name, str(uuid.uuid4()), "a-host", 1)
        with transaction(engine) as connection:
            nodes.register(connection, node, [GROUP], LEASE)
            tokens.acquire(connection, node, [GROUP], LEASE)
        said.append(about(f"group {GROUP!r}", findings(pool, tmp_path)))

    start = f"`prefect worker start --pool {pool} --type warm-backup`"
    assert said == [
        f"warning group {GROUP!r} has no deployment, and no active node; `prefect work-queue delete "
        f"{GROUP} --pool {pool}`.",
        f"error group {GROUP!r} has no active node; start an agent: {start}.",
        f"warning group {GROUP!r}: 'node-1' is active, and nobody stands by; start another agent, on "
        f"another machine: {start}.",
        f"ok group {GROUP!r}: 'node-1' is active, 1 standing by.",
    ]
    assert about("this machine only", findings(pool, tmp_path)).startswith("warning")


def test_a_database_out_of_reach(
    prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address is told, and its password is not."""
    url = f"postgresql+psycopg://me:hush@127.0.0.1:{free_port()}/nothing"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL", url)
    ensure_work_pool(pool)

    found = findings(pool, tmp_path)

    assert found[-1].startswith("error")
    assert "127.0.0.1" in found[-1]
    assert "hush" not in "".join(found)


@pytest.mark.parametrize(
    ("seconds", "took", "level"),
    [
        (0, 0, "ok"),
        (1.9, 0, "ok"),
        (-1.9, 0, "ok"),
        (60, 0, "warning"),
        (-60, 0, "warning"),
        (60, 59, "ok"),
    ],
)
def test_the_clock(seconds: float, took: float, level: str) -> None:
    """A minute is a warning in either direction; what the server cuts off, and what it took, is not."""

    now = datetime.now(UTC)
    date = format_datetime(now - timedelta(seconds=seconds), usegmt=True)
    assert server.clock(date, now - timedelta(seconds=took), now).level == level


# --- a system that is well, and what is said when one thing of it breaks ---------------------------


MODULE = """
from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig

listener = Listener(
    trigger=TriggerConfiguration(interval=3600),
    warm_backup_config=WarmBackupConfig(group_id="a-group", liveness_check_interval=300),
    work_pool="{pool}",
)


@listener.service("count")
def count() -> None: ...
"""

SECRET = "hush"

SETTING = "PREFECT_INTEGRATIONS_TASKADAPTER_"


@dataclass
class System:
    """A project whose job is deployed, in a group with two nodes."""

    client: SyncPrefectClient
    pool: str
    folder: Path
    database: str
    patch: pytest.MonkeyPatch
    postgres: Postgres

    @property
    def module(self) -> Path:
        return self.folder / "flows" / "count.py"

    @property
    def job(self) -> DeploymentResponse:
        return self.client.read_deployment_by_name(f"{self.service}/{self.service}")

    @property
    def service(self) -> str:
        return f"count-{self.pool}"

    def render(self) -> None:
        file = self.folder / "prefect.yaml"
        file.write_text(render.render(self.folder / "flows", file))

    def change_job(self, **fields: Any) -> None:
        self.client.update_deployment(self.job.id, DeploymentUpdate(**fields))

    def change_pool(self, **fields: Any) -> None:
        self.client.update_work_pool(self.pool, WorkPoolUpdate(**fields))

    def change_queue(self, name: str, **fields: Any) -> None:
        self.client._client.patch(f"/work_pools/{self.pool}/queues/{name}", json=fields)

    def change_domain(self, domain: Domain) -> None:
        template = self.client.read_work_pool(self.pool).base_job_template
        self.change_pool(base_job_template=domain.put_into(template))

    def execute(self, *statements: str) -> None:
        engine = open_engine(self.database)
        with transaction(engine) as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()

    def use(self, url: str) -> None:
        """Have the settings name another database."""
        self.patch.setenv(f"{SETTING}DATABASE_URL", url)

    def make_postgres(self) -> str:
        """Return the URL of a database of PostgreSQL that has the tables, which the settings name."""
        name = f"doctor_{uuid.uuid4().hex[:8]}"
        self.postgres.create_database(name)
        self.database = self.postgres.url(name)
        self.use(self.database)
        make_tables(self.database, self.pool)
        return self.database

    def make_role(self, rights: str) -> str:
        """Return the URL of the same database for somebody who has these rights only."""
        role = f"reader_{uuid.uuid4().hex[:8]}"
        self.execute(
            f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'",
            f"GRANT {rights} ON ALL TABLES IN SCHEMA public TO {role}",
        )
        url = make_url(self.database).set(username=role, password=SECRET)
        return url.render_as_string(hide_password=False)


def make_tables(url: str, pool: str) -> None:
    """Make the tables, with a pool's group and two nodes."""
    engine = open_engine(url)
    with engine.connect() as connection:
        create_missing(connection)
    for name in ("node-1", "node-2"):
        node = nodes.Node(name, str(uuid.uuid4()), "a-host", 1)
        with transaction(engine) as connection:
            nodes.claim_groups(connection, PoolKey(pool), [GROUP])
            nodes.register(connection, node, [GROUP], LEASE)
            tokens.acquire(connection, node, [GROUP], LEASE)
    engine.dispose()


@pytest.fixture
def system(
    prefect_client: SyncPrefectClient,
    postgres_server: Postgres,
    pool: str,
    tmp_path: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> System:
    """A system that is well."""
    monkeypatch.chdir(tmp_path)
    made = System(prefect_client, pool, tmp_path, database, monkeypatch, postgres_server)
    made.module.parent.mkdir()
    made.module.write_text(MODULE.format(pool=pool).replace('"count"', f'"{made.service}"'))
    made.render()
    (listener,) = listeners
    asyncio.run(deploy.deploy(listener))
    make_tables(database, pool)
    for name in ("node-1", "node-2"):
        prefect_client.send_worker_heartbeat(pool, name, heartbeat_interval_seconds=30)
    return made


def test_a_system_that_is_well(system: System) -> None:
    """Nothing is an error; the one warning is that SQLite is for one machine."""
    system.patch.setattr(server, "EVENTS_SECONDS", PATIENCE)
    found = findings(system.pool, system.folder)

    assert [text for text in found if not text.startswith("ok")] == [
        about("coordinates the agents of this machine only; name a server for more", found)
    ]
    assert about("1 job is scheduled", found) == "ok 1 job is scheduled."


class Broken(NamedTuple):
    """One way to break a system, and what is to be said of it."""

    break_it: Callable[[System], Any]
    level: str
    words: str
    remedy: str


BROKEN: list[Broken] = []


def breaks(level: str, words: str, remedy: str) -> Callable[[Callable[[System], Any]], None]:
    """Add a way to break a system to the table; `{name}` in the words stands for a field of it."""
    return lambda break_it: BROKEN.append(Broken(break_it, level, words, remedy))


# The project.


@breaks("error", "broken.py, line 1: ModuleNotFoundError: No module named 'nowhere'", "move it out of")
def a_module_that_cannot_be_imported(system: System) -> None:
    (system.folder / "flows" / "broken.py").write_text("import nowhere\n")


@breaks("error", "broken.py ends the program that imports it", "do that under `if __name__")
def a_module_that_is_a_script(system: System) -> None:
    (system.folder / "flows" / "broken.py").write_text("raise SystemExit(0)\n")


@breaks("error", "count.py, line 5: TriggerConfiguration: interval=-1: must be greater", "choose a longer")
def a_declaration_that_is_refused(system: System) -> None:
    system.module.write_text(system.module.read_text().replace("3600", "-1"))


@breaks("warning", "prefect.yaml is not what", "if no module is missing here, run `taskadapter render`")
def a_declaration_that_is_not_rendered(system: System) -> None:
    system.module.write_text(system.module.read_text().replace("3600", "60"))


@breaks("error", "prefect.yaml cannot be read: Is a directory", "run `taskadapter render`")
def a_folder_in_the_place_of_the_rendered_file(system: System) -> None:
    (system.folder / "prefect.yaml").unlink()
    (system.folder / "prefect.yaml").mkdir()


@breaks("warning", "not deployed in work pool '{pool}', though declared: another", "prefect.yaml --all`")
def a_declaration_that_is_not_deployed(system: System) -> None:
    more = '\n\n@listener.service("another")\ndef another() -> None: ...\n'
    system.module.write_text(system.module.read_text() + more)
    system.render()


@breaks(
    "warning", "job '{service}' is deployed with another trigger than is declared", "prefect.yaml --all`"
)
def a_trigger_that_is_rendered_and_not_deployed(system: System) -> None:
    system.module.write_text(system.module.read_text().replace("3600", "60"))
    system.render()


@breaks(
    "warning",
    "job '{service}' is deployed, and",
    "`prefect deployment delete {service}/{service}`",
)
def a_job_that_is_not_declared_any_more(system: System) -> None:
    system.module.write_text(system.module.read_text().replace(system.service, "another"))
    system.render()


@breaks("error", "count.py is not here, and ticks of job '{service}' wait", "bring it back")
def a_module_that_is_missing(system: System) -> None:
    system.module.unlink()


@breaks("error", f"setting {SETTING}WORKER_COUNT=0 is refused", "correct it, or unset it")
def a_setting_that_is_refused(system: System) -> None:
    system.patch.setenv(f"{SETTING}WORKER_COUNT", "0")


# The work pool and its queues.


@breaks("error", "work pool '{pool}' is paused", "`prefect work-pool resume {pool}`")
def a_pool_that_is_paused(system: System) -> None:
    system.change_pool(is_paused=True)


@breaks(
    "error",
    "work pool '{pool}' has a concurrency limit of 0",
    "`prefect work-pool clear-concurrency-limit {pool}`",
)
def a_pool_that_lets_nothing_run(system: System) -> None:
    system.change_pool(concurrency_limit=0)


@breaks("error", f"work queue '{GROUP}' is paused", f"`prefect work-queue resume {GROUP} --pool {{pool}}`")
def a_group_that_is_paused(system: System) -> None:
    system.change_queue(GROUP, is_paused=True)


@breaks(
    "warning",
    "work queue 'default' has a concurrency limit of 0",
    "`prefect work-queue clear-concurrency-limit default --pool {pool}`",
)
def a_queue_that_lets_nothing_run(system: System) -> None:
    system.change_queue("default", concurrency_limit=0)


@breaks(
    "error",
    "the template of work pool '{pool}' does not hand on trigger",
    'write "trigger": "{{{{ trigger }}}}" into',
)
def a_template_without_the_trigger(system: System) -> None:
    template = system.client.read_work_pool(system.pool).base_job_template
    del template["job_configuration"]["trigger"]
    system.change_pool(base_job_template=template)


@breaks(
    "error", "liveness_check_interval=2 must be at least 3 times heartbeat_frequency=5", "raise it to 15"
)
def a_timing_that_was_edited(system: System) -> None:
    system.change_domain(Domain(liveness_check_interval=2, heartbeat_frequency=5))


@breaks("warning", "worker 'stranger' has polled the pool ", "start it with --type warm-bac")
def a_worker_that_does_not_coordinate(system: System) -> None:
    system.client.send_worker_heartbeat(system.pool, "stranger", heartbeat_interval_seconds=30)


@breaks(
    "error", "no agent polls work pool '{pool}'", "`prefect worker start --pool {pool} --type warm-backup`"
)
def a_pool_without_an_agent(system: System) -> None:
    for name in ("node-1", "node-2"):
        system.client._client.delete(f"/work_pools/{system.pool}/workers/{name}")


@breaks(
    "warning", "no agent has polled work pool '{pool}' for 7", "node-1 shows life in the database: wait"
)
def a_server_that_was_away(system: System) -> None:
    async def workers(*_: object, **__: object) -> list[Any]:
        then = datetime.now(UTC) - timedelta(seconds=700)
        seen = SimpleNamespace(status="OFFLINE", last_heartbeat_time=then, heartbeat_interval_seconds=30)
        return [SimpleNamespace(id=name, name=name, **vars(seen)) for name in ("node-1", "left-long-ago")]

    system.patch.setattr(PrefectClient, "read_workers_for_work_pool", workers)


# Its jobs.


@breaks("error", "job '{service}' has lost its trigger", "deploy it again")
def a_job_without_its_trigger(system: System) -> None:
    system.change_job(job_variables={})


@breaks(
    "error",
    "job '{service}' is over: run 3 failed, and the error policy is TERMINATE",
    "`taskadapter restart {service}`",
)
def a_job_that_its_error_policy_has_ended(system: System) -> None:
    trigger = trigger_of(system.job)
    assert trigger is not None
    store.end_job(system.database, system.job.id, ticks.failed(3, "TERMINATE"), ticks.slug(trigger))


@breaks("error", "job '{service}' has no entrypoint", "deploy it again")
def a_job_without_an_entrypoint(system: System) -> None:
    system.change_job(entrypoint="")


@breaks("warning", "not deployed in work pool '{pool}', though declared: {service}", "prefect.yaml --all`")
def a_group_that_was_deleted(system: System) -> None:
    system.client._client.delete(f"/work_pools/{system.pool}/queues/{GROUP}")


@breaks("warning", "job '{service}' runs every 5 s", "delete that schedule in the UI and deploy again")
def a_schedule_that_was_edited(system: System) -> None:
    edited = IntervalSchedule(interval=timedelta(seconds=5), anchor_date=datetime.now(UTC))
    system.client.update_deployment_schedule(system.job.id, system.job.schedules[0].id, schedule=edited)


@breaks(
    "warning", "job '{service}' runs by a CronSchedule", "delete that schedule in the UI and deploy again"
)
def a_schedule_that_was_made_a_cron(system: System) -> None:
    edited = CronSchedule(cron="0 3 * * *")
    system.client.update_deployment_schedule(system.job.id, system.job.schedules[0].id, schedule=edited)


@breaks("error", "job '{service}' has no schedule for its trigger, every 3600 s", "deploy it again")
def a_schedule_that_was_deleted(system: System) -> None:
    system.client.delete_deployment_schedule(system.job.id, system.job.schedules[0].id)


@breaks(
    "warning", "also runs by the schedule of an earlier trigger, 'every-60s-01234567'", "deploy it again"
)
def a_schedule_of_an_earlier_trigger(system: System) -> None:
    earlier = IntervalSchedule(interval=timedelta(seconds=60), anchor_date=datetime.now(UTC))
    planned: list[Any] = [(earlier, True)]
    system.client.create_deployment_schedules(system.job.id, planned, slug="every-60s-01234567")


@breaks("error", "job '{service}' has a concurrency limit of 0", "`prefect gcl update deployment:")
def a_job_that_may_not_run(system: System) -> None:
    system.change_job(concurrency_limit=1)
    limit = system.job.global_concurrency_limit
    system.client._client.patch(f"/v2/concurrency_limits/{limit.id}", json={"limit": 0})


# The database.


@breaks(
    "error",
    "the database of node-1, node-2 is not named here, nor in the work pool",
    f"set {SETTING}DATABASE_URL as it is set for them",
)
def a_shell_without_the_setting(system: System) -> None:
    system.patch.delenv(f"{SETTING}DATABASE_URL")
    old = f"sqlite:///{system.folder / 'old.db'}"
    make_tables(old, system.pool)
    with transaction(open_engine(old)) as connection:
        connection.execute(text("UPDATE taskadapter_node SET last_seen = '2020-01-01 00:00:00.000'"))
    system.patch.setattr(TaskadapterSettings, "default_database_url", lambda _: old)


@breaks(
    "error",
    f"{SETTING}DATABASE_URL: the URL of the coordination database cannot be read",
    "postgresql://USER@HOST:PORT/DATABASE",
)
def a_database_url_that_is_none(system: System) -> None:
    system.use(f"postgresql//me:{SECRET}@db/tasks")


@breaks(
    "error",
    f"{SETTING}DATABASE_URL: the URL of the coordination database cannot be read",
    "a password as %XX",
)
def a_database_url_whose_password_is_not_quoted(system: System) -> None:
    system.use(f"postgresql://me:a@b:{SECRET}/tasks")


@breaks(
    "error",
    f"{SETTING}DATABASE_URL: oracle: not a database that nodes can coordinate through",
    "use postgresql, mysql or sqlite",
)
def a_database_of_another_kind(system: System) -> None:
    system.use(f"oracle://me:{SECRET}@db/tasks")


@breaks(
    "error", "database me@db/tasks: its driver cannot be imported", "`pip install 'taskadapter[mysql]'`"
)
def a_database_whose_driver_is_not_installed(system: System) -> None:
    for name in ("pymysql", "pymysql.constants"):
        system.patch.setitem(sys.modules, name, None)
    system.use(f"mysql://me:{SECRET}@db/tasks")


@breaks("error", 'password authentication failed for user "postgres"', "correct the user, its password")
def a_wrong_password(system: System) -> None:
    wrong = make_url(system.make_postgres()).set(password=SECRET)
    system.use(wrong.render_as_string(hide_password=False))


@breaks("error", 'database "nothing" does not exist', "make that database, or name another one")
def a_database_that_is_not_there(system: System) -> None:
    system.use(system.postgres.url("nothing"))


@breaks("error", "permission denied for table", "correct the user, its password or its grants")
def a_user_who_may_only_read(system: System) -> None:
    system.make_postgres()
    system.use(system.make_role("SELECT"))


@breaks("error", "permission denied for table taskadapter_ledger", "its grants")
def a_user_who_may_not_delete(system: System) -> None:
    system.make_postgres()
    url = system.make_role("SELECT, INSERT, UPDATE, DELETE")
    system.execute(f"REVOKE DELETE ON taskadapter_ledger FROM {make_url(url).username}")
    system.use(url)


@breaks("error", "in a read-only transaction", "name the primary and not a replica")
def a_database_that_is_read_only(system: System) -> None:
    url = make_url(system.make_postgres())
    system.execute(f"ALTER DATABASE {url.database} SET default_transaction_read_only = on")


@breaks("error", "attempt to write a readonly database", "name a file that this user may write")
def a_file_that_is_read_only(system: System) -> None:
    system.use(f"sqlite:///file:{system.folder / 'doctor.db'}?mode=ro&uri=true")


@breaks("error", "unable to open database file", "in a folder that is there")
def a_folder_that_is_not_there(system: System) -> None:
    system.use(f"sqlite:///{system.folder / 'nowhere' / 'doctor.db'}")


@breaks("error", "file is not a database", "name a file that this user may write")
def a_file_that_is_no_database(system: System) -> None:
    (system.folder / "other.db").write_text("no database " * 100)
    system.use(f"sqlite:///{system.folder / 'other.db'}")


@breaks("warning", "lacks health_check, ", "`taskadapter db init` makes them")
def a_file_that_is_not_there(system: System) -> None:
    system.use(f"sqlite:///{system.folder / 'new.db'}")


@breaks("error", "are of version 1, and this release needs version 4", "run `taskadapter db upgrade`")
def tables_of_an_older_release(system: System) -> None:
    system.execute("DROP TABLE taskadapter_schema", "DROP TABLE taskadapter_ledger")


@breaks("error", "are of version 5, and this release knows version 4", "the release that the others have")
def tables_of_a_newer_release(system: System) -> None:
    system.execute("INSERT INTO taskadapter_schema (step) VALUES (5)")


@breaks("error", "lacks taskadapter_group, taskadapter_tenure, and has", "`taskadapter db init`, which")
def tables_that_are_missing(system: System) -> None:
    system.execute("DROP TABLE taskadapter_group", "DROP TABLE taskadapter_tenure")


@breaks("warning", "has narrower columns than it should", "run `taskadapter db upgrade`")
def columns_that_are_narrower(system: System) -> None:
    system.make_postgres()
    system.execute("ALTER TABLE token_holder ALTER COLUMN group_id TYPE varchar(20)")


@breaks("error", "Secret block 'no-such-block', which cannot be read", "make that block, or set PREFECT_")
def a_secret_block_that_is_missing(system: System) -> None:
    system.patch.delenv(f"{SETTING}DATABASE_URL")
    system.change_domain(Domain(database="postgresql://me@db/tasks", password_block="no-such-block"))


@breaks("error", "Secret block '{pool}', which cannot be read", "make that block, or set PREFECT_")
def a_secret_block_of_another_type(system: System) -> None:
    Webhook(url="http://127.0.0.1/hook").save(system.pool)
    system.patch.delenv(f"{SETTING}DATABASE_URL")
    system.change_domain(Domain(database="postgresql://me@db/tasks", password_block=system.pool))


@breaks(
    "error", "the variable database of work pool '{pool}': the URL", "write it as postgresql://USER@HOST"
)
def a_pool_whose_database_is_no_url(system: System) -> None:
    system.patch.setenv(f"{SETTING}DATABASE_PASSWORD", SECRET)
    system.patch.delenv(f"{SETTING}DATABASE_URL")
    system.change_domain(Domain(database="tasks"))


@breaks("warning", "the variable database of work pool '{pool}' has a password", "database_config")
def a_password_that_everybody_can_read(system: System) -> None:
    system.change_domain(Domain(database=f"postgresql://me:{SECRET}@db/tasks"))


@breaks("warning", f"{SETTING}DATABASE_URL names database", "unset it, or set it on all nodes")
def a_machine_with_a_database_of_its_own(system: System) -> None:
    system.change_domain(Domain(database="postgresql://me@db/tasks"))


@breaks("error", f"group '{GROUP}' belongs to work pool 'another'", "choose another group_id, or delete")
def a_group_of_another_pool(system: System) -> None:
    system.execute("UPDATE taskadapter_group SET work_pool = 'another'")


@breaks(
    "error", f"group '{GROUP}' belongs to work pool '{{pool}}' of another Prefect", "another group_id, or"
)
def a_group_of_another_servers_pool(system: System) -> None:
    system.execute("UPDATE taskadapter_group SET pool_id = 'another'")


@breaks("error", "has no active node: 'node-1' was last seen", "start an agent: `prefect worker start")
def a_group_of_a_pool_that_was_made_anew(system: System) -> None:
    system.execute(
        "UPDATE taskadapter_group SET pool_id = 'another'",
        "UPDATE health_check SET last_heartbeat = '2020-01-01 00:00:00.000'",
        "UPDATE taskadapter_node SET last_seen = '2020-01-01 00:00:00.000'",
    )


@breaks("error", "has no active node: 'node-1' was last seen", "start an agent: `prefect worker start")
def a_node_that_died_and_has_no_successor(system: System) -> None:
    system.execute("UPDATE health_check SET last_heartbeat = '2020-01-01 00:00:00.000'")


@breaks("warning", "node 'node-2' is silent for ", "see its log and its machine")
def a_standby_that_died(system: System) -> None:
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat(" ", "milliseconds")[:23]
    system.execute(f"UPDATE taskadapter_node SET last_seen = '{hour_ago}' WHERE task_id LIKE 'node-2%'")


def test_a_node_that_left_long_ago_is_not_named(system: System) -> None:
    """Its row stays for as long as the ledger's do."""
    system.execute("UPDATE taskadapter_node SET last_seen = '2020-01-01 00:00:00.000'")
    assert not [text for text in findings(system.pool, system.folder) if "is silent for" in text]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.break_it.__name__)
def test_what_breaks(system: System, broken: Broken) -> None:
    """One finding names what is broken and what to do, which a well system has not, and no secret."""
    broken.break_it(system)

    found = findings(system.pool, system.folder)

    names = {"pool": system.pool, "service": system.service}
    finding = about(broken.words.format(**names), found)
    assert finding.startswith(broken.level)
    assert broken.remedy.format(**names) in finding
    assert SECRET not in "".join(found)


# --- Prefect's API --------------------------------------------------------------------------------


HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 20\r\n\r\n<html>Sign in</html>"
EVERY, POOL = "", "/work_pools/"


class Answer(NamedTuple):
    """What an API answers to each request in whose path some text stands, and what is to be said of it."""

    path: str
    answer: bytes
    words: str
    remedy: str
    level: str = "error"
    settings: Mapping[Any, str] = MappingProxyType({})


ANSWERS = {
    "nobody signs in": Answer(
        EVERY, refusal(401), "(401 Unauthorized)", "set PREFECT_API_AUTH_STRING as on"
    ),
    "a wrong password": Answer(
        EVERY,
        refusal(401),
        "refuses this machine (401 Unauthorized)",
        "make PREFECT_API_AUTH_STRING what PREFECT_SERVER_API_AUTH_STRING is",
        settings={PREFECT_API_AUTH_STRING: f"admin:{SECRET}"},
    ),
    "a wrong key": Answer(
        EVERY,
        refusal(403),
        "refuses this machine (403 Forbidden)",
        "set PREFECT_API_KEY to a key that is valid",
        settings={PREFECT_API_KEY: SECRET},
    ),
    "no right to the pool": Answer(POOL, refusal(403), "(403 Forbidden)", "set PREFECT_API_AUTH_STRING"),
    "another server": Answer(
        EVERY, refusal(404), "is not Prefect's API (404 Not Found)", "http://HOST:4200/api"
    ),
    "a page": Answer(
        EVERY, HTML, "is not Prefect's API (its answer makes no sense)", "set PREFECT_API_URL"
    ),
    "another JSON": Answer(EVERY, refusal(200), "its answer makes no sense", "set PREFECT_API_URL"),
    "nonsense of a pool": Answer(POOL, refusal(200), "does not understand", "install the server's version"),
    "nonsense of jobs": Answer(
        "/deployments/", refusal(200, b"[3]"), "does not understand", "install the server's version"
    ),
    "a fault": Answer(EVERY, refusal(500), "fails at GET /api/admin/version (500", "see the server's log"),
    "a fault later": Answer(
        "/deployments/", refusal(500), "fails at POST /api/deployments/filter (500", "see the server's log"
    ),
    "no server behind the proxy": Answer(
        EVERY, refusal(502), "is not ready (502 Bad Gateway)", "start the server"
    ),
    "too many requests": Answer(EVERY, refusal(429), "is asked too often (429", "wait a minute"),
    "an older version": Answer(
        "/version",
        refusal(200, b'"3.1.0"'),
        f"has version 3.1.0, and {prefect.__version__} is installed here",
        f"`pip install prefect=={prefect.__version__}` on the server",
        "warning",
    ),
    "no clock": Answer(
        "/hello", refusal(200), "lack the header Date", "let the proxy before it pass that on", "warning"
    ),
}


@pytest.fixture
def proxy(prefect_api: PrefectServer) -> Iterator[ApiProxy]:
    """A proxy before the shared server, whose URL has a password."""
    with ApiProxy(prefect_api.port).running() as running:
        yield running


@pytest.mark.parametrize("given", ANSWERS.values(), ids=ANSWERS.keys())
def test_an_api_that_answers_something_else(system: System, proxy: ApiProxy, given: Answer) -> None:
    """What it answers is named, with the remedy, and the database is looked at nevertheless."""

    def fault(request: Request) -> bytes | None:
        return given.answer if given.path in request.path else None

    proxy.fault = fault
    with temporary_settings({PREFECT_API_URL: proxy.api_url, **given.settings}):
        found = findings(system.pool, system.folder)

    finding = about(given.words, found)
    assert finding.startswith(given.level)
    assert given.remedy in finding
    assert about("doctor.db", found).split()[0] in ("ok", "warning")
    assert SECRET not in "".join(found)


def test_an_event_stream_that_is_blocked(system: System, proxy: ApiProxy) -> None:
    """As by a proxy that passes no websockets on; nothing else is wrong."""
    proxy.fault = lambda request: refusal(403) if request.path.endswith("/events/out") else None
    system.patch.setattr(server, "EVENTS_SECONDS", PATIENCE)

    with temporary_settings({PREFECT_API_URL: proxy.api_url}):
        found = findings(system.pool, system.folder)

    blocked = about("/api/events/out", found)
    assert blocked.startswith("warning Prefect's event stream, the websocket /api/events/out, is blocked: ")
    assert "403" in blocked
    assert not [text for text in found if text.startswith("error")]


def test_an_event_stream_that_does_not_answer(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for any longer than said."""

    @asynccontextmanager
    async def never(*_: object, **__: object) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(server, "EVENTS_SECONDS", 0.0)
    monkeypatch.setattr(server, "get_events_subscriber", never)
    assert "is blocked: no answer within 0 s" in about(
        "/api/events/out", findings(system.pool, system.folder)
    )


def test_a_secret_block_that_the_api_does_not_give(system: System, proxy: ApiProxy) -> None:
    """That is said like any other fault of the API, after all that could be read."""
    system.change_domain(Domain(database="postgresql://me@db/tasks", password_block="a-block"))
    system.patch.delenv(f"{SETTING}DATABASE_URL")
    proxy.fault = lambda request: refusal(500) if "/block" in request.path else None
    with temporary_settings({PREFECT_API_URL: proxy.api_url}):
        found = findings(system.pool, system.folder)

    assert about("1 job is scheduled", found).startswith("ok")
    assert about("(500 Internal Server Error)", found).startswith("error Prefect's API at")


def test_deployments_of_others(prefect_client: SyncPrefectClient, pool: str, tmp_path: Path) -> None:
    """A pool that has only such is not taken for one without jobs."""
    ensure_work_pool(pool)
    flow_id = prefect_client.create_flow_from_name(pool)
    prefect_client.create_deployment(flow_id, "nightly", work_pool_name=pool)

    said = about("that taskadapter did not declare", findings(pool, tmp_path))
    assert said == "ok 0 jobs are scheduled; 1 deployment that taskadapter did not declare."


def test_no_address_of_an_api(pool: str, tmp_path: Path, database: str) -> None:
    """Prefect would start a server of its own, which has no pool: that is not done."""
    found = findings(pool, tmp_path)

    finding = about("PREFECT_API_URL is not set", found)
    assert finding.startswith("error")
    assert "set it to the API of the server that all nodes use, such as http://HOST:4200/api" in finding
    assert about("doctor.db", found).startswith("warning")


def test_the_address_of_the_user_interface(prefect_api: PrefectServer, pool: str, tmp_path: Path) -> None:
    """It is taken for no API, and an address with `/api` is asked for."""
    with temporary_settings({PREFECT_API_URL: prefect_api.ui_url}):
        (only,) = findings(pool, tmp_path)
    assert only.startswith(f"error {prefect_api.ui_url} is not Prefect's API (")
    assert only.endswith(f"and lacks /api; set PREFECT_API_URL to {prefect_api.ui_url}/api.")


@pytest.mark.parametrize("address", ["http://me:hush@127.0.0.1:port/api", "me:hush@127.0.0.1/api"])
def test_an_address_that_is_none(pool: str, tmp_path: Path, address: str) -> None:
    """It is named without its password."""
    with temporary_settings({PREFECT_API_URL: address}):
        (only,) = findings(pool, tmp_path)
    assert only.startswith("error")
    assert "PREFECT_API_URL" in only
    assert "127.0.0.1" in only
    assert SECRET not in only


def test_an_address_without_http(pool: str, tmp_path: Path) -> None:
    """That is what is to be written."""
    with temporary_settings({PREFECT_API_URL: "localhost:4200/api"}):
        (only,) = findings(pool, tmp_path)
    assert only == (
        "error PREFECT_API_URL=localhost:4200/api does not begin with http:// or https://; write "
        "http://localhost:4200/api."
    )


def test_a_folder_without_flows(pool: str, tmp_path: Path) -> None:
    """That nothing is said of a project there is said."""

    async def first() -> str:
        return await anext(finding.text async for finding in doctor.examine(pool, tmp_path / "flows", None))

    assert (
        asyncio.run(first()) == f"there is no folder {tmp_path}/flows/ here, and the project is left out."
    )


def test_a_broken_database_hides_no_job(system: System) -> None:
    """What is wrong with the jobs is said as well, and with the project."""
    system.use("oracle://db/tasks")
    system.change_job(job_variables={})
    system.module.write_text("import nowhere\n")

    found = findings(system.pool, system.folder)

    for words in ("not a database", "has lost its trigger", "No module named 'nowhere'"):
        assert about(words, found).startswith("error")


def test_the_command(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, pool: str, tmp_path: Path
) -> None:
    """It also looks whether the project is rendered; an error, and no warning, is exit status 1."""
    (tmp_path / "flows").mkdir()
    module = tmp_path / "flows" / "job.py"
    module.write_text(
        "from taskadapter import Listener, TriggerConfiguration\n"
        "@Listener(trigger=TriggerConfiguration(interval=60)).service('job')\n"
        "def job(): ...\n"
    )

    absent, rendered = (run(prefect_api, tmp_path, pool), run(prefect_api, tmp_path, pool, render=True))
    ensure_work_pool(pool)
    module.write_text(module.read_text().replace("60", "30"))
    stale = run(prefect_api, tmp_path, pool)
    (tmp_path / "deployments" / "prefect.yaml").rename(tmp_path / "prefect.yaml")
    beside = run(prefect_api, tmp_path, pool)
    module.write_text("")
    nothing = run(prefect_api, tmp_path, pool)

    assert "prefect.yaml" not in absent.stdout.splitlines()[0]
    assert f"error   there is no work pool '{pool}'" in absent.stdout
    assert rendered.stdout.startswith("ok      deployments/prefect.yaml is what flows/ declares.")
    assert stale.stdout.startswith("warning deployments/prefect.yaml is not what flows/ declares;")
    assert beside.stdout.startswith("warning prefect.yaml is not what flows/ declares;")
    assert nothing.stdout.startswith("ok      flows/ declares no job of taskadapter's.")
    codes = [done.returncode for done in (absent, rendered, stale, beside, nothing)]
    assert codes == [1, 1, 0, 0, 0]
    assert absent.stderr == ""


def run(
    server: PrefectServer, folder: Path, pool: str, *, render: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command in a project, after rendering it if that is asked for."""
    env = environment(server.env, {"PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(folder)})
    commands = [["render"]] * render + [["doctor", "--pool", pool]]
    for command in commands:
        script = "from taskadapter.cli import main; main()"
        done = warm.run(sys.executable, "-c", script, *command, cwd=folder, env=env)
    return done


@pytest.mark.usefixtures("prefect_client")
@pytest.mark.parametrize("command", [["status"], ["resign", "group"]])
def test_a_command_that_reads_makes_no_file(
    pool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    """It says that there is none, in a line: an agent makes it, or the URL has a mistake."""
    ensure_work_pool(pool)
    file = tmp_path / "new.db"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL", f"sqlite:///{file}")
    monkeypatch.setattr("sys.argv", ["taskadapter", *command, "--pool", pool])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(
        f"taskadapter: database {file}: there is no such file on this "
    )
    assert not file.exists()
