"""The life of a run on its node: what has happened to it, and what is to be done about it. Pure.

`step` takes a run's life and what happens to it, and returns the life after that and what is to be done. A
run goes one way::

    FOUND ──► PLACED ──► CLAIMED ──► FORKED ──► BEGUN ──► SETTLED ──► over

Before BEGUN it can be given back: it has no entry in the ledger, and so nothing of it has happened. From
there on the ledger says what it came to. What that asks for `settle` says when its process has ended here,
and `decide` for runs of nodes that are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from prefect.client.schemas.objects import TERMINAL_STATES, State, StateType

from taskadapter.coordination.executions import ABANDONED, SKIPPED
from taskadapter.execution import protocol
from taskadapter.rules.ticks import skipped

if TYPE_CHECKING:
    from taskadapter.coordination.executions import Entry

CANCEL_GRACE_SECONDS = 30.0
"""How long a cancelled run may take to clean up before its process is killed."""


class Phase(IntEnum):
    """How far a run has come.

    FOUND: it was taken from what is due. PLACED: it has one of its job's `max_concurrent` places, and is
    judged. CLAIMED: Prefect has it as this node's. FORKED: a process has it. BEGUN: its body has begun.
    SETTLED: the ledger has what the body came to, and Prefect, perhaps, has not.
    """

    FOUND = 0
    PLACED = 1
    CLAIMED = 2
    FORKED = 3
    BEGUN = 4
    SETTLED = 5


@dataclass(frozen=True, slots=True)
class Life:
    """What is known of a run from the moment at which it is taken from the queue until it is over.

    Attributes:
        phase: how far it has come.
        finishes: whether it may go on when the token of its group is lost.
        dropped: whether it is given back, unless its body has begun.
        deferred: the same, but to be taken here again later.
        lost: whether the token was lost: what becomes of the run, the group's next holder says.
        called_off: why it is not to begin, once its job is over.
        job_ended: why it has ended its job, if it has.
        cancelled: when it was cancelled, on the monotonic clock.
        waits: whether it can do nothing here but wait for the coordination database.
    """

    phase: Phase = Phase.FOUND
    finishes: bool = False
    dropped: bool = False
    deferred: bool = False
    lost: bool = False
    called_off: str | None = None
    job_ended: str | None = None
    cancelled: float | None = None
    waits: bool = False

    @property
    def has_process(self) -> bool:
        """Whether a process has it."""
        return self.phase >= Phase.FORKED

    @property
    def has_begun(self) -> bool:
        """Whether its body has begun."""
        return self.phase >= Phase.BEGUN

    @property
    def goes_on(self) -> bool:
        """Whether its body is going on, and nothing is known to be in its way."""
        return self.phase is Phase.BEGUN and not self.waits


# --- what happens ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    """It has one of its job's places; `finishes` as in `Life`."""

    finishes: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """Prefect has it as this node's."""


@dataclass(frozen=True, slots=True)
class Forked:
    """There is a process for it."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """This node is to begin nothing more of it."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """Another one is to begin on this node before it."""


@dataclass(frozen=True, slots=True)
class CalledOff:
    """Its job is over, for a reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class TokenLost:
    """Another node may start it."""


@dataclass(frozen=True, slots=True)
class TimeUp:
    """The agent can wait for it no longer."""


@dataclass(frozen=True, slots=True)
class GraceOver:
    """It was told that its time is up, and has not ended."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody has cancelled it, at some time on the monotonic clock."""

    at: float


@dataclass(frozen=True, slots=True)
class Watched:
    """It is so late on the monotonic clock."""

    at: float


@dataclass(frozen=True, slots=True)
class Killed:
    """Its process has said no last word: a signal from outside has ended it, and the ledger is to say."""


Event: TypeAlias = (
    Placed
    | Claimed
    | Forked
    | protocol.Begun
    | protocol.Waits
    | protocol.Answered
    | protocol.Settled
    | Dropped
    | Deferred
    | CalledOff
    | TokenLost
    | TimeUp
    | GraceOver
    | Cancelled
    | Watched
    | protocol.End
    | Killed
)


# --- what is to be done ---------------------------------------------------------------------------


class Signal(Enum):
    """What the process of a run is to be told, at once.

    DROP: to give the run back. CANCEL: that somebody has cancelled it. TERMINATE, KILL: to end.
    """

    DROP = "drop"
    CANCEL = "cancel"
    TERMINATE = "terminate"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class EndJob:
    """Have no tick of its job begin any more, on any node."""

    reason: str


