"""This node's heartbeat for a pool's groups, in one database and with one timing.

The heartbeat decides, in threads of its own. What it decides arrives here, on the agent's event loop.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterable
from logging import Logger, LoggerAdapter
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.objects import WorkPool

from taskadapter.agent import metrics
from taskadapter.coordination.board import DeadlineBoard
from taskadapter.coordination.messages import (
    NOT_ASKED_FOR,
    Gained,
    Lost,
    Refused,
    ResignAsked,
    Token,
)
from taskadapter.execution.scratch import Scratch
from taskadapter.prefect_api.pool import Domain

if TYPE_CHECKING:
    from taskadapter.coordination.heartbeat import Change, Heartbeat, Vitals

STOP_SECONDS = 10.0
"""How long the release of tokens may take when the agent stops, or leaves a group."""

PAUSE_SECONDS = 0.02
"""How long to wait between two looks whether a token is released."""


class Groups:
    """The groups of a pool, as one node takes part in them.

    Args:
        node: the node's name.
        incarnation: which of all processes that ever had it.
        pool: the work pool.
        log: the agent's.
        is_only: whether this process takes part in the groups of no other pool.
        tell: hears, on the event loop, of each `Gained`, `Lost`, `ResignAsked` and `Refused`.
    """

    def __init__(
        self,
        node: str,
        incarnation: str,
        pool: WorkPool,
        log: Logger | LoggerAdapter[Any],
        is_only: bool,
        tell: Callable[[Gained | Lost | ResignAsked | Refused], None],
    ) -> None:
        self.node = node
        self._incarnation = incarnation
        self.domain = Domain.of(pool)
        self._folder = Scratch()
        self.board = self._folder.path / "deadlines"
        self._pool = pool
        self._log = log
        self._is_only = is_only
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self.names: frozenset[str] = frozenset()
        self._deadlines = DeadlineBoard.create(self.board)
        self._heartbeat: Heartbeat | None = None

    def stand_by(self, names: Iterable[str], database_url: str, why: str = NOT_ASKED_FOR) -> None:
        """Stand by for exactly these groups from now on; the first time, begin to show life.

        Args:
            names: the groups.
            database_url: the coordination database.
            why: for what reason others are left.
        """
        wanted, known = frozenset(names), self.names
        self.names = wanted
        if self._heartbeat is not None:
            if wanted != known:
                self._heartbeat.join(wanted, why)
            return
        from taskadapter.coordination.heartbeat import Heartbeat

        self._heartbeat = Heartbeat(
            database_url,
            task_id=self.node,
            group_ids=wanted,
            liveness_check_interval=self.domain.liveness_check_interval,
            heartbeat_frequency=self.domain.heartbeat_frequency,
            tell=self._hear,
            publish=self._deadlines.write,
            beat=functools.partial(metrics.beat, self._pool.name),
            incarnation=self._incarnation,
            of="" if self._is_only else self._pool.name,
            log=self._log,
        )
        self._heartbeat.start()

    def is_registered(self, name: str) -> bool:
        """Return whether this node is entered in the database as one that stands by for a group."""
        return self._heartbeat is not None and name in self._heartbeat.registered

    @property
    def vitals(self) -> Vitals | None:
        """How the node is, as its heartbeat has it; None before the first."""
        return None if self._heartbeat is None else self._heartbeat.vitals

    @property
    def waits_for_its_predecessor(self) -> bool:
        """Whether a process of this node's name, which may be dead, was seen lately."""
        return self._heartbeat is not None and self._heartbeat.waits_for_its_predecessor

    async def leave(self, name: str) -> None:
        """Stand by for a group no longer; returns when its token is released, if the database answers."""
        self.names -= {name}
        if self._heartbeat is not None:
            self._heartbeat.join(self.names)
            end = time.monotonic() + STOP_SECONDS
            # Its lease changes in another thread.
            while not self._heartbeat.has_left(name) and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(PAUSE_SECONDS)

    def token(self, name: str) -> Token | None:
        """Return the token of a group if this node may trust now that it holds it."""
        return None if self._heartbeat is None else self._heartbeat.token(name)

    def seconds_left(self, name: str) -> float:
        """Return for how long this node may trust that it holds a token; 0 if it does not."""
        return 0.0 if self._heartbeat is None else self._heartbeat.seconds_left(name)

    def release(self, name: str) -> None:
        """Hand a group over whose runs have ended."""
        if self._heartbeat is not None:
            self._heartbeat.release(name)

    async def stop(self) -> None:
        """Release every token."""
        if self._heartbeat is not None:
            await asyncio.to_thread(self._heartbeat.stop, STOP_SECONDS)
        self._deadlines.close()
        self._folder.close()

    def _hear(self, change: Change) -> None:
        """Pass a change on from the heartbeat's thread to the event loop."""
        if isinstance(change, Gained | Lost | ResignAsked | Refused):
            self._loop.call_soon_threadsafe(self._tell, change)
