"""Runs Python programs to their end, each forked from a process that has imported Prefect and us already.

That import is a second of CPU, and a hundred commands are run. A program has its own folder, environment,
arguments and streams, and ends as every program does. A test of how one starts has `subprocess` start it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LOOK_SECONDS = 0.02
"""How often it is seen whether a program has ended."""

_one_at_a_time = Lock()


def run(
    *command: str | Path, cwd: Path, env: Mapping[str, str], within: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python program, as `subprocess.run` does, and return what it has printed.

    Args:
        command: a script of Python's, as `prefect` and `taskadapter` are; or `python`, and a script or -c.
        cwd: its folder.
        env: its environment.
        within: how many seconds it may take; None for as many as it wants.

    Raises:
        TimeoutExpired: it has taken longer, and was killed.
    """
    words = [str(word) for word in command]
    order = json.dumps({"words": words, "cwd": str(cwd), "env": dict(env)})
    with _one_at_a_time:
        address = _address()
    with (
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
        # Closed, whatever happens here, it ends the program.
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(address)
        socket.send_fds(connection, [b"!"], [output.fileno(), errors.fileno()])
        connection.sendall(f"{order}\n".encode())
        connection.settimeout(within)
        try:
            answer = connection.recv(16)
        except TimeoutError:
            raise subprocess.TimeoutExpired(words, within or 0.0) from None
        assert answer, f"nobody knows what became of {words}"
        return subprocess.CompletedProcess(words, int(answer), _text(output), _text(errors))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


@cache
def _address() -> str:
    """Return where the process listens from which programs are forked; the first one has it started."""
    folder = tempfile.mkdtemp(prefix="taskadapter-warm-")
    ready, theirs = os.pipe()
    words = [sys.executable, __file__, f"{folder}/socket", str(theirs), str(os.getpid())]
    server = subprocess.Popen(words, cwd="/", pass_fds=[theirs], start_new_session=True)
    os.close(theirs)

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    with os.fdopen(ready) as answer:
        assert answer.read(), "the process has ended from which programs are to be forked"
    return f"{folder}/socket"


# --- in that process, and in its forks ------------------------------------------------------------


def _serve(address: str, ready: int, tests: int) -> socket.socket:
    """Fork for each connection until the tests are over; returns in the fork."""
    import prefect.flow_engine  # noqa: F401

    import taskadapter  # noqa: F401

    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(1)
        os.write(ready, b"!")
        os.close(ready)
        while os.getppid() == tests:
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                if os.fork() == 0:
                    return connection
                connection.close()
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
    sys.exit()


def _take_order(connection: socket.socket) -> list[str]:
    """Become the program that is asked for, but for its code; returns its words, in a further fork."""
    with connection:
        connection.settimeout(None)
        _, streams, _, _ = socket.recv_fds(connection, 1, 2)
        with connection.makefile() as file:
            order = json.loads(file.readline())
        if pid := os.fork():
            _attend(pid, connection)
    with Path(os.devnull).open() as nothing:
        for number, stream in enumerate([nothing.fileno(), *streams]):
            os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    words: list[str] = order["words"]
    return words


def _attend(pid: int, connection: socket.socket) -> None:
    """Tell how a program has ended, and end with it; it is killed when nobody waits for it any more."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with suppress(OSError):
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([connection], [], [], LOOK_SECONDS)[0]:  # they have said all: this is its end
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(0)


def _begin(words: list[str]) -> None:
    """Run the program's code as its main module."""
    main = ModuleType("__main__")
    if Path(words[0]).name.startswith("python"):
        words = words[1:]
    if words[0] == "-c":
        source, name, folder, words = words[1], "<string>", "", ["-c", *words[2:]]
    else:
        name = main.__file__ = words[0]
        source, folder = Path(name).read_text(), str(Path(name).resolve().parent)
    sys.path[0] = folder
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = words
    sys.modules["__main__"] = main
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)


if __name__ == "__main__":
    _begin(_take_order(_serve(sys.argv[1], *map(int, sys.argv[2:]))))
