"""Whether a node's processes are all taken for long: runs that hang keep all other jobs waiting."""

from __future__ import annotations

from collections import Counter
from logging import Logger, LoggerAdapter
from typing import Any

from taskadapter.agent.hand import Hand
from taskadapter.agent.jobs import Deployments

FULL_SECONDS = 30.0
"""How long no place has been free when the log says so."""


class Crowding:
    """Says once that no place becomes free, by which jobs they are taken, and when that is over.

    Args:
        log: where it is said.
        deployments: what the jobs are called.
        hand: the runs that have the places.
    """

    def __init__(self, log: Logger | LoggerAdapter[Any], deployments: Deployments, hand: Hand) -> None:
        self._log = log
        self._deployments = deployments
        self._hand = hand
        # Since when no place is free while something is due, and whether that has been said.
        self._since: float | None = None
        self._is_said = False

    def note(self, clock: float, room: int, *, is_due: bool) -> None:
        """Take note of what there is.

        Args:
            clock: now, on the monotonic clock.
            room: how many places are free.
            is_due: whether something waits for one.
        """
        if is_due and room <= 0:
            self._since = clock if self._since is None else self._since
            if clock - self._since >= FULL_SECONDS and not self._is_said:
                self._is_said = True
                self._say_full(clock - self._since)
            return
        self._since = None
        # What takes the last free place is no sign that there will be more.
        if self._is_said and not is_due and room > 0:
            self._is_said = False
            self._log.info("Processes are free again.")

    def _say_full(self, seconds: float) -> None:
        names = Counter(map(self._deployments.name_of, self._hand.flow_runs))
        self._log.warning(
            "No process has become free for %.0f s, and what is due waits. What runs: %s.",
            seconds,
            ", ".join(f"{name} ({count})" for name, count in names.most_common()),
        )
