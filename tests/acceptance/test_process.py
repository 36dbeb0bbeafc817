"""The agent as a process: it drains, hands back, leaves nothing behind, and is not needed to clean up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psutil
import pytest
from prefect.client.schemas.objects import StateType
from prefect.states import Scheduled

from deployments.local import wait_until
from taskadapter.pools import ensure_work_pool
from tests.acceptance.project import PATIENCE, Prefect, Project, due, is_alive, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Program


PLAIN = """
    import os
    import time
    from pathlib import Path
    from ledger import note
    from prefect import flow
    from prefect.runtime import flow_run

    @flow
    def quick() -> None:
        note("quick", "ran", run=flow_run.id)

    @flow
    def slow(until: str) -> None:
        note("slow", "began", run=flow_run.id, parent=os.getppid())
        while not Path(until).exists():
            time.sleep(0.1)
        note("slow", "finished", run=flow_run.id)
"""

LONG_LOADING = """
    import time
    from pathlib import Path
    from ledger import note
    from prefect import flow
    from prefect.runtime import flow_run

    for _ in range(3000):
        if not Path("loads-at-once").exists():
            time.sleep(0.1)

    @flow
    def long_loading() -> None:
        note("long-loading", "ran", run=flow_run.id)
"""

SCRIPT = """
    import sys
    import time
    from pathlib import Path
    from ledger import note
    from taskadapter import Listener, Service, TriggerConfiguration

    listener = Listener(trigger=TriggerConfiguration(interval=2))

    @listener.service("scripted")
    class Scripted(Service):
        runs: int = 0

        def execute(self) -> None:
            note("scripted", "began", runs=self.runs)
            self.runs += 1
            if self.runs > 1:
                Path("second").touch()
                time.sleep(600 if Path("long").exists() else 3)
            note("scripted", "finished")

    def await_second_run() -> None:
        while not Path("second").exists():
            time.sleep(0.1)
        Path("second").unlink()

    if __name__ == "__main__":
        if sys.argv[1] == "graceful":
            with listener:
                await_second_run()
        else:
            listener.start()
            await_second_run()
            listener.immediate_stop()
        note("script", "stopped")
"""


@pytest.fixture(scope="module", autouse=True)
def deployments(project: Project, prefect: Prefect) -> dict[str, UUID]:
    """Plain flows, deployed; no agent."""
    project.write("plain.py", PLAIN)
    project.write("loading.py", LONG_LOADING)
    ensure_work_pool(project.pool)
    return {
        name: prefect.client.create_deployment(
            prefect.client.create_flow_from_name(name),
            name,
            entrypoint=entrypoint,
            work_pool_name=project.pool,
            enforce_parameter_schema=False,
        )
        for name, entrypoint in (
            ("quick", "plain.py:quick"),
            ("slow", "plain.py:slow"),
            ("long-loading", "loading.py:long_loading"),
        )
    }


def tree(agent: Program) -> list[psutil.Process]:
    """Return an agent's process with all its descendants, the nursery and its hosts among them."""
    root = psutil.Process(agent.pid)
    return [root, *root.children(recursive=True)]


def process_of(agent: Program) -> subprocess.Popen[bytes]:
    """Return the agent's own process."""
    assert agent.process is not None
    return agent.process


def send(agent: Program, number: signal.Signals) -> None:
    """Signal the agent alone, as a service manager or the kernel does, and not its hosts."""
    os.kill(agent.pid, number)


def gone(processes: list[psutil.Process]) -> bool:
    """Return whether none of the processes is there any more."""
    return not any(process.is_running() and is_alive(process.pid) for process in processes)


def start_slow(project: Project, prefect: Prefect, until: Path) -> FlowRun:
    """Start a run that goes on until a file is there, and wait for its body to begin."""
    before = len(project.entries("slow", "began"))
    run = prefect.start("slow", parameters={"until": str(until)})
    project.wait_for("slow", "began", before + 1)
    return run


