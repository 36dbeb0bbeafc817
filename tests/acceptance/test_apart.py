"""Nodes of which one, or all, have lost the way to Prefect's API."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from deployments.local import wait_until
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Prefect, Project, due, without_a_gap
from tests.api_proxy import ApiProxy, refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import PrefectServer, Program
    from tests.acceptance.project import Entry

pytestmark = pytest.mark.slow

ONE, OTHER, THIRD = "node-1", "node-2", "node-3"
LEASE = 3.0

INTERVAL = 2
"""Seconds between two ticks: a slow machine, too, can do so many, and catch up."""

holder_goes_on = pytest.mark.undisturbed(0.5)
"""Of tests in which a node keeps its token: it loses it where the machine stands still for longer."""

FLOWS = """
    import time
    from pathlib import Path
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, WarmBackupConfig, current_run

    listener = Listener(
        trigger=TriggerConfiguration(interval={interval}),
        warm_backup_config=WarmBackupConfig(
            group_id="apart", liveness_check_interval=3, heartbeat_frequency=0.5
        ),
    )

    @listener.service("apart")
    def job() -> None:
        run = current_run()
        note("apart", "began", due=run.scheduled_time.timestamp(), node=run.task_id)
        while Path("held").exists():
            time.sleep(0.05)
        note("apart", "ended", due=run.scheduled_time.timestamp(), node=run.task_id)
