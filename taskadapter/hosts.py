"""The agent's warm hosts: started when the load asks for them, used again, replaced when they end.

This is the agent's side; `taskadapter.host` is the process at the other end of the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from prefect.client.schemas.objects import State
from prefect.logging import get_logger

from taskadapter.runs import Assignment

IDLE_SECONDS = 60.0
"""A host that had nothing to do for so long is ended, but for the last one."""

EXIT_NOTICE_SECONDS = 5.0
"""How long the nursery may take to report the exit status of a host whose socket has closed."""

RESTART_SECONDS = 1.0
"""How long to wait before a nursery that has ended is started again."""

BUFFER = 65536


@dataclass(frozen=True)
class Outcome:
    """How an assignment went.

    Attributes:
        kind: ``done``: the engine has reported a final state, or the run is no longer ours;
            ``dropped``: given back before its body started; ``stale``: the host has old code, another
            one must take the assignment; ``crashed``: nobody has reported a final state.
        ended: why the job is over for all nodes, if it is.
        message: what crashed.
        host_stays: whether the process can take another assignment.
    """

    kind: Literal["done", "dropped", "stale", "crashed"]
    ended: str | None = None
    message: str = ""
    host_stays: bool = False


class Host:
    """One warm host process, as the agent sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int) -> None:
        self.pid = pid
        self.exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.workspace: str | None = None
        self.runs = 0
        self.idle_since = time.monotonic()
        self._reader = reader
        self._writer = writer

    async def carry_out(self, assignment: Assignment, on_progress: Callable[[str | None], None]) -> Outcome:
        """Have the host run the assignment; returns when it is through with it.

        Args:
            assignment: the run.
            on_progress: called when the body begins, and when the job is over, with the reason if it is.

        Raises:
            EOFError: the process ended.
        """
        self._assign("run", assignment)
        while True:
            match await self._event():
                case {"event": "progress", "ended": ended}:
                    on_progress(ended)
                case {"event": "done", "ended": ended, "stays": stays}:
                    return Outcome("done", ended=ended, host_stays=stays)
                case {"event": "crashed", "message": message}:
                    return Outcome("crashed", message=message)
                case {"event": "dropped"}:
                    return Outcome("dropped", host_stays=True)
                case {"event": "stale"}:
                    return Outcome("stale")

    async def run_hooks(self, assignment: Assignment, state: State[Any]) -> None:
        """Have the host run the hooks for ``state`` of a run whose own host is gone."""
        self._assign("hooks", assignment, state=state.model_dump(mode="json"))
        await self._event()

    def _assign(self, do: str, assignment: Assignment, **more: Any) -> None:
        self.workspace = assignment.workspace.key
        self.runs += 1
        self._send({"do": do, "assignment": assignment.model_dump(mode="json")} | more)

    def cancel(self) -> None:
        """Cancel the run, as Prefect's runner does: its flow can clean up."""
        self._send({"do": "cancel"})

    def drop(self, over: str | None = None) -> None:
        """Give the run back if it still waits for its moment.

        Args:
            over: why its job is over, if it is: then its body does not begin after that moment either.
        """
        self._send({"do": "drop", "over": over})

    def stop(self) -> None:
        """End the process once it is through with its run."""
        self._send({"do": "stop"})
        self._writer.close()

    def end(self, signum: signal.Signals) -> None:
        """Signal the process and all that its job has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _event(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except ConnectionError as reset:  # it was killed before it had read everything
            raise EOFError from reset
        if not line:
            raise EOFError
        event: dict[str, Any] = json.loads(line)
        return event


class HostPool:
    """Up to ``limit`` hosts; an idle one is used again for the workspace that it is warm for.

    Args:
        limit: how many runs at once.
        runs_per_host: after so many a host is replaced.
    """

    def __init__(self, limit: int, runs_per_host: int) -> None:
        self.limit = limit
        self._runs_per_host = runs_per_host
        self._hosts: dict[int, Host] = {}
        self._idle: list[Host] = []
        self._nursery: socket.socket | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._log = get_logger("taskadapter.hosts")

    async def start(self) -> None:
        """Start the nursery, and wait until it has imported Prefect; hosts come with the first runs.

        Raises:
            EOFError: it ended instead.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "taskadapter.host",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                # Ctrl-C in the agent's terminal is for the agent, which ends its hosts in order.
                start_new_session=True,
            )
        if not await asyncio.get_running_loop().sock_recv(ours, 1):
            raise EOFError("the process that forks hosts has ended at once; its output says why")
        self._nursery = ours
        self._watcher = asyncio.create_task(self._watch(ours))

    async def close(self) -> None:
        """End every host, busy or not, and the nursery."""
        for host in self._hosts.values():
            host.stop() if host in self._idle else host.end(signal.SIGKILL)
        if self._watcher is not None:
            self._watcher.cancel()
        if self._nursery is not None:
            self._nursery.close()
        if self._process is not None:
            await self._process.wait()

    async def _watch(self, nursery: socket.socket) -> None:
        """Take the exit notices of the nursery's hosts; start another nursery should it end."""
        loop = asyncio.get_running_loop()
        pending = b""
        while data := await loop.sock_recv(nursery, BUFFER):
            *lines, pending = (pending + data).split(b"\n")
            for notice in map(json.loads, lines):
                if host := self._hosts.pop(notice["pid"], None):
                    host.exit_code.set_result(notice["exit_code"])
        self._log.error("The process that forks hosts has ended; starting another.")
        nursery.close()
        self._nursery = None
        while self._nursery is None:
            await asyncio.sleep(RESTART_SECONDS)
            with contextlib.suppress(OSError, EOFError):
                await self.start()

    async def take(self, workspace: str) -> Host:
        """Return a host for the workspace, idle until now; the caller keeps to the limit.

        Raises:
            OSError: no process can be started.
            EOFError: a new process ended at once.
        """
        self._idle = [host for host in self._idle if not host.exit_code.done()]
        warm = [host for host in self._idle if host.workspace == workspace]
        if warm:
            self._idle.remove(warm[-1])
            return warm[-1]
        if len(self._hosts) >= self.limit and self._idle:
            self.discard(self._idle.pop(0))
        return await self._fork()

    async def _fork(self) -> Host:
        if self._nursery is None:
            raise OSError("the nursery of hosts is not running")
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._nursery, [b"+"], [theirs.fileno()])
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        line = await reader.readline()
        if not line:
            raise EOFError("a new host ended at once")
        host = Host(reader, writer, json.loads(line)["pid"])
        self._hosts[host.pid] = host
        return host

    def give_back(self, host: Host) -> None:
        """Keep the host for its workspace's next run, or end it if it has had its share."""
        if host.runs >= self._runs_per_host:
            self.discard(host)
            return
        host.idle_since = time.monotonic()
        self._idle.append(host)

    def discard(self, host: Host) -> None:
        """End a host that is not to be used again."""
        host.stop()

    def retire_idle(self) -> None:
        """End the hosts that the load no longer asks for; one stays warm."""
        cutoff = time.monotonic() - IDLE_SECONDS
        for host in [host for host in self._idle[:-1] if host.idle_since < cutoff]:
            self._idle.remove(host)
            self.discard(host)

    async def how_it_ended(self, host: Host) -> str:
        """Say with what status a host ended whose socket has closed."""
        try:
            async with asyncio.timeout(EXIT_NOTICE_SECONDS):
                code = await asyncio.shield(host.exit_code)
        except TimeoutError:
            return f"process {host.pid} is gone"
        if code < 0:
            return f"process {host.pid} was ended by {signal.Signals(-code).name}"
        return f"process {host.pid} exited with status {code}"
