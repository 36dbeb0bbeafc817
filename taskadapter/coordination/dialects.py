"""What differs between PostgreSQL, MySQL and SQLite, one function for each difference.

Everything else in this package writes plain SQLAlchemy Core and runs on all of them.
"""

from __future__ import annotations

import math
import os
import re
import socket
import sqlite3
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from sqlalchemy import Float, create_engine, event, func, make_url, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from taskadapter.errors import (
    AccessDeniedError,
    CoordinationError,
    DatabaseUnavailableError,
    SchemaError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Column, Connection, Dialect, Engine, Select, Table
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.sql.dml import Insert, UpdateBase

__all__ = [
    "Database",
    "Interrupter",
    "Timeouts",
    "database_now",
    "ensure_row",
    "ensured",
    "exclusive",
    "file_of",
    "has_writable_ctes",
    "hear",
    "limit_idle",
    "listen",
    "notify",
    "open_engine",
    "seconds_since",
    "together",
    "transaction",
    "translated",
    "upsert",
    "url_of",
    "where",
    "widen",
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
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
    "sqlite": "sqlite+pysqlite",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a call may take, in seconds.

    `connect` is for a new connection (the PostgreSQL driver waits at least 2). `statement` is for
    one statement, lock waits included. `idle`, if not None, is after how long the *server* drops a
    session that went silent, in a transaction on PostgreSQL and anywhere on MySQL, so that a frozen
    client does not keep its locks.
    """

    connect: float = 5.0
    statement: float = 10.0
    idle: float | None = None


def url_of(database: Database) -> URL:
    """Return the SQLAlchemy URL of a database, with the driver that this package uses.

    Raises:
        CoordinationError: it is of another kind, or no URL.
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
        return url.set(drivername=_driver(url.get_backend_name()))
    if database.kind == "sqlite":
        return URL.create(_DRIVERS["sqlite"], database=str(database.path))  # type: ignore[attr-defined]
    return _server_url(database)


def _driver(kind: str) -> str:
    if kind not in _DRIVERS:
        raise CoordinationError(
            f"{kind}: not a database that nodes can coordinate through; use postgresql, mysql or sqlite"
        )
    return _DRIVERS[kind]


def _server_url(config: Any) -> URL:
    return URL.create(
        _DRIVERS[config.kind],
        username=config.user,
        password=config.password.get_secret_value() if config.password else None,
        host=config.host,
        port=config.port,
        database=config.database,
    )


def open_engine(database: Database, *, timeouts: Timeouts | None = None, pre_ping: bool = True) -> Engine:
    """Return an engine whose sessions all behave alike, whatever the server's defaults.

    They are in UTC and READ COMMITTED, give up in time, and on SQLite lock at `BEGIN`. Nothing is
    connected yet. `pre_ping` replaces a pooled connection that died, at one round trip a checkout.

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
        )
    except ImportError as error:
        raise CoordinationError(
            f"{where(url)}: its driver cannot be imported ({error}); `pip install '{_PACKAGES[name]}'`"
        ) from error
    _PREPARE[name](engine, timeouts)
    return engine


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


class database_now(FunctionElement[Any]):  # noqa: N801  reads as an SQL function
    """The database's clock, as a value for a column of moments."""

    inherit_cache = True


@compiles(database_now, "postgresql")
def _now_postgresql(*_: Any, **__: Any) -> str:
    # Unlike CURRENT_TIMESTAMP it goes on while a transaction waits for a lock.
    return "clock_timestamp()"


@compiles(database_now, "mysql")
def _now_mysql(*_: Any, **__: Any) -> str:
    return "CURRENT_TIMESTAMP(6)"


@compiles(database_now, "sqlite")
def _now_sqlite(*_: Any, **__: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


class seconds_since(FunctionElement[float]):  # noqa: N801  reads as an SQL function
    """Seconds that have passed on the database's clock since a moment; NULL for NULL.

    On MySQL a moment without a fraction counts as a second later than it says: it may have been cut
    (by a `TIMESTAMP` column, or by `CURRENT_TIMESTAMP` without a precision), and must not look
    older than it is.
    """

    inherit_cache = True
    type = Float()


@compiles(seconds_since, "postgresql")
def _since_postgresql(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    return f"CAST(EXTRACT(EPOCH FROM clock_timestamp() - {moment}) AS DOUBLE PRECISION)"


@compiles(seconds_since, "mysql")
def _since_mysql(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    elapsed = f"TIMESTAMPDIFF(MICROSECOND, {moment}, CURRENT_TIMESTAMP(6)) * 1e-6"
    return f"({elapsed} - (MICROSECOND({moment}) = 0))"


@compiles(seconds_since, "sqlite")
def _since_sqlite(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    moment = compiler.process(element.clauses, **kw)
    return f"((julianday('now') - julianday({moment})) * 86400.0)"


Rows: TypeAlias = "Mapping[str, Any] | Sequence[Mapping[str, Any]]"
"""One row to insert, or several."""


def ensured(dialect: Dialect, table: Table, values: Rows) -> Insert:
    """Return what inserts rows unless their primary key exists; lock them next, to see which.

    Where another transaction has inserted the same key, that waits for its outcome.
    """
    keys = list(table.primary_key.columns)
    match dialect.name:
        case "postgresql":
            return postgresql.insert(table).values(values).on_conflict_do_nothing(index_elements=keys)
        case "sqlite":
            return sqlite.insert(table).values(values).on_conflict_do_nothing(index_elements=keys)
        case _:
            # IGNORE would also cut values that are too long. And after an error of a plain INSERT
            # several transactions would share a lock, and deadlock as each wants its own.
            unchanged = {column.name: column for column in keys}
            return mysql.insert(table).values(values).on_duplicate_key_update(unchanged)


def ensure_row(connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Insert a row unless its primary key exists, as `ensured` does."""
    connection.execute(ensured(connection.dialect, table, values))


def upsert(dialect: Dialect, table: Table, values: Rows, changes: Mapping[str, Any]) -> Insert:
    """Return what inserts rows, or makes `changes` to those whose primary key exists."""
    keys, changed = list(table.primary_key.columns), dict(changes)
    match dialect.name:
        case "postgresql":
            postgres_insert = postgresql.insert(table).values(values)
            return postgres_insert.on_conflict_do_update(index_elements=keys, set_=changed)
        case "sqlite":
            sqlite_insert = sqlite.insert(table).values(values)
            return sqlite_insert.on_conflict_do_update(index_elements=keys, set_=changed)
        case _:
            return mysql.insert(table).values(values).on_duplicate_key_update(changed)


def together(connection: Connection, *statements: Select[Any] | UpdateBase) -> list[Any]:
    """Execute statements in their order, in one round trip to a server.

    Returns:
        For each its rows, or how many it has matched where it gives none.
    """
    if connection.dialect.name == "sqlite":
        results = [connection.execute(statement) for statement in statements]
        return [result.all() if result.returns_rows else result.rowcount for result in results]
    dialect: Any = connection.dialect
    # Values are written into the text: a driver sends no more than one statement with parameters.
    options = {"literal_binds": True}
    texts = [str(statement.compile(dialect=dialect, compile_kwargs=options)) for statement in statements]
    driver = connection.connection.cursor()
    try:
        # The compiler doubles percent signs, for a driver that is given parameters.
        driver.execute("; ".join(texts).replace("%%", "%"))
        found = [_outcome(driver)]
        while len(found) < len(statements):
            driver.nextset()
            found.append(_outcome(driver))
    except dialect.loaded_dbapi.Error as exc:
        base = dialect.loaded_dbapi.Error
        raise DBAPIError.instance(None, None, exc, base, dialect=dialect) from exc
    finally:
        driver.close()
    return found


def _outcome(driver: Any) -> Any:
    """Return the rows of the statement that a cursor is at, or how many it has matched."""
    if driver.description is None:
        return driver.rowcount
    row = namedtuple("row", [column[0] for column in driver.description], rename=True)  # type: ignore[misc]
    return [row(*values) for values in driver.fetchall()]


def has_writable_ctes(dialect: Dialect) -> bool:
    """Say whether one statement can both write to tables and read others (`WITH ... INSERT`)."""
    return dialect.name == "postgresql"


def limit_idle(connection: Connection, seconds: float) -> None:
    """Let the server end this transaction if its client does nothing for so long.

    Only PostgreSQL can do that for a single transaction; elsewhere nothing happens.
    """
    if connection.dialect.name == "postgresql":
        milliseconds = max(1, math.ceil(seconds * 1000))
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}")


CHANNEL = "taskadapter"


def notify(connection: Connection, payloads: Sequence[str]) -> None:
    """Wake those who `listen`, once the transaction commits. Only PostgreSQL can."""
    if connection.dialect.name == "postgresql":
        together(connection, *(select(func.pg_notify(CHANNEL, payload)) for payload in payloads))


def listen(connection: Connection) -> int | None:
    """Subscribe to what `notify` sends, and return the file that becomes readable when it comes.

    None if the database cannot do that.
    """
    if connection.dialect.name != "postgresql":
        return None
    connection.exec_driver_sql(f"LISTEN {CHANNEL}")
    return int(_driver_connection(connection).fileno())


def hear(connection: Connection) -> list[str]:
    """Return the payloads that other sessions have sent, without waiting for more."""
    if connection.dialect.name != "postgresql":
        return []
    driver = _driver_connection(connection)
    own = driver.info.backend_pid
    return [heard.payload for heard in driver.notifies(timeout=0) if heard.pid != own]


def file_of(url: URL) -> tuple[int, int] | None:
    """Return what tells a SQLite database's file from another one of its name; None where there is none."""
    if url.get_backend_name() != "sqlite" or not url.database:
        return None
    try:
        found = os.stat(url.database)  # noqa: PTH116 - it may be a URI, which is no path
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Interrupter:
    """Breaks off what another thread executes on a connection, which is lost with it.

    On MySQL the driver's own timeout does that, and this does nothing.
    """

    def __init__(self, connection: Connection) -> None:
        # A file of its own stays valid while the other thread closes the connection.
        self._socket: socket.socket | None = None
        self._sqlite: Any = None
        driver = _driver_connection(connection)
        match connection.dialect.name:
            case "postgresql":
                self._socket = socket.socket(fileno=os.dup(driver.fileno()))
            case "sqlite":
                self._sqlite = driver

    def __call__(self) -> None:
        """Break off; without effect if nothing is executed any more."""
        if self._socket is not None:
            # A frozen server reads no request to cancel: only the wait for it can be ended.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._sqlite is not None:
            with suppress(sqlite3.ProgrammingError):
                self._sqlite.interrupt()

    def close(self) -> None:
        """Let go of the connection."""
        if self._socket is not None:
            self._socket.close()


def _driver_connection(connection: Connection) -> Any:
    return connection.connection.driver_connection


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


def widen(dialect: Dialect, column: Column[Any]) -> str:
    """Return the statement that gives an existing column the type that `column` has."""
    table, type_ = column.table.name, column.type.compile(dialect)
    if dialect.name == "mysql":
        null = "NOT NULL" if not column.nullable else "NULL DEFAULT NULL"
        return f"ALTER TABLE {table} MODIFY COLUMN {column.name} {type_} {null}"
    alter = f"ALTER TABLE {table} ALTER COLUMN {column.name} TYPE {type_}"
    # Our sessions are in UTC, and a heartbeat that is read wrong is replaced by the next.
    return f"{alter} USING {column.name} AT TIME ZONE 'UTC'" if "TIME ZONE" in type_ else alter


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Give a connection in a transaction, committed at the end or rolled back on an error.

    Raises:
        CoordinationError: the database failed; see `translated`.
    """
    with translated(engine.url), engine.begin() as connection:
        yield connection


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn a driver's errors into ours: the one place where that happens.

    Raises:
        DatabaseUnavailableError: no route, no answer in time, a lock or a deadlock; try again.
        AccessDeniedError: a wrong user or password, or a missing grant.
        SchemaError: a missing table or column, or a value longer than its column.
        CoordinationError: anything else the driver reports.
    """
    try:
        yield
    except DBAPIError as exc:
        raise _explain(exc, url) from exc


def _explain(exc: DBAPIError, url: URL) -> CoordinationError:
    kind = _CLASSIFY[url.get_backend_name()](exc)
    reason = " ".join(str(exc.orig).split())
    return kind(f"{where(url)}: {reason}; {_remedy(exc, kind, reason, url)}")


def _remedy(exc: DBAPIError, kind: type[CoordinationError], reason: str, url: URL) -> str:
    if _is_late(exc):
        return _IF_LATE
    if re.search(r"[Dd]atabase [\"'].*[\"'] does not exist|Unknown database", reason):
        return "make that database, or name another one"
    if "read-only" in reason:
        return "name the primary and not a replica of it, or let this user write"
    if kind is AccessDeniedError and url.get_backend_name() == "sqlite":
        return "name a file that this user may write, in a folder that is there"
    return _REMEDIES[kind]


def where(url: URL) -> str:
    """Say which database it is, without a secret."""
    if url.get_backend_name() == "sqlite":
        return f"database {url.database}"
    user = f"{url.username}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"database {user}{url.host}{port}/{url.database or ''}"


_REMEDIES: dict[type[CoordinationError], str] = {
    DatabaseUnavailableError: "check that it runs and can be reached from this host",
    AccessDeniedError: "correct the user, its password or its grants",
    SchemaError: "run `taskadapter db upgrade`, or give a DBA the output of `taskadapter db sql`",
    CoordinationError: "see the database's own log, and `taskadapter doctor`",
}

_IF_LATE = "the statement took too long: the database is overloaded, or another session holds a lock"


def _is_late(exc: DBAPIError) -> bool:
    """Return whether a server that can be reached did not finish a statement in time."""
    if getattr(exc.orig, "sqlstate", None) in {"57014", "55P03"}:
        return True
    code = exc.orig.args[0] if exc.orig and exc.orig.args else 0
    words = str(exc.orig)
    return code in {1205, 1969, 3024} or (code == 2013 and "timed out" in words) or "is locked" in words


_DENIED, _GONE, _SCHEMA = AccessDeniedError, DatabaseUnavailableError, SchemaError


def _classify_postgresql(exc: DBAPIError) -> type[CoordinationError]:
    # https://www.postgresql.org/docs/current/errcodes-appendix.html
    state: str = getattr(exc.orig, "sqlstate", None) or ""
    if state in {"42P01", "42703", "22001"}:
        return _SCHEMA
    if state.startswith("28") or state in {"42501", "3D000"}:
        return _DENIED
    # The last two: a transaction that was idle for too long, and a server that became a replica.
    if state[:2] in {"08", "40", "53", "55", "57"} or state in {"25P03", "25006"}:
        return _GONE
    if state:
        return CoordinationError
    # A refused connection has no state, only the server's words.
    refusals = ("authentication failed", "no pg_hba.conf entry", '" does not exist', "no password")
    return _DENIED if any(words in str(exc.orig) for words in refusals) else _GONE


def _classify_mysql(exc: DBAPIError) -> type[CoordinationError]:
    # https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
    code = exc.orig.args[0] if exc.orig and exc.orig.args else 0
    if code in {1054, 1146, 1406}:
        return _SCHEMA
    if code in {1044, 1045, 1049, 1130, 1142, 1143, 1227, 1370, 1698}:
        return _DENIED
    if code in {1040, 1053, 1158, 1159, 1160, 1161, 1203, 1205, 1213, 1290, 1317} or code >= 2000:
        return _GONE
    return _GONE if isinstance(exc, InterfaceError) or exc.connection_invalidated else CoordinationError


def _classify_sqlite(exc: DBAPIError) -> type[CoordinationError]:
    words = str(exc.orig)
    if "no such table" in words or "no such column" in words:
        return _SCHEMA
    if "readonly" in words or "unable to open" in words or "not a database" in words:
        return _DENIED
    return _GONE if isinstance(exc, OperationalError) else CoordinationError


_CLASSIFY = {
    "postgresql": _classify_postgresql,
    "mysql": _classify_mysql,
    "sqlite": _classify_sqlite,
}
