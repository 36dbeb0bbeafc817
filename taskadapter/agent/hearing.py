"""Prefect's event stream, as an agent hears it: what makes a look at the API worth its while.

What is planned an agent has seen long before its time. Of what somebody does now it hears here: a run by
hand, a new or changed deployment, a job that is resumed, a run that is to be cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

from prefect.events import Event
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter

from taskadapter.agent.events import JOB_RESTARTED
from taskadapter.prefect_api.client import backoff, in_words

LONGEST_BACKOFF_SECONDS = 30.0
"""How long to wait at most before the stream is tried again."""

STEADY_SECONDS = 30.0
"""A stream that has been open for so long is heard; one that ends before has failed."""

LATE_SECONDS = 20.0
"""What was found without an event for so long counts as an event that was missed."""

DOUBT_SECONDS = 600.0
"""How long a stream that has missed an event is not relied on."""

RELIABLE = timedelta(hours=1)
"""A stream that has told all for so long is worth a line when it misses an event again."""

_RUN, _CANCELLING, _DEPLOYMENT = "prefect.flow-run.", "prefect.flow-run.Cancelling", "prefect.deployment."

_WAITING = [f"{_RUN}{state}" for state in ("Scheduled", "AwaitingRetry", "Resuming", "Rescheduled")]
"""A run that somebody asks for, retries or resumes. The planned ones are made without an event."""

_CHANGED = [f"{_DEPLOYMENT}{what}" for what in ("created", "updated", "deleted")]

_REST = [
    *(f"prefect.work-queue.{what}" for what in ("created", "updated", "deleted", "paused", "ready")),
    *(f"prefect.work-pool.{what}" for what in ("updated", "paused", "ready", "not-ready")),
]


class Kind(Enum):
    """What is heard: of a run that waits or is to be cancelled, of a deployment, of the pool."""

    WAITS = "waits"
    CANCELLING = "is to be cancelled"
    DEPLOYMENT = "has changed"
    POOL = "pool"


@dataclass(frozen=True)
class News:
    """What is heard.

    Attributes:
        kind: what has happened.
        about: the run or the deployment; None for the pool as a whole.
    """

    kind: Kind
    about: UUID | None = None

    @classmethod
    def of(cls, event: Event) -> News:
        """Return what an event says; of one that is not understood, that something has changed."""
        try:
            about = UUID(event.resource.id.rpartition(".")[2])
        except ValueError:
            return cls(Kind.POOL)
        if event.event == _CANCELLING:
            return cls(Kind.CANCELLING, about)
        if event.event.startswith(_RUN):
            return cls(Kind.WAITS, about)
        if event.event.startswith((_DEPLOYMENT, JOB_RESTARTED)):
            return cls(Kind.DEPLOYMENT, about)
        return cls(Kind.POOL)


class Hearing:
    """Listens to a work pool's events.

    Args:
        log: the agent's.
        heard: is told the news, and with None that some may have been missed.
        is_api_away: returns whether the API is known not to answer, so that nobody need be told.
    """

    def __init__(
        self,
        log: Logger | LoggerAdapter[Any],
        heard: Callable[[News | None], None],
        is_api_away: Callable[[], bool],
    ) -> None:
        self._log = log
        self._heard = heard
        self._is_api_away = is_api_away
        self._failures = 0
        self._is_told = False
        # Since when the stream is open, and until when it is doubted.
        self._opened: datetime | None = None
        self._doubted = datetime.min.replace(tzinfo=UTC)
        # What was heard of lately, and what was found of which nothing was heard, with the moments.
        self._told_of: dict[UUID, datetime] = {}
        self._untold: dict[UUID, datetime] = {}

    @property
    def hears(self) -> bool:
        """Whether the stream is open, and tells all."""
        return self._opened is not None and datetime.now(UTC) >= self._doubted

    def compare(self, found: Mapping[UUID, datetime | None]) -> None:
        """Compare what was heard of with what was found: of an API's several servers one may not know all.

        Args:
            found: runs by hand and deployments, with the moment at which each was made.
        """
        now, late = datetime.now(UTC), timedelta(seconds=LATE_SECONDS)
        self._told_of = {id_: moment for id_, moment in self._told_of.items() if moment > now - 4 * late}
        if self._opened is None:
            return
        for id_, made in found.items():
            if made is not None and made > max(self._opened, now - 3 * late) and id_ not in self._told_of:
                self._untold.setdefault(id_, now)
        if any(moment <= now - late for moment in self._untold.values()):
            self._untold.clear()
            was_reliable = now >= self._doubted + RELIABLE
            self._doubted = now + timedelta(seconds=DOUBT_SECONDS)
            if was_reliable:
                self._log.warning(
                    "Events are missing from Prefect's event stream; polling the API instead. If the API"
                    " has several servers, give them one message broker (PREFECT_MESSAGING_BROKER)."
                )

    async def listen(self, pool_id: UUID) -> None:
        """Listen as long as the agent lives: where the stream cannot be heard, say so, once, and try again.

        Args:
            pool_id: the work pool's id.
        """
        while True:
            try:
                async with get_events_subscriber(_about(pool_id), reconnection_attempts=0) as events:
                    await self._listen_to(events)
                fault = "the server closes it"
            except Exception as exc:  # noqa: BLE001 - whatever it is, the agent looks instead of listening
                fault = in_words(exc)
            self._fail(fault)
            await asyncio.sleep(backoff(self._failures + 1, LONGEST_BACKOFF_SECONDS))

    async def _listen_to(self, events: AsyncIterable[Event]) -> None:
        """Hear a stream to its end; before and after it, something may have been missed."""
        self._steady = asyncio.get_running_loop().call_later(STEADY_SECONDS, self._be_steady)
        self._opened = datetime.now(UTC)
        self._heard(None)
        try:
            async for event in events:
                if not _is_for_people(event):
                    self._hear(News.of(event))
        finally:
            self._opened = None
            self._untold.clear()
            self._heard(None)
            self._steady.cancel()

    def _hear(self, news: News) -> None:
        if news.about is not None:
            self._told_of[news.about] = datetime.now(UTC)
            self._untold.pop(news.about, None)
        self._heard(news)

    def _be_steady(self) -> None:
        """Take the stream for heard: not yet while a server that stands still leaves it open."""
        if self._is_told and self._is_api_away():
            self._steady = asyncio.get_running_loop().call_later(STEADY_SECONDS, self._be_steady)
            return
        if self._is_told:
            self._log.info("Prefect's event stream is connected again; the API is polled seldom.")
        self._failures, self._is_told = 0, False

    def _fail(self, fault: str) -> None:
        self._failures += 1
        # One that had been heard may just have to be opened again, as after the server's restart.
        if self._failures > 1 and not self._is_told and not self._is_api_away():
            self._is_told = True
            self._log.warning("No connection to Prefect's event stream; polling the API instead: %s", fault)


def _is_for_people(event: Event) -> bool:
    """Return whether only a description has changed, in which nodes write who is active."""
    return event.payload.get("updated_fields") == ["description"]


def _about(pool_id: UUID) -> EventFilter:
    return EventFilter(
        event=EventNameFilter(name=[_CANCELLING, *_WAITING, *_CHANGED, *_REST, JOB_RESTARTED]),
        any_resource=EventAnyResourceFilter(id=[f"prefect.work-pool.{pool_id}"]),
    )
