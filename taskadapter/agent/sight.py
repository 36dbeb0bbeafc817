"""Whether a node sees in Prefect's API what is due. What keeps it from that is told once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import ObjectNotFound

from taskadapter.agent.node import LONGEST_BACKOFF_SECONDS, Node
from taskadapter.errors import CoordinationError
from taskadapter.prefect_api.client import API_FAULTS, backoff
from taskadapter.prefect_api.faults import named

SILENT_SECONDS = 15.0
"""A look that has had no answer for so long is worth a line: Prefect's client waits for a minute."""

DOUBT_SECONDS = 10.0
"""How long another call may have no answer then, before the API is taken for away."""


class Sight:
    """What a node's looks come to.

    Args:
        node: the node.

    Attributes:
        fault: what the last look failed with, or has no answer for; None if neither is so.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._faults = 0
        self._is_silent = False
        # When the first of the looks began that have failed since; None after one that has not.
        self._blind_since: float | None = None
        self._failing_since: float | None = None
        self.fault: Exception | None = None

    @property
    def failing_for(self) -> float:
        """For how many seconds each look has failed, by the coordination database perhaps."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    @property
    def is_api_away(self) -> bool:
        """Whether the API is known not to answer."""
        return self._faults > 0 or self._is_silent

    @property
    def blind_for(self) -> float:
        """For how many seconds it cannot be seen from here what is due, as `fault` says; 0 if it can.

        That a look is slow, or that it is the coordination database that fails it, does not count.
        """
        return 0.0 if self._blind_since is None else time.monotonic() - self._blind_since

    @contextmanager
    def looking(self) -> Iterator[float]:
        """Watch a look for the duration of the block; yields when it began, on the monotonic clock."""
        asked = time.monotonic()
        silent = asyncio.get_running_loop().call_later(SILENT_SECONDS, self._be_silent, asked)
        try:
            yield asked
        finally:
            silent.cancel()

    def _be_silent(self, asked: float) -> None:
        """Say once that a look has had no answer, and let it go on: a slow server may still give one."""
        if self.is_api_away:
            return
        self._is_silent = True
        self._node.log.warning(
            "Looking for runs has had no answer for %g s, and waits: %s, or the "
            "coordination database, stands still or is slow.",
            SILENT_SECONDS,
            named(),
        )
        self._node.tasks.spawn(self._doubt(asked))

    async def _doubt(self, asked: float) -> None:
        """Take the API for away that does not answer another call either, during a look of some moment."""
        seconds = SILENT_SECONDS + DOUBT_SECONDS
        fault: Exception = httpx.TransportError(f"no call has had an answer for {seconds:g} s")
        try:
            async with asyncio.timeout(DOUBT_SECONDS):
                await self._node.client.read_work_pool(self._node.work_pool)
        except TimeoutError:
            pass
        except API_FAULTS as exc:
            fault = exc
        except ObjectNotFound:
            return
        else:
            return
        if self._is_silent and self._blind_since is None:
            self.fault, self._blind_since = fault, asked

    def fail(self, fault: Exception, words: str, asked: float) -> float:
        """Say once why a look has failed, and return in how many seconds to make the next one.

        Args:
            fault: what it has failed with.
            words: the same in words.
            asked: when it began.
        """
        if not self._faults:
            self._node.log.warning("Looking for runs failed, trying again: %s", words)
            self._failing_since = asked
        self._faults, self.fault = self._faults + 1, fault
        if isinstance(fault, CoordinationError):
            self._blind_since = None  # the API has answered before
        elif self._blind_since is None:
            self._blind_since = asked
        return backoff(self._faults, LONGEST_BACKOFF_SECONDS)

    def succeed(self, asked: float) -> bool:
        """Say that it is over that looks had no answer, and return whether that was so.

        Args:
            asked: when the look began that has one.
        """
        was_away = self.is_api_away
        if self._faults:
            self._node.log.info("Looking for runs succeeds again, after %d failures.", self._faults)
        elif self._is_silent:
            seconds = time.monotonic() - asked
            self._node.log.info("Looking for runs has an answer, after %.0f s.", seconds)
        self._faults, self._is_silent, self.fault = 0, False, None
        self._blind_since = self._failing_since = None
        return was_away
