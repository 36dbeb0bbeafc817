"""A connection to PostgreSQL that gives up a server which stands still: its driver would wait for ever.

A process that is stopped, a disk that hangs, a route that swallows what is sent: nothing is refused then,
and no timeout of the server's ends a statement. Keepalives do not help: the server's kernel answers them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from psycopg import Connection, OperationalError

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["NoAnswerError", "PatientConnection"]


class NoAnswerError(OperationalError):
    """A server has not answered in time; what it was asked may happen yet, a COMMIT too."""


class PatientConnection(Connection[Any]):
    """A connection on which no answer is waited for longer than so many seconds; then it is closed.

    Attributes:
        patience: how many; endless until it is set.
    """

    patience: float = float("inf")

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for an answer: all that the driver asks comes through here.

        Raises:
            NoAnswerError: there was none in time, and the connection is closed.
        """
        try:
            return super().wait(_limited(gen, self.patience), *args, **kwargs)
        except NoAnswerError:
            self.close()  # an answer that comes later would be taken for that of the next question
            raise


def _limited(exchange: Generator[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """Go on with an exchange as long as it does; the driver says every 0.1 s that nothing has come."""
    end, ready = time.monotonic() + seconds, None
    try:
        while True:
            ready = yield exchange.send(ready)
            if not ready and time.monotonic() >= end:
                raise NoAnswerError(f"no answer for {seconds:g} s")
    except StopIteration as answer:
        return answer.value
