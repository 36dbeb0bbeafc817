"""Taking, keeping and giving back tokens, on every database."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Connection, Engine, delete, event, func, select, text, update

from taskadapter.coordination import schema
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.messages import PoolKey, Sighting, Taken, Token
from taskadapter.coordination.nodes import Node, claim_groups, register, unregister
from taskadapter.coordination.overview import (
    LATELY_SECONDS,
    given_up_lately,
    read_status,
    read_successors,
    read_tenures,
)
from taskadapter.coordination.tokens import (
    acquire,
    fence,
    give_up,
    pulse,
    release,
    request_resign,
    require_token,
)
from taskadapter.errors import (
    CoordinationError,
    DuplicateNodeError,
    SchemaError,
    TokenLostError,
)
from tests.contract.databases import BALLERINA_TABLES, BallerinaNode, race, rewind

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = "group"
INTERVAL = 300.0

SHORT = 20.0
"""Seconds by which a heartbeat is too young to be stale: the machine may stand still meanwhile."""

SOON = 60.0
"""What is younger, in seconds, is of just now."""


def node(number: int, incarnation: int = 0) -> Node:
    return Node(f"node-{number}", f"{number:08}-{incarnation:04}", f"host-{number}", number)


NODE, OTHER = node(1), node(2)


def take(engine: Engine, me: Node = NODE, group_id: str = GROUP) -> Taken | None:
    with transaction(engine) as connection:
        (taken,) = acquire(connection, me, [group_id], INTERVAL).taken or [None]
    return taken


def must_take(engine: Engine, me: Node = NODE, group_id: str = GROUP) -> Token:
    taken = take(engine, me, group_id)
    assert taken is not None
    return Token(group_id, me.task_id, taken.term)


def enter(engine: Engine, *nodes: Node) -> None:
    with transaction(engine) as connection:
        for me in nodes:
            register(connection, me, [GROUP], INTERVAL)


def look(engine: Engine, me: Node = NODE, *tokens: Token) -> Sighting:
    with transaction(engine) as connection:
        (sighting,) = pulse(connection, me, tokens, [GROUP], INTERVAL).sightings or ()
    return sighting


def go_silent(engine: Engine, seconds: float = INTERVAL + 0.01) -> None:
    rewind(engine, "health_check", "last_heartbeat", seconds)


class TestAcquire:
    def test_first_gets_term_one(self, engine: Engine) -> None:
        """The first node to ask becomes the holder, in term 1."""
        assert take(engine) == Taken(GROUP, 1, "the first to take it")

    def test_a_live_holder_keeps_it(self, engine: Engine) -> None:
        """At less than the interval a heartbeat is not stale."""
        take(engine)
        go_silent(engine, INTERVAL - SHORT)
        assert take(engine, OTHER) is None

    def test_a_silent_holder_loses_it(self, engine: Engine) -> None:
        """Just past the interval the next node takes over, and knows from whom."""
        take(engine)
        go_silent(engine)
        taken = take(engine, OTHER)
        assert taken is not None
        assert taken.term == 2
        assert re.match(r"node 'node-1' was silent for 3\d\d\.", taken.reason)

    def test_the_new_holder_is_fresh(self, engine: Engine) -> None:
        """A takeover counts as a heartbeat: nobody takes the token over right after it."""
        take(engine)
        go_silent(engine)
        take(engine, OTHER)
        assert take(engine, node(3)) is None

    def test_the_holder_itself_takes_a_new_term(self, engine: Engine) -> None:
        """A process that stopped trusting its token takes it over at once, in a higher term."""
        assert [must_take(engine).term for _ in range(2)] == [1, 2]

    def test_a_successor_under_the_same_name_waits(self, engine: Engine) -> None:
        """Another process of the same name is another node: it waits until the first is stale."""
        take(engine, node(1, incarnation=1))
        assert take(engine, node(1, incarnation=2)) is None
        go_silent(engine)
        assert must_take(engine, node(1, incarnation=2)).term == 2

    def test_a_holder_without_heartbeat_loses_it(self, engine: Engine) -> None:
        """A token whose holder never sent a heartbeat is free, as it is to Ballerina's nodes."""
        take(engine)
        with transaction(engine) as connection:
            connection.execute(delete(schema.health_check))
        assert take(engine, OTHER) == Taken(GROUP, 2, "node 'node-1' has no heartbeat")

    def test_groups_are_apart(self, engine: Engine) -> None:
        """Each group has its own token."""
        assert must_take(engine, NODE, "a").term == 1
        assert must_take(engine, OTHER, "b").term == 1

    def test_terms_rise_even_if_the_row_is_lost(self, engine: Engine) -> None:
        """A fencing token never comes back, not even if somebody empties token_holder."""
        take(engine)
        take(engine)
        with transaction(engine) as connection:
            connection.execute(delete(schema.token_holder))
        assert must_take(engine, OTHER).term == 3

    def test_takes_those_that_are_free(self, engine: Engine) -> None:
        """Of many groups, with one call; each goes on in its own terms, and has its own reason."""
        released, lost, mine = must_take(engine, OTHER, "b"), must_take(engine, OTHER, "d"), "a"
        must_take(engine, OTHER, "c")
        for _ in range(2):
            must_take(engine, NODE, mine)
        with transaction(engine) as connection:
            release(connection, [released])
            connection.execute(delete(schema.token_holder).where(schema.token_holder.c.group_id == "d"))
            taken = acquire(connection, NODE, ["d", "c", "b", "a", "e"], INTERVAL).taken
        assert {one.group_id: one.term for one in taken} == {"a": 3, "b": 2, "d": 2, "e": 1}
        assert [one.reason for one in taken[1:]] == [
            "it was released",
            "it was released",
            "the first to take it",
        ]
        enter(engine, NODE)
        tokens = [Token(one.group_id, NODE.task_id, one.term) for one in taken]
        with transaction(engine) as connection:
            assert [release(connection, [lost]), len(release(connection, tokens))] == [(), 4]
            (others,) = {group.holder for group in read_status(connection).groups} - {None}
        assert others == OTHER.task_id

    def test_many_are_raced_for_by_many(self, engine: Engine) -> None:
        """Whatever the order that each names them in, no two wait for each other, and one gets each."""
        names = [f"group-{n:02d}" for n in range(20)]

        def take_all(number: int) -> list[str]:
            with transaction(engine) as connection:
                wanted = names if number % 2 else names[::-1]
                return [one.group_id for one in acquire(connection, node(number), wanted, INTERVAL).taken]

        for _ in range(3):
            taken = race([partial(take_all, n) for n in range(5)])
            assert sorted(name for found in taken for name in found) == names
            go_silent(engine)

    def test_first_insertion_is_raced_by_many(self, engine: Engine) -> None:
        """Of many that insert at once, the primary key lets one succeed."""
        for attempt in range(3):
            group_id = f"group-{attempt}"
            taken = race([partial(take, engine, node(n), group_id) for n in range(5)])
            assert sorted(taken, key=str)[:4] == [None] * 4

    def test_takeover_is_raced_by_many(self, engine: Engine) -> None:
        """Of many that take over at once, one succeeds, and terms go up by one each time."""
        take(engine, node(9))
        for expected in range(2, 5):
            go_silent(engine)
            taken = race([partial(take, engine, node(n)) for n in range(5)])
            assert [one.term for one in taken if one is not None] == [expected]


