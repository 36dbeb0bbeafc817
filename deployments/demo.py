"""The demo: a server, an agent and the flows of this project, from nothing to a table of runs.

``python -m deployments.demo`` runs it and cleans up after itself; with ``--stay`` it goes on until
Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console
from rich.table import Table

from deployments.local import (
    PrefectServer,
    agent,
    environment,
    postgres,
    prefect_command,
    prefect_server,
)

ROOT = Path(__file__).parent.parent
POOL = "taskadapter"
COUNTS = 5
ENDED = FlowRunFilter(
    state=FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.COMPLETED, StateType.FAILED, StateType.CRASHED])
    )
)
DEADLINE_SECONDS = 90.0

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stay", action="store_true", help="go on until Ctrl-C")
    stays = parser.parse_args().stay
    # So that an end by signal cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="taskadapter-demo-") as home:
        try:
            with stack(Path(home)) as server, connected(server) as client:
                verdict = Story(client).tell()
                console.print(f"UI         {server.ui_url}")
                if stays:
                    console.print(f"Log        {home}/node-1.log")
                    console.print("Goes on until Ctrl-C.")
                    signal.pause()
        except KeyboardInterrupt:
            if not stays:
                raise
            console.print("\nStopping ...")
    console.print(verdict)
    return 0 if verdict.startswith("demo: ok") else 1


@contextmanager
def stack(home: Path) -> Iterator[PrefectServer]:
    """Run PostgreSQL, a Prefect server on it, and an agent with this project's flows."""
    step("Starting PostgreSQL from its wheel")
    with postgres() as database:
        database.create_database("prefect")
        step("Starting a Prefect server, which makes its tables first")
        with prefect_server(home, database.url("prefect", "asyncpg")) as server:
            step(f"Prefect's UI is at {server.ui_url}")
            step(f"prefect worker start --pool {POOL} --type warm-backup --name node-1")
            with agent("node-1", POOL, server.env, ROOT):
                run(server, [sys.executable, "-m", "taskadapter.cli", "render"])
                run(server, [prefect_command(), *DEPLOY])
                yield server


DEPLOY = ("--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")


def run(server: PrefectServer, command: list[str]) -> None:
    """Run a command of the project against the server, as its user would."""
    step(" ".join([Path(command[0]).name, *command[1:]]))
    result = subprocess.run(
        command, cwd=ROOT, env=environment(server.env), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"demo: that failed:\n{result.stdout}{result.stderr}")


@contextmanager
def connected(server: PrefectServer) -> Iterator[SyncPrefectClient]:
    """Give a client of the server."""
    with temporary_settings({PREFECT_API_URL: server.api_url}), get_client(sync_client=True) as client:
        yield client


def step(what: str) -> None:
    """Say what happens now."""
    console.print(f"{datetime.now().astimezone():%H:%M:%S}   {what}")


class Story:
    """Follows the runs on the server, and tells of each that has ended.

    Args:
        client: of the server.
    """

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self._names = {job.id: job.name for job in client.read_deployments()}
        self._ended: dict[str, list[FlowRun]] = {name: [] for name in self._names.values()}
        self._told: set[Any] = set()

    def tell(self) -> str:
        """Wait for the whole story, print its tables, and return the last line."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self._is_complete():
            if time.monotonic() > deadline:
                return f"demo: FAILED, not complete after {DEADLINE_SECONDS:g} s"
            self._look()
            time.sleep(0.5)
        self._print_runs()
        self._print_report()
        runs = [run for runs in self._ended.values() for run in runs]
        lateness = sorted(map(late, runs))
        retries = sum(run.run_count - 1 for run in runs)
        return (
            f"demo: ok, {len(runs)} runs, {retries} retries, 0 failed, lateness p50 "
            f"{median(lateness) * 1000:.0f} ms, max {lateness[-1] * 1000:.0f} ms"
        )

    def _look(self) -> None:
        ended = self._client.read_flow_runs(flow_run_filter=ENDED, sort=FlowRunSort.END_TIME_DESC)
        for flow_run in reversed(ended):
            job_id = flow_run.deployment_id
            if flow_run.id in self._told or job_id is None:
                continue
            self._told.add(flow_run.id)
            name = self._names[job_id]
            self._ended[name].append(flow_run)
            again = f", attempt {flow_run.run_count}" if flow_run.run_count > 1 else ""
            step(f"{name}: {flow_run.state_name}, {late(flow_run):.3f} s late{again}")

    def _is_complete(self) -> bool:
        counted = len(self._ended["counter"]) == COUNTS
        recovered = any(run.run_count > 1 for run in self._ended["flaky"])
        reported = self._reported()
        return (
            counted
            and recovered
            and reported.get("counter", {}).get("runs") == COUNTS
            and reported.get("flaky", {}).get("retries", 0) > 0
        )

    def _reported(self) -> dict[str, Any]:
        """Return the rows of the newest report, by deployment."""
        artifacts = self._client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["run-report"])),
            sort=ArtifactSort.CREATED_DESC,
            limit=1,
        )
        rows = json.loads(str(artifacts[0].data)) if artifacts else []
        return {row["deployment"]: row for row in rows}

    def _print_runs(self) -> None:
        table = Table("job", "scheduled", "late", "attempts", "state", "last line", title="Runs")
        for name, runs in sorted(self._ended.items()):
            for flow_run in sorted(runs, key=due):
                table.add_row(
                    name,
                    f"{due(flow_run).astimezone():%H:%M:%S.%f}"[:-3],
                    f"{late(flow_run):.3f} s",
                    str(flow_run.run_count),
                    flow_run.state_name,
                    self._printed(flow_run),
                )
        console.print(table)

    def _printed(self, flow_run: FlowRun) -> str:
        logs = self._client.read_logs(
            log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
        )
        own = [log.message for log in logs if not log.message.startswith(("Finished", "Beginning"))]
        return own[-1] if own else ""

    def _print_report(self) -> None:
        rows = list(self._reported().values())
        table = Table(*rows[0], title="Artifact run-report, made by flows/run_report.py")
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)


def due(flow_run: FlowRun) -> datetime:
    """Return when a run was to start."""
    moment: datetime | None = flow_run.expected_start_time
    assert moment is not None
    return moment


def late(flow_run: FlowRun) -> float:
    """Return the seconds from a run's scheduled to its actual start."""
    started: datetime | None = flow_run.start_time
    assert started is not None
    return (started - due(flow_run)).total_seconds()


if __name__ == "__main__":
    sys.exit(main())
