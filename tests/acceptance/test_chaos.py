"""Three agents, half of the jobs in groups, something wrong every two seconds: no tick is lost or doubled.

The bodies enter when they began and ended into a file; nothing of what is judged is told by the agents.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from deployments.local import wait_until
from taskadapter import pause_job, resume_job
from taskadapter.domain import Domain
from taskadapter.jobs import JobId
from taskadapter.pools import ensure_work_pool
from tests.acceptance.project import PATIENCE, Prefect, Project, due
from tests.api_proxy import ApiProxy, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Postgres, PrefectServer, Program
    from tests.api_proxy import Request

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("TASKADAPTER_TEST_CHAOS_SECONDS", "40"))
"""How long things go wrong."""

JOBS = int(os.environ.get("TASKADAPTER_TEST_CHAOS_JOBS", "4"))
"""How many jobs there are."""

EVERY = 2.0
"""Seconds between two of them."""

INTERVAL = float(os.environ.get("TASKADAPTER_TEST_CHAOS_INTERVAL", "4"))
"""Seconds between two ticks of a job."""

NAMES = [f"chaos-{kind}-{number}" for kind in ("group", "alone") for number in range(JOBS // 2)]

FLOWS = """
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig, current_run

    def listener(name):
        group = {{"warm_backup_config": WarmBackupConfig(
            group_id=name, liveness_check_interval=3, heartbeat_frequency=0.5
        )}} if "group" in name else {{}}
        return Listener(trigger=TriggerConfiguration(interval={every}), **group)

    def work(name):
        due = current_run().scheduled_time.timestamp()
        note(name, "began", due=due)
        note(name, "ended", due=due)
"""

JOB = """
    @listener({name!r}).service({name!r})
    def job_{number}() -> None:
        work({name!r})
"""


class Node:
    """An agent that is killed now and then, and comes back under another name."""

    def __init__(self, project: Project, env: dict[str, str], number: int) -> None:
        self._project, self._env, self._number = project, env, number
        self._lives = 0
        self._stack = ExitStack()
        self.program: Program | None = None

    def start(self) -> None:
        self._lives += 1
        name = f"chaos-{self._number}-{self._lives}"
        self.program = self._stack.enter_context(self._project.agent(name, "--limit", "3", env=self._env))

    def kill(self) -> None:
        assert self.program is not None
        with suppress(RuntimeError):
            os.kill(self.program.pid, signal.SIGKILL)
        self._start_anew()

    def revive(self) -> None:
        """Start it again if it has ended: Prefect's command does, where the API fails it at its start."""
        assert self.program is not None
        try:
            assert self.program.pid
        except RuntimeError:
            self._start_anew()

    def _start_anew(self) -> None:
        self.close()
        self._stack = ExitStack()
        self.start()

    def close(self) -> None:
        with suppress(RuntimeError):
            self._stack.close()


@pytest.fixture
def env(
    project: Project, postgres_server: Postgres, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[dict[str, str], ApiProxy]]:
    """A coordination database of the test's own, and a way to the API that may fail."""
    postgres_server.create_database("chaos")
    ours = {"PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": postgres_server.url("chaos")}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
        project.env[name] = value
    with ApiProxy(prefect_api.port).running() as api:
        yield ours | {"PREFECT_API_URL": api.api_url}, api


class Chaos:
    """What goes wrong: one thing at a time, chosen by chance."""

    def __init__(self, project: Project, nodes: list[Node], api: ApiProxy, jobs: list[JobId]) -> None:
        self._project, self._nodes, self._api, self._jobs = project, nodes, api, jobs
        self._chance = random.Random(1)
        self._paused: set[JobId] = set()
        self.done: Counter[str] = Counter()

    def happen(self) -> None:
        """Let one thing go wrong."""
        for node in self._nodes:
            node.revive()
        what = self._chance.choice(["kill", "pause", "resume", "deploy", "fail", "fail", "nonsense"])
        self.done[what] += 1
        match what:
            case "kill":
                self._chance.choice(self._nodes).kill()
            case "pause":
                job = self._chance.choice(self._jobs)
                pause_job(job)
                self._paused.add(job)
            case "resume":
                self.resume_all()
            case "deploy":
                self._project.deploy()
            case "fail" | "nonsense":
                status = self._chance.choice([500, 507]) if what == "fail" else 200
                self._api.fault = lambda request: self._fail(request, status)
                time.sleep(1)
                self._api.fault = None

    def _fail(self, _: Request, status: int) -> bytes | None:
        return refusal(status, b'{"nonsense": true}') if self._chance.random() < 0.3 else None

    def resume_all(self) -> None:
        """Let every job go on."""
        for job in self._paused:
            resume_job(job)
        self._paused.clear()


def test_no_tick_is_lost_or_doubled(
    project: Project, prefect: Prefect, env: tuple[dict[str, str], ApiProxy]
) -> None:
    """Each tick's body begins once, and Prefect shows what became of it."""
    variables, api = env
    ensure_work_pool(project.pool, Domain(liveness_check_interval=3, heartbeat_frequency=0.5))
    declared = (JOB.format(name=name, number=number) for number, name in enumerate(NAMES))
    project.write("flows/jobs.py", FLOWS.format(every=INTERVAL) + "".join(declared))
    project.deploy()
    jobs = {name: JobId(UUID(str(prefect.deployment(name).id))) for name in NAMES}
    nodes = [Node(project, variables, number) for number in (1, 2, 3)]
    try:
        for node in nodes:
            node.start()
        for name in NAMES:
            project.wait_for(name, "began")
        chaos = Chaos(project, nodes, api, list(jobs.values()))
        end = time.time() + SECONDS
        while time.time() < end:
            began = time.monotonic()
            chaos.happen()
            time.sleep(max(0.0, EVERY - (time.monotonic() - began)))
        chaos.resume_all()
        for node in nodes:
            node.revive()
        print(dict(chaos.done))
        judge(project, prefect, time.time())
    finally:
        for node in nodes:
            node.close()


def judge(project: Project, prefect: Prefect, until: float) -> None:
    """Wait until all ticks until then have run, and look at each."""
    for name in NAMES:

        def ticks(name: str = name) -> list[float]:
            return sorted(entry["due"] for entry in project.entries(name, "began"))

        def has_caught_up() -> bool:
            return max(ticks()) > until

        wait_until(has_caught_up, 2 * PATIENCE + SECONDS / 4, f"{name} to catch up")
        first = ticks()[0]
        expected = [first + INTERVAL * number for number in range(int((until - first) // INTERVAL) + 1)]
        wait_until(lambda e=expected: set(e) <= set(ticks()), PATIENCE, f"no tick of {name} to be lost")
        assert [moment for moment, times in Counter(ticks()).items() if times > 1] == []

        def is_settled(run_due: float, name: str = name) -> bool:
            return run_due > until or run_due in {due(run).timestamp() for run in final(prefect, name)}

        wait_until(lambda e=expected: all(map(is_settled, e)), PATIENCE, f"the runs of {name} to end")
        ended = {entry["due"] for entry in project.entries(name, "ended")}
        for run in final(prefect, name):
            moment = due(run).timestamp()
            if moment in expected:
                right = {"Completed"} if moment in ended else {"Crashed"}
                # Its process may have been killed between its last line and its end.
                assert run.state_name in right | {"Crashed"}, (run.name, run.state_name)


def final(prefect: Prefect, name: str) -> list[FlowRun]:
    return [run for run in prefect.runs(name) if run.state is not None and run.state.is_final()]
