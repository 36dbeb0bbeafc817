"""What a lease hears and says: the words between decisions and the database, without either."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = [
    "FOREIGN_GROUP",
    "NAMED",
    "TERMS_SHOWN",
    "UNSEEN_GROUP",
    "Abandon",
    "Acquire",
    "Acquired",
    "Action",
    "Answer",
    "Answered",
    "Call",
    "Done",
    "Event",
    "Extended",
    "Failed",
    "Gained",
    "Hint",
    "Joined",
    "Lost",
    "PoolKey",
    "Pulse",
    "PulseAnswer",
    "Refused",
    "Register",
    "Release",
    "ReleaseAsked",
    "ResignAsked",
    "Send",
    "Sighting",
    "StopAsked",
    "Stopped",
    "Taken",
    "TimePassed",
    "Token",
    "Unregister",
]


FOREIGN_GROUP = (
    "group {name!r} belongs to work pool {other!r}, whose nodes would stand in for this pool's jobs "
    "without running them; choose another group_id, or delete that pool's queue {name!r}"
)
"""What is said of a group that two work pools of one database name."""

UNSEEN_GROUP = (
    "group {name!r} belongs to work pool {other!r} of another Prefect server, or to one that is gone, and "
    "its node {nodes} lives; choose another group_id, or another database, for one of the two servers; if "
    "that pool is gone, stop its nodes, and the group is this pool's"
)
"""What is said of a group whose other work pool cannot be seen from here, while nodes of it live."""

NOT_ASKED_FOR = "not asked for any more"
"""Why a group is left whose queue is gone, or is served no longer."""

STOPPING = "stopping"
"""Why a node that stops leaves its groups."""

NAMED = 3
"""How many groups a line of the log names; it counts the others."""

TERMS_SHOWN = 5
"""How many of a group's last terms are shown, and kept however old they are."""


@dataclass(frozen=True, slots=True)
class PoolKey:
    """Which work pool a group belongs to.

    The `id` differs where two servers have a pool of one `name`, or where it was deleted and made anew.
    Where it is not known, as None, the name decides.
    """

    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A group's token as one node holds it; `term` is the fencing token, which only ever rises."""

    group_id: str
    task_id: str
    term: int


# What a node asks of the database. `sent_at` is its clock before sending.


@dataclass(frozen=True, slots=True)
class Register:
    """Enter the node and its groups, unless another live process uses its name."""

    sent_at: float
    group_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class Pulse:
    """Renew `tokens`, show that the node lives, and look at its groups."""

    sent_at: float
    tokens: tuple[Token, ...]
    group_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class Acquire:
    """Take the tokens of groups, of those that are free."""

    sent_at: float
    group_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Give tokens back."""

    sent_at: float
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Unregister:
    """Remove the node."""

    sent_at: float


Call: TypeAlias = Register | Pulse | Acquire | Release | Unregister


# What it gets to know.


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the database said of one group's token.

    `holder` is empty and `free` true if nobody holds it; `age` is that of the holder's last
    heartbeat, on the database's clock. `renewed` says that this very pulse has renewed it.
    """

    group_id: str
    holder: str
    term: int
    age: float | None
    free: bool
    renewed: bool = False
    resign_requested: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """What was asked is done: the node is entered or removed, or the tokens are released."""


@dataclass(frozen=True, slots=True)
class PulseAnswer:
    """The sightings of all groups that have a token.

    `registered` is false if another process has taken the node's name.
    """

    registered: bool
    sightings: tuple[Sighting, ...] = ()


@dataclass(frozen=True, slots=True)
class Taken:
    """A group whose token was free, and why; the node has it now, in a new term."""

    group_id: str
    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class Acquired:
    """The tokens that were free.

    `since` is the node's clock just before their first heartbeats were sent.
    """

    taken: tuple[Taken, ...] = ()
    since: float = field(default=0.0, compare=False)


Answer: TypeAlias = Done | PulseAnswer | Acquired


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The database has answered a call."""

    call: Call
    answer: Answer


@dataclass(frozen=True, slots=True)
class Failed:
    """A call had no answer; whether it took effect is unknown.

    `duplicate_age` is set if the node's name is used by another process, that many seconds after
    that one's last sign of life.
    """

    call: Call
    reason: str
    duplicate_age: float | None = None


@dataclass(frozen=True, slots=True)
class Hint:
    """Something may have changed about a group: look now instead of later."""

    group_id: str


@dataclass(frozen=True, slots=True)
class Joined:
    """The node stands by for exactly these groups from now on; `why` is the reason why it leaves others."""

    group_ids: frozenset[str]
    why: str = NOT_ASKED_FOR


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """The node's runs of a group have ended; leave the token to another node."""

    group_id: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The node's runs have ended; release everything and stop."""


Event: TypeAlias = TimePassed | Answered | Failed | Hint | Joined | ReleaseAsked | StopAsked


# What it must do.


@dataclass(frozen=True, slots=True)
class Send:
    """Make a call; no other is under way."""

    call: Call


@dataclass(frozen=True, slots=True)
class Abandon:
    """Break off a call that takes too long; it ends by `Failed` or, still, `Answered`."""

    call: Call


@dataclass(frozen=True, slots=True)
class Gained:
    """The node is active; trust the token until the deadline."""

    token: Token
    deadline: float
    reason: str


@dataclass(frozen=True, slots=True)
class Extended:
    """Trust the token until a later deadline."""

    token: Token
    deadline: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The node is not active any more: stop its runs now. `asked` if it gave the token up."""

    token: Token
    reason: str
    asked: bool = False


@dataclass(frozen=True, slots=True)
class ResignAsked:
    """Somebody asks the node to hand over: drain, then answer with `ReleaseAsked`."""

    token: Token


@dataclass(frozen=True, slots=True)
class Refused:
    """Another live process uses the node's name: this one can never be active."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """Everything is released, or has been given up: the node is done."""


Action: TypeAlias = Send | Abandon | Gained | Extended | Lost | ResignAsked | Refused | Stopped
