"""Prefect's documented high availability: its parts are killed in turn, and no tick is lost or run twice.

It is two API servers on one PostgreSQL behind a balancer, one process of background services, and Redis
between all three: https://docs.prefect.io/v3/advanced/self-hosted.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectHTTPStatusError

from deployments.local import (
    Postgres,
    PrefectServer,
    Program,
    environment,
    free_port,
    postgres,
    prefect_command,
    running,
    wait_until,
)
from deployments.program import HOST
from taskadapter.agent.hearing import LATE_SECONDS
from tests.acceptance.project import PATIENCE, Entry, Prefect, Project, due
from tests.contract.proxy import Balancer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

EVERY = 3
"""Seconds between two ticks."""

AWAY = 4 * EVERY
"""Seconds for which Redis is away."""

BEGINS = 0.5
"""A part is killed so many seconds before a tick is due, which has been claimed then."""

PLANNED = 5
"""How many ticks Prefect plans ahead here: few, so that they are used up while its services are away."""

JOBS = f"""
    from datetime import datetime, timedelta

    from ledger import note
    from taskadapter import Listener, TaskPolicy, TriggerConfiguration, WarmBackupConfig, current_run

    def listener(interval, start_time=None):
        return Listener(
            trigger=TriggerConfiguration(interval=interval, start_time=start_time),
            task_policy=TaskPolicy(max_concurrent=1),
            warm_backup_config=WarmBackupConfig(
                group_id="available", liveness_check_interval=3, heartbeat_frequency=0.5
            ),
        )

    @listener({EVERY}).service("counter")
    def counter() -> None:
        run = current_run()
        note("counter", "ran", due=run.scheduled_time.timestamp(), count=run.count, node=run.task_id)

    @listener(3600, (datetime.now().astimezone() + timedelta(hours=2)).isoformat()).service("by-hand")
    def by_hand() -> None:
        note("by-hand", "ran")
"""


class Redis(Program):
    """A Redis that has forgotten everything when it is started again.

    Args:
        home: its directory.
        executable: the program.
    """

    def __init__(self, home: Path, executable: str) -> None:
        self.port = free_port()
        listen = ("--bind", HOST, "--port", str(self.port))
        super().__init__(
            "Redis",
            [executable, *listen, "--save", "", "--appendonly", "no"],
            log=home / "redis.log",
            ready=self._answers,
            cwd=home,
        )

    def url(self, database: int) -> str:
        """Return the URL of one of its databases."""
        return f"redis://{HOST}:{self.port}/{database}"

    def _answers(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
        except OSError:
            return False


@dataclass(frozen=True)
class Site:
    """Everything that can be away, and the agents that cannot do without.

    Attributes:
        servers: the two of the API.
        services: plans runs, and marks those that are late.
        redis: carries the events of both servers to those who listen to one of them.
        agents: two, by their names.
    """

    servers: tuple[PrefectServer, PrefectServer]
    services: Program
    redis: Redis
    agents: dict[str, Program]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A Redis of our own."""
    home = tmp_path_factory.mktemp("redis")
    with running(Redis(home, os.environ["TASKADAPTER_TEST_REDIS_SERVER"])) as program:
        yield program


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    """A PostgreSQL of our own, with a database for Prefect; the other is the agents'."""
    with postgres() as server:
        server.create_database("prefect")
        yield server


@pytest.fixture(scope="module")
def settings(redis_server: Redis, database: Postgres) -> dict[str, str]:
    """What Prefect documents for its servers and services, and less foresight than it has by default."""
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url("prefect", driver="asyncpg"),
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
        "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
        "PREFECT_REDIS_MESSAGING_URL": redis_server.url(0),
        "PREFECT_SERVER_DOCKET_URL": redis_server.url(1),
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": str(PLANNED),
    }


@pytest.fixture(scope="module")
def servers(
    settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PrefectServer, PrefectServer]]:
    """Two API servers on one database, behind one address."""
    homes = [tmp_path_factory.mktemp(f"api-{number}") for number in (1, 2)]
    with ExitStack() as stack:
        balancer = Balancer()
        stack.callback(balancer.close)
        url = f"http://{HOST}:{balancer.port}/api"
        first, second = (
            PrefectServer(home, settings, "--no-services", "--no-ui", api_url=url) for home in homes
        )
        balancer.ports = [first.port, second.port]
        migrate(homes[0], first.env | settings)
        # One after the other: on an empty database two that start at once enter the same block types.
        yield stack.enter_context(running(first)), stack.enter_context(running(second))


