"""The run that is going on in this process, and what a job may ask of it: `current_run`."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    in_doubt: bool = False
    """Whether the ledger may have it as begun, though its body has not: the answer was lost, or late."""

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


@contextmanager
def in_body() -> Iterator[None]:
    """Have a run's body leave what its end needs, where it ends.

    A child that it has forked ends where it comes out: it would enter the end of the run, which goes on in
    the process that has begun it. And the body may have left as many files open as it was allowed.
    """
    process, status = os.getpid(), 1
    try:
        yield
        status = 0
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        raise
    except BaseException:
        if os.getpid() != process:
            traceback.print_exc()  # as a child's that is no run
        raise
    finally:
        if os.getpid() != process and execution.get() is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(status)
        if execution.get() is not None:
            _let_open_more()


def _let_open_more() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
