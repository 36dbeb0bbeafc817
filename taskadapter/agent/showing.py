"""What Prefect's UI shows of the groups: who is active, since when and why, and who stands by.

It stands in the description of each group's work queue, in that of the work pool, and in an artifact whose
versions are the history. It is written when it has changed, by a node that is active.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.client.schemas.actions import ArtifactCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

from taskadapter.agent import events
from taskadapter.coordination import store
from taskadapter.coordination.messages import TERMS_SHOWN, Gained, Lost, ResignAsked
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import CoordinationError
from taskadapter.prefect_api.client import API_FAULTS, all_pages
from taskadapter.prefect_api.pool import slug_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from taskadapter.agent.membership import Membership
    from taskadapter.agent.node import Node
    from taskadapter.coordination.overview import GroupStatus, Tenure

REFRESH_SECONDS = 10.0
"""How often a node looks whether what is shown is still so, where nothing has told it of a change."""

MERGE_SECONDS = 3.0
"""How long after a change it is shown: runs come first, and several changes are shown at once."""

MOST_MERGED = 5
"""How often more changes are waited for: a group may change all the time."""

SHARE = 0.25
"""How much of the time the descriptions of many queues are written: late runs want the API too."""

NAMED = 20
"""Of how many groups the pool's description tells at most, one by one."""

MARK = "Active nodes (kept up to date by taskadapter):"
"""What is behind this line in a pool's description is ours; what is before it is not."""


@dataclass(frozen=True)
class Facts:
    """What is shown of a group: if none of it changes, nothing is written.

    Attributes:
        holder: the active node; None for nobody.
        term: of it.
        standing_by: the other nodes.
    """

    holder: str | None
    term: int
    standing_by: tuple[str, ...]


class Showing:
    """Shows a pool's groups in the UI.

    Args:
        node: the node.
        membership: its part in the groups.
    """

    def __init__(self, node: Node, membership: Membership) -> None:
        self._node = node
        self._membership = membership
        self._changed = asyncio.Event()
        self._shown: dict[str, Facts] = {}
        self._shown_of_all: dict[str, Facts] = {}

    def hear(self, change: Gained | Lost | ResignAsked) -> None:
        """Emit the event of a token's change, and have it shown."""
        match change:
            case Gained(token, _, reason):
                events.token_changed(self._node, "acquired", token, reason)
            case Lost(token, reason, asked):
                events.token_changed(self._node, "released" if asked else "lost", token, reason)
                self._shown.pop(token.group_id, None)
        self._changed.set()

    async def go_on(self) -> None:
        """Show what has changed, as long as the agent lives."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._changed.wait()
            for _ in range(MOST_MERGED):
                if not self._changed.is_set():
                    break
                self._changed.clear()
                await asyncio.sleep(MERGE_SECONDS)
            try:
                await self.refresh()
            except (*API_FAULTS, CoordinationError, ObjectNotFound) as fault:
                self._node.log.debug("What the UI shows of the groups is written later: %s", fault)

    async def refresh(self) -> None:
        """Write what is to be shown and is not.

        Raises:
            CoordinationError: the database failed.
            HTTPError: as any of `API_FAULTS`: the API failed.
            ObjectNotFound: the pool is gone.
        """
        names = self._membership.queues - {DEFAULT_QUEUE}
        mine = {name for name in names if self._membership.token(name) is not None}
        if not mine or self._membership.domain is None:
            return
        url, lease = self._membership.database_url, self._membership.domain.liveness_check_interval
        now = await asyncio.to_thread(store.status, url)
        groups, others = [group for group in now.groups if group.group_id in names], now.standing_by(lease)
        facts = {one.group_id: Facts(one.holder, one.term, tuple(others[one.group_id])) for one in groups}
        await self._show_queues([group for group in groups if group.group_id in mine], facts)
        # One of the active nodes is enough: the one that is active for the first group.
        held = [group for group in groups if group.holder is not None]
        if held and held[0].group_id in mine and facts != self._shown_of_all:
            tenures = await asyncio.to_thread(store.tenures, url, names, TERMS_SHOWN)
            await self._show_all(groups, facts, tenures)
            self._shown_of_all = facts

    async def _show_queues(self, groups: Iterable[GroupStatus], facts: dict[str, Facts]) -> None:
        news = {one.group_id: one for one in groups if self._shown.get(one.group_id) != facts[one.group_id]}
        if not news:
            return
        client, pool = self._node.client, self._node.work_pool
        queues = await all_pages(client.read_work_queues, work_pool_name=pool)
        for queue in (queue for queue in queues if queue.name in news):
            began = time.monotonic()
            text = describe_group(news[queue.name], facts[queue.name], datetime.now(UTC))
            await client.update_work_queue(queue.id, description=text)
            self._shown[queue.name] = facts[queue.name]
            await asyncio.sleep((time.monotonic() - began) * (1 / SHARE - 1))

    async def _show_all(
        self, groups: Sequence[GroupStatus], facts: dict[str, Facts], tenures: Sequence[Tenure]
    ) -> None:
        client, name, now = self._node.client, self._node.work_pool, datetime.now(UTC)
        pool = await client.read_work_pool(name)
        described = describe_pool(pool.description, groups, facts, now)
        await client.update_work_pool(name, WorkPoolUpdate(description=described))
        report = ArtifactCreate(
            key=slug_of(name),
            type="markdown",
            description=f"Who is active for the groups of work pool {name}, and who was.",
            data=report_of(name, groups, facts, tenures, now),
        )
        await client.create_artifact(report)


def describe_group(group: GroupStatus, facts: Facts, now: datetime) -> str:
    """Return what a group's work queue shows."""
    if facts.holder is None:
        active = f"Active: nobody, after term {facts.term}."
    else:
        since = "" if group.held_for is None else f", since {_ago(group.held_for, now)}"
        why = f" ({group.reason})" if group.reason else ""
        active = f"Active: {facts.holder}, term {facts.term}{since}{why}."
    return f"{active} Standing by: {_names(facts)}."


