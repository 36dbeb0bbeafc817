"""From the token that a node gains to the one that it hands over, without a database or an API."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent import terms
from taskadapter.agent.node import Share
from taskadapter.agent.terms import Terms
from taskadapter.coordination.messages import Gained, Lost, ResignAsked, Token
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.prefect_api.pool import Domain
from tests.unit.given import node, tick, until

FIRST, LATER = Token("group", "node-1", 1), Token("group", "node-1", 7)


class Membership:
    """Holds the tokens that the test gives it."""

    def __init__(self, lease: float, asked: list[tuple[object, ...]]) -> None:
        self.domain = Domain(liveness_check_interval=lease)
        self.active: dict[str, Token] = {}
        self.held: set[Token] = set()
        self.asked = asked

    def activate(self, token: Token) -> None:
        self.active[token.group_id] = token

    def retire(self, name: str) -> None:
        self.active.pop(name, None)

    def holds(self, token: Token) -> bool:
        return token in self.held

    def token(self, name: str) -> Token | None:
        return next((token for token in self.held if token.group_id == name), None)

    def release(self, name: str) -> None:
        self.asked.append(("release", name))

    def is_to_leave(self, name: str) -> None:
        self.asked.append(("is to leave", name))

    def keep_only(self, names: frozenset[str]) -> None:
        if ("keep", *names) not in self.asked:
            self.asked.append(("keep", *names))

    async def leave(self, name: str) -> None:
        self.asked.append(("leave", name))


class Agent:
    """All that surrounds a node's terms, and what it is asked to do, in order."""

    def __init__(self, *troubles: Exception, lease: float = 30.0) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.troubles = [*troubles]
        self.membership = Membership(lease, self.asked)
        self.share = Share()
        self.is_left: Any = None
        self.going_on: set[str] = set()
        membership: Any = self.membership
        part: Any = self
        self.terms = Terms(node(share=self.share), membership, part, part, part, lambda: part)

    # As a dispatcher, a timetable, a lookout and a takeover.

    def lose(self, token: Token) -> None:
        self.asked.append(("lose", token))

    def forget(self, what: Any) -> None:
        if isinstance(what, str):
            self.asked.append(("forget", what))
        else:
            self.is_left = what

    def leave_out(self, job_ids: Any) -> None:
        self.asked.append(("leave out", *job_ids))

    def want(self) -> None:
        self.asked.append(("want",))

    async def drain(self, seconds: float, _: object) -> None:
        self.asked.append(("drain", seconds))
        await until(lambda: not self.going_on)

    @property
    def queues(self) -> frozenset[str]:
        return frozenset(self.going_on)

    async def poll(self) -> None:
        self.asked.append(("poll", *self.membership.active))

    async def clean_up(self, tokens: list[Token]) -> None:
        self.asked.append(("clean up", *tokens))
        if self.troubles:
            raise self.troubles.pop(0)

    def gain(self, *tokens: Token) -> None:
        """Let the node hold some tokens, and hear of it."""
        self.membership.held |= set(tokens)
        for token in tokens:
            self.terms.hear(Gained(token, deadline=0.0, reason="a test"))

    async def take_over(self, until_so: Any) -> None:
        """Let the node take over until something is so."""
        task = asyncio.create_task(self.terms.take_over())
        await until(until_so)
        task.cancel()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """What failed is tried again at once."""
    monkeypatch.setattr(terms, "backoff", lambda *_: 0.0)


@pytest.mark.parametrize(("token", "polls"), [(FIRST, False), (LATER, True)])
def test_a_group_is_active_when_it_is_in_order(token, polls):
    """Its runs are looked for then; at once where somebody else may have left some that are late."""

    async def scenario() -> list[Any]:
        agent = Agent()
        agent.gain(token)
        assert agent.membership.active == {}
        await agent.take_over(lambda: agent.membership.active)
        return agent.asked

    asked = asyncio.run(scenario())
    assert asked == [("want",), ("clean up", token), ("want",), *([("poll", "group")] if polls else [])]


