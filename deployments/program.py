"""A command in the background: started, awaited, stopped, killed, paused, started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

HOST = "127.0.0.1"
READY_WITHIN = 120.0  # seconds: imports and migrations on a busy machine with a cold disk
STOP_WITHIN = 30.0


def free_port() -> int:
    """Return a TCP port of the loopback interface on which nobody listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline: float, what: str) -> T:
    """Poll until `condition()` is truthy and return its value; what it raises is not caught.

    Args:
        condition: Called at once, then after pauses, and once more at the deadline. A pause is a tenth of
            the time waited so far, from a twentieth to two fifths of a second: many a call is a request.
        deadline: Seconds from now.
        what: The awaited thing, for the message.

    Raises:
        TimeoutError: It did not become true in time; the message names `what`.
    """
    begun = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begun
        if waited >= deadline:
            raise TimeoutError(f"waited {deadline:g} s for {what}")
        time.sleep(min(max(0.05, waited / 10), 0.4))
    return value


def environment(*overlays: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without its Prefect settings, with `overlays` on top."""
    merged = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    for overlay in overlays:
        merged |= overlay
    return merged


class Program:
    """A command that runs in a session of its own and writes to a log file.

    Its signals reach the command and all its descendants, and nothing else.

    Args:
        name: What messages call it.
        command: The program and its arguments.
        log: The file its output is appended to.
        ready: Tells whether it does its work yet; by default it does once it is started.
        stop_signal: The signal that asks it to end in order.
        options: Further arguments of `subprocess.Popen`, such as `env`, `cwd` and `user`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        ready: Callable[[], bool] = lambda: True,
        stop_signal: signal.Signals = signal.SIGTERM,
        **options: Any,
    ) -> None:
        self.name = name
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._ready = ready
        self._stop_signal = stop_signal
        self._options = options

    @property
    def pid(self) -> int:
        """The process id of the command itself.

        Raises:
            RuntimeError: It is not running; the message has the end of its log.
        """
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"{self.name} is not running:\n{self.output()[-3000:]}")
        return self.process.pid

    def start(self) -> None:
        """Start the command, for the first time or again, and wait until it is ready.

        Raises:
            RuntimeError: It ended before that; the message has the end of its log.
            TimeoutError: It is not ready after `READY_WITHIN` seconds.
        """
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, **self._options
            )
        try:
            wait_until(self._is_up, READY_WITHIN, f"{self.name} to be ready")
        except BaseException:
            self.kill()
            raise

    def stop(self, within: float = STOP_WITHIN) -> None:
        """Ask the command to end, wait, and kill what is left of it after `within` seconds.

        It is killed, too, when whoever waits for it is to end: Ctrl-C is no reason to leave it running.
        """
        try:
            if self.process is not None and self.process.poll() is None:
                self.resume()  # a paused one could not answer
                self.process.send_signal(self._stop_signal)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(within)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the command and its descendants at once, as a power failure would."""
        if self.process is not None:
            descendants = self._signal(self.process.pid, signal.SIGKILL)
            self.process.wait(STOP_WITHIN)
            psutil.wait_procs(descendants, STOP_WITHIN)
            self.process = None

    def pause(self) -> None:
        """Freeze the command and its descendants until `resume`."""
        self._signal(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused program go on."""
        self._signal(self.pid, signal.SIGCONT)

    def output(self) -> str:
        """Return what it has written so far, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _is_up(self) -> bool:
        assert self.process is not None
        if (code := self.process.poll()) is not None:
            raise RuntimeError(f"{self.name} ended with {code}:\n{self.output()[-3000:]}")
        return self._ready()

    def _signal(self, pid: int, number: signal.Signals) -> list[psutil.Process]:
        """Send a signal to the whole program and return the descendants it went to."""
        descendants: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
        for process in descendants:  # PostgreSQL's backends, for one, are not in its group
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return descendants


P = TypeVar("P", bound=Program)


@contextmanager
def running(program: P) -> Iterator[P]:
    """Start a program, and stop it at the end of the block."""
    program.start()
    try:
        yield program
    finally:
        program.stop()
