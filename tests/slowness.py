"""How slow the machine is while a test goes on: its deadlines are longer by that, or it is repeated."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

NAP = 0.05
"""Seconds after which the watch is to wake up, and then again."""


class Slowness:
    """A watch beside what is measured: how much later than it asked for this machine wakes it up.

    On an idle machine that is a millisecond. Where others have the CPU it is as late as every node is, and
    where the machine has stood still for ten seconds that is what it has measured. Times are in seconds.
    """

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._due = time.monotonic() + NAP
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._due = time.monotonic() + NAP
            time.sleep(NAP)
            self._late.append((time.time(), time.monotonic() - self._due))

    def since(self, moment: float) -> float:
        """Return by how much it was late in all since a moment, in seconds since the epoch."""
        return sum(self._of(moment))

    def longest(self, since: float = 0.0, until: float = float("inf")) -> float:
        """Return for how long the machine stood still at most, between two moments."""
        return max(self._of(since, until), default=0.0)

    def _of(self, since: float, until: float = float("inf")) -> list[float]:
        # It may not have been woken up yet since the machine stood still.
        overdue = (time.time(), time.monotonic() - self._due)
        found = [*self._late, overdue]
        return [late for at, late in found if at > since and at - late < until and late > 0]
