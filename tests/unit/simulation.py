"""A world of nodes, clocks, a network and one database, in which time is simulated.

The nodes are real leases. The database follows the rules of `tokens`, in memory. Whatever can go
wrong in between can be switched on: see `Network` and `World`.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from taskadapter.coordination.lease import Lease, Step, _Held, step
from taskadapter.coordination.messages import (
    Abandon,
    Acquire,
    Acquired,
    Answer,
    Answered,
    Call,
    Done,
    Event,
    Failed,
    Pulse,
    PulseAnswer,
    Refused,
    Register,
    Release,
    Send,
    Sighting,
    Stopped,
    Taken,
    TimePassed,
    Token,
    Unregister,
)
from taskadapter.coordination.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GROUPS = frozenset({"a", "b"})


class Mutation(StrEnum):
    """A rule to break, so that the simulation can show that it would notice."""

    NONE = "none"
    DEADLINE_FROM_ANSWER = "the deadline counts from the answer"
    UNLOCKED_TAKEOVER = "taking over judges what it saw before it had the lock"
    UNLOCKED_RENEWAL = "renewing judges what it saw before, and trust is regained"


@dataclass(frozen=True)
class Network:
    """What happens to a call: seconds to the database and back, and whether the answer arrives.

    An abandoned call fails at once, unless `deaf`: then it fails no earlier than it would answer.
    """

    there: float = 0.005
    back: float = 0.005
    lost: bool = False
    deaf: bool = False


class Database:
    """The rules of `tokens`, on a clock of its own."""

    def __init__(self, timing: Timing, offset: float) -> None:
        self.timing, self.offset = timing, offset
        self.now = offset
        self.tokens: dict[str, Token] = {}
        self.takers: dict[tuple[str, int], str] = {}
        self.beats: dict[tuple[str, str], float] = {}
        self.nodes: dict[str, tuple[str, float]] = {}

    def age(self, group_id: str) -> float | None:
        token = self.tokens[group_id]
        beat = self.beats.get((token.task_id, group_id))
        return None if beat is None else self.now - beat

    def is_free(self, group_id: str, incarnation: str) -> bool:
        token = self.tokens.get(group_id)
        if token is None or not token.task_id:
            return True
        age = self.age(group_id)
        own = self.takers[group_id, token.term] == incarnation
        return age is None or age > self.timing.liveness_check_interval or own

    def see(self, incarnation: str, call: Call) -> object:
        """Return what a call would see if it did not lock first."""
        match call:
            case Acquire(group_ids=group_ids):
                return {
                    group_id: (self.tokens.get(group_id), self.is_free(group_id, incarnation))
                    for group_id in group_ids
                }
            case Pulse(tokens=tokens):
                return {token for token in tokens if self.tokens.get(token.group_id) == token}
            case _:
                return None

    def serve(self, task_id: str, incarnation: str, call: Call, seen: object = None) -> Answer | float:
        """Do what a call asks; a float is the age of another process of the same name.

        `seen` is what it saw before, for a mutation that judges that.
        """
        match call:
            case Register():
                return self._register(task_id, incarnation)
            case Unregister():
                if self.nodes.get(task_id, ("", 0))[0] == incarnation:
                    del self.nodes[task_id]
                return Done()
            case Release(tokens=tokens):
                for token in tokens:
                    if self.tokens.get(token.group_id) == token:
                        self.tokens[token.group_id] = replace(token, task_id="")
                        self.beats.pop((token.task_id, token.group_id), None)
                return Done()
            case Acquire():
                return self._acquire(task_id, incarnation, call, seen)
            case Pulse():
                return self._pulse(task_id, incarnation, call, seen)

    def _register(self, task_id: str, incarnation: str) -> Answer | float:
        other, last_seen = self.nodes.get(task_id, (incarnation, 0))
        age = self.now - last_seen
        if other != incarnation and age <= self.timing.liveness_check_interval:
            return age
        self.nodes[task_id] = (incarnation, self.now)
        return Done()

    def _acquire(self, task_id: str, incarnation: str, call: Acquire, seen: object) -> Answer:
        saw: dict[str, tuple[Token | None, bool]] = seen if isinstance(seen, dict) else {}
        taken = []
        for group_id in call.group_ids:
            now = self.tokens.get(group_id), self.is_free(group_id, incarnation)
            old, free = saw.get(group_id, now)
            if free:
                new = Token(group_id, task_id, (old.term if old else 0) + 1)
                self.tokens[group_id] = new
                self.takers[group_id, new.term] = incarnation
                self.beats[task_id, group_id] = self.now
                taken.append(Taken(group_id, new.term, "free"))
        return Acquired(tuple(taken), call.sent_at)

    def _pulse(self, task_id: str, incarnation: str, call: Pulse, seen: object) -> Answer:
        registered = self.nodes.get(task_id, ("", 0))[0] == incarnation
        if registered:
            self.nodes[task_id] = (incarnation, self.now)
        kept = {t for t in call.tokens if self.tokens.get(t.group_id) == t}
        if isinstance(seen, set):
            kept = seen
        for token in kept:
            self.beats[task_id, token.group_id] = self.now
        sightings = [self._sighting(group_id, incarnation, kept) for group_id in self.tokens]
        return PulseAnswer(registered, tuple(sightings) if registered else ())

    def _sighting(self, group_id: str, incarnation: str, kept: set[Token]) -> Sighting:
        token = self.tokens[group_id]
        return Sighting(
            group_id=group_id,
            holder=token.task_id,
            term=token.term,
            age=self.age(group_id),
            free=self.is_free(group_id, incarnation),
            renewed=any(t.group_id == group_id for t in kept),
        )


@dataclass(eq=False)
class Process:
    """One run of a node: its lease, its clock, and its way to the database."""

    lease: Lease
    incarnation: str
    rate: float
    offset: float
    network: Network = field(default_factory=Network)
    paused: bool = False
    ended: bool = False
    inbox: list[Event] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    calls: list[tuple[float, Call]] = field(default_factory=list)

    @property
    def task_id(self) -> str:
        return self.lease.task_id


class World:
    """Time, and everything that happens in it."""

    def __init__(self, timing: Timing, *, offset: float = 0.0, mutation: Mutation = Mutation.NONE) -> None:
        self.timing, self.mutation = timing, mutation
        self.now = 0.0
        self.database = Database(timing, offset)
        self.processes: list[Process] = []
        self._happenings: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._highest = dict.fromkeys(GROUPS, 0)

    # What a test does

    def start(self, task_id: str, *, rate: float = 1.0, offset: float = 0.0) -> Process:
        first = Lease(
            task_id=task_id,
            timing=self.timing,
            group_ids=GROUPS,
            next_beat=self.now * rate + offset,
        )
        process = Process(first, f"{task_id}#{next(self._numbers)}", rate, offset)
        self.processes.append(process)
        self.tell(process, TimePassed())
        return process

    def crash(self, process: Process) -> None:
        process.ended = True
        self.processes.remove(process)

    def resume(self, process: Process) -> None:
        process.paused = False
        inbox, process.inbox = process.inbox, []
        for event in [*inbox, TimePassed()]:
            self.tell(process, event)

    def advance(self, seconds: float) -> None:
        """Let time pass and everything happen that is due, in order."""
        end = self.now + seconds
        for _ in range(20_000):
            moment, happen = self._next()
            if moment > end:
                self._set_time(end)
                return
            self._set_time(max(moment, self.now))
            happen()
            self.check()
        raise AssertionError("the nodes never rest")

    def tell(self, process: Process, event: Event) -> None:
        """Give a process an event, now or when it wakes up."""
        if process.ended:
            return
        if process.paused:
            process.inbox.append(event)
            return
        if self.mutation is Mutation.DEADLINE_FROM_ANSWER and isinstance(event, Answered):
            event = self._as_if_sent_now(process, event)
        before = process.lease
        done = step(process.lease, event, self.clock(process))
        process.lease = done.lease
        if self.mutation is Mutation.UNLOCKED_RENEWAL and isinstance(event, Answered):
            self._regain(process, before, event)
        self._obey(process, done)

    # What must hold

    def trusting(self, group_id: str) -> list[Process]:
        """Return the processes that would start a run now, were they not paused."""
        return [p for p in self.processes if p.lease.trusts(group_id, self.clock(p))]

    def check(self) -> None:
        for group_id in GROUPS:
            holders = self.trusting(group_id)
            assert len(holders) <= 1, f"{[p.incarnation for p in holders]} trust {group_id}"
            token = self.database.tokens.get(group_id)
            for process in holders:
                trusted = process.lease.held[group_id].token
                assert trusted == token, f"{trusted} is trusted, but it is {token}"
            term = token.term if token else 0
            assert term >= self._highest[group_id], "a term came back"
            self._highest[group_id] = term

    # How it works

    def clock(self, process: Process) -> float:
        return self.now * process.rate + process.offset

    def _set_time(self, moment: float) -> None:
        self.now = moment
        self.database.now = moment + self.database.offset

    def _next(self) -> tuple[float, Callable[[], None]]:
        return min(self._upcoming(), key=lambda due: due[0])

    def _upcoming(self) -> Iterator[tuple[float, Callable[[], None]]]:
        if self._happenings:
            yield self._happenings[0][0], self._happen
        for process in self.processes:
            if not process.paused:
                moment = (process.lease.wake_at() - process.offset) / process.rate
                # Rounding must not wake it a moment too early, again and again.
                yield moment + 1e-6, partial(self.tell, process, TimePassed())
        yield float("inf"), lambda: None

    def _happen(self) -> None:
        _, _, happening = heapq.heappop(self._happenings)
        happening()

    def _later(self, seconds: float, happening: Callable[[], None]) -> None:
        heapq.heappush(self._happenings, (self.now + seconds, next(self._numbers), happening))

    def _obey(self, process: Process, done: Step) -> None:
        process.log += [f"{self.now:.2f} {sentence}" for sentence in done.sentences]
        for action in done.actions:
            match action:
                case Send(call):
                    process.calls.append((self.now, call))
                    self._send(process, call)
                case Abandon(call) if not process.network.deaf:
                    self.tell(process, Failed(call, "broken off"))
                case Refused() | Stopped():
                    self.crash(process)
                case _:
                    pass

    def _send(self, process: Process, call: Call) -> None:
        """Let a call reach the database, and its answer the process, each in its time.

        A process that gives up or dies does not stop a call that is on its way.
        """
        network = process.network
        sight: list[object] = [None]

        def see() -> None:
            unlocked = {
                Mutation.UNLOCKED_TAKEOVER: Acquire,
                Mutation.UNLOCKED_RENEWAL: Pulse,
            }.get(self.mutation)
            if unlocked is not None and isinstance(call, unlocked):
                sight[0] = self.database.see(process.incarnation, call)

        def serve() -> None:
            answer = self.database.serve(process.task_id, process.incarnation, call, sight[0])
            event: Event
            if isinstance(answer, float):
                event = Failed(call, "duplicate", answer)
            elif network.lost:
                event = Failed(call, "connection lost")
            else:
                event = Answered(call, answer)
            self._later(network.back, partial(self.tell, process, event))

        self._later(network.there / 2, see)
        self._later(network.there, serve)

    # Broken rules

    def _as_if_sent_now(self, process: Process, event: Answered) -> Answered:
        if event.call != process.lease.call:
            return event
        call = replace(event.call, sent_at=self.clock(process))
        process.lease = replace(process.lease, call=call)
        return Answered(call, event.answer)

    def _regain(self, process: Process, before: Lease, event: Answered) -> None:
        if event.call != before.call or not isinstance(event.call, Pulse):
            return
        assert isinstance(event.answer, PulseAnswer)
        renewed = {s.group_id for s in event.answer.sightings or () if s.renewed}
        deadline = event.call.sent_at + self.timing.trust
        again = {
            token.group_id: _Held(token, deadline)
            for token in event.call.tokens
            if token.group_id in renewed
        }
        process.lease = replace(process.lease, held={**again, **process.lease.held})
