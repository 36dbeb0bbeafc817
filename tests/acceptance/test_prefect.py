"""What works in Prefect's flows works on warm hosts: hooks, tasks, subflows, logs, parameters, pull."""

from __future__ import annotations

import itertools
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.schedules import CronSchedule

from deployments.local import wait_until
from tests.acceptance.project import PATIENCE, Prefect, Project, is_alive, state_of
from tests.slowness import Slowness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOOKED = """
    from ledger import note
    from taskadapter import ErrorPolicy, Listener, TaskPolicy, TriggerConfiguration

    listener = Listener(
        trigger=TriggerConfiguration(interval=3600, start_time="2100-01-01T00:00Z"),
        task_policy=TaskPolicy(error_policy=ErrorPolicy.LOG_AND_CONTINUE),
    )

    def hook(job, what):
        return [lambda flow, run, state: note(job, what, run=run.id, state=state.name)]

    async def async_hook(flow, run, state):
        note("completes", "async hook", run=run.id, state=state.name)

    @listener.service(
        "completes",
        on_completion=[*hook("completes", "hook"), async_hook],
        on_failure=hook("completes", "wrong hook"),
    )
    def completes() -> None:
        print("a line that", "the job prints")

    @listener.service(
        "fails", on_failure=hook("fails", "hook"), on_completion=hook("fails", "wrong hook")
    )
    def fails() -> None:
        raise ValueError("as always")
"""

TASKS = """
    import asyncio
    from ledger import note
    from prefect import flow, task
    from prefect.task_runners import ThreadPoolTaskRunner
    from taskadapter import ErrorPolicy, Listener, TaskError, TaskPolicy, TriggerConfiguration, current_run

    listener = Listener(
        trigger=TriggerConfiguration(interval=3600, start_time="2100-01-01T00:00Z"),
        task_policy=TaskPolicy(error_policy=ErrorPolicy.LOG_AND_CONTINUE),
    )

    @task
    def double(number: int) -> int:
        note("tasks", "doubled", number=number, count=current_run().count)
        return 2 * number

    @task
    async def add(numbers: list[int]) -> int:
        await asyncio.sleep(0)
        return sum(numbers)

    @task
    def fail() -> None:
        raise ValueError("as always")

    @flow
    def below(number: int) -> int:
        note("tasks", "below", job_id=str(current_run().job_id), number=number)
        return double(number)

    @listener.service("tasks", task_runner=ThreadPoolTaskRunner(max_workers=3))
    def tasks() -> None:
        doubled = double.map([1, 2, 3]).result()
        note("tasks", "mapped", result=doubled, job_id=str(current_run().job_id))
        note("tasks", "added", result=asyncio.run(add(doubled)))
        note("tasks", "subflow", result=below(10))

    @listener.service("async-tasks")
    async def async_tasks() -> None:
        one, two = await asyncio.gather(add([1, 2]), add([3, 4]))
        failed = fail(return_state=True)
        note("async-tasks", "added", result=one + two, failed=failed.name, node=current_run().task_id)

    @listener.service("tick")
    def tick() -> None:
        note("tick", "ran", job_id=str(current_run().job_id), due=current_run().scheduled_time.isoformat(),
             attempt=current_run().attempt, node=current_run().task_id)
"""

CHANGING = """
    from helper import VERSION
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration

    listener = Listener(trigger=TriggerConfiguration(interval=3600, start_time="2100-01-01T00:00Z"))

    @listener.service("changing")
    def changing() -> None:
        note("changing", "ran", flow={version}, helper=VERSION)
"""

PLAIN = """
    import os
    import pathlib
    from ledger import note
    from prefect import flow

    @flow
    def plain(word: str = "none", number: int = 0) -> None:
        note("plain", "ran", word=word, number=number, folder=str(pathlib.Path.cwd()),
             first=os.environ.get("FIRST"), second=os.environ.get("SECOND"))
"""

