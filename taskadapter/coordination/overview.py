"""What the database tells those who look: where tokens are, which nodes there are, who was active."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import and_, delete, false, insert, select, update

from taskadapter.coordination.dialects import seconds_since
from taskadapter.coordination.messages import PoolKey
from taskadapter.coordination.nodes import groups_of_others, name_of
from taskadapter.coordination.schema import (
    group,
    health_check,
    job_progress,
    ledger,
    node,
    tenure,
    token_holder,
)
from taskadapter.coordination.tokens import tokens_with_heartbeats

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection


LATELY_SECONDS = 300.0
"""For how long a process that has given a group up is not taken for one that could run its jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """Where a group's token is. Ages are in seconds; None where the database knows nothing.

    `holder` is None if nobody holds it, `held_for` and `reason` are None if a Ballerina node does.
    """

    group_id: str
    holder: str | None
    term: int
    heartbeat_age: float | None
    held_for: float | None
    reason: str | None
    resign_requested: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A node that has registered and not left. Ages are in seconds."""

    task_id: str
    host: str
    pid: int
    group_ids: tuple[str, ...]
    last_seen_age: float
    up_for: float

    def lives(self, within: float) -> bool:
        """Return whether it has shown that it lives in so many seconds."""
        return self.last_seen_age <= within


@dataclass(frozen=True, slots=True)
class Status:
    """All groups and nodes of a database, by name."""

    groups: tuple[GroupStatus, ...]
    nodes: tuple[NodeStatus, ...]

    def living(self, within: float) -> set[str]:
        """Return the names of the nodes that have shown that they live in so many seconds."""
        return {node.task_id for node in self.nodes if node.lives(within)}

    def standing_by(self, within: float) -> dict[str, list[str]]:
        """Return of each group the nodes that would take it over: each may, whoever looks first.

        Args:
            within: only nodes that have shown that they live in so many seconds.
        """
        holders = {group.group_id: group.holder for group in self.groups}
        found: dict[str, list[str]] = {name: [] for name in holders}
        for other in self.nodes:
            for name in other.group_ids:
                if name in found and other.task_id != holders[name] and other.lives(within):
                    found[name].append(other.task_id)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenure:
    """A term of a node's. `began` and `released` are seconds ago; None: it was not given up."""

    group_id: str
    term: int
    task_id: str
    reason: str
    began: float
    released: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """That a process which is still there has given a group up, for a reason, so many seconds ago."""

    group_id: str
    task_id: str
    reason: str
    released: float


def read_status(connection: Connection, work_pool: str | None = None) -> Status:
    """Return where all tokens are and which nodes there are.

    Args:
        connection: in a transaction.
        work_pool: without the groups that are another pool's, and the nodes that serve such only; None
            for all.
    """
    groups, nodes = _group_statuses(connection), _node_statuses(connection)
    if work_pool is None:
        return Status(groups, nodes)
    names = {one.group_id for one in groups}.union(*(one.group_ids for one in nodes))
    theirs = groups_of_others(connection, PoolKey(work_pool), names).keys()
    return Status(
        tuple(one for one in groups if one.group_id not in theirs),
        tuple(one for one in nodes if not one.group_ids or set(one.group_ids) - theirs),
    )


def _group_statuses(connection: Connection) -> tuple[GroupStatus, ...]:
    rows = connection.execute(
        select(
            token_holder.c.group_id,
            token_holder.c.task_id,
            token_holder.c.term,
            seconds_since(health_check.c.last_heartbeat).label("age"),
            seconds_since(tenure.c.acquired).label("held_for"),
            tenure.c.reason,
            tenure.c.resign_requested.is_not(None).label("resign_requested"),
        )
        .select_from(tokens_with_heartbeats())
        .order_by(token_holder.c.group_id)
    )
    return tuple(
        GroupStatus(
            group_id=row.group_id,
            holder=row.task_id or None,
            term=row.term,
            heartbeat_age=row.age,
            held_for=row.held_for if row.task_id else None,
            reason=row.reason if row.task_id else None,
            resign_requested=bool(row.task_id and row.resign_requested),
        )
        for row in rows
    )


