"""Whether a group is handed over of which a job's code cannot be loaded, without a database or an API."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent import succession
from taskadapter.agent.hand import Hand
from taskadapter.agent.runs import Life, Phase
from taskadapter.agent.succession import Succession
from taskadapter.coordination import store
from taskadapter.coordination.messages import Token
from taskadapter.errors import CoordinationError, DatabaseUnavailableError
from taskadapter.execution import protocol
from taskadapter.prefect_api.pool import Domain
from tests.unit.given import node, tick, until

TOKEN = Token("group", "node-1", 7)


class Given:
    """A node that holds a group, with one run in hand that it cannot run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *able: str, token: Token | None = TOKEN) -> None:
        self.node = node()
        self.able: list[str] | Exception = [*able]
        self.handed: list[Token] = []
        self.entered: list[tuple[Any, ...]] = []
        self.held = {TOKEN}
        self.hand = Hand(lambda _: None)
        self.run = self.hand.take(tick(uuid4(), 0), token)
        membership: Any = SimpleNamespace(
            domain=Domain(liveness_check_interval=30),
            database_url="sqlite://",
            holds=lambda token: token in self.held,
            token=lambda name: next((token for token in self.held if token.group_id == name), None),
        )
        monkeypatch.setattr(store, "successors", self._successors)
        monkeypatch.setattr(store, "give_up_tokens", lambda *given: self.entered.append(given[1:]))
        self.succession = Succession(self.node, membership, self.hand, self.handed.append)

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
    assert given.entered == [([TOKEN], "No module named 'x'.")]
    assert "cannot go on here, and group group goes to a standby (node-2, node-3): " in caplog.text
    assert "No module named 'x'." in caplog.text


def test_it_stays_where_nobody_else_may_be_able(monkeypatch):
    """Its runs crash here as they would there."""
    given = Given(monkeypatch)
    assert not given.passes_on()
    assert (given.handed, given.entered) == ([], [])


def test_a_run_of_no_group_is_nobody_elses(monkeypatch):
    """Any node of its pool runs it."""
    assert not Given(monkeypatch, "node-2", token=None).passes_on()


def test_a_database_that_does_not_answer_names_nobody(monkeypatch, caplog):
    """Who stands by cannot be known; the log says so once."""
    given = Given(monkeypatch, "node-2")
    given.able = DatabaseUnavailableError("away")
    assert [given.passes_on() for _ in range(3)] == [False] * 3
    assert caplog.text.count("cannot go on here, and group group cannot be handed over: away") == 1


def test_a_database_that_takes_no_word_of_it_keeps_the_group_here(monkeypatch, caplog):
    """The standby would hand it back; the log says why, anew where it is another reason."""
    given = Given(monkeypatch, "node-2")
    for why in ("away", "permission denied"):

        def refuse(*_: object, why: str = why) -> None:
            raise CoordinationError(why)

        monkeypatch.setattr(store, "give_up_tokens", refuse)
        assert not given.passes_on()
        assert f"cannot be handed over: {why}" in caplog.text
    assert given.handed == []


def test_a_token_that_is_lost_meanwhile_is_not_handed_over(monkeypatch):
    """Whoever has it now has it already."""
    given = Given(monkeypatch, "node-2")
    given.held.clear()
    assert not given.passes_on()


@pytest.mark.parametrize(
    ("life", "group", "goes"),
    [
        (Life(Phase.BEGUN), "group", False),
        (Life(Phase.BEGUN, waits=True), "group", True),
        (Life(Phase.FORKED), "group", True),
        (Life(Phase.BEGUN), "another", True),
    ],
)
def test_no_run_of_the_group_is_ended_for_it(monkeypatch, life, group, goes):
    """A handover would end one that goes on for long; one that does nothing here is the next holder's."""
    given = Given(monkeypatch, "node-2")
    other = given.hand.take(tick(uuid4(), 1), replace(TOKEN, group_id=group))
    other.life = life
    assert given.passes_on() is goes


def test_a_group_is_handed_over_once(monkeypatch):
    """Whichever of its runs finds out that this node cannot run them."""
    given = Given(monkeypatch, "node-2")
    assert given.passes_on()
    assert given.passes_on()
    assert given.handed == [TOKEN]


@pytest.mark.parametrize(("seconds", "handed"), [(29.9, []), (30, [TOKEN])])
def test_a_run_waits_for_the_database_for_a_lease(monkeypatch, seconds, handed):
    """What fails it may pass; after so long another node is to have the group."""
    given = Given(monkeypatch, "node-2")

    async def wait() -> None:
        given.succession.waited(given.run, protocol.Waits(fault="permission denied", seconds=seconds))
        await asyncio.gather(*given.node.tasks._running)

    asyncio.run(wait())
    assert given.handed == handed


def test_a_group_is_left_of_which_a_listener_has_stopped(monkeypatch):
    """As soon as nothing of it goes on and there is a node for it; not when the listener is there again."""
    monkeypatch.setattr(succession, "AGAIN_SECONDS", 0)
    given, job = Given(monkeypatch), uuid4()
    share = given.node.share
    share.give_up(None, [job])
    given.run.life = Life(Phase.BEGUN)

    async def scenario() -> None:
        given.succession.stopped(TOKEN.group_id, [job])
        for change in (lambda: None, lambda: setattr(given, "able", ["node-2"])):
            change()
            await asyncio.sleep(0.05)
            assert given.handed == []
        given.run.meet(protocol.Settled())
        await until(lambda: given.handed)
        given.held.clear()
        await asyncio.sleep(0.05)
        share.take_up(None, [job])
        await until(lambda: not given.node.tasks._running)

    asyncio.run(scenario())
    assert given.handed == [TOKEN]
