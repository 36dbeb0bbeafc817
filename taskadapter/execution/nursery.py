"""The nursery: it has imported what runs need, runs nothing, has no threads, and forks a process a run.

``python -m taskadapter.execution.nursery FD MODULE...`` imports the modules that the agent's `PRELOAD`
names, and says over the socket ``FD`` that it is ready, or why not. With each request the agent sends one
end of a new socket pair: that is what the process of a run speaks through (`execution.host`).

The nursery also sees to it that nothing outlives a run. A process leads a session of its own, and what it
starts belongs to its group; on Linux what has left that group falls to the nursery when the process
ends, as nobody else's child. All of it is ended, and the agent is told with the exit status.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from taskadapter.coordination import store
from taskadapter.execution import protocol, rehearsal
from taskadapter.execution.host import Host, connected
from taskadapter.prefect_api import private

BUFFER = 65536

LATE_IMPORTS = (
    "anyio._backends._asyncio",
    "anyio.streams.stapled",
    "anyio.streams.tls",
    "encodings.idna",
    "psycopg",
    "psycopg.types.numpy",
    "pydantic.v1",
    "pymysql",
    "rich._emoji_codes",
    "sqlalchemy.dialects.mysql",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "taskadapter.coordination.progress",
)
"""What a run needs and nothing above imports: found by comparing `sys.modules` before and after one."""

ASK_SECONDS = 5.0
"""How long the server may take to answer the nursery's one question."""

END_SECONDS = 2.0
"""How long the nursery waits, when its agent is gone, for what it has ended."""

COMMAND_LENGTH = 80
"""As much of a command is told."""

NOT_OURS = (ProcessLookupError, PermissionError)
"""What ending a process raises that is gone, or has become another user's."""

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36
_PROC = Path("/proc")


def main(agent: socket.socket, preload: list[str]) -> None:
    """Fork a process for each socket that the agent sends, until it closes its own."""
    # A signal to the whole service is for the agent, which ends its runs in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if (refusal := _preload(preload)) is not None:
        agent.sendall(protocol.Refused(reason=refusal).line())
        return
    private.share_tls_context()
    warm = None
    if PREFECT_API_URL.value() is not None:
        warm = contextlib.ExitStack()
        warm.enter_context(connected(csrf=_server_has_csrf()))
        with contextlib.suppress(Exception):  # then each run does for itself what it would have spared
            rehearsal.rehearse_run()
    # What is alive now stays shared with the processes: their collectors need not touch it.
    gc.collect()
    gc.freeze()
    _prctl(_SET_CHILD_SUBREAPER, 1)
    agent.sendall(protocol.Serving().line())
    Nursery(agent, warm).serve()


def _server_has_csrf() -> bool:
    """Ask the server once for all runs whether it protects itself so; each client would ask again.

    Prefect's own clients do not ask again either, once they have been told that it does not.
    """
    try:
        once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
        with once, get_client({"timeout": ASK_SECONDS}, sync_client=True) as client:
            client.request("GET", "/csrf-token", params={"client": "taskadapter"})
    except httpx.HTTPStatusError as answer:
        return answer.response.status_code not in {httpx.codes.NOT_FOUND, httpx.codes.UNPROCESSABLE_ENTITY}
    except Exception:  # noqa: BLE001 - then each run asks
        return True
    return True


def _preload(modules: list[str]) -> str | None:
    """Import what runs need, and the modules of the user's choice; return why that cannot be."""
    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):  # a driver that is not installed, for example
            importlib.import_module(name)
    before = threading.enumerate()
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as exc:  # noqa: BLE001 - a module may raise anything
            return f"PRELOAD names {name!r}, whose import fails: {type(exc).__name__}: {exc}"
        others = [thread.name for thread in threading.enumerate() if thread not in before]
        if others:
            return (
                f"PRELOAD names {name!r}, which starts threads when it is imported "
                f"({', '.join(others)}); a forked process would not have them. Remove it from PRELOAD."
            )
    return None