class TestPulse:
    def test_renews(self, engine: Engine) -> None:
        """The holder's pulse is a heartbeat, and says so."""
        enter(engine, NODE)
        token = must_take(engine)
        go_silent(engine, INTERVAL - SHORT)
        assert look(engine, NODE, token).renewed
        age = look(engine, NODE).age
        assert age is not None
        assert age < SOON

    def test_a_former_holder_is_told(self, engine: Engine) -> None:
        """After a takeover the pulse renews nothing, and names the new holder and term."""
        enter(engine, NODE)
        token = must_take(engine)
        go_silent(engine)
        take(engine, OTHER)
        sighting = look(engine, NODE, token)
        assert (sighting.renewed, sighting.holder, sighting.term) == (False, "node-2", 2)
        assert not sighting.free

    @pytest.mark.parametrize(("seconds", "free"), [(INTERVAL - SHORT, False), (INTERVAL + 0.01, True)])
    def test_a_standby_sees_staleness(self, engine: Engine, seconds: float, free: bool) -> None:
        """The database says what is stale, on both sides of the interval."""
        enter(engine, OTHER)
        take(engine)
        go_silent(engine, seconds)
        sighting = look(engine, OTHER)
        assert sighting.free == free
        assert sighting.age is not None
        # On MySQL a heartbeat with no fraction of a second counts as one second younger.
        assert seconds - 1 <= sighting.age < seconds + SHORT

    def test_knows_its_own_distrusted_token(self, engine: Engine) -> None:
        """A token that this process took and does not claim is free to it, but not to others."""
        enter(engine, NODE, OTHER)
        take(engine)
        assert look(engine, NODE).free
        assert not look(engine, OTHER).free

    def test_covers_many_groups(self, engine: Engine) -> None:
        """One pulse renews what is held and looks at the rest."""
        enter(engine, NODE)
        mine = [must_take(engine, NODE, f"mine-{n}") for n in range(3)]
        lost = Token("lost", NODE.task_id, 1)
        take(engine, OTHER, "lost")
        groups = [*(token.group_id for token in mine), "lost", "unknown"]
        with transaction(engine) as connection:
            answer = pulse(connection, NODE, [*mine, lost], groups, INTERVAL)
        renewed = {s.group_id: s.renewed for s in answer.sightings or ()}
        assert renewed == {"mine-0": True, "mine-1": True, "mine-2": True, "lost": False}

    def test_without_tokens_there_is_nothing_to_see(self, engine: Engine) -> None:
        """A registered node sees no sightings where no token exists, and is still registered."""
        enter(engine, NODE)
        with transaction(engine) as connection:
            answer = pulse(connection, NODE, [], [GROUP], INTERVAL)
        assert answer.registered
        assert answer.sightings == ()

    def test_an_unregistered_node_is_told(self, engine: Engine) -> None:
        """A node whose name another process has taken gets to know it."""
        take(engine)
        enter(engine, node(1, incarnation=2))
        with transaction(engine) as connection:
            assert not pulse(connection, NODE, [], [GROUP], INTERVAL).registered

    @pytest.mark.parametrize("holds", [True, False])
    def test_shows_that_the_node_lives(self, engine: Engine, holds: bool) -> None:
        """A pulse refreshes the node's entry, of a standby too."""
        enter(engine, NODE)
        tokens = [must_take(engine)] if holds else []
        rewind(engine, "taskadapter_node", "last_seen", 2 * SOON)
        with transaction(engine) as connection:
            pulse(connection, NODE, tokens, [GROUP], INTERVAL)
            assert read_status(connection).nodes[0].last_seen_age < SOON

    def test_names_with_signs_that_a_text_of_sql_knows(self, engine: Engine) -> None:
        """What has a meaning in SQL has none in a name."""
        name = "a%s %% 'b' \\ \"c\"; :d -- é"
        me = Node(name, NODE.incarnation, "host", 1)
        with transaction(engine) as connection:
            register(connection, me, [name], INTERVAL)
        token = must_take(engine, me, name)
        with transaction(engine) as connection:
            answer = pulse(connection, me, [token], [name], INTERVAL)
        assert [(s.group_id, s.holder, s.renewed) for s in answer.sightings] == [(name, name, True)]

    def test_never_agrees_with_a_takeover(self, engine: Engine) -> None:
        """Renewing and taking over at the same moment: exactly one of them succeeds, every time."""
        tries = {"postgresql": 1000, "mysql": 300, "sqlite": 100}[engine.dialect.name]
        enter(engine, NODE)
        take(engine)
        course = Course()

        def renew_often() -> list[bool]:
            autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
            with engine.connect() as reset, autocommit.connect() as holder:
                return [renew(reset, holder, number, course) for number in range(tries)]

        def take_often() -> list[bool]:
            return [take_stale(engine, course) for _ in range(tries)]

        renewed, taken = race([renew_often, take_often])
        assert taken == [not kept for kept in renewed]
        assert set(taken) == {True, False}, "one side was always faster: this test proved nothing"


