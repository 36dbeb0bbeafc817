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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    Postgres,
    PrefectServer,
    Program,
    agent,
    environment,
    postgres,
    prefect_command,
    prefect_server,
    wait_until,
)

ROOT = Path(__file__).parent.parent
POOL = "taskadapter"
COUNTS = 5
ENDED = FlowRunFilter(
    state=FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.COMPLETED, StateType.FAILED, StateType.CRASHED])
    )
)
COORDINATION = "tasks"
DEADLINE = 90.0  # seconds, for each thing that is awaited

LEDGER = """
CREATE TABLE pulse (
    scheduled timestamptz, count int, node text, term bigint, at timestamptz DEFAULT clock_timestamp()
)
"""

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
            with stack(Path(home)) as stage, connected(stage.server) as client:
                story = Story(client)
                failover = Failover(stage)
                failover.kill_the_active(when=story.counter_has_reached)
                told = story.tell()
                failover.stop_the_active()
                verdict = f"{failover.figures()}; {told}"
                failover.print_timeline()
                console.print(f"UI         {stage.server.ui_url}")
                if stays:
                    console.print(f"Logs       {home}/node-1.log, node-2.log")
                    console.print("Goes on until Ctrl-C.")
                    signal.pause()
        except TimeoutError as late:
            verdict = f"FAILED, {late}"
        except KeyboardInterrupt:
            if not stays:
                raise
            console.print("\nStopping ...")
    is_ok = "FAILED" not in verdict and "0 lost, 0 doubled" in verdict
    console.print(f"demo: {'ok, ' if is_ok else ''}{verdict}")
    return 0 if is_ok else 1


@dataclass(frozen=True)
class Stage:
    """What the demo plays on.

    Attributes:
        server: Prefect's.
        database: PostgreSQL, with a database for Prefect and one for coordination.
        nodes: the agents, by name.
        env: what a command of the project needs.
    """

    server: PrefectServer
    database: Postgres
    nodes: dict[str, Program]
    env: dict[str, str]


@contextmanager
def stack(home: Path) -> Iterator[Stage]:
    """Run PostgreSQL, a Prefect server on it, and two agents with this project's flows."""
    step("Starting PostgreSQL from its wheel")
    with postgres() as database:
        database.create_database("prefect")
        database.create_database(COORDINATION)
        with database.connect(COORDINATION) as connection:
            connection.execute(LEDGER)
        step("Starting a Prefect server, which makes its tables first")
        with prefect_server(home, database.url("prefect", "asyncpg")) as server:
            step(f"Prefect's UI is at {server.ui_url}")
            url = database.url(COORDINATION)
            env = {
                **server.env,
                "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": url,
                "PULSE_LEDGER": url,
            }
            with ExitStack() as agents:
                nodes = {}
                for name in ("node-1", "node-2"):
                    step(f"prefect worker start --pool {POOL} --type warm-backup --name {name}")
                    nodes[name] = agents.enter_context(agent(name, POOL, env, ROOT))
                run(env, [sys.executable, "-m", "taskadapter.cli", "render"])
                run(env, [prefect_command(), *DEPLOY])
                yield Stage(server, database, nodes, env)


DEPLOY = ("--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")