def test_an_agent_that_runs_once_finishes_what_is_due(project: Project, prefect: Prefect) -> None:
    """With `--run-once` it runs all that is due, more than it has hosts for, and exits with 0."""
    runs = [prefect.start("quick") for _ in range(4)]
    args = ("--pool", project.pool, "--type", "warm-backup", "--name", "once", "--limit", "2")
    project.prefect("worker", "start", "--run-once", *args)

    assert sorted(entry["run"] for entry in project.entries("quick")) == sorted(str(r.id) for r in runs)
    states = [state_of(prefect.client.read_flow_run(run.id)).name for run in runs]
    assert states == ["Completed"] * 4


def test_sigterm_drains_the_agent(project: Project, prefect: Prefect, tmp_path: Path) -> None:
    """The running body finishes, nothing else starts, the agent exits with 0 and leaves no process."""
    with project.agent("draining", "--limit", "1") as agent:
        slow = start_slow(project, prefect, tmp_path / "finish")
        waiting = prefect.start("quick")
        processes = tree(agent)
        assert len(processes) >= 3
        send(agent, signal.SIGTERM)
        wait_until(lambda: "may still end" in agent.output(), PATIENCE, "the agent to drain")
        assert not project.entries("slow", "finished")
        (tmp_path / "finish").touch()
        status = process_of(agent).wait(PATIENCE)

    assert status == 0
    wait_until(lambda: gone(processes), PATIENCE, "all its processes to end")
    assert [entry["run"] for entry in project.entries("slow", "finished")] == [str(slow.id)]
    assert state_of(prefect.client.read_flow_run(slow.id)).name == "Completed"
    assert state_of(prefect.client.read_flow_run(waiting.id)).type.value == "SCHEDULED"
    assert str(waiting.id) not in {entry["run"] for entry in project.entries("quick")}


def test_sigterm_stops_an_agent_that_a_script_has_started(project: Project) -> None:
    """In the background of a shell script interrupts are ignored; the agent ends in order all the same."""
    with interrupts_ignored(), project.agent("scripted") as agent:
        wait_until(lambda: "started" in agent.output(), PATIENCE, "the agent to start")
        processes = tree(agent)
        send(agent, signal.SIGTERM)
        status = process_of(agent).wait(PATIENCE)

    assert status == 0
    wait_until(lambda: gone(processes), PATIENCE, "all its processes to end")
    assert "stopped" in agent.output()


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore interrupts, as what is started meanwhile then does too."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_stopping_agent_gives_back_what_has_not_begun(project: Project, prefect: Prefect) -> None:
    """What it has claimed ahead of its time is Scheduled again for the same time; nothing is lost."""
    with project.agent("giving-back") as agent:
        wait_until(lambda: "started" in agent.output(), PATIENCE, "the agent to start")
        time = datetime.now(UTC) + timedelta(seconds=5)
        runs = [prefect.start("long-loading", state=Scheduled(scheduled_time=time)) for _ in range(8)]

        def claimed() -> bool:
            return any(prefect.client.read_flow_run(run.id).state_name == "Pending" for run in runs)

        wait_until(claimed, PATIENCE, "a run to be claimed")
        send(agent, signal.SIGTERM)
        wait_until(lambda: "may still end" in agent.output(), PATIENCE, "the agent to drain")
        project.write("loads-at-once", "")
        assert process_of(agent).wait(PATIENCE) == 0

    after = [prefect.client.read_flow_run(run.id) for run in runs]
    waiting = [run for run in after if run.state_type is StateType.SCHEDULED]
    histories = [[state.name for state in prefect.history(run)] for run in waiting]
    assert any("Pending" in names for names in histories)
    assert {run.state_name for run in after if run not in waiting} <= {"Completed"}
    assert {due(run) for run in after} == {time}
    executed = {entry["run"] for entry in project.entries("long-loading", "ran")}
    assert executed.isdisjoint(str(run.id) for run in waiting)

    project.prefect("worker", "start", "--run-once", "--pool", project.pool, "--type", "warm-backup")
    executions = Counter(entry["run"] for entry in project.entries("long-loading", "ran"))
    assert [executions[str(run.id)] for run in runs] == [1] * len(runs)