class Course:
    """Where two sides start together: the one that has just won starts a little later the next time.

    So they stay close, whatever the database and the machine, and each wins now and then.
    """

    STEP = 0.0003

    def __init__(self) -> None:
        self.ready = threading.Barrier(2, timeout=120)
        self.handicap = 0.0
        """Seconds by which the takeover starts later than the renewal."""

    def start(self, handicap: float) -> None:
        """Wait for the other side, then for one's own handicap."""
        self.ready.wait()
        time.sleep(max(0.0, handicap))

    def finish(self, taken: bool | None = None) -> None:
        """Wait for the other side; the taker says whether it has won."""
        if taken is not None:
            self.handicap += self.STEP if taken else -self.STEP
        self.ready.wait()


def renew(reset: Connection, holder: Connection, number: int, course: Course) -> bool:
    token = make_stale(reset, number + 2)
    course.start(-course.handicap)
    (sighting,) = pulse(holder, NODE, [token], [GROUP], INTERVAL).sightings or ()
    course.finish()
    return sighting.renewed


def take_stale(engine: Engine, course: Course) -> bool:
    course.start(course.handicap)
    taken = take(engine, OTHER) is not None
    course.finish(taken)
    return taken


def make_stale(connection: Connection, term: int) -> Token:
    """Give the token to NODE in some term, with a heartbeat that has just become stale."""
    token = Token(GROUP, NODE.task_id, term)
    connection.execute(update(schema.token_holder).values(task_id=token.task_id, term=token.term))
    connection.execute(delete(schema.tenure))
    moment = {
        "postgresql": "clock_timestamp() - interval '301 seconds'",
        "mysql": "CURRENT_TIMESTAMP(6) - INTERVAL 301500 * 1000 MICROSECOND",
        "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now', '-301 seconds')",
    }[connection.dialect.name]
    connection.execute(text(f"UPDATE health_check SET last_heartbeat = {moment}"))
    connection.commit()
    return token


