"""Programs with listeners: the same one on several nodes, several listeners in one, SIGTERM and kill -9.

What ran, when, where and in which term is read from the ledger that the jobs keep.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
import uuid
from collections import Counter, defaultdict
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from prefect.states import Scheduled

from deployments.local import free_port, running, wait_until
from taskadapter.rules.ticks import tick_key
from tests.acceptance.project import PATIENCE, is_alive, state_of
from tests.acceptance.project import due as due_of
from tests.processes import catches, nurseries
from tests.slowness import Slowness

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Postgres, Program
    from tests.acceptance.project import Entry, Prefect, Project

INTERVAL = 2
LIVENESS = 3.0

ROUNDS = int(os.environ.get("TASKADAPTER_TEST_ROUNDS", "4"))
"""How often the race of nodes that start together is run."""

holder_goes_on = pytest.mark.undisturbed(0.5)
"""Of tests in which a node keeps its token: it loses it where the machine stands still for longer."""

NODE = """
    import sys
    import time
    from pathlib import Path

    from ledger import note
    from prefect.runtime import flow_run
    from taskadapter import Listener, Service, TriggerConfiguration, WarmBackupConfig, current_run

    def enter(job, what="ran", **details):
        run = current_run()
        note(job, what, due=run.scheduled_time.timestamp(), node=run.task_id, term=run.fencing_token,
             count=run.count, run=flow_run.id, **details)

    class Counter(Service):
        job: str
        i: int = 1

        def execute(self) -> None:
            enter(self.job, i=self.i)
            self.i += 1

    def listener(node, group=None, interval=2):
        names = {"task_id": node} if node else {}
        backup = group and WarmBackupConfig(
            group_id=group, liveness_check_interval=3, heartbeat_frequency=0.5, **names
        )
        return Listener(trigger=TriggerConfiguration(interval=interval), warm_backup_config=backup)

    def wait_for(path):
        while not Path(path).exists():
            time.sleep(0.05)
"""

MANY = """
    # argv: the node, what all names begin with, how many listeners with a group, and how many without
    from node import *

    if __name__ == "__main__":
        node, prefix, grouped, others, interval = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
        listeners = [
            listener(node, f"{prefix}-{k}" if k < grouped else None, interval)
            for k in range(int(grouped + others))
        ]
        for k, one in enumerate(listeners):
            one.attach(Counter(job=f"{prefix}-{k}"), f"{prefix}-{k}")
        begun = time.monotonic()
        for one in listeners:
            one.start()
        note(prefix, "started", node=node, seconds=time.monotonic() - begun)
        listeners[0].wait()
        note(prefix, "stopped", node=node)
"""


@pytest.fixture(scope="module", autouse=True)
def node_module(project: Project) -> None:
    """What the programs of this module share."""
    project.write("node.py", NODE)
    project.write("many.py", MANY)


@pytest.fixture
def prefix(prefect: Prefect) -> Iterator[str]:
    """What the names of a test's jobs and groups begin with; its jobs are gone at the end."""
    name = f"t{uuid.uuid4().hex[:6]}"
    yield name
    for deployment in prefect.client.read_deployments(limit=200):
        if deployment.name.startswith(name):
            prefect.client.delete_deployment(deployment.id)


@pytest.fixture
def database(postgres_server: Postgres, prefix: str) -> dict[str, str]:
    """The setting that names a coordination database which has nothing."""
    postgres_server.create_database(prefix)
    return {
        "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": postgres_server.url(prefix),
        "PREFECT_INTEGRATIONS_TASKADAPTER_WORK_POOL": f"pool-{prefix}",
    }


@pytest.fixture
def nodes(project: Project, prefix: str, database: dict[str, str]) -> Iterator[dict[str, Program]]:
    """Three nodes of one program with three groups and one listener without, started at the same moment."""
    programs = {
        name: project.program("many.py", name, prefix, "3", "1", str(INTERVAL), env=database)
        for name in ("node-a", "node-b", "node-c")
    }
    with ExitStack() as stack:
        for program in programs.values():
            stack.enter_context(running(program))
        project.wait_for(prefix, "started", 3)
        yield programs


