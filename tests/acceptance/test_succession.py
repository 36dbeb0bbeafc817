"""A node that cannot load a job's code leaves its group to one that can."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from prefect.client.schemas.objects import StateType

from deployments.local import wait_until
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Prefect, Project, due, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Program
    from tests.acceptance.project import Entry

BROKEN, WHOLE = "node-1", "node-2"

INTERVAL = 2

FLOWS = """
    import os
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig, current_run

    {before}
    listener = Listener(
        trigger=TriggerConfiguration(interval={interval}),
        warm_backup_config=WarmBackupConfig(
            group_id="inherited", liveness_check_interval=3, heartbeat_frequency=0.5
        ),
    )

    @listener.service("{name}")
    def job() -> None:
        run = current_run()
        note("{name}", "ran", due=run.scheduled_time.timestamp(), node=run.task_id, term=run.fencing_token)
"""

ONE_NODE = f'if os.environ.get("NODE") == "{BROKEN}":\n        import no_such_module'
EVERY_NODE = 'if "NODE" in os.environ:\n        import no_such_module'


def flows(name: str, before: str) -> str:
    """Return a module with one job, and with lines that come before it."""
    return FLOWS.format(name=name, before=before, interval=INTERVAL)


@pytest.fixture(scope="module")
def broken(project: Project) -> Iterator[Program]:
    """The node whose installation lacks a module; it is active, for it was the first."""
    ensure_work_pool(project.pool, Domain(liveness_check_interval=3, heartbeat_frequency=0.5))
    with project.agent(BROKEN, env={"NODE": BROKEN}) as node:
        project.write("flows/inherited.py", flows("inherited", ONE_NODE))
        project.deploy()
        yield node


@pytest.fixture(scope="module")
def whole(broken: Program, project: Project) -> Iterator[Program]:
    """Another one, which has it."""
    with project.agent(WHOLE, env={"NODE": WHOLE}) as node:
        yield node


def holder(project: Project) -> tuple[str | None, int]:
    """Return who has the group, and in which term."""
    (group,) = project.groups()
    return group["holder"], group["term"]


def outcomes(project: Project, job: str, until: float) -> list[str]:
    """Return what the ledger has of a job's ticks that were due until then."""
    lines = json.loads(project.taskadapter("ledger", job, "--last", "100", "--json"))
    dues = [datetime.fromisoformat(line["due"]).timestamp() for line in lines]
    return [line["outcome"] for line, due in zip(lines, dues, strict=True) if due <= until]


def test_alone_it_says_why_its_runs_crash(project: Project, prefect: Prefect, broken: Program) -> None:
    """There is nobody who could run them."""
    first = prefect.wait_for_runs("inherited", "Crashed", count=2)[0]
    assert "No module named 'no_such_module'" in (state_of(first).message or "")
    # Where the machine stands still for a lease it takes it anew.
    assert wait_until(lambda: holder(project)[0], PATIENCE, "the group to be held") == BROKEN


def test_a_standby_gets_the_group_and_every_tick(
    project: Project, prefect: Prefect, broken: Program, whole: Program
) -> None:
    """From the first tick that it runs, none is lost, none crashes, and none runs twice."""

    def run_without_a_gap() -> list[Entry]:
        # They may overlap, so that one enters it before another that began before it.
        found = project.entries("inherited", "ran")
        moments = sorted(entry["due"] for entry in found)
        is_whole = moments == [moments[0] + INTERVAL * number for number in range(len(moments))]
        return found if len(found) >= 5 and is_whole else []

    entries = wait_until(run_without_a_gap, PATIENCE, "each tick to run, once")
    assert {entry["node"] for entry in entries} == {WHOLE}
    dues = [entry["due"] for entry in entries]
    crashed = [due(run).timestamp() for run in prefect.runs("inherited", "Crashed")]
    assert max(crashed) == pytest.approx(min(dues) - INTERVAL)
    told = outcomes(project, "inherited", max(dues))
    assert {"missing", "waiting"}.isdisjoint(told)
    assert told.count("Crashed") == len(crashed)
    assert "cannot go on here, and group inherited goes to a standby (node-2): " in broken.output()


@pytest.mark.undisturbed(0.5)  # its lease is lost where the machine stands still for three seconds
def test_a_job_that_no_node_can_load_crashes_and_keeps_nobody_busy(
    project: Project, prefect: Prefect, whole: Program
) -> None:
    """Each node has tried once, the group stays where it is then, and its other job goes on."""
    project.write("flows/hopeless.py", flows("hopeless", EVERY_NODE))
    project.deploy("hopeless")
    prefect.wait_for_runs("hopeless", "Crashed", count=4)
    _, term = wait_until(lambda: holder(project), PATIENCE, "the group to be held")
    prefect.wait_for_runs("hopeless", "Crashed", count=len(prefect.runs("hopeless", "Crashed")) + 3)
    assert holder(project)[1] == term
    assert prefect.runs("hopeless", "Completed") == []
    since = len(project.entries("inherited"))
    project.wait_for("inherited", "ran", since + 2)
    waiting = [run for run in prefect.runs("hopeless") if run.state_type is StateType.PENDING]
    assert len(waiting) <= 1


def test_ticks_wait_for_code_that_no_node_has(project: Project, prefect: Prefect, whole: Program) -> None:
    """A project's folder may be another one for a while, or be halfway through an update; none is lost."""
    project.write("flows/absent.py", flows("absent", ""))
    project.deploy("absent")
    project.wait_for("absent", "ran", 2)
    file = project.folder / "flows/absent.py"
    gone = file.rename(file.with_suffix(".gone"))

    def of_the_past() -> list[FlowRun]:
        found = [run for run in prefect.waiting("absent") if due(run) < datetime.now(UTC)]
        return found if len(found) >= 3 else []

    late = wait_until(of_the_past, PATIENCE, "three ticks to wait")
    by_hand = prefect.wait_for_end(prefect.start("absent"))
    gone.rename(file)

    def all_have_run() -> list[float]:
        dues = {entry["due"] for entry in project.entries("absent", "ran")}
        return sorted(dues) if {due(run).timestamp() for run in late} < dues else []

    dues = wait_until(all_have_run, PATIENCE, "the ticks that waited")
    assert state_of(by_hand).name == "Crashed"
    assert "lacks flows/absent.py" in (state_of(by_hand).message or "")
    assert [run.id for run in prefect.runs("absent", "Crashed")] == [by_hand.id]
    assert dues == [dues[0] + INTERVAL * number for number in range(len(dues))]
