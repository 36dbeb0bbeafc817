"""To which work pool a group belongs, on every database."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import Engine

from taskadapter.coordination import store
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.messages import PoolKey
from taskadapter.coordination.nodes import (
    Node,
    claim_groups,
    groups_of_others,
    register,
    take_over_group,
    unregister,
)
from tests.contract.databases import race, rewind

GROUP = "group"
SILENT = 60.0

OURS = PoolKey("pool", "ours")
THEIRS = PoolKey("pool", "theirs")
"""Of the same name, on another server; or ours, before its server lost all it knew."""

ELSEWHERE = PoolKey("another", "elsewhere")
ME, OTHER = Node("node-1", "me", "host", 1), Node("node-2", "other", "host", 2)


def claim(engine: Engine, pool: PoolKey, *groups: str) -> dict[str, str]:
    with transaction(engine) as connection:
        return claim_groups(connection, pool, groups or (GROUP,))


def enter(engine: Engine, me: Node, *groups: str) -> None:
    with transaction(engine) as connection:
        register(connection, me, groups, SILENT)


def take_over(engine: Engine, pool: PoolKey, group: str = GROUP) -> list[str]:
    """Take a group over for the process ME, and return who keeps it from that."""
    with transaction(engine) as connection:
        return take_over_group(connection, pool, group, ME.incarnation, SILENT)


def has(engine: Engine, pool: PoolKey, group: str = GROUP) -> bool:
    with transaction(engine) as connection:
        return not groups_of_others(connection, pool, [group])


class TestClaim:
    def test_the_first_pool_has_it(self, engine: Engine) -> None:
        """Again and again; others are told its name."""
        assert claim(engine, OURS) == claim(engine, OURS) == {}
        assert claim(engine, ELSEWHERE, GROUP, "new") == {GROUP: "pool"}
        assert has(engine, OURS)
        assert has(engine, ELSEWHERE, "new")

    def test_a_pool_of_that_name_on_another_server_is_another(self, engine: Engine) -> None:
        """Its nodes would stand in for jobs that they do not see."""
        claim(engine, THEIRS)
        assert claim(engine, OURS) == {GROUP: "pool"}
        assert has(engine, THEIRS)
        assert not has(engine, OURS)

    def test_what_an_older_release_has_entered_is_of_whoever_has_the_name(self, engine: Engine) -> None:
        """The first that comes; then it is of no other server's pool."""
        claim(engine, PoolKey("pool"))
        assert claim(engine, ELSEWHERE) == {GROUP: "pool"}
        assert claim(engine, OURS) == {}
        assert claim(engine, THEIRS) == {GROUP: "pool"}

    def test_a_pool_that_was_made_anew_keeps_its_groups(self, engine: Engine) -> None:
        """For the first node that sees it, and all others; and none but its own."""
        claim(engine, OURS, GROUP)
        claim(engine, THEIRS, "other")
        enter(engine, OTHER, GROUP)
        anew = PoolKey("pool", "anew")
        for former_id in ("ours", "ours", None):
            with transaction(engine) as connection:
                assert claim_groups(connection, anew, [GROUP, "other"], former_id) == {"other": "pool"}
        assert not has(engine, OURS)

    def test_who_knows_a_name_only_asks_for_no_server(self, engine: Engine) -> None:
        """As a command does while the API does not answer."""
        claim(engine, OURS)
        assert has(engine, PoolKey("pool"))
        assert not has(engine, PoolKey("another"))

    def test_of_many_servers_one_gets_it(self, engine: Engine) -> None:
        """Where they claim it at the same moment."""
        pools = [PoolKey("pool", f"server-{number}") for number in range(4)]
        found = race([partial(claim, engine, pool) for pool in pools])
        assert sorted(map(len, found)) == [0, 1, 1, 1]
        assert [has(engine, pool) for pool in pools] == [not foreign for foreign in found]


class TestTakeOver:
    @pytest.mark.parametrize("pool", [OURS, ELSEWHERE], ids=["of the same name", "of another name"])
    def test_not_while_a_node_of_the_former_pool_lives(self, engine: Engine, pool: PoolKey) -> None:
        """Just within the time it lives; who asks is told its name."""
        claim(engine, THEIRS)
        enter(engine, OTHER, "a", GROUP)
        rewind(engine, "taskadapter_node", "last_seen", SILENT - 5)
        assert take_over(engine, pool) == ["node-2"]
        assert has(engine, THEIRS)
        rewind(engine, "taskadapter_node", "last_seen", 6)
        assert take_over(engine, pool) == []
        assert has(engine, pool)
        assert not has(engine, THEIRS)

    def test_at_once_when_they_have_left(self, engine: Engine) -> None:
        """As nodes do that are stopped."""
        claim(engine, THEIRS)
        enter(engine, OTHER, GROUP)
        with transaction(engine) as connection:
            unregister(connection, OTHER)
        assert take_over(engine, OURS) == []
        assert has(engine, OURS)

    def test_who_stands_by_for_other_groups_has_no_say(self, engine: Engine) -> None:
        """Nor has a group whose name begins alike."""
        claim(engine, THEIRS)
        enter(engine, OTHER, "other", f"{GROUP}-2")
        assert take_over(engine, OURS) == []

    def test_whoever_asks_does_not_keep_itself_from_it(self, engine: Engine) -> None:
        """It took part before its pool was made anew."""
        claim(engine, THEIRS)
        enter(engine, ME, GROUP)
        assert take_over(engine, OURS) == []
        assert has(engine, OURS)

    def test_a_node_with_two_pools_is_told_by_its_name(self, engine: Engine) -> None:
        """And not by its entry."""
        claim(engine, THEIRS)
        enter(engine, replace(OTHER, of="pool"), GROUP)
        assert take_over(engine, OURS) == ["node-2"]


def test_the_questions_of_an_agent(engine: Engine, prepared_url: str) -> None:
    """Each is a transaction of its own."""
    assert store.claim_groups(prepared_url, THEIRS, [GROUP]) == {}
    assert store.groups_of_others(prepared_url, OURS, [GROUP, "new"]) == {GROUP: "pool"}
    assert store.take_over_group(prepared_url, OURS, GROUP, ME.incarnation, SILENT) == []
    store._engine(prepared_url).dispose()
    assert has(engine, OURS)
