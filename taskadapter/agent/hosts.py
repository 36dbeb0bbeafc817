"""The agent's side of the processes in which runs happen: made by the nursery, one for each run.

`execution.nursery` forks them, `execution.host` is the process at the other end of the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from prefect.client.schemas.objects import State
from prefect.logging import get_logger

from taskadapter.errors import TaskError
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
        kind: ``told``: the API knows how the run ended, or that it did; ``untold``: the ledger is to say;
            ``killed``: so it is, and a signal has ended the process; ``dropped``: given back before its
            body, because the agent wished so; ``paused``: because the job is; ``skipped``: the tick is
            not to run; ``crashed``: it is the flow's own fault that its body was not reached.
        ended: why the job is over for all nodes, if it is.
        message: what crashed, or why the tick is skipped.
        left: the commands that a run which was done had left behind; they are ended.
    """

    kind: Literal["told", "untold", "killed", "dropped", "paused", "skipped", "crashed"]
    ended: str | None = None
    message: str = ""
    left: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit status, and the commands that it left behind."""

    exit_code: int
    left: tuple[str, ...] = ()


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
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._link = link
        self._writer = writer
        self._said: list[dict[str, Any]] = []

    async def carry_out(self, assignment: Assignment, progress: Progress) -> Outcome:
        """Have the process run the assignment; returns when the process has ended."""
        outcome = None
        async for event in self._assign("run", assignment):
            match event:
                case {"event": "loaded", "seconds": seconds}:
                    progress.loaded(seconds)
                case {"event": "started"}:
                    progress.started()
                case {"event": "progress", "ended": ended}:
                    progress.begun(ended)
                case {"event": "done", "told": told}:
                    outcome = Outcome("told" if told else "untold", ended=event.get("ended"))
                case {"event": "skipped", "reason": reason}:
                    outcome = Outcome("skipped", ended=event.get("ended"), message=reason)
                case {"event": "crashed", "message": message}:
                    outcome = Outcome("crashed", message=message)
                case {"event": "dropped" | "paused" as kind}:
                    outcome = Outcome(kind)
            if outcome is not None:
                break
        # What ends is the process, not its socket: a job may have closed that, or a child may hold it.
        ending = await self._end_of(is_leaving=outcome is not None)
        if outcome is None:
            killed = -ending.exit_code in _FROM_OUTSIDE
            return Outcome("killed" if killed else "crashed", message=self._in_words(ending))
        return replace(outcome, message=outcome.message or self._in_words(ending), left=ending.left)

    async def run_hooks(self, assignment: Assignment, state: State[Any]) -> None:
        """Have the process run the hooks for ``state`` of a run whose own process is gone."""
        async for _ in self._assign("hooks", assignment, state=state.model_dump(mode="json")):
            break
        await self._end_of(is_leaving=True)

    async def _end_of(self, *, is_leaving: bool) -> Ending:
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

    async def _assign(self, do: str, assignment: Assignment, **more: Any) -> AsyncIterator[dict[str, Any]]:
        """Give the assignment to the process; yields what it tells, until nothing more can come."""
        self._said.insert(0, {"do": do, "assignment": assignment.model_dump(mode="json")} | more)
        self._send(*self._said)
        reader = LineReader(self._link)
        while (event := await reader.read()) is not None:
            if event["event"] != "ready":
                yield event
                continue
            # It has become an interpreter of its own, which knows of nothing.
            self._send(*self._said)

    def cancel(self) -> None:
        """Cancel the run, as Prefect's runner does: its flow can clean up."""
        self._send({"do": "cancel"})

    def go(self) -> None:
        """Let the body begin, once the run's moment has come."""
        if {"do": "go"} not in self._said:
            self._say({"do": "go"})

    def drop(self) -> None:
        """Give the run back if it still waits for its moment."""
        self._say({"do": "drop"})

    def end(self, signum: signal.Signals) -> None:
        """Signal the process and all that its job has started."""
        if not self._ending.done():
            self._say({"do": "end"})  # a SIGTERM alone it would take for one that all get
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)

    def ended(self, ending: Ending) -> None:
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

    def _say(self, message: dict[str, Any]) -> None:
        """Tell the process something, or remember it until it has its assignment."""
        self._said.append(message)
        if "assignment" in self._said[0]:
            self._send(message)

    def _send(self, *messages: dict[str, Any]) -> None:
        for message in messages:
            self._writer.write(json.dumps(message).encode() + b"\n")

    def _in_words(self, ending: Ending) -> str:
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
        self._endings: dict[int, Ending] = {}
        self._nursery: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._folder: Scratch | None = None
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
        if (refusal := first.get("refused")) is not None:
            ours.close()
            raise TaskError(refusal)
        self._nursery = ours
        self._broken_since = None
        self._watcher = asyncio.create_task(self._watch(ours, reader, preload))

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
        while (notice := await reader.read()) is not None:
            ending = Ending(notice["exit_code"], tuple(notice["left"]))
            if host := self._hosts.pop(notice["pid"], None):
                host.ended(ending)
            else:
                self._endings[notice["pid"]] = ending
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
            host.ended(Ending(-signal.SIGKILL))
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
            socket.send_fds(nursery, [b"+"], [theirs.fileno()])
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
        host = Host(ours, writer, first["pid"], self._kill_nursery)
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

    async def read(self) -> dict[str, Any] | None:
        """Return the next message; None when the other end is gone."""
        while b"\n" not in self._pending:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._link, BUFFER)
            except OSError:  # it was killed with something unread
                return None
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
