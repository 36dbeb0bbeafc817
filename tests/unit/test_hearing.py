"""What an agent makes of Prefect's event stream."""

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from prefect.events import Event, Resource

from taskadapter.agent import hearing
from taskadapter.agent.hearing import Hearing, Kind, News

RUN = UUID(int=7)


def event(name, resource, **payload):
    about = Resource({"prefect.resource.id": resource})
    return Event(event=name, resource=about, payload=payload, id=uuid4())


@pytest.mark.parametrize(
    ("name", "resource", "news"),
    [
        ("prefect.flow-run.Scheduled", f"prefect.flow-run.{RUN}", News(Kind.WAITS, RUN)),
        ("prefect.flow-run.AwaitingRetry", f"prefect.flow-run.{RUN}", News(Kind.WAITS, RUN)),
        ("prefect.flow-run.Cancelling", f"prefect.flow-run.{RUN}", News(Kind.CANCELLING, RUN)),
        ("prefect.deployment.updated", f"prefect.deployment.{RUN}", News(Kind.DEPLOYMENT, RUN)),
        ("taskadapter.job.restarted", f"prefect.deployment.{RUN}", News(Kind.DEPLOYMENT, RUN)),
        ("prefect.work-queue.created", f"prefect.work-queue.{RUN}", News(Kind.POOL)),
        ("prefect.flow-run.Scheduled", "of another kind", News(Kind.POOL)),
    ],
)
def test_events_are_understood(name, resource, news):
    """One that is not is taken for a change of anything."""
    assert News.of(event(name, resource)) == news


class Stream:
    """Is refused as often as it is asked to, then tells one event, and is closed unless it lasts."""

    def __init__(self, refusals=0, *, lasts=False):
        self.refusals = refusals
        self.lasts = lasts
        self.opened = 0

    def __call__(self, *_, **__):
        return self

    async def __aenter__(self):
        if self.refusals:
            self.refusals -= 1
            raise ConnectionRefusedError("nobody listens")
        self.opened += 1
        return self

    async def __aexit__(self, *_):
        return None

    async def __aiter__(self):
        yield event("prefect.flow-run.Scheduled", f"prefect.flow-run.{RUN}")
        if self.lasts:
            await asyncio.Event().wait()


async def satisfied(ear, heard, until):
    while not until(ear, heard):  # noqa: ASYNC110 - at each turn of the loop
        await asyncio.sleep(0)


@pytest.fixture
def hear(monkeypatch):
    """Listen to a stream until something is so."""

    def hear(stream, until, *, is_api_away=False, pause=0.0):
        heard: list[News] = []
        monkeypatch.setattr(hearing, "get_events_subscriber", stream)
        monkeypatch.setattr(hearing, "LONGEST_BACKOFF_SECONDS", pause)
        ear = Hearing(logging.getLogger("test"), heard.append, lambda: is_api_away)

        async def play():
            task = asyncio.create_task(ear.listen(uuid4()))
            await asyncio.wait_for(satisfied(ear, heard, until), 5)
            task.cancel()

        asyncio.run(play())
        return heard

    return hear


def test_that_something_may_have_been_missed_is_told(hear):
    """When the stream opens, and when it ends; it is opened again."""
    heard = hear(Stream(), lambda _, heard: len(heard) >= 6)

    assert heard[:6] == [None, News(Kind.WAITS, RUN), None] * 2


def test_what_nodes_write_for_people_is_no_news(hear):
    """Who is active stands in the descriptions of pool and queues; more than that is a reason to look."""

    class Descriptions(Stream):
        async def __aiter__(self):
            for n, fields in enumerate((["description"], ["description", "priority"])):
                yield event(
                    "prefect.deployment.updated", f"prefect.deployment.{UUID(int=n)}", updated_fields=fields
                )
            await asyncio.Event().wait()

    heard = hear(Descriptions(), lambda _, heard: len(heard) >= 2)
    assert heard[:2] == [None, News(Kind.DEPLOYMENT, UUID(int=1))]


