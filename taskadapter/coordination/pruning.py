"""What is forgotten of who took part: nodes that are gone, their heartbeats, and terms that are long over.

Where every node has a new name, as in containers, that would grow for ever, and slow down who reads it.
The tokens themselves stay: a group's term must never go back.

Every function works inside the caller's transaction, removes at most so many rows (a statement has room
for so many keys, and locks them), and returns whether there may be more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import exists, func, select

from taskadapter.coordination.dialects import ROWS_AT_ONCE, remove, seconds_since
from taskadapter.coordination.messages import TERMS_SHOWN
from taskadapter.coordination.nodes import FORGOTTEN_SECONDS
from taskadapter.coordination.schema import health_check, node, tenure, token_holder

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["heartbeats", "nodes", "terms"]


def nodes(connection: Connection, seconds: float, at_most: int = ROWS_AT_ONCE) -> bool:
    """Remove nodes that have not shown for so many seconds, and for a day at least, that they live."""
    is_old = seconds_since(node.c.last_seen) > max(seconds, FORGOTTEN_SECONDS)
    return remove(connection, node, is_old, at_most)


def heartbeats(connection: Connection, seconds: float, at_most: int = ROWS_AT_ONCE) -> bool:
    """Remove heartbeats as old as that, but for those of tokens' holders.

    They say since when a holder is silent.
    """
    columns, tokens = health_check.c, token_holder.c
    is_old = seconds_since(columns.last_heartbeat) > max(seconds, FORGOTTEN_SECONDS)
    is_holders = exists().where(tokens.group_id == columns.group_id, tokens.task_id == columns.task_id)
    return remove(connection, health_check, is_old, at_most, ~is_holders)


def terms(connection: Connection, seconds: float, at_most: int = ROWS_AT_ONCE) -> bool:
    """Remove terms that began longer ago than so many seconds, but for the newest of each group.

    They are what is shown of it, and the last of them is the least that the next one must exceed.
    """
    columns, newer = tenure.c, tenure.alias()
    last = select(func.max(newer.c.term)).where(newer.c.group_id == columns.group_id).scalar_subquery()
    is_old = seconds_since(columns.acquired) > seconds
    return remove(connection, tenure, is_old, at_most, columns.term <= last - TERMS_SHOWN)
