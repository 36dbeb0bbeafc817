"""When an agent looks at Prefect's API: for runs, and for what has changed of its pool's jobs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.settings import get_current_settings

from taskadapter.agent.hearing import Kind, News

if TYPE_CHECKING:
    from collections.abc import Callable

    from taskadapter.settings import TaskadapterSettings

AFTER_NEWS_SECONDS = (0.0, 1.0)
"""How long after some news the agent looks: the API may tell of a change before it shows it."""

PLANNED_SECONDS = 8.0
"""How long after news of a deployment the agent looks once more: Prefect's scheduler, which tells nobody,
plans the runs of what was changed each 5 s. The ticks of our own jobs need no plan."""

SHORTEST_PAUSE_SECONDS = 0.5
"""How long there is between two looks at least, unless something is due at once."""

LISTENING_SECONDS = 30.0
"""How often the agent looks for runs that hears of what it cannot know ahead: it looks as far ahead."""

BUSY_POLLS = 3
"""At work, an agent that does not hear looks for runs at each third time only: it sees them well ahead."""

PLENTY_SECONDS = 2.0
LISTENING_PLENTY_SECONDS = 10.0
"""How long there is between two looks at least, while there is more to do than there is room for: where
the agent does not know of what is to be done besides, and where it does."""

LISTENING_VISIT_SECONDS = 60.0
VISIT_SECONDS = 8.0
IDLE_VISIT_SECONDS = 2.0
"""How often the agent looks at the queues, which are groups, and deployments of its pool: while it hears
what changes; else at work, and idle."""


@dataclass(frozen=True)
class Pace:
    """How many seconds there are between two looks, or two visits, where nothing wants one earlier.

    Attributes:
        idle: between two looks of an agent that does not hear Prefect's event stream, and is idle.
        busy: the same of one that has something to run.
    """

    idle: float
    busy: float

    @classmethod
    def of(cls, settings: TaskadapterSettings) -> Pace:
        """Return what the settings say, Prefect's own for all workers first, where somebody has set it."""
        worker = get_current_settings().worker
        if "query_seconds" in worker.model_fields_set:
            return cls(worker.query_seconds, worker.query_seconds)
        return cls(settings.poll_seconds, BUSY_POLLS * settings.poll_seconds)

    def of_looks(self, *, hears: bool, is_busy: bool) -> float:
        """Return the seconds between two looks: what is due until the next one is seen before."""
        if hears:
            return LISTENING_SECONDS
        return self.busy if is_busy else self.idle

    def at_plenty(self, *, knows_all: bool) -> float:
        """Return the seconds between two looks at least, while there is more to do than room for it.

        Args:
            knows_all: whether the agent knows of all that is to be done besides.
        """
        return LISTENING_PLENTY_SECONDS if knows_all else PLENTY_SECONDS

    def of_visits(self, *, hears: bool, is_busy: bool) -> float:
        """Return the seconds between two visits."""
        if hears:
            return LISTENING_VISIT_SECONDS
        return VISIT_SECONDS if is_busy else IDLE_VISIT_SECONDS


class Looks:
    """Remembers when looks are wanted. A visit is a look at all queues and deployments of the pool.

    Args:
        clock: monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = self._visited_at = float("-inf")
        # When what the last look found is not enough any more.
        self._needed = float("inf")
        # When what has changed last is planned.
        self._planned = float("inf")
        self._wanted: list[float] = []
        self._visits: list[float] = []
        self._changed: dict[UUID, float] = {}

    def want(self, seconds: float = 0.0) -> None:
        """Have a look made in so many seconds."""
        self._wanted.append(self._clock() + seconds)

    def want_visit(self, seconds: float = 0.0) -> None:
        """Have a visit made in so many seconds."""
        self._visits.append(self._clock() + seconds)
        self.want(seconds)

    def hear(self, news: News | None) -> None:
        """Have looked for what some news is about; None is that some may have been missed."""
        soon = max(0.0, self._looked_at + SHORTEST_PAUSE_SECONDS - self._clock())
        for seconds in AFTER_NEWS_SECONDS:
            if news is None or news.kind is Kind.POOL:
                self.want_visit(soon + seconds)
            else:
                self.want(soon + seconds)
            if news is not None and news.kind is Kind.DEPLOYMENT and news.about is not None:
                self._changed[news.about] = self._clock() + soon + seconds
                self._planned = self._clock() + PLANNED_SECONDS

    def is_due(self, pause: float) -> bool:
        """Return whether it is time for a look, which else are so many seconds apart."""
        return self._is_due(self._looked_at, [*self._wanted, self._needed, self._planned], pause)

    def is_visit_due(self, pause: float) -> bool:
        """Return whether it is time for a visit, which else are so many seconds apart."""
        return self._is_due(self._visited_at, self._visits, pause)

    def _is_due(self, last: float, wanted: list[float], pause: float) -> bool:
        return self._clock() >= min([last + pause, *wanted])

    @property
    def changed(self) -> set[UUID]:
        """The deployments of which there is news."""
        return set(self._changed)

    def looked(self, at: float, enough_for: float = float("inf")) -> None:
        """Take note of a look that began at some moment, and has succeeded.

        Args:
            at: that moment, on the monotonic clock.
            enough_for: for how many seconds from now what it found is enough.
        """
        self._looked_at, self._needed = at, self._clock() + enough_for
        self._wanted = [moment for moment in self._wanted if moment > at]
        self._planned = self._planned if self._planned > at else float("inf")
        self._changed = {id_: until for id_, until in self._changed.items() if until > at}

    def visited(self, at: float) -> None:
        """Take note of a visit that began at some moment, and has succeeded."""
        self._visited_at = at
        self._visits = [moment for moment in self._visits if moment > at]
