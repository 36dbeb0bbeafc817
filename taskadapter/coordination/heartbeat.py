"""Keeps a node's tokens: sends heartbeats, takes over, and steps down in time.

Two threads share the work, so that no call to the database delays a decision. The *decider* feeds
events to the `lease` and obeys it, and never waits for longer than the lease wants to. The
*courier* makes the calls. If one hangs, the decider steps down at the deadline without it.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, assert_never

from taskadapter.coordination.board import NEVER, clock
from taskadapter.coordination.courier import Courier
from taskadapter.coordination.lease import Lease, step
from taskadapter.coordination.messages import (
    NOT_ASKED_FOR,
    Abandon,
    Answered,
    Extended,
    Gained,
    Joined,
    Lost,
    Pulse,
    Refused,
    ReleaseAsked,
    ResignAsked,
    Send,
    StopAsked,
    Stopped,
    TimePassed,
)
from taskadapter.coordination.nodes import Node
from taskadapter.coordination.timing import Timing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from taskadapter.coordination.engines import Database
    from taskadapter.coordination.lease import Step
    from taskadapter.coordination.messages import Action, Event, Token

__all__ = ["Change", "Heartbeat", "Publish", "Vitals"]

_log = logging.getLogger("taskadapter.coordination")

Change: TypeAlias = Gained | Lost | ResignAsked | Refused | Stopped
"""What whoever runs the node gets to know."""

_LONGEST_WAIT = 1.0
"""Seconds after which the decider looks at the clock: waits stand still while a machine sleeps."""

_PAUSE = 0.1
"""Seconds before it goes on after an error of its own."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """How a node is.

    Attributes:
        is_registered: Whether it is entered in the database.
        fault: What the last call failed with, or the last try to take a token that is free still;
            empty if all went well.
        lacks_tables: Whether the last call has failed for want of tables.
    """

    is_registered: bool
    fault: str
    lacks_tables: bool


class Publish(Protocol):
    """Shows until when a token may be trusted, as `DeadlineBoard.write` does."""

    def __call__(self, token: Token, deadline: float, /) -> None:
        """Take the deadline, on the board's `clock`; `NEVER` says that it is over."""


