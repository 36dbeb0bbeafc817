"""What is forgotten of who took part: nodes that are gone, their heartbeats, and terms that are long over.

Where every node has a new name, as in containers, that would grow for ever, and slow down who reads it.
The tokens themselves stay: a group's term must never go back.

Every function works inside the caller's transaction, removes at most so many rows (a statement has room
for so many keys, and locks them), and returns whether there may be more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, exists, func, select, tuple_

from taskadapter.coordination.dialects import seconds_since
from taskadapter.coordination.messages import TERMS_SHOWN
from taskadapter.coordination.nodes import FORGOTTEN_SECONDS
from taskadapter.coordination.schema import health_check, node, tenure, token_holder

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection, Table

__all__ = ["heartbeats", "nodes", "terms"]

AT_MOST = 1000
"""How many rows are removed at once."""


def nodes(connection: Connection, seconds: float, at_most: int = AT_MOST) -> bool:
    """Remove nodes that have not shown for so many seconds, and for a day at least, that they live."""
    is_old = seconds_since(node.c.last_seen) > max(seconds, FORGOTTEN_SECONDS)
    return _remove(connection, node, is_old, at_most)


def heartbeats(connection: Connection, seconds: float, at_most: int = AT_MOST) -> bool:
    """Remove heartbeats as old as that, but for those of tokens' holders.

    They say since when a holder is silent.
    """
    columns, tokens = health_check.c, token_holder.c
    is_old = seconds_since(columns.last_heartbeat) > max(seconds, FORGOTTEN_SECONDS)
    is_holders = exists().where(tokens.group_id == columns.group_id, tokens.task_id == columns.task_id)
    return _remove(connection, health_check, is_old, at_most, ~is_holders)


def terms(connection: Connection, seconds: float, at_most: int = AT_MOST) -> bool:
    """Remove terms that began longer ago than so many seconds, but for the newest of each group.

    They are what is shown of it, and the last of them is the least that the next one must exceed.
    """
    columns, newer = tenure.c, tenure.alias()
    last = select(func.max(newer.c.term)).where(newer.c.group_id == columns.group_id).scalar_subquery()
    is_old = seconds_since(columns.acquired) > seconds
    return _remove(connection, tenure, is_old, at_most, columns.term <= last - TERMS_SHOWN)


def _remove(
    connection: Connection,
    table: Table,
    is_old: ColumnElement[bool],
    at_most: int,
    *and_is: ColumnElement[bool],
) -> bool:
    """Remove rows that are old, and are found to be something else as well.

    They are looked for first: MySQL deletes from no table that the statement reads as well, and would lock
    what it passes. Whether a row is old is asked again as it is removed: who shows life meanwhile stays.
    """
    key = list(table.primary_key.columns)
    found = connection.execute(select(*key).where(is_old, *and_is).limit(at_most)).all()
    if found:
        connection.execute(delete(table).where(tuple_(*key).in_(found), is_old))
    return len(found) == at_most
