"""A project folder as a user has one, with a ledger that its flows keep: the tests' only judge.

What a flow did, when and in which process is read from that ledger; what the UI shows of it is read
through Prefect's API. Neither is taken from what the agent says of itself.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType

from deployments.local import Program, agent, environment, prefect_command, wait_until
from tests import warm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.client.schemas.responses import DeploymentResponse

    from deployments.local import PrefectServer

PATIENCE = 300.0
"""Seconds for what takes one or two on an idle machine, and minutes on one that is busy elsewhere."""

PAGE = 200
"""How many runs the API returns at once."""

_LEDGER = """
import json, os, time

def note(job, what, **details):
    entry = {{"job": job, "what": what, "at": time.time(), "pid": os.getpid(), **details}}
    file = os.open({file!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(entry, default=str).encode() + b"\\n")
    finally:
        os.close(file)

def noted(job, what):
    with open({file!r}) as file:
        entries = map(json.loads, file)
        return sum(entry["job"] == job and entry["what"] == what for entry in entries)
"""

_DEPLOY = """
import asyncio, importlib, pathlib, sys
from taskadapter.deploy import deploy
from taskadapter.listener import listeners

files = sorted(pathlib.Path("flows").glob(sys.argv[1] + ".py"))
modules = [importlib.import_module(f"flows.{file.stem}") for file in files]
for listener in list(listeners):
    asyncio.run(deploy(listener))
"""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: what a job did, when (seconds since the epoch) and in which process."""

    job: str
    what: str
    at: float
    pid: int
    details: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.details[name]


class Project:
    """A folder with flow modules, and the work pool they are deployed to.

    Args:
        folder: created by the caller, empty.
        server: the Prefect server.
        pool: the name of the work pool, also that of listeners which name none.
    """

    def __init__(self, folder: Path, server: PrefectServer, pool: str) -> None:
        self.folder = folder
        self.pool = pool
        self.home = folder / ".home"
        self.env = dict(server.env) | {
            "PREFECT_HOME": str(self.home),
            "PREFECT_PROFILES_PATH": str(self.home / "profiles.toml"),
            "PREFECT_INTEGRATIONS_TASKADAPTER_WORK_POOL": pool,
        }
        self._programs = 0
        self._ledger = folder / ".ledger"
        self.home.mkdir()
        self.write("ledger.py", _LEDGER.format(file=str(self._ledger)))

    def write(self, path: str, source: str) -> None:
        """Write a module, replacing it in one step as an editor or `git pull` does."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(textwrap.dedent(source), encoding="utf-8")
        new.replace(file)

    def run(
        self, *command: str | Path, env: Mapping[str, str] | None = None, within: float = PATIENCE
    ) -> str:
        """Run a command in the folder and return what it prints; any other exit status than 0 fails.

        Errors are apart: there Prefect's client may murmur when a command ends.
        """
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment(self.env, env or {}),
            capture_output=True,
            text=True,
            timeout=within,
        )
        return _printed(done)

    def prefect(self, *args: str, env: Mapping[str, str] | None = None) -> str:
        """Run Prefect's own command; a worker is started as a user starts it."""
        if args[:2] == ("worker", "start"):
            return self.run(prefect_command(), *args, env=env)
        return self._run_warm(prefect_command(), *args, env=env)

    def taskadapter(self, *args: str, env: Mapping[str, str] | None = None) -> str:
        """Run our own command."""
        return self._run_warm(Path(prefect_command()).with_name("taskadapter"), *args, env=env)

    def _run_warm(self, *command: str | Path, env: Mapping[str, str] | None) -> str:
        ours = environment(self.env, env or {})
        return _printed(warm.run(*command, cwd=self.folder, env=ours, within=PATIENCE))

    def groups(self, env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Return what `taskadapter status` shows of the groups of its pool."""
        return list(
            json.loads(self.taskadapter("status", "--pool", self.pool, "--json", env=env))["groups"]
        )

    def render(self) -> None:
        """Run `taskadapter render` as the README says, for plain `prefect deploy --all` in the folder."""
        self.taskadapter("render", "--output", "prefect.yaml")

    def deploy(self, modules: str = "*", env: Mapping[str, str] | None = None) -> None:
        """Deploy every listener of `flows/`, or of those modules of it, from Python."""
        self._run_warm(sys.executable, "-c", _DEPLOY, modules, env=env)

    def agent(
        self, name: str, *args: str, env: Mapping[str, str] | None = None, pool: str | None = None
    ) -> AbstractContextManager[Program]:
        """Run `prefect worker start --type warm-backup` in the folder, for its pool or another."""
        return agent(name, pool or self.pool, self.env | dict(env or {}), self.folder, *args)

    def program(self, script: str, *args: str, env: Mapping[str, str] | None = None) -> Program:
        """Return a program of the project that runs in the background; each has a log of its own."""
        self._programs += 1
        return Program(
            f"{script} {' '.join(args)}",
            [sys.executable, script, *args],
            log=self.home / f"program-{self._programs}.log",
            cwd=self.folder,
            env=environment({"PYTHONUNBUFFERED": "1"}, self.env, env or {}),
        )

    def entries(self, job: str, what: str | None = None) -> list[Entry]:
        """Return what a job has entered into the ledger so far, in the order of writing."""
        if not self._ledger.exists():
            return []
        lines = map(json.loads, self._ledger.read_text(encoding="utf-8").splitlines())
        entries = [
            Entry(**{key: line.pop(key) for key in ("job", "what", "at", "pid")}, details=line)
            for line in lines
        ]
        return [entry for entry in entries if entry.job == job and what in {None, entry.what}]

    def wait_for(self, job: str, what: str, count: int = 1, within: float = PATIENCE) -> list[Entry]:
        """Wait until a job has entered something so many times, and return those entries."""

        def enough() -> list[Entry]:
            found = self.entries(job, what)
            return found if len(found) >= count else []

        return wait_until(enough, within, f"{count} entries {what!r} of {job}")


class Prefect:
    """What Prefect's API, and so its UI, shows of a job; a job's deployment has its flow's name."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client

    def deployment(self, job: str) -> DeploymentResponse:
        """Return the deployment as it is now."""
        return self.client.read_deployment_by_name(job if "/" in job else f"{job}/{job}")

    def is_active(self, job: str) -> bool:
        """Return whether the one schedule of a job makes runs."""
        (schedule,) = self.deployment(job).schedules
        return schedule.active

    def delete_jobs(self, pool: str) -> None:
        """Delete the jobs of a work pool, so that the server has no more work with them."""
        ours = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
        for job in self.client.read_deployments(work_pool_filter=ours):
            self.client.delete_deployment(job.id)

    def start(self, job: str, **options: Any) -> FlowRun:
        """Start a run by hand, as `prefect deployment run` does."""
        return self.client.create_flow_run_from_deployment(self.deployment(job).id, **options)

    def runs(self, job: str, *names: str) -> list[FlowRun]:
        """Return the runs of a job, in the order of their scheduled times, in any or the named states."""
        found = self.runs_of(self.deployment(job).id)
        chosen = [run for run in found if not names or run.state_name in names]
        return sorted(chosen, key=due)

    def runs_of(self, deployment_id: UUID) -> list[FlowRun]:
        """Return all runs of a deployment, also of one that is gone."""
        ours = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
        found: dict[UUID, FlowRun] = {}
        # What is planned meanwhile moves the pages.
        for offset in itertools.count(0, PAGE):
            page = self.client.read_flow_runs(flow_run_filter=ours, limit=PAGE, offset=offset)
            found |= {run.id: run for run in page}
            if len(page) < PAGE:
                break
        return list(found.values())

    def waiting(self, job: str) -> list[FlowRun]:
        """Return the runs that are still to come, or late."""
        return [run for run in self.runs(job) if run.state_type is StateType.SCHEDULED]

    def executed(self, job: str) -> list[FlowRun]:
        """Return the runs whose body has started, whatever became of it."""
        runs = [run for run in self.runs(job) if run.start_time is not None]
        return [run for run in runs if run.state_name != "Skipped"]

    def history(self, run: FlowRun) -> list[State[Any]]:
        """Return the states that a run went through, oldest first."""
        return sorted(self.client.read_flow_run_states(run.id), key=lambda state: state.timestamp)

    def wait_for_tasks(self, run: FlowRun, count: int, within: float = PATIENCE) -> list[str]:
        """Wait until so many task runs of a flow run are final; return "name state" of each."""
        ours = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run.id]))

        def final() -> list[str]:
            found = self.client.read_task_runs(task_run_filter=ours)
            ended = [task for task in found if task.state is not None and task.state.is_final()]
            states = [f"{task.name.rpartition('-')[0]} {task.state_name}" for task in ended]
            return states if len(states) >= count else []

        return wait_until(final, within, f"{count} task runs of run {run.name}")

    def logs(self, run: FlowRun) -> list[str]:
        """Return the messages of a run's log."""
        ours = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        return [log.message for log in self.client.read_logs(ours)]

    def wait_for_logs(self, run: FlowRun, part: str, within: float = PATIENCE) -> list[str]:
        """Wait until a message of a run's log contains `part`, and return the log."""

        def arrived() -> list[str]:
            found = self.logs(run)
            return found if any(part in message for message in found) else []

        try:
            return wait_until(arrived, within, "a line of a log")
        except TimeoutError as late:
            raise AssertionError(f"no {part!r} in the log of run {run.name}: {self.logs(run)}") from late

    def wait_for_end(self, run: FlowRun, within: float = PATIENCE) -> FlowRun:
        """Wait until a run is final, and return it."""

        def ended() -> FlowRun | None:
            now = self.client.read_flow_run(run.id)
            return now if now.state is not None and now.state.is_final() else None

        ended_run = wait_until(ended, within, f"the end of run {run.name}")
        assert ended_run is not None
        return ended_run

    def wait_for_runs(self, job: str, *names: str, count: int, within: float = PATIENCE) -> list[FlowRun]:
        """Wait until so many runs of a job are in one of the named states, and return them."""

        def enough() -> list[FlowRun]:
            found = self.runs(job, *names)
            return found if len(found) >= count else []

        return wait_until(enough, within, f"{count} {names} runs of {job}")

    def wait_for_put_away(self, job: str, within: float = PATIENCE) -> None:
        """Wait until a job's schedule is inactive and no run of it is to come."""
        wait_until(
            lambda: not self.is_active(job) and not self.waiting(job), within, f"{job} to be put away"
        )


def _printed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state_of(run: FlowRun) -> State[Any]:
    """Return the state of a run that has one."""
    assert run.state is not None
    return run.state


def due(run: FlowRun) -> datetime:
    """Return when a run is or was to start."""
    assert run.expected_start_time is not None
    return run.expected_start_time


def without_a_gap(dues: Sequence[float], interval: float) -> set[float]:
    """Return every tick from the first to the last of some, which are in order."""
    first, last = dues[0], dues[-1]
    return {first + interval * number for number in range(round((last - first) / interval) + 1)}


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is not a mere zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z" and Path(f"/proc/{pid}").exists()
