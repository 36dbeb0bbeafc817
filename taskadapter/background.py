"""An agent in a thread of a program, for `Listener.start`."""

from __future__ import annotations

import asyncio
import contextvars
import threading

from prefect.logging import get_logger

from taskadapter.worker import WarmBackupWorker


class BackgroundAgent:
    """The same agent that `prefect worker start` runs, started by its construction.

    Args:
        work_pool: the pool's name.
        queue: the one queue that it polls.
        name: the node's name.
    """

    def __init__(self, work_pool: str, queue: str, name: str) -> None:
        self._worker = WarmBackupWorker(work_pool, work_queues=[queue], name=name)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = threading.Event()
        # The thread must see the settings of whoever starts it, a test's temporary ones included.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(asyncio.run, self._run()), name=f"agent {name}", daemon=True
        )
        self._thread.start()
        self._started.wait()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._started.set()
        log = get_logger("taskadapter")
        try:
            await self._worker.start(printer=log.info)
        except asyncio.CancelledError:
            log.info("Agent %r has stopped.", self._worker.name)
        except Exception:
            log.exception("Agent %r has ended.", self._worker.name)

    def drain(self) -> None:
        """Let the runs finish, as long as the settings allow, and end."""
        if self._thread.is_alive() and self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def abort(self) -> None:
        """End the runs, then the agent."""
        if self._thread.is_alive() and self._loop is not None:
            self._loop.call_soon_threadsafe(self._worker.end_runs)
        self.drain()