class TestRelease:
    def test_frees_the_token_at_once(self, engine: Engine) -> None:
        """A released token needs no waiting, and goes on with the next term."""
        enter(engine, OTHER)
        token = must_take(engine)
        with transaction(engine) as connection:
            assert release(connection, [token]) == (token,)
        assert look(engine, OTHER).free
        assert take(engine, OTHER) == Taken(GROUP, 2, "it was released")

    def test_says_that_somebody_has_asked_for_it(self, engine: Engine) -> None:
        """Of the term that was asked for, and of no later one."""
        enter(engine, NODE)
        for reason in ("it was released, as somebody had asked", "it was released"):
            token = must_take(engine)
            with transaction(engine) as connection:
                if reason != "it was released":
                    request_resign(connection, GROUP)
                release(connection, [token])
            taken = take(engine, OTHER)
            assert taken is not None
            assert taken.reason == reason
            with transaction(engine) as connection:
                release(connection, [Token(GROUP, OTHER.task_id, taken.term)])

    def test_ends_the_term(self, engine: Engine) -> None:
        """What the former holder still has under way comes to nothing."""
        enter(engine, NODE)
        token = must_take(engine)
        with transaction(engine) as connection:
            release(connection, [token])
            with pytest.raises(TokenLostError):
                require_token(connection, token)
        assert not look(engine, NODE, token).renewed
        assert look(engine, NODE).free

    def test_leaves_a_successor_alone(self, engine: Engine) -> None:
        """A node that lost its token cannot release its successor's."""
        token = must_take(engine)
        go_silent(engine)
        successor = must_take(engine, OTHER)
        with transaction(engine) as connection:
            assert release(connection, [token]) == ()
            require_token(connection, successor)