@pytest.mark.parametrize("trouble", [ValueError("nonsense"), KeyError("x"), ConnectionError("away")])
def test_no_trouble_keeps_a_group_idle(trouble, caplog):
    """Whatever it is, it is told once, and tried again."""

    async def scenario() -> Agent:
        agent = Agent(trouble, trouble, trouble)
        agent.gain(FIRST)
        await agent.take_over(lambda: agent.membership.active)
        return agent

    agent = asyncio.run(scenario())
    assert agent.membership.active == {"group": FIRST}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Taking over group group failed, trying again: " in caplog.text


def test_what_takes_longer_than_a_lease_is_said(caplog):
    """Until then no job of the group runs anywhere, though a node is active by what the database says."""

    async def scenario() -> Agent:
        agent = Agent(lease=0.001)
        agent.gain(FIRST)

        async def clean_up(tokens: list[Token]) -> None:
            await until(lambda: caplog.messages)

        agent.clean_up = clean_up  # type: ignore[method-assign]
        await agent.take_over(lambda: agent.membership.active)
        return agent

    assert asyncio.run(scenario()).membership.active == {"group": FIRST}
    (said,) = caplog.messages
    assert said.startswith("Taking over group group takes longer than 0.001 s: what former holders left")


def test_what_cannot_be_put_in_order_is_given_back(caplog):
    """After a lease: another node may be able to."""

    async def scenario() -> Agent:
        agent = Agent(*[ValueError("nonsense")] * 100, lease=0.0)
        agent.gain(FIRST)
        await agent.take_over(lambda: ("release", "group") in agent.asked)
        return agent

    agent = asyncio.run(scenario())
    assert agent.membership.active == {}
    assert "Giving group group back, for another node to take over: nonsense" in caplog.text


def test_within_a_lease_it_is_not_given_back():
    """The fault may be over in a moment."""

    async def scenario() -> Agent:
        agent = Agent(*[ValueError("nonsense")] * 20)
        agent.gain(FIRST)
        await agent.take_over(lambda: agent.membership.active)
        return agent

    assert ("release", "group") not in asyncio.run(scenario()).asked


def test_a_token_that_is_lost_meanwhile_is_not_active():
    """The group is another node's by the time it is in order."""

    async def scenario() -> Agent:
        agent = Agent()
        agent.gain(FIRST)

        async def clean_up(tokens: list[Token]) -> None:
            agent.asked.append(("clean up", *tokens))
            agent.membership.held.clear()
            agent.terms.hear(Lost(FIRST, reason="a test"))

        agent.clean_up = clean_up  # type: ignore[method-assign]
        await agent.take_over(lambda: agent.asked.count(("want",)) > 1)
        return agent

    assert asyncio.run(scenario()).membership.active == {}


def test_what_hangs_holds_nothing_up_when_the_token_is_lost():
    """The next one that is gained is not kept waiting."""

    async def scenario() -> Agent:
        agent = Agent()
        agent.gain(FIRST)

        async def hang(tokens: list[Token]) -> None:
            agent.asked.append(("clean up", *tokens))
            if FIRST in tokens:
                await asyncio.Event().wait()

        agent.clean_up = hang  # type: ignore[method-assign]
        task = asyncio.create_task(agent.terms.take_over())
        await until(lambda: ("clean up", FIRST) in agent.asked)
        agent.membership.held.clear()
        agent.terms.hear(Lost(FIRST, reason="a test"))
        agent.gain(LATER)
        await until(lambda: agent.membership.active)
        task.cancel()
        return agent

    assert asyncio.run(scenario()).membership.active == {"group": LATER}


def test_a_loss_ends_runs_at_once():
    """And nothing more of the group is owed here."""

    async def scenario() -> Agent:
        agent = Agent()
        agent.membership.active["group"] = FIRST
        agent.terms.hear(Lost(FIRST, reason="a test"))
        return agent

    agent = asyncio.run(scenario())
    assert agent.membership.active == {}
    assert agent.asked == [("forget", "group"), ("lose", FIRST)]


