"""What an agent and the process of a run say to each other: a message a line, as JSON, over a socket.

The agent gives an `Order`. The process answers with `Report`s: `Ready`, some `Step`s and an `End`. The
nursery, which makes the processes at the agent's `Request`, tells it its `Notice`s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect.client.schemas.objects import State
from pydantic import BaseModel, Field, PlainSerializer, SecretStr, TypeAdapter, field_serializer

from taskadapter.errors import printable
from taskadapter.execution.assignment import Assignment

Text = Annotated[str, PlainSerializer(printable)]
"""What a process has from its job's code, which may hold what JSON cannot."""


class Message(BaseModel, frozen=True):
    """Something that is said; `kind` tells one from another."""

    def line(self) -> bytes:
        """Return it as it is sent."""
        return self.model_dump_json().encode() + b"\n"


# --- from the agent to a process ------------------------------------------------------------------


class Run(Message, frozen=True):
    """Load the flow of an assignment, wait for its moment and its turn, and run it."""

    kind: Literal["run"] = "run"
    assignment: Assignment


class RunHooks(Message, frozen=True):
    """Run the hooks for the state of a run whose own process is gone."""

    kind: Literal["run hooks"] = "run hooks"
    assignment: Assignment
    state: State[Any]


class Go(Message, frozen=True):
    """It is the run's turn: its body begins as soon as its moment has come."""

    kind: Literal["go"] = "go"


class Drop(Message, frozen=True):
    """Give the run back, if it still waits for its moment or its turn."""

    kind: Literal["drop"] = "drop"


class Cancel(Message, frozen=True):
    """Somebody has cancelled the run: its flow can clean up."""

    kind: Literal["cancel"] = "cancel"


class Stop(Message, frozen=True):
    """A signal that the process gets now is meant for it."""

    kind: Literal["stop"] = "stop"


Order = Run | RunHooks | Go | Drop | Cancel | Stop


# --- from a process to the agent ------------------------------------------------------------------


class Ready(Message, frozen=True):
    """The process, or the interpreter that it has become, knows nothing yet and listens."""

    kind: Literal["ready"] = "ready"
    pid: int


class Unforked(Message, frozen=True):
    """There is no process: the nursery says it in its place, and why."""

    kind: Literal["unforked"] = "unforked"
    fault: Text


class Loaded(Message, frozen=True):
    """The run's code is loaded; it took so many seconds."""

    kind: Literal["loaded"] = "loaded"
    seconds: float


class Started(Message, frozen=True):
    """The run's moment and its turn have come."""

    kind: Literal["started"] = "started"


class Begun(Message, frozen=True):
    """The body has begun; `ended` is why the job is over for all nodes, once it is."""

    kind: Literal["begun"] = "begun"
    ended: str | None = None


class Waits(Message, frozen=True):
    """For so many seconds the database has failed it; another node might be able to go on."""

    kind: Literal["waits"] = "waits"
    fault: Text
    seconds: float


class Unentered(Message, frozen=True):
    """For long the database has failed it, which is to enter what its body came to; as `executions.End`."""

    kind: Literal["unentered"] = "unentered"
    fault: Text
    outcome: str
    state: dict[str, Any] | None = None
    ends: Text | None = None


class Answered(Message, frozen=True):
    """It need not wait any more."""

    kind: Literal["answered"] = "answered"


class Settled(Message, frozen=True):
    """The ledger has what its body came to: what is left is to tell Prefect, and its hooks."""

    kind: Literal["settled"] = "settled"


class Hook(Message, frozen=True):
    """A hook for the run's end is called; without a name: it has returned."""

    kind: Literal["hook"] = "hook"
    name: Text | None = None


Step = Loaded | Started | Begun | Waits | Unentered | Answered | Settled | Hook


class Told(Message, frozen=True):
    """It is over, and Prefect knows how; `ended` as in `Begun`."""

    kind: Literal["told"] = "told"
    ended: str | None = None


class Untold(Message, frozen=True):
    """It is over, and the ledger says how; `ended` as in `Begun`, `in_doubt` as in `Dropped`."""

    kind: Literal["untold"] = "untold"
    ended: str | None = None
    in_doubt: bool = False


class Dropped(Message, frozen=True):
    """Its body has not begun, as the agent wished; `in_doubt` is whether the ledger may say that it has."""

    kind: Literal["dropped"] = "dropped"
    in_doubt: bool = False


class Paused(Message, frozen=True):
    """Its body has not begun: the job is paused."""

    kind: Literal["paused"] = "paused"


class Skipped(Message, frozen=True):
    """Its body is not to begin, for a reason; `ended` as in `Begun`."""

    kind: Literal["skipped"] = "skipped"
    reason: str
    ended: str | None = None


class Crashed(Message, frozen=True):
    """It is over without an end, and that is the flow's own fault; its body need not have been reached."""

    kind: Literal["crashed"] = "crashed"
    fault: Text


class Unloadable(Message, frozen=True):
    """Its code could not be loaded here, for a reason; another node may have a copy that can be."""

    kind: Literal["unloadable"] = "unloadable"
    fault: Text
    waits: bool = False
    """Whether it is a tick whose code is not here, which is no fault of its job's: it waits for that."""


End = Told | Untold | Dropped | Paused | Skipped | Crashed | Unloadable
"""The last that a process says; one that is killed says none."""

Report = Ready | Step | End


# --- between the nursery and its agent ----------------------------------------------------------------


class Fork(Message, frozen=True):
    """Fork a process, which speaks through the socket that comes with this; no other has its number."""

    kind: Literal["fork"] = "fork"
    number: int


class Connect(Message, frozen=True):
    """Runs are to use this database: learn once what each of them would."""

    kind: Literal["connect"] = "connect"
    database_url: SecretStr

    @field_serializer("database_url", when_used="json")
    def _reveal(self, value: SecretStr) -> str:
        return value.get_secret_value()


Request = Fork | Connect


class Serving(Message, frozen=True):
    """All is imported that runs need."""

    kind: Literal["serving"] = "serving"


class Refused(Message, frozen=True):
    """What is to be preloaded cannot be."""

    kind: Literal["refused"] = "refused"
    reason: Text


class Gone(Message, frozen=True):
    """The process of a request has ended, with an exit status; the commands that it left are ended too."""

    kind: Literal["gone"] = "gone"
    number: int
    exit_code: int
    left: tuple[Text, ...] = ()


Notice = Serving | Refused | Gone

_ORDER: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])
_REPORT: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])
_FIRST: TypeAdapter[Ready | Unforked] = TypeAdapter(
    Annotated[Ready | Unforked, Field(discriminator="kind")]
)
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_NOTICE: TypeAdapter[Notice] = TypeAdapter(Annotated[Notice, Field(discriminator="kind")])


def order(line: str | bytes) -> Order:
    """Return what an agent has said.

    Raises:
        ValidationError: it makes no sense.
    """
    return _ORDER.validate_json(line)


def report(line: bytes) -> Report:
    """Return what a process has said.

    Raises:
        ValidationError: it makes no sense.
    """
    return _REPORT.validate_json(line)


def first(line: bytes) -> Ready | Unforked:
    """Return the first that a process has said.

    Raises:
        ValidationError: it has said something else.
    """
    return _FIRST.validate_json(line)


def request(line: bytes) -> Request:
    """Return what the agent has said to the nursery.

    Raises:
        ValidationError: it makes no sense.
    """
    return _REQUEST.validate_json(line)


def notice(line: bytes) -> Notice:
    """Return what the nursery has said.

    Raises:
        ValidationError: it makes no sense.
    """
    return _NOTICE.validate_json(line)