class TestFence:
    @pytest.mark.databases("postgresql", "mysql")  # SQLite has one writer at a time
    def test_does_not_hold_up_renewals(self, engine: Engine) -> None:
        """While a job writes under the token's protection, its node goes on renewing it."""
        enter(engine, NODE)
        token = must_take(engine)
        with transaction(engine) as connection:
            fence(connection, token, 100)
            assert look(engine, NODE, token).renewed

    @pytest.mark.databases("postgresql")  # the only one that ends another client's idle transaction
    @pytest.mark.undisturbed(0.5)  # and this one, too, where it stands still between two statements
    def test_frees_the_token_of_a_frozen_client(self, engine: Engine) -> None:
        """On PostgreSQL a transaction that holds the token and then freezes is ended."""
        token = must_take(engine)
        go_silent(engine)
        frozen = engine.connect()
        fence(frozen, token, 1.0)
        assert must_take(engine, OTHER).term == 2
        frozen.invalidate()
        frozen.close()

    @pytest.mark.databases("postgresql")
    @pytest.mark.undisturbed(0.5)
    def test_frees_the_token_of_a_client_that_freezes_meanwhile(self, engine: Engine) -> None:
        """It may freeze when it has just locked the token, before it can ask for anything else."""
        token = must_take(engine)
        go_silent(engine)
        frozen = engine.connect()

        @event.listens_for(frozen, "after_cursor_execute")
        def freeze(*executed: object) -> None:
            if "token_holder" in str(executed[2]):
                raise InterruptedError("frozen")

        with pytest.raises(InterruptedError):
            fence(frozen, token, 1.0)
        assert must_take(engine, OTHER).term == 2
        frozen.invalidate()
        frozen.close()


class TestRegister:
    def test_a_live_name_is_refused(self, engine: Engine) -> None:
        """A second process with a live node's name is refused, and told about the first."""
        enter(engine, node(1))
        rewind(engine, "taskadapter_node", "last_seen", INTERVAL - SHORT)
        with pytest.raises(DuplicateNodeError, match="process 1 on host 'host-1'") as caught:
            enter(engine, node(1, incarnation=2))
        assert INTERVAL - SHORT - 1 <= caught.value.age < INTERVAL

    def test_the_refusal_says_where_the_other_takes_part(self, engine: Engine) -> None:
        """It may be another program of the same host: its group and pool tell which, if they are known."""
        enter(engine, node(1))
        with pytest.raises(DuplicateNodeError, match="on host 'host-1' for group 'group', seen"):
            enter(engine, node(1, incarnation=2))
        with transaction(engine) as connection:
            claim_groups(connection, PoolKey("night", "id"), [GROUP])
        with pytest.raises(
            DuplicateNodeError, match="for group 'group' of work pool 'night', seen"
        ) as caught:
            enter(engine, node(1, incarnation=2))
        assert "in the whole database, whatever its work pool: give each node, and each" in str(
            caught.value
        )
        with transaction(engine) as connection:
            register(connection, node(1), [], INTERVAL)
        with pytest.raises(DuplicateNodeError, match="on host 'host-1', seen"):
            enter(engine, node(1, incarnation=2))

    def test_a_stale_name_is_free(self, engine: Engine) -> None:
        """Just past the interval the name belongs to whoever asks; the first loses it."""
        enter(engine, node(1))
        rewind(engine, "taskadapter_node", "last_seen", INTERVAL + 0.01)
        enter(engine, node(1, incarnation=2))
        with pytest.raises(DuplicateNodeError):
            enter(engine, node(1))

    def test_a_left_name_is_free(self, engine: Engine) -> None:
        """A node that left makes room at once; one that was replaced removes nobody."""
        enter(engine, node(1))
        with transaction(engine) as connection:
            unregister(connection, node(1))
        enter(engine, node(1, incarnation=2))
        with transaction(engine) as connection:
            unregister(connection, node(1))
            assert [n.task_id for n in read_status(connection).nodes] == ["node-1"]

    def test_one_process_may_take_part_twice(self, engine: Engine) -> None:
        """For another pool it has an entry of its own, is shown by its name, and leaves by itself."""
        first, second = node(1), replace(node(1, incarnation=2), of="another-pool")
        enter(engine, first, second)
        with pytest.raises(DuplicateNodeError):
            enter(engine, replace(node(1, incarnation=3), of="another-pool"))
        with transaction(engine) as connection:
            assert [found.task_id for found in read_status(connection).nodes] == ["node-1", "node-1"]
            assert pulse(connection, second, [], [GROUP], INTERVAL).registered
            unregister(connection, second)
            assert [found.task_id for found in read_status(connection).nodes] == ["node-1"]
            assert pulse(connection, first, [], [GROUP], INTERVAL).registered

    def test_one_of_many_gets_the_name(self, engine: Engine) -> None:
        """Of many processes with one name, one is let in."""

        def attempt(incarnation: int) -> bool:
            try:
                enter(engine, node(1, incarnation))
            except DuplicateNodeError:
                return False
            return True

        assert sum(race([partial(attempt, n) for n in range(5)])) == 1

    def test_again_changes_the_groups(self, engine: Engine) -> None:
        """A node may register again, with other groups."""
        with transaction(engine) as connection:
            for group_ids in (["a"], ["c", "b"]):
                register(connection, NODE, group_ids, INTERVAL)
            (status,) = read_status(connection).nodes
        assert (status.task_id, status.group_ids) == ("node-1", ("b", "c"))


