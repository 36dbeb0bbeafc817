"""Which processes take part, for which groups, and to which work pool a group belongs.

Every function works inside the caller's transaction, and takes effect when that commits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import and_, delete, or_, select, update

from taskadapter.coordination.dialects import database_now, ensure_rows, ensured, seconds_since, together
from taskadapter.coordination.messages import NAMED
from taskadapter.coordination.schema import group, node
from taskadapter.errors import DuplicateNodeError, listed

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

    from taskadapter.coordination.messages import PoolKey

__all__ = [
    "FORGOTTEN_SECONDS",
    "Node",
    "claim_groups",
    "groups_of_others",
    "name_of",
    "register",
    "take_over_group",
    "unregister",
]

FORGOTTEN_SECONDS = 86400.0
"""A node that has been silent for so long was taken away, and is not asked for any more."""


@dataclass(frozen=True, slots=True)
class Node:
    """A process that takes part. `incarnation` is a UUID of its own; `task_id` outlives it.

    A process that takes part twice under one name, in the groups of two work pools, says in `of` for what
    it does so the second time: its entry is then apart from the first.
    """

    task_id: str
    incarnation: str
    host: str
    pid: int
    of: str = ""

    @property
    def entry(self) -> str:
        """The key of its entry among the nodes; no name has a slash."""
        return f"{self.task_id}/{self.of}"[:255] if self.of else self.task_id


def claim_groups(
    connection: Connection, pool: PoolKey, group_ids: Collection[str], former_id: str | None = None
) -> dict[str, str]:
    """Enter groups as a work pool's, and return those that are another pool's, with its name.

    The nodes of two pools would stand in for each other's jobs, which they do not run.

    Args:
        connection: in a transaction.
        pool: the pool.
        group_ids: the groups.
        former_id: the id that the pool had before it was made anew; its groups go with it.
    """
    if group_ids:
        new = {"work_pool": pool.name, "pool_id": pool.id}
        ensure_rows(connection, group, [{"group_id": name, **new} for name in sorted(group_ids)])
        columns = group.c
        is_ours = (
            columns.work_pool == pool.name,
            or_(columns.pool_id.is_(None), columns.pool_id == former_id),
        )
        ours = update(group).where(columns.group_id.in_(group_ids), *is_ours)
        connection.execute(ours.values(pool_id=pool.id))
    return groups_of_others(connection, pool, group_ids)


def groups_of_others(connection: Connection, pool: PoolKey, group_ids: Collection[str]) -> dict[str, str]:
    """Return those of some groups that are another pool's than this one, with its name."""
    columns = group.c
    is_other = columns.work_pool != pool.name
    if pool.id is not None:
        is_other = or_(is_other, columns.pool_id != pool.id)
    theirs = select(columns.group_id, columns.work_pool).where(columns.group_id.in_(group_ids), is_other)
    return {row.group_id: row.work_pool for row in connection.execute(theirs)}


def take_over_group(
    connection: Connection, pool: PoolKey, group_id: str, incarnation: str, within: float
) -> list[str]:
    """Enter a group as a pool's that is another's, unless live nodes stand by for it; return their names.

    Whoever stands by for a group is of the pool that has it.

    Args:
        connection: in a transaction.
        pool: the pool that is to have it.
        group_id: the group.
        incarnation: of the process that asks, which may have stood by for it before.
        within: in how many seconds a node that lives has shown it.
    """
    columns = node.c
    lives = seconds_since(columns.last_seen) <= within, columns.incarnation != incarnation
    rows = connection.execute(
        select(columns.task_id, columns.group_ids).where(*lives).order_by(columns.task_id)
    )
    living = [name_of(row.task_id) for row in rows if group_id in json.loads(row.group_ids)]
    if not living:
        now = {"work_pool": pool.name, "pool_id": pool.id}
        connection.execute(update(group).where(group.c.group_id == group_id).values(now))
    return living


def name_of(entry: str) -> str:
    """Return the name of the node that an entry is of: one of two work pools has two (`Node.entry`)."""
    return entry.partition("/")[0]


def register(connection: Connection, me: Node, group_ids: Collection[str], interval: float) -> None:
    """Enter a node and its groups, or bring its entry up to date.

    Raises:
        DuplicateNodeError: another process with this `task_id` was seen within `interval` seconds.
    """
    entry = {
        "incarnation": me.incarnation,
        "host": me.host,
        "pid": me.pid,
        "group_ids": json.dumps(sorted(group_ids)),
        "last_seen": database_now(),
    }
    columns = node.c
    new = {"task_id": me.entry, "started": database_now(), **entry}
    locked = select(columns.incarnation).where(columns.task_id == me.entry).with_for_update()
    _, (found,) = together(connection, ensured(connection.dialect, node, new), locked)
    if found.incarnation != me.incarnation:
        _require_gone(connection, me, interval)
        entry["started"] = database_now()
    connection.execute(update(node).where(columns.task_id == me.entry).values(entry))


def _require_gone(connection: Connection, me: Node, interval: float) -> None:
    columns = node.c
    age = seconds_since(columns.last_seen)
    lives = (age <= interval).label("lives")
    other = connection.execute(
        select(columns.host, columns.pid, columns.group_ids, age.label("age"), lives).where(
            columns.task_id == me.entry
        )
    ).one()
    if other.lives:
        raise DuplicateNodeError(
            f"task_id {me.task_id!r} is in use by process {other.pid} on host {other.host!r}"
            f"{_in_which_groups(connection, json.loads(other.group_ids))}, seen {other.age:.1f} s ago; a "
            "name is one node's in the whole database, whatever its work pool: give each node, and each "
            "program of a host, one of its own, with --name or WarmBackupConfig(task_id=…)",
            age=float(other.age),
        )


def _in_which_groups(connection: Connection, group_ids: Collection[str]) -> str:
    """Return in which groups, and of which work pools, a process takes part; nothing where it has none."""
    if not group_ids:
        return ""
    columns = group.c
    named = select(columns.work_pool).where(columns.group_id.in_(group_ids)).distinct()
    pools = sorted(map(repr, connection.execute(named).scalars()))
    groups = listed(sorted(map(repr, group_ids)), NAMED)
    return f" for group {groups}" + (f" of work pool {listed(pools, NAMED)}" if pools else "")


def unregister(connection: Connection, me: Node) -> None:
    """Remove a node; nothing happens if another process has taken its name since."""
    columns = node.c
    mine = and_(columns.task_id == me.entry, columns.incarnation == me.incarnation)
    connection.execute(delete(node).where(mine))
