"""Three agents, one of them active: killed, stopped, frozen and cut off, and judged by a ledger table.

How soon a token is taken is a promise, and is measured: on a machine that wakes a watch up late, standbys
are given as much more time as that. A lease of three seconds is lost where the machine stands still for
longer, as it is to be: a test of what a holder does that keeps it is repeated then. What must never be is
judged anyhow.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey
from prefect.events.filters import EventFilter, EventNameFilter
from psycopg import sql
from sqlalchemy import create_engine, make_url, text

from deployments.local import wait_until
from taskadapter.coordination import schema
from tests.acceptance.cluster import BUSY, IDLE, INTERVAL, MARGIN, Cluster, message
from tests.acceptance.project import PATIENCE, Project, is_alive
from tests.contract.conftest import SERVERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Postgres, PrefectServer
    from tests.acceptance.cluster import Row, Tenure
    from tests.acceptance.project import Prefect

TAKEOVER = INTERVAL + 1
"""Seconds from a holder's death until another node must hold its token."""

HANDOVER = 1
"""Seconds from a release until another node must hold the token."""

TURNS = int(os.environ.get("TASKADAPTER_TEST_TURNS", "4"))
"""How often in a row a node is killed, or stopped."""

AT_ONCE = 15
"""Of the 30 seconds that runs have to end, those within which a node that is told twice has released."""

holder_goes_on = pytest.mark.undisturbed(MARGIN)
"""Of tests in which a node keeps its token until it is made to give it up."""

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
def mysql_database(mysql_url: str) -> str:
    """The URL of a database without our tables."""
    engine = create_engine(mysql_url)
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE IF EXISTS ledger"))
    engine.dispose()
    return mysql_url


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that is not there yet: flows that were told to go on until then go on."""
    return tmp_path / "enough"


def is_stopped(row: Row) -> bool:
    """Return whether the process of an execution has had SIGSTOP."""
    return psutil.Process(row.pid).status() == psutil.STATUS_STOPPED


def said(what: str, seconds: float) -> None:
    """Show a measured time, with `pytest -s`."""
    print(f"{what}: {seconds:.2f} s")


# --- P2, P6: the active node is killed ------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """The node that was killed, when it was dead, its term and successor; what it was executing then."""

    node: str
    term: int
    at: float
    successor: Tenure
    slow: FlowRun
    again: FlowRun
    brink: FlowRun


@pytest.fixture(scope="module")
def death(cluster: Cluster, prefect: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Death:
    """The active node is killed while it executes three runs and others are due."""
    cluster.ready()
    gate = tmp_path_factory.mktemp("death") / "enough"
    slow, again, brink = cluster.start("slow", gate), cluster.start("again", gate), prefect.start("brink")
    wait_until(lambda: any(map(is_stopped, cluster.rows(run=brink))), PATIENCE, "a state to be saved")
    dead, term = cluster.active(), cluster.term()
    dead.program.kill()
    now = cluster.now()
    gate.touch()
    successor = cluster.wait_for_term(term)
    cluster.wait_for_ticks(now + TAKEOVER)
    dead.program.start()
    return Death(dead.name, term, now, successor, slow, again, brink)


@everywhere
def test_a_killed_node_is_replaced_in_time(cluster: Cluster, death: Death) -> None:
    """A standby holds the token within the interval and a second, and executes (`make bench`: how soon)."""
    first = cluster.wait_for_execution(death.successor.term)
    said("takeover, token", death.successor.acquired - death.at)
    said("takeover, first execution", first.began - death.at)
    assert death.successor.node != death.node
    assert death.successor.acquired - death.at <= TAKEOVER + cluster.slowness.since(death.at)
    assert first.began >= death.successor.acquired


@everywhere
def test_what_a_killed_node_was_executing_shows_as_crashed(
    cluster: Cluster, prefect: Prefect, death: Death
) -> None:
    """It is not started again, and the UI says which node executed it, in which term."""
    ended = prefect.wait_for_end(death.slow)
    assert ended.state_name == "Crashed"
    assert repr(death.node) in message(ended)
    assert f"term {death.term} " in message(ended)
    assert [(row.term, row.ended) for row in cluster.rows(run=death.slow)] == [(death.term, None)]


@everywhere
def test_what_a_killed_node_was_executing_runs_again_if_so_declared(
    cluster: Cluster, prefect: Prefect, death: Death
) -> None:
    """With `on_takeover="rerun"` its successor executes it once more, to its end."""
    assert prefect.wait_for_end(death.again).state_name == "Completed"
    rows = cluster.rows(run=death.again)
    assert [row.term for row in rows] == [death.term, death.successor.term]
    assert [row.ended is None for row in rows] == [True, False]


@everywhere
def test_a_run_whose_state_was_saved_is_not_run_again(
    cluster: Cluster, prefect: Prefect, death: Death
) -> None:
    """A node that dies before it can tell Prefect of a run's end leaves it ended, and Completed."""
    assert prefect.wait_for_end(death.brink).state_name == "Completed"
    assert [row.term for row in cluster.rows(run=death.brink)] == [death.term]