class Heartbeat:
    """Takes part, as one node, in the coordination of some groups.

    `tell` gets each `Change`, and `publish` each new deadline, just before it. These, and `beat`, are
    called in a thread of the heartbeat and must return at once: hand the work over to one of your own.
    What they raise is logged and ignored. Each change, and each fault of the database once, is
    logged in one line.

    Args:
        database: Where the nodes coordinate.
        task_id: The node's name; no other live node may have it.
        group_ids: The groups it stands by for; `join` changes them.
        liveness_check_interval: Seconds without heartbeat after which a node is taken for dead.
        heartbeat_frequency: Seconds from one heartbeat to the next.
        tell: Hears of changes.
        beat: Hears of how many seconds each heartbeat took.
        publish: Hears of deadlines.
        of: For what it takes part, where this process does so under its name for something else too.
        incarnation: Which of all processes that ever had the name; by default one that none had.
        log: Where it is logged, by default the logger `taskadapter.coordination`.

    Raises:
        ValueError: three heartbeats do not fit into the interval.
        CoordinationError: the database is of a kind that nodes cannot coordinate through.
    """

    def __init__(
        self,
        database: Database,
        *,
        task_id: str,
        group_ids: Collection[str],
        liveness_check_interval: float,
        heartbeat_frequency: float,
        tell: Callable[[Change], None],
        publish: Publish,
        beat: Callable[[float], None] = lambda _: None,
        of: str = "",
        incarnation: str = "",
        log: logging.Logger | logging.LoggerAdapter[Any] = _log,
    ) -> None:
        timing = Timing(
            liveness_check_interval=liveness_check_interval,
            heartbeat_frequency=heartbeat_frequency,
        )
        me = Node(task_id, incarnation or str(uuid.uuid4()), socket.gethostname(), os.getpid(), of)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._courier = Courier(database, me, timing, self._events.put)
        self._tell, self._publish, self._beat, self._log = tell, publish, beat, log
        self._lease = Lease(
            task_id=task_id,
            timing=timing,
            group_ids=frozenset(group_ids),
            next_beat=clock(),
        )
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start to take part; returns at once."""
        for name, run in [("decider", self._decide), ("courier", self._courier.run)]:
            threading.Thread(target=run, name=f"taskadapter-{name}", daemon=True).start()

    def stop(self, timeout: float | None = None) -> bool:
        """Release all tokens, wake the standbys, leave, and return whether that was done in time.

        Trust ends at once, so end all runs before. Without a database it takes as long as two calls
        may take. More calls, also from other threads, wait for the same end.
        """
        self._events.put(StopAsked())
        return self._stopped.wait(timeout)

    def join(self, group_ids: Collection[str], why: str = NOT_ASKED_FOR) -> None:
        """Stand by for exactly these groups from now on; tokens of others are released, for a reason."""
        self._events.put(Joined(frozenset(group_ids), why))

    def release(self, group_id: str) -> None:
        """Hand a group over, its runs having ended. For a while the node leaves it to others."""
        self._events.put(ReleaseAsked(group_id))

    def token(self, group_id: str) -> Token | None:
        """Return the token of a group if the node may trust it now, else None."""
        lease = self._lease
        return lease.held[group_id].token if lease.trusts(group_id, clock()) else None

    def seconds_left(self, group_id: str) -> float:
        """Return for how long the token of a group may be trusted; 0 if it may not."""
        held = self._lease.held.get(group_id)
        return 0.0 if held is None else max(0.0, held.deadline - clock())

    @property
    def registered(self) -> frozenset[str]:
        """The groups that the node is entered for; none as long as it is not."""
        lease = self._lease
        return lease.group_ids if lease.registered else frozenset()

    @property
    def vitals(self) -> Vitals:
        """How the node is."""
        lease = self._lease
        fault = lease.fault or next(iter(lease.stuck.values()), "")
        return Vitals(lease.registered, fault, bool(lease.fault) and self._courier.lacks_tables)

    @property
    def waits_for_its_predecessor(self) -> bool:
        """Whether another process has the node's name, which may be dead and becomes stale then."""
        return self._lease.other_stale_at is not None

    def has_left(self, group_id: str) -> bool:
        """Return whether the node does not stand by for a group, and has released its token."""
        lease = self._lease
        releasing = (token.group_id for token in lease.releasing)
        left = group_id not in lease.group_ids and group_id not in releasing
        return left or lease.stopped

    def _decide(self) -> None:
        while not self._lease.stopped or self._lease.held:
            try:
                self._obey(self._advance())
            except Exception:  # noqa: BLE001  a mistake of ours must not end the decisions
                self._log.exception("An error in the heartbeat itself; it goes on. Please report it.")
                time.sleep(_PAUSE)
        self._courier.end()
        self._stopped.set()

    def _advance(self) -> Step:
        wait = min(_LONGEST_WAIT, self._lease.wake_at() - clock())
        try:
            event = self._events.get(timeout=max(0.0, wait))
        except queue.Empty:
            event = TimePassed()
        now = clock()
        done = step(self._lease, event, now)
        self._lease = done.lease
        match event:
            case Answered(Pulse(sent_at)):
                self._call_out(self._beat, now - sent_at)
        return done

    def _obey(self, done: Step) -> None:
        for action in done.actions:
            self._do(action)
        for sentence in done.sentences:
            level = logging.WARNING if sentence in done.warnings else logging.INFO
            self._log.log(level, "node %s: %s", done.lease.task_id, sentence)

    def _do(self, action: Action) -> None:
        match action:
            case Send(call):
                self._courier.take(call)
            case Abandon():
                self._courier.abandon()
            case Extended(token, deadline):
                self._call_out(self._publish, token, deadline)
            case Gained(token, deadline):
                self._call_out(self._publish, token, deadline)
                self._call_out(self._tell, action)
            case Lost(token):
                self._call_out(self._publish, token, NEVER)
                self._call_out(self._tell, action)
            case ResignAsked() | Refused() | Stopped():
                self._call_out(self._tell, action)
            case _:
                assert_never(action)

    def _call_out(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:  # noqa: BLE001  a mistake of theirs must not end the decisions
            self._log.exception(
                "An error in %r, which the heartbeat called; it goes on. Please report it.", function
            )
