"""What `taskadapter doctor` finds, in a system that lacks one thing after another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.local import environment, free_port
from taskadapter import doctor, schedule_job_recur_by_frequency
from taskadapter.coordination import tokens
from taskadapter.coordination.dialects import open_engine, transaction
from taskadapter.coordination.schema import create_missing
from taskadapter.pools import ensure_work_pool
from tests.integration.test_scheduler import HELLO

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from deployments.local import PrefectServer

PROJECT = Path(__file__).resolve().parents[2]

GROUP = "a-group"


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

    return asyncio.run(look())


def about(word: str, found: list[str]) -> str:
    """Return the one finding in which a word stands."""
    (only,) = (text for text in found if word in text)
    return only


def test_an_api_that_does_not_answer(pool: str, tmp_path: Path) -> None:
    """That is all that is said."""
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        (only,) = findings(pool, tmp_path)
    assert only.startswith("error Prefect's API at")


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
    assert (
        about("2 job(s)", found)
        == f"ok 2 job(s), paused: {prefect_client.read_deployment(paused.id).name}."
    )


def test_a_group_and_its_nodes(
    prefect_client: SyncPrefectClient, pool: str, tmp_path: Path, database: str
) -> None:
    """Without an active node that is an error, without a standby a warning; with both all is well."""
    ensure_work_pool(pool)
    prefect_client.create_work_queue(GROUP, work_pool_name=pool)
    engine = open_engine(database)
    with engine.connect() as connection:
        create_missing(connection)
    said = [about(f"group {GROUP!r}", findings(pool, tmp_path))]
    for name in ("node-1", "node-2"):
        node = tokens.Node(name, str(uuid.uuid4()), "a-host", 1)
        with transaction(engine) as connection:
            tokens.register(connection, node, [GROUP], 30)
            tokens.acquire(connection, node, GROUP, 30)
        said.append(about(f"group {GROUP!r}", findings(pool, tmp_path)))

    assert said == [
        f"error group {GROUP!r} has no active node; start an agent.",
        f"warning group {GROUP!r}: 'node-1' is active, and nobody stands by; start another agent.",
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
    ("seconds", "level"), [(0, "ok"), (1.9, "ok"), (-1.9, "ok"), (60, "warning"), (-60, "warning")]
)
def test_the_clock(seconds: float, level: str) -> None:
    """Half a minute is a warning in either direction, the second that the server cuts off is not."""

    class Client:
        async def hello(self) -> SimpleNamespace:
            date = datetime.now(UTC) - timedelta(seconds=seconds)
            return SimpleNamespace(headers={"date": format_datetime(date, usegmt=True)})

    client: Any = Client()
    assert asyncio.run(doctor._clock(client)).level == level


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

    stale, rendered = (run(prefect_api, tmp_path, pool), run(prefect_api, tmp_path, pool, render=True))
    ensure_work_pool(pool)
    well = run(prefect_api, tmp_path, pool)

    assert stale.stdout.startswith("warning deployments/prefect.yaml is not what flows/ declares;")
    assert rendered.stdout.startswith("ok      deployments/prefect.yaml is what flows/ declares.")
    assert f"error   there is no work pool '{pool}'" in rendered.stdout
    assert [stale.returncode, rendered.returncode, well.returncode] == [1, 1, 0]
    assert stale.stderr == ""


def run(
    server: PrefectServer, folder: Path, pool: str, *, render: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command in a project, after rendering it if that is asked for."""
    env = environment(server.env, {"PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(folder)})
    commands = [["render"]] * render + [["doctor", "--pool", pool]]
    for command in commands:
        script = "from taskadapter.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", script, *command], cwd=folder, env=env, capture_output=True, text=True
        )
    return done
