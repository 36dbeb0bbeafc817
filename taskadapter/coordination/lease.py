"""Who may believe what, and until when: the decisions of a node, without any I/O.

`step` takes what a node knows, one event and the time, and returns what the node knows then, what
it must do, and sentences for the log. It reads no clock: every `now` is the node's monotonic clock
in seconds, and is compared with nothing but other such times.

The rule that everything rests on: a node trusts that it holds a token until

    deadline = clock before sending + liveness_check_interval - margin

where the answer to what was sent says that the token is its own. The heartbeat that the database
recorded is not older than the sending, so nobody takes the token over before the deadline. An
answer that says anything else ends the trust at once, a missing answer at the deadline. Trust that
ended is not regained: the node takes the token over from itself, in a new term.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from taskadapter.coordination.messages import (
    NAMED,
    STOPPING,
    Abandon,
    Acquire,
    Acquired,
    Action,
    Answer,
    Answered,
    Call,
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
    Token,
    Unregister,
)
from taskadapter.errors import listed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from taskadapter.coordination.timing import Timing

__all__ = ["Lease", "Step", "step"]

_GRACE = 0.01
"""Seconds that a poll comes after the moment it is meant for, so that it is never early."""

_STALL = 1.0
"""Seconds after a deadline at which it is noticed if this process runs at all."""

_WAITS_FOR_NAMESAKE = (
    "another process has this name: waiting until it shows life, or has been silent for long"
)

_MOST_AT_ONCE = 200
"""How many tokens are taken with one call, so that a heartbeat does not have to wait for long."""


@dataclass(frozen=True, slots=True)
class _Held:
    token: Token
    deadline: float
    resigning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """All that a node knows at one time. Make one with its first four fields, then `step` it."""

    task_id: str
    timing: Timing
    group_ids: frozenset[str]
    next_beat: float
    held: Mapping[str, _Held] = field(default_factory=dict)
    releasing: tuple[Token, ...] = ()
    free: frozenset[str] = frozenset()
    stuck: Mapping[str, str] = field(default_factory=dict)
    stale_at: Mapping[str, float] = field(default_factory=dict)
    holders: Mapping[str, str] = field(default_factory=dict)
    not_before: Mapping[str, float] = field(default_factory=dict)
    registered: bool = False
    other_stale_at: float | None = None
    call: Call | None = None
    abandoned: bool = False
    hinted: bool = False
    faults: int = 0
    fault: str = ""
    failing_since: float | None = None
    stopping: bool = False
    stopped: bool = False

    def trusts(self, group_id: str, now: float) -> bool:
        """Say whether the node may act as the holder of a group's token."""
        held = self.held.get(group_id)
        return held is not None and now < held.deadline

    def wake_at(self) -> float:
        """Return when the next `TimePassed` is due, if nothing else happens before."""
        times = [held.deadline for held in self.held.values()]
        if self.call is None:
            times.append(self.next_call_at())
        elif not self.abandoned:
            times.append(self.overdue_at(self.call))
        return min(times, default=float("inf"))

    def overdue_at(self, call: Call) -> float:
        """Return when a call is broken off that has no answer until then.

        What is no heartbeat takes several round trips, and may take as long as one fits in after it.
        """
        heartbeat, trust = self.timing.beat_timeout, self.timing.trust
        if isinstance(call, Pulse):
            return call.sent_at + heartbeat
        last = min((held.deadline - heartbeat for held in self.held.values()), default=float("inf"))
        return call.sent_at + min(trust, max(heartbeat, last - call.sent_at))

    def next_call_at(self) -> float:
        """Return when the next call is due: a beat, or the moment when a token becomes free."""
        if self.stopped:
            return float("inf")
        if self.faults or not self.registered or self.stopping:
            return self.next_beat
        stale = [self.stale_at[g] + _GRACE for g in self.standby() if g in self.stale_at]
        return min([self.next_beat, *stale])

    def standby(self) -> frozenset[str]:
        """Return the groups whose token the node does not hold."""
        return self.group_ids - self.held.keys()


@dataclass(frozen=True, slots=True)
class Step:
    """What came of an event. There are no sentences if there is nothing worth telling.

    Attributes:
        lease: The lease, as it is now.
        actions: What is to be done.
        sentences: What is to be told.
        warnings: Those of the sentences that are a reason to worry.
    """

    lease: Lease
    actions: tuple[Action, ...] = ()
    sentences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def then(self, lease: Lease, *actions: Action, sentence: str = "", warning: str = "") -> Step:
        """Return this step, continued."""
        done = self.also(lease, actions, [sentence or warning] if sentence or warning else [])
        return replace(done, warnings=(*done.warnings, warning)) if warning else done

    def also(self, lease: Lease, actions: Iterable[Action], sentences: Iterable[str]) -> Step:
        """Return this step, continued by much at once."""
        return replace(
            self,
            lease=lease,
            actions=(*self.actions, *actions),
            sentences=(*self.sentences, *sentences),
        )


