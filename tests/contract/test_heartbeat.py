"""Nodes that take part, on every database: real threads, real connections, short intervals.

A machine that stands still for longer than the margin of so short a lease may cost a node its token, as it
is to be; what a test then wants to see of a node that keeps it is not there, and the test is repeated.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, text

from deployments.local import wait_until
from taskadapter.coordination import schema
from taskadapter.coordination.board import NEVER, DeadlineBoard, clock
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.heartbeat import Change, Heartbeat
from taskadapter.coordination.messages import Gained, Lost, Refused, ResignAsked, Stopped, Token
from taskadapter.coordination.overview import read_status
from taskadapter.coordination.tokens import request_resign
from tests.contract.proxy import Proxy
from tests.slowness import Slowness

GROUP = "group"
INTERVAL, FREQUENCY = 1.5, 0.25
PATIENCE = 120.0
"""Seconds for what comes in the end."""

pytestmark = pytest.mark.undisturbed(0.2)


class Node:
    """A heartbeat, and what it told."""

    def __init__(self, database: Any, task_id: str, groups: list[str], **timing: float) -> None:
        self.changes: list[Change] = []
        self.told: list[float] = []
        self.deadlines: dict[Token, float] = {}
        self.beats = 0
        self._changed = threading.Condition()
        options: dict[str, Any] = {
            "liveness_check_interval": INTERVAL,
            "heartbeat_frequency": FREQUENCY,
            **timing,
        }
        self.heartbeat = Heartbeat(
            database,
            task_id=task_id,
            group_ids=groups,
            tell=self._hear,
            publish=self.deadlines.__setitem__,
            beat=self._count,
            **options,
        )
        self.heartbeat.start()

    def _count(self, _: float) -> None:
        self.beats += 1

    def wait_for_beats(self, count: int) -> None:
        """Wait until so many more heartbeats were answered."""
        before = self.beats
        wait_until(lambda: self.beats >= before + count, PATIENCE, f"{count} heartbeats")

    def _hear(self, change: Change) -> None:
        with self._changed:
            self.changes.append(change)
            self.told.append(time.monotonic())
            self._changed.notify_all()

    def wait_for(self, kind: type, *, count: int = 1, timeout: float = PATIENCE) -> float:
        """Wait until so many changes of a kind were told, and return how long that took."""
        start = time.monotonic()
        with self._changed:
            assert self._changed.wait_for(
                lambda: sum(isinstance(c, kind) for c in self.changes) >= count, timeout
            ), f"no {kind.__name__} in {self.changes}"
        return time.monotonic() - start

    def when(self, kind: type) -> float:
        """Return when the first change of a kind was told, on the monotonic clock."""
        return next(
            at for at, change in zip(self.told, self.changes, strict=True) if isinstance(change, kind)
        )

    def last(self, kind: type) -> Any:
        return [change for change in self.changes if isinstance(change, kind)][-1]


Start = Callable[..., Node]


@pytest.fixture
def start(engine: Engine) -> Iterator[Start]:
    """Start nodes on a database; all are stopped in the end."""
    nodes: list[Node] = []

    def run(task_id: str, groups: tuple[str, ...] = (GROUP,), database: Any = None, **t: float) -> Node:
        nodes.append(Node(database or engine.url, task_id, list(groups), **t))
        return nodes[-1]

    yield run
    for node in nodes:
        node.heartbeat.stop(PATIENCE)


@pytest.fixture
def proxy(engine: Engine) -> Iterator[Proxy]:
    """A way to the server that can be blocked."""
    port = engine.url.port or {"postgresql": 5432, "mysql": 3306}[engine.dialect.name]
    between = Proxy(engine.url.host or "127.0.0.1", port)
    yield between
    between.close()


def through(engine: Engine, proxy: Proxy) -> Any:
    return engine.url.set(host="127.0.0.1", port=proxy.port)


def fail_again(proxy: Proxy) -> None:
    """Wait until a node has failed some more: it makes a new connection after each fault."""
    before = proxy.connections
    wait_until(lambda: proxy.connections >= before + 3, PATIENCE, "more faults")


def test_one_is_active_and_hands_over(start: Start, slowness: Slowness) -> None:
    """The first node becomes active, the second stands by, and is active soon after it stops."""
    first = start("node-1")
    first.wait_for(Gained)
    second = start("node-2")
    wait_until(lambda: second.heartbeat.registered, PATIENCE, "the second one to stand by")
    token = first.heartbeat.token(GROUP)
    assert token == Token(GROUP, "node-1", 1)
    assert second.heartbeat.token(GROUP) is None
    asked = time.time()
    assert first.heartbeat.stop(PATIENCE)
    assert second.wait_for(Gained) < 1 + slowness.since(asked)
    assert second.last(Gained).reason == "it was released"
    assert second.heartbeat.token(GROUP) == Token(GROUP, "node-2", 2)
    assert first.deadlines[token] == NEVER
    assert [type(change) for change in first.changes] == [Gained, Lost, Stopped]
    assert first.last(Lost).asked


@pytest.mark.databases("postgresql")
def test_a_release_is_noticed_at_once(start: Start) -> None:
    """A standby does not wait for its next look, which is half a minute away."""
    rarely = {"heartbeat_frequency": 30.0, "liveness_check_interval": 300.0}
    first = start("node-1", **rarely)
    first.wait_for(Gained)
    second = start("node-2", **rarely)
    wait_until(lambda: second.heartbeat.registered and second.beats, PATIENCE, "the second one to stand by")
    assert first.heartbeat.stop(PATIENCE)
    assert second.wait_for(Gained) < 15


def test_deadlines_are_published(start: Start) -> None:
    """While a node is active the deadline it shows lies ahead, and moves."""
    node = start("node-1")
    node.wait_for(Gained)
    token = node.last(Gained).token
    before = node.deadlines[token]
    wait_until(lambda: before < node.deadlines[token], PATIENCE, "the deadline to move")
    assert before < node.deadlines[token]
    assert clock() < node.deadlines[token] < clock() + INTERVAL


def test_a_board_can_be_plugged_in(engine: Engine, tmp_path: Any) -> None:
    """`DeadlineBoard.write` is what a heartbeat publishes to."""
    gained = threading.Event()
    with DeadlineBoard.create(tmp_path / "board") as board:
        heartbeat = Heartbeat(
            engine.url,
            task_id="node-1",
            group_ids=[GROUP],
            liveness_check_interval=INTERVAL,
            heartbeat_frequency=FREQUENCY,
            tell=lambda _: gained.set(),
            publish=board.write,
        )
        heartbeat.start()
        assert gained.wait(PATIENCE)
        token = heartbeat.token(GROUP)
        assert token is not None
        assert board.read(token) > clock()
        assert heartbeat.stop(PATIENCE)
        assert board.read(token) == NEVER


def test_a_second_process_with_the_name_is_refused(start: Start) -> None:
    """While a node lives, another with its name is refused, told why, and harms nothing."""
    first = start("node-1")
    first.wait_for(Gained)
    second = start("node-1")
    second.wait_for(Refused)
    assert "task_id 'node-1' is in use by process" in second.last(Refused).reason
    assert second.heartbeat.waits_for_its_predecessor
    assert second.heartbeat.registered == frozenset()
    assert second.heartbeat.stop(PATIENCE)
    assert first.heartbeat.token(GROUP) is not None
    assert len(first.changes) == 1


def test_resigning_on_request(start: Start, engine: Engine, slowness: Slowness) -> None:
    """Asked to resign, a node is told so, and hands over when its runs have ended."""
    first = start("node-1")
    first.wait_for(Gained)
    second = start("node-2")
    asked = time.time()
    with transaction(engine) as connection:
        request_resign(connection, GROUP)
    assert first.wait_for(ResignAsked) < 1 + slowness.since(asked)
    assert first.heartbeat.token(GROUP) is not None
    first.heartbeat.release(GROUP)
    second.wait_for(Gained)
    assert first.heartbeat.token(GROUP) is None


def test_groups_can_change(start: Start, engine: Engine) -> None:
    """A node takes on new groups and gives up old ones while it runs."""
    node = start("node-1", ("a", "b"))
    node.wait_for(Gained, count=2)
    node.heartbeat.join(["b", "c"])
    node.wait_for(Gained, count=3)
    held = [group for group in "abc" if node.heartbeat.token(group)]
    assert held == ["b", "c"]
    assert node.heartbeat.registered == {"b", "c"}
    wait_until(lambda: node.heartbeat.has_left("a"), PATIENCE, "the token of a to be released")
    assert not node.heartbeat.has_left("b")
    with transaction(engine) as connection:
        assert read_status(connection).nodes[0].group_ids == ("b", "c")


def test_a_node_can_leave_its_last_group(start: Start, engine: Engine) -> None:
    """It releases the token at once, goes on as a node of no group, and may join again."""
    node = start("node-1", ("a",))
    node.wait_for(Gained)
    node.heartbeat.join([])
    wait_until(lambda: node.heartbeat.has_left("a"), PATIENCE, "the token of a to be released")
    with transaction(engine) as connection:
        status = read_status(connection)
        assert [(group.holder, group.term) for group in status.groups] == [(None, 1)]
        assert [found.group_ids for found in status.nodes] == [()]
    node.heartbeat.join(["a"])
    node.wait_for(Gained, count=2)


def test_tables_are_made_if_missing(start: Start, engine: Engine) -> None:
    """A node that may creates the tables it needs."""
    from taskadapter.coordination import schema

    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
    start("node-1").wait_for(Gained)


@pytest.mark.databases("postgresql", "mysql")
@pytest.mark.parametrize("holds", [True, False])
def test_one_round_trip_each_heartbeat(start: Start, engine: Engine, proxy: Proxy, holds: bool) -> None:
    """However many groups a node has, and whether it is active or stands by."""
    groups = tuple(f"group-{number}" for number in range(20))
    timing = {"liveness_check_interval": 6.0, "heartbeat_frequency": 0.5}
    if not holds:
        start("node-1", groups, **timing).wait_for(Gained, count=len(groups))
    node = start("node-2", groups, database=through(engine, proxy), **timing)
    if holds:
        node.wait_for(Gained, count=len(groups))
    node.wait_for_beats(2)
    beats, asked = node.beats, proxy.asked
    node.wait_for_beats(4)
    # One is counted when it is sent, the other when its answer is there.
    assert abs(proxy.asked - asked - (node.beats - beats)) <= 1


@pytest.mark.databases("postgresql", "mysql")
@pytest.mark.slow
def test_a_database_far_away(start: Start, engine: Engine, proxy: Proxy) -> None:
    """A holder holds where all takes 0.3 s each way, and gets a second group there."""
    with engine.connect() as connection:
        schema.create_missing(connection)
    proxy.delay = 0.3
    timing = {"liveness_check_interval": 6.0, "heartbeat_frequency": 1.0}
    node = start("node-1", database=through(engine, proxy), **timing)
    node.wait_for(Gained)
    node.heartbeat.join([GROUP, "another"])
    node.wait_for(Gained, count=2)
    node.wait_for_beats(6)
    assert not any(isinstance(change, Lost) for change in node.changes)


class TestFaults:
    def test_a_hanging_call_does_not_delay_stepping_down(
        self, start: Start, engine: Engine, proxy: Proxy, slowness: Slowness
    ) -> None:
        """When the database freezes, the node steps down before a standby may start."""
        node = start("node-1", database=through(engine, proxy))
        node.wait_for(Gained)
        standby = start("node-2")
        wait_until(lambda: standby.heartbeat.registered, PATIENCE, "the standby")
        frozen = time.time()
        proxy.freeze()
        node.wait_for(Lost)
        assert not node.last(Lost).asked
        assert "not confirmed in time" in node.last(Lost).reason
        assert standby.wait_for(Gained) < INTERVAL + slowness.since(frozen)
        assert node.when(Lost) < standby.when(Gained)
        proxy.thaw()
        node.wait_for_beats(3)
        assert node.heartbeat.token(GROUP) is None
        assert standby.heartbeat.token(GROUP) is not None

    def test_comes_back_by_itself(
        self, start: Start, engine: Engine, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After a fault the node is active again, in a new term, and has said why once."""
        caplog.set_level(logging.INFO, "taskadapter.coordination")
        node = start("node-1", database=through(engine, proxy))
        node.wait_for(Gained)
        proxy.freeze()
        node.wait_for(Lost)
        fail_again(proxy)
        proxy.thaw()
        node.wait_for(Gained, count=2)
        assert node.last(Gained).token.term > node.changes[0].token.term
        messages = [r.getMessage() for r in caplog.records]
        assert sum("standby for group" in m for m in messages) == 1
        assert any("the database answers again" in m for m in messages)
        assert all("\n" not in m for m in messages)

    def test_keeps_its_connection(self, start: Start, engine: Engine, proxy: Proxy) -> None:
        """In normal work a node has one connection, and keeps it."""
        node = start("node-1", database=through(engine, proxy))
        node.wait_for(Gained)
        node.wait_for_beats(6)
        # SQLAlchemy makes no other for itself.
        assert proxy.connections == 1

    def test_a_database_that_is_down_at_first(self, engine: Engine, proxy: Proxy) -> None:
        """A node may start before its database, and stops although there is none."""
        url = through(engine, proxy)
        proxy.close()
        node = Node(url, "node-1", [GROUP])
        wait_until(lambda: node.heartbeat.vitals.fault, PATIENCE, "a fault")
        assert node.heartbeat.stop(PATIENCE)
        assert [type(change) for change in node.changes] == [Stopped]

    def test_a_fault_is_told_to_whoever_asks(self, start: Start, engine: Engine, proxy: Proxy) -> None:
        """As long as the database does not answer, the last fault is known, and nobody is registered."""
        proxy.close()
        node = start("node-1", database=through(engine, proxy))
        wait_until(lambda: node.heartbeat.vitals.fault, PATIENCE, "a fault")
        assert node.heartbeat.registered == frozenset()
        assert not node.heartbeat.waits_for_its_predecessor

    @pytest.mark.databases("postgresql", "mysql")
    def test_a_token_that_cannot_be_taken(self, start: Start, engine: Engine) -> None:
        """Heartbeats are answered, and yet whoever asks hears of it until the token is taken."""
        first = start("node-1")
        first.wait_for(Gained)
        first.heartbeat.stop(PATIENCE)
        with engine.begin() as frozen:
            frozen.execute(select(schema.token_holder).with_for_update())
            node = start("node-2")
            wait_until(lambda: node.heartbeat.vitals.fault, PATIENCE, "a fault")
            for _ in range(3):
                node.wait_for_beats(1)
                assert node.heartbeat.vitals.fault
        node.wait_for(Gained)
        assert not node.heartbeat.vitals.fault

    @pytest.mark.databases("sqlite")  # the only one that locks the whole database
    def test_a_locked_file(self, start: Start, engine: Engine, slowness: Slowness) -> None:
        """When somebody else holds the lock of a SQLite file, the node steps down in time."""
        node = start("node-1")
        node.wait_for(Gained)
        with engine.begin() as connection:
            locked = time.time()
            connection.execute(text("SELECT 1"))
            assert node.wait_for(Lost) < INTERVAL + slowness.since(locked)
        node.wait_for(Gained, count=2)

    def test_an_error_of_its_user(self, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
        """What the callbacks raise is logged, and does not end the heartbeat."""

        def fail(*_: object) -> None:
            raise RuntimeError("a mistake")

        heartbeat = Heartbeat(
            engine.url,
            task_id="node-1",
            group_ids=[GROUP],
            liveness_check_interval=INTERVAL,
            heartbeat_frequency=FREQUENCY,
            tell=fail,
            publish=fail,
        )
        heartbeat.start()
        wait_until(lambda: heartbeat.token(GROUP), PATIENCE, "the token")
        assert heartbeat.stop(PATIENCE)
        assert "a mistake" in caplog.text


def test_unfit_timing() -> None:
    """An interval without room for three heartbeats is refused at once."""
    with pytest.raises(ValueError, match="three times"):
        Node("sqlite:///nowhere.db", "node-1", [GROUP], heartbeat_frequency=1.0)


def test_a_node_whose_ledger_is_gone_says_so(start: Start, engine: Engine) -> None:
    """It makes no empty one, and is not active; its health says that tables are missing."""
    from taskadapter.coordination import schema

    with engine.connect() as connection:
        schema.create_missing(connection)
        schema.ledger.drop(connection)
        connection.commit()
    try:
        heartbeat = start("node-1").heartbeat
        wait_until(lambda: heartbeat.vitals.lacks_tables, PATIENCE, "the node to lack tables")
        assert "lacks taskadapter_ledger, " in heartbeat.vitals.fault
        assert not heartbeat.registered
    finally:
        with engine.connect() as connection:
            assert schema.create_missing(connection, lost=True) == (schema.ledger.name,)
    wait_until(lambda: heartbeat.registered, PATIENCE, "the node to stand by")


def test_opens_nothing_at_construction() -> None:
    """Making an engine connects to nothing."""
    open_engine("postgresql://127.0.0.1:1/nowhere").dispose()


def test_dropped_tables_are_made_again(engine: Engine, start: Start) -> None:
    """A node whose tables are dropped steps down, makes them again, and is active in a new term."""
    node = start("node-1")
    node.wait_for(Gained)
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
    node.wait_for(Lost)
    node.wait_for(Gained, count=2)
    with transaction(engine) as connection:
        (status,) = read_status(connection).groups
    assert status.holder == "node-1"


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("is_replaced", [True, False], ids=["replaced", "deleted"])
def test_a_file_that_is_gone_is_not_trusted(start: Start, tmp_path: Path, is_replaced: bool) -> None:
    """A node whose database is another file by now steps down, before it trusts what that says."""
    file = tmp_path / "tasks.db"
    url = f"sqlite:///{file}"
    if is_replaced:
        other = start("node-2", database=f"sqlite:///{tmp_path / 'other.db'}")
        other.wait_for(Gained)
        other.heartbeat.stop(PATIENCE)
    node = start("node-1", database=url)
    node.wait_for(Gained)
    for left in tmp_path.glob("tasks.db*"):
        left.unlink()
    if is_replaced:
        (tmp_path / "other.db").rename(file)
    node.wait_for(Lost)
    node.wait_for(Gained, count=2)
    assert node.heartbeat.token(GROUP) == Token(GROUP, "node-1", 2 if is_replaced else 1)


@pytest.mark.databases("postgresql", "mysql")
def test_grants_that_are_revoked_for_a_while(
    start: Start, engine: Engine, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The node steps down, says each fault once, and is active again when it may write again."""
    caplog.set_level(logging.INFO, "taskadapter.coordination")
    is_postgresql = engine.dialect.name == "postgresql"
    role = "ta_worker" if is_postgresql else "'ta_worker'@'%'"
    # On MySQL a connection keeps its rights on the whole database.
    tables = ["ALL TABLES IN SCHEMA public"] if is_postgresql else list(schema.metadata.tables)
    secret = "BY" if not is_postgresql else "PASSWORD"

    def execute(*statements: str) -> None:
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement))

    made = f"CREATE ROLE {role} LOGIN" if is_postgresql else f"CREATE USER {role} IDENTIFIED"
    rights = "SELECT, INSERT, UPDATE, DELETE"
    grants = [f"GRANT {rights} ON {table} TO {role}" for table in tables]
    execute(f"{made} {secret} 'a-word'", *grants)
    try:
        worker = through(engine, proxy).set(username="ta_worker", password="a-word")
        node = start("node-1", database=worker)
        node.wait_for(Gained)
        execute(*(f"REVOKE {rights} ON {table} FROM {role}" for table in tables))
        node.wait_for(Lost)
        fail_again(proxy)
        execute(*grants)
        node.wait_for(Gained, count=2)
        assert node.heartbeat.stop(PATIENCE)
    finally:
        owned = [f"DROP OWNED BY {role}"] if is_postgresql else []
        execute(*owned, f"DROP {'ROLE' if is_postgresql else 'USER'} {role}")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    # As grants go and come one after another, so do the sentences.
    assert len(said) == len(set(said)), said
    assert all("a-word" not in line for line in said)