BEAT = """
    import time
    from pathlib import Path
    from ledger import note
    from taskadapter import Listener, TaskPolicy, TriggerConfiguration, current_run

    one_by_one = TaskPolicy(max_concurrent=1)

    @Listener(trigger=TriggerConfiguration(interval=2), task_policy=one_by_one).service("beat")
    def beat() -> None:
        note("beat", "ran", due=current_run().scheduled_time.timestamp())

    @Listener(trigger=TriggerConfiguration(interval=3600, start_time="2100-01-01T00:00Z")).service("holds")
    def holds(until: str = "") -> None:
        note("holds", "ran")
        while not Path(until).exists():
            time.sleep(0.05)
"""

NODE = "node-1"

HEARD = 5.0
"""Seconds until a change of the pool holds: until it is heard, and what is claimed has begun.

Longer by as much as the machine wakes a watch up late.
"""


@pytest.fixture(scope="module", autouse=True)
def node(project: Project, prefect: Prefect) -> Iterator[int]:
    """An agent and the jobs of this module, which tests start by hand; yields the agent's process id."""
    project.write("flows/hooked.py", HOOKED)
    project.write("flows/tasks.py", TASKS)
    project.write("helper.py", "VERSION = 1")
    project.write("flows/changing.py", CHANGING.format(version=1))
    project.write("plain.py", PLAIN)
    with project.agent(NODE) as agent:
        project.deploy()
        yield agent.pid


@pytest.fixture
def beat(project: Project, prefect: Prefect) -> Iterator[str]:
    """A job that runs every other second, for one test."""
    project.write("flows/beat.py", BEAT)
    project.deploy()
    project.wait_for("beat", "ran", len(project.entries("beat")) + 2)
    yield "beat"
    prefect.client.delete_deployment(prefect.deployment("beat").id)


def deploy_plain(project: Project, prefect: Prefect, name: str, **options: Any) -> str:
    """Deploy the flow that is not of ours, as any user of Prefect may; returns the deployment's name."""
    flow = prefect.client.create_flow_from_name("plain")
    options = {"entrypoint": "plain.py:plain", "work_pool_name": project.pool} | options
    prefect.client.create_deployment(flow, name, **options)
    return f"plain/{name}"


def test_the_hooks_of_a_completed_run_are_called(project: Project, prefect: Prefect) -> None:
    """Hooks for completion, sync and async, run once; others do not."""
    run = prefect.wait_for_end(prefect.start("completes"))
    project.wait_for("completes", "async hook")

    ours = [entry for entry in project.entries("completes") if entry["run"] == str(run.id)]
    assert [(e.what, e["state"]) for e in ours] == [("hook", "Completed"), ("async hook", "Completed")]


def test_the_hooks_of_a_failed_run_are_called(project: Project, prefect: Prefect) -> None:
    """Hooks for failure run once; others do not."""
    run = prefect.wait_for_end(prefect.start("fails"))
    project.wait_for("fails", "hook")

    ours = [entry for entry in project.entries("fails") if entry["run"] == str(run.id)]
    assert [(entry.what, entry["state"]) for entry in ours] == [("hook", "Failed")]


def test_what_a_job_prints_is_in_its_log(prefect: Prefect) -> None:
    """The UI shows what `print` writes."""
    run = prefect.wait_for_end(prefect.start("completes"))

    prefect.wait_for_logs(run, "a line that the job prints")


def test_tasks_and_subflows_run_inside_a_job(project: Project, prefect: Prefect) -> None:
    """Their runs are in the API with their states, also those of a thread pool, and know their job."""
    run = prefect.wait_for_end(prefect.start("tasks"))
    job = str(prefect.deployment("tasks").id)

    assert state_of(run).name == "Completed"
    (mapped,) = project.entries("tasks", "mapped")
    (added,) = project.entries("tasks", "added")
    (below,) = project.entries("tasks", "subflow")
    assert (mapped["result"], added["result"], below["result"]) == ([2, 4, 6], 12, 20)
    assert [entry["number"] for entry in project.entries("tasks", "below")] == [10]
    doubled = project.entries("tasks", "doubled")
    assert sorted(entry["number"] for entry in doubled) == [1, 2, 3, 10]
    assert {entry.pid for entry in doubled} == {mapped.pid}
    states = prefect.wait_for_tasks(run, 5)
    assert sorted(states) == ["add Completed"] + ["below Completed"] + ["double Completed"] * 3
    assert {mapped["job_id"], project.entries("tasks", "below")[0]["job_id"]} == {job}


