"""What the ledger is asked and what it answers: the words, without the database."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Any, TypeAlias

from taskadapter.coordination.messages import Token

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

ABANDONED = "Abandoned"
"""The outcome of an execution that was interrupted, and is to be made again."""

SKIPPED = "Skipped"
"""The outcome of a tick whose body is not to begin: it was too late for its policy, or its job over."""


SWITCHED_OFF = "its schedule was switched off"
"""Why a job is over whose schedule somebody has switched off in Prefect, or an agent at its end."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What is to be executed once.

    Attributes:
        key: what it is an execution of.
        flow_run_id: the flow run in which Prefect shows it.
        job_id: its job; None for a flow run of none.
        due: a tick's time, aware; None for a run that somebody asked for.
    """

    key: str
    flow_run_id: str
    job_id: str | None = None
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """Who executes: a process of a node, with the token of the job's group if it has one."""

    task_id: str
    incarnation: str
    token: Token | None = None

    @property
    def term(self) -> int | None:
        """The term of its token."""
        return None if self.token is None else self.token.term


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tick that begins has to keep to.

    Attributes:
        trigger_slug: names the trigger for which the job's row counts.
        max_count: how many executions that allows; 0 or less is no limit.
        too_late: why its policy does not let it begin any more; what has begun before was not too late.
    """

    trigger_slug: str
    max_count: int = -1
    too_late: str | None = None


@dataclass(frozen=True, slots=True)
class Entered:
    """What is entered of a job's ticks.

    Attributes:
        dues: the times of the last ones that have begun, or are skipped, the newest first.
        opened: since when they are owed: its schedule was switched on again then, or edited; None if since
            that was made.
    """

    dues: Sequence[datetime] = ()
    opened: datetime | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the ledger.

    Attributes:
        key: what it is an execution of.
        flow_run_id: the flow run that was executed.
        job_id: its job.
        due: a tick's time, in UTC as text.
        number: which execution of its trigger a tick was, from 1.
        group_id: the job's group.
        task_id: the node.
        term: of its token.
        incarnation: the node's process.
        outcome: the name of the state that it came to; None while it goes on.
    """

    key: str
    flow_run_id: str
    job_id: str | None
    due: str | None
    number: int | None
    group_id: str | None
    task_id: str
    term: int | None
    incarnation: str
    outcome: str | None

    @property
    def where(self) -> str:
        """Where it was executed, in words."""
        of_term = "" if self.group_id is None else f" in term {self.term} of group {self.group_id!r}"
        return f"on node {self.task_id!r}{of_term}"

    def is_of(self, execution: Execution, owner: Owner) -> bool:
        """Return whether it was entered for this very run, by this owner in its term."""
        made_by = self.flow_run_id, self.incarnation, self.term
        return made_by == (execution.flow_run_id, owner.incarnation, owner.term)


@dataclass(frozen=True, slots=True)
class End:
    """What a body came to.

    Attributes:
        outcome: the name of the state that Prefect is told next.
        state: what it made of its job's state, as JSON values; None leaves that as it is.
        ends: why its job is over, if it is with this execution.
    """

    outcome: str
    state: dict[str, Any] | None = None
    ends: str | None = None


@dataclass(frozen=True, slots=True)
class Past:
    """What the ledger tells of an execution to those who look back.

    Attributes:
        entry: the execution.
        late: seconds after its time that a tick began, by its node's clock.
        age: seconds since it began; None if it was skipped.
        took: seconds from its beginning to its end; None while it goes on.
        reason: why it was skipped.
    """

    entry: Entry
    late: float | None
    age: float | None
    took: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Switches:
    """What Prefect has of a job at one time.

    Attributes:
        paused: whether it is paused.
        on: whether its schedule is switched on.
        plan: that schedule's id, and then what says which its ticks are; empty where it is not known.
    """

    paused: bool = False
    on: bool = True
    plan: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """What Prefect has of a job at one time, and since when.

    Attributes:
        job_id: the job.
        trigger_slug: its trigger.
        switches: whether it is paused, or over, and its plan.
        updated: when any of that was last changed, as text that sorts as time.
    """

    job_id: UUID
    trigger_slug: str
    switches: Switches
    updated: str


@dataclass(frozen=True, slots=True)
class Begun:
    """The body begins now; `number` counts the ticks of a trigger, from 1; None if it is none."""

    number: int | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    """The job is paused: the tick waits."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The tick is too late for its policy."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The trigger allows no further execution."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The body has begun before, here or elsewhere."""

    entry: Entry


Answer: TypeAlias = Begun | Paused | Ended | Skipped | Exhausted | Taken


def tick_key(job_id: str, due: datetime) -> str:
    """Return the key of a job's tick."""
    return f"{job_id} {moment(due)}"


def asked_key(flow_run_id: str, times: int) -> str:
    """Return the key of a flow run that somebody asked for, and that had been run so many times then."""
    return f"{flow_run_id} {times}"


def times_asked(key: str) -> int:
    """Return how many times a flow run had been run whose key `asked_key` has returned."""
    _, _, times = key.partition(" ")
    return int(times or 0)  # the releases before the ledger had the run alone


def moment(when: datetime) -> str:
    """Return an aware moment as the ledger has it: in UTC, of one length, so that texts sort as times."""
    return when.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")