class TestStatus:
    def test_shows_the_holder(self, engine: Engine) -> None:
        """Holder, term, ages and reason are what the database has."""
        take(engine)
        go_silent(engine, 10)
        rewind(engine, "taskadapter_tenure", "acquired", 100)
        with transaction(engine) as connection:
            (group,) = read_status(connection).groups
        assert (group.group_id, group.holder, group.term) == (GROUP, "node-1", 1)
        assert group.reason == "the first to take it"
        assert group.heartbeat_age is not None
        assert group.held_for is not None
        assert 9 <= group.heartbeat_age < 10 + SOON
        assert 99 <= group.held_for < 100 + SOON

    def test_shows_that_nobody_holds_it(self, engine: Engine) -> None:
        """A released token has no holder, and keeps its term."""
        with transaction(engine) as connection:
            acquire(connection, NODE, [GROUP], INTERVAL)
            release(connection, [Token(GROUP, NODE.task_id, 1)])
            (group,) = read_status(connection).groups
        assert (group.holder, group.term, group.heartbeat_age) == (None, 1, None)

    def test_shows_who_was_active_before(self, engine: Engine) -> None:
        """The last terms of a group, the newest first, and whether they were given up."""
        with transaction(engine) as connection:
            for _ in range(3):
                for node in (NODE, OTHER):
                    (taken,) = acquire(connection, node, [GROUP], INTERVAL).taken
                    release(connection, [Token(GROUP, node.task_id, taken.term)])
            acquire(connection, NODE, [GROUP], INTERVAL)
            acquire(connection, NODE, ["another"], INTERVAL)
            found = read_tenures(connection, [GROUP], last=3)
            assert read_tenures(connection, [], last=3) == []
        assert [(one.group_id, one.term, one.task_id) for one in found] == [
            (GROUP, 7, NODE.task_id),
            (GROUP, 6, OTHER.task_id),
            (GROUP, 5, NODE.task_id),
        ]
        assert [one.released is None for one in found] == [True, False, False]
        assert all(0 <= one.began < 60 and one.reason for one in found)


