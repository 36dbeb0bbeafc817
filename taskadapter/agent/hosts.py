"""The agent's side of the processes in which runs happen: made by the nursery, one for each run.

`execution.nursery` forks them, `execution.host` is the process at the other end of the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prefect.client.schemas.objects import State
from prefect.logging import get_logger
from pydantic import SecretStr

from taskadapter.agent.runs import Killed, Signal
from taskadapter.errors import TaskError
from taskadapter.execution import protocol
from taskadapter.execution.assignment import LEAVE_SECONDS, Assignment
from taskadapter.execution.scratch import Scratch

ANSWER_SECONDS = 10.0
"""How long the nursery may take to fork a process, or to tell of its end, before it is replaced."""

LAST_WORDS_SECONDS = 0.2
"""What a process has said is read within this after its end, though others still hold its socket."""

RESTART_SECONDS = 1.0
"""How long to wait before a nursery that has ended is started again."""

CLOSE_SECONDS = 5.0
"""How long the nursery may take to end everything when its agent stops."""

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
    """

    end: protocol.End | Killed
    how: str = ""
    left: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """What to tell of a run that has crashed."""
        return self.end.fault if isinstance(self.end, protocol.Crashed) else self.how


@dataclass(frozen=True)
class Progress:
    """What a process tells on its way.

    Attributes:
        loaded: called with the seconds that the run's code took to load.
        started: called when the run's moment has come.
        begun: called when the body begins, and when the job is over, with the reason if it is.
    """

    loaded: Callable[[float], None]
    started: Callable[[], None]
    begun: Callable[[str | None], None]


class Host:
    """The process of one run, as the agent sees it.

    Args:
        link: the socket to it.
        writer: what it hears; another one of the same connection, whose faults lose nothing that it said.
        pid: its id.
        give_up: replaces a nursery that does not tell of the end of a process.
    """

    def __init__(
        self,
        link: socket.socket,
        writer: asyncio.StreamWriter,
        pid: int,
        give_up: Callable[[], None],
    ) -> None:
        self.pid = pid
        self._give_up = give_up
        self._ending: asyncio.Future[protocol.Gone] = asyncio.get_running_loop().create_future()
        self._link = link
        self._writer = writer
        self._said: list[protocol.Order] = []

    async def carry_out(self, assignment: Assignment, progress: Progress) -> Outcome:
        """Have the process run the assignment; returns when the process has ended."""
        end: protocol.End | None = None
        async for report in self._assign(protocol.Run(assignment=assignment)):
            match report:
                case protocol.Loaded(seconds=seconds):
                    progress.loaded(seconds)
                case protocol.Started():
                    progress.started()
                case protocol.Begun(ended=ended):
                    progress.begun(ended)
                case _:
                    end = report
                    break
        # What ends is the process, not its socket: a job may have closed that, or a child may hold it.
        ending = await self._end_of(is_leaving=end is not None)
        how = self._in_words(ending)
        if end is not None:
            return Outcome(end, how, ending.left)
        killed = -ending.exit_code in _FROM_OUTSIDE
        return Outcome(Killed() if killed else protocol.Crashed(fault=how), how)

    async def run_hooks(self, assignment: Assignment, state: State[Any]) -> None:
        """Have the process run the hooks for ``state`` of a run whose own process is gone."""
        async for _ in self._assign(protocol.RunHooks(assignment=assignment, state=state)):
            break
        await self._end_of(is_leaving=True)

    async def _end_of(self, *, is_leaving: bool) -> protocol.Gone:
        """Wait for the end of the process; a nursery that does not tell of it in time is replaced.

        Args:
            is_leaving: whether the process has said its last, and ends within `LEAVE_SECONDS`.
        """
        if is_leaving and not await self._has_ended_within(LEAVE_SECONDS + ANSWER_SECONDS):
            self.end(signal.SIGKILL)
            if not await self._has_ended_within(ANSWER_SECONDS):
                self._give_up()
        return await self._ending

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
            report = protocol.report(line)
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
            return f"process {self.pid} was ended by {signal.Signals(-ending.exit_code).name}"
        return f"process {self.pid} exited with status {ending.exit_code}"


