"""Who took part is forgotten, where it can matter to nobody any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Engine, Select, select

from taskadapter.coordination import pruning, schema, store
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.messages import TERMS_SHOWN, Token
from taskadapter.coordination.nodes import FORGOTTEN_SECONDS, Node, register
from taskadapter.coordination.overview import read_status, read_tenures
from taskadapter.coordination.tokens import acquire, release
from tests.contract.databases import BallerinaNode, rewind

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Table

GROUP = "group"
INTERVAL = 30.0
WEEK = 7 * 86400.0


def node(name: str) -> Node:
    return Node(name, f"of-{name}", "host", 1)


def enter(engine: Engine, *names: str) -> None:
    with transaction(engine) as connection:
        for name in names:
            register(connection, node(name), [GROUP], INTERVAL)


def take(engine: Engine, name: str, group: str = GROUP) -> int:
    """Take a group over from whoever has it, and return the term."""
    rewind(engine, "health_check", "last_heartbeat", INTERVAL + 1)
    with transaction(engine) as connection:
        (taken,) = acquire(connection, node(name), [group], INTERVAL).taken
    return taken.term


def beat(engine: Engine, name: str) -> None:
    """Show life for the group as a standby of Ballerina's does, which never holds its token."""
    with engine.connect() as connection:
        BallerinaNode(connection, name, GROUP, 30).heartbeat()


def prune(engine: Engine, forget: Callable[[Connection, float], bool], seconds: float) -> None:
    with transaction(engine) as connection:
        assert not forget(connection, seconds), "there is no more"


def rows(engine: Engine, table: Table) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.scalars(select(table.c.task_id)))


def terms(engine: Engine, group: str = GROUP) -> list[int]:
    columns = schema.tenure.c
    with engine.connect() as connection:
        return sorted(connection.scalars(select(columns.term).where(columns.group_id == group)))


class TestNodes:
    def test_that_are_gone_for_long_are_forgotten(self, engine: Engine) -> None:
        """Just within the time they stay, and who has shown life since stays."""
        enter(engine, "gone", "also-gone")
        rewind(engine, "taskadapter_node", "last_seen", WEEK)
        enter(engine, "lives")
        prune(engine, pruning.nodes, WEEK + 60)
        assert rows(engine, schema.node) == ["also-gone", "gone", "lives"]
        prune(engine, pruning.nodes, WEEK - 60)
        assert rows(engine, schema.node) == ["lives"]

    def test_are_kept_for_as_long_as_the_doctor_names_them(self, engine: Engine) -> None:
        """However short the ledger is kept: of a node that lives the row is never old enough."""
        enter(engine, "silent")
        rewind(engine, "taskadapter_node", "last_seen", FORGOTTEN_SECONDS - 60)
        prune(engine, pruning.nodes, 1)
        assert rows(engine, schema.node) == ["silent"]
        rewind(engine, "taskadapter_node", "last_seen", 120)
        prune(engine, pruning.nodes, 1)
        assert rows(engine, schema.node) == []

    def test_that_were_forgotten_take_part_again(self, engine: Engine) -> None:
        """One that was stopped for weeks, and goes on."""
        enter(engine, "node-1")
        rewind(engine, "taskadapter_node", "last_seen", WEEK + 60)
        prune(engine, pruning.nodes, WEEK)
        enter(engine, "node-1")
        with transaction(engine) as connection:
            (found,) = read_status(connection).nodes
        assert found.lives(INTERVAL)


class TestHeartbeats:
    def test_of_nodes_that_died_are_forgotten(self, engine: Engine) -> None:
        """Those of the holder stay, dead or not: they say since when it is silent."""
        for name in ("first", "second", "holder"):
            take(engine, name)
        beat(engine, "standby")
        rewind(engine, "health_check", "last_heartbeat", WEEK)
        beat(engine, "lives")
        prune(engine, pruning.heartbeats, WEEK + 600)
        assert rows(engine, schema.health_check) == ["first", "holder", "lives", "second", "standby"]
        prune(engine, pruning.heartbeats, WEEK - 60)
        assert rows(engine, schema.health_check) == ["holder", "lives"]
        with transaction(engine) as connection:
            (status,) = read_status(connection).groups
        assert status.holder == "holder"
        assert status.heartbeat_age is not None
        assert status.heartbeat_age > WEEK - 60

    def test_of_one_group_say_nothing_of_another(self, engine: Engine) -> None:
        """Whoever holds the one may have died in the other."""
        take(engine, "node-1", "lost")
        take(engine, "node-2", "lost")
        take(engine, "node-1")
        rewind(engine, "health_check", "last_heartbeat", WEEK + 60)
        prune(engine, pruning.heartbeats, WEEK)
        assert rows(engine, schema.health_check) == ["node-1", "node-2"]


