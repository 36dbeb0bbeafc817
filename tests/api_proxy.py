"""Stands before Prefect's API: counts the requests, passes them on, and fails those that a test picks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from deployments.local import free_port
from deployments.program import HOST

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter
    from collections.abc import Iterator


class Request(NamedTuple):
    """One request as it arrived; the handshake of a websocket is one, its messages are none."""

    at: float  # seconds since the epoch
    method: str
    path: str
    body: bytes = b""


Fault = Callable[["Request"], "bytes | None"]
"""Returns what a request is answered instead; None for one that is passed on."""


def refusal(status: int, body: bytes = b"{}") -> bytes:
    """Return a whole answer."""
    head = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


class ApiProxy:
    """A reverse proxy for HTTP/1.1 on the loopback interface.

    It reads the head of each request and copies all else unseen, so that websockets pass, and so
    that it costs the client next to nothing. It understands bodies with a Content-Length, which is
    what Prefect's client sends.

    Args:
        upstream: The port of the server.

    Attributes:
        fault: Fails requests; may be changed at any time.
        is_silent: Whether requests have no answer for the time being.
    """

    def __init__(self, upstream: int) -> None:
        self.fault: Fault | None = None
        self.is_silent = False
        self.port = free_port()
        self.api_url = f"http://{HOST}:{self.port}/api"
        self.requests: list[Request] = []
        self._upstream = upstream
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[ApiProxy]:
        """Serve in a thread for the duration of the block."""
        listening = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._listen(listening)))
        thread.start()
        listening.wait()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    async def _listen(self, listening: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._serve, HOST, self.port)
        listening.set()
        await self._stop.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, client: StreamReader, answer: StreamWriter) -> None:
        """Handle one connection until the client ends it."""
        try:
            server, forward = await asyncio.open_connection(HOST, self._upstream)
        except OSError:
            answer.close()
            return
        # The loop forgets who waits for what nobody else remembers.
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        answers = asyncio.create_task(_copy(server, answer))
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._pass_on(client, forward, answer):
                    pass
                await _copy(client, forward)
        finally:
            answers.cancel()
            forward.close()
            answer.close()
            self._connections.discard(connection)

    async def _pass_on(self, client: StreamReader, forward: StreamWriter, answer: StreamWriter) -> bool:
        """Forward one request, or fail it, and count it; return whether another may follow it."""
        head = await client.readuntil(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields if field)
        method, path, _ = line.split(" ")
        body = await client.readexactly(int(headers.get("content-length", "0")))
        request = Request(time.time(), method, path.partition("?")[0], body)
        self.requests.append(request._replace(body=b""))
        while self.is_silent:  # noqa: ASYNC110 - it is changed in another thread
            await asyncio.sleep(0.05)
        if self.fault is not None and (instead := self.fault(request)) is not None:
            answer.write(instead)
            await answer.drain()
            return True
        forward.write(head + body)
        await forward.drain()
        return "upgrade" not in headers


async def _copy(source: StreamReader, target: StreamWriter) -> None:
    """Copy until the source ends, then end the target."""
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()