def jobs_of(prefix: str) -> list[str]:
    return [f"{prefix}-{k}" for k in range(4)]


def ran(project: Project, job: str) -> list[Entry]:
    return project.entries(job, "ran")


def send(program: Program, number: signal.Signals) -> None:
    """Signal the program alone, and none of its children."""
    os.kill(program.pid, number)


def wait_for_ticks(project: Project, prefix: str, count: int) -> None:
    for job in jobs_of(prefix):
        project.wait_for(job, "ran", count)


def judge(project: Project, prefect: Prefect, prefix: str, interval: float = INTERVAL) -> None:
    """Each job's ticks ran once, without a gap; those of a group on one node in each term, in order.

    Of no group, a tick that a node gives back when it stops may still wait for the next one.
    """
    for job in jobs_of(prefix):
        entries = sorted(ran(project, job), key=lambda entry: entry["due"])
        due = [entry["due"] for entry in entries]
        assert [when for when, times in Counter(due).items() if times > 1] == [], job
        is_alone = entries[0]["term"] is None
        if is_alone:
            waiting = [due_of(run).timestamp() for run in prefect.runs(job, "Scheduled", "Late")]
            due = sorted({*due, *(when for when in waiting if when < due[-1])})
        steps = [round((later - earlier) / interval, 2) for earlier, later in itertools.pairwise(due)]
        assert set(steps) <= {1.0}, (job, steps)
        if is_alone:
            continue  # whichever node is quicker has the next
        holders = defaultdict(set)
        for entry in entries:
            holders[entry["term"]].add(entry["node"])
        assert [len(names) for names in holders.values()] == [1] * len(holders), (job, holders)
        assert [entry["i"] for entry in entries] == [*range(1, len(entries) + 1)], job


@holder_goes_on
def test_nodes_that_start_together_share_the_jobs(
    project: Project, prefect: Prefect, prefix: str, nodes: dict[str, Program]
) -> None:
    """Nobody fails, each has one nursery, and each tick runs once; at the end each hands over."""
    wait_for_ticks(project, prefix, 3)

    assert {name: len(nurseries(program.pid)) for name, program in nodes.items()} == dict.fromkeys(nodes, 1)
    for name, program in nodes.items():
        send(program, signal.SIGTERM)
        assert program.process is not None
        assert program.process.wait(PATIENCE) == 0, name
    assert [entry["node"] for entry in project.entries(prefix, "stopped")] == [*nodes]
    assert [program.output() for program in nodes.values() if "Traceback" in program.output()] == []
    judge(project, prefect, prefix)


@holder_goes_on
def test_a_node_dies_and_another_is_stopped(
    project: Project,
    prefix: str,
    nodes: dict[str, Program],
    postgres_server: Postgres,
    slowness: Slowness,
) -> None:
    """Standbys take over all groups of a node that is killed, and at once those of one that is stopped."""
    wait_for_ticks(project, prefix, 2)
    for number in (signal.SIGKILL, signal.SIGTERM):
        active = most_active(project, prefix)
        held = [job for job in jobs_of(prefix)[:3] if ran(project, job)[-1]["node"] == active]
        gone = time.time()
        send(nodes[active], number)
        for job in held:
            wait_until(
                partial(runs_elsewhere, project, job, active, gone),
                PATIENCE,
                f"{job} to run on another node than {active}",
            )
        late = slowness.since(gone)  # as standbys are
        for acquired, released in tenures(postgres_server, prefix, held, since=gone):
            if number is signal.SIGKILL:
                assert acquired - gone < LIVENESS + 1 + late, held
            else:
                assert acquired - released < 1.0 + late, held
        del nodes[active]
    wait_for_ticks(project, prefix, 8)

    # What the killed node was executing is Crashed, and saved nothing: the ledger shows its number twice.
    for job in jobs_of(prefix):
        due = [entry["due"] for entry in ran(project, job)]
        assert len(due) == len(set(due)), job


def most_active(project: Project, prefix: str) -> str:
    """Return the node that runs most of the groups."""
    holders = Counter(ran(project, job)[-1]["node"] for job in jobs_of(prefix)[:3])
    return str(holders.most_common()[0][0])