class TestSuccessors:
    """Who may run what a holder cannot."""

    @staticmethod
    def of(engine: Engine, token: Token, within: float = INTERVAL) -> list[str]:
        with transaction(engine) as connection:
            return read_successors(connection, token.group_id, within)

    @staticmethod
    def leave(engine: Engine, why: str = "no module\nof that \x00 name") -> None:
        """Let the other node take the group, and give it up."""
        token = must_take(engine, OTHER)
        with transaction(engine) as connection:
            give_up(connection, [token], why)
            release(connection, [token])

    def test_are_the_others_that_live_and_stand_by(self, engine: Engine) -> None:
        """Not the holder itself, none that is silent, and none of another group."""
        enter(engine, NODE, OTHER, node(3))
        token = must_take(engine)
        assert self.of(engine, token) == ["node-2", "node-3"]
        assert self.of(engine, replace(token, group_id="another")) == []
        rewind(engine, "taskadapter_node", "last_seen", INTERVAL + 1)
        assert self.of(engine, token) == []
        assert self.of(engine, token, within=2 * INTERVAL) == ["node-2", "node-3"]

    def test_are_none_that_have_just_given_up(self, engine: Engine) -> None:
        """A process that has given the group up is left out for a while; who has it next says why."""
        enter(engine, NODE, OTHER)
        self.leave(engine)
        taken = take(engine)
        assert taken is not None
        assert taken.reason == "node 'node-2' gave it up: no module of that name"
        token = Token(GROUP, NODE.task_id, taken.term)
        assert self.of(engine, token) == []
        with transaction(engine) as connection:
            (given_up,) = given_up_lately(connection, [GROUP])
            assert given_up_lately(connection, ["another"]) == []
        assert (given_up.group_id, given_up.task_id) == (GROUP, OTHER.task_id)
        assert given_up.reason == "no module of that name"
        assert 0 <= given_up.released < SOON
        rewind(engine, "taskadapter_tenure", "released", LATELY_SECONDS - SHORT)
        assert self.of(engine, token) == []
        rewind(engine, "taskadapter_tenure", "released", SHORT + 1)
        assert self.of(engine, token) == ["node-2"]

    def test_may_be_a_new_process_of_a_name(self, engine: Engine) -> None:
        """It was started anew, perhaps because somebody has mended what it lacked."""
        enter(engine, NODE, OTHER)
        self.leave(engine)
        with transaction(engine) as connection:
            unregister(connection, OTHER)
            register(connection, node(2, incarnation=1), [GROUP], INTERVAL)
        assert self.of(engine, must_take(engine)) == ["node-2"]

    def test_may_be_one_that_has_had_it(self, engine: Engine) -> None:
        """Somebody has asked it to hand over, or has deleted the queue for a while."""
        enter(engine, NODE, OTHER)
        token = must_take(engine, OTHER)
        with transaction(engine) as connection:
            release(connection, [token])
        taken = take(engine)
        assert taken is not None
        assert taken.reason == "it was released"
        assert self.of(engine, Token(GROUP, NODE.task_id, taken.term)) == ["node-2"]

    def test_a_reason_of_any_length_is_entered(self, engine: Engine) -> None:
        """As far as there is room, for its node's and its successor's: no word is cut, if there are any."""
        enter(engine, NODE, OTHER)
        for reason in ("x" * 999, "missing " * 99):
            self.leave(engine, reason)
            taken = take(engine)
            assert taken is not None
            with transaction(engine) as connection:
                newest, *_ = read_tenures(connection, [GROUP], last=2)
                release(connection, [Token(GROUP, NODE.task_id, taken.term)])
            assert len(newest.reason) <= 255
            assert newest.reason.startswith("node 'node-2' gave it up:")
            assert newest.reason.endswith(" ...")
        assert newest.reason.endswith(" missing ...")


class TestResign:
    def test_reaches_the_holder(self, engine: Engine) -> None:
        """The holder sees the request in its next pulse, its successor does not."""
        enter(engine, NODE, OTHER)
        token = must_take(engine)
        assert not look(engine, NODE, token).resign_requested
        with transaction(engine) as connection:
            assert request_resign(connection, GROUP) == token
        assert look(engine, NODE, token).resign_requested
        with transaction(engine) as connection:
            release(connection, [token])
        assert not look(engine, OTHER, must_take(engine, OTHER)).resign_requested

    def test_needs_a_holder(self, engine: Engine) -> None:
        """Without a holder there is nobody to ask."""
        with (
            pytest.raises(CoordinationError, match="nobody holds"),
            transaction(engine) as connection,
        ):
            request_resign(connection, GROUP)


@pytest.fixture
def shared(engine: Engine) -> Iterator[Engine]:
    """A database whose two Ballerina tables were made by Ballerina's DDL, where it has one."""
    theirs = [schema.token_holder, schema.health_check]
    with engine.begin() as connection:
        schema.metadata.drop_all(connection, theirs)
        for statement in BALLERINA_TABLES:
            connection.execute(text(statement))
    yield engine
    with engine.begin() as connection:
        schema.metadata.drop_all(connection, theirs)
        schema.metadata.create_all(connection, theirs)


@pytest.fixture(params=["their tables", "our tables"])
def either(request: pytest.FixtureRequest, engine: Engine) -> Engine:
    """A database that a Ballerina node can use, whoever made its tables."""
    if request.param == "their tables":
        request.getfixturevalue("shared")
    return engine