@dataclass(frozen=True, slots=True)
class HoldJob:
    """Its job is paused: have no tick of it begin until it is resumed."""


@dataclass(frozen=True, slots=True)
class PutBack:
    """Make it due again; `keep` is whether it stays the next of its job here."""

    keep: bool


@dataclass(frozen=True, slots=True)
class Skip:
    """Enter that the tick is skipped, and why, and say so where its policy asks for that."""

    reason: str


@dataclass(frozen=True, slots=True)
class ShowSkipped:
    """Show a run as skipped whose job is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Have the ledger know nothing of it, if it has it as begun: its body has not."""


@dataclass(frozen=True, slots=True)
class AskLedger:
    """Have the ledger say what becomes of it; `at_fault` as in `settle`."""

    at_fault: bool


@dataclass(frozen=True, slots=True)
class PassOn:
    """Have a node run it that can load its code; if there is none, it waits for that, or has crashed."""

    waits: bool


Action: TypeAlias = EndJob | HoldJob | PutBack | Skip | ShowSkipped | Withdraw | AskLedger | PassOn


@dataclass(frozen=True, slots=True)
class Step:
    """The life of a run after an event, and what that asks for: signals at once, actions in their order."""

    life: Life
    signals: tuple[Signal, ...] = ()
    actions: tuple[Action, ...] = ()


def step(life: Life, event: Event) -> Step:
    """Return what becomes of a run when something happens to it."""
    match event:
        case Placed(finishes):
            return Step(replace(life, phase=Phase.PLACED, finishes=finishes))
        case Claimed():
            return Step(replace(life, phase=Phase.CLAIMED))
        case Forked():
            if life.dropped or life.deferred or life.lost:
                return Step(life, (Signal.KILL,))
            return Step(replace(life, phase=Phase.FORKED))
        case protocol.Begun(ended=reason):
            return _job_ends(replace(life, phase=max(life.phase, Phase.BEGUN)), reason)
        case protocol.Waits():
            return Step(replace(life, waits=True))
        case protocol.Answered():
            return Step(replace(life, waits=False))
        case protocol.Settled():
            return Step(replace(life, phase=Phase.SETTLED))
        case Dropped():
            return Step(replace(life, dropped=True), _if_forked(life, Signal.DROP))
        case Deferred():
            return Step(replace(life, deferred=True), _if_forked(life, Signal.DROP))
        case CalledOff(reason):
            return Step(replace(life, dropped=True, called_off=reason), _if_forked(life, Signal.DROP))
        case TokenLost():
            return Step(replace(life, lost=True), () if life.finishes else _if_forked(life, Signal.KILL))
        case TimeUp():
            return Step(life, _if_forked(life, Signal.TERMINATE if life.has_begun else Signal.KILL))
        case GraceOver():
            return Step(life, _if_forked(life, Signal.KILL))
        case Cancelled(at):
            if life.cancelled is not None or not life.has_process:
                return Step(life)
            return Step(replace(life, cancelled=at), (Signal.CANCEL,))
        case Watched(at):
            is_overdue = life.cancelled is not None and life.cancelled < at - CANCEL_GRACE_SECONDS
            return Step(life, _if_forked(life, Signal.KILL) if is_overdue else ())
        case _:
            return _end(life, event)


def _end(life: Life, end: protocol.End | Killed) -> Step:
    match end:
        case protocol.Told(ended=reason):
            return _job_ends(life, reason)
        case protocol.Skipped(reason=why, ended=reason):
            return _job_ends(life, reason, Skip(why))
        case protocol.Dropped(in_doubt=True):
            return Step(life, actions=(Withdraw(), give_back(life)))
        case protocol.Dropped():
            return Step(life, actions=(give_back(life),))
        case protocol.Paused():
            return Step(life, actions=(HoldJob(), give_back(life)))
        case protocol.Untold(in_doubt=True):
            return Step(life, actions=(Withdraw(), AskLedger(at_fault=False)))
        case protocol.Untold(ended=reason):
            return _job_ends(life, reason, AskLedger(at_fault=False))
        case protocol.Crashed():
            return Step(life, actions=(AskLedger(at_fault=True),))
        case protocol.Unloadable(waits=waits):
            return Step(life, actions=(PassOn(waits),))
        case Killed():
            return Step(life, actions=(AskLedger(at_fault=False),))


