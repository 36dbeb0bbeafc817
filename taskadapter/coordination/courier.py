"""Makes the calls that a lease asks for: one thread, one connection, one call at a time."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, assert_never

from taskadapter.coordination.board import clock
from taskadapter.coordination.dialects import Interrupter, hear, listen
from taskadapter.coordination.engines import Timeouts, exclusive, identity_of, open_engine
from taskadapter.coordination.faults import translated, where
from taskadapter.coordination.messages import (
    Acquire,
    Answered,
    Done,
    Failed,
    Hint,
    Pulse,
    Register,
    Release,
    Unregister,
)
from taskadapter.coordination.nodes import register, unregister
from taskadapter.coordination.schema import create_missing, missing_tables
from taskadapter.coordination.tokens import acquire, pulse, release
from taskadapter.errors import AccessDeniedError, DuplicateNodeError, SchemaError, TaskError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from taskadapter.coordination.engines import Database
    from taskadapter.coordination.messages import Answer, Call, Event
    from taskadapter.coordination.nodes import Node
    from taskadapter.coordination.timing import Timing

__all__ = ["Courier"]

_log = logging.getLogger("taskadapter.coordination")


class Courier:
    """Carries a node's calls to the database, and reports what comes back.

    The connection is made for the first call, and kept until a call fails. On PostgreSQL it also
    listens: what others notify is reported as a `Hint`.

    Attributes:
        lacks_tables: Whether the last call that has failed did so for want of tables.

    Raises:
        CoordinationError: the database is of a kind that nodes cannot coordinate through.
    """

    def __init__(
        self, database: Database, me: Node, timing: Timing, report: Callable[[Event], None]
    ) -> None:
        timeouts = Timeouts(
            connect=timing.beat_timeout,
            statement=timing.beat_timeout,
            idle=timing.liveness_check_interval,
        )
        engine = open_engine(database, timeouts=timeouts, pre_ping=False)
        # A transaction of a client that freezes keeps its locks: a single statement does not.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._me, self._interval, self._report = me, timing.liveness_check_interval, report
        self._calls: deque[Call | None] = deque()
        self._bell, self._button = socket.socketpair()
        self._connection: Connection | None = None
        self._ears: int | None = None
        self._interrupter: Interrupter | None = None
        self._guard = threading.Lock()
        self._is_abandoned = False
        self._has_tables = False
        self.lacks_tables = False
        self._file: tuple[int, int] | None = None

    def take(self, call: Call) -> None:
        """Make a call; its outcome is reported."""
        self._calls.append(call)
        self._button.send(b"\0")

    def abandon(self) -> None:
        """Break off the call that is under way, so that it fails soon."""
        with self._guard:
            self._is_abandoned = True
            if self._interrupter is not None:
                self._interrupter()

    def end(self) -> None:
        """Make no more calls after those taken, and hang up."""
        self._calls.append(None)
        with suppress(OSError):  # it may have seen that already, and be gone
            self._button.send(b"\0")
        self._button.close()

    def run(self) -> None:
        """Make calls until `end`. Raises nothing: what goes wrong is reported."""
        while (call := self._next()) is not None:
            self._report(self._make(call))
            self._listen_in()
        self._hang_up()
        self._engine.dispose()
        self._bell.close()

    def _next(self) -> Call | None:
        while not self._calls:
            poll = select.poll()
            poll.register(self._bell, select.POLLIN)
            if self._ears is not None:
                poll.register(self._ears, select.POLLIN)
            if any(file == self._ears for file, _ in poll.poll()):
                self._listen_in()
            elif not self._calls:
                self._bell.recv(4096)
        return self._calls.popleft()

    def _listen_in(self) -> None:
        if self._connection is None:
            return
        try:
            for group_id in hear(self._connection):
                self._report(Hint(group_id))
        except Exception as exc:  # noqa: BLE001  the driver's errors come unwrapped here
            _log.debug("the connection was lost while idle: %s", exc)
            self._hang_up()

    def _make(self, call: Call) -> Event:
        self._is_abandoned = False
        try:
            with translated(self._engine.url):
                return Answered(call, self._serve(self._connected(), call))
        except DuplicateNodeError as exc:
            return Failed(call, str(exc), exc.age)
        except Exception as exc:  # noqa: BLE001  whatever it is, the node must go on
            self._hang_up()
            self.lacks_tables = isinstance(exc, SchemaError)
            return Failed(call, self._why(exc, call))

    def _why(self, fault: Exception, call: Call) -> str:
        if self._is_abandoned:
            seconds = clock() - call.sent_at
            database = where(self._engine.url)
            return f"{database} has not answered for {seconds:.1f} s; is it overloaded, or cut off?"
        if isinstance(fault, TaskError):
            return str(fault)
        _log.debug("unexpected error", exc_info=fault)
        return f"{type(fault).__name__}: {fault}"

    def _serve(self, connection: Connection, call: Call) -> Answer:
        self._ensure_tables(connection)
        match call:
            case Pulse(tokens=tokens, group_ids=group_ids):
                return pulse(connection, self._me, tokens, group_ids, self._interval)
            case Acquire(group_ids=wanted):
                with exclusive(connection):
                    return acquire(connection, self._me, wanted, self._interval)
            case Register(group_ids=group_ids):
                with exclusive(connection):
                    register(connection, self._me, group_ids, self._interval)
            case Release(tokens=tokens):
                with exclusive(connection):
                    release(connection, tokens)
            case Unregister():
                with exclusive(connection):
                    unregister(connection, self._me)
            case _:
                assert_never(call)
        return Done()

    def _ensure_tables(self, connection: Connection) -> None:
        if self._has_tables:
            return
        missing = missing_tables(connection)
        try:
            with translated(self._engine.url):
                create_missing(connection)
        except AccessDeniedError as exc:
            raise SchemaError(
                f"{', '.join(missing)}: missing, and this user may not create tables; run "
                "`taskadapter db init` as one who may, or give a DBA the output of "
                "`taskadapter db sql`"
            ) from exc
        self._has_tables = True

    def _connected(self) -> Connection:
        if identity_of(self._engine.url) != self._file:
            self._hang_up()  # what was written to a file that is gone nobody else sees
        if self._connection is None:
            self._connection = self._engine.connect()
            with self._guard:
                self._interrupter = Interrupter(self._connection)
            self._ears = listen(self._connection)
            self._file = identity_of(self._engine.url)
        return self._connection

    def _hang_up(self) -> None:
        with self._guard:
            if self._interrupter is not None:
                self._interrupter.close()
                self._interrupter = None
        self._ears = None
        # They may have been dropped.
        self._has_tables = False
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None