class Nursery:
    """Forks the processes of runs, and ends what they leave.

    Args:
        agent: the socket to the agent.
        warm: what has opened `connected`, for each process to have a copy; None if nobody has.
    """

    def __init__(self, agent: socket.socket, warm: contextlib.ExitStack | None) -> None:
        self._agent = agent
        self._warm = warm
        self._runs: dict[int, int] = {}  # of each process the number of its request
        # What the agent has sent and this has not yet done: the rest of a line, and sockets.
        self._heard = b""
        self._descriptors: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._on_signal = socket.socketpair()

    def serve(self) -> None:
        """Work until the agent closes its socket, or is gone; then end everything."""
        self._on_signal.setblocking(False)
        signal.set_wakeup_fd(self._on_signal.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._agent, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        try:
            while True:
                ready = {key.fileobj for key, _ in self._selector.select()}
                if self._wakeup in ready:
                    self._wakeup.recv(BUFFER)
                    self._reap()
                if self._agent in ready:
                    data, descriptors, _, _ = socket.recv_fds(self._agent, BUFFER, maxfds=16)
                    if not data:
                        return
                    self._descriptors += descriptors
                    self._heard += data
                    self._heed()
        except ConnectionError:
            return
        finally:
            self._end_all()

    def _heed(self) -> None:
        """Do what the agent has asked for."""
        *lines, self._heard = self._heard.split(b"\n")
        for request in map(protocol.request, lines):
            match request:
                case protocol.Fork(number=number):
                    self._fork(self._descriptors.pop(0), number)
                case protocol.Connect(database_url=url):
                    with contextlib.suppress(Exception):  # then each run learns it for itself
                        store.rehearse(url.get_secret_value())

    def _fork(self, descriptor: int, number: int) -> None:
        """Make a process; where the system has none to give, the agent is told, and the others go on."""
        nursery = os.getpid()
        with socket.socket(fileno=descriptor) as link:
            try:
                pid = os.fork()
            except OSError as fault:
                with contextlib.suppress(OSError):
                    link.sendall(protocol.Unforked(fault=str(fault)).line())
                return
            if pid == 0:
                self._become_a_run(nursery, link)
            self._runs[pid] = number

    def _become_a_run(self, nursery: int, agent: socket.socket) -> NoReturn:
        """Be the process of a run: whatever happens in it, it goes on with nothing of the nursery's."""
        try:
            self._leave_to(nursery, agent)
        except BaseException:  # noqa: BLE001 - its end would be the nursery's, which ends all runs
            traceback.print_exc()
        finally:
            os._exit(1)

    def _leave_to(self, nursery: int, agent: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for ours in (self._agent, self._wakeup, self._on_signal):
            ours.close()
        # A group of its own: it can be ended with everything that the job has started.
        os.setsid()
        _prctl(_SET_CHILD_SUBREAPER, 1)
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == nursery:
            make_random_anew()
            Host(agent, self._warm).serve()

    def _reap(self) -> None:
        """Take note of every process that has ended, and end what it has left."""
        for pid, exit_code in _ended():
            if (number := self._runs.pop(pid, None)) is not None:
                left = _end_group(pid) + self._end_orphans()
                self._agent.sendall(protocol.Gone(number=number, exit_code=exit_code, left=left).line())
        self._end_orphans()

    def _end_orphans(self) -> list[str]:
        """End the children that are no run's process: their runs are over. Return their commands."""
        orphans = _children() - self._runs.keys()
        commands = _commands(orphans)
        for pid in orphans:
            with contextlib.suppress(*NOT_OURS):
                os.kill(pid, signal.SIGKILL)
        return commands

    def _end_all(self) -> None:
        """End all runs and what they have started."""
        end = time.monotonic() + END_SECONDS
        for pid in self._runs:
            with contextlib.suppress(*NOT_OURS):
                os.killpg(pid, signal.SIGKILL)
        self._runs.clear()
        while _children() and time.monotonic() < end:
            self._end_orphans()
            list(_ended())
            time.sleep(0.01)


def make_random_anew() -> None:
    """Have numpy draw other numbers than each other process does; Python sees to its own generator."""
    if (generator := sys.modules.get("numpy.random")) is not None:
        generator.seed()


def _ended() -> Iterator[tuple[int, int]]:
    """Yield each child that has ended, and its exit status."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _end_group(group: int) -> list[str]:
    """End what is left of a process group, and return its commands."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return []
    except PermissionError:
        pass
    commands = _commands(_members(group))
    with contextlib.suppress(*NOT_OURS):
        os.killpg(group, signal.SIGKILL)
    return commands


def _members(group: int) -> list[int]:
    """Return the processes of a group; none where the system has no way to list them."""
    found = []
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # The name in parentheses may have spaces; state, parent and group follow it.
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            if int(fields.split()[2]) == group:
                found.append(int(folder.name))
    return found


def _children() -> set[int]:
    """Return the children of this process; none where the system has no way to list them."""
    try:
        return {int(pid) for pid in (_PROC / f"self/task/{os.getpid()}/children").read_text().split()}
    except OSError:
        return set()


def _commands(pids: Iterable[int]) -> list[str]:
    """Return the command lines of processes, without those that have ended."""
    return [command for command in map(_command, pids) if command]


def _command(pid: int) -> str:
    """Return the command line of a process, shortened; empty if it has ended."""
    try:
        words = (_PROC / f"{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        return ""
    return words.decode(errors="replace")[:COMMAND_LENGTH]


def _prctl(option: int, value: int) -> None:
    """Set an attribute of this process, where the system has such."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
