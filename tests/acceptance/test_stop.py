"""A node that stops keeps no group of which nothing goes on."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from deployments.local import postgres, wait_until
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Project

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import Postgres

STOPS_WITHIN = 90.0
"""Seconds to drain (5), to end what does not end by itself (5), and for questions, 16 each."""

FLOWS = """
    import time
    from pathlib import Path
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig, current_run

    def listener(group, interval):
        config = WarmBackupConfig(group_id=group, liveness_check_interval=3, heartbeat_frequency=0.5)
        return Listener(trigger=TriggerConfiguration(interval=interval), warm_backup_config=config)

    def enter(job, what):
        run = current_run()
        note(job, what, due=run.scheduled_time.timestamp(), node=run.task_id)

    busy, idle = listener("busy", 3600), listener("idle", 2)

    @busy.service("busy")
    def long() -> None:
        enter("busy", "began")
        while Path("held").exists():
            time.sleep(0.05)
        enter("busy", "ended")

    @idle.service("idle")
    def brief() -> None:
        enter("idle", "ran")
"""


def holders(project: Project) -> dict[str, str | None]:
    return {group["group_id"]: group["holder"] for group in project.groups()}


@pytest.mark.usefixtures("prefect")
def test_a_group_is_another_nodes_as_soon_as_none_of_its_runs_goes_on(project: Project) -> None:
    """Long before the stopping node's longest run has ended; no tick is lost, and none runs twice."""
    ensure_work_pool(project.pool, Domain(liveness_check_interval=3, heartbeat_frequency=0.5))
    project.write("flows/stop.py", FLOWS)
    (project.folder / "held").touch()
    project.deploy()
    setting = {"PREFECT_INTEGRATIONS_TASKADAPTER_DRAIN_SECONDS": str(PATIENCE)}
    with project.agent("node-1", env=setting) as stopping:
        project.wait_for("busy", "began")
        project.wait_for("idle", "ran", 2)
        with project.agent("node-2"):
            standing_by = ["node-2"]
            wait_until(
                lambda: all(group["standing_by"] == standing_by for group in project.groups()),
                PATIENCE,
                "a standby",
            )
            os.kill(stopping.pid, signal.SIGTERM)
            entries = project.entries("idle", "ran")
            wait_until(
                lambda: project.entries("idle", "ran")[-1]["node"] == "node-2", PATIENCE, "a tick elsewhere"
            )
            assert {entry["node"] for entry in entries} == {"node-1"}
            assert project.entries("busy", "ended") == [], "it goes on"
            assert holders(project) == {"busy": "node-1", "idle": "node-2"}

            (project.folder / "held").unlink()
            (ended,) = project.wait_for("busy", "ended")
            assert ended["node"] == "node-1"
            both = {"busy": "node-2", "idle": "node-2"}
            wait_until(lambda: holders(project) == both, PATIENCE, "both groups to be left")
    dues = sorted(entry["due"] for entry in project.entries("idle", "ran"))
    assert dues == [dues[0] + 2 * number for number in range(len(dues))]


STILL = """
    import time
    from pathlib import Path
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig

    config = WarmBackupConfig(group_id="still", liveness_check_interval=3, heartbeat_frequency=0.5)

    @Listener(trigger=TriggerConfiguration(interval=2), warm_backup_config=config).service("brief")
    def brief() -> None:
        note("brief", "ran")

    @Listener(trigger=TriggerConfiguration(interval=3600)).service("alone")
    def long() -> None:
        note("alone", "began")
        while Path("held").exists():
            time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def still(project: Project) -> Iterator[Postgres]:
    """A database of its own, which is stopped while a node executes jobs with a group and without."""
    project.write("flows/still.py", STILL)
    (project.folder / "held").touch()
    with postgres() as database:
        yield database


@pytest.mark.slow
@pytest.mark.usefixtures("prefect")
def test_a_node_ends_whose_database_stands_still(project: Project, still: Postgres) -> None:
    """On SIGTERM, though a body goes on and no question is answered; a command says so, and ends."""
    env = {
        "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": still.url(),
        "PREFECT_INTEGRATIONS_TASKADAPTER_DRAIN_SECONDS": "5",
        "PREFECT_INTEGRATIONS_TASKADAPTER_WORK_POOL": (pool := f"{project.pool}-still"),
    }
    ensure_work_pool(pool, Domain(liveness_check_interval=3, heartbeat_frequency=0.5))
    project.deploy("still", env=env)
    with project.agent("node-1", env=env, pool=pool) as agent:
        project.wait_for("alone", "began")
        project.wait_for("brief", "ran", 2)
        still.pause()
        try:
            wait_until(lambda: "has not answered" in agent.output(), PATIENCE, "the node to see")
            os.kill(agent.pid, signal.SIGTERM)
            assert agent.process is not None
            assert agent.process.wait(STOPS_WITHIN) == 0
            with pytest.raises(AssertionError, match="check that it runs and can be reached"):
                project.taskadapter("status", "--pool", pool, env=env)
        finally:
            still.resume()