@pytest.mark.parametrize(("is_api_away", "lines"), [(False, 2), (True, 0)])
def test_a_stream_that_cannot_be_heard_is_told_once(hear, monkeypatch, caplog, is_api_away, lines):
    """And that it is heard again; not where the whole API is away, of which the agent tells."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hearing, "STEADY_SECONDS", 0)
    hear(
        Stream(refusals=3, lasts=True),
        lambda ear, _: ear.hears and not ear._failures,
        is_api_away=is_api_away,
    )

    assert len(caplog.messages) == lines


def test_a_stream_is_not_told_to_be_back_while_the_api_is_away(hear, monkeypatch, caplog):
    """A server that is frozen leaves its connections open; it is told once the API has answered."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(hearing, "STEADY_SECONDS", 0)
    asked = []

    def is_api_away():
        asked.append(bool(caplog.messages))
        return 1 < len(asked) < 5

    monkeypatch.setattr(hearing, "get_events_subscriber", Stream(refusals=2, lasts=True))
    monkeypatch.setattr(hearing, "LONGEST_BACKOFF_SECONDS", 0.0)
    ear = Hearing(logging.getLogger("test"), lambda _: None, is_api_away)

    async def play():
        task = asyncio.create_task(ear.listen(uuid4()))
        await asyncio.wait_for(satisfied(ear, [], lambda *_: len(caplog.messages) == 2), 5)
        task.cancel()

    asyncio.run(play())

    assert len(asked) == 5
    assert caplog.messages[1].startswith("Prefect's event stream is connected again")


def test_a_stream_that_closes_at_once_is_opened_less_and_less(hear, monkeypatch, caplog):
    """It has failed like one that is not opened, and each time that it opens costs a look at everything."""
    pauses, sleep = [], asyncio.sleep

    async def pause(seconds):
        if seconds:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pause)
    hear(Stream(), lambda _, heard: len(heard) >= 21, pause=30.0)

    assert pauses[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert len(caplog.messages) == 1


class TestDoubt:
    """A stream that is open, and does not tell all."""

    @pytest.fixture(autouse=True)
    def _at_once(self, monkeypatch):
        monkeypatch.setattr(hearing, "LATE_SECONDS", 0.01)

    def doubts(self, ear, found):
        """Compare twice, a while apart, as two looks do."""
        ear.compare(found)
        time.sleep(0.011)
        ear.compare({})
        return not ear.hears

    @pytest.mark.parametrize(
        ("about", "age", "is_doubted"),
        [
            (RUN, -0.001, False),
            (UUID(int=8), -0.001, True),
            (UUID(int=8), 10.0, False),
        ],
        ids=["heard of", "not heard of", "older than the stream"],
    )
    def test_what_is_found_must_have_been_heard_of(self, hear, caplog, about, age, is_doubted):
        """If it was made since the stream has been open."""
        results = []

        def compare(ear, heard):
            if len(heard) < 2:
                return False
            results.append(self.doubts(ear, {about: datetime.now(UTC) - timedelta(seconds=age)}))
            return True

        hear(Stream(lasts=True), compare)

        assert results == [is_doubted]
        assert len(caplog.messages) == is_doubted

    def test_one_that_was_reliable_for_long_is_told_of_again(self, hear, caplog, monkeypatch):
        """A line each ten minutes would say nothing new; one next month does."""
        lines = []

        def compare(ear, heard):
            if len(heard) < 2:
                return False
            for n in range(3):
                monkeypatch.setattr(hearing, "RELIABLE", timedelta(seconds=-3600 * (n // 2)))
                assert self.doubts(ear, {UUID(int=10 + n): datetime.now(UTC)})
                lines.append(len(caplog.messages))
            return True

        hear(Stream(lasts=True), compare)
        assert lines == [1, 1, 2]
