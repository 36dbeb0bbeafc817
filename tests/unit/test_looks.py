"""When an agent looks at the API."""

from uuid import uuid4

import pytest
from prefect.settings import PREFECT_WORKER_QUERY_SECONDS, temporary_settings

from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.looks import Looks, Pace
from taskadapter.settings import TaskadapterSettings

PAUSE = 30.0


class Clock:
    """Stands still until it is set."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """A clock of the test's own."""
    return Clock()


@pytest.fixture
def looks(clock):
    """Of an agent that has just looked at everything."""
    found = Looks(clock)
    found.looked(clock.now)
    found.visited(clock.now)
    return found


def test_the_first_look_is_due_at_once(clock):
    """And a visit with it."""
    looks = Looks(clock)

    assert looks.is_due(PAUSE)
    assert looks.is_visit_due(PAUSE)


def test_looks_are_a_pause_apart(clock, looks):
    """Not sooner, and not later."""
    clock.now += PAUSE - 0.01
    assert not looks.is_due(PAUSE)
    clock.now += 0.02
    assert looks.is_due(PAUSE)


def test_what_is_found_may_be_enough_for_less(clock, looks):
    """The next look then comes sooner, and the one after that is a pause later again."""
    looks.looked(clock.now, enough_for=4)
    clock.now += 4
    assert looks.is_due(PAUSE)
    looks.looked(clock.now)
    clock.now += PAUSE - 1
    assert not looks.is_due(PAUSE)


def test_after_some_news_there_are_two_looks(clock, looks):
    """The API may tell of a change before it shows it."""
    clock.now += 10
    looks.hear(News(Kind.WAITS, uuid4()))
    assert looks.is_due(PAUSE)
    looks.looked(clock.now)
    assert not looks.is_due(PAUSE)
    clock.now += 1
    assert looks.is_due(PAUSE)
    looks.looked(clock.now)
    assert not looks.is_due(PAUSE)
    assert not looks.is_visit_due(PAUSE)


def test_much_news_is_looked_at_in_one_go(clock, looks):
    """However much there is, no look follows another at once."""
    looks.hear(News(Kind.WAITS, uuid4()))
    assert not looks.is_due(PAUSE)
    clock.now += 0.5
    assert looks.is_due(PAUSE)


def test_a_deployment_that_has_changed_is_looked_at(clock, looks):
    """It alone, at both looks."""
    changed = uuid4()
    clock.now += 10
    looks.hear(News(Kind.DEPLOYMENT, changed))
    assert looks.changed == {changed}
    looks.looked(clock.now)
    assert looks.changed == {changed}
    clock.now += 1
    looks.looked(clock.now)
    assert looks.changed == set()
    assert not looks.is_visit_due(PAUSE)


def test_the_runs_of_what_has_changed_are_looked_at_once_they_are_planned(clock, looks):
    """By Prefect's scheduler, some seconds after the last change; one look is enough for all."""
    clock.now += 10
    for _ in range(3):
        clock.now += 1
        looks.hear(News(Kind.DEPLOYMENT, uuid4()))
    clock.now += 1
    looks.looked(clock.now)
    clock.now += 6.9
    assert not looks.is_due(PAUSE)
    clock.now += 0.2
    assert looks.is_due(PAUSE)
    looks.looked(clock.now)
    assert not looks.is_due(PAUSE)


@pytest.mark.parametrize("news", [News(Kind.POOL), None])
def test_all_is_looked_at_when_anything_may_have_changed(clock, looks, news):
    """News of the pool, or that some may have been missed."""
    clock.now += 10
    looks.hear(news)
    assert looks.is_visit_due(PAUSE)
    looks.visited(clock.now)
    assert not looks.is_visit_due(PAUSE)
    clock.now += 1
    assert looks.is_visit_due(PAUSE)


def test_what_is_wanted_during_a_look_is_not_forgotten(clock, looks):
    """Its answer may be older."""
    began = clock.now = clock.now + 10
    clock.now += 0.1
    looks.want()
    looks.looked(began)

    assert looks.is_due(PAUSE)


@pytest.mark.parametrize(
    ("hears", "is_busy", "look", "visit"),
    [
        (True, False, 30.0, 60.0),
        (True, True, 30.0, 60.0),
        (False, False, 0.6, 2.0),
        (False, True, 1.8, 8.0),
    ],
)
def test_an_agent_that_hears_looks_seldom(hears, is_busy, look, visit):
    """One that does not sees what it is to run well ahead, and what is new at the next look only."""
    pace = Pace.of(TaskadapterSettings())

    assert pace.of_looks(hears=hears, is_busy=is_busy) == pytest.approx(look)
    assert pace.of_visits(hears=hears, is_busy=is_busy) == pytest.approx(visit)


def test_prefects_own_setting_wins():
    """A worker's users may know it."""
    with temporary_settings({PREFECT_WORKER_QUERY_SECONDS: 4}):
        assert Pace.of(TaskadapterSettings()) == Pace(4, 4)
