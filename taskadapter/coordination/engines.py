"""How a database is named and opened: sessions that behave alike whatever the server's defaults."""

from __future__ import annotations

import math
import os
import re
import sqlite3
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sqlalchemy import create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from taskadapter.coordination.faults import is_of_session, translated, where
from taskadapter.errors import CoordinationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine.interfaces import DBAPIConnection

__all__ = [
    "Database",
    "Timeouts",
    "connected",
    "exclusive",
    "identity_of",
    "open_engine",
    "transaction",
    "url_of",
    "would_make_file",
]


class DatabaseConfig(Protocol):
    """What `PostgresqlConfig`, `MysqlConfig` and `SqliteConfig` have in common."""

    @property
    def kind(self) -> Literal["postgresql", "mysql", "sqlite"]:
        """Which database it is."""


Database = DatabaseConfig | URL | str
"""How a caller may name a database."""

_DRIVERS = {
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",  # as many who host one write it
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "sqlite": "sqlite+pysqlite",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a call may take, in seconds.

    `connect` is for a new connection (the PostgreSQL driver waits at least 2). `statement` is for
    one statement, lock waits included; a PostgreSQL that stands still is given up a second later.
    `idle`, if not None, is after how long the *server* drops a session that went silent, in a
    transaction on PostgreSQL and anywhere on MySQL, so that a frozen client does not keep its locks.
    """

    connect: float = 5.0
    statement: float = 10.0
    idle: float | None = None


def url_of(database: Database) -> URL:
    """Return the SQLAlchemy URL of a database, with the driver that this package uses.

    Raises:
        CoordinationError: it is of another kind, no URL, one that can be read in two ways, or names a
            file that would be another one in each folder.
    """
    if isinstance(database, str | URL):
        try:
            url = make_url(database)
        except (ArgumentError, ValueError):  # which may have the password in their words
            raise CoordinationError(
                "the URL of the coordination database cannot be read; write it as "
                "postgresql://USER@HOST:PORT/DATABASE, mysql://USER@HOST:PORT/DATABASE or sqlite:////FILE, "
                "and special characters in a password as %XX"
            ) from None
        url = url.set(drivername=_driver(url.get_backend_name()))
        if _is_ambiguous(url, database):
            raise CoordinationError(
                "the URL of the coordination database can be read in more than one way; write special "
                "characters in a user, a password or an option as %XX: @ as %40, / as %2F, # as %23, ? as "
                "%3F, % as %25"
            )
        if url.get_backend_name() == "sqlite" and not _path(url).is_absolute():
            raise CoordinationError(
                f"the SQLite URL of the coordination database names {str(_path(url))!r}, which is another "
                "file in each folder, or none; write its absolute path after three slashes, as in "
                "sqlite:////home/me/tasks.db"
            )
        return url
    if database.kind == "sqlite":
        path = database.path.absolute()  # type: ignore[attr-defined]
        return URL.create(_DRIVERS["sqlite"], database=str(path))
    return _server_url(database)


def _is_ambiguous(url: URL, written: URL | str) -> bool:
    """Return whether parts of a password may have been taken for the host, or for what is behind it.

    The first `@` ends the password: what is meant to be part of it would be shown with the host.
    """
    if url.get_backend_name() == "sqlite":
        return False  # an @ in the name of a file is nothing else
    if isinstance(written, str):
        user, at, rest = written.partition("://")[2].partition("@")
        has_options = at and not user.startswith("/") and re.search(r"\?\w+=", user)
        if "@" in rest or has_options:
            return True
    host, database = url.host or "", url.database or ""
    return "@" in host + database or "#" in host


def _driver(kind: str) -> str:
    if kind not in _DRIVERS:
        raise CoordinationError(
            f"{kind}: not a database that nodes can coordinate through; use postgresql, mysql or sqlite"
        )
    return _DRIVERS[kind]


def _path(url: URL) -> Path:
    """Return the file of a SQLite database, which may be named by a URI."""
    return Path((url.database or ":memory:").removeprefix("file:"))


def _server_url(config: Any) -> URL:
    return URL.create(
        _DRIVERS[config.kind],
        username=config.user,
        password=config.password.get_secret_value() if config.password else None,
        host=config.host,
        port=config.port,
        database=config.database,
    )


def open_engine(
    database: Database, *, timeouts: Timeouts | None = None, pre_ping: bool = True, pool_files: bool = True
) -> Engine:
    """Return an engine whose sessions all behave alike, whatever the server's defaults.

    They are in UTC and READ COMMITTED, give up in time, and on SQLite lock at `BEGIN`. Nothing is
    connected yet. `pre_ping` replaces a pooled connection that died, at one round trip a checkout.
    `pool_files` keeps connections to a SQLite file, which is soon opened: one that is idle keeps all of its
    process to the log that it knows, should the file be moved away and back.

    Raises:
        CoordinationError: the URL cannot be used, or its driver is not installed.
    """
    timeouts = timeouts or Timeouts()
    url = url_of(database)
    name = url.get_backend_name()
    try:
        engine = create_engine(
            url,
            pool_pre_ping=pre_ping,
            # Statements carry job state, which belongs in no log.
            hide_parameters=True,
            connect_args=_CONNECT_ARGS[name](timeouts),
            **({} if name == "sqlite" else {"isolation_level": _ISOLATION}),
            **({"poolclass": NullPool} if name == "sqlite" and not pool_files else {}),
        )
    except ImportError as error:
        raise CoordinationError(
            f"{where(url)}: its driver cannot be imported ({error}); `pip install '{_PACKAGES[name]}'`"
        ) from error
    _PREPARE[name](engine, timeouts)
    return engine


GRACE_SECONDS = 1.0
"""How long after a statement's timeout a server may still say that it took too long."""

_PACKAGES = {"postgresql": "psycopg[binary]", "mysql": "taskadapter[mysql]"}


# A second statement must see what was committed while the first one waited for a lock.
_ISOLATION = "READ COMMITTED"


def _postgresql_connect_args(timeouts: Timeouts) -> dict[str, Any]:
    return {
        "connect_timeout": max(2, math.ceil(timeouts.connect)),
        "tcp_user_timeout": math.ceil(timeouts.statement * 1000),
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "application_name": "taskadapter",
    }


def _mysql_connect_args(timeouts: Timeouts) -> dict[str, Any]:
    from pymysql.constants import CLIENT  # an extra, which need not be installed

    return {
        "connect_timeout": max(1, math.ceil(timeouts.connect)),
        "read_timeout": timeouts.statement,
        "write_timeout": timeouts.statement,
        "charset": "utf8mb4",
        "client_flag": CLIENT.FOUND_ROWS | CLIENT.MULTI_STATEMENTS,
    }


def _sqlite_connect_args(timeouts: Timeouts) -> dict[str, Any]:
    return {"timeout": timeouts.statement, "check_same_thread": False}


_CONNECT_ARGS = {
    "postgresql": _postgresql_connect_args,
    "mysql": _mysql_connect_args,
    "sqlite": _sqlite_connect_args,
}


def _prepare_postgresql(engine: Engine, timeouts: Timeouts) -> None:
    # Not connection options: PgBouncer refuses those.
    milliseconds = math.ceil(timeouts.statement * 1000)
    settings = f"SET TIME ZONE 'UTC'; SET statement_timeout = {milliseconds}"
    settings += f"; SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {_ISOLATION}"
    if timeouts.idle is not None:
        idle = math.ceil(timeouts.idle * 1000)
        settings += f"; SET idle_in_transaction_session_timeout = {idle}"
    _on_connect(engine, settings)
    _give_up(engine, timeouts.statement + GRACE_SECONDS)


def _give_up(engine: Engine, seconds: float) -> None:
    """Let no connection wait longer than that for an answer."""
    from taskadapter.coordination.patience import PatientConnection  # it imports the driver

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, args: Any, parameters: Any) -> PatientConnection:
        connection = PatientConnection.connect(*args, **parameters)
        connection.patience = seconds
        return connection