def test_an_async_job_runs_tasks_together(project: Project, prefect: Prefect) -> None:
    """Async tasks are gathered; a task that fails shows as Failed and does not end the job."""
    run = prefect.wait_for_end(prefect.start("async-tasks"))

    assert state_of(run).name == "Completed"
    (entry,) = project.entries("async-tasks", "added")
    assert (entry["result"], entry["failed"], entry["node"]) == (10, "Failed", NODE)
    states = prefect.wait_for_tasks(run, 3)
    assert sorted(states) == ["add Completed", "add Completed", "fail Failed"]


def test_a_job_knows_its_run(project: Project, prefect: Prefect) -> None:
    """`current_run` names the job, the tick's time, the attempt and the node."""
    run = prefect.wait_for_end(prefect.start("tick"))

    entry = project.wait_for("tick", "ran")[-1]
    assert entry["job_id"] == str(prefect.deployment("tick").id)
    assert datetime.fromisoformat(entry["due"]) == run.expected_start_time
    assert (entry["attempt"], entry["node"]) == (1, NODE)


def test_changed_code_is_picked_up_without_a_restart(project: Project, prefect: Prefect, node: int) -> None:
    """The next run has the new flow module and the new helper module; the agent is the same."""

    def versions() -> tuple[int, int]:
        before = len(project.entries("changing", "ran"))
        ended = prefect.wait_for_end(prefect.start("changing"))
        assert state_of(ended).name == "Completed"
        entry = project.wait_for("changing", "ran", before + 1)[-1]
        return entry["flow"], entry["helper"]

    seen = [versions()]
    project.write("helper.py", "VERSION = 2")
    seen.append(versions())
    project.write("flows/changing.py", CHANGING.format(version=2))
    seen.append(versions())

    assert seen == [(1, 1), (1, 2), (2, 2)]
    assert is_alive(node)


def test_a_plain_flow_gets_its_parameters(project: Project, prefect: Prefect) -> None:
    """A deployment that is not of ours runs as Prefect runs it; `prefect deployment run` starts it."""
    cron = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 0 1 1 *"), active=True)
    parameters = {"word": "from the deployment", "number": 1}
    name = deploy_plain(project, prefect, "with-cron", schedules=[cron], parameters=parameters)
    run = prefect.wait_for_end(prefect.start(name, parameters={"number": 2}))

    assert state_of(run).name == "Completed"
    entry = project.entries("plain", "ran")[-1]
    assert (entry["word"], entry["number"]) == ("from the deployment", 2)
    assert entry["folder"] == str(project.folder)
    assert prefect.is_active(name)


def test_the_command_line_starts_a_run(project: Project, prefect: Prefect) -> None:
    """`prefect deployment run --watch` ends when the run has, with its success."""
    schema = {"type": "object", "properties": {"word": {"type": "string", "title": "word"}}}
    name = deploy_plain(project, prefect, "from-the-shell", parameter_openapi_schema=schema)
    project.prefect("deployment", "run", name, "--param", "word=shell", "--watch")

    assert project.entries("plain", "ran")[-1]["word"] == "shell"


def test_pull_steps_are_honoured(project: Project, prefect: Prefect) -> None:
    """A deployment whose pull step goes to another folder runs the code of that folder, in it."""
    project.write("elsewhere/other.py", PLAIN.replace('"plain"', '"elsewhere"'))
    project.write("elsewhere/ledger.py", (project.folder / "ledger.py").read_text())
    elsewhere = str(project.folder / "elsewhere")
    step = {"prefect.deployments.steps.set_working_directory": {"directory": elsewhere}}
    name = deploy_plain(project, prefect, "pulled", entrypoint="other.py:plain", pull_steps=[step])
    run = prefect.wait_for_end(prefect.start(name, parameters={"word": "pulled"}))

    assert state_of(run).name == "Completed", state_of(run).message
    (entry,) = project.entries("elsewhere", "ran")
    assert (entry["word"], entry["folder"]) == ("pulled", elsewhere)


