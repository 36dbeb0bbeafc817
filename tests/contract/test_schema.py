"""Making the tables, and improving those that Ballerina made."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import Engine, Table, func, text

from taskadapter.coordination import schema, store
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.messages import PoolKey
from taskadapter.coordination.nodes import Node, register
from taskadapter.coordination.tokens import acquire, pulse
from taskadapter.errors import SchemaError
from tests.contract.databases import BALLERINA_TABLES, BallerinaNode, race

NODE = Node("node-1", "incarnation", "host-1", 1)


def create(engine: Engine) -> tuple[str, ...]:
    with engine.connect() as connection:
        return schema.create_missing(connection)


def drop(engine: Engine) -> None:
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)


def test_nodes_may_create_at_once(engine: Engine) -> None:
    """Nodes that start together all find the tables, whoever made them."""
    drop(engine)
    race([partial(create, engine)] * 4)
    with engine.connect() as connection:
        assert schema.missing_tables(connection) == ()


def test_whoever_comes_first_makes_them(engine: Engine, prepared_url: str) -> None:
    """Of several that ask for something at once, where there are no tables, none fails."""
    calls = [partial(store.claim_groups, prepared_url, PoolKey("pool"), {f"group-{n}"}) for n in range(5)]
    for _ in range(5):
        drop(engine)
        assert race(calls) == [{}] * len(calls)
    store._engine(prepared_url).dispose()


def test_a_ledger_that_is_gone_is_not_made_in_silence(engine: Engine, prepared_url: str) -> None:
    """With an empty one bodies would begin again; who knows that may have it made."""
    create(engine)
    with engine.begin() as connection:
        schema.ledger.drop(connection)
    try:
        for _ in range(2):
            with pytest.raises(SchemaError, match=r"lacks taskadapter_ledger, .*`taskadapter db init`"):
                store.entries(prepared_url, ["key"])
    finally:
        with engine.connect() as connection:
            assert schema.create_missing(connection, lost=True) == (schema.ledger.name,)
            assert schema.create_missing(connection) == ()
    assert store.entries(prepared_url, ["key"]) == []
    store._engine(prepared_url).dispose()


@pytest.mark.parametrize("gone", [schema.token_holder, schema.group, schema.job_progress])
def test_no_table_that_is_gone_is_made_in_silence(engine: Engine, prepared_url: str, gone: Table) -> None:
    """Terms would begin at one again, and counts."""
    create(engine)
    with engine.begin() as connection:
        gone.drop(connection)
    try:
        with pytest.raises(SchemaError, match=f"lacks {gone.name}, "):
            store.require_database(prepared_url, 0)
    finally:
        with engine.connect() as connection:
            schema.create_missing(connection, lost=True)
    store._engine(prepared_url).dispose()


def test_tables_that_were_half_made_are_completed(engine: Engine) -> None:
    """By any node: the one that made them may have died meanwhile, or is making them now."""
    drop(engine)
    with engine.begin() as connection:
        schema.schema_step.create(connection)
        schema.node.create(connection)
        connection.execute(schema.schema_step.insert().values(step=schema.VERSION))
    assert schema.ledger.name in create(engine)
    with engine.begin() as connection:
        schema.ledger.drop(connection)
    with pytest.raises(SchemaError, match="lacks taskadapter_ledger"):
        create(engine)
    with engine.connect() as connection:
        assert schema.create_missing(connection, lost=True) == (schema.ledger.name,)


def test_the_script_does_the_same(engine: Engine) -> None:
    """What a DBA gets creates every table, and does no harm when run again."""
    drop(engine)
    for _ in range(2):
        with engine.begin() as connection:
            for statement in schema.ddl(engine.dialect).split(";\n"):
                if statement.strip():
                    connection.execute(text(statement))
    with engine.connect() as connection:
        assert schema.missing_tables(connection) == ()
        assert schema.upgrades(connection) == ()


def test_the_script_does_not_take_older_tables_for_new_ones(engine: Engine) -> None:
    """It brings nothing along, and so leaves it to be said that somebody has to."""
    with engine.begin() as connection:
        connection.execute(schema.schema_step.insert().values(step=1, done=func.current_timestamp()))
        for statement in schema.ddl(engine.dialect).split(";\n"):
            if statement.strip():
                connection.execute(text(statement))
        assert schema.version(connection) == 1


def test_a_column_that_is_missing(engine: Engine) -> None:
    """Whoever writes to a table of an older release is told so."""
    with pytest.raises(SchemaError), transaction(engine) as connection:
        connection.execute(text("INSERT INTO taskadapter_group (group_id, new) VALUES ('group', 'new')"))


@pytest.mark.databases("postgresql", "mysql")  # Ballerina does not know SQLite
def test_ballerinas_tables_are_improved(engine: Engine) -> None:
    """After the upgrade long names fit, and time zones and fractions of seconds are kept."""
    drop(engine)
    with engine.begin() as connection:
        for statement in BALLERINA_TABLES:
            connection.execute(text(statement))
    create(engine)
    with engine.connect() as connection:
        theirs = BallerinaNode(connection, "ballerina", "group", 30)
        theirs.try_to_acquire()
        theirs.heartbeat()
    with engine.begin() as connection:
        statements = schema.upgrades(connection)
        assert ["group_id" in statements[0], "last_heartbeat" in statements[1]] == [True, True]
        for statement in statements:
            connection.execute(text(statement))
        assert schema.upgrades(connection) == ()
    with transaction(engine) as connection:
        assert acquire(connection, NODE, ["group"], 30).taken == ()
        assert [taken.term for taken in acquire(connection, NODE, ["g" * 255], 30).taken] == [1]
        register(connection, NODE, ["group"], 30)
        (sighting,) = pulse(connection, NODE, [], ["group"], 30).sightings or ()
    assert sighting.age is not None
    assert -1.1 < sighting.age < 60
