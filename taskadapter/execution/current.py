"""The run that is going on in this process, and what a job may ask of it: `current_run`."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prefect.client.schemas.objects import State

from taskadapter.coordination import executions
from taskadapter.declare.jobs import JobId
from taskadapter.errors import TaskError
from taskadapter.execution import protocol
from taskadapter.execution.assignment import Assignment


@dataclass
class Execution:
    """An assignment on its way through its process; the flow leaves its findings here for the agent.

    Attributes:
        assignment: the run.
        entered: what the ledger has answered, once it has been asked.
        outcome: the name of the state that the body came to, once that is entered.
        untold: the state that it came to, if the API could not be told.
    """

    assignment: Assignment
    entered: executions.Answer | None = None
    outcome: str | None = None
    untold: State[Any] | None = None
    tell: Callable[[protocol.Step], None] = lambda _: None
    """Tells the agent how far the run has come."""
    is_dropped: Callable[[], bool] = lambda: False
    """Returns whether the agent wants the run back, unless its body has begun."""
    ended: str | None = None
    """Why the job is over for all nodes, once it is."""
    has_waited: bool = False
    """Whether it has waited for the database, which is no fault of the job's."""

    @property
    def has_begun(self) -> bool:
        """Whether the body has begun."""
        return isinstance(self.entered, executions.Begun)

    def tell_begun(self) -> None:
        """Tell that the body has begun, or again as soon as it is known that the job is over."""
        self.tell(protocol.Begun(ended=self.ended))


@dataclass(frozen=True)
class CurrentRun:
    """What a running job may know of its run.

    Attributes:
        job_id: the job, None where the flow was called directly.
        scheduled_time: when the tick was due, aware.
        count: how many executions of the job there have been, this one included.
        attempt: 1 for the first attempt of this run, 2 for its first retry.
        group_id: the coordination group, None for an uncoordinated job.
        task_id: the node that runs it, None where the flow was called directly.
        fencing_token: the term of the node's token, None for an uncoordinated job.
    """

    job_id: JobId | None
    scheduled_time: datetime
    count: int
    attempt: int = field(default=1)
    group_id: str | None = None
    task_id: str | None = None
    fencing_token: int | None = None


execution: ContextVar[Execution | None] = ContextVar("execution", default=None)
"""The run that the agent gave to this process, while it lasts."""

running: ContextVar[CurrentRun | None] = ContextVar("running", default=None)
"""The attempt whose body is going on."""


def current_run() -> CurrentRun:
    """Return the run that is going on.

    Raises:
        TaskError: no job is running here.
    """
    run = running.get()
    if run is None:
        raise TaskError(
            "current_run() was called outside a run; call it in execute(), or in a function that a "
            "Listener declares."
        )
    return run
