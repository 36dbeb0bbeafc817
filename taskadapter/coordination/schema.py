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
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    exists,
    func,
    insert,
    inspect,
    literal,
    select,
    update,
)
from sqlalchemy.dialects.mysql import LONGTEXT, TIMESTAMP
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateColumn, CreateTable

from taskadapter.coordination.dialects import database_now, ensure_rows, widen
from taskadapter.errors import SchemaError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect
    from sqlalchemy.types import TypeEngine

__all__ = [
    "LOST",
    "create_missing",
    "ddl",
    "group",
    "has_had_tables",
    "health_check",
    "job_progress",
    "ledger",
    "metadata",
    "missing_tables",
    "node",
    "require_version",
    "schema_step",
    "tenure",
    "token_holder",
    "upgrade",
    "upgrades",
    "version",
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
    # Why the holder could not run the group's jobs, and left it to another node.
    Column("given_up", String(255)),
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
    Column("paused", Integer),
    # Why the job is over, and with which trigger; NULL for every trigger.
    Column("ended", Text()),
    Column("ended_trigger", String(255)),
    # What Prefect had of it when that was last carried over, and when that had been changed there.
    Column("seen_paused", Integer),
    Column("seen_on", Integer),
    Column("seen_plan", String(160)),
    Column("seen_updated", String(32)),
    # Since when its ticks are owed, by Prefect's clock, if not since its schedule was made.
    Column("opened", String(32)),
    Column("updated", _Moment),
    **_MYSQL,
)

ledger = Table(
    "taskadapter_ledger",
    metadata,
    Column("execution", String(160), primary_key=True),
    Column("flow_run_id", String(36), nullable=False),
    Column("job_id", String(36)),
    # In UTC, as text of one length; it is Prefect's clock, not this database's.
    Column("due", String(32)),
    Column("number", BigInteger),
    Column("group_id", String(255)),
    Column("task_id", String(255), nullable=False),
    Column("term", BigInteger),
    Column("incarnation", String(36), nullable=False),
    # Seconds after it was due, by the node's clock.
    Column("late", Float),
    Column("begun", _Moment),
    Column("ended", _Moment),
    Column("outcome", String(32)),
    # Why it was skipped.
    Column("reason", Text()),
    # Indexes, in the one form that every database makes together with the table.
    UniqueConstraint("flow_run_id", "execution"),
    UniqueConstraint("job_id", "due", "execution"),
    UniqueConstraint("ended", "group_id", "execution"),
    **_MYSQL,
)

group = Table(
    "taskadapter_group",
    metadata,
    Column("group_id", String(255), primary_key=True),
    Column("work_pool", String(255), nullable=False),
    # Which of several servers' pools of that name; NULL until a node has said so.
    Column("pool_id", String(36)),
    **_MYSQL,
)

schema_step = Table(
    "taskadapter_schema",
    metadata,
    Column("step", Integer, primary_key=True, autoincrement=False),
    # NULL while the tables are being made for the first time.
    Column("done", _Moment),
    **_MYSQL,
)

VERSION = 4
"""The last step that has made the tables what they are here; `taskadapter db upgrade` does what is missing.

1 is the tables of the releases before there was a ledger, 2 those that do not say why a group was given up,
3 those that do not tell pools of one name apart.
"""

_OF_STEP_1 = {"taskadapter_node", "taskadapter_job"}


def missing_tables(connection: Connection) -> tuple[str, ...]:
    """Return the names of the tables that the database lacks, sorted."""
    present = set(inspect(connection).get_table_names())
    return tuple(sorted(metadata.tables.keys() - present))


def version(connection: Connection) -> int:
    """Return the last step that the database's tables have had done; 0 where there are none of ours."""
    present = set(inspect(connection).get_table_names())
    if schema_step.name in present:
        done: int = connection.execute(select(func.coalesce(func.max(schema_step.c.step), 0))).scalar_one()
        return done
    return 1 if present & _OF_STEP_1 else 0


def create_missing(connection: Connection, *, lost: bool = False) -> tuple[str, ...]:
    """Create the tables that the database lacks, commit, and return their names.

    Several nodes may do so at once.

    Args:
        connection: to the database.
        lost: whether those are made, too, that the database has had, and that are empty then.

    Raises:
        SchemaError: there are tables of another release, or some are gone.
    """
    found = require_version(connection, new=True)
    # In this order: others may be making them.
    were_there = has_had_tables(connection)
    missing = missing_tables(connection)
    if found == VERSION and were_there and not missing:
        return ()
    if were_there and missing and not lost:
        raise SchemaError(LOST.format(missing=", ".join(missing)))
    # What says which release's they are comes first: nobody takes half of them for an older one's.
    _create(connection, schema_step)
    ensure_rows(connection, schema_step, {"step": VERSION, "done": None})
    connection.commit()
    for name in missing:
        _create(connection, metadata.tables[name])
    connection.execute(update(schema_step).where(schema_step.c.done.is_(None)).values(done=database_now()))
    connection.commit()
    return missing


