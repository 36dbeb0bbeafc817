"""A node that stops keeps no group of which nothing goes on."""

from __future__ import annotations

import os
import signal

import pytest

from deployments.local import wait_until
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Project

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
    dues = [entry["due"] for entry in project.entries("idle", "ran")]
    assert dues == [dues[0] + 2 * number for number in range(len(dues))]
