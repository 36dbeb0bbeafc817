"""When it is said that no process becomes free, and that there are some again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from taskadapter.agent.crowding import FULL_SECONDS, Crowding
from tests.unit.given import LOG, OTHER, tick

RUNS = [tick(OTHER, 0), tick(OTHER, 1)]


@pytest.fixture
def crowding(caplog: pytest.LogCaptureFixture) -> Crowding:
    caplog.set_level("INFO")
    deployments: Any = SimpleNamespace(name_of=lambda _: "beat")
    hand: Any = SimpleNamespace(flow_runs=RUNS)
    return Crowding(LOG, deployments, hand)


def full_at(crowding: Crowding, *clocks: float) -> None:
    for clock in clocks:
        crowding.note(clock, 0, is_due=True)


def test_a_node_that_is_full_for_long_says_so_once(crowding, caplog):
    """From the moment at which it is as long as that, with what has the processes."""
    full_at(crowding, 0.0, FULL_SECONDS - 0.1)
    assert caplog.messages == []
    full_at(crowding, FULL_SECONDS, FULL_SECONDS + 60)
    assert caplog.messages == [
        "No process has become free for 30 s, and what is due waits. What runs: beat (2)."
    ]


@pytest.mark.parametrize(("room", "is_due"), [(1, True), (0, False)])
def test_the_time_counts_from_anew_when_one_becomes_free(crowding, caplog, room, is_due):
    """A node that is always busy is not stuck."""
    full_at(crowding, 0.0)
    crowding.note(FULL_SECONDS - 1, room, is_due=is_due)
    full_at(crowding, FULL_SECONDS, 2 * FULL_SECONDS - 0.1)
    assert caplog.messages == []


def test_processes_are_free_again_when_nothing_waits_for_them(crowding, caplog):
    """What takes the one that has become free may hang like those before."""
    full_at(crowding, 0.0, FULL_SECONDS)
    caplog.clear()
    crowding.note(FULL_SECONDS + 1, 1, is_due=True)
    crowding.note(FULL_SECONDS + 2, 0, is_due=False)
    assert caplog.messages == []
    for _ in range(2):
        crowding.note(FULL_SECONDS + 3, 1, is_due=False)
    assert caplog.messages == ["Processes are free again."]
