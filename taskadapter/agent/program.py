"""What runs in the background of a program: one agent for each work pool, shared by its listeners.

The first listener that starts brings the agent up, each further one joins its queue to it, each that
stops takes its jobs off, and the last one ends it. An agent lives on an event loop in a thread of its own;
its functions here may be awaited on any loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import shlex
import threading
from collections.abc import Collection, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger

from taskadapter.agent import switches
from taskadapter.agent.tasks import Tasks
from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.errors import CoordinationError, TaskError, innermost
from taskadapter.prefect_api.client import API_FAULTS
from taskadapter.prefect_api.pool import Domain
from taskadapter.settings import TaskadapterSettings

START_SECONDS = 8.0
"""How long it may take to join a queue, once the agent is up, before what is in the way is told."""

T = TypeVar("T")


@dataclass(eq=False)
class Part:
    """What a listener that has been started has of an agent.

    Attributes:
        queue: its queue.
        domain: the database and timing that it declares; None if it declares no group.
        jobs: the ids of its jobs by the names of its services.
        over: done when the listener is stopped, or with the error that its agent has ended with.
    """

    queue: str
    domain: Domain | None
    jobs: dict[str, UUID]
    over: Future[None] = field(default_factory=Future)

    @property
    def job_ids(self) -> frozenset[UUID]:
        """The ids of its jobs."""
        return frozenset(self.jobs.values())


class ProgramAgent:
    """The agent that `prefect worker start` runs, for the listeners of this program on one work pool.

    Args:
        work_pool: the pool's name.
        name: the node's name.
        queue: the first queue that it polls.
        is_only: whether the program has no agent for another pool.
    """

    def __init__(self, work_pool: str, name: str, queue: str, *, is_only: bool = True) -> None:
        self.work_pool = work_pool
        self.name = name
        self.ended: Future[None] = Future()
        self.is_stopping = False
        self._worker = WarmBackupWorker(
            work_pool, work_queues=[queue], name=name, is_only=is_only, is_command=False
        )
        self._parts: set[Part] = set()
        self._turn = asyncio.Lock()
        self._log = get_logger("taskadapter")
        self._tasks = Tasks(self._log)
        has_loop = threading.Event()
        # The thread must see the settings of whoever starts it, a test's temporary ones included.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run, has_loop), name=f"agent {name}", daemon=True
        )
        self._thread.start()
        has_loop.wait()

    # --- in its thread ----------------------------------------------------------------------------

    def _run(self, has_loop: threading.Event) -> None:
        failure: TaskError | None = None
        try:
            asyncio.run(self._work(has_loop))
        except asyncio.CancelledError:
            self._log.info("Agent %r has stopped.", self.name)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the listeners are told
            failure = _in_one_line(exc)
            self._log.error("Agent %r has ended: %s", self.name, failure)
            self._log.debug("This was its error.", exc_info=True)
        self.is_stopping = True
        has_loop.set()  # whoever waits for one that there is none of hears of its end
        with _guard:
            if _agents.get(self.work_pool) is self:
                del _agents[self.work_pool]
        _settle(self.ended, failure)
        for part in self._parts:
            _settle(part.over, failure)

    async def _work(self, has_loop: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._working = asyncio.create_task(self._worker.start(printer=self._log.info))
        has_loop.set()
        await self._working

    async def _join(self, part: Part) -> bool:
        async with self._turn:
            if self.is_stopping:
                return False
            self._parts.add(part)
            try:
                await self._or_end(self._worker.join(part.queue, part.job_ids, part.domain, START_SECONDS))
            except BaseException:
                await self._take_off([part], 0.0)
                raise
            self._tasks.spawn(self._say_what_is_over(part))
            return True

    async def _say_what_is_over(self, part: Part) -> None:
        """Say which of a listener's jobs do not run although it has been started, and what starts them."""
        over: dict[str, str] = {}
        with suppress(CoordinationError, ObjectNotFound, *API_FAULTS):  # which the worker tells
            over = await switches.what_is_over(self._worker.client, part.job_ids)
        for name, why in over.items():
            if why != switches.WAS_DETACHED:  # attached again, it goes on as soon as that has been seen
                self._log.warning(
                    "Job %s is over, and does not run: %s. `taskadapter restart %s` starts it again.",
                    name,
                    why,
                    shlex.quote(name),
                )

    async def _leave(self, parts: Collection[Part], drain_seconds: float) -> None:
        """Take parts off, also when nobody waits for that any more: half of it would leave them idle."""

        async def leave() -> None:
            async with self._turn:
                await self._take_off([part for part in parts if part in self._parts], drain_seconds)

        await asyncio.shield(self._tasks.spawn(leave()))

    async def _take_off(self, parts: Collection[Part], drain_seconds: float) -> None:
        """Take parts off; those of the last ones are over when the agent has ended."""
        staying = self._parts - set(parts)
        if not staying:
            self.is_stopping = True
            if drain_seconds == 0:
                self._worker.end_runs()
            self._working.cancel()
            return
        for part in parts:
            is_shared = part.queue in {other.queue for other in staying}
            await self._worker.leave(None if is_shared else part.queue, part.job_ids, drain_seconds)
            if is_shared and part.queue != DEFAULT_QUEUE:
                self._worker.stopped(part.queue, part.job_ids)
            self._parts.discard(part)
            _settle(part.over, None)

    async def _or_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something with the worker; raises its error should that end meanwhile."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._working}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._working
        finally:
            task.cancel()
        await task

    async def _in_thread(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the agent's loop, and wait for it on the caller's.

        Raises:
            TaskError: the agent has ended with it.
        """
        if self.ended.done():
            work.close()
            raise self._ending()
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except (RuntimeError, asyncio.CancelledError):
            # Its loop is closed, or has just been.
            if self.is_stopping:
                work.close()
                await self.gone()
                raise self._ending() from None
            raise

    def _ending(self) -> TaskError:
        failure = self.ended.exception()
        return failure if isinstance(failure, TaskError) else TaskError(f"agent {self.name!r} has stopped")

    # --- for listeners ----------------------------------------------------------------------------

    @classmethod
    async def take_part(
        cls, work_pool: str, name: str | None, default_name: str, part: Part
    ) -> ProgramAgent:
        """Have the agent of a pool run the jobs of one more listener, after starting it if there is none.

        Args:
            work_pool: the pool's name.
            name: the node's name, where a listener says it.
            default_name: the node's name where none does.
            part: the listener's.

        Raises:
            TaskError: what keeps this node from taking part.
        """
        while True:
            with _guard:
                agent = _agents.get(work_pool)
                if agent is None:
                    agent = cls(work_pool, name or default_name, part.queue, is_only=not _agents)
                    _agents[work_pool] = agent
            if agent.is_stopping:
                await agent.gone()
                continue
            if name not in (None, agent.name):
                raise TaskError(
                    f"task_id={name!r}: the agent of work pool {work_pool!r} in this program runs as node "
                    f"{agent.name!r} already; declare the listener before the first one is started."
                )
            try:
                if await agent._in_thread(agent._join(part)):
                    return agent
            except Exception:
                if agent.is_stopping:
                    await agent.gone()
                    if agent.ended.exception() is not None:
                        raise agent._ending() from None
                raise

    async def look_again(self, part: Part) -> None:
        """Look at once for what new jobs of a listener are to do."""
        await self._in_thread(self._worker.look_again(part.queue, part.job_ids))

    async def call_off(self, job_id: UUID, reason: str) -> None:
        """Begin nothing more of a job here, which is over; what is running goes on."""

        async def call_off() -> None:
            self._worker.call_off(job_id, reason)

        await self._in_thread(call_off())

    async def leave(self, parts: Collection[Part], *, end_runs: bool) -> None:
        """Begin nothing more of some listeners' jobs; returns when what is running has ended.

        Args:
            parts: the listeners'.
            end_runs: end it now, instead of waiting as long as the settings allow.
        """
        if not self.ended.done():
            drain_seconds = 0.0 if end_runs else TaskadapterSettings().drain_seconds
            try:
                await self._in_thread(self._leave(parts, drain_seconds))
            except TaskError:
                if not self.is_stopping:
                    raise
                await self.gone()
        for part in parts:
            await done(part.over)

    async def gone(self) -> None:
        """Wait until the agent has ended, in whatever way."""
        await done(self.ended)

    def hurry(self) -> None:
        """End the runs that are being waited for, now."""
        self._loop.call_soon_threadsafe(self._worker.hurry)

    async def stop(self) -> None:
        """Let every listener of this agent leave."""
        await self.leave(list(self._parts), end_runs=False)


async def done(future: Future[None]) -> None:
    """Wait until something is over, in whatever way."""
    waiting = asyncio.wrap_future(future)
    await asyncio.wait([waiting])
    waiting.exception()  # it is told to whoever asks for it


async def stop_all() -> None:
    """Let every listener of this program leave, in order."""
    await asyncio.gather(*(agent.stop() for agent in agents()))


def agents() -> list[ProgramAgent]:
    """Return the agents of this program that have not ended."""
    with _guard:
        return list(_agents.values())


_agents: dict[str, ProgramAgent] = {}
_guard = threading.Lock()


def _in_one_line(exc: BaseException) -> TaskError:
    """Return an error of ours for what has ended an agent, out of the groups of errors it came in."""
    exc = innermost(exc)
    if isinstance(exc, TaskError):
        return exc
    failure = TaskError(f"{type(exc).__name__}: {exc}")
    failure.__cause__ = exc
    return failure


def _settle(future: Future[None], failure: TaskError | None) -> None:
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)
