"""What an agent serves of its health, and for Prometheus: true when active, on standby, in each fault."""

from __future__ import annotations

import os
import signal
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.local import free_port, wait_until
from deployments.program import HOST
from taskadapter.agent.health import Condition
from tests.acceptance.project import PATIENCE, Project
from tests.api_proxy import refusal
from tests.processes import nurseries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deployments.local import Program
    from tests.api_proxy import ApiProxy

FLOWS = """
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig

    listener = Listener(
        trigger=TriggerConfiguration(interval=2),
        warm_backup_config=WarmBackupConfig(
            group_id="health", liveness_check_interval=3, heartbeat_frequency=0.5
        ),
    )

    @listener.service("healthy")
    def healthy() -> None:
        note("healthy", "began")
"""


class Served(NamedTuple):
    """A node, and what it serves."""

    program: Program
    health: int
    metrics: int

    def is_ready(self) -> bool:
        return self._get(self.health, "health") is not None

    def values(self) -> dict[tuple[str, str], float]:
        """Return its metrics by name, and by what else than the work pool they are of."""
        text = self._get(self.metrics, "metrics") or ""
        return {
            (sample.name, "".join(v for k, v in sample.labels.items() if k != "work_pool")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def unmet(self) -> set[str]:
        """Return the conditions that its metrics say are not met."""
        values = self.values()
        return {str(one) for one in Condition if values.get(("taskadapter_condition", one)) == 0}

    @staticmethod
    def _get(port: int, path: str) -> str | None:
        """Return what is answered; None for nothing, or for the answer that all is not well."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/{path}", timeout=PATIENCE) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as fault:
            if fault.code != 503:
                raise
        except OSError:
            pass  # it has not begun to serve
        return None


@pytest.fixture(scope="module")
def database(project: Project) -> Path:
    folder = project.folder / "coordination"
    folder.mkdir()
    return folder / "coordination.db"


@contextmanager
def serving(project: Project, name: str, database: Path, api: ApiProxy) -> Iterator[Served]:
    health = metrics = free_port()
    while metrics == health:
        metrics = free_port()
    env = {
        "PREFECT_API_URL": api.api_url,
        "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": f"sqlite:///{database}",
        "PREFECT_WORKER_WEBSERVER_PORT": str(health),
        "PREFECT_CLIENT_METRICS_ENABLED": "true",
        "PREFECT_CLIENT_METRICS_PORT": str(metrics),
    }
    with project.agent(name, "--with-healthcheck", env=env) as program:
        yield Served(program, health, metrics)


@pytest.fixture(scope="module")
def node(project: Project, database: Path, api: ApiProxy) -> Iterator[Served]:
    """An active node that reaches Prefect by way of the proxy."""
    project.write("flows/jobs.py", FLOWS)
    project.deploy()
    with serving(project, "health-1", database, api) as node:
        wait_until(node.is_ready, PATIENCE, "the node to be ready")
        project.wait_for("healthy", "began")
        yield node


@pytest.mark.undisturbed(0.5)  # its lease is lost where the machine stands still for three seconds
def test_it_is_ready_active_and_on_standby(
    project: Project, database: Path, api: ApiProxy, node: Served
) -> None:
    """Both nodes are, and the metrics say which is which."""
    with serving(project, "health-2", database, api) as other:
        active = ("taskadapter_group_active", "health")
        wait_until(lambda: active in other.values(), PATIENCE, "the standby to know the group")
        wait_until(other.is_ready, PATIENCE, "the standby to be ready")
        assert (node.values()[active], other.values()[active]) == (1, 0)
        assert not node.unmet() | other.unmet()
        values = node.values()
        assert values["taskadapter_group_term", "health"] >= 1
        assert 0 < values["taskadapter_lease_left_seconds", "health"] <= 3
        assert ("taskadapter_group_term", "health") not in other.values()
        assert other.is_ready()


def test_ticks_heartbeats_and_requests_are_counted(project: Project, node: Served) -> None:
    """As many ticks as bodies have begun, in time or, on a slow machine, late."""
    before, seen = len(project.entries("healthy", "began")), node.values()

    def ticks(values: dict[tuple[str, str], float]) -> float:
        return sum(values.get(("taskadapter_ticks_total", how), 0) for how in ("run", "late"))

    def are_counted() -> dict[tuple[str, str], float]:
        bodies, values = len(project.entries("healthy", "began")), node.values()
        is_each = bodies <= ticks(values) <= len(project.entries("healthy", "began"))
        is_same = values.get(("taskadapter_lateness_seconds_count", "")) == ticks(values)
        return values if is_each and is_same else {}

    project.wait_for("healthy", "began", before + 3)
    values = wait_until(are_counted, PATIENCE, "as many ticks as bodies")
    assert ticks(values) >= ticks(seen) + 3
    assert (
        values["taskadapter_heartbeat_seconds_count", ""] > seen["taskadapter_heartbeat_seconds_count", ""]
    )
    assert values["taskadapter_api_requests_total", ""] > seen["taskadapter_api_requests_total", ""]
    assert values["taskadapter_processes_limit", ""] == 5


def test_where_another_has_the_port(project: Project, node: Served) -> None:
    """It says so, and does its work without."""
    env = {"PREFECT_CLIENT_METRICS_ENABLED": "true", "PREFECT_CLIENT_METRICS_PORT": str(node.metrics)}
    with project.agent("health-4", env=env) as other:
        said = f"The metrics cannot be served on port {node.metrics}"
        wait_until(lambda: "'health-4' started!" in other.log.read_text(), PATIENCE, "it to start")
        assert said in other.log.read_text()
        assert other.process.poll() is None


def test_without_the_api(api: ApiProxy, node: Served) -> None:
    api.fault = lambda _: refusal(503)
    try:
        wait_until(lambda: node.unmet() == {"api"}, PATIENCE, "the API to be missed")
        assert not node.is_ready()
    finally:
        api.fault = None
    wait_until(node.is_ready, PATIENCE, "the node to be ready again")


def test_without_the_database(database: Path, node: Served) -> None:
    """A file of SQLite goes with its log, and comes back with it: with its folder."""
    away = database.parent.with_name("away")
    database.parent.rename(away)
    try:
        wait_until(lambda: "database" in node.unmet(), PATIENCE, "the database to be missed")
        assert not node.is_ready()
    finally:
        away.rename(database.parent)
    wait_until(node.is_ready, PATIENCE, "the node to be ready again")


def test_without_processes(project: Project, node: Served) -> None:
    broken = project.folder / "httpx.py"
    broken.write_text("raise RuntimeError('broken on purpose')")
    try:
        for nursery in nurseries(node.program.pid):
            os.kill(nursery.pid, signal.SIGKILL)
        wait_until(lambda: "processes" in node.unmet(), PATIENCE, "the nursery to be missed")
        assert not node.is_ready()
    finally:
        broken.unlink()
    wait_until(node.is_ready, PATIENCE, "the node to be ready again")


@pytest.mark.usefixtures("node")
def test_with_tables_of_another_release(project: Project, database: Path, api: ApiProxy) -> None:
    other = database.with_name("newer.db")
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE taskadapter_schema (step INTEGER PRIMARY KEY, done TEXT)")
        connection.execute("INSERT INTO taskadapter_schema VALUES (999, '2099-01-01 00:00:00')")
    with serving(project, "health-3", other, api) as node:
        wait_until(lambda: node.unmet() == {"schema", "registered"}, PATIENCE, "the tables to be refused")
        assert not node.is_ready()