"""


class Cluster:
    """Two nodes, each with a way of its own to the API."""

    def __init__(self, project: Project, prefect: Prefect, ways: dict[str, ApiProxy]) -> None:
        self.project = project
        self.prefect = prefect
        self.ways = ways

    @contextmanager
    def agent(self, node: str) -> Iterator[Program]:
        """Run a node."""
        with self.project.agent(node, env={"PREFECT_API_URL": self.ways[node].api_url}) as program:
            wait_until(lambda: "takes part through" in program.output(), PATIENCE, node)
            yield program

    @contextmanager
    def cut(self, how: str, *nodes: str) -> Iterator[float]:
        """Let the API fail nodes for the duration of the block; yields when that began."""
        for node in nodes:
            self.ways[node].is_silent = how == "silent"
            self.ways[node].fault = lambda _: refusal(500)
        try:
            yield time.time()
        finally:
            for node in nodes:
                self.ways[node].is_silent, self.ways[node].fault = False, None

    def group(self) -> tuple[str | None, str]:
        """Return who has the group, and why."""
        (group,) = self.project.groups()
        return group["holder"], group["reason"] or ""

    def wait_for_holder(self, node: str | None) -> str:
        """Wait until a node, or nobody, has the group, and return why."""
        wait_until(lambda: self.group()[0] == node, PATIENCE, f"{node} to hold the group")
        return self.group()[1]

    def begun(self, more: int, node: str) -> list[Entry]:
        """Return the ticks that have begun on a node, once there are so many more."""

        def theirs() -> list[Entry]:
            return [entry for entry in self.project.entries("apart", "began") if entry["node"] == node]

        known = len(theirs())
        wait_until(lambda: len(theirs()) >= known + more, PATIENCE, f"{more} more ticks on {node}")
        return theirs()

    def give_to(self, node: str) -> None:
        """Have a node hold the group."""
        if self.group()[0] != node:
            self.project.taskadapter("resign", "apart", "--pool", self.project.pool)
        self.wait_for_holder(node)

    def assert_each_once(self) -> None:
        """Check that from the first tick to the last that has begun each has, and once.

        They may overlap, so that one enters it before another that began before it. One whose node was
        killed in the moment before it could enter it shows as Crashed.
        """

        def dues() -> list[float]:
            return sorted(entry["due"] for entry in self.project.entries("apart", "began"))

        every = without_a_gap(dues(), INTERVAL)

        def is_complete() -> bool:
            crashed = {due(run).timestamp() for run in self.prefect.runs("apart", "Crashed")}
            return every <= crashed | set(dues())

        wait_until(is_complete, PATIENCE, "every tick to begin")
        begun = dues()
        assert len(begun) == len(set(begun))


@pytest.fixture(scope="module")
def cluster(project: Project, prefect: Prefect, prefect_api: PrefectServer) -> Iterator[Cluster]:
    """The job, and the ways to it."""
    ensure_work_pool(project.pool, Domain(liveness_check_interval=LEASE, heartbeat_frequency=0.5))
    project.write("flows/apart.py", FLOWS.format(interval=INTERVAL))
    project.deploy()
    with ApiProxy(prefect_api.port).running() as one, ApiProxy(prefect_api.port).running() as other:
        yield Cluster(project, prefect, {ONE: one, OTHER: other, THIRD: one})


@pytest.fixture(scope="module")
def one(cluster: Cluster) -> Iterator[Program]:
    """The node that is active at first."""
    with cluster.agent(ONE) as node:
        cluster.begun(2, ONE)
        yield node


@pytest.fixture(scope="module")
def other(cluster: Cluster, one: Program) -> Iterator[Program]:
    """Its standby."""
    with cluster.agent(OTHER) as node:
        yield node


def wait_for_line(node: Program, line: str, times: int) -> None:
    """Wait until a node has said something so many times."""
    wait_until(lambda: node.output().count(line) >= times, PATIENCE, f"{line!r} in the log")


@holder_goes_on
@pytest.mark.parametrize("how", ["refuses", "silent"])
def test_a_node_that_has_lost_its_way_to_the_api_leaves_its_group(
    cluster: Cluster, one: Program, other: Program, how: str
) -> None:
    """The standby has it after a lease, and why; when the way is back the node stands by again."""
    cluster.give_to(ONE)
    cluster.begun(2, ONE)
    times = one.output().count("takes part in its groups")
    left = one.output().count("This node cannot look for runs, and leaves its groups to others")
    with cluster.cut(how, ONE) as since:
        why = cluster.wait_for_holder(OTHER)
        first = cluster.begun(3, OTHER)[-3]
        assert f"node {ONE!r} gave it up: it cannot look for runs: " in why
        print(f"{how}: the standby's first tick {first.at - since:.1f} s after the cut")
    wait_for_line(one, "This node can run jobs again, and takes part in its groups.", times + 1)
    assert one.output().count("This node cannot look for runs, and leaves its groups to others") == left + 1
    cluster.give_to(ONE)
    cluster.begun(2, ONE)
    cluster.assert_each_once()


@holder_goes_on
def test_a_body_that_goes_on_may_end_first(cluster: Cluster, one: Program, other: Program) -> None:
    """The group is not taken from it; what became of it is told when the way is back."""
    held = cluster.project.folder / "held"
    held.unlink(missing_ok=True)
    cluster.give_to(ONE)
    held.touch()
    times = one.output().count("and leaves its groups to others")
    again = one.output().count("This node can run jobs again")
    before = len(cluster.project.entries("apart"))
    cluster.begun(1, ONE)
    with cluster.cut("refuses", ONE):
        wait_for_line(one, "and leaves its groups to others", times + 1)
        time.sleep(2 * LEASE)  # nothing is to happen meanwhile
        assert cluster.group()[0] == ONE
        held.unlink()
        cluster.wait_for_holder(OTHER)
        cluster.begun(3, OTHER)
    wait_for_line(one, "This node can run jobs again", again + 1)
    entries = cluster.project.entries("apart")[before:]
    ended = [entry["due"] for entry in entries if entry.what == "ended"]
    begun = [entry["due"] for entry in entries if entry.what == "began" and entry["node"] == ONE]
    assert set(begun) <= set(ended), "none was ended in the middle"
    cluster.assert_each_once()


@holder_goes_on
def test_an_api_that_is_away_for_all_leaves_the_group_to_nobody(
    cluster: Cluster, one: Program, other: Program
) -> None:
    """Nor does the group go around; when it is back some node runs every tick that waited."""
    terms = [node.output().count("active for apart in term") for node in (one, other)]
    with cluster.cut("refuses", ONE, OTHER):
        cluster.wait_for_holder(None)
        time.sleep(2 * LEASE)  # nothing is to happen meanwhile
        assert cluster.group()[0] is None
        assert [node.output().count("active for apart in term") for node in (one, other)] == terms
    holder = wait_until(lambda: cluster.group()[0], PATIENCE, "somebody to hold the group")
    cluster.begun(6, holder)
    cluster.assert_each_once()


def test_a_takeover_that_hangs_is_left_to_another(cluster: Cluster, one: Program, other: Program) -> None:
    """The standby is silent for the API, and does not know it when the holder dies."""
    cluster.give_to(ONE)
    with cluster.cut("silent", OTHER) as since:
        one.kill()
        cluster.wait_for_holder(OTHER)
        with cluster.agent(THIRD):
            cluster.wait_for_holder(THIRD)
            print(f"taken from the one that hangs {time.time() - since:.1f} s after the cut")
            cluster.begun(6, THIRD)
    cluster.assert_each_once()
