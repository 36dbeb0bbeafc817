"""A database that stands still: it takes what is sent, refuses nothing, and does not answer."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Connection, Engine, QueuePool, insert, select, text

from deployments.local import postgres
from taskadapter.coordination import schema
from taskadapter.coordination.engines import Timeouts, open_engine, transaction, url_of
from taskadapter.errors import DatabaseUnavailableError
from tests.contract.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import Postgres

QUICK = Timeouts(connect=1, statement=1)
WITHIN = 10.0
"""A pooled connection is tried, another is opened, a statement is given up: two or three seconds each."""


@pytest.fixture
def proxy(prepared_url: str) -> Iterator[Proxy]:
    """A route to the database on which everything can stand still."""
    url = url_of(prepared_url)
    proxy = Proxy(url.host or "", url.port or 3306)
    yield proxy
    proxy.close()


@pytest.fixture
def distant(engine: Engine, proxy: Proxy) -> Iterator[Engine]:
    """The same database over that route."""
    distant = open_engine(engine.url.set(host="127.0.0.1", port=proxy.port), timeouts=QUICK)
    yield distant
    distant.dispose()


@contextmanager
def given_up(engine: Engine) -> Iterator[None]:
    """Expect that what is asked is given up in time, as of a database that is away."""
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError, match=r"127\.0\.0\.1"):
        yield
    assert time.monotonic() - began < WITHIN
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedout() == 0


def ask(connection: Connection) -> int | None:
    number: int | None = connection.execute(text("SELECT 42")).scalar()
    return number


def test_a_question_is_given_up(distant: Engine, proxy: Proxy) -> None:
    """Amid a transaction; who asks again when it goes on is answered that question and no other."""
    with given_up(distant), transaction(distant) as connection:
        assert ask(connection) == 42
        proxy.freeze()
        connection.execute(text("SELECT 41"))
    proxy.thaw()
    with transaction(distant) as connection:
        assert ask(connection) == 42


def test_a_commit_is_given_up(distant: Engine, proxy: Proxy) -> None:
    """Whoever asked does not take it for done: it is unknown, and is found out by asking again."""
    row = {"group_id": "group", "task_id": "node-1", "term": 1}
    with given_up(distant), transaction(distant) as connection:
        connection.execute(insert(schema.token_holder).values(row))
        proxy.freeze()
    proxy.thaw()
    with transaction(distant) as connection:
        found = connection.execute(select(schema.token_holder.c.task_id)).scalars().all()
    assert found in ([], ["node-1"])


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL of its own, whose processes may be stopped."""
    with postgres() as server:
        yield server


@pytest.mark.parametrize("pre_ping", [True, False])
def test_a_server_that_is_stopped(server: Postgres, pre_ping: bool) -> None:
    """A pooled connection is given up, with or without a try; so is a new one; and then it goes on."""
    engine = open_engine(server.url(), timeouts=QUICK, pre_ping=pre_ping)
    with transaction(engine) as connection:
        assert ask(connection) == 42
    server.pause()
    try:
        for _ in range(2):
            with given_up(engine), transaction(engine) as connection:
                ask(connection)
    finally:
        server.resume()
    with transaction(engine) as connection:
        assert ask(connection) == 42
    engine.dispose()


def test_the_server_says_itself_that_a_statement_took_too_long(server: Postgres) -> None:
    """It is not given up before: what it says tells a lock or a load from a standstill."""
    engine = open_engine(server.url(), timeouts=QUICK)
    said = "the statement took too long"
    with pytest.raises(DatabaseUnavailableError, match=said), transaction(engine) as connection:
        connection.execute(text("SELECT pg_sleep(30)"))
    engine.dispose()