def _prepare_mysql(engine: Engine, timeouts: Timeouts) -> None:
    # Without strict mode a name that is too long for its column would be cut.
    settings = (
        "SET time_zone = '+00:00', sql_mode = CONCAT(@@sql_mode, ',STRICT_TRANS_TABLES'), "
        f"innodb_lock_wait_timeout = {max(1, math.floor(timeouts.statement))}"
    )
    if timeouts.idle is not None:
        settings += f", wait_timeout = {max(2, math.ceil(timeouts.idle))}"
    _on_connect(engine, settings)


def _on_connect(engine: Engine, settings: str) -> None:
    @event.listens_for(engine, "connect")
    def apply(connection: DBAPIConnection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(settings)
        cursor.close()
        connection.commit()


def _prepare_sqlite(engine: Engine, _timeouts: Timeouts) -> None:
    @event.listens_for(engine, "connect")
    def apply(connection: Any, _record: object) -> None:
        # The driver would begin late and without a lock; `begin` below does it.
        connection.isolation_level = None
        # Refused while another process is about to do the same.
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # SQLite has no row locks: a transaction owns the file from its start.
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")


_PREPARE = {
    "postgresql": _prepare_postgresql,
    "mysql": _prepare_mysql,
    "sqlite": _prepare_sqlite,
}


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Give a connection; after a fault that a new session may not have, no pooled one is used again.

    A session that was opened while the database was read-only stays so.

    Raises:
        CoordinationError: the database failed; see `translated`.
    """
    with translated(engine.url), engine.connect() as connection:
        try:
            yield connection
        except DBAPIError as exc:
            if is_of_session(exc, engine.url):
                connection.invalidate()
                engine.dispose()
            raise


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Give a connection in a transaction, committed at the end or rolled back on an error.

    Raises:
        CoordinationError: the database failed; see `translated`.
    """
    with connected(engine) as connection, connection.begin():
        yield connection


@contextmanager
def exclusive(connection: Connection) -> Iterator[None]:
    """Make a transaction on a connection that otherwise commits each statement."""
    begin = "BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "BEGIN"
    connection.exec_driver_sql(begin)
    try:
        yield
    except BaseException:
        with suppress(DBAPIError):
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


def would_make_file(url: URL) -> bool:
    """Return whether whoever opens a database, even to read it, would make it: a SQLite file."""
    path = _path(url)
    return url.get_backend_name() == "sqlite" and not path.exists() and path.parent.is_dir()


def identity_of(url: URL) -> tuple[int, int] | None:
    """Return what tells a SQLite database's file from another one of its name; None where there is none."""
    if url.get_backend_name() != "sqlite" or not url.database:
        return None
    try:
        found = os.stat(url.database)  # noqa: PTH116 - it may be a URI, which is no path
    except OSError:
        return None
    return found.st_dev, found.st_ino
