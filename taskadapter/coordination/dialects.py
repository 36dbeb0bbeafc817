"""What differs between PostgreSQL, MySQL and SQLite, one function for each difference.

Everything else in this package writes plain SQLAlchemy Core and runs on all of them.
"""

from __future__ import annotations

import math
import os
import socket
import sqlite3
from collections import namedtuple
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Float, delete, func, select, tuple_
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from taskadapter.errors import in_a_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Column, ColumnElement, Connection, Dialect, Select, Table
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.sql.dml import Insert, UpdateBase

__all__ = [
    "ROWS_AT_ONCE",
    "Interrupter",
    "database_now",
    "ensure_rows",
    "ensured",
    "has_writable_ctes",
    "hear",
    "limit_idle",
    "listen",
    "notices",
    "remove",
    "seconds_since",
    "storable",
    "together",
    "upsert",
    "widen",
]


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


def ensure_rows(connection: Connection, table: Table, values: Rows) -> None:
    """Insert rows unless their primary key exists, as `ensured` does."""
    connection.execute(ensured(connection.dialect, table, values))


ROWS_AT_ONCE = 1000
"""How many rows are removed with one statement: it has room for so many keys, and locks them."""


def remove(
    connection: Connection,
    table: Table,
    is_old: ColumnElement[bool],
    at_most: int,
    *and_is: ColumnElement[bool],
) -> bool:
    """Remove rows that are old, and are found to be something else as well; return whether more may be.

    They are looked for first: MySQL deletes from no table that the statement reads as well, and would lock
    what it passes. Whether a row is old is asked again as it is removed: who shows life meanwhile stays.
    """
    key = list(table.primary_key.columns)
    found = connection.execute(select(*key).where(is_old, *and_is).limit(at_most)).all()
    if found:
        connection.execute(delete(table).where(tuple_(*key).in_(found), is_old))
    return len(found) == at_most


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


def storable(text: str) -> str:
    """Return a text of somebody else's as a line that every database keeps: PostgreSQL has no NUL."""
    return in_a_line(text.replace("\x00", " "))


def fitting(text: str, room: int = 255) -> str:
    """Return a text as a column with so much room keeps it: no word of a long one is cut."""
    if len(text) <= room:
        return text
    end = " ..."
    head = text[: room - len(end)]
    return f"{head.rpartition(' ')[0] or head}{end}"


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


def notices(dialect: Dialect, payloads: Sequence[str]) -> list[Select[Any]]:
    """Return what wakes those who `listen`, once the transaction commits. Only PostgreSQL can."""
    if dialect.name != "postgresql":
        return []
    return [select(func.pg_notify(CHANNEL, payload)) for payload in payloads]


def listen(connection: Connection) -> int | None:
    """Subscribe to what `notices` send, and return the file that becomes readable when it comes.

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


def widen(dialect: Dialect, column: Column[Any]) -> str:
    """Return the statement that gives an existing column the type that `column` has."""
    table, type_ = column.table.name, column.type.compile(dialect)
    if dialect.name == "mysql":
        null = "NOT NULL" if not column.nullable else "NULL DEFAULT NULL"
        return f"ALTER TABLE {table} MODIFY COLUMN {column.name} {type_} {null}"
    alter = f"ALTER TABLE {table} ALTER COLUMN {column.name} TYPE {type_}"
    # Our sessions are in UTC, and a heartbeat that is read wrong is replaced by the next.
    return f"{alter} USING {column.name} AT TIME ZONE 'UTC'" if "TIME ZONE" in type_ else alter