def migrate(home: Path, env: dict[str, str]) -> None:
    """Make the tables of Prefect's servers, which they do not make themselves."""
    command = [prefect_command(), "server", "database", "upgrade", "-y"]
    done = subprocess.run(command, cwd=home, env=environment(env), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(
    servers: tuple[PrefectServer, PrefectServer], tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """A project that knows the balancer only."""
    project = Project(tmp_path_factory.mktemp("available"), servers[0], "acceptance-available")
    project.write("flows/jobs.py", JOBS)
    return project


@pytest.fixture(scope="module")
def prefect(servers: tuple[PrefectServer, PrefectServer]) -> Iterator[Prefect]:
    """The API, through the balancer."""
    with servers[0].client() as client:
        yield Prefect(client)


@pytest.fixture(scope="module")
def site(
    servers: tuple[PrefectServer, PrefectServer],
    settings: dict[str, str],
    redis_server: Redis,
    database: Postgres,
    project: Project,
    prefect: Prefect,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """All of it, with two agents; the job has run."""
    home = tmp_path_factory.mktemp("services")
    services = Program(
        "Prefect's services",
        [prefect_command(), "server", "services", "start"],
        log=home / "services.log",
        cwd=home,
        env=environment(servers[0].env, settings, {"PREFECT_HOME": str(home), "PYTHONUNBUFFERED": "1"}),
    )
    env = {"PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": database.url()}
    with ExitStack() as stack:
        stack.enter_context(running(services))
        project.deploy()
        names = ("node-1", "node-2")
        agents = {name: stack.enter_context(project.agent(name, env=env)) for name in names}
        wait_until_planned(prefect)
        wait_for_tick(project, time.time())
        yield Site(servers, services, redis_server, agents)


def ticks(project: Project) -> list[Entry]:
    """Return what the ticks have entered, in the order of writing."""
    return project.entries("counter", "ran")


def wait_for_tick(project: Project, after: float) -> None:
    """Wait until a tick has run that was due after a moment."""
    wait_until(lambda: any(entry["due"] > after for entry in ticks(project)), PATIENCE, "a tick to run")


def last_planned(prefect: Prefect) -> float:
    """Return when the last tick is due that Prefect has planned, or the agent where Prefect has not."""
    runs = prefect.waiting("counter")
    return due(runs[-1]).timestamp() if runs else time.time()


def wait_until_planned(prefect: Prefect) -> None:
    """Wait until ticks are planned that only Prefect's services plan: the agent makes the next ones."""
    wait_until(
        lambda: last_planned(prefect) > time.time() + (PLANNED - 2) * EVERY,
        PATIENCE,
        "Prefect's services to plan",
    )


def kill(project: Project, part: Program) -> float:
    """Kill a part when a tick is about to begin, and return when."""
    next_one = ticks(project)[-1]["due"] + EVERY
    while next_one - BEGINS < time.time():
        next_one += EVERY
    wait_until(lambda: time.time() >= next_one - BEGINS, PATIENCE, "a tick to be about to begin")
    part.kill()
    return time.time()


def start_by_hand(project: Project, prefect: Prefect) -> None:
    """Start a run by hand, as soon as the API takes it, and wait until it has run."""
    before = len(project.entries("by-hand"))

    def is_taken() -> bool:
        try:
            prefect.start("by-hand")
        except PrefectHTTPStatusError:  # its server finds out that Redis has closed a connection
            return False
        return True

    wait_until(is_taken, PATIENCE, "the API to take a run")
    project.wait_for("by-hand", "ran", before + 1)


def assert_each_once_in_order(project: Project) -> None:
    """Check that all ticks from the first to the last have run, each once, one after the other."""
    entries = ticks(project)
    numbers = [round((entry["due"] - entries[0]["due"]) / EVERY, 3) for entry in entries]
    assert numbers == list(range(len(entries)))
    assert [entry["count"] for entry in entries] == list(range(1, len(entries) + 1))


@pytest.mark.parametrize("number", [0, 1])
def test_jobs_go_on_while_an_api_server_is_away(
    project: Project, prefect: Prefect, site: Site, number: int
) -> None:
    """The other one has all the work then, and tells of what is done by hand."""
    killed = kill(project, site.servers[number])
    wait_for_tick(project, killed)
    start_by_hand(project, prefect)
    site.servers[number].start()
    wait_for_tick(project, time.time())
    assert_each_once_in_order(project)


def test_jobs_go_on_while_the_services_are_away(project: Project, prefect: Prefect, site: Site) -> None:
    """The agent makes the ticks itself when those that were planned are used up, and hears both servers."""
    kill(project, site.services)
    planned = last_planned(prefect)
    for server in site.servers:  # the agent is connected to one of them
        with SyncPrefectClient(f"{server.ui_url}/api") as client:
            start_by_hand(project, Prefect(client))
    asked = time.time()
    wait_for_tick(project, planned)
    site.services.start()
    wait_until_planned(prefect)
    wait_for_tick(project, max(time.time(), asked + LATE_SECONDS + EVERY))
    assert not any("Events are missing" in agent.output() for agent in site.agents.values())
    assert_each_once_in_order(project)


def test_ticks_run_late_after_redis_was_away(project: Project, prefect: Prefect, site: Site) -> None:
    """Prefect's API answers nothing without it, and is asked until it does; the agent says so once."""
    agent, failed = site.agents[ticks(project)[-1]["node"]], "Looking for runs failed"
    before = agent.output().count(failed)
    killed = kill(project, site.redis)
    wait_until(lambda: time.time() > killed + AWAY, 2 * AWAY, "the time to pass")
    wait_until(lambda: agent.output().count(failed) > before, PATIENCE, "the agent to notice")
    assert agent.output().count(failed) == before + 1
    site.redis.start()
    wait_for_tick(project, time.time())
    # Prefect's services may plan nothing for five minutes more: the agent makes the ticks.
    wait_for_tick(project, last_planned(prefect))
    start_by_hand(project, prefect)
    wait_for_tick(project, time.time())
    assert_each_once_in_order(project)
