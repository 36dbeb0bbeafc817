"""Three agents, half of the jobs in groups, something wrong every two seconds: no tick is lost or doubled.

The bodies enter when they began and ended into a file; nothing of what is judged is told by the agents.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from deployments.local import wait_until
from taskadapter import pause_job, resume_job
from taskadapter.declare.jobs import JobId
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Prefect, Project, due
from tests.api_proxy import ApiProxy, refusal
from tests.slowness import Slowness

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

STANDS_STILL = 2.0
"""Seconds after which a node may have lost a token with a lease of three."""

SEED = int(os.environ.get("TASKADAPTER_TEST_CHAOS_SEED", "1"))
"""What goes wrong, and in which order."""

NAMES = [f"chaos-{kind}-{number}" for kind in ("group", "alone") for number in range(JOBS // 2)]

FLOWS = """
    import time

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
        time.sleep(0.5)
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
        self.killed: set[str] = set()

    @property
    def name(self) -> str:
        return f"chaos-{self._number}-{self._lives}"

    def start(self) -> None:
        self._lives += 1
        program = self._project.agent(self.name, "--limit", "3", env=self._env)
        self.program = self._stack.enter_context(program)

    def kill(self) -> None:
        assert self.program is not None
        with suppress(RuntimeError):
            os.kill(self.program.pid, signal.SIGKILL)
            self.killed.add(self.name)
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
        self._chance = random.Random(SEED)
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
    project: Project, prefect: Prefect, env: tuple[dict[str, str], ApiProxy], slowness: Slowness
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
        killed = frozenset().union(*(node.killed for node in nodes))
        judge(project, prefect, time.time(), killed, slowness)
    finally:
        for node in nodes:
            node.close()


def judge(
    project: Project, prefect: Prefect, until: float, killed: frozenset[str], slowness: Slowness
) -> None:
    """Wait until all ticks until then have run, and look at each; those nodes were killed."""
    for name in NAMES:

        def ticks(what: str, name: str = name) -> list[float]:
            return sorted(entry["due"] for entry in project.entries(name, what))

        def has_caught_up() -> bool:
            return max(ticks("began")) > until

        wait_until(has_caught_up, 2 * PATIENCE + SECONDS / 4, f"{name} to catch up")
        first = ticks("began")[0]
        expected = {first + INTERVAL * number for number in range(int((until - first) // INTERVAL) + 1)}

        def are_settled(name: str = name, expected: set[float] = expected) -> bool:
            return expected <= {due(run).timestamp() for run in final(prefect, name)}

        wait_until(are_settled, PATIENCE, f"the runs of {name} to end")
        began, ended = Counter(ticks("began")), set(ticks("ended"))
        assert max(began.values()) == 1, began.most_common(3)
        found = final(prefect, name)
        runs = {due(run).timestamp(): run for run in found}
        assert sum(due(run).timestamp() in expected for run in found) == len(expected)
        for moment in expected:
            # What was killed shows so: most bodies had begun, one or the other was just about to.
            is_right = moment in ended and runs[moment].state_name == "Completed"
            was_ended = was_interrupted(runs[moment], killed) or was_overtaken(runs[moment], slowness)
            assert is_right or was_ended, (name, moment, runs[moment].state)


def was_interrupted(run: FlowRun, killed: frozenset[str]) -> bool:
    """Return whether a run shows as one whose node was killed while it was being executed."""
    assert run.state is not None
    where = re.search(r"being executed on node '([^']+)'", run.state.message or "")
    return run.state_name == "Crashed" and where is not None and where[1] in killed


def was_overtaken(run: FlowRun, slowness: Slowness) -> bool:
    """Return whether a run shows as one whose node lost its token, as the machine stood still then."""
    assert run.state is not None
    stood_still = slowness.longest(due(run).timestamp(), run.state.timestamp.timestamp())
    return run.state_name == "Crashed" and stood_still >= STANDS_STILL


def final(prefect: Prefect, name: str) -> list[FlowRun]:
    return [run for run in prefect.runs(name) if run.state is not None and run.state.is_final()]
