"""A way to a database that can be blocked, or cut."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from queue import SimpleQueue


class Proxy:
    """Forwards TCP to a server. `freeze` it, and what is sent is neither answered nor refused.

    `cut` it, and connections break and are refused. `thaw` ends both. `delay` is how many seconds all takes
    each way, and `asked` counts what clients have sent.
    """

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.connections = 0
        self.asked = 0
        self.delay = 0.0
        self._open = threading.Event()
        self._open.set()
        self._is_cut = False
        self._ended = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._start(self._accept)

    def freeze(self) -> None:
        self._open.clear()

    def cut(self) -> None:
        self._is_cut = True
        self._hang_up()

    def thaw(self) -> None:
        self._is_cut = False
        self._open.set()

    def close(self) -> None:
        self._ended = True
        self._open.set()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._hang_up()
        for thread in self._threads:
            thread.join(timeout=5)
        for end in self._sockets:
            end.close()

    def _hang_up(self) -> None:
        for end in list(self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            if self._is_cut:
                client.close()
                continue
            self.connections += 1
            server = self._connect()
            if server is None:
                client.close()
                continue
            self._sockets += [client, server]
            self._start(self._pump, client, server)
            self._start(self._pump, server, client)

    def _connect(self) -> socket.socket | None:
        """Return a connection to the server; None where there is none to be had."""
        return socket.create_connection(self.target)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        under_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        self._start(self._deliver, under_way, sink)
        with suppress(OSError):
            while data := source.recv(65536):
                self.asked += sink.getpeername() == self.target
                under_way.put((time.monotonic() + self.delay, data))
        under_way.put((0.0, b""))

    def _deliver(self, under_way: SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        with suppress(OSError):
            while (item := under_way.get())[1]:
                time.sleep(max(0.0, item[0] - time.monotonic()))
                self._open.wait()
                sink.sendall(item[1])
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class Balancer(Proxy):
    """Gives each new connection to the next of several servers of this machine, past those that refuse it.

    Args:
        ports: those of the servers; they may be named later.
    """

    def __init__(self, *ports: int) -> None:
        self.ports = list(ports)
        super().__init__("127.0.0.1", 0)

    def _connect(self) -> socket.socket | None:
        for port in list(self.ports):
            self.ports.remove(port)
            self.ports.append(port)
            with suppress(OSError):
                return socket.create_connection((self.target[0], port))
        return None