@everywhere
def test_a_killed_node_loses_nothing(cluster: Cluster, death: Death) -> None:
    """The counter goes on without a gap or a repetition, and no tick is without a run."""
    counted = cluster.counted()
    assert counted == list(range(1, len(counted) + 1))
    assert cluster.lost_ticks() == []
    assert cluster.doubled() == []


# --- P4: the active node is told to stop ----------------------------------------------------------


@everywhere
@holder_goes_on
def test_a_stopping_node_hands_over(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """On SIGTERM it lets a body end, starts nothing more, releases, and a standby takes over at once."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    stopping, term, told = cluster.active(), cluster.term(), cluster.now()
    stopping.drain()
    drained = cluster.now()
    gate.touch()
    status = stopping.wait_for_exit()
    successor = cluster.wait_for_term(term)
    released = release_of(cluster, term)
    late = cluster.slowness.since(released or told)
    stopping.program.start()

    assert status == 0
    (row,) = cluster.rows(run=slow)
    assert row.ended is not None
    assert row.ended >= drained > told
    assert prefect.wait_for_end(slow).state_name == "Completed"
    assert released is not None
    said("handover, token", successor.acquired - released)
    assert row.ended <= released <= successor.acquired <= released + HANDOVER + late
    first = cluster.wait_for_execution(successor.term)
    said("handover, first execution", first.began - released)
    cluster.wait_for_ticks(released)
    assert cluster.lost_ticks() == []


@everywhere
@holder_goes_on
def test_a_node_that_is_asked_to_resign_hands_over(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """`taskadapter resign` has the active node let its body end, release, and stand by."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    resigning, term, pid = cluster.active(), cluster.term(), cluster.active().program.pid
    output = cluster.taskadapter("resign", BUSY)
    gate.touch()
    successor = cluster.wait_for_term(term)
    released = release_of(cluster, term)
    late = cluster.slowness.since(released or 0.0)
    first = cluster.wait_for_execution(successor.term)

    assert resigning.name in output
    assert successor.node != resigning.name
    (row,) = cluster.rows(run=slow)
    assert row.ended is not None
    assert released is not None
    said("resignation, token", successor.acquired - released)
    said("resignation, first execution", first.began - released)
    assert row.ended <= released <= successor.acquired <= released + HANDOVER + late
    assert prefect.wait_for_end(slow).state_name == "Completed"
    assert resigning.program.pid == pid


@on_postgresql
@holder_goes_on
def test_a_second_signal_stops_a_node_at_once(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """It ends the bodies, which show as Crashed, and still releases the token."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    stopping, term = cluster.active(), cluster.term()
    stopping.drain()
    second = cluster.now()
    stopping.signal(signal.SIGTERM)
    stopping.wait_for_exit()
    successor = cluster.wait_for_term(term)
    released = release_of(cluster, term)
    late = cluster.slowness.since(second)
    stopping.program.start()

    assert released is not None
    said("second signal, release", released - second)
    assert released - second < AT_ONCE + late
    assert successor.acquired <= released + HANDOVER + late
    assert prefect.wait_for_end(slow).state_name == "Crashed"
    (row,) = cluster.rows(run=slow)
    assert row.ended is None
    assert row.last < released


@on_postgresql
@holder_goes_on
def test_a_second_signal_gives_back_what_has_not_begun(cluster: Cluster, prefect: Prefect) -> None:
    """A run whose process still imports its flow then is run by the next node."""
    cluster.ready()
    wait = cluster.project.folder / "flows" / "wait"
    wait.touch()
    run = prefect.start("heavy")
    wait_until(
        lambda: prefect.client.read_flow_run(run.id).state_name == "Pending", PATIENCE, "it to be claimed"
    )
    stopping, term = cluster.active(), cluster.term()
    stopping.drain()
    stopping.signal(signal.SIGTERM)
    stopping.wait_for_exit()
    wait.unlink()
    successor = cluster.wait_for_term(term)
    ended = prefect.wait_for_end(run)
    stopping.program.start()

    assert ended.state_name == "Completed"
    assert [row.term for row in cluster.rows(run=run)] == [successor.term]


def release_of(cluster: Cluster, term: int) -> float | None:
    """Return when the busy group's token was released in a term, None if it was not."""
    return next(tenure.released for tenure in cluster.tenures() if tenure.term == term)


# --- P3: again and again --------------------------------------------------------------------------


@on_postgresql
@holder_goes_on
def test_failing_over_back_and_forth_works_as_well_as_once(cluster: Cluster) -> None:
    """Killed and stopped in turn, each node is replaced in time, whatever the interval of its jobs."""
    for turn in range(TURNS):
        cluster.ready()
        kills = turn % 2 == 0
        # The hourly job has no tick due: its token moves all the same.
        leaving = cluster.active(IDLE if kills else BUSY)
        before = {group: cluster.term(group) for group in (BUSY, IDLE) if cluster.active(group) is leaving}
        told = cluster.now()
        if kills:
            leaving.program.kill()
        else:
            leaving.signal(signal.SIGTERM)
            leaving.wait_for_exit()
        dead = cluster.now()
        successors = {group: cluster.wait_for_term(term, group) for group, term in before.items()}
        late = cluster.slowness.since(told)
        leaving.program.start()
        for group, term in before.items():
            successor = successors[group]
            released = next(was.released for was in cluster.tenures(group) if was.term == term)
            assert (released is None) == kills
            limit = dead + TAKEOVER if released is None else released + HANDOVER
            said(f"turn {turn}, {group}", successor.acquired - (released or dead))
            assert successor.acquired <= limit + late
            assert successor.node != leaving.name
    cluster.wait_for_ticks(cluster.now())

    counted = cluster.counted()
    assert counted == list(range(1, len(counted) + 1))
    assert cluster.lost_ticks() == []
    assert cluster.rows("hourly") == []


# --- P5: the active node is frozen, and wakes up ----------------------------------------------------


@everywhere
@holder_goes_on
def test_a_frozen_node_cannot_write_after_its_successor(
    cluster: Cluster, prefect: Prefect, gate: Path
) -> None:
    """When it wakes up, `fenced` refuses its bodies or its hosts are ended, and it stands by."""
    cluster.ready()
    slow, fencer = cluster.start("slow", gate), cluster.start("fencer", gate)
    frozen, term, pid = cluster.active(), cluster.term(), cluster.active().program.pid
    cluster.paused.add(term)
    frozen.program.pause()
    now = cluster.now()
    try:
        successor = cluster.wait_for_term(term)
        late = cluster.slowness.since(now)
        cluster.wait_for_execution(successor.term)
        (fenced_before,) = cluster.rows(run=fencer)
        (slow_before,) = cluster.rows(run=slow)
    finally:
        frozen.program.resume()
    (refused,) = wait_until(
        lambda: [row for row in cluster.rows(run=fencer) if row.note], PATIENCE, "the token to be refused"
    )
    wait_until(lambda: not is_alive(slow_before.pid), PATIENCE, "the host of the other body to end")
    runs = [prefect.wait_for_end(run) for run in (slow, fencer)]
    cluster.ready(nodes=3)
    cluster.wait_for_ticks(cluster.now())

    said("takeover from a frozen node, token", successor.acquired - now)
    assert successor.acquired - now <= TAKEOVER + late
    assert refused.note == "TokenLostError"
    assert refused.alive == fenced_before.alive <= successor.acquired
    assert [(run.state_name, f"term {term} " in message(run)) for run in runs] == [("Crashed", True)] * 2
    assert frozen.program.pid == pid
    assert cluster.lost_ticks() == []
    assert cluster.doubled() == []


@on_postgresql
@holder_goes_on
def test_hosts_end_by_themselves_when_their_agent_is_frozen(
    cluster: Cluster, prefect: Prefect, gate: Path
) -> None:
    """At the deadline of the token, before a standby may start anything."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    frozen, term, pid = cluster.active(), cluster.term(), cluster.active().program.pid
    frozen.signal(signal.SIGSTOP)
    try:
        successor = cluster.wait_for_term(term)
        (row,) = cluster.rows(run=slow)
        wait_until(lambda: not is_alive(row.pid), PATIENCE, "the host to end")
        (row,) = cluster.rows(run=slow)
    finally:
        frozen.signal(signal.SIGCONT)

    assert row.last < successor.acquired
    assert successor.node != frozen.name
    assert prefect.wait_for_end(slow).state_name == "Crashed"
    cluster.ready(nodes=3)
    assert frozen.program.pid == pid


# --- P7: the database, and the API, are out of reach -------------------------------------------------


@on_postgresql
@holder_goes_on
def test_a_node_without_its_database_steps_down(cluster: Cluster, prefect: Prefect, gate: Path) -> None:
    """Its runs end before the next node starts some; it says why once, lives, and stands by again."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    lonely, term, pid = cluster.active(), cluster.term(), cluster.active().program.pid
    lines = len(lonely.log.splitlines())
    lonely.gate.freeze()
    now = cluster.now()
    try:
        successor = cluster.wait_for_term(term)
        late = cluster.slowness.since(now)
        cluster.wait_for_execution(successor.term)
    finally:
        lonely.gate.thaw()
    # What it had sent before it gave up arrives now, so that others see a heartbeat of it already.
    wait_until(
        lambda: any("answers again" in line for line in lonely.log.splitlines()[lines:]),
        PATIENCE,
        "the node to reach its database again",
    )
    ended = prefect.wait_for_end(slow)
    cluster.ready(nodes=3)

    (row,) = cluster.rows(run=slow)
    said("takeover from a cut off node, token", successor.acquired - now)
    assert row.last < successor.acquired <= now + TAKEOVER + late
    assert successor.node != lonely.name
    assert ended.state_name == "Crashed"
    assert repr(lonely.name) in message(ended)
    assert lonely.program.pid == pid
    told = [line for line in lonely.log.splitlines()[lines:] if f"{BUSY} after term {term}" in line]
    assert len(told) == 1
    assert "not confirmed in time" in told[0]
    assert len([line for line in lonely.log.splitlines()[lines:] if "answers again" in line]) == 1


@on_postgresql
@holder_goes_on
def test_nothing_runs_without_a_database_and_all_comes_back(cluster: Cluster) -> None:
    """Cut off from it, all nodes step down and live; when it returns, what was due meanwhile runs."""
    cluster.ready(nodes=3)
    pids = {name: node.program.pid for name, node in cluster.nodes.items()}
    term = cluster.term()
    for node in cluster.nodes.values():
        node.gate.cut()
    now = cluster.now()
    try:
        wait_until(lambda: cluster.now() > now + INTERVAL + 2, PATIENCE, "the interval to pass")
        last = max(row.last for row in cluster.rows())
    finally:
        back = cluster.now()
        for node in cluster.nodes.values():
            node.gate.thaw()
    successor = cluster.wait_for_term(term)
    late = cluster.slowness.since(back)
    cluster.wait_for_ticks(back)

    assert last < now + INTERVAL
    said("after the database's return, token", successor.acquired - back)
    assert successor.acquired - back <= TAKEOVER + late
    assert {name: node.program.pid for name, node in cluster.nodes.items()} == pids
    assert cluster.lost_ticks() == []
    assert cluster.doubled() == []


@on_postgresql
@holder_goes_on
def test_agents_outlive_prefects_api(
    cluster: Cluster, prefect: Prefect, prefect_api: PrefectServer, gate: Path
) -> None:
    """A body goes on without it, and keeps the group; when it returns, what was due meanwhile runs."""
    cluster.ready()
    slow = cluster.start("slow", gate)
    pids = {name: node.program.pid for name, node in cluster.nodes.items()}
    term = cluster.term()
    try:
        prefect_api.stop()
        down = cluster.now()
        wait_until(lambda: cluster.now() > down + INTERVAL, PATIENCE, "some ticks to be due")
    finally:
        prefect_api.start()
    (row,) = cluster.rows(run=slow)
    cluster.wait_for_ticks(cluster.now())

    assert row.alive > down + INTERVAL - 1
    assert cluster.term() == term
    gate.touch()
    assert prefect.wait_for_end(slow).state_name == "Completed"
    assert {name: node.program.pid for name, node in cluster.nodes.items()} == pids
    assert cluster.lost_ticks() == []
    assert cluster.doubled() == []


# --- what is shown --------------------------------------------------------------------------------


@everywhere
@holder_goes_on
def test_the_status_shows_who_is_active(cluster: Cluster) -> None:
    """`taskadapter status` and `status --json` name groups, terms and nodes, by the pool's own settings."""
    cluster.ready(nodes=3)
    shown = json.loads(cluster.taskadapter("status", "--json"))
    table = cluster.taskadapter("status")

    groups = {group["group_id"]: group for group in shown["groups"]}
    assert set(groups) == {BUSY, IDLE}
    assert groups[BUSY]["holder"] == cluster.active().name
    assert groups[BUSY]["term"] == cluster.term()
    assert 0 <= groups[BUSY]["heartbeat_age"] < INTERVAL
    assert 0 < groups[BUSY]["expires_in"] <= INTERVAL
    assert {node["task_id"] for node in shown["nodes"]} == set(cluster.nodes)
    pids = {node["task_id"]: node["pid"] for node in shown["nodes"]}
    assert pids == {name: node.program.pid for name, node in cluster.nodes.items()}
    assert all(name in table for name in (BUSY, IDLE, *cluster.nodes))


@on_postgresql
def test_the_tables_can_be_made_and_widened_from_the_shell(cluster: Cluster) -> None:
    """`db sql` prints what makes them elsewhere; `db upgrade`, and `init` in it, leave good ones alone."""
    script, widened = cluster.taskadapter("db", "sql"), cluster.taskadapter("db", "upgrade")
    assert all(f"CREATE TABLE IF NOT EXISTS {name} " in script for name in schema.metadata.tables)
    assert "All tables are there." in widened
    assert "ALTER" not in widened


@on_postgresql
def test_the_ui_names_the_active_node(cluster: Cluster, prefect: Prefect) -> None:
    """The descriptions of queue and pool, and an artifact, name the active node, its term, the others."""
    pool = cluster.project.pool
    ours = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[f"taskadapter-{pool}"]))

    def told() -> bool:
        tenure = cluster.tenures()[-1]
        others = ", ".join(sorted(set(cluster.nodes) - {tenure.node}))
        wanted = f"Active: {tenure.node}, term {tenure.term}, since "
        queue = prefect.client.read_work_queue_by_name(BUSY, pool)
        described = prefect.client.read_work_pool(pool).description or ""
        artifacts = prefect.client.read_latest_artifacts(artifact_filter=ours)
        return (
            str(queue.description).startswith(wanted)
            and str(queue.description).endswith(f"Standing by: {others}.")
            and f"• {BUSY}: {wanted}" in described
            and any(f"| {BUSY} | {tenure.node} | {tenure.term} |" in str(one.data) for one in artifacts)
        )

    wait_until(told, PATIENCE, "the UI to show who is active")


