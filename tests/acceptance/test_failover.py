"""Three agents, one of them active: killed, stopped, frozen and cut off, and judged by a ledger table."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine, text

from deployments.local import wait_until
from taskadapter.coordination import schema
from tests.acceptance.cluster import BUSY, INTERVAL, Cluster, message
from tests.acceptance.project import Project
from tests.contract.conftest import SERVERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deployments.local import Postgres, PrefectServer
    from tests.acceptance.project import Prefect

TAKEOVER = INTERVAL + 1
"""Seconds from a holder's death until another node must hold its token."""

API = 2
"""Seconds more until that node must execute something: Prefect's API is asked what was left behind."""

HANDOVER = 1
"""Seconds from a release until another node must hold the token."""

everywhere = pytest.mark.parametrize("cluster", SERVERS, indirect=True, scope="module")
on_postgresql = pytest.mark.parametrize("cluster", ["postgresql"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest,
    prefect_api: PrefectServer,
    prefect: Prefect,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """Three agents that take part, one of them active for both groups; each test leaves them running."""
    kind = request.param
    folder = tmp_path_factory.mktemp(f"failover-{kind}")
    cluster = Cluster(
        request.getfixturevalue(f"{kind}_database"),
        Project(folder, prefect_api, f"failover-{kind}"),
        prefect,
    )
    try:
        cluster.prepare()
        for name in ("node-1", "node-2", "node-3"):
            cluster.add_node(name)
        cluster.project.deploy()
        cluster.ready(nodes=3)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def postgresql_database(postgres_server: Postgres) -> str:
    """The URL of an empty database."""
    postgres_server.create_database("failover")
    return postgres_server.url("failover")


@pytest.fixture(scope="module")
def mysql_database() -> str:
    """The URL of a database without our tables."""
    url = os.environ["TASKADAPTER_TEST_MYSQL_URL"]
    engine = create_engine(url)
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS ledger"))
    engine.dispose()
    return url


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that is not there yet: flows that were told to go on until then go on."""
    return tmp_path / "enough"


def said(what: str, seconds: float) -> None:
    """Show a measured time, with `pytest -s`."""
    print(f"{what}: {seconds:.2f} s")


# --- P2, P6: the active node is killed ------------------------------------------------------------


@everywhere
def test_a_killed_node_is_replaced_in_time(cluster: Cluster) -> None:
    """A standby holds the token within the interval and a second, and soon after that executes."""
    cluster.ready()
    dead, term, killed = cluster.active(), cluster.term(), cluster.now()
    dead.program.kill()
    tenure = cluster.wait_for_term(term)
    first = cluster.wait_for_execution(tenure.term)
    dead.program.start()

    assert tenure.node != dead.name
    said("takeover, token", tenure.acquired - killed)
    said("takeover, first execution", first.began - killed)
    assert tenure.acquired - killed <= TAKEOVER
    assert first.began - killed <= TAKEOVER + API


@everywhere
def test_a_killed_node_loses_nothing(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """What it was executing shows as Crashed and why, or runs again if so declared; all else runs once."""
    cluster.ready()
    slow, again = cluster.start("slow", gate), cluster.start("again", gate)
    dead, term, killed = cluster.active(), cluster.term(), cluster.now()
    dead.program.kill()
    gate.touch()
    successor = cluster.wait_for_term(term)
    ended = prefect.wait_for_end(slow)
    rerun = prefect.wait_for_end(again)
    cluster.wait_for_ticks(killed + TAKEOVER)
    dead.program.start()

    assert ended.state_name == "Crashed"
    assert repr(dead.name) in message(ended)
    assert f"term {term} " in message(ended)
    assert [(row.term, row.ended) for row in cluster.rows(run=slow)] == [(term, None)]

    assert rerun.state_name == "Completed"
    assert [row.term for row in cluster.rows(run=again)] == [term, successor.term]
    assert [row.ended is None for row in cluster.rows(run=again)] == [True, False]

    counted = cluster.counted()
    assert counted == list(range(1, len(counted) + 1))
    assert cluster.lost_ticks() == []
    assert cluster.doubled() == []


# --- P4: the active node is told to stop ----------------------------------------------------------


@everywhere
def test_a_stopping_node_hands_over(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """On SIGTERM it lets a body end, starts nothing more, releases, and a standby takes over at once."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    stopping, term, told = cluster.active(), cluster.term(), cluster.now()
    stopping.signal(signal.SIGTERM)
    wait_until(lambda: "may still end" in stopping.log[-2000:], 10, "the node to drain")
    drained = cluster.now()
    gate.touch()
    status = stopping.wait_for_exit()
    successor = cluster.wait_for_term(term)
    released = cluster.tenures()[-2].released
    stopping.program.start()

    assert status == 0
    (row,) = cluster.rows(run=slow)
    assert row.ended is not None
    assert row.ended >= drained > told
    assert prefect.wait_for_end(slow).state_name == "Completed"
    assert released is not None
    said("handover, token", successor.acquired - released)
    assert row.ended <= released <= successor.acquired <= released + HANDOVER
    first = cluster.wait_for_execution(successor.term)
    said("handover, first execution", first.began - released)
    assert first.began <= released + HANDOVER + API
    cluster.wait_for_ticks(released)
    assert cluster.lost_ticks() == []


@everywhere
def test_a_node_that_is_asked_to_resign_hands_over(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """`taskadapter resign` has the active node let its body end, release, and stand by."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    resigning, term, pid = cluster.active(), cluster.term(), cluster.active().program.pid
    output = cluster.taskadapter("resign", BUSY)
    gate.touch()
    successor = cluster.wait_for_term(term)
    first = cluster.wait_for_execution(successor.term)

    assert resigning.name in output
    assert successor.node != resigning.name
    (row,) = cluster.rows(run=slow)
    released = cluster.tenures()[-2].released
    assert row.ended is not None
    assert released is not None
    said("resignation, token", successor.acquired - released)
    said("resignation, first execution", first.began - released)
    assert row.ended <= released <= successor.acquired <= released + HANDOVER
    assert prefect.wait_for_end(slow).state_name == "Completed"
    assert resigning.program.pid == pid


# --- P1: at the end, over all that has happened -----------------------------------------------------


@everywhere
def test_executions_of_two_terms_never_overlap(cluster: Cluster) -> None:
    """Over everything above: terms only rise, none overlaps the next, and no tick is started twice."""
    terms = [row.term for row in cluster.rows() if row.job != "hourly" and row.term not in cluster.paused]
    assert terms == sorted(terms)
    assert len(set(terms)) > 3
    assert cluster.overlapping() == []
    assert cluster.doubled() == []
