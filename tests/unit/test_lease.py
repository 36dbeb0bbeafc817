"""What a node decides, event by event."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from taskadapter.coordination.lease import Lease, Step, step
from taskadapter.coordination.messages import (
    Abandon,
    Acquire,
    Acquired,
    Action,
    Answered,
    Done,
    Event,
    Extended,
    Failed,
    Gained,
    Hint,
    Joined,
    Lost,
    Pulse,
    PulseAnswer,
    Refused,
    Register,
    Release,
    ReleaseAsked,
    ResignAsked,
    Send,
    Sighting,
    StopAsked,
    Stopped,
    Taken,
    TimePassed,
    Token,
    Unregister,
)
from taskadapter.coordination.timing import Timing
from tests.unit.simulation import GROUPS, Network, Process, World

if TYPE_CHECKING:
    from collections.abc import Collection

TIMING = Timing(liveness_check_interval=6, heartbeat_frequency=1)
TOKEN = Token("g", "node-1", 5)
START = 100.0


class Node:
    """A lease that is told events and shows what came of them."""

    def __init__(self, **fields: Any) -> None:
        self.lease = Lease(
            task_id="node-1",
            timing=TIMING,
            group_ids=frozenset({"g"}),
            next_beat=START,
            **fields,
        )
        self.done = Step(self.lease)

    @property
    def said(self) -> list[str]:
        return list(self.done.sentences)

    def tell(self, event: Event, now: float) -> tuple[Action, ...]:
        self.done = step(self.lease, event, now)
        self.lease = self.done.lease
        return self.done.actions

    def answer(self, answer: Any, now: float) -> tuple[Action, ...]:
        assert self.lease.call is not None
        return self.tell(Answered(self.lease.call, answer), now)

    def fail(self, now: float, reason: str = "no route", age: float | None = None) -> Any:
        assert self.lease.call is not None
        return self.tell(Failed(self.lease.call, reason, age), now)


def many(group_ids: Collection[str], now: float) -> Node:
    """A node that has seen that the tokens of its groups are free, and asks for them."""
    node = Node(registered=True)
    node.tell(Joined(frozenset(group_ids)), now)
    node.answer(Done(), now)
    node.answer(seen(*(sighting(group_id=group_id, free=True) for group_id in group_ids)), now)
    return node


def taken(term: int, reason: str, since: float = 0.0, *group_ids: str) -> Acquired:
    """An answer that says that the token of a group, or of several, has been taken."""
    return Acquired(tuple(Taken(group_id, term, reason) for group_id in group_ids or ("g",)), since)


def sighting(**fields: Any) -> Sighting:
    defaults = {"group_id": "g", "holder": "node-2", "term": 4, "age": 0.5, "free": False}
    return Sighting(**{**defaults, **fields})


def seen(*sightings: Sighting) -> PulseAnswer:
    return PulseAnswer(registered=True, sightings=sightings)


RENEWED = seen(sighting(holder="node-1", term=5, renewed=True))


@pytest.fixture
def standby() -> Node:
    """A node that registered and has seen another one hold the token, at START."""
    node = Node()
    node.tell(TimePassed(), START)
    node.answer(Done(), START)
    node.answer(seen(sighting()), START)
    return node


@pytest.fixture
def active(standby: Node) -> Node:
    """A node that asked for the token at START + 1, and got it."""
    node = standby
    node.tell(TimePassed(), START + 1)
    node.answer(seen(sighting(free=True, age=6.5)), START + 1)
    node.answer(taken(5, "node 'node-2' was silent for 6.5 s", START + 1), START + 1)
    return node


class TestTrust:
    def test_lasts_from_before_sending(self, standby: Node) -> None:
        """The deadline is the clock before the first heartbeat plus the interval less the margin."""
        standby.tell(TimePassed(), START + 1)
        standby.answer(seen(sighting(free=True)), START + 1.2)
        (gained,) = standby.answer(taken(5, "it was released", START + 1.4), START + 1.9)[:1]
        assert gained == Gained(TOKEN, START + 1.4 + 6 - 0.6, "it was released")

    def test_ends_at_the_deadline(self, active: Node) -> None:
        """Just before the deadline the node trusts; at the deadline it has lost the token."""
        deadline = START + 1 + 5.4
        active.tell(TimePassed(), deadline - 0.001)
        assert active.lease.trusts("g", deadline - 0.001)
        assert not active.lease.trusts("g", deadline)
        lost = active.tell(TimePassed(), deadline)[0]
        assert isinstance(lost, Lost)
        assert (lost.token, lost.asked) == (TOKEN, False)
        assert "g" not in active.lease.held

    def test_a_process_that_stood_still_says_so(self, active: Node) -> None:
        """It is not the database that did not answer, when nobody was there to hear it."""
        active.tell(TimePassed(), START + 1 + 5.4 + 26)
        (said,) = active.said
        assert said.startswith("standby for g after term 5: not confirmed in time: this process stood")
        assert "26.0 s" in said

    def test_is_extended_by_a_renewal(self, active: Node) -> None:
        """A renewal moves the deadline, counted from before it was sent."""
        (sent,) = active.tell(TimePassed(), START + 2.5)
        assert sent == Send(Pulse(START + 2.5, (TOKEN,), frozenset({"g"})))
        assert active.answer(RENEWED, START + 3) == (Extended(TOKEN, START + 2.5 + 5.4),)

    def test_is_not_extended_by_a_late_answer(self, active: Node) -> None:
        """An answer at the deadline comes too late, even if it says that the token is renewed."""
        active.tell(TimePassed(), START + 2)
        active.tell(TimePassed(), START + 4)  # abandoned, and yet it answers
        actions = active.answer(RENEWED, START + 6.4)
        assert isinstance(actions[0], Lost)
        assert not active.lease.trusts("g", START + 6.4)

    def test_is_not_given_at_its_own_deadline(self, standby: Node) -> None:
        """A token that is free again at that very moment is not gained."""
        standby.tell(TimePassed(), START + 1)
        standby.answer(seen(sighting(free=True)), START + 1)
        standby.answer(taken(5, "it was released", START + 1), START + 1 + 5.4)
        assert "g" not in standby.lease.held
        assert standby.said == ["took g too late to trust it"]

    def test_is_not_given_by_a_late_answer(self, standby: Node) -> None:
        """A token whose trust would be over already is not gained."""
        standby.tell(TimePassed(), START + 1)
        standby.answer(seen(sighting(free=True)), START + 1)
        standby.answer(taken(5, "free"), START + 6.4)
        assert not standby.lease.held
        assert standby.said == ["took g too late to trust it"]
        assert list(standby.done.warnings) == standby.said

    def test_ends_at_once_if_another_node_has_the_token(self, active: Node) -> None:
        """An answer that says "not mine" does not wait for the deadline."""
        active.tell(TimePassed(), START + 2)
        lost = active.answer(seen(sighting(term=6)), START + 2.1)[0]
        assert lost == Lost(TOKEN, "node 'node-2' has it in term 6")
        assert active.said == ["standby for g after term 5: node 'node-2' has it in term 6"]

    def test_a_standby_says_who_is_active(self, standby: Node) -> None:
        """Once for each holder, whatever its term; of a group that is free nothing."""
        said = standby.said
        for second, (holder, free) in enumerate(
            [("node-2", False), ("", True), ("node-3", False), ("node-3", False), ("node-2", False)], 1
        ):
            standby.tell(TimePassed(), START + second)
            assert standby.lease.call is not None
            if not isinstance(standby.lease.call, Pulse):
                standby.answer(Acquired(), START + second)
                standby.tell(TimePassed(), START + second + 0.5)
            standby.answer(seen(sighting(holder=holder, free=free, age=0.1)), START + second)
            said += standby.said

        assert said == [
            f"standing by for g (node '{holder}' is active)" for holder in ("node-2", "node-3", "node-2")
        ]

    def test_many_groups_of_one_holder_are_one_line(self) -> None:
        """Their number is enough."""
        groups = [f"g{number}" for number in range(5)]
        node = Node(registered=True)
        node.lease = replace(node.lease, group_ids=frozenset(groups))
        node.tell(TimePassed(), START)
        node.answer(seen(*(sighting(group_id=group) for group in groups)), START)

        assert node.said == ["standing by for g0, g1, g2 and 2 more (node 'node-2' is active)"]

    def test_ends_at_once_if_another_process_has_the_name(self, active: Node) -> None:
        """A node whose name another process has taken gives up everything, and asks again."""
        active.tell(TimePassed(), START + 2)
        actions = active.answer(PulseAnswer(registered=False), START + 2.1)
        assert actions == (
            Lost(TOKEN, "another process runs as node 'node-1'"),
            Send(Register(START + 2.1, frozenset({"g"}))),
        )

    def test_survives_faults_until_the_deadline(self, active: Node) -> None:
        """No answer is no verdict: the node goes on, says why once, and then steps down."""
        active.tell(TimePassed(), START + 2)
        active.fail(START + 2.1)
        assert active.said == ["no route"]
        active.tell(TimePassed(), active.lease.wake_at())
        active.fail(START + 3)
        assert active.said == []
        assert active.lease.trusts("g", START + 3)
        active.tell(TimePassed(), START + 6.4)
        assert active.said == ["standby for g after term 5: not confirmed in time: no route"]

    def test_is_not_regained_in_the_same_term(self, active: Node) -> None:
        """After it stepped down, the node takes its own token over, at once and in a new term."""
        active.tell(TimePassed(), START + 6.4)
        own = sighting(holder="node-1", term=5, age=2.0, free=True, renewed=True)
        active.fail(START + 6.5)
        active.tell(TimePassed(), active.lease.wake_at())
        (sent,) = active.answer(seen(own), START + 7)
        assert sent == Send(Acquire(START + 7, ("g",)))


class TestCalls:
    def test_one_at_a_time(self, standby: Node) -> None:
        """While a call is under way no other is made, whatever happens."""
        assert standby.tell(TimePassed(), START + 1) == (Send(Pulse(START + 1, (), frozenset({"g"}))),)
        assert standby.tell(Hint("g"), START + 1.5) == ()
        assert standby.tell(ReleaseAsked("g"), START + 1.6) == ()

    def test_a_slow_one_is_broken_off(self, standby: Node) -> None:
        """At a third of the trust a call is abandoned, once."""
        (sent,) = standby.tell(TimePassed(), START + 1)
        assert isinstance(sent, Send)
        assert standby.lease.wake_at() == START + 1 + 5.4 / 3
        assert standby.tell(TimePassed(), START + 2.7) == ()
        assert standby.tell(TimePassed(), START + 2.81) == (Abandon(sent.call),)
        assert standby.tell(TimePassed(), START + 3) == ()

    def test_an_answer_to_another_call_is_ignored(self, standby: Node) -> None:
        """What nobody waits for any more changes nothing."""
        before = standby.lease
        assert standby.tell(Answered(Acquire(1.0, ("g",)), taken(9, "free")), START + 0.5) == ()
        assert standby.lease == before

    def test_back_off_and_come_back(self, standby: Node) -> None:
        """Failing calls come ever more rarely; the first that works says how long it took."""
        now, waits = START + 1, []
        for _ in range(7):
            standby.tell(TimePassed(), now)
            standby.fail(now)
            waits.append(standby.lease.wake_at() - now)
            now = standby.lease.wake_at()
        assert waits == pytest.approx([0.25, 0.5, 1, 2, 2, 2, 2])
        standby.tell(TimePassed(), now)
        standby.answer(seen(sighting()), now)
        assert standby.said == ["the database answers again, after 9.8 s"]

    def test_what_is_no_reason_to_worry_is_told_beside_what_is(self, active: Node) -> None:
        """A loss is a warning; that the database answers, and who is active now, are none."""
        active.tell(TimePassed(), START + 2)
        active.fail(START + 2)
        assert active.done.warnings == ("no route",)
        active.tell(TimePassed(), active.lease.wake_at())
        active.answer(seen(sighting(term=6)), START + 6.5)

        assert list(active.done.warnings) == active.said[:1]
        assert active.said[0].startswith("standby for g after term 5: ")
        assert active.said[1].startswith("the database answers again")
        assert active.said[2] == "standing by for g (node 'node-2' is active)"

    def test_what_was_asked_for_is_no_warning(self, active: Node) -> None:
        """Though the database does not answer."""
        active.tell(TimePassed(), START + 2)
        active.fail(START + 2)
        active.tell(ReleaseAsked("g"), START + 2.1)
        assert active.said == ["standby for g after term 5: handed over"]
        assert active.done.warnings == ()

    def test_a_hint_brings_the_next_look_forward(self, standby: Node) -> None:
        """A hint about one of its groups makes a standby look now, about another group not."""
        assert standby.tell(Hint("other"), START + 0.1) == ()
        assert standby.tell(Hint("g"), START + 0.1) == (Send(Pulse(START + 0.1, (), frozenset({"g"}))),)

    def test_many_tokens_are_taken_with_one_call(self) -> None:
        """A takeover of many groups is one call; of each that was free there is a line."""
        node = many("abc", START)
        assert node.lease.call == Acquire(START, ("a", "b", "c"))
        node.answer(taken(5, "free", START, "a", "c"), START + 0.1)
        assert node.said == ["active for a in term 5: free", "active for c in term 5: free"]
        assert [node.lease.trusts(group_id, START + 2) for group_id in "abc"] == [True, False, True]
        assert node.lease.call is None

    def test_so_many_that_a_heartbeat_need_not_wait(self) -> None:
        """The rest are taken with the next call, or after the heartbeat that is due."""
        names = [f"g{n:04d}" for n in range(1000)]
        node = many(names, START)
        calls = [node.lease.call]
        while isinstance(node.lease.call, Acquire):
            node.answer(Acquired(), START)
            calls.append(node.lease.call)
        asked = [call.group_ids for call in calls if isinstance(call, Acquire)]
        assert [name for group_ids in asked for name in group_ids] == names
        assert max(map(len, asked)) < 1000

    def test_a_row_that_somebody_has_locked_holds_up_no_other(self) -> None:
        """Once a call for several has failed each is asked for by itself, those that fail at the end."""
        node, asked, now = many("abc", START), [], START
        for _ in range(6):
            while not isinstance(node.lease.call, Acquire):
                now = max(now, node.lease.wake_at())
                node.tell(TimePassed(), now)
                if isinstance(node.lease.call, Pulse):
                    free = set("abc") - node.lease.held.keys()
                    confirmed = [
                        sighting(group_id=g, holder="node-1", term=5, renewed=True) for g in node.lease.held
                    ]
                    node.answer(seen(*confirmed, *(sighting(group_id=g, free=True) for g in free)), now)
            asked.append("".join(node.lease.call.group_ids))
            if "a" in node.lease.call.group_ids:
                now += 1
                node.fail(now)
            else:
                node.answer(taken(5, "free", now, *node.lease.call.group_ids), now)
        assert asked == ["abc", "a", "b", "c", "a", "a"]

    def test_an_answer_to_nothing_that_was_asked_is_a_mistake(self, standby: Node) -> None:
        """It is ours, and not to be passed over."""
        standby.tell(TimePassed(), START + 1)
        with pytest.raises(TypeError, match="does not answer"):
            standby.answer(taken(5, "free", START), START + 1)

    def test_groups_that_are_joined_while_the_node_is_entered_are_entered_too(self) -> None:
        """Its entry has only those that were known when it was sent."""
        node = Node()
        (first,) = node.tell(TimePassed(), START)
        assert first == Send(Register(START, frozenset({"g"})))
        assert node.tell(Joined(frozenset({"g", "h"})), START + 0.1) == ()
        (second,) = node.answer(Done(), START + 0.2)
        assert second == Send(Register(START + 0.2, frozenset({"g", "h"})))
        assert not node.lease.registered
        (third,) = node.answer(Done(), START + 0.3)
        assert third == Send(Pulse(START + 0.3, (), frozenset({"g", "h"})))

    def test_a_token_that_cannot_be_taken_is_told_once(self) -> None:
        """Though heartbeats go on between two tries: a line each second would say that all is well."""
        node, said = many({"g"}, START), list[str]()

        def try_on(times: int, now: float) -> float:
            while times:
                if isinstance(node.lease.call, Acquire):
                    node.fail(now, "locked")
                    times -= 1
                elif node.lease.call is not None:
                    node.answer(seen(sighting(free=True)), now)
                else:
                    now = node.lease.wake_at()
                    node.tell(TimePassed(), now)
                said.extend(node.said)
            return now

        now = try_on(5, START)
        assert said == ["locked", "the database answers again, after 0.2 s"]
        while not isinstance(node.lease.call, Acquire):
            now = node.lease.wake_at()
            node.tell(TimePassed(), now)
            if isinstance(node.lease.call, Pulse):
                node.answer(seen(sighting(free=True)), now)
        node.answer(taken(7, "it was released", now), now)
        assert node.said == ["active for g in term 7: it was released"]
        assert node.lease.stuck == {}

    def test_a_slow_one_is_broken_off_again_and_again(self, standby: Node) -> None:
        """Each call has its own time, however the one before it has ended."""
        for number, ends in enumerate(
            [standby.fail, standby.fail, lambda now: standby.answer(seen(), now)]
        ):
            sent = START + 10 * (number + 1)
            standby.tell(TimePassed(), sent)
            assert isinstance(standby.tell(TimePassed(), sent + 1.8)[0], Abandon)
            assert standby.lease.wake_at() == float("inf")
            ends(sent + 2)
            assert not standby.lease.abandoned

    def test_what_is_no_heartbeat_leaves_room_for_one(self, active: Node) -> None:
        """It may take longer than a heartbeat, as long as one fits in before the deadline."""
        deadline = active.lease.held["g"].deadline
        active.tell(Joined(frozenset({"g", "h"})), START + 2)
        assert isinstance(active.lease.call, Register)
        assert active.lease.wake_at() == pytest.approx(deadline - TIMING.beat_timeout)
        assert active.lease.group_ids == {"g", "h"}
        assert not active.lease.registered

    def test_a_release_that_fails_is_no_end(self, active: Node) -> None:
        """Only a node that is stopping stops for it."""
        active.tell(ReleaseAsked("g"), START + 1.5)
        assert active.fail(START + 2) == ()
        assert not active.lease.stopped
        assert active.said == ["no route"]

    def test_a_lost_race_ends_the_attempt(self, standby: Node) -> None:
        """If another node was faster, this one goes on looking."""
        standby.tell(TimePassed(), START + 1)
        standby.answer(seen(sighting(free=True)), START + 1)
        assert standby.answer(Acquired(), START + 1.1) == ()
        assert standby.lease.wake_at() == START + 2


class TestHandover:
    def test_trust_ends_before_the_release_is_sent(self, active: Node) -> None:
        """Whoever gives a token up stops trusting it first."""
        assert active.tell(ReleaseAsked("g"), START + 1.5) == (
            Lost(TOKEN, "handed over", asked=True),
            Send(Release(START + 1.5, (TOKEN,))),
        )

    def test_leaves_the_token_to_others_for_a_while(self, active: Node) -> None:
        """The node that handed over takes the token back only if nobody else does."""
        active.tell(ReleaseAsked("g"), START + 1.5)
        active.answer(Done(), START + 1.5)
        free = seen(sighting(holder="", age=None, free=True))
        for now in (START + 2, START + 3, START + 4):
            assert active.tell(TimePassed(), now) == (Send(Pulse(now, (), frozenset({"g"}))),)
            assert active.answer(free, now) == ()
        active.tell(TimePassed(), START + 5)
        assert active.answer(free, START + 5) == (Send(Acquire(START + 5, ("g",))),)

    def test_a_release_is_of_what_is_held(self, active: Node) -> None:
        """Of several groups that a node leaves, also of those after one that it does not hold."""
        active.tell(Joined(frozenset({"a", "g"})), START + 1.5)
        active.answer(Done(), START + 1.5)
        active.tell(Joined(frozenset()), START + 1.6)
        assert active.lease.releasing == (TOKEN,)

    def test_a_request_to_resign_is_passed_on_once(self, active: Node) -> None:
        """Whoever runs the node hears once that it is asked to hand over, and still holds it."""
        asked = seen(replace(RENEWED.sightings[0], resign_requested=True))
        active.tell(TimePassed(), START + 2)
        assert ResignAsked(TOKEN) in active.answer(asked, START + 2)
        active.tell(TimePassed(), START + 3)
        assert active.answer(asked, START + 3) == (Extended(TOKEN, START + 8.4),)

    def test_stopping_releases_and_leaves(self, active: Node) -> None:
        """A node that stops gives up its tokens and its name, and then makes no further call."""
        actions = active.tell(StopAsked(), START + 1.5)
        assert active.said == ["left g after term 5: stopping"]
        assert actions[1:] == (Send(Release(START + 1.5, (TOKEN,))),)
        assert active.answer(Done(), START + 1.6) == (Send(Unregister(START + 1.6)),)
        assert active.answer(Done(), START + 1.7) == (Stopped(),)
        assert active.lease.wake_at() == float("inf")

    def test_stopping_does_not_wait_for_a_dead_database(self, active: Node) -> None:
        """If the release fails the node stops all the same: its token becomes free by itself."""
        active.tell(StopAsked(), START + 1.5)
        assert active.fail(START + 2) == (Stopped(),)
        assert active.said == ["no route"]

    def test_stopping_releases_what_was_just_won(self, standby: Node) -> None:
        """A token that arrives after the request to stop goes straight back."""
        standby.tell(TimePassed(), START + 1)
        standby.answer(seen(sighting(free=True)), START + 1)
        standby.tell(StopAsked(), START + 1.1)
        assert standby.answer(taken(5, "free", START + 1), START + 1.2) == (
            Send(Release(START + 1.2, (TOKEN,))),
        )

    def test_a_group_that_is_left_is_released(self, active: Node) -> None:
        """A node that stands by for other groups gives up the others, and registers anew."""
        actions = active.tell(Joined(frozenset({"h"})), START + 1.5)
        assert actions == (
            Lost(TOKEN, "not asked for any more", asked=True),
            Send(Register(START + 1.5, frozenset({"h"}))),
        )
        assert active.said == ["left g after term 5: not asked for any more"]
        assert active.answer(Done(), START + 1.6) == (Send(Release(START + 1.6, (TOKEN,))),)


class TestName:
    def test_a_dead_predecessor_is_waited_for(self) -> None:
        """A name whose process shows no sign of life is taken when that one is stale."""
        node = Node()
        node.tell(TimePassed(), START)
        node.fail(START, "in use", age=4.0)
        assert [said.partition(":")[0] for said in node.said] == ["another process has this name"]
        assert node.lease.wake_at() == START + 1
        node.tell(TimePassed(), START + 1)
        node.fail(START + 1, "in use", age=5.0)
        assert node.said == []
        assert node.lease.wake_at() == pytest.approx(START + 2, abs=0.02)
        node.tell(TimePassed(), START + 2.01)
        assert node.answer(Done(), START + 2.02) == (Send(Pulse(START + 2.02, (), frozenset({"g"}))),)

    def test_a_live_namesake_is_given_way_to(self) -> None:
        """A name whose process has shown a sign of life meanwhile is refused for good."""
        node = Node()
        node.tell(TimePassed(), START)
        node.fail(START, "in use", age=0.9)
        node.tell(TimePassed(), START + 1)
        assert node.fail(START + 1, "in use", age=0.9) == (Refused("in use"),)
        assert node.said == []  # whoever hears it ends, and says why
        assert node.lease.wake_at() == float("inf")

    @pytest.mark.parametrize("took", [(0.8, 0.0), (0.0, 0.8), (0.8, 0.8)])
    def test_an_answer_that_was_long_in_coming_is_no_sign_of_life(self, took: tuple[float, float]) -> None:
        """The age was read at some time between the call and its answer, in each look at another one."""
        node, now = Node(), START
        for seconds in took:
            node.tell(TimePassed(), now)
            assert node.fail(now + seconds, "in use", age=4.0 + now - START) == ()
            now += seconds + 1
        node.tell(TimePassed(), now)
        node.fail(now, "in use", age=4.0 + now - START)
        assert node.lease.other_stale_at == pytest.approx(START + 2)

    @pytest.mark.parametrize(("moves", "lives"), [(0.5, False), (0.51, True)])
    def test_what_two_clocks_differ_by_is_no_sign_of_life(self, moves: float, lives: bool) -> None:
        """Less than half a heartbeat, counted from the first look."""
        node = Node()
        node.tell(TimePassed(), START)
        node.fail(START, "in use", age=4.0)
        node.tell(TimePassed(), START + 1)
        assert node.fail(START + 1, "in use", age=5.0 - moves / 2) == ()
        node.tell(TimePassed(), START + 2)
        assert bool(node.fail(START + 2, "in use", age=6.0 - moves)) is lives

    def test_a_predecessor_that_has_become_stale_is_forgotten(self) -> None:
        """A later namesake is waited for anew."""
        node = Node()
        node.tell(TimePassed(), START)
        node.fail(START, "in use", age=4.0)
        assert node.lease.other_stale_at == START + 2
        node.tell(TimePassed(), START + 2.01)
        node.answer(Done(), START + 2.02)
        assert node.lease.other_stale_at is None


class TestSentences:
    """What the log says, and no more."""

    def test_that_it_is_active(self, active: Node) -> None:
        """For which group, in which term, and why."""
        assert active.said == ["active for g in term 5: node 'node-2' was silent for 6.5 s"]

    def test_that_it_is_asked_to_hand_over(self, active: Node) -> None:
        """Once; a renewal as such is nothing to tell."""
        active.tell(TimePassed(), START + 2)
        active.answer(RENEWED, START + 2)
        assert active.said == []
        active.tell(TimePassed(), START + 3)
        asked = sighting(holder="node-1", term=5, renewed=True, resign_requested=True)
        active.answer(seen(asked), START + 3)
        assert active.said == ["asked to hand over g"]

    @pytest.mark.parametrize(
        ("found", "why"),
        [
            ((), "its row in token_holder is gone"),
            ((sighting(holder="", free=True),), "it was released in term 4"),
            ((sighting(),), "node 'node-2' has it in term 4"),
        ],
    )
    def test_who_has_its_token(self, active: Node, found: tuple[Sighting, ...], why: str) -> None:
        """As far as the database knows."""
        active.tell(TimePassed(), START + 2)
        active.answer(seen(*found), START + 2)
        assert active.said == [f"standby for g after term 5: {why}"]


class TestTiming:
    def test_exactly_three_heartbeats_fit(self) -> None:
        """The boundary itself is allowed."""
        least = 3 * (1 - 1e-9)
        Timing(liveness_check_interval=least, heartbeat_frequency=1)

    def test_the_back_off_has_a_limit(self) -> None:
        """Five seconds, or a third of the interval, but a heartbeat at least."""
        limits = [(30, 1, 5.0), (9, 1, 3.0), (60, 20, 20.0)]
        for interval, frequency, limit in limits:
            timing = Timing(liveness_check_interval=interval, heartbeat_frequency=frequency)
            assert timing.backoff(1) == frequency / 4
            assert timing.backoff(99) == limit

    def test_room_for_three_heartbeats(self) -> None:
        """Three heartbeats must fit into the interval, and exactly three do."""
        Timing(liveness_check_interval=0.3, heartbeat_frequency=0.1)
        with pytest.raises(ValueError, match="three"):
            Timing(liveness_check_interval=2.99, heartbeat_frequency=1)
        with pytest.raises(ValueError, match="positive"):
            Timing(liveness_check_interval=1, heartbeat_frequency=0)

    @pytest.mark.parametrize(("interval", "margin"), [(30, 3), (6, 0.6), (5, 0.5), (3, 0.5), (0.6, 0.1)])
    def test_margin(self, interval: float, margin: float) -> None:
        """The margin is a tenth of the interval, or up to half a second where that is little."""
        timing = Timing(liveness_check_interval=interval, heartbeat_frequency=interval / 3)
        assert timing.margin == pytest.approx(margin)


TIMINGS = [
    Timing(liveness_check_interval=interval, heartbeat_frequency=frequency)
    for interval, frequency in [(3, 1), (6, 1), (30, 1), (30, 10), (0.9, 0.3)]
]


@pytest.mark.parametrize("timing", TIMINGS, ids=str)
class TestPace:
    def settle(self, timing: Timing) -> tuple[World, Process, Process]:
        world = World(timing)
        active = world.start("node-1")
        world.advance(timing.heartbeat_frequency / 3)
        standby = world.start("node-2")
        for process in (active, standby):
            process.network = Network(there=0.005, back=0.005)
        world.advance(timing.liveness_check_interval)
        return world, active, standby

    def test_takeover_within_a_second(self, timing: Timing) -> None:
        """A standby is active within the interval plus a second of the last heartbeat."""
        world, active, standby = self.settle(timing)
        for number in range(10):
            world.crash(active)
            last = max(world.database.beats.values())
            deadline = last + timing.liveness_check_interval + 1
            world.advance(deadline - world.database.now)
            for group_id in GROUPS:
                assert world.trusting(group_id) == [standby]
            active, standby = standby, world.start(f"node-{number + 3}")
            world.advance(timing.heartbeat_frequency * number / 7)

    def test_handover_within_a_heartbeat(self, timing: Timing) -> None:
        """Even without a hint a standby is active a heartbeat after a release."""
        world, active, standby = self.settle(timing)
        world.tell(active, StopAsked())
        world.advance(timing.heartbeat_frequency + 0.1)
        for group_id in GROUPS:
            assert world.trusting(group_id) == [standby]

    def test_one_call_each_heartbeat(self, timing: Timing) -> None:
        """Standby or active, a node makes one call each heartbeat, and no other."""
        world, active, standby = self.settle(timing)
        for process in (active, standby):
            process.calls.clear()
        world.advance(60 * timing.heartbeat_frequency)
        for process in (active, standby):
            assert 58 <= len(process.calls) <= 60
            assert all(isinstance(call, Pulse) for _, call in process.calls)

    def test_every_node_shows_that_it_lives(self, timing: Timing) -> None:
        """Nobody's entry is ever older than a third of a heartbeat less than the interval."""
        world, *_ = self.settle(timing)
        for _ in range(100):
            world.advance(timing.heartbeat_frequency / 5)
            ages = [world.database.now - seen for _, seen in world.database.nodes.values()]
            assert max(ages) < 2.34 * timing.heartbeat_frequency