@on_postgresql
def test_each_change_of_the_token_is_an_event(cluster: Cluster, prefect: Prefect) -> None:
    """The server has an event for each token that was acquired, lost and released, with its reason."""
    tenures = cluster.tenures()
    released = {tenure.term for tenure in tenures if tenure.released is not None}
    ours = EventFilter(event=EventNameFilter(prefix=["taskadapter.token."]))

    def seen() -> dict[str, set[int]]:
        terms: dict[str, set[int]] = {"acquired": set(), "lost": set(), "released": set()}
        page = prefect.client.read_events(filter=ours, limit=50)
        while True:
            for event in page.events:
                if event.resource.name == BUSY and event.payload["reason"]:
                    what = event.event.removeprefix("taskadapter.token.")
                    terms[what].add(int(event.resource["taskadapter.term"]))
            if page.next_page is None:
                return terms
            page = prefect.client.read_events_page(str(page.next_page))

    def told() -> bool:
        terms = seen()
        is_complete = tenures[-1].term in terms["acquired"] and released <= terms["released"]
        return all(terms.values()) and is_complete

    wait_until(told, PATIENCE, "the events to arrive")


@on_postgresql
def test_the_password_is_nowhere(cluster: Cluster, postgres_server: Postgres) -> None:
    """It is in no agent's log, no rendered file, and no row of Prefect's database, unencrypted."""
    password = make_url(cluster.url).password
    assert password is not None
    cluster.project.render()
    places = {name: node.log for name, node in cluster.nodes.items()}
    places["prefect.yaml"] = (cluster.project.folder / "prefect.yaml").read_text()
    assert [place for place, content in places.items() if password in content] == []

    with postgres_server.connect("prefect") as connection:
        tables = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        ).fetchall()
        found = [
            name
            for (name,) in tables
            if connection.execute(
                sql.SQL("SELECT 1 FROM {} AS entry WHERE entry::text LIKE %s LIMIT 1").format(
                    sql.Identifier(name)
                ),
                [f"%{password}%"],
            ).fetchone()
        ]
    assert {"log", "deployment", "work_pool", "block_document"} <= {name for (name,) in tables}
    assert found == []


