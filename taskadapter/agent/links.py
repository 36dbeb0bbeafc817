"""The agent's end of the process of one run: what it is told, what it says, and how it ended.

`execution.host` is the process at the other end of the socket, `protocol` what the two say to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

from prefect.client.schemas.objects import State
from pydantic import ValidationError

from taskadapter.agent.runs import Killed, Signal
from taskadapter.execution import protocol
from taskadapter.execution.assignment import LEAVE_SECONDS, Assignment

ANSWER_SECONDS = 10.0
"""How long the nursery may take to fork a process, or to tell of its end, before it is looked after."""

HOOKS_SECONDS = 600.0
"""How long each hook for a run's end may take; it would keep its job's place.

The same holds for loading a run's code anew, where its own process is gone.
"""

LAST_WORDS_SECONDS = 0.2
"""What a process has said is read within this after its end, though others still hold its socket."""

BUFFER = 65536

_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
"""Signals by which somebody ends a process; others are mistakes of its own."""


@dataclass(frozen=True)
class Outcome:
    """How an assignment went.

    Attributes:
        end: the last that the process said, or that it was killed.
        how: how the process ended, in words.
        left: the commands that it left behind; they are ended.
        hook: the name of a hook that has taken too long, and was ended with the process.
    """

    end: protocol.End | Killed
    how: str = ""
    left: tuple[str, ...] = ()
    hook: str | None = None

    @property
    def message(self) -> str:
        """What to tell of a run that has crashed."""
        return self.end.fault if isinstance(self.end, protocol.Crashed | protocol.Unloadable) else self.how


@dataclass(frozen=True)
class Progress:
    """What a process tells on its way.

    Attributes:
        loaded: called with the seconds that the run's code took to load.
        started: called when the run's moment has come.
        begun: called when the body begins, and when the job is over, with the reason if it is.
        came_to: called while the coordination database fails it, when that answers again, and when it has
            what the body came to.
    """

    loaded: Callable[[float], None]
    started: Callable[[], None]
    begun: Callable[[str | None], None]
    came_to: Callable[[protocol.Waits | protocol.Unentered | protocol.Answered | protocol.Settled], None]


class HostLink:
    """The process of one run, as the agent sees it.

    Args:
        link: the socket to it.
        writer: what it hears; another one of the same connection, whose faults lose nothing that it said.
        pid: its id.
        doubt: has the nursery looked after, which does not tell of the end of a process.
    """

    def __init__(
        self,
        link: socket.socket,
        writer: asyncio.StreamWriter,
        pid: int,
        doubt: Callable[[], None],
    ) -> None:
        self.pid = pid
        self._doubt = doubt
        self._ending: asyncio.Future[protocol.Gone] = asyncio.get_running_loop().create_future()
        self._link = link
        self._writer = writer
        self._said: list[protocol.Order] = []
        self._hook: str | None = None  # that is being called

    async def carry_out(self, assignment: Assignment, progress: Progress) -> Outcome:
        """Have the process run the assignment; returns when the process has ended."""
        limit, end = asyncio.timeout(None), None
        try:
            async with limit:
                end = await self._follow(protocol.Run(assignment=assignment), progress, limit)
        except TimeoutError:
            if not limit.expired():
                raise
            self.end(signal.SIGKILL)
        # What ends is the process, not its socket: a job may have closed that, or a child may hold it.
        ending = await self._end_of(is_leaving=end is not None or limit.expired())
        how = self._in_words(ending)
        if end is not None:
            return Outcome(end, how, ending.left)
        if limit.expired():
            return Outcome(Killed(), how, hook=self._hook)
        killed = -ending.exit_code in _FROM_OUTSIDE
        return Outcome(Killed() if killed else protocol.Crashed(fault=how), how)

    async def _follow(
        self, order: protocol.Run, progress: Progress, limit: asyncio.Timeout
    ) -> protocol.End | None:
        """Give the process its order, and pass on what it tells; returns the last that it says."""
        async for report in self._assign(order):
            match report:
                case protocol.Loaded(seconds=seconds):
                    progress.loaded(seconds)
                case protocol.Started():
                    progress.started()
                case protocol.Begun(ended=ended):
                    progress.begun(ended)
                case protocol.Waits() | protocol.Unentered() | protocol.Answered() | protocol.Settled():
                    progress.came_to(report)
                case protocol.Hook(name=name):
                    self._hook = name
                    limit.reschedule(None if name is None else _in(HOOKS_SECONDS))
                case _:
                    return report
        return None

    async def run_hooks(self, assignment: Assignment, state: State[Any]) -> None:
        """Have the process run the hooks for ``state`` of a run whose own process is gone.

        Raises:
            TimeoutError: one took too long, or to load them did.
        """
        try:
            async with asyncio.timeout(HOOKS_SECONDS) as limit:
                async for report in self._assign(protocol.RunHooks(assignment=assignment, state=state)):
                    if not isinstance(report, protocol.Hook):
                        break
                    self._hook = report.name
                    limit.reschedule(_in(HOOKS_SECONDS))
        except TimeoutError:
            self.end(signal.SIGKILL)
            what = "to load them" if self._hook is None else f"hook {self._hook}"
            raise TimeoutError(f"{what} took longer than {HOOKS_SECONDS:g} s, and was ended") from None
        finally:
            await self._end_of(is_leaving=True)

    async def _end_of(self, *, is_leaving: bool) -> protocol.Gone:
        """Wait for the end of the process; a nursery that does not tell of it in time is looked after.

        Args:
            is_leaving: whether the process has said its last, and ends within `LEAVE_SECONDS`.
        """
        if is_leaving and not await self._has_ended_within(LEAVE_SECONDS + ANSWER_SECONDS):
            self.end(signal.SIGKILL)
            if not await self._has_ended_within(ANSWER_SECONDS):
                self._doubt()
        return await asyncio.shield(self._ending)  # who is cancelled meanwhile has not ended it

    async def _has_ended_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait([self._ending], timeout=seconds)
        return bool(done)

    async def _assign(
        self, order: protocol.Run | protocol.RunHooks
    ) -> AsyncIterator[protocol.Step | protocol.End]:
        """Give the process its order; yields what it reports, until nothing more can come."""
        self._said.insert(0, order)
        self._send(*self._said)
        reader = LineReader(self._link)
        while (line := await reader.read()) is not None:
            try:
                report = protocol.report(line)
            except ValidationError:  # a job may write into every file that it finds open
                continue
            if not isinstance(report, protocol.Ready):
                yield report
                continue
            # It has become an interpreter of its own, which knows of nothing.
            self._send(*self._said)

    def cancel(self) -> None:
        """Cancel the run, as Prefect's runner does: its flow can clean up."""
        self._send(protocol.Cancel())

    def go(self) -> None:
        """Let the body begin, once the run's moment has come."""
        if protocol.Go() not in self._said:
            self._say(protocol.Go())

    def drop(self) -> None:
        """Give the run back if it still waits for its moment."""
        self._say(protocol.Drop())

    def heed(self, sign: Signal) -> None:
        """Tell the process what the life of its run asks for."""
        match sign:
            case Signal.DROP:
                self.drop()
            case Signal.CANCEL:
                self.cancel()
            case Signal.TERMINATE:
                self.end(signal.SIGTERM)
            case Signal.KILL:
                self.end(signal.SIGKILL)

    def end(self, signum: signal.Signals) -> None:
        """Signal the process and all that its job has started."""
        if not self._ending.done():
            self._say(protocol.Stop())  # a SIGTERM alone it would take for one that all get
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)

    def ended(self, ending: protocol.Gone) -> None:
        """Take note that the process has ended."""
        if not self._ending.done():
            self._ending.set_result(ending)
            asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        """End the connection; who still reads gets what was said, and then its end."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._link.close)

    def _say(self, order: protocol.Order) -> None:
        """Tell the process something, or remember it until it has its assignment."""
        self._said.append(order)
        if isinstance(self._said[0], protocol.Run | protocol.RunHooks):
            self._send(order)

    def _send(self, *orders: protocol.Order) -> None:
        for order in orders:
            self._writer.write(order.line())

    def _in_words(self, ending: protocol.Gone) -> str:
        if ending.exit_code < 0:
            return f"process {self.pid} was ended by {_name_of(-ending.exit_code)}"
        return f"process {self.pid} exited with status {ending.exit_code}"


def _in(seconds: float) -> float:
    """Return a moment, so many seconds from now, on the clock of the event loop."""
    return asyncio.get_running_loop().time() + seconds


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


async def writer_to(link: socket.socket) -> asyncio.StreamWriter:
    """Return what writes to a socket, and leaves it to others to read from it."""
    link.setblocking(False)
    _, writer = await asyncio.open_unix_connection(sock=link.dup())
    cast("asyncio.ReadTransport", writer.transport).pause_reading()
    return writer


class LineReader:
    """Reads what the nursery or a process says, a message a line, to the last that it has said.

    A stream of asyncio forgets what it has not handed out when the other end is gone.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._pending = b""

    async def read(self) -> bytes | None:
        """Return the next line; None when the other end is gone."""
        while b"\n" not in self._pending:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._link, BUFFER)
            except OSError:  # it was killed with something unread
                return None
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line
