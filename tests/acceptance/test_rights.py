"""Nodes that do not use the database as the others do: they lack a right that runs need, or its name."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from deployments.local import wait_until
from taskadapter.coordination import schema
from taskadapter.coordination.engines import open_engine
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Prefect, Project, without_a_gap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import Postgres, Program
    from tests.acceptance.project import Entry

pytestmark = pytest.mark.slow

DATABASE = "rights"
LEASE = 3.0

INTERVAL = 2
"""Seconds between two ticks: a slow machine, too, can do so many, and catch up."""
NODES = {"node-1": "rights_one", "node-2": "rights_two", "node-3": "rights_three"}
"""Nodes, and as whom they use the database."""

FLOWS = """
    import time
    from pathlib import Path
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig, current_run

    listener = Listener(
        trigger=TriggerConfiguration(interval={interval}),
        warm_backup_config=WarmBackupConfig(
            group_id="rights", liveness_check_interval=3, heartbeat_frequency=0.5
        ),
    )

    @listener.service("rights")
    def job() -> None:
        run = current_run()
        note("rights", "began", due=run.scheduled_time.timestamp(), node=run.task_id)
        while Path("held").exists():
            time.sleep(0.05)
        note("rights", "ended", due=run.scheduled_time.timestamp(), node=run.task_id)