# --- who may not take part ------------------------------------------------------------------------


@on_postgresql
@holder_goes_on
def test_a_second_agent_of_the_same_name_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """It names the process that has the name, and exits with an error; the first one goes on."""
    first = cluster.active()
    term, pid = cluster.term(), first.program.pid
    env = {
        "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": cluster.url,
        "PREFECT_HOME": str(tmp_path),  # for a log of its own
    }
    with cluster.project.agent(first.name, env=env) as second:
        assert second.process is not None
        status = second.process.wait(PATIENCE)
        output = second.output()

    assert status != 0
    assert f"process {pid} on host" in output
    assert repr(first.name) in output
    assert first.program.pid == pid
    assert cluster.term() == term


@on_postgresql
def test_another_kind_of_worker_runs_no_coordinated_job(cluster: Cluster, prefect: Prefect) -> None:
    """A run that Prefect's process worker starts fails, and says how to start it."""
    client = prefect.client
    client.create_work_pool(WorkPoolCreate(name="plain", type="process"))
    deployed = prefect.deployment("slow")
    client.create_deployment(
        deployed.flow_id,
        "elsewhere",
        entrypoint=deployed.entrypoint,
        path=str(cluster.project.folder),
        work_pool_name="plain",
    )
    run = prefect.start("slow/elsewhere")
    cluster.project.prefect("worker", "start", "--run-once", "--pool", "plain", "--type", "process")

    ended = prefect.wait_for_end(run)
    assert ended.state_name == "Failed"
    assert "--type warm-backup" in message(ended)
    assert cluster.rows(run=run) == []


# --- P1: at the end, over all that has happened -----------------------------------------------------


@everywhere
def test_executions_of_two_terms_never_overlap(cluster: Cluster) -> None:
    """Over everything above: terms only rise, none overlaps the next, and no tick is started twice."""
    terms = [row.term for row in cluster.in_order()]
    assert terms
    assert terms == sorted(terms)
    assert cluster.dialect != "postgresql" or len(cluster.tenures()) > 10
    assert cluster.overlapping() == []
    assert cluster.doubled() == []