def step(lease: Lease, event: Event, now: float) -> Step:
    """Take one event into account, and decide what to do.

    Deadlines come first: an answer that arrives after one does not move it. `now` must not be
    earlier than in the step before.
    """
    done = _expire(Step(lease), now)
    match event:
        case Answered(call, answer) if call == lease.call:
            done = _answered(done, call, answer, now)
        case Failed(call) if call == lease.call:
            done = _failed(done, event, now)
        case Hint(group_id) if group_id in lease.group_ids:
            done = done.then(replace(done.lease, hinted=True))
        case Joined(group_ids, why):
            done = _joined(done, group_ids, now, why)
        case ReleaseAsked(group_id):
            done = _release(done, [group_id], now, "handed over", leaves=False)
        case StopAsked():
            done = _release(done, sorted(lease.group_ids), now, STOPPING)
            done = done.then(replace(done.lease, stopping=True, next_beat=now, faults=0))
        case _:
            pass
    return _call(done, now)


def _expire(done: Step, now: float) -> Step:
    late = [held for held in done.lease.held.values() if held.deadline <= now]
    for held in late:
        reason = f"not confirmed in time: {_why_unconfirmed(done.lease, now - held.deadline)}"
        done = _lose(done, held.token, reason)
    return done


def _why_unconfirmed(lease: Lease, late: float) -> str:
    if late > _STALL:
        return f"this process stood still for at least {late:.1f} s, stopped, suspended or without CPU"
    return lease.fault or "the database has not answered"


def _lose(done: Step, token: Token, reason: str, *, asked: bool = False, leaves: bool = False) -> Step:
    held = {g: h for g, h in done.lease.held.items() if g != token.group_id}
    lease = replace(done.lease, held=held)
    sentence = f"standby for {token.group_id} after term {token.term}: {reason}"
    if leaves:
        sentence = f"left {token.group_id} after term {token.term}: {reason}"
    # A node that acts as asked is no reason to worry.
    said = {"sentence" if asked else "warning": sentence}
    return done.then(lease, Lost(token, reason, asked), **said)


def _lose_all(done: Step, reason: str) -> Step:
    for held in done.lease.held.values():
        done = _lose(done, held.token, reason)
    return done


def _joined(done: Step, group_ids: frozenset[str], now: float, why: str) -> Step:
    done = _release(done, sorted(done.lease.group_ids - group_ids), now, why)
    # The node's entry names its groups.
    return done.then(replace(done.lease, group_ids=group_ids, registered=False, next_beat=now))


def _release(done: Step, group_ids: list[str], now: float, reason: str, *, leaves: bool = True) -> Step:
    """Give tokens back. Trust ends first, then the database hears of it."""
    for group_id in group_ids:
        held = done.lease.held.get(group_id)
        if held is None:
            continue
        done = _lose(done, held.token, reason, asked=True, leaves=leaves)
        lease = done.lease
        not_before = {**lease.not_before, group_id: now + lease.timing.hold_off}
        releasing = (*lease.releasing, held.token)
        done = done.then(replace(lease, releasing=releasing, not_before=not_before))
    return done


def _answered(done: Step, call: Call, answer: Answer, now: float) -> Step:
    done = _recovered(done, now)
    lease = replace(done.lease, call=None, abandoned=False)
    done = done.then(lease)
    match call, answer:
        case Register(group_ids=entered), _:
            # Others may have been joined since it was sent.
            is_whole = entered == lease.group_ids
            return done.then(replace(lease, registered=is_whole, other_stale_at=None, next_beat=now))
        case Pulse(), PulseAnswer():
            return _looked(done, call, answer, now)
        case Acquire(), Acquired():
            return _acquired(done, call, answer, now)
        case Release(), _:
            left = tuple(token for token in lease.releasing if token not in call.tokens)
            return done.then(replace(lease, releasing=left))
        case Unregister(), _:
            return done.then(replace(lease, stopped=True), Stopped())
        case _:
            raise TypeError(f"{answer} does not answer {call}")


