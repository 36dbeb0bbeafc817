"""The background tasks of an agent: none of them ends unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from logging import Logger, LoggerAdapter
from typing import Any, TypeVar

T = TypeVar("T")

PAUSE_SECONDS = 1.0
"""How long a task waits that has raised an error, before it goes on."""


class Tasks:
    """What runs on an agent's event loop beside its polls.

    Args:
        log: the agent's.
    """

    def __init__(self, log: Logger | LoggerAdapter[Any]) -> None:
        self._log = log
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Have something done in the background; the log tells of an error that it ends with."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._has_ended)
        return task

    def keep_up(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Have something done as long as the agent lives, whatever it raises."""
        return self.spawn(self._for_ever(work))

    def cancel(self) -> None:
        """End all that goes on."""
        for task in self._running:
            task.cancel()

    async def _for_ever(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await work()
            except Exception:  # noqa: BLE001 - whatever it is, it is told, and the agent goes on
                self._log.exception("An error in the agent itself; it goes on. Please report it.")
                await asyncio.sleep(PAUSE_SECONDS)

    def _has_ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._log.error("A task of the agent has failed. Please report it.", exc_info=fault)
