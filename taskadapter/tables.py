"""What the command shows: tables that are whole on a screen of eighty columns, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from taskadapter.errors import listed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from taskadapter.audit import Line
    from taskadapter.coordination.overview import GroupStatus, Status
    from taskadapter.prefect_api.pool import Domain

MINUTE = 60.0

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))

PAUSED = "Paused in Prefect, and nothing begins until it is resumed: {}."

SHORT = 36
"""A reason of more characters is told below the table, once for all rows that have it."""

SHORT_WORD = 13
"""A word of more would be cut in a cell."""

UUID_WIDTH = 36
"""The id of a run can be copied whole."""


def status(now: Status, domain: Domain, place: str, closed: Collection[str] = ()) -> Group:
    """Return the groups, who is active for them and who would take over, the nodes, and where that is.

    Args:
        now: what the database has.
        domain: the pool's lease.
        place: what the database is called.
        closed: what is paused in Prefect, in words.
    """
    lease, notes = domain.liveness_check_interval, dict[str, int]()
    groups, others = _table("Groups", "group", "active", "standing by", "why"), now.standing_by(lease)
    for group in now.groups:
        standing_by = "\n".join(others[group.group_id])
        _add(groups, group.group_id, _active(group, domain), standing_by, _told(group.reason or "", notes))
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
        _add(nodes, node.task_id, "\n".join(roles), f"{node.host}\n{node.pid}", seen)
    paused = (Text(PAUSED.format(listed(sorted(closed)))),) if closed else ()
    return Group(groups, *_below(notes), nodes, *paused, Text(f"As {place} has it."))


def status_as_json(
    now: Status, domain: Domain, place: str, closed: Collection[str] = ()
) -> dict[str, object]:
    """Return the same for a program; ages are in seconds."""
    lease = domain.liveness_check_interval
    others = now.standing_by(lease)
    groups = [
        asdict(group) | {"expires_in": _expires_in(group, domain), "standing_by": others[group.group_id]}
        for group in now.groups
    ]
    nodes = [asdict(node) | {"lives": node.lives(lease)} for node in now.nodes]
    return {"database": place, "paused": sorted(closed), "groups": groups, "nodes": nodes}


def ledger(lines: Iterable[Line]) -> Group:
    """Return what a job has executed, and the reasons for which there is no room in the table."""
    notes = dict[str, int]()
    table = _table("", "due and flow run", "outcome", "late, took", "node")
    table.columns[0].width = UUID_WIDTH
    for line in lines:
        number = f"no. {line.number}\n" if line.number else ""
        reason = f": {_told(line.reason, notes)}" if line.reason else ""
        term = f"\nterm {line.term}" if line.term else ""
        _add(
            table,
            f"{_moment(line.due)}\n{line.flow_run}".strip(),
            f"{number}{line.outcome}{reason}",
            f"{_time(line.late)}\n{_time(line.took)}".strip(),
            f"{line.node}{term}",
        )
    return Group(table, *_below(notes))


def not_shown(count: int, newest: str) -> str:
    """Say how many ticks wait that are not in the table, which has the oldest of them."""
    return f"{count} more wait{'s' * (count == 1)}, the newest due {_moment(newest)}."


def nothing_yet(count: int, oldest: str | None) -> str:
    """Say that a job has not run yet, and how many of its ticks wait."""
    if not count:
        return "Nothing has run yet."
    wait = "tick waits" if count == 1 else "ticks wait"
    return f"Nothing has run yet. {count} {wait}, the oldest due {_moment(oldest)}."


def _table(title: str, *columns: str) -> Table:
    """Return an empty table whose cells are folded where there is no room for them."""
    table = Table(title=title or None, show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    """Add a row of texts as they are: `list[int]` is no style."""
    table.add_row(*map(Text, cells))


def _told(reason: str, notes: dict[str, int]) -> str:
    """Return a reason as a cell has it: of a long one the number of the note that has it whole."""
    if len(reason) <= SHORT and all(len(word) <= SHORT_WORD for word in reason.split()):
        return reason
    return f"({notes.setdefault(reason, len(notes) + 1)})"


def _below(notes: dict[str, int]) -> Iterator[Text]:
    """Yield the notes, as wide as the screen."""
    return (Text(f"({number}) {reason}") for reason, number in notes.items())


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
    words = f"{seconds:.1f} s" if seconds < MINUTE else _in_units(int(seconds))
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def _in_units(seconds: int) -> str:
    """Return a longer time in its two largest units."""
    parts: list[str] = []
    for unit, size in UNITS:
        count, seconds = divmod(seconds, size)
        parts += [f"{count} {unit}"] if count else []
    return " ".join(parts[:2])