"""


class Cluster:
    """Nodes on one database, each with a user of its own."""

    def __init__(self, project: Project, server: Postgres) -> None:
        self.project = project
        self.server = server

    def execute(self, *statements: str) -> None:
        """Do something in the database that nodes may not."""
        with self.server.connect(DATABASE) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def revoke(self, right: str, node: str) -> None:
        """Take a right on the ledger from a node."""
        self.execute(f"REVOKE {right} ON taskadapter_ledger FROM {NODES[node]}")

    def grant(self, right: str, node: str) -> None:
        """Give it back."""
        self.execute(f"GRANT {right} ON taskadapter_ledger TO {NODES[node]}")

    def url(self, node: str) -> str:
        """Return the database as a node reaches it."""
        return self.server.url(DATABASE).replace("postgres:", f"{NODES[node]}:", 1)

    def env(self, node: str) -> dict[str, str]:
        """Return the environment of a node; it gives runs little time to end before it hands over."""
        prefix = "PREFECT_INTEGRATIONS_TASKADAPTER_"
        return {f"{prefix}DATABASE_URL": self.url(node), f"{prefix}DRAIN_SECONDS": "3"}

    def taskadapter(self, *args: str) -> str:
        """Run our command."""
        return self.project.taskadapter(*args, env=self.env("node-1"))

    def holder(self) -> tuple[str | None, int]:
        """Return who has the group, and in which term."""
        (group,) = self.project.groups(self.env("node-1"))
        return group["holder"], group["term"]

    def wait_for_holder(self, node: str) -> int:
        """Wait until a node has the group, and return its term."""
        return wait_until(
            lambda: self.holder()[1] if self.holder()[0] == node else 0, PATIENCE, f"{node} to hold"
        )

    def begun(self, more: int) -> list[Entry]:
        """Return all ticks that have begun, once there are so many more."""
        return self.project.wait_for("rights", "began", len(self.project.entries("rights", "began")) + more)


@pytest.fixture(scope="module")
def cluster(project: Project, prefect: Prefect, postgres_server: Postgres) -> Cluster:
    """The database with its tables and users, and the job."""
    postgres_server.create_database(DATABASE)
    cluster = Cluster(project, postgres_server)
    engine = open_engine(postgres_server.url(DATABASE))
    with engine.connect() as connection:
        schema.create_missing(connection)
    engine.dispose()
    for role in NODES.values():
        cluster.execute(
            f"CREATE ROLE {role} LOGIN PASSWORD '{postgres_server.password}'",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
        )
    ensure_work_pool(project.pool, Domain(liveness_check_interval=LEASE, heartbeat_frequency=0.5))
    project.write("flows/rights.py", FLOWS.format(interval=INTERVAL))
    project.deploy(env=cluster.env("node-1"))
    return cluster


@pytest.fixture(scope="module")
def first(cluster: Cluster) -> Iterator[Program]:
    """The node that is active at first."""
    with cluster.project.agent("node-1", env=cluster.env("node-1")) as node:
        cluster.begun(2)
        yield node


@pytest.fixture(scope="module")
def second(cluster: Cluster, first: Program) -> Iterator[Program]:
    """The other one."""
    with cluster.project.agent("node-2", env=cluster.env("node-2")) as node:
        wait_until(lambda: "takes part through" in node.output(), PATIENCE, "node-2")
        yield node


def assert_each_once(cluster: Cluster) -> None:
    """Check that from the first tick to the last that has begun each has, and once: they may overlap."""

    def dues() -> list[float]:
        return sorted(entry["due"] for entry in cluster.project.entries("rights", "began"))

    every = without_a_gap(dues(), INTERVAL)
    wait_until(lambda: every <= set(dues()), PATIENCE, "every tick to begin")
    begun = dues()
    assert len(begun) == len(set(begun))


def test_a_node_that_may_not_enter_a_beginning(cluster: Cluster, first: Program, second: Program) -> None:
    """A standby has the group after a lease, and runs every tick that waited, once."""
    since = time.monotonic()
    cluster.revoke("INSERT", "node-1")
    cluster.wait_for_holder("node-2")
    assert time.monotonic() - since > LEASE
    assert cluster.begun(3)[-1]["node"] == "node-2"
    assert_each_once(cluster)
    said = "cannot go on here, and group rights goes to a standby (node-2): "
    assert "permission denied for table taskadapter_ledger" in first.output().partition(said)[2]
    cluster.grant("INSERT", "node-1")


def test_nodes_that_may_not_all_wait(cluster: Cluster, first: Program, second: Program) -> None:
    """The group is not sent around, and no tick is lost."""
    term = cluster.wait_for_holder("node-2")
    for node in NODES:
        cluster.revoke("INSERT", node)
    revoked = time.time()
    wait_until(lambda: "Waiting for the coordination" in second.output(), PATIENCE, "node-2 to wait")
    end = time.monotonic() + 3 * LEASE
    wait_until(lambda: time.monotonic() > end, PATIENCE, "three leases")
    begun = cluster.project.entries("rights", "began")
    assert [entry for entry in begun if entry["due"] > revoked] == []
    assert cluster.holder() == ("node-2", term)
    for node in NODES:
        cluster.grant("INSERT", node)
    cluster.begun(6)
    assert cluster.holder() == ("node-2", term)
    assert_each_once(cluster)


def test_a_node_that_may_not_enter_an_end(cluster: Cluster, first: Program, second: Program) -> None:
    """It can wait in vain with a body that is over; then others run the ticks that follow."""
    cluster.wait_for_holder("node-2")
    held = cluster.project.folder / "held"
    held.touch()
    tick = cluster.begun(1)[-1]["due"]
    with cluster.project.agent("node-3", env=cluster.env("node-3")) as third:
        wait_until(lambda: "takes part through" in third.output(), PATIENCE, "node-3")
        cluster.revoke("UPDATE", "node-2")
        held.unlink()
        wait_until(lambda: cluster.holder()[0] not in {"node-2", None}, PATIENCE, "another to hold")
        assert {entry["node"] for entry in cluster.begun(3)[-3:]} <= {"node-1", "node-3"}
    assert_each_once(cluster)
    lines = json.loads(cluster.taskadapter("ledger", "rights", "--last", "100", "--json"))
    (line,) = [line for line in lines if datetime.fromisoformat(line["due"]).timestamp() == tick]
    assert line["outcome"] == "Crashed"


def test_a_node_that_is_told_no_database(cluster: Cluster, first: Program) -> None:
    """It would be active in one of its own, beside the others: it ends, and says what it lacks."""
    with cluster.project.agent("node-4") as forgetful:
        assert forgetful.process is not None
        assert forgetful.process.wait(PATIENCE) == 1
        said = forgetful.output()
    assert "worker node-1" in said
    assert "Name one database for all nodes, with PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL" in said
    assert "active for" not in said
    assert "Traceback" not in said
    assert_each_once(cluster)
