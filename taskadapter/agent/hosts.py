"""The agent's side of the processes in which runs happen: made by the nursery, one for each run.

`execution.nursery` forks them, `execution.host` is the process at the other end of the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from prefect.logging import get_logger
from prefect.settings import PREFECT_CLIENT_METRICS_ENABLED
from pydantic import SecretStr

from taskadapter.agent.links import ANSWER_SECONDS, HostLink, LineReader, writer_to
from taskadapter.errors import TaskError
from taskadapter.execution import protocol
from taskadapter.execution.scratch import Scratch

RESTART_SECONDS = 1.0
"""How long to wait before a nursery that has ended is started again."""

SLOW_START_SECONDS = 30.0
"""How long a nursery starts until that is told: it is waited for, for a module may take long to import."""

STILL_SECONDS = 120.0
"""How long the nursery may stand still before it is replaced, which ends all runs of the node.

A machine that swaps, or stops processes for a while, has it answer late: that alone ends nothing.
"""

CLOSE_SECONDS = 5.0
"""How long the nursery may take to end everything when its agent stops."""


class HostPool:
    """Makes a process for each run, through the nursery, and learns of its end.

    Args:
        limit: how many runs at once; the caller keeps to it.

    Attributes:
        fault: why no process could be started the last time that none could.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # By the numbers of the requests: the system gives the id of a process that is gone to another one.
        self._numbers = itertools.count(1)
        self._hosts: dict[int, HostLink] = {}
        # The requests that wait for an answer, with the end of a process that came before it.
        self._asked: dict[int, protocol.Gone | None] = {}
        self._nursery: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._folder: Scratch | None = None
        self._database_url: SecretStr | None = None
        self._broken_since: float | None = None
        self._prober: asyncio.Task[None] | None = None
        # Prefect would have each run serve metrics too: on the port that is the agent's, which ends it.
        self._environment = (
            {PREFECT_CLIENT_METRICS_ENABLED.name: "false"} if PREFECT_CLIENT_METRICS_ENABLED else {}
        )
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
                env=os.environ | self._environment,
                # Ctrl-C in the agent's terminal is for the agent, which ends its runs in order.
                start_new_session=True,
            )
        reader = LineReader(ours)
        slow = asyncio.get_running_loop().call_later(
            SLOW_START_SECONDS, self._say_slow, self._process.pid, preload
        )
        try:
            first = await reader.read()
        finally:
            slow.cancel()
        if first is None:
            ours.close()
            raise EOFError("the process that forks others has ended at once; its output says why")
        match protocol.notice(first):
            case protocol.Refused(reason=reason):
                ours.close()
                raise TaskError(reason)
        self._nursery = ours
        self._tell_of_database()
        self._watcher = asyncio.create_task(self._watch(ours, reader, preload))

    def _say_slow(self, pid: int, preload: Sequence[str]) -> None:
        self._log.warning(
            "The nursery process %d has been starting for %g s, and no run begins before it has: %s.",
            pid,
            SLOW_START_SECONDS,
            f"it imports Prefect and {', '.join(preload)}" if preload else "it imports Prefect",
        )

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
        for task in (self._watcher, self._prober):
            if task is not None:
                task.cancel()
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
                case protocol.Gone(number=number) as ending:
                    if host := self._hosts.pop(number, None):
                        host.ended(ending)
                    elif number in self._asked:
                        self._asked[number] = ending
        self._break("the process that forks others has ended")
        self._log.error(
            "The nursery process has ended, and the runs of this node with it; starting another."
        )
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
                    self._log.error("The nursery process cannot be started, trying again: %s", fault)
                self._break(str(fault))
        self._log.info("The nursery process is back, and runs can begin again.")
        self._probe()

    def _break(self, fault: str) -> None:
        self.fault = fault
        if self._broken_since is None:
            self._broken_since = time.monotonic()

    def _probe(self) -> None:
        """See whether processes can be started, until they can, if no run asks for one."""
        if self._prober is None or self._prober.done():
            self._prober = asyncio.create_task(self._until_forked())

    async def _until_forked(self) -> None:
        while (nursery := self._nursery) is not None:
            try:
                host = await self.fork(STILL_SECONDS)
            except TimeoutError:
                if nursery is self._nursery:
                    self._log.error(
                        "The nursery process has not answered for %g s, and is ended.", STILL_SECONDS
                    )
                    self._kill_nursery()
                return
            except OSError:
                await asyncio.sleep(RESTART_SECONDS)
            else:
                host.end(signal.SIGKILL)
                return

    @property
    def broken_for(self) -> float:
        """For how many seconds no process could be started, as `fault` says; 0 if one could."""
        return 0.0 if self._broken_since is None else time.monotonic() - self._broken_since

    def _end_hosts(self) -> None:
        """End the processes whose nursery is gone, which ends them too: nobody else tells of it."""
        for number, host in self._hosts.items():
            host.end(signal.SIGKILL)
            host.ended(protocol.Gone(number=number, exit_code=-signal.SIGKILL))
        self._hosts.clear()

    def _kill_nursery(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def fork(self, within: float = ANSWER_SECONDS) -> HostLink:
        """Return a new process.

        Args:
            within: the seconds that it may take; one that comes later ends by itself.

        Raises:
            TimeoutError: it took longer.
            OSError: no process can be started.
        """
        try:
            host = await self._forked(within)
        except OSError as fault:
            self._break(str(fault))
            self._probe()
            raise
        self._broken_since = None
        return host

    async def _forked(self, within: float) -> HostLink:
        nursery = self._nursery
        if nursery is None:
            raise OSError(self.fault)
        number, host = next(self._numbers), None
        self._asked[number] = None
        ours, theirs = socket.socketpair()
        writer = await writer_to(ours)
        try:
            with theirs:
                socket.send_fds(nursery, [protocol.Fork(number=number).line()], [theirs.fileno()])
            pid = await _pid_of(ours, within)
            if nursery is not self._nursery:
                raise OSError(self.fault)
            host = self._hosts[number] = HostLink(ours, writer, pid, self._probe)
        finally:
            ending = self._asked.pop(number)
            if host is None:
                writer.transport.abort()
                ours.close()
        if ending is not None:
            del self._hosts[number]
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


async def _pid_of(link: socket.socket, within: float) -> int:
    """Return the id of the process that is being forked.

    Raises:
        OSError: there is none, or not in time.
    """
    try:
        async with asyncio.timeout(within):
            first = await LineReader(link).read()
    except TimeoutError:
        raise TimeoutError(f"it was not forked within {within:g} s") from None
    match None if first is None else protocol.first(first):
        case protocol.Ready(pid=pid):
            return pid
        case protocol.Unforked(fault=fault):
            raise OSError(fault)
        case None:
            raise OSError("it ended at once")