class TestTerms:
    def test_that_are_long_over_are_forgotten(self, engine: Engine) -> None:
        """The newest of each group stay, which are shown, however old they are."""
        for number in range(TERMS_SHOWN + 3):
            take(engine, f"node-{number}")
        take(engine, "node-0", "quiet")
        prune(engine, pruning.terms, WEEK)
        assert terms(engine) == list(range(1, TERMS_SHOWN + 4))
        with transaction(engine) as connection:
            shown = [one.term for one in read_tenures(connection, [GROUP], TERMS_SHOWN)]
        rewind(engine, "taskadapter_tenure", "acquired", WEEK + 60)
        prune(engine, pruning.terms, WEEK)
        assert terms(engine) == list(reversed(shown)) == list(range(4, TERMS_SHOWN + 4))
        assert terms(engine, "quiet") == [1]

    def test_of_late_stay(self, engine: Engine) -> None:
        """However many there are of a group that goes around."""
        take(engine, "node-1")
        rewind(engine, "taskadapter_tenure", "acquired", WEEK + 60)
        for _ in range(TERMS_SHOWN + 1):
            take(engine, "node-2")
        prune(engine, pruning.terms, WEEK)
        assert terms(engine) == list(range(2, TERMS_SHOWN + 3))

    def test_never_go_back(self, engine: Engine) -> None:
        """Not even where the token's row is lost after that."""
        for number in range(TERMS_SHOWN + 1):
            last = take(engine, f"node-{number}")
        rewind(engine, "taskadapter_tenure", "acquired", WEEK + 60)
        prune(engine, pruning.terms, WEEK)
        with transaction(engine) as connection:
            connection.execute(schema.token_holder.delete())
        assert take(engine, "another") == last + 1


def old_pods(engine: Engine) -> list[str]:
    """Have nodes of many names held the group one after the other, and all of them died long ago."""
    names = [f"pod-{number}" for number in range(TERMS_SHOWN + 4)]
    enter(engine, *names)
    for name in names:
        take(engine, name)
    rewind(engine, "taskadapter_node", "last_seen", WEEK + 60)
    rewind(engine, "health_check", "last_heartbeat", WEEK + 60)
    rewind(engine, "taskadapter_tenure", "acquired", WEEK + 60)
    return names


def test_all_of_it_is_forgotten_with_the_ledger(engine: Engine, prepared_url: str) -> None:
    """By the same setting; the token stays, with its holder."""
    names = old_pods(engine)
    store.prune(prepared_url, WEEK)
    store._engine(prepared_url).dispose()
    assert rows(engine, schema.node) == []
    assert rows(engine, schema.health_check) == rows(engine, schema.token_holder) == names[-1:]
    assert rows(engine, schema.tenure) == names[-TERMS_SHOWN:]


def test_it_is_forgotten_bit_by_bit(engine: Engine) -> None:
    """However many there are: a statement has room for so many keys only."""
    names = old_pods(engine)
    for forget, table, left in [
        (pruning.nodes, schema.node, 0),
        (pruning.heartbeats, schema.health_check, 1),
        (pruning.terms, schema.tenure, TERMS_SHOWN),
    ]:
        counts, more = [], True
        while more:
            with transaction(engine) as connection:
                more = forget(connection, WEEK, at_most=3)
            counts.append(len(rows(engine, table)))
        assert counts[0] == len(names) - 3
        assert counts[-1] == left


def test_what_was_left_keeps_its_term(engine: Engine) -> None:
    """A group whose token nobody has taken again."""
    with transaction(engine) as connection:
        acquire(connection, node("node-1"), [GROUP], INTERVAL)
        release(connection, [Token(GROUP, "node-1", 1)])
    rewind(engine, "taskadapter_tenure", "acquired", WEEK + 60)
    prune(engine, pruning.terms, WEEK)
    assert terms(engine) == [1]
    assert take(engine, "node-2") == 2


def test_who_shows_life_meanwhile_stays(engine: Engine) -> None:
    """After it was found old, and before it is removed."""
    enter(engine, "node-1")
    rewind(engine, "taskadapter_node", "last_seen", WEEK + 60)
    with transaction(engine) as connection:

        class Late:
            """A connection on which the node shows life after the first statement."""

            def execute(self, statement: Any) -> Any:
                found = connection.execute(statement)
                if isinstance(statement, Select):
                    rows = found.all()
                    register(connection, node("node-1"), [GROUP], INTERVAL)
                    return SimpleNamespace(all=lambda: rows)
                return found

        assert not pruning.nodes(cast("Connection", Late()), WEEK)
    assert rows(engine, schema.node) == ["node-1"]