def _recovered(done: Step, now: float) -> Step:
    since = done.lease.failing_since
    if since is None and not done.lease.faults:
        return done
    sentence = "" if since is None else f"the database answers again, after {now - since:.1f} s"
    return done.then(replace(done.lease, faults=0, fault="", failing_since=None), sentence=sentence)


def _failed(done: Step, event: Failed, now: float) -> Step:
    if event.duplicate_age is not None:
        return _duplicate(_recovered(done, now), event, event.duplicate_age, now)
    lease = done.lease
    faults = lease.faults + 1
    # Heartbeats between two tries succeed, and it would be told again and again that all is well.
    is_known = isinstance(event.call, Acquire) and event.reason in lease.stuck.values()
    failing = replace(
        lease,
        call=None,
        abandoned=False,
        faults=faults,
        fault=event.reason,
        failing_since=now if lease.failing_since is None and not is_known else lease.failing_since,
        next_beat=now + lease.timing.backoff(faults),
    )
    if isinstance(event.call, Acquire):
        asked = event.call.group_ids
        stuck = _without(lease.stuck, asked) | dict.fromkeys(asked, event.reason)
        failing = replace(failing, stuck=stuck)
    if lease.stopping and isinstance(event.call, Release | Unregister):
        # Tokens that could not be released become free by themselves.
        return done.then(replace(failing, stopped=True), Stopped(), warning=event.reason)
    return done.then(failing, warning="" if is_known or event.reason == lease.fault else event.reason)


def _duplicate(done: Step, event: Failed, age: float, now: float) -> Step:
    """Wait for a dead predecessor to become stale, but give way to one that shows signs of life.

    Its age was read at some time between the call and the answer, which may have been long in coming.
    """
    lease, timing, reason = done.lease, done.lease.timing, event.reason
    stale_at = now - age + timing.liveness_check_interval
    earliest = event.call.sent_at - age + timing.liveness_check_interval
    first = lease.other_stale_at
    waiting = replace(
        lease,
        call=None,
        abandoned=False,
        other_stale_at=stale_at if first is None else min(first, stale_at),
    )
    # What the clocks of two looks differ by is less than what a heartbeat adds.
    if first is not None and earliest - first > timing.heartbeat_frequency / 2:
        done = _lose_all(done.then(replace(waiting, stopped=True)), reason)
        return done.then(done.lease, Refused(reason))  # whoever hears it says it, and ends
    next_beat = min(now + timing.heartbeat_frequency, max(now, stale_at) + _GRACE)
    waiting = replace(waiting, next_beat=next_beat)
    return done.then(waiting, sentence=_WAITS_FOR_NAMESAKE if first is None else "")


def _looked(done: Step, call: Pulse, answer: PulseAnswer, now: float) -> Step:
    if not answer.registered:
        return _superseded(done, now)
    seen = {sighting.group_id: sighting for sighting in answer.sightings}
    return _watched(_confirmed(done, call, seen), seen, now)


def _superseded(done: Step, now: float) -> Step:
    reason = f"another process runs as node {done.lease.task_id!r}"
    done = _lose_all(done, reason)
    return done.then(replace(done.lease, registered=False, next_beat=now))


def _confirmed(done: Step, call: Pulse, seen: Mapping[str, Sighting]) -> Step:
    """Trust for longer what the pulse has renewed, and no more what it was to renew and has not."""
    lease, held, holders = done.lease, dict(done.lease.held), dict(done.lease.holders)
    actions: list[Action] = []
    sentences, lost = [], []
    for token in call.tokens:
        old, sighting = held.get(token.group_id), seen.get(token.group_id)
        if old is None or old.token != token:
            continue
        if sighting is None or not sighting.renewed:
            lost.append((token, _taker(sighting)))
            if sighting is not None:
                holders[token.group_id] = sighting.holder  # which is said with the loss
            continue
        asked = sighting.resign_requested and not old.resigning
        deadline = max(old.deadline, call.sent_at + lease.timing.trust)
        held[token.group_id] = _Held(token, deadline, old.resigning or asked)
        actions.append(Extended(token, deadline))
        if asked:
            actions.append(ResignAsked(token))
            sentences.append(f"asked to hand over {token.group_id}")
    done = done.also(replace(lease, held=held, holders=holders), actions, sentences)
    for token, reason in lost:
        done = _lose(done, token, reason)
    return done


def _taker(sighting: Sighting | None) -> str:
    if sighting is None:
        return "its row in token_holder is gone"
    if not sighting.holder:
        return f"it was released in term {sighting.term}"
    return f"node {sighting.holder!r} has it in term {sighting.term}"