class HostPool:
    """Makes a process for each run, through the nursery, and learns of its end.

    Args:
        limit: how many runs at once; the caller keeps to it.

    Attributes:
        fault: why no process could be started the last time that none could.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._hosts: dict[int, Host] = {}
        # Of processes that ended before they were known here.
        self._endings: dict[int, protocol.Gone] = {}
        self._nursery: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._folder: Scratch | None = None
        self._database_url: SecretStr | None = None
        self._broken_since: float | None = None
        self.fault = ""
        self._log = get_logger("taskadapter.agent.hosts")

    async def start(self, preload: Sequence[str]) -> None:
        """Start the nursery, and wait until it has imported what runs need.

        Args:
            preload: modules that it imports as well.

        Raises:
            EOFError: it ended instead.
            TaskError: it cannot import what it is to preload.
        """
        self._folder = self._folder or Scratch()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "taskadapter.execution.nursery",
                str(theirs.fileno()),
                *preload,
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                # Ctrl-C in the agent's terminal is for the agent, which ends its runs in order.
                start_new_session=True,
            )
        reader = LineReader(ours)
        first = await reader.read()
        if first is None:
            ours.close()
            raise EOFError("the process that forks others has ended at once; its output says why")
        match protocol.notice(first):
            case protocol.Refused(reason=reason):
                ours.close()
                raise TaskError(reason)
        self._nursery = ours
        self._broken_since = None
        self._tell_of_database()
        self._watcher = asyncio.create_task(self._watch(ours, reader, preload))

    def use(self, database_url: SecretStr) -> None:
        """Have the nursery learn about a database that answers what each run would learn anew."""
        if database_url != self._database_url:
            self._database_url = database_url
            self._tell_of_database()

    def _tell_of_database(self) -> None:
        if self._nursery is not None and self._database_url is not None:
            with contextlib.suppress(OSError):  # it has ended; the next one is told
                self._nursery.send(protocol.Connect(database_url=self._database_url).line())

    async def close(self) -> None:
        """End every run, the nursery, and what they have left."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._nursery is not None:
            self._nursery.close()
        if self._process is not None:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self._kill_nursery()
                await self._process.wait()
        self._end_hosts()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.close)

    async def _watch(self, nursery: socket.socket, reader: LineReader, preload: Sequence[str]) -> None:
        """Take the nursery's notices; start another one should it end."""
        while (line := await reader.read()) is not None:
            match protocol.notice(line):
                case protocol.Gone() as ending:
                    if host := self._hosts.pop(ending.pid, None):
                        host.ended(ending)
                    else:
                        self._endings[ending.pid] = ending
        self._break("the process that forks others has ended")
        self._log.error("The process that forks others has ended, and its runs with it; starting another.")
        nursery.close()
        self._nursery = None
        self._end_hosts()
        if self._process is not None:
            await self._process.wait()
        while self._nursery is None:
            await asyncio.sleep(RESTART_SECONDS)
            try:
                await self.start(preload)
            except (OSError, EOFError, TaskError) as fault:
                if str(fault) != self.fault:
                    self._log.error("It cannot be started: %s", fault)
                self._break(str(fault))

    def _break(self, fault: str) -> None:
        self.fault = fault
        if self._broken_since is None:
            self._broken_since = time.monotonic()

    @property
    def broken_for(self) -> float:
        """For how many seconds no process could be started, as `fault` says; 0 if one could."""
        return 0.0 if self._broken_since is None else time.monotonic() - self._broken_since

    def _end_hosts(self) -> None:
        """End the processes whose nursery is gone, which ends them too: nobody else tells of it."""
        for host in self._hosts.values():
            host.end(signal.SIGKILL)
            host.ended(protocol.Gone(pid=host.pid, exit_code=-signal.SIGKILL))
        self._hosts.clear()
        self._endings.clear()

    def _kill_nursery(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def fork(self) -> Host:
        """Return a new process.

        Raises:
            OSError: no process can be started.
        """
        nursery = self._nursery
        if nursery is None:
            raise OSError("the process that forks others is not running")
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(nursery, [protocol.Fork().line()], [theirs.fileno()])
        writer = await writer_to(ours)
        first, fault = None, "it ended at once"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                first = await LineReader(ours).read()
        except TimeoutError:
            self._break("no process is forked")
            self._kill_nursery()
            fault = f"it was not forked within {ANSWER_SECONDS:g} s"
        if first is None or nursery is not self._nursery:
            writer.transport.abort()
            ours.close()
            raise OSError(fault)
        host = Host(ours, writer, protocol.ready(first).pid, self._kill_nursery)
        self._hosts[host.pid] = host
        if (ending := self._endings.pop(host.pid, None)) is not None:
            del self._hosts[host.pid]
            host.ended(ending)
        return host

    def scratch(self, run: str) -> Path | None:
        """Return the folder of a run's own, which it may make."""
        return None if self._folder is None else self._folder.path / run

    async def clear(self, run: str) -> None:
        """Remove the folder of a run that is over, if it has made one."""
        folder = self.scratch(run)
        if folder is not None and folder.exists():
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


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