LOST = (
    "the database lacks {missing}, and has the other coordination tables: restore what is gone, or run "
    "`taskadapter db init`, which makes it anew, empty: ticks that have run may run again then"
)


def has_had_tables(connection: Connection) -> bool:
    """Return whether the database has tables of ours, and they are not just being made."""
    present = set(inspect(connection).get_table_names())
    if schema_step.name in present:
        steps = connection.execute(select(schema_step.c.done)).scalars().all()
        if steps:
            return any(done is not None for done in steps)
    return bool(present & metadata.tables.keys() - _OF_BALLERINA - {schema_step.name})


_OF_BALLERINA = {token_holder.name, health_check.name}


def require_version(connection: Connection, *, new: bool = False) -> int:
    """Check that the database's tables are those of this release, and return their version.

    Args:
        connection: to the database.
        new: whether it may have none.

    Raises:
        SchemaError: they are not.
    """
    found = version(connection)
    if found > VERSION:
        raise SchemaError(
            f"the coordination tables are of version {found}, and this release knows version {VERSION}: "
            "install on this node the release that the others have"
        )
    if 0 < found < VERSION or (found == 0 and not new):
        raise SchemaError(
            f"the coordination tables are of version {found}, and this release needs version {VERSION}: "
            "stop the nodes of the older release, and run `taskadapter db upgrade`"
        )
    return found


def _create(connection: Connection, table: Table) -> None:
    """Create a table, and commit; others may be doing so at this moment."""
    try:
        connection.execute(CreateTable(table, if_not_exists=True))
        connection.commit()
    except DBAPIError:
        # Even IF NOT EXISTS fails where another node creates the table at this moment.
        connection.rollback()
        if not inspect(connection).has_table(table.name):
            raise


def upgrade(connection: Connection) -> tuple[int, ...]:
    """Do the steps that the database's tables have not had done, and return them.

    Call it while no node of an older release runs.

    Raises:
        SchemaError: the tables are of a newer release.
    """
    found = version(connection)
    if found > VERSION:
        require_version(connection)
    done = tuple(number for number in _STEPS if found < number) if found else ()
    for number in done:
        _STEPS[number](connection)
        _create(connection, schema_step)
        ensure_rows(connection, schema_step, {"step": number, "done": database_now()})
        connection.commit()
    return done


def _add_the_ledger(connection: Connection) -> None:
    """Bring the runs in flight of the first releases into the ledger, by their flow runs."""
    _add_columns(connection, job_progress)
    _create(connection, ledger)
    _create(connection, group)
    if inspect(connection).has_table("taskadapter_run"):
        connection.exec_driver_sql(
            "INSERT INTO taskadapter_ledger (execution, flow_run_id, job_id, group_id, task_id, term, "
            "incarnation, begun, ended, outcome) SELECT flow_run_id, flow_run_id, job_id, group_id, "
            "task_id, term, '', started, ended, outcome FROM taskadapter_run"
        )
        connection.exec_driver_sql("DROP TABLE taskadapter_run")


def _add_why_given_up(connection: Connection) -> None:
    _create(connection, tenure)
    _add_columns(connection, tenure)


def _add_pool_ids(connection: Connection) -> None:
    _create(connection, group)
    _add_columns(connection, group)


def _add_columns(connection: Connection, table: Table) -> None:
    """Add the columns that a table lacks."""
    names = {column["name"] for column in inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in names:
            added = CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {added}")


_STEPS = {2: _add_the_ledger, 3: _add_why_given_up, 4: _add_pool_ids}


def ddl(dialect: Dialect) -> str:
    """Return the script that creates every table where it is missing, for a DBA to run.

    It brings no table of an older release along, and leaves their version as it is.
    """
    statements: list[Any] = [CreateTable(table, if_not_exists=True) for table in metadata.sorted_tables]
    has_one = exists(select(schema_step.c.step))
    step = select(literal(VERSION), database_now()).where(~has_one)
    statements.append(insert(schema_step).from_select(["step", "done"], step))
    options = {"literal_binds": True}
    compiled = (statement.compile(dialect=dialect, compile_kwargs=options) for statement in statements)
    return "".join(f"{str(statement).strip()};\n\n" for statement in compiled)


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