def _watched(done: Step, seen: Mapping[str, Sighting], now: float) -> Step:
    """Remember which tokens are free, when the others would be, and who has those."""
    lease = done.lease
    free, stale_at, holders = set(), dict[str, float](), dict[str, str]()
    for group_id in lease.standby():
        sighting = seen.get(group_id)
        if sighting is None or sighting.free:
            free.add(group_id)
            continue
        holders[group_id] = sighting.holder
        if sighting.age is not None:
            stale_at[group_id] = now + lease.timing.liveness_check_interval - sighting.age
    sentences = [
        f"standing by for {listed(group_ids, NAMED)} (node {holder!r} is active)"
        for holder, group_ids in _new_holders(lease.holders, holders).items()
    ]
    stuck = {group_id: fault for group_id, fault in lease.stuck.items() if group_id in free}
    lease = replace(lease, free=frozenset(free), stuck=stuck, stale_at=stale_at, holders=holders)
    return done.also(lease, (), sentences)


def _new_holders(known: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the groups whose holder is another one than was known, by that holder."""
    found: dict[str, list[str]] = {}
    for group_id, holder in sorted(seen.items()):
        if known.get(group_id) != holder:
            found.setdefault(holder, []).append(group_id)
    return found


def _acquired(done: Step, call: Acquire, answer: Acquired, now: float) -> Step:
    lease, held = done.lease, dict(done.lease.held)
    deadline = answer.since + lease.timing.trust
    gained, releasing, sentences = [], [], []
    for taken in answer.taken:
        token = Token(taken.group_id, lease.task_id, taken.term)
        if lease.stopping or taken.group_id not in lease.group_ids:
            releasing.append(token)
        elif deadline <= now:
            done = done.then(lease, warning=f"took {taken.group_id} too late to trust it")
        else:
            held[taken.group_id] = _Held(token, deadline)
            gained.append(Gained(token, deadline, taken.reason))
            sentences.append(f"active for {taken.group_id} in term {taken.term}: {taken.reason}")
    lease = replace(
        lease,
        held=held,
        releasing=(*lease.releasing, *releasing),
        free=lease.free.difference(call.group_ids),
        stuck=_without(lease.stuck, call.group_ids),
    )
    return done.also(lease, gained, sentences)


def _without(stuck: Mapping[str, str], those: Collection[str]) -> dict[str, str]:
    return {group_id: fault for group_id, fault in stuck.items() if group_id not in those}


def _call(done: Step, now: float) -> Step:
    """Make the call that is due, or break off the one that takes too long."""
    lease = done.lease
    if lease.stopped:
        return done
    if lease.call is not None:
        if now >= lease.overdue_at(lease.call) and not lease.abandoned:
            return done.then(replace(lease, abandoned=True), Abandon(lease.call))
        return done
    call = _due(lease, now)
    if call is None:
        return done
    match call:
        case Pulse():
            next_beat = now + lease.timing.heartbeat_frequency
            lease = replace(lease, next_beat=next_beat, hinted=False)
        case _:
            pass
    return done.then(replace(lease, call=call), Send(call))


def _due(lease: Lease, now: float) -> Call | None:
    if lease.stopping:
        return Release(now, lease.releasing) if lease.releasing else Unregister(now)
    waiting = now < lease.next_beat
    if lease.faults and waiting:
        return None
    if not lease.registered:
        return None if waiting else Register(now, lease.group_ids)
    if lease.releasing:
        return Release(now, lease.releasing)
    if now >= lease.next_call_at() or lease.hinted:
        return _pulse(lease, now)
    wanted = [g for g in sorted(lease.free & lease.standby()) if now >= _earliest(lease, g)]
    return Acquire(now, _at_once(wanted, lease.stuck)) if wanted else None


def _at_once(wanted: Sequence[str], stuck: Mapping[str, str]) -> tuple[str, ...]:
    """Return whose tokens to take with one call.

    A row that a frozen session has locked must not keep the others from being taken: groups whose call
    has failed come after those whose has not, one by one, and each again when the others had their turn.
    """
    easy = tuple(group_id for group_id in wanted if group_id not in stuck)
    return easy[:_MOST_AT_ONCE] or tuple(group_id for group_id in stuck if group_id in wanted)[:1]


def _earliest(lease: Lease, group_id: str) -> float:
    return lease.not_before.get(group_id, float("-inf"))


def _pulse(lease: Lease, now: float) -> Pulse:
    tokens = tuple(lease.held[group_id].token for group_id in sorted(lease.held))
    return Pulse(now, tokens, lease.group_ids)