def describe_pool(
    text: str | None, groups: Sequence[GroupStatus], facts: dict[str, Facts], now: datetime
) -> str:
    """Return a pool's description: what somebody has written there, and then who is active.

    The UI shows neither Markdown nor lines there.
    """
    own = (text or "").partition(MARK)[0].rstrip()
    lines = [f"• {one.group_id}: {describe_group(one, facts[one.group_id], now)}" for one in groups[:NAMED]]
    if len(groups) > NAMED:
        lines.append(f"• and {len(groups) - NAMED} more groups")
    return "\n".join([*([own, ""] if own else []), MARK, *lines])


def report_of(
    pool: str,
    groups: Sequence[GroupStatus],
    facts: dict[str, Facts],
    tenures: Sequence[Tenure],
    now: datetime,
) -> str:
    """Return the artifact's text, in Markdown."""
    table = [
        "| group | active | term | since | why | standing by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group in groups:
        known = facts[group.group_id]
        cells = (
            group.group_id,
            known.holder or "nobody",
            str(known.term),
            _ago(group.held_for, now),
            group.reason or "",
            _names(known),
        )
        table.append(_row(cells))
    changes = ["| group | term | node | from | until | why |", "| --- | --- | --- | --- | --- | --- |"]
    for one in tenures:
        since, until = _ago(one.began, now), _ago(one.released, now)
        cells = (one.group_id, str(one.term), one.task_id, since, until, one.reason)
        changes.append(_row(cells))
    return "\n".join(
        [
            f"# Groups of work pool {pool}",
            "",
            f"As of {_moment(now)}.",
            "",
            *table,
            "",
            "## Last changes",
            "",
            *changes,
        ]
    )


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _names(facts: Facts) -> str:
    return ", ".join(facts.standing_by) or "nobody"


def _ago(seconds: float | None, now: datetime) -> str:
    return "" if seconds is None else _moment(now - timedelta(seconds=seconds))


def _moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"
