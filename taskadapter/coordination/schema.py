"""The tables of the coordination database.

`token_holder` and `health_check` have the names, columns and meaning of Ballerina's task module, so
that its nodes and ours can share a group. All else is in tables of our own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    inspect,
)
from sqlalchemy.dialects.mysql import LONGTEXT, TIMESTAMP
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from taskadapter.coordination.dialects import widen

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect
    from sqlalchemy.types import TypeEngine

__all__ = [
    "create_missing",
    "ddl",
    "health_check",
    "job_progress",
    "metadata",
    "missing_tables",
    "node",
    "run_in_flight",
    "tenure",
    "token_holder",
    "upgrades",
]

metadata = MetaData()

# Compared and subtracted inside SQL only, never loaded as a datetime. Always nullable: an older
# MariaDB adds ON UPDATE CURRENT_TIMESTAMP to one that is not.
_Moment: TypeEngine[Any] = (
    DateTime(timezone=True).with_variant(TIMESTAMP(fsp=6), "mysql").with_variant(Text(), "sqlite")
)
_Json: TypeEngine[Any] = Text().with_variant(LONGTEXT(), "mysql")

# MySQL's default collations take "node-1" and "NODE-1" for one name.
_MYSQL: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}

token_holder = Table(
    "token_holder",
    metadata,
    Column("group_id", String(255), primary_key=True),
    # Empty once released: nobody holds the token, and no node's name matches.
    Column("task_id", String(255), nullable=False),
    Column("term", Integer, nullable=False),
    **_MYSQL,
)

health_check = Table(
    "health_check",
    metadata,
    Column("task_id", String(255), primary_key=True),
    Column("group_id", String(255), primary_key=True),
    Column("last_heartbeat", _Moment),
    **_MYSQL,
)

node = Table(
    "taskadapter_node",
    metadata,
    Column("task_id", String(255), primary_key=True),
    # Which process, of all that ever used the name.
    Column("incarnation", String(36), nullable=False),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("group_ids", _Json, nullable=False),
    Column("started", _Moment),
    Column("last_seen", _Moment),
    **_MYSQL,
)

tenure = Table(
    "taskadapter_tenure",
    metadata,
    Column("group_id", String(255), primary_key=True),
    Column("term", BigInteger, primary_key=True, autoincrement=False),
    Column("task_id", String(255), nullable=False),
    Column("incarnation", String(36), nullable=False),
    Column("reason", String(255), nullable=False),
    Column("acquired", _Moment),
    Column("resign_requested", _Moment),
    Column("released", _Moment),
    **_MYSQL,
)

job_progress = Table(
    "taskadapter_job",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("trigger_slug", String(255), nullable=False),
    Column("run_count", BigInteger, nullable=False),
    Column("state", _Json),
    # The term in which the state was last written.
    Column("term", BigInteger),
    Column("updated", _Moment),
    **_MYSQL,
)

run_in_flight = Table(
    "taskadapter_run",
    metadata,
    Column("flow_run_id", String(36), primary_key=True),
    Column("job_id", String(36)),
    Column("group_id", String(255), nullable=False),
    Column("task_id", String(255), nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("started", _Moment),
    # Kept for a while after the end: a run that is claimed again by mistake must not start again, and
    # Prefect may not know of the state that it came to.
    Column("ended", _Moment),
    Column("outcome", String(32)),
    **_MYSQL,
)


def missing_tables(connection: Connection) -> tuple[str, ...]:
    """Return the names of the tables that the database lacks, sorted."""
    present = set(inspect(connection).get_table_names())
    return tuple(sorted(metadata.tables.keys() - present))


def create_missing(connection: Connection) -> tuple[str, ...]:
    """Create the tables that the database lacks, commit, and return their names.

    Several nodes may do so at once.
    """
    missing = missing_tables(connection)
    for name in missing:
        try:
            connection.execute(CreateTable(metadata.tables[name], if_not_exists=True))
            connection.commit()
        except DBAPIError:
            # Even IF NOT EXISTS fails where another node creates the table at this moment.
            connection.rollback()
            if name in missing_tables(connection):
                raise
    return missing


def ddl(dialect: Dialect) -> str:
    """Return the script that creates every table where it is missing, for a DBA to run."""
    tables = metadata.sorted_tables
    statements = [CreateTable(table, if_not_exists=True).compile(dialect=dialect) for table in tables]
    return "".join(f"{str(statement).strip()};\n\n" for statement in statements)


def upgrades(connection: Connection) -> tuple[str, ...]:
    """Return the statements that make tables of Ballerina's as good as ours; none if they are.

    Until then names must fit into shorter columns; on PostgreSQL all sessions, Ballerina's too,
    must be in UTC; and on MySQL heartbeats, cut to seconds, count as younger by up to a second.
    """
    return tuple(
        widen(connection.dialect, expected)
        for table in (token_holder, health_check)
        for found in inspect(connection).get_columns(table.name)
        if (expected := table.columns.get(found["name"])) is not None
        and _is_narrower(found["type"], expected.type.dialect_impl(connection.dialect))
    )


def _is_narrower(found: Any, expected: Any) -> bool:
    """Say whether a column has less room than ours: length, time zone, or fractions of seconds."""
    return any(
        (getattr(found, aspect, None) or 0) < (getattr(expected, aspect, None) or 0)
        for aspect in ("length", "timezone", "fsp")
    )