@pytest.mark.slow
def test_stopping_all_processes_of_a_node_at_once_loses_nothing(project: Project, prefect: Prefect) -> None:
    """As a service manager does with a control group: what runs may end, the next runs the rest."""
    start = datetime.now(UTC) + timedelta(seconds=4)
    times = [start + timedelta(seconds=number / 4) for number in range(40)]
    runs = [prefect.start("quick", state=Scheduled(scheduled_time=time)) for time in times]
    total = len(project.entries("quick", "ran")) + len(runs)
    for _ in range(4):
        before = len(project.entries("quick", "ran"))
        with project.agent("group-of-processes") as agent:
            project.wait_for("quick", "ran", min(before + 3, total))
            for process in tree(agent):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            assert process_of(agent).wait(PATIENCE) == 0

    with project.agent("group-of-processes"):
        ended = [prefect.wait_for_end(run) for run in runs]
    executions = Counter(entry["run"] for entry in project.entries("quick", "ran"))
    for run in ended:
        assert (run.state_name, executions[str(run.id)]) == ("Completed", 1), (run.name, state_of(run))


def test_hosts_do_not_outlive_their_agent(project: Project, prefect: Prefect, tmp_path: Path) -> None:
    """When an agent is killed its nursery and its hosts end by themselves, and the body with them."""
    with project.agent("killed") as agent:
        start_slow(project, prefect, tmp_path / "never")
        processes = tree(agent)
        body = project.entries("slow", "began")[-1].pid
        assert body in {process.pid for process in processes}
        send(agent, signal.SIGKILL)
        wait_until(lambda: gone(processes), PATIENCE, "the hosts to end")


def test_no_run_starts_twice_however_many_agents_there_are(project: Project, prefect: Prefect) -> None:
    """Two agents on one queue, more late runs than hosts: each is executed once."""
    with project.agent("one", "--limit", "2"), project.agent("two", "--limit", "2"):
        runs = [prefect.start("quick") for _ in range(24)]
        for run in runs:
            assert state_of(prefect.wait_for_end(run)).name == "Completed"

    executions = Counter(entry["run"] for entry in project.entries("quick", "ran"))
    assert [executions[str(run.id)] for run in runs] == [1] * len(runs)


def test_a_listener_lets_the_running_job_finish(project: Project, prefect: Prefect) -> None:
    """`with listener:` deploys and runs; at its end the body goes on to its own end, then all stops."""
    project.write("program.py", SCRIPT)
    project.run(sys.executable, "program.py", "graceful")

    entries = project.entries("scripted")
    (stopped,) = project.entries("script", "stopped")
    assert [entry.what for entry in entries] == ["began", "finished"] * (len(entries) // 2)
    # Two, unless the machine stood still before the program could stop the listener.
    runs = [entry["runs"] for entry in entries if entry.what == "began"]
    assert runs == list(range(max(2, len(runs))))
    assert entries[-1].at < stopped.at
    assert prefect.runs("scripted", "Running", "Pending", "Crashed") == []
    assert len(prefect.runs("scripted", "Completed")) == len(runs)


def test_a_listener_ends_the_running_job(project: Project, prefect: Prefect) -> None:
    """`immediate_stop` ends the body; its run shows as Crashed, and its state is not saved."""
    project.write("program.py", SCRIPT)
    project.write("long", "")
    before = len(project.entries("scripted", "finished"))
    project.run(sys.executable, "program.py", "immediate")

    began = project.entries("scripted", "began")
    finished = project.entries("scripted", "finished")
    assert len(finished) < len(began)
    assert not is_alive(began[-1].pid)
    assert len(prefect.wait_for_runs("scripted", "Crashed", count=1)) == 1
    assert prefect.runs("scripted", "Running") == []
    assert len(finished) >= before