def _job_ends(life: Life, reason: str | None, *then: Action) -> Step:
    """Return what follows when a run tells why its job is over, if it is: once is enough."""
    if reason is None or life.job_ended is not None:
        return Step(life, actions=then)
    return Step(replace(life, job_ended=reason), actions=(EndJob(reason), *then))


def give_back(life: Life) -> PutBack | ShowSkipped:
    """Return what is to be done about a run that is claimed, and is not to begin here now."""
    if life.called_off is not None:
        return ShowSkipped(life.called_off)
    return PutBack(keep=not life.dropped and not life.lost)


def _if_forked(life: Life, signal: Signal) -> tuple[Signal, ...]:
    return (signal,) if life.has_process else ()


# --- when it has no process any more --------------------------------------------------------------


_OF_BODIES = {"Completed", "Failed"}
"""What a body comes to, if it comes to an end."""


class Todo(Enum):
    """What is to be done about a run.

    LEAVE: nothing, or somebody else does it. PUT_BACK: make it due again. AGAIN: put it back after entering
    that it was abandoned, so that the ledger lets it begin a second time. SUSPEND: let it begin again when
    somebody resumes it. CRASH: enter and tell that it was interrupted. ENTER: enter what Prefect knows.
    TELL: tell Prefect what was entered. HAND_ON: leave it to the next holder of its group.
    """

    LEAVE = "leave"
    PUT_BACK = "put back"
    AGAIN = "again"
    SUSPEND = "suspend"
    CRASH = "crash"
    ENTER = "enter"
    TELL = "tell"
    HAND_ON = "hand on"


def decide(
    entry: Entry | None,
    known: StateType | None,
    *,
    lives: bool = False,
    ended_here: bool = False,
    at_fault: bool = False,
    reruns: bool = False,
) -> Todo:
    """Decide what is to be done about a run.

    Args:
        entry: of what it is an execution of, if that has begun.
        known: the state that Prefect has; None if it has no such run any more.
        lives: whether the process that executes it may still be there.
        ended_here: whether its process has just ended here, without telling Prefect of its end.
        at_fault: whether the run itself failed, and nobody ended its process.
        reruns: whether an interrupted execution is to be made again.
    """
    is_final = known is None or known in TERMINAL_STATES
    if entry is None or entry.outcome == ABANDONED:
        # The engine takes an API that fails it before the body for a crash.
        if is_final and not (ended_here and known is StateType.CRASHED):
            return Todo.LEAVE
        return Todo.CRASH if at_fault or known is StateType.CANCELLING else Todo.PUT_BACK
    if entry.outcome is None:
        if lives:
            return Todo.LEAVE
        if is_final:
            return Todo.ENTER
        if known is StateType.PAUSED:
            return Todo.SUSPEND
        return Todo.AGAIN if reruns else Todo.CRASH
    if not is_final:
        return Todo.TELL
    # It takes it for the body's failure, or a crash, that it cannot tell what the body came to.
    told_wrong = known in {StateType.FAILED, StateType.CRASHED} and entry.outcome != outcome_of(known)
    return Todo.TELL if ended_here and told_wrong and entry.outcome in _OF_BODIES else Todo.LEAVE


def settle(
    life: Life, entry: Entry | None, known: StateType | None, incarnation: str, *, at_fault: bool
) -> Todo:
    """Decide what is to be done about a run whose process has ended on this node, and has not told its end.

    Args:
        life: of the run.
        entry: as for `decide`.
        known: the same.
        incarnation: of this node's agent.
        at_fault: as for `decide`.
    """
    if life.lost and known not in TERMINAL_STATES:
        return Todo.HAND_ON
    is_elsewhere = entry is not None and entry.incarnation != incarnation
    return decide(entry, known, ended_here=True, lives=is_elsewhere or life.lost, at_fault=at_fault)


def outcome_of(known: StateType | None) -> str:
    """Return the name under which the ledger has a final state; a run that is gone has crashed."""
    return "Crashed" if known is None else known.value.capitalize()


def state_of(entry: Entry) -> State[Any]:
    """Return the state that an execution came to, for a run that shows none."""
    if entry.outcome == SKIPPED:
        return skipped("another run of this tick was")
    kind = StateType((entry.outcome or "Crashed").upper())
    return State(type=kind, message=f"Executed {entry.where}, which could not report it.")