def run(env: dict[str, str], command: list[str]) -> str:
    """Run a command of the project, as its user would; returns its output."""
    step(" ".join([Path(command[0]).name, *command[1:]]))
    result = subprocess.run(
        command, cwd=ROOT, env=environment(env), capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise SystemExit(f"demo: that failed:\n{result.stdout}{result.stderr}")
    return result.stdout


@contextmanager
def connected(server: PrefectServer) -> Iterator[SyncPrefectClient]:
    """Give a client of the server."""
    with temporary_settings({PREFECT_API_URL: server.api_url}), get_client(sync_client=True) as client:
        yield client


def step(what: str) -> None:
    """Say what happens now."""
    console.print(f"{datetime.now().astimezone():%H:%M:%S}   {what}")


class Failover:
    """Ends the active node twice, and tells from the ledger of `flows/pulse.py` what came of it.

    Args:
        stage: what it plays on.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._connection = stage.database.connect(COORDINATION)
        self._killed = ""
        self.takeover = self.handover = 0.0

    def kill_the_active(self, *, when: Callable[[int], bool]) -> None:
        """Kill the active node with SIGKILL while the counter runs, then start it again."""
        wait_until(lambda: when(2), DEADLINE, "the counter to reach 2")
        self._await_a_pause()
        self._killed, term = self._active()
        killed_at = self._now()
        self._stage.nodes[self._killed].kill()
        step(f"kill -9 {self._killed}, active in term {term}")
        self.takeover = self._await_successor(term, killed_at)
        step(f"prefect worker start --pool {POOL} --type warm-backup --name {self._killed}")
        self._stage.nodes[self._killed].start()

    def stop_the_active(self) -> None:
        """Stop the active node with SIGTERM, once the other is back as a standby."""
        wait_until(self._standby_is_back, DEADLINE, f"{self._killed} to be back")
        self._await_a_pause()
        name, term = self._active()
        stopped_at = self._now()
        step(f"kill -TERM {name}, active in term {term}: it drains and hands over")
        self._stage.nodes[name].stop()
        self.handover = self._await_successor(term, stopped_at)
        last = self._ticks()[-1][1]
        wait_until(lambda: self._ticks()[-1][1] >= last + 3, DEADLINE, "three more ticks")

    def _await_successor(self, term: int, since: datetime) -> float:
        def successor() -> tuple[str, datetime] | None:
            rows = [(row[2], row[4]) for row in self._ticks() if row[3] > term]
            return rows[0] if rows else None

        found = wait_until(successor, DEADLINE, "the first tick of another term")
        assert found is not None
        name, began = found
        acquired = self._query(f"SELECT acquired FROM taskadapter_tenure WHERE term = {term + 1}")[0][0]
        seconds: float = (acquired - since).total_seconds()
        first = (began - since).total_seconds()
        step(f"{name} is active in term {term + 1} after {seconds:.1f} s, and ticks after {first:.1f} s")
        return seconds

    def figures(self) -> str:
        """Say what the ledger says: a tick a second, from the first to the last."""
        scheduled = [row[0] for row in self._ticks()]
        due = round((max(scheduled) - min(scheduled)).total_seconds()) + 1
        ran = len(set(scheduled))
        acquired = dict(self._query("SELECT term, acquired FROM taskadapter_tenure"))
        # What was due while no node was active is late for that reason.
        on_duty = [row[4] - row[0] for row in self._ticks() if row[0] > acquired[row[3]]]
        lateness = median(late.total_seconds() for late in on_duty) * 1000
        return (
            f"takeover {self.takeover:.1f} s, handover {self.handover:.1f} s, {due} ticks due, {ran} run, "
            f"{due - ran} lost, {len(scheduled) - ran} doubled, lateness p50 {lateness:.0f} ms"
        )

    def print_timeline(self) -> None:
        """Print who was active when, and what `taskadapter status` says."""
        table = Table("term", "active", "from", "why", "ticks", title="Group task-group-01")
        tenures = self._query(
            "SELECT term, task_id, acquired, reason FROM taskadapter_tenure ORDER BY term"
        )
        for term, name, acquired, reason in tenures:
            counts = [row[1] for row in self._ticks() if row[3] == term]
            ticks = f"{min(counts)} to {max(counts)}" if counts else ""
            table.add_row(str(term), name, f"{acquired.astimezone():%H:%M:%S}", reason, ticks)
        console.print(table)
        console.print(run(self._stage.env, [sys.executable, "-m", "taskadapter.cli", "status"]))

    def _await_a_pause(self) -> None:
        """Wait for a moment between two ticks; on a machine that is always late, until nothing runs."""
        try:
            wait_until(self._is_between_ticks, DEADLINE / 3, "a moment between two ticks")
        except TimeoutError:
            wait_until(self._is_idle, DEADLINE, "a moment at which nothing runs")

    def _is_idle(self) -> bool:
        return not self._query("SELECT 1 FROM taskadapter_ledger WHERE ended IS NULL")

    def _is_between_ticks(self) -> bool:
        """Return whether nothing runs, as the ledger says, and no tick is due for a moment, or late."""
        ticks = self._ticks()
        if not ticks or not self._is_idle():
            return False
        scheduled, at = ticks[-1][0], ticks[-1][4]
        now = self._now()
        return bool((now - at).total_seconds() > 0.3 and (now - scheduled).total_seconds() < 0.9)

    def _standby_is_back(self) -> bool:
        seen = self._query(
            "SELECT count(*) FROM taskadapter_node WHERE last_seen > now() - interval '1 second'"
        )
        return bool(seen[0][0] == len(self._stage.nodes))

    def _active(self) -> tuple[str, int]:
        name, term = self._query("SELECT task_id, term FROM token_holder")[0]
        return str(name), int(term)

    def _ticks(self) -> list[tuple[Any, ...]]:
        return self._query("SELECT scheduled, count, node, term, at FROM pulse ORDER BY at")

    def _now(self) -> datetime:
        now: datetime = self._query("SELECT now()")[0][0]
        return now

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql.encode()).fetchall()


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

    def counter_has_reached(self, count: int) -> bool:
        """Return whether the counter has had so many runs."""
        self._look()
        return len(self._ended["counter"]) >= count

    def tell(self) -> str:
        """Wait for the whole story, print its tables, and return its figures."""
        wait_until(self._is_complete, DEADLINE, "the counter, the retries and the report")
        self._print_runs()
        self._print_report()
        runs = [run for runs in self._ended.values() for run in runs]
        retries = sum(run.run_count - 1 for run in runs)
        return f"{len(runs)} runs, {retries} retries"

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
            if name != "pulse":
                step(f"{name}: {flow_run.state_name}, {late(flow_run):.3f} s late{again}")

    def _is_complete(self) -> bool:
        self._look()
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
            for flow_run in sorted(runs, key=due) if name != "pulse" else []:
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
