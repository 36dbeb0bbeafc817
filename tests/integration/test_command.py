"""What the command says to somebody who is new here: one sentence, with the remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from sqlalchemy import delete

from deployments.local import environment, free_port
from taskadapter import cli, schedule_job_recur_by_frequency
from taskadapter.coordination import ledger, nodes, store, tokens
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.executions import Execution, Limits, Owner
from taskadapter.coordination.messages import PoolKey, Token
from taskadapter.coordination.schema import create_missing, node
from taskadapter.coordination.schema import ledger as ledger_table
from taskadapter.errors import in_a_line
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.deployments import TAG, trigger_of
from taskadapter.rules import ticks
from taskadapter.settings import TaskadapterSettings
from tests.integration.test_scheduler import HELLO

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from deployments.local import PrefectServer

LEASE = 30.0

PROJECT = Path(__file__).resolve().parents[2]


class Command(Protocol):
    """Runs the command with some words, and returns what it prints: an error is one line of its own."""

    def __call__(self, *words: str) -> str: ...


@pytest.fixture
def pool() -> str:
    """A work pool's name that no other test has."""
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty database, which the settings name."""
    url = f"sqlite:///{tmp_path / 'command.db'}"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL", url)
    return url


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["taskadapter", *words])
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                said = capsys.readouterr()
                assert said.out == ""
                (line,) = said.err.splitlines()
                return line.removeprefix("taskadapter: ")
        return capsys.readouterr().out

    return run


def take_part(url: str, work_pool: str, group: str, *names: str) -> None:
    """Have nodes stand by for a pool's group; the first of them is active."""
    engine = open_engine(url)
    with engine.connect() as connection:
        create_missing(connection)
    for name in names:
        node = nodes.Node(name, str(uuid.uuid4()), "a-host", 1)
        with transaction(engine) as connection:
            nodes.claim_groups(connection, PoolKey(work_pool), [group])
            nodes.register(connection, node, [group], LEASE)
            tokens.acquire(connection, node, [group], LEASE)
    engine.dispose()


def leave(url: str, group: str, name: str) -> None:
    """Have the active node of a group stop."""
    engine = open_engine(url)
    with transaction(engine) as connection:
        tokens.release(connection, [Token(group, name, 1)])
        connection.execute(delete(node).where(node.c.task_id == name))
    engine.dispose()


COMMANDS = [["status"], ["resign", "group"], ["ledger", "job"], ["db", "init"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_address_of_an_api(command: Command, words: list[str]) -> None:
    """Prefect would start a server of its own, which has no pool: that is not done."""
    assert command(*words).startswith("PREFECT_API_URL is not set, and Prefect would start a server")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_address_that_lacks_api(prefect_api: PrefectServer, command: Command, words: list[str]) -> None:
    """It is not taken for a server that has no such pool, or job."""
    with temporary_settings({PREFECT_API_URL: prefect_api.ui_url}):
        said = command(*words)
    assert said.startswith(f"{prefect_api.ui_url} is not Prefect's API (")
    assert said.endswith(f"and lacks /api; set PREFECT_API_URL to {prefect_api.ui_url}/api.")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("localhost:4200/api", "does not begin with http:// or https://; write http://localhost:4200/api."),
        ("http://127.0.0.1:port/api", "is no URL; set it to the API of the server, such as"),
    ],
)
def test_an_address_that_is_none(command: Command, address: str, words: str) -> None:
    """It is named, with what is wrong with it."""
    with temporary_settings({PREFECT_API_URL: address}):
        assert f"PREFECT_API_URL={address} {words}" in command("status")