def _node_statuses(connection: Connection) -> tuple[NodeStatus, ...]:
    columns = node.c
    rows = connection.execute(
        select(
            columns.task_id,
            columns.host,
            columns.pid,
            columns.group_ids,
            seconds_since(columns.last_seen).label("last_seen_age"),
            seconds_since(columns.started).label("up_for"),
        ).order_by(columns.task_id)
    )
    return tuple(
        NodeStatus(
            task_id=name_of(row.task_id),
            host=row.host,
            pid=row.pid,
            group_ids=tuple(json.loads(row.group_ids)),
            last_seen_age=row.last_seen_age,
            up_for=row.up_for,
        )
        for row in rows
    )


def seen_lately(connection: Connection, within: float) -> set[str]:
    """Return the names of the nodes that have shown life, or have left a group, in so many seconds."""
    lives = select(node.c.task_id).where(seconds_since(node.c.last_seen) <= within)
    left = select(tenure.c.task_id).where(seconds_since(tenure.c.released) <= within)
    return {name_of(entry) for query in (lives, left) for entry in connection.execute(query).scalars()}


def read_tenures(connection: Connection, group_ids: Collection[str], last: int) -> list[Tenure]:
    """Return the last terms of some groups, of each the newest first."""
    columns = tenure.c
    current = and_(token_holder.c.group_id == columns.group_id, columns.term > token_holder.c.term - last)
    rows = connection.execute(
        select(
            columns.group_id,
            columns.term,
            columns.task_id,
            columns.reason,
            seconds_since(columns.acquired).label("began"),
            seconds_since(columns.released).label("released"),
        )
        .select_from(tenure.join(token_holder, current))
        .where(columns.group_id.in_(sorted(group_ids)))
        .order_by(columns.group_id, columns.term.desc())
    )
    return [Tenure(**row._mapping) for row in rows]


def read_successors(connection: Connection, group_id: str, within: float) -> list[str]:
    """Return the nodes that stand by for a group, and may be able to run what its holder cannot.

    A process that has given the group up lately could not either.

    Args:
        connection: in a transaction.
        group_id: the group.
        within: only nodes that have shown that they live in so many seconds.
    """
    unable = {one.task_id for one in given_up_lately(connection, [group_id])}
    standing_by = read_status(connection).standing_by(within).get(group_id, [])
    return [name for name in standing_by if name not in unable]


def given_up_lately(connection: Connection, group_ids: Collection[str]) -> list[GivenUp]:
    """Return which processes have given some groups up lately, each because it could not run its jobs."""
    columns = tenure.c
    rows = connection.execute(
        select(
            columns.group_id,
            node.c.task_id,
            columns.given_up.label("reason"),
            seconds_since(columns.released).label("released"),
        )
        .select_from(tenure.join(node, node.c.incarnation == columns.incarnation))
        .where(
            columns.group_id.in_(sorted(group_ids)),
            columns.given_up.is_not(None),
            seconds_since(columns.released) <= LATELY_SECONDS,
        )
        .order_by(columns.group_id, columns.term)
    )
    return [GivenUp(**{**row._mapping, "task_id": name_of(row.task_id)}) for row in rows]


def check_rights(connection: Connection) -> None:
    """Do on no row what nodes do, so that the database refuses it to a user who may not.

    Raises:
        DBAPIError: it does.
    """
    for table in (token_holder, health_check, node, tenure, group, job_progress, ledger):
        key = next(iter(table.primary_key.columns))
        none = select(*table.columns).where(false())
        connection.execute(insert(table).from_select([column.name for column in table.columns], none))
        connection.execute(update(table).where(false()).values({key.name: key}))
        if table is not token_holder:  # which only ever grows
            connection.execute(delete(table).where(false()))
