"""What a caller is told when the database does not do what it should."""

from __future__ import annotations

import re
import socket
import struct
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from taskadapter.coordination import schema, store
from taskadapter.coordination.engines import Timeouts, open_engine, transaction, url_of
from taskadapter.coordination.nodes import Node
from taskadapter.coordination.overview import check_rights, read_status
from taskadapter.coordination.progress import load_state, pause
from taskadapter.coordination.tokens import acquire
from taskadapter.errors import (
    AccessDeniedError,
    CoordinationError,
    DatabaseUnavailableError,
    SchemaError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NODE = Node("node-1", "incarnation", "host-1", 1)
SECRET = "s3cret"
QUICK = Timeouts(connect=1, statement=1)
PATIENT = Timeouts(connect=60, statement=60)


def ask(engine: Engine) -> None:
    with transaction(engine) as connection:
        read_status(connection)


def test_missing_tables(engine: Engine) -> None:
    """Without its tables the database is unusable; the message says which command helps, and no SQL."""
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
    try:
        with pytest.raises(SchemaError, match=r"no node .* `taskadapter db init`") as caught:
            ask(engine)
        assert not re.search("token_holder|LINE|FROM", str(caught.value))
        with engine.connect() as connection:
            assert schema.missing_tables(connection) == tuple(sorted(schema.metadata.tables))
    finally:
        with engine.connect() as connection:
            assert schema.create_missing(connection) == tuple(sorted(schema.metadata.tables))
            assert schema.create_missing(connection) == ()


REFUSED = r"correct .* its grants|name a file that this user may write"


@pytest.fixture
def reader(engine: Engine, tmp_path: Path) -> Iterator[Engine]:
    """The same database, as a user who may read and nothing else."""
    name = engine.dialect.name
    if name == "sqlite":
        url = url_of(f"sqlite:///file:{engine.url.database}?mode=ro&uri=true")
        setup, teardown = [], []
    else:
        url = engine.url.set(username="ta_reader", password=SECRET)
        role = {"postgresql": "ta_reader", "mysql": "'ta_reader'@'%'"}[name]
        setup = {
            "postgresql": [
                f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'",
                f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
            ],
            "mysql": [
                f"CREATE USER {role} IDENTIFIED BY '{SECRET}'",
                f"GRANT SELECT ON * TO {role}",
            ],
        }[name]
        owned = f"DROP OWNED BY {role}" if name == "postgresql" else "SELECT 1"
        teardown = [owned, f"DROP {'ROLE' if name == 'postgresql' else 'USER'} {role}"]
    with engine.begin() as connection:
        for statement in setup:
            connection.execute(text(statement))
    restricted = open_engine(url)
    yield restricted
    restricted.dispose()
    with engine.begin() as connection:
        for statement in teardown:
            connection.execute(text(statement))


def test_missing_grants(reader: Engine) -> None:
    """A user who may not write is told so, and can still read."""
    ask(reader)
    with pytest.raises(AccessDeniedError, match=REFUSED), transaction(reader) as connection:
        acquire(connection, NODE, ["group"], 30)


def test_rights_are_checked_without_a_trace(engine: Engine, reader: Engine) -> None:
    """Whoever may write passes, and leaves nothing; who may only read is refused."""
    with transaction(engine) as connection:
        check_rights(connection)
        assert not any(connection.execute(table.select()).all() for table in (schema.node, schema.ledger))
    with pytest.raises(AccessDeniedError, match=REFUSED), transaction(reader) as connection:
        check_rights(connection)


def test_wrong_password_on_mysql(mysql_url: str) -> None:
    """A wrong password is named as such, and is not in the message."""
    engine = open_engine(mysql_url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE USER 'ta_other'@'%' IDENTIFIED BY '{SECRET}'"))
    wrong = open_engine(engine.url.set(username="ta_other", password="wr0ng"))
    try:
        with pytest.raises(AccessDeniedError, match="ta_other") as caught:
            ask(wrong)
        assert "wr0ng" not in str(caught.value)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP USER 'ta_other'@'%'"))
        engine.dispose()


LIMITED = {
    "postgresql": "ALTER ROLE ta_reader CONNECTION LIMIT 1",
    "mysql": "ALTER USER 'ta_reader'@'%' WITH MAX_USER_CONNECTIONS 1",
}


@pytest.mark.databases("postgresql", "mysql")
def test_too_many_connections(engine: Engine, reader: Engine) -> None:
    """It runs and can be reached: what helps is a higher limit, or less that asks."""
    with engine.begin() as connection:
        connection.execute(text(LIMITED[engine.dialect.name]))
    other = open_engine(reader.url)
    with (
        reader.connect(),
        pytest.raises(DatabaseUnavailableError, match="; raise that limit, or have fewer nodes"),
    ):
        ask(other)


def test_unknown_database(prepared_url: str) -> None:
    """A database that does not exist is not taken for one that is down."""
    url = url_of(prepared_url)
    if url.get_backend_name() == "sqlite":
        url = url.set(database="/nowhere/tasks.db")
    else:
        url = url.set(database="ta_nowhere")
    with pytest.raises(AccessDeniedError, match="nowhere"):
        ask(open_engine(url, timeouts=PATIENT))


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_no_route(scheme: str) -> None:
    """Where nothing listens the database is unavailable; and the message says where."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"{scheme}://someone:{SECRET}@127.0.0.1:{port}/tasks"
    with pytest.raises(DatabaseUnavailableError, match=f"someone@127.0.0.1:{port}/tasks") as caught:
        ask(open_engine(url, timeouts=QUICK))
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], Any]], int]]:
    """Serve one client as a function does; return the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads = []
        clients = []

        def start(talk: Callable[[socket.socket], Any]) -> int:
            def accept() -> None:
                client, _ = server.accept()
                with client:
                    clients.append(client)
                    talk(client)

            threads.append(threading.Thread(target=accept))
            threads[-1].start()
            port: int = server.getsockname()[1]
            return port

        yield start
        for client in clients:  # one that gives up may not hang up for long
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(timeout=10)


def refuse(client: socket.socket) -> None:
    """Refuse a password as PostgreSQL does: an ErrorResponse to the startup message."""
    client.recv(8)
    client.sendall(b"N")  # no TLS
    client.recv(1000)
    fields = [b"SFATAL", b"C28P01", b'Mpassword authentication failed for user "someone"', b""]
    body = b"".join(field + b"\0" for field in fields)
    client.sendall(b"E" + struct.pack("!i", 4 + len(body)) + body)


def test_wrong_password_on_postgresql(serve: Callable[..., int]) -> None:
    """A wrong password is named as such, and is not in the message."""
    port = serve(refuse)
    engine = open_engine(f"postgresql://someone:{SECRET}@127.0.0.1:{port}/tasks")
    with pytest.raises(AccessDeniedError, match="someone") as caught:
        ask(engine)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_a_frozen_server(scheme: str, serve: Callable[..., int]) -> None:
    """A server that takes the connection and says nothing is given up on in time."""
    port = serve(lambda client: client.recv(1000) and client.recv(1000))
    with pytest.raises(DatabaseUnavailableError):
        ask(open_engine(f"{scheme}://someone@127.0.0.1:{port}/tasks", timeouts=QUICK))


READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
}


@pytest.mark.databases("postgresql", "mysql")
def test_a_session_that_is_read_only_is_not_kept(engine: Engine) -> None:
    """It fails one question, of whatever kind, and the next one gets a session that may write."""
    for asked in (write, lock):
        with engine.connect() as connection:
            connection.exec_driver_sql(READ_ONLY[engine.dialect.name])
            connection.commit()
        with pytest.raises(DatabaseUnavailableError, match="name the primary"):
            asked(engine)
        asked(engine)


def write(engine: Engine) -> None:
    with transaction(engine) as connection:
        pause(connection, "job", paused=True)


def lock(engine: Engine) -> None:
    with transaction(engine) as connection:
        acquire(connection, NODE, ["group"], 30)


@pytest.mark.databases("postgresql")
def test_sessions_of_a_database_that_was_read_only_are_not_used(engine: Engine, prepared_url: str) -> None:
    """Those that were opened meanwhile stay read-only, idle ones too: all of them are replaced."""
    name = engine.url.database
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        store._engine(prepared_url).dispose()
        with ExitStack() as idle:  # several are in the pool then
            for _ in range(3):
                idle.enter_context(store._transaction(prepared_url))
        with pytest.raises(DatabaseUnavailableError, match="read-only"):
            store.pause(prepared_url, uuid4(), paused=True)
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with ExitStack() as taken:
        for _ in range(3):
            connection = taken.enter_context(store._transaction(prepared_url))
            assert connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "off"
    store._engine(prepared_url).dispose()


@pytest.mark.databases("postgresql", "mysql")
def test_a_session_is_kept_that_has_waited_for_a_lock(engine: Engine) -> None:
    """A new one would wait as long."""
    write(engine)
    name = {"postgresql": "lock_timeout = '100ms'", "mysql": "innodb_lock_wait_timeout = 1"}
    sessions = {"postgresql": "pg_backend_pid()", "mysql": "connection_id()"}
    session = text(f"SELECT {sessions[engine.dialect.name]}")
    other = open_engine(engine.url)
    with transaction(engine) as connection:
        pause(connection, "job", paused=False)
        with other.begin() as waiting:
            waiting.exec_driver_sql(f"SET {name[engine.dialect.name]}")
            before = waiting.execute(session).scalar()
        with pytest.raises(DatabaseUnavailableError, match="lock"):
            write(other)
    with other.connect() as again:
        assert again.execute(session).scalar() == before
    other.dispose()


def test_state_is_in_no_message(engine: Engine) -> None:
    """What a job keeps does not appear in an error about the database."""
    with pytest.raises(CoordinationError) as caught, transaction(engine) as connection:
        connection.execute(text("SELECT :a FROM taskadapter_nothing"), {"a": SECRET})
    assert SECRET not in str(caught.value)
    assert SECRET not in str(caught.value.__cause__)


def test_another_kind_of_database() -> None:
    """A database that nodes cannot coordinate through is refused by name."""
    with pytest.raises(CoordinationError, match=r"oracle.*use postgresql"):
        open_engine("oracle://127.0.0.1/tasks")


@dataclass
class Config:
    """As the configuration objects are; `password` reveals itself only when asked."""

    kind: str
    host: str = "db"
    port: int = 1234
    user: str | None = "someone"
    password: Any = None
    database: str | None = "tasks"
    path: Path = Path("tasks.db")


class Hidden:
    def get_secret_value(self) -> str:
        return "p@ss/word"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config("postgresql"), "postgresql+psycopg://someone@db:1234/tasks"),
        (Config("mysql", password=Hidden()), "mysql+pymysql://someone:p%40ss%2Fword@db:1234/tasks"),
        (Config("mysql", user=None, database=None), "mysql+pymysql://db:1234"),
        (Config("sqlite"), f"sqlite+pysqlite:///{Path.cwd()}/tasks.db"),
        ("mariadb://db/tasks", "mysql+pymysql://db/tasks"),
        ("postgres://someone@db/tasks", "postgresql+psycopg://someone@db/tasks"),
    ],
)
def test_urls(config: Any, expected: str) -> None:
    """A configuration object or a URL names the same database, with our driver."""
    assert url_of(config).render_as_string(hide_password=False) == expected


def test_no_state(engine: Engine) -> None:
    """A database that works raises nothing."""
    with transaction(engine) as connection:
        assert load_state(connection, "job") is None