def test_the_database_answers_while_the_api_does_not(
    pool: str,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Who is active is what somebody wants to know then; that the rest is not known is said."""
    take_part(database, pool, "group", "node-1", "node-2")
    monkeypatch.setattr("sys.argv", ["taskadapter", "status", "--pool", pool, "--json"])
    with temporary_settings(away()), pytest.raises(SystemExit) as ended:
        cli.main()

    assert not ended.value.code
    shown = capsys.readouterr()
    (group,) = json.loads(shown.out)["groups"]
    assert (group["holder"], group["standing_by"]) == ("node-1", ["node-2"])
    assert "does not answer" in shown.err
    assert shown.err.endswith(f"{cli.WITHOUT_API}\n")


def test_the_ledger_of_a_job_by_its_id_while_the_api_does_not_answer(
    database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The database has it; that the rest is not known is said."""
    job_id, engine = uuid.uuid4(), open_engine(database)
    with engine.connect() as connection:
        create_missing(connection)
    due = datetime(2030, 1, 1, 12, tzinfo=UTC)
    execution = Execution(key="tick", flow_run_id=str(uuid.uuid4()), job_id=str(job_id), due=due)
    with transaction(engine) as connection:
        ledger.begin(connection, execution, Owner("node-1", str(uuid.uuid4())), Limits("slug"))
        ledger.end(connection, "tick", "Completed", incarnation="another")
    engine.dispose()

    def told(*words: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["taskadapter", "ledger", *words])
        with temporary_settings(away()), pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        shown = capsys.readouterr()
        return shown.out, shown.err

    out, said = told(str(job_id).upper(), "--json")
    (line,) = json.loads(out)
    assert (line["outcome"], line["node"], line["number"]) == ("Completed", "node-1", 1)
    assert "does not answer" in said
    assert said.endswith(f"{cli.BY_ID}\n")
    assert said.count("\n") == 1
    assert "Completed" in told(job_id.hex)[0]
    assert told(str(uuid.uuid4()))[0] == "The ledger has nothing of that job.\n"


def away() -> dict[Any, Any]:
    return {PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}


def test_the_ledger_of_a_job_by_its_name_while_the_api_does_not_answer(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the API knows whose name it is: the way without it is named, also where no database is."""
    with temporary_settings(away()):
        by_name = command("ledger", "flow/job")
        monkeypatch.delenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL")
        by_id = command("ledger", str(uuid.uuid4()))

    for said in (by_name, by_id):
        assert "does not answer" in said
        assert "; without it, name the job by its id, and the database in PREFECT_INTEGRATIONS_TASK" in said
        assert said.endswith("TASKADAPTER_DATABASE_URL.")
        assert said.count(". ") == 0


def test_a_pool_that_is_not_there(prefect_client: SyncPrefectClient, pool: str, command: Command) -> None:
    """What makes it is named."""
    said = command("status", "--pool", pool)
    assert said.startswith(f"there is no work pool '{pool}'; deploy, or start an agent, which makes it, or")


def test_a_pool_of_another_type(prefect_client: SyncPrefectClient, pool: str, command: Command) -> None:
    """It has no groups."""
    prefect_client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    assert f"work pool '{pool}' is of type 'process'" in command("status", "--pool", pool)


def test_a_database_that_no_node_has_used(
    prefect_client: SyncPrefectClient, pool: str, database: str, command: Command
) -> None:
    """Nothing is wrong with it, and nothing is to be upgraded; a file that is not there is not made."""
    ensure_work_pool(pool)
    file = Path(database.removeprefix("sqlite:///"))
    assert "there is no such file on this machine" in command("status", "--pool", pool)
    assert not file.exists()

    file.touch()
    said = command("status", "--pool", pool)
    assert "If no node has used it yet, start an agent, or run `taskadapter db init`" in said


def test_a_database_that_is_not_that_of_the_agents(
    prefect_client: SyncPrefectClient,
    pool: str,
    database: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing names it here: that is said first, unless the agents have just left it."""
    ensure_work_pool(pool)
    monkeypatch.delenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL")
    monkeypatch.setattr(TaskadapterSettings, "default_database_url", lambda _: database)
    prefect_client.send_worker_heartbeat(pool, "node-1", heartbeat_interval_seconds=30)
    words = (
        "the database of node-1 is not named here, nor in the work pool, and what is told of it would be"
    )
    status = ("status", "--pool", pool)

    assert command(*status).startswith(words)
    take_part(database, pool, "group", "node-2")
    for asked in (status, (*status, "--json")):
        monkeypatch.setattr("sys.argv", ["taskadapter", *asked])
        with suppress(SystemExit):
            cli.main()
        said = capsys.readouterr()
        assert said.err.startswith(f"taskadapter: {words}")
        assert said.err.endswith("as it is set for them, unless they have been stopped since.\n")
        assert "node-2" in said.out
    take_part(database, pool, "other", "node-1")
    assert "node-1" in command(*status)
    leave(database, "other", "node-1")
    assert "nobody" in command(*status)


def test_a_ledger_that_is_gone(
    prefect_client: SyncPrefectClient, pool: str, database: str, command: Command
) -> None:
    """The doctor names it, and who knows that it is empty then has it made."""
    ensure_work_pool(pool)
    take_part(database, pool, "group", "node-1")
    engine = open_engine(database)
    with transaction(engine) as connection:
        ledger_table.drop(connection)
    engine.dispose()
    job_id = str(schedule_job_recur_by_frequency(HELLO, 3600, work_pool=pool).id)

    assert "else they are gone, and `taskadapter doctor` names them" in command("ledger", job_id)
    assert command("db", "init", "--pool", pool) == "Made taskadapter_ledger.\n"
    assert command("db", "init", "--pool", pool) == "All tables are there.\n"


def test_a_pool_that_is_paused(
    prefect_client: SyncPrefectClient, pool: str, database: str, command: Command
) -> None:
    """Its nodes hold their groups, and begin nothing: that is told with them."""
    ensure_work_pool(pool)
    take_part(database, pool, "ours", "node-1")
    prefect_client.update_work_pool(pool, WorkPoolUpdate(is_paused=True))

    (paused,) = json.loads(command("status", "--pool", pool, "--json"))["paused"]

    assert paused == f"work pool '{pool}'"
    assert "Paused in Prefect, and nothing begins until it is resumed" in command("status", "--pool", pool)


def test_the_groups_of_another_pool(
    prefect_client: SyncPrefectClient, pool: str, database: str, command: Command
) -> None:
    """They are not this pool's, although both have one database; nor are the nodes."""
    ensure_work_pool(pool)
    take_part(database, pool, "ours", "node-1")
    take_part(database, "another", "theirs", "node-2")

    found = json.loads(command("status", "--pool", pool, "--json"))

    assert [group["group_id"] for group in found["groups"]] == ["ours"]
    assert [node["task_id"] for node in found["nodes"]] == ["node-1"]


def test_a_handover_needs_somebody_who_stands_by(
    prefect_client: SyncPrefectClient, pool: str, database: str, command: Command
) -> None:
    """Else the node would take the group again; with --force it is asked nevertheless."""
    ensure_work_pool(pool)
    take_part(database, pool, "group", "node-1")
    resign = ("resign", "group", "--pool", pool)

    assert command("resign", "nogroup", "--pool", pool) == (
        f"there is no group 'nogroup' in work pool '{pool}', which has group; name another pool "
        "with --pool."
    )
    assert command(*resign).startswith("nobody stands by for group 'group'")
    assert command(*resign, "--force").startswith("Asked node 'node-1'")
    take_part(database, pool, "group", "node-2")
    assert command(*resign).startswith("Asked node 'node-1'")


def test_a_job_is_named_by_its_name(
    prefect_client: SyncPrefectClient, pool: str, database: str, command: Command
) -> None:
    """With or without its flow's; where there are several, or none, those that there are are listed."""
    ensure_work_pool(pool)
    take_part(database, pool, "group", "node-1")
    job, other = f"job-{pool}", f"other-{pool}"
    for flow in (job, other):
        flow_id = prefect_client.create_flow_from_name(flow)
        prefect_client.create_deployment(flow_id, job, work_pool_name=pool, tags=[TAG])
    job_id = prefect_client.create_deployment(flow_id, other, work_pool_name=pool, tags=[TAG])

    both = f"{job}/{job}, {other}/{job}"
    assert command("ledger", job) == f"several jobs are named '{job}'; name one of {both}."
    for name in (other, f"{other}/{other}", str(job_id), f"{job}/{job}"):
        assert command("ledger", name) == "Nothing has run yet.\n"
    for name in (f"nothing/{job}", "nothing", f"{job}/", str(uuid.uuid4())):
        said = command("ledger", name)
        assert said.startswith(f"there is no job '{name}'; there are: ")
        assert "\n" not in said


def test_a_job_that_has_never_run_has_ticks_that_wait(
    prefect_client: SyncPrefectClient, database: str, command: Command
) -> None:
    """How many, and since when: nobody is there who runs them. Of one that is paused none waits."""
    engine = open_engine(database)
    with engine.connect() as connection:
        create_missing(connection)
    engine.dispose()
    job = schedule_job_recur_by_frequency(HELLO, 0.6, work_pool="command")
    time.sleep(1.4)

    first, *_, last = json.loads(command("ledger", str(job.id), "--json"))
    assert first["due"] > last["due"]
    assert {first["outcome"], last["outcome"]} == {"waiting"}
    due = datetime.fromisoformat(last["due"]).replace(tzinfo=None).isoformat(" ", "milliseconds")
    said = command("ledger", str(job.id), "--last", "1")
    found = re.fullmatch(
        r"Nothing has run yet. (\d+) ticks wait, the oldest due (.*) UTC.", in_a_line(said)
    )
    assert found is not None
    assert int(found[1]) >= 2
    assert found[2] == due
    prefect_client.pause_deployment(job.id)
    assert command("ledger", str(job.id)) == "Nothing has run yet.\nThe job is paused.\n"


def test_only_a_job_that_has_ended_is_started_again(
    prefect_client: SyncPrefectClient, database: str, command: Command
) -> None:
    """Nor one that would be over again at once."""
    job = schedule_job_recur_by_frequency(HELLO, 3600, work_pool="command")
    own = prefect_client.read_deployment(job.id)
    assert command("restart", own.name).startswith(f"job '{own.name}' has not ended")

    trigger = trigger_of(own)
    assert trigger is not None
    store.end_job(database, job.id, ticks.failed(3, "TERMINATE"), ticks.slug(trigger))
    assert "The job is over: run 3 failed" in command("ledger", own.name)
    assert command("restart", own.name).startswith(
        f"Job '{own.name}' is started again. It had ended: run 3 failed"
    )
    assert "The job" not in command("ledger", own.name)

    prefect_client.update_deployment_schedule(job.id, own.schedules[0].id, active=False)
    assert "its schedule was switched off" in command("restart", str(job.id))
    assert prefect_client.read_deployment(job.id).schedules[0].active
    prefect_client.pause_deployment(job.id)
    assert "The job is paused." in command("ledger", own.name)
    prefect_client.delete_deployment_schedule(job.id, own.schedules[0].id)
    store.end_job(database, job.id, "it failed", ticks.slug(trigger))
    assert "has no schedule; schedule, or deploy, it again" in command("restart", own.name)


def test_a_job_is_paused_and_resumed(prefect_client: SyncPrefectClient, command: Command) -> None:
    """By its name; one that there is not is told in one sentence."""
    job = schedule_job_recur_by_frequency(HELLO, 3600, work_pool="command")
    name = prefect_client.read_deployment(job.id).name

    assert command("pause", name) == f"Job {name!r} is paused.\n"
    assert prefect_client.read_deployment(job.id).paused
    assert command("resume", name) == f"Job {name!r} is not paused any more.\n"
    assert not prefect_client.read_deployment(job.id).paused
    assert command("pause", "no such job").startswith("there is no job 'no such job'")


def test_completion_is_installed(command: Command, tmp_path: Path) -> None:
    """Where the shell looks for it."""
    script = tmp_path / "completion"
    assert str(script) in command("--install-completion", "--shell", "fish", "--output", str(script))
    assert "resign" in script.read_text()


def test_somebody_who_stops_reading(
    prefect_api: PrefectServer, prefect_client: SyncPrefectClient, pool: str, tmp_path: Path
) -> None:
    """Such as `head`: that is no fault of the command's."""
    ensure_work_pool(pool)
    env = environment(prefect_api.env, {"PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(tmp_path)})
    script = "from taskadapter.cli import main; main()"
    words = [sys.executable, "-c", script, "db", "sql", "--pool", pool]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == b""


@pytest.mark.parametrize("last", ["0", "-1"])
def test_how_many_executions_is_a_number(command: Command, last: str) -> None:
    """None, or fewer, are not asked for."""
    assert command("ledger", "job", "--last", last) == f"--last={last}: must be at least 1."