def test_the_folder_of_a_pull_step_that_is_missing_is_named(project: Project, prefect: Prefect) -> None:
    """`prefect deploy` adds such a step, with the folder of its own machine; the run's message says it."""
    step = {"prefect.deployments.steps.set_working_directory": {"directory": "/no/such/folder"}}
    name = deploy_plain(project, prefect, "of-another-machine", pull_steps=[step])
    run = prefect.wait_for_end(prefect.start(name))

    assert state_of(run).name == "Crashed"
    assert "pull step set_working_directory wants folder /no/such/folder" in str(state_of(run).message)
    (said,) = (
        line for line in prefect.wait_for_logs(run, "/no/such/folder") if "could not be loaded" in line
    )
    assert "Traceback" not in said


def test_environments_do_not_leak(project: Project, prefect: Prefect) -> None:
    """The variables of a deployment reach its runs, and not those of another."""
    seen = []
    names = [
        deploy_plain(project, prefect, name.lower(), job_variables={"env": {name: "set"}})
        for name in ("FIRST", "SECOND")
    ]
    for name in [*names, *names, deploy_plain(project, prefect, "neither")]:
        assert state_of(prefect.wait_for_end(prefect.start(name))).name == "Completed"
        entry = project.entries("plain", "ran")[-1]
        seen.append((entry["first"], entry["second"]))

    assert seen == [("set", None), (None, "set")] * 2 + [(None, None)]


def test_another_worker_cannot_run_a_job(project: Project, prefect: Prefect) -> None:
    """Started by Prefect's process worker, a job refuses, and names the command that runs it."""
    pool = f"{project.pool}-process"
    prefect.client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    flow = prefect.client.create_flow_from_name("completes")
    entrypoint = "flows/hooked.py:completes"
    prefect.client.create_deployment(
        flow, "strayed", entrypoint=entrypoint, work_pool_name=pool, path=str(project.folder)
    )
    run = prefect.start("completes/strayed")
    project.prefect("worker", "start", "--pool", pool, "--type", "process", "--run-once")
    ended = prefect.wait_for_end(run)

    assert state_of(ended).name == "Failed"
    assert "prefect worker start" in str(state_of(ended).message)
    assert "warm-backup" in str(state_of(ended).message)


def test_a_direct_call_is_not_gated(project: Project) -> None:
    """In a shell or a test a job is an ordinary flow."""
    call = "from flows.tasks import tick; print(tick())"
    project.run(sys.executable, "-c", call)

    assert project.entries("tick", "ran")[-1]["node"] is None


@pytest.mark.parametrize("by", ["a pause", pytest.param("a limit", marks=pytest.mark.slow)])
def test_a_pool_that_lets_nothing_through_holds_its_jobs(
    project: Project, prefect: Prefect, beat: str, tmp_path: Path, by: str, slowness: Slowness
) -> None:
    """Nothing begins, although the agent makes ticks itself; afterwards all that was due runs, in order."""
    gate = tmp_path / "enough"
    if by == "a limit":
        prefect.start("holds", parameters={"until": str(gate)})
        project.wait_for("holds", "ran")
    shut, wide = (
        (WorkPoolUpdate(is_paused=True), WorkPoolUpdate(is_paused=False))
        if by == "a pause"
        else (WorkPoolUpdate(concurrency_limit=1), WorkPoolUpdate(concurrency_limit=None))
    )
    prefect.client.update_work_pool(project.pool, shut)
    closed = time.time()

    def heard() -> float:
        return closed + HEARD + slowness.since(closed)

    try:
        wait_until(lambda: time.time() > heard() + 5, PATIENCE, "some ticks to be due")
        # What was due before may be on its way to its body.
        let_through = [entry for entry in project.entries(beat) if entry["due"] > heard()]
        opened = time.time()
    finally:
        gate.touch()
        prefect.client.update_work_pool(project.pool, wide)
    assert let_through == []

    def caught_up() -> bool:
        return any(entry["due"] > opened for entry in project.entries(beat))

    wait_until(caught_up, PATIENCE, "the job to catch up")
    due = [round(entry["due"], 3) for entry in project.entries(beat)]
    since = [moment for moment in due if moment > closed - 2]
    assert sorted(since) == since
    assert {round(later - earlier, 3) for earlier, later in itertools.pairwise(since)} == {2.0}