class TestWithBallerina:
    def test_we_stand_by_for_its_node(self, either: Engine) -> None:
        """We leave a live Ballerina node alone, and take over once it is silent; it notices."""
        enter(either, NODE)
        with either.connect() as connection:
            theirs = BallerinaNode(connection, "ballerina", GROUP, int(INTERVAL))
            assert theirs.try_to_acquire()
            theirs.heartbeat()
            assert take(either) is None
            assert not look(either, NODE).free
            go_silent(either, INTERVAL + 1)
            assert look(either, NODE).free
            assert must_take(either).term == 2
            assert not theirs.has_token()
            assert not theirs.try_to_acquire()

    def test_its_node_stands_by_for_us(self, either: Engine) -> None:
        """It leaves us alone while we live, and takes over once we are silent; we notice."""
        enter(either, NODE)
        token = must_take(either)
        with either.connect() as connection:
            theirs = BallerinaNode(connection, "ballerina", GROUP, int(INTERVAL))
            theirs.heartbeat()
            assert not theirs.try_to_acquire()
            assert look(either, NODE, token).renewed
            go_silent(either, INTERVAL + 2)
            assert theirs.try_to_acquire()
            theirs.heartbeat()
        sighting = look(either, NODE, token)
        assert (sighting.renewed, sighting.holder, sighting.term) == (False, "ballerina", 2)
        assert take(either) is None

    def test_its_node_takes_what_we_release(self, either: Engine) -> None:
        """A token that we give back is free to a Ballerina node at its next tick."""
        token = must_take(either)
        with transaction(either) as connection:
            release(connection, [token])
        with either.connect() as connection:
            theirs = BallerinaNode(connection, "ballerina", GROUP, int(INTERVAL))
            assert theirs.try_to_acquire()
            assert theirs.has_token()
        assert must_take(either).term == 3, "a holder without a heartbeat is free, as Ballerina has it"

    def test_it_cannot_be_asked_to_resign(self, either: Engine) -> None:
        """We say that a Ballerina node cannot be asked, instead of asking in vain."""
        with either.connect() as connection:
            assert BallerinaNode(connection, "ballerina", GROUP, 30).try_to_acquire()
        with (
            pytest.raises(CoordinationError, match="stop it instead"),
            transaction(either) as connection,
        ):
            request_resign(connection, GROUP)

    def test_a_name_that_is_too_long_is_refused(self, shared: Engine) -> None:
        """Where health_check takes 36 characters, a longer group is refused, and nothing taken."""
        assert must_take(shared, NODE, "g" * 36).term == 1
        with pytest.raises(SchemaError, match="db upgrade"):
            take(shared, NODE, "g" * 37)
        with transaction(shared) as connection:
            rows = connection.execute(select(func.count()).select_from(schema.token_holder))
            assert rows.scalar_one() == 1


class TestTimeZones:
    @pytest.mark.parametrize("tables", ["ours", "theirs"])
    def test_our_sessions_agree(
        self,
        engine: Engine,
        request: pytest.FixtureRequest,
        monkeypatch: pytest.MonkeyPatch,
        tables: str,
    ) -> None:
        """Whatever zone the environment sets, our nodes read each other's heartbeats right."""
        if tables == "theirs":
            request.getfixturevalue("shared")
        monkeypatch.setenv("PGTZ", "Asia/Kolkata")
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        east = open_engine(engine.url)
        take(east, NODE)
        monkeypatch.setenv("PGTZ", "America/New_York")
        west = open_engine(engine.url)
        enter(west, OTHER)
        age = look(west, OTHER).age
        east.dispose()
        west.dispose()
        assert age is not None
        assert -1.1 < age < SOON

    @pytest.mark.databases("postgresql", "mysql")  # Ballerina does not know SQLite
    def test_a_ballerina_session_may_have_any_zone(self, engine: Engine) -> None:
        """With our tables a Ballerina node in another zone is read right, and reads us right."""
        zone = {"postgresql": "TIME ZONE 'Asia/Kolkata'", "mysql": "time_zone = '+05:30'"}
        enter(engine, NODE)
        with engine.connect() as connection:
            connection.execute(text(f"SET {zone[engine.dialect.name]}"))
            theirs = BallerinaNode(connection, "ballerina", GROUP, int(INTERVAL))
            assert theirs.try_to_acquire()
            theirs.heartbeat()
            age = look(engine, NODE).age
            go_silent(engine, INTERVAL + 1)
            assert must_take(engine, NODE).term == 2
            assert not theirs.try_to_acquire()
            connection.invalidate()
        assert age is not None
        assert -1.1 < age < SOON