def test_the_loss_of_an_earlier_term_leaves_the_later_one():
    """Its runs end all the same, if there still are some."""

    async def scenario() -> Agent:
        agent = Agent()
        agent.membership.active["group"] = LATER
        agent.terms.hear(Lost(FIRST, reason="a test"))
        return agent

    agent = asyncio.run(scenario())
    assert agent.membership.active == {"group": LATER}
    assert agent.asked == [("lose", FIRST)]


def test_a_handover_lets_runs_end_first():
    """Nothing begins, what runs may end, and then the token goes."""

    async def scenario() -> Agent:
        agent = Agent()
        agent.membership.held = {FIRST}
        agent.membership.active["group"] = FIRST
        agent.terms.hear(ResignAsked(FIRST))
        await until(lambda: len(agent.asked) > 2)
        return agent

    agent = asyncio.run(scenario())
    assert agent.membership.active == {}
    assert agent.asked == [("forget", "group"), ("drain", 30.0), ("release", "group")]


def test_a_token_that_is_gained_anew_meanwhile_is_kept():
    """It is the lost one that was asked for; what has begun under the new one goes on."""

    async def scenario() -> Agent:
        agent = Agent()
        agent.membership.held = {FIRST}

        async def drain(*_: object) -> None:
            agent.membership.held = {LATER}

        agent.drain = drain  # type: ignore[method-assign,assignment]
        await agent.terms.hand_over(FIRST)
        return agent

    assert ("release", "group") not in asyncio.run(scenario()).asked


@pytest.mark.parametrize("queue", [None, "group"])
def test_leaving_is_of_jobs_or_of_a_whole_queue(queue):
    """Where other jobs of the queue go on here, the node stays in the group."""
    job, other = uuid4(), uuid4()

    async def scenario() -> Agent:
        agent = Agent()
        agent.share.take_up("group", [])
        agent.share.take_up("stays", [])
        agent.membership.active["group"] = FIRST
        await agent.terms.leave(queue, [job], 3.0)
        return agent

    agent = asyncio.run(scenario())
    assert agent.is_left(tick(job, 0))
    assert not agent.is_left(tick(other, 0))
    assert not agent.share.has_job_of(tick(job, 0))
    assert agent.share.has_job_of(tick(other, 0))
    assert agent.share.serves("group") is (queue is None)
    if queue is not None:
        kept, *_, left = agent.asked
        assert (kept, left) == (("is to leave", "group"), ("leave", "group"))
    else:
        assert ("leave", "group") not in agent.asked
    assert agent.membership.active == ({"group": FIRST} if queue is None else {})
    assert ("drain", 3.0) in agent.asked


def test_each_group_is_let_go_as_soon_as_its_runs_have_ended(monkeypatch):
    """A node that stops keeps none of which nothing goes on: others run its jobs by then."""
    monkeypatch.setattr(terms, "PAUSE_SECONDS", 0.001)

    async def scenario() -> Agent:
        agent = Agent()
        agent.membership.active |= {"idle": FIRST, "busy": LATER}
        agent.going_on = {"busy", DEFAULT_QUEUE}
        going = asyncio.create_task(agent.terms.let_go())
        for queue in (DEFAULT_QUEUE, "busy"):
            await until(lambda: ("keep", *agent.going_on) in agent.asked)
            agent.going_on.discard(queue)
        await going
        return agent

    agent = asyncio.run(scenario())
    assert agent.membership.active == {}
    first, *rest = [set(kept) for what, *kept in agent.asked if what == "keep"]
    assert first == {"busy", DEFAULT_QUEUE}
    assert rest[0] == {"busy"}
    assert agent.asked[:2] == [("forget", "idle"), ("forget", "busy")]
    assert agent.asked.count(("drain", 30.0)) == 1


def test_many_groups_are_named_as_far_as_there_is_room(caplog):
    """The rest is counted."""

    async def scenario() -> None:
        agent = Agent(ValueError("nonsense"))
        agent.gain(*(Token(f"group-{number}", "node-1", 1) for number in range(5)))
        await agent.take_over(lambda: len(agent.membership.active) == 5)

    asyncio.run(scenario())
    assert "groups group-0, group-1, group-2 and 2 more failed" in caplog.text