def runs_elsewhere(project: Project, job: str, node: str, since: float) -> bool:
    """Return whether a job has run on another node since then."""
    return any(entry["node"] != node and entry.at > since for entry in ran(project, job))


def tenures(server: Postgres, database: str, groups: list[str], since: float) -> list[tuple[float, float]]:
    """Return when each group's token was taken after that time, and when it was released before."""
    query = """
        SELECT extract(epoch FROM taken.acquired)::float8, extract(epoch FROM former.released)::float8
        FROM taskadapter_tenure taken
        JOIN taskadapter_tenure former ON former.group_id = taken.group_id AND former.term = taken.term - 1
        WHERE taken.group_id = ANY(%s) AND extract(epoch FROM taken.acquired) > %s
        ORDER BY taken.acquired
    """
    with server.connect(database) as connection:
        found = connection.execute(query, (groups, since)).fetchall()
    assert len(found) >= len(groups)
    return found


# --- listeners that come and go -------------------------------------------------------------------

LIFE = """
    # argv: what all names begin with
    import asyncio
    from node import *

    gap = 0.0

    async def watch_the_loop():
        global gap
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            gap = max(gap, time.monotonic() - before)

    {define} wait_until(what):
        while not Path(prefix + what).exists():
            {pause}(0.05)

    {define} main():
        {watch}
        begun = time.monotonic()
        first, second = listener(None, interval=1), listener(None, interval=1)
        late = Counter(job=prefix + "late")
        first.attach(Counter(job=prefix + "first"), prefix + "first")
        second.attach(Counter(job=prefix + "second"), prefix + "second")
        {call}start(first)
        {call}start(second)
        note(prefix, "started", seconds=time.monotonic() - begun)
        {wait}wait_until("attach")
        {call}attach(first, late, prefix + "late")
        note(prefix, "attached")
        {wait}wait_until("detach")
        {call}detach(first, late)
        note(prefix, "detached")
        {wait}wait_until("stop")
        {call}graceful_stop(second)
        note(prefix, "stopped")
        {wait}wait_until("again")
        {call}start(second)
        {call}attach(first, late, prefix + "late")
        note(prefix, "again")
        {wait}wait_until("end")
        {call}immediate_stop(first)
        {call}graceful_stop(second)
        note(prefix, "ended", gap=gap)

    if __name__ == "__main__":
        prefix = sys.argv[1]
        {run}
"""

SYNC = {
    "define": "def",
    "pause": "time.sleep",
    "watch": "",
    "call": "Listener.",
    "wait": "",
    "run": "main()",
}
ASYNC = {
    "define": "async def",
    "pause": "await asyncio.sleep",
    "watch": "watching = asyncio.create_task(watch_the_loop())",
    "call": "await Listener.a",
    "wait": "await ",
    "run": "asyncio.run(main())",
}


