"""Whether a group is handed over of which a job's code cannot be loaded, without a database or an API."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent.hand import Hand
from taskadapter.agent.runs import Life, Phase
from taskadapter.agent.succession import Succession
from taskadapter.coordination import store
from taskadapter.coordination.messages import Token
from taskadapter.errors import DatabaseUnavailableError
from taskadapter.prefect_api.pool import Domain
from tests.unit.given import node, tick

TOKEN = Token("group", "node-1", 7)


class Given:
    """A node that holds a group, with one run in hand whose code it cannot load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *able: str, token: Token | None = TOKEN) -> None:
        self.able: list[str] | Exception = [*able]
        self.handed: list[Token] = []
        self.entered: list[tuple[Any, ...]] = []
        self.held = {TOKEN}
        self.hand = Hand(lambda _: None)
        self.run = self.hand.take(tick(uuid4(), 0), token)
        membership: Any = SimpleNamespace(
            domain=Domain(), database_url="sqlite://", holds=lambda token: token in self.held
        )
        monkeypatch.setattr(store, "successors", self._successors)
        monkeypatch.setattr(store, "give_up_token", lambda *given: self.entered.append(given[1:]))
        self.succession = Succession(node(), membership, self.hand, self.handed.append)

    def _successors(self, *_: object) -> list[str]:
        if isinstance(self.able, Exception):
            raise self.able
        return self.able

    def passes_on(self) -> bool:
        return asyncio.run(self.succession.pass_on(self.run, "No module named 'x'."))


def test_a_group_goes_to_one_that_may_be_able(monkeypatch, caplog):
    """The log says to whom, and why."""
    given = Given(monkeypatch, "node-2", "node-3")
    assert given.passes_on()
    assert given.handed == [TOKEN]
    assert given.entered == [(TOKEN, "No module named 'x'.")]
    assert "is put back, and group group goes to a standby (node-2, node-3): " in caplog.text
    assert "No module named 'x'." in caplog.text


def test_it_stays_where_nobody_else_may_be_able(monkeypatch):
    """Its runs crash here as they would there."""
    given = Given(monkeypatch)
    assert not given.passes_on()
    assert (given.handed, given.entered) == ([], [])


def test_a_run_of_no_group_is_nobody_elses(monkeypatch):
    """Any node of its pool runs it."""
    assert not Given(monkeypatch, "node-2", token=None).passes_on()


def test_a_database_that_does_not_answer_names_nobody(monkeypatch):
    """Who stands by cannot be known."""
    given = Given(monkeypatch)
    given.able = DatabaseUnavailableError("away")
    assert not given.passes_on()


def test_a_token_that_is_lost_meanwhile_is_not_handed_over(monkeypatch):
    """Whoever has it now has it already."""
    given = Given(monkeypatch, "node-2")
    given.held.clear()
    assert not given.passes_on()


@pytest.mark.parametrize(
    ("phase", "group", "goes"),
    [
        (Phase.BEGUN, "group", False),
        (Phase.FORKED, "group", True),
        (Phase.BEGUN, "another", True),
    ],
)
def test_no_run_of_the_group_is_ended_for_it(monkeypatch, phase, group, goes):
    """A handover would end one that goes on for long; one that has not begun is the next holder's."""
    given = Given(monkeypatch, "node-2")
    other = given.hand.take(tick(uuid4(), 1), replace(TOKEN, group_id=group))
    other.life = Life(phase)
    assert given.passes_on() is goes
