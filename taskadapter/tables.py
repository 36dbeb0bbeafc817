"""What the command shows: tables that are whole on a screen of eighty columns, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import pendulum
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from taskadapter.audit import Line
    from taskadapter.coordination.overview import GroupStatus, Status
    from taskadapter.prefect_api.pool import Domain

MINUTE = 60.0

UUID_WIDTH = 36
"""The id of a run can be copied whole."""


def status(now: Status, domain: Domain, place: str) -> Group:
    """Return the groups, who is active for them and who would take over, the nodes, and where that is."""
    lease = domain.liveness_check_interval
    groups, others = _table("Groups", "group", "active", "standing by", "why"), now.standing_by(lease)
    for group in now.groups:
        standing_by = "\n".join(others[group.group_id])
        groups.add_row(group.group_id, _active(group, domain), standing_by, group.reason or "")
    nodes = _table("Nodes", "node", "its groups", "host and process", "seen")
    holders = {group.group_id: group.holder for group in now.groups}
    for node in now.nodes:
        lives = node.lives(lease)
        roles = (
            f"{name}: {_role(lives=lives, holds=holders.get(name) == node.task_id)}"
            for name in node.group_ids
        )
        age = _time(node.last_seen_age)
        seen = f"{age} ago\nup for {_time(node.up_for)}" if lives else f"silent for {age}"
        nodes.add_row(node.task_id, "\n".join(roles), f"{node.host}\n{node.pid}", seen)
    return Group(groups, nodes, Text(f"As {place} has it."))


def status_as_json(now: Status, domain: Domain, place: str) -> dict[str, object]:
    """Return the same for a program; ages are in seconds."""
    lease = domain.liveness_check_interval
    others = now.standing_by(lease)
    groups = [
        asdict(group) | {"expires_in": _expires_in(group, domain), "standing_by": others[group.group_id]}
        for group in now.groups
    ]
    nodes = [asdict(node) | {"lives": node.lives(lease)} for node in now.nodes]
    return {"database": place, "groups": groups, "nodes": nodes}


def ledger(lines: Iterable[Line]) -> Table:
    """Return what a job has executed."""
    table = _table("", "due and flow run", "outcome", "late, took", "node")
    table.columns[0].width = UUID_WIDTH
    for line in lines:
        number = f"no. {line.number}\n" if line.number else ""
        reason = f": {line.reason}" if line.reason else ""
        term = f"\nterm {line.term}" if line.term else ""
        table.add_row(
            f"{_moment(line.due)}\n{line.flow_run}".strip(),
            f"{number}{line.outcome}{reason}",
            f"{_time(line.late)}\n{_time(line.took)}".strip(),
            f"{line.node}{term}",
        )
    return table


def not_shown(count: int, newest: str) -> str:
    """Say how many ticks wait that are not in the table, which has the oldest of them."""
    return f"{count} more wait{'s' * (count == 1)}, the newest due {_moment(newest)}."


def _table(title: str, *columns: str) -> Table:
    """Return an empty table whose cells are folded where there is no room for them."""
    table = Table(title=title or None, show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _role(*, lives: bool, holds: bool) -> str:
    if not lives:
        return "was active" if holds else "gone"
    return "active" if holds else "standby"


def _active(group: GroupStatus, domain: Domain) -> str:
    if group.holder is None:
        return f"nobody\nafter term {group.term}"
    lines = [group.holder, f"in term {group.term}"]
    if group.held_for is not None:
        lines.append(f"for {_time(group.held_for)}")
    if (left := _expires_in(group, domain)) is not None:
        lines.append(f"expires in {_time(left)}" if left >= 0 else f"expired {_time(-left)} ago")
    if group.resign_requested:
        lines.append("asked to hand over")
    return "\n".join(lines)


def _expires_in(group: GroupStatus, domain: Domain) -> float | None:
    age = group.heartbeat_age
    return None if age is None or group.holder is None else domain.liveness_check_interval - age


def _moment(due: str | None) -> str:
    """Return a tick's time, with milliseconds where it has some."""
    if due is None:
        return "by hand"
    when = datetime.fromisoformat(due)
    return (
        f"{when.replace(tzinfo=None).isoformat(' ', 'milliseconds' if when.microsecond else 'seconds')} UTC"
    )


def _time(seconds: float | None) -> str:
    """Return a time in words: exact where it is short; it stays on one line where it can."""
    if seconds is None:
        return ""
    words = f"{seconds:.1f} s" if seconds < MINUTE else pendulum.duration(seconds=int(seconds)).in_words()
    return words.replace(" ", "\N{NO-BREAK SPACE}")