@pytest.mark.parametrize("kind", [SYNC, pytest.param(ASYNC, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_listeners_and_services_come_and_go(
    project: Project,
    prefect: Prefect,
    prefix: str,
    database: dict[str, str],
    kind: dict[str, str],
    slowness: Slowness,
) -> None:
    """What is attached runs, what is detached or stopped does not, what is started again goes on."""
    project.write("life.py", LIFE.format(**kind))
    first, second, late = (prefix + name for name in ("first", "second", "late"))

    def step(name: str, done: str) -> float:
        (project.folder / f"{prefix}{name}").touch()
        return project.wait_for(prefix, done)[-1].at

    with running(project.program("life.py", prefix, env=database)) as program:
        project.wait_for(first, "ran", 2)
        project.wait_for(second, "ran", 2)
        children = len(psutil.Process(program.pid).children())

        step("attach", "attached")
        project.wait_for(late, "ran", 2)

        detached = step("detach", "detached")
        project.wait_for(first, "ran", len(ran(project, first)) + 3)
        assert max(begun_at(project, late, database)) <= detached + 0.01
        assert not prefect.is_active(late)
        # What Prefect's scheduler was planning at that moment comes afterwards.
        late_tick = plan_a_tick(prefect, late)
        assert state_of(prefect.wait_for_end(late_tick)).name == "Skipped"
        wait_until(lambda: not prefect.waiting(late), PATIENCE, "the planned ticks to go")
        assert prefect.runs(late, "Completed") != []

        stopped = step("stop", "stopped")
        project.wait_for(first, "ran", len(ran(project, first)) + 3)
        assert [entry for entry in ran(project, second) if entry.at > stopped] == []
        assert prefect.is_active(second)
        assert len(nurseries(program.pid)) == len(psutil.Process(program.pid).children()) == children == 1

        before = {job: len(ran(project, job)) for job in (second, late)}
        step("again", "again")
        for job, count in before.items():
            project.wait_for(job, "ran", count + 3)
        step("end", "ended")
        assert program.process is not None
        assert program.process.wait(PATIENCE) == 0

    for job in (first, second, late):
        due = [entry["due"] for entry in ran(project, job)]
        assert len(due) == len(set(due)), job
        assert [entry["count"] for entry in ran(project, job)] == [*range(1, len(due) + 1)], job
    due = [entry["due"] for entry in ran(project, second)]
    assert {round(later - earlier, 2) for earlier, later in itertools.pairwise(due)} == {1.0}
    # Seconds at most, and on a slow machine less than what would hold the loop if it waited for a start.
    (started,), (ended,) = project.entries(prefix, "started"), project.entries(prefix, "ended")
    assert ended["gap"] < max(1.0, started["seconds"] / 4) + slowness.longest()
    assert "Traceback" not in program.output()


def begun_at(project: Project, job: str, env: dict[str, str]) -> list[float]:
    """Return when a job's bodies began: they tell of it some time later."""
    found = json.loads(project.taskadapter("ledger", job, "--last", "100", "--json", env=env))
    lines = [line for line in found if line["number"] is not None]
    return [datetime.fromisoformat(line["due"]).timestamp() + line["late"] for line in lines]


def plan_a_tick(prefect: Prefect, job: str) -> FlowRun:
    """Make a tick of a job's schedule that is due at once, as whoever plans it does."""
    deployment = prefect.deployment(job)
    now = datetime.now(UTC)
    key = tick_key(deployment.id, deployment.schedules[0].id, now)
    return prefect.start(job, state=Scheduled(scheduled_time=now), idempotency_key=key)


SHARED = """
    # argv: the node, the group, what all names begin with
    import asyncio
    from node import *

    async def main():
        node, group, prefix = sys.argv[1:]
        one, other = listener(node, group, 1), listener(node, group, 1)
        one.attach(Counter(job=prefix + "one"), prefix + "one")
        other.attach(Counter(job=prefix + "other"), prefix + "other")
        async with one, other:
            note(prefix, "started", node=node)
            await asyncio.to_thread(wait_for, prefix + node)
            await one.agraceful_stop()
            note(prefix, "stopped", node=node)
            await other.await_()

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.mark.slow
@holder_goes_on
def test_two_listeners_share_a_group(project: Project, prefix: str, database: dict[str, str]) -> None:
    """Where one of them stops on the active node, a node that runs both takes the group over."""
    project.write("shared.py", SHARED)
    one, other = prefix + "one", prefix + "other"
    with ExitStack() as stack:
        programs = {}
        for name in ("node-a", "node-b"):
            program = project.program("shared.py", name, f"g-{prefix}", prefix, env=database)
            programs[name] = stack.enter_context(running(program))
            project.wait_for(prefix, "started", len(programs))
        project.wait_for(one, "ran", 2)
        assert {entry["node"] for entry in ran(project, one)} == {"node-a"}

        (project.folder / f"{prefix}node-a").touch()
        stopped = project.wait_for(prefix, "stopped")[0].at
        for job in (one, other):
            wait_until(
                partial(runs_elsewhere, project, job, "node-a", stopped),
                PATIENCE,
                f"{job} to run on the other node",
            )
        assert [e for e in ran(project, one) if e["node"] == "node-a" and e.at > stopped] == []

        # Where nobody runs it any more, the other one goes on.
        (project.folder / f"{prefix}node-b").touch()
        stopped = project.wait_for(prefix, "stopped", 2)[1].at
        before = len(ran(project, other))
        project.wait_for(other, "ran", before + 3)
        assert [entry for entry in ran(project, one) if entry.at > stopped] == []
        for program in programs.values():
            send(program, signal.SIGINT)
            assert program.process is not None
            assert program.process.wait(PATIENCE) == 0

    for job in (one, other):
        due = [entry["due"] for entry in ran(project, job)]
        assert len(due) == len(set(due)), job


STUBBORN = """
    # argv: what all names begin with
    import signal
    from node import *

    class Stubborn(Service):
        job: str

        def execute(self) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            note(self.job, "ran")
            time.sleep(600)

    if __name__ == "__main__":
        (prefix,) = sys.argv[1:]
        one, other = listener(None, None, 1), listener(None, None, 1)
        one.attach(Stubborn(job=prefix + "one"), prefix + "one")
        other.attach(Counter(job=prefix + "other"), prefix + "other")
        with one, other:
            wait_for(prefix)
            one.graceful_stop()
            note(prefix, "stopped")
            other.wait()
"""


@pytest.mark.slow
def test_a_job_that_ignores_its_end_is_killed(
    project: Project, prefix: str, database: dict[str, str]
) -> None:
    """Also where the program goes on, and with it what else is of no group."""
    project.write("stubborn.py", STUBBORN)
    one, other = prefix + "one", prefix + "other"
    env = {**database, "PREFECT_INTEGRATIONS_TASKADAPTER_DRAIN_SECONDS": "1"}
    with running(project.program("stubborn.py", prefix, env=env)) as program:
        pid = project.wait_for(one, "ran")[0].pid
        (project.folder / prefix).touch()
        project.wait_for(prefix, "stopped")
        assert not is_alive(pid)
        project.wait_for(other, "ran", len(ran(project, other)) + 3)
        send(program, signal.SIGINT)
        assert program.process is not None
        assert program.process.wait(PATIENCE) == 0
    assert len(ran(project, one)) == 1


POOLS = """
    # argv: the node, what all names begin with
    from node import *

    if __name__ == "__main__":
        node, prefix = sys.argv[1:]
        listeners = []
        for k in range(2):
            backup = WarmBackupConfig(group_id=f"{prefix}-{k}", task_id=node, liveness_check_interval=3)
            every = TriggerConfiguration(interval=1)
            one = Listener(trigger=every, work_pool=f"{prefix}-{k}", warm_backup_config=backup)
            one.attach(Counter(job=f"{prefix}-{k}"), f"{prefix}-{k}")
            one.start()
            listeners.append(one)
        wait_for(prefix)
        listeners[0].graceful_stop()
        note(prefix, "stopped")
        listeners[1].wait()
"""


@pytest.mark.slow
@holder_goes_on
def test_a_program_may_have_two_work_pools(project: Project, prefix: str, database: dict[str, str]) -> None:
    """It has an agent for each, of one name, on one database; that of one stops, the other goes on."""
    project.write("pools.py", POOLS)
    jobs = [f"{prefix}-{k}" for k in range(2)]
    with running(project.program("pools.py", "node-a", prefix, env=database)) as program:
        for job in jobs:
            project.wait_for(job, "ran", 2)
        assert len(nurseries(program.pid)) == 2
        (project.folder / prefix).touch()
        stopped = project.wait_for(prefix, "stopped")[0].at
        project.wait_for(jobs[1], "ran", len(ran(project, jobs[1])) + 4)
        assert [entry for entry in ran(project, jobs[0]) if entry.at > stopped] == []
        send(program, signal.SIGTERM)
        assert program.process is not None
        assert program.process.wait(PATIENCE) == 0

    assert {entry["node"] for job in jobs for entry in ran(project, job)} == {"node-a"}
    assert {entry["term"] for job in jobs for entry in ran(project, job)} == {1}
    assert "Traceback" not in program.output()


# --- what keeps a node from taking part -----------------------------------------------------------

REFUSED = """
    # argv: the node, the job
    from node import *
    from taskadapter import TaskError

    if __name__ == "__main__":
        node, job = sys.argv[1:]
        one = listener(node, "g-" + job)
        one.attach(Counter(job=job), job)
        begun = time.monotonic()
        try:
            one.start()
            note(job, "started", node=node)
            one.wait()
        except TaskError as error:
            failed = one.failed
            note(job, "refused", error=type(error).__name__, message=str(error),
                 failed=failed and str(failed), seconds=time.monotonic() - begun)
            sys.exit(3)
"""


def refusal(project: Project, job: str, program: Program) -> Entry:
    """Return what a program says that was refused; it has ended, and so have its processes."""
    (entry,) = project.wait_for(job, "refused")
    assert program.process is not None
    assert program.process.wait(PATIENCE) == 3
    assert "Traceback" not in program.output()
    return entry


@pytest.fixture
def refused(project: Project) -> None:
    project.write("refused.py", REFUSED)


@pytest.mark.slow
@pytest.mark.usefixtures("refused")
def test_start_says_that_there_is_no_database(
    project: Project, prefix: str, database: dict[str, str]
) -> None:
    """It raises within seconds what the database answers, and leaves no process."""
    nowhere = f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/nothing"
    env = database | {"PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": nowhere}
    with running(project.program("refused.py", "node-a", prefix, env=env)) as program:
        entry = refusal(project, prefix, program)

    assert "connection" in entry["message"].lower()
    assert entry["failed"] is None
    assert ran(project, prefix) == []


@pytest.mark.slow
@holder_goes_on
@pytest.mark.usefixtures("refused")
def test_start_says_that_the_name_is_in_use(
    project: Project, prefix: str, database: dict[str, str]
) -> None:
    """A second process of a live node's name is refused, and told which one has it."""
    with running(project.program("refused.py", "node-a", prefix, env=database)) as first:
        project.wait_for(prefix, "ran")
        with running(project.program("refused.py", "node-a", prefix, env=database)) as second:
            entry = refusal(project, prefix, second)
        assert f"'node-a' is in use by process {first.pid}" in entry["message"]
        assert f" for group 'g-{prefix}' of work pool " in entry["message"]
        project.wait_for(prefix, "ran", len(ran(project, prefix)) + 2)


@pytest.mark.slow
@pytest.mark.usefixtures("refused")
def test_a_program_learns_that_its_agent_has_failed(
    project: Project, prefix: str, database: dict[str, str]
) -> None:
    """A frozen node whose name another process took meanwhile ends: `wait` raises, `failed` says why."""
    with running(project.program("refused.py", "node-a", prefix, env=database)) as frozen:
        project.wait_for(prefix, "ran")
        frozen.pause()
        with running(project.program("refused.py", "node-a", prefix, env=database)):
            project.wait_for(prefix, "started", 2)
            frozen.resume()
            entry = refusal(project, prefix, frozen)

    assert "'node-a'" in entry["message"]
    assert entry["failed"] == entry["message"]


ONCE = """
    # argv: the job's name
    from taskadapter import Listener, Service, TriggerConfiguration

    class Once(Service):
        def execute(self):
            print("It has run.")

    on = Listener(trigger=TriggerConfiguration(interval=1, max_count=1))

    if __name__ == "__main__":
        import sys
        on.attach(Once(), sys.argv[1])
        with on:
            on.wait()
"""


def test_a_program_says_that_its_job_is_over(
    project: Project, prefix: str, database: dict[str, str]
) -> None:
    """It was over before the program was started again, which would look like any healthy start."""
    project.write("once.py", ONCE)
    with running(project.program("once.py", prefix, env=database)) as program:
        wait_until(lambda: f"Job {prefix}/{prefix} has ended" in program.output(), PATIENCE, "its end")
    said = (
        f"Job {prefix} is over, and does not run: the maximum of 1 run is reached. `taskadapter restart "
        f"{prefix}` starts it again."
    )
    with running(project.program("once.py", prefix, env=database)) as program:
        wait_until(lambda: said in program.output(), PATIENCE, "the program to say so")


RULES = """
    # argv: what all names begin with
    from node import *
    from taskadapter import TaskError

    def refused(call):
        try:
            call()
        except TaskError as error:
            return str(error)

    if __name__ == "__main__":
        prefix = sys.argv[1]
        one = listener(None, "g-" + prefix, 60)
        one.attach(Counter(job=prefix), prefix)
        one.start()
        again = refused(one.start)
        namesake = listener(None, None, 60)
        namesake.attach(Counter(job=prefix), prefix)
        backup = WarmBackupConfig(group_id="h-" + prefix, liveness_check_interval=9)
        other_timing = Listener(trigger=one.trigger, warm_backup_config=backup)
        other_timing.attach(Counter(job="other"), prefix + "-other")
        named_late = listener("another-name", "h-" + prefix, 60)
        named_late.attach(Counter(job="late"), prefix + "-late")
        note(
            prefix, "refused", again=again, namesake=refused(namesake.start),
            timing=refused(other_timing.start), name=refused(named_late.start),
            attach=refused(lambda: one.attach(Counter(job=prefix), prefix)),
        )
        one.graceful_stop()
        one.graceful_stop()  # it has stopped already
        one.wait()
"""


def test_what_does_not_fit_into_a_program_is_refused(
    project: Project, prefix: str, database: dict[str, str]
) -> None:
    """Each refusal names what is in the way; what runs goes on, and stopping twice is stopping once."""
    project.write("rules.py", RULES)
    with running(project.program("rules.py", prefix, env=database)) as program:
        (entry,) = project.wait_for(prefix, "refused")
        assert program.process is not None
        assert program.process.wait(PATIENCE) == 0, program.output()

    assert "started already" in entry["again"]
    assert f"'{prefix}' is run by another listener" in entry["namesake"]
    assert "liveness_check_interval=9" in entry["timing"]
    assert "task_id='another-name'" in entry["name"]
    assert "declared twice" in entry["attach"]


@pytest.mark.slow
@holder_goes_on
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_nodes_start_together_again_and_again(
    project: Project, prefect: Prefect, prefix: str, nodes: dict[str, Program], round_: int
) -> None:
    """No race for pool, queue, deployment, schedule or first tick is lost, however often it is run."""
    test_nodes_that_start_together_share_the_jobs(project, prefect, prefix, nodes)


@pytest.mark.slow
@holder_goes_on
def test_forty_listeners_have_one_agent(
    project: Project, prefix: str, database: dict[str, str], postgres_server: Postgres
) -> None:
    """Whatever their number: one nursery, one name, one heartbeat's connection; and all jobs run."""
    with running(project.program("many.py", "node-a", prefix, "39", "1", "60", env=database)) as program:
        (started,) = project.wait_for(prefix, "started")
        print(f"forty listeners have started within {started['seconds']:.1f} s")
        for k in range(40):
            project.wait_for(f"{prefix}-{k}", "ran")
        assert len(nurseries(program.pid)) == 1
        with postgres_server.connect(prefix) as connection:
            (nodes,) = connection.execute("SELECT count(*) FROM taskadapter_node").fetchone() or (0,)
            (held,) = connection.execute("SELECT count(*) FROM token_holder").fetchone() or (0,)
            listening = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND query LIKE %s"
            (hearts,) = connection.execute(listening, (prefix, "%token_holder%")).fetchone() or (0,)
        assert (nodes, held) == (1, 39)
        assert hearts <= 3


# --- the guide ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_guides_program(project: Project, prefect: Prefect, database: dict[str, str]) -> None:
    """It runs as it stands there, from the first report to SIGTERM."""
    guide = (Path(__file__).parents[2] / "docs" / "programs.md").read_text(encoding="utf-8")
    section = guide.split("## A program that is its own node")[1].split("\n## ")[0]
    project.write("report.py", section.split("```python\n")[1].split("```")[0])
    with running(project.program("report.py", env=database)) as program:
        wait_until(lambda: "Report 100" in program.output(), PATIENCE, "the first report")
        # The first listener reports while the second one starts.
        wait_until(lambda: catches(program.pid, signal.SIGTERM), PATIENCE, "it to wait for its end")
        send(program, signal.SIGTERM)
        assert program.process is not None
        assert program.process.wait(PATIENCE) == 0, program.output()

    assert "Traceback" not in program.output()
    for name in ("report", "clean-up"):
        assert prefect.is_active(name)
        prefect.client.delete_deployment(prefect.deployment(name).id)
