"""Which processes take part, for which groups, and to which work pool a group belongs.

Every function works inside the caller's transaction, and takes effect when that commits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import and_, delete, select, update

from taskadapter.coordination.dialects import database_now, ensure_rows, ensured, seconds_since, together
from taskadapter.coordination.schema import group, node
from taskadapter.errors import DuplicateNodeError

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

__all__ = [
    "FORGOTTEN_SECONDS",
    "Node",
    "claim_groups",
    "give_up_group",
    "groups_of_others",
    "register",
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


def claim_groups(connection: Connection, work_pool: str, group_ids: Collection[str]) -> dict[str, str]:
    """Enter groups as a work pool's, and return those that are another pool's, with its name.

    The nodes of two pools would stand in for each other's jobs, which they do not run.
    """
    if group_ids:
        ensure_rows(connection, group, [{"group_id": g, "work_pool": work_pool} for g in sorted(group_ids)])
    return groups_of_others(connection, work_pool, group_ids)


def groups_of_others(connection: Connection, work_pool: str, group_ids: Collection[str]) -> dict[str, str]:
    """Return those of some groups that are another pool's than this one's, with its name."""
    columns = group.c
    theirs = columns.group_id.in_(group_ids), columns.work_pool != work_pool
    rows = connection.execute(select(columns.group_id, columns.work_pool).where(*theirs))
    return {row.group_id: row.work_pool for row in rows}


def give_up_group(connection: Connection, work_pool: str, group_id: str) -> None:
    """Let a group be another pool's that was this one's; nothing happens if it was not."""
    mine = group.c.group_id == group_id, group.c.work_pool == work_pool
    connection.execute(delete(group).where(*mine))


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
    other = connection.execute(
        select(columns.host, columns.pid, age.label("age"), (age <= interval).label("lives")).where(
            columns.task_id == me.entry
        )
    ).one()
    if other.lives:
        raise DuplicateNodeError(
            f"task_id {me.task_id!r} is in use by process {other.pid} on host {other.host!r}, seen "
            f"{other.age:.1f} s ago; give each node a name of its own, with "
            "--name or WarmBackupConfig(task_id=…)",
            age=float(other.age),
        )


def unregister(connection: Connection, me: Node) -> None:
    """Remove a node; nothing happens if another process has taken its name since."""
    columns = node.c
    mine = and_(columns.task_id == me.entry, columns.incarnation == me.incarnation)
    connection.execute(delete(node).where(mine))
