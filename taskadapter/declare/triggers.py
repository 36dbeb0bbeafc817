"""What a user declares about a job: its trigger, its retries, and what an error means."""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

import pendulum
from pydantic import AfterValidator, model_validator

from taskadapter.declare.base import Declaration
from taskadapter.declare.civil import Instant
from taskadapter.declare.values import (
    LONGEST,
    Count,
    NonNegativeSeconds,
    PositiveSeconds,
    Seconds,
    positive,
)

_LATEST_START = 9600
"""A year: Prefect's scheduler plans three ticks ahead, and fails at one beyond the year 9999."""


def _interval(seconds: float) -> float:
    if seconds > LONGEST.total_seconds():
        raise ValueError(
            "must be at most 100 years (3155760000 seconds); choose a shorter time, and max_count=1 for a "
            "job that runs once"
        )
    return seconds


def _start(when: pendulum.DateTime) -> pendulum.DateTime:
    if when.year >= _LATEST_START:
        raise ValueError(f"must be before the year {_LATEST_START}; choose a nearer time")
    return when


def _max_count(count: int) -> int:
    if count == 0:
        raise ValueError("a job that runs 0 times never runs; choose at least 1, or -1 for no limit")
    if count < -1:
        raise ValueError("must be at least 1, or -1 for no limit; choose one of these")
    return count


def _max_attempts(count: int) -> int:
    if count < 1:
        raise ValueError("must be at least 1; raise it, or declare no retries at all")
    return count


def _worker_count(count: int) -> int:
    if count < 1:
        raise ValueError("must be at least 1, or nothing runs; raise it")
    return count


def _max_concurrent(count: int) -> int:
    if count < 1:
        raise ValueError("must be at least 1; raise it, or leave it out for no limit")
    return count


class RetryStrategy(StrEnum):
    """How the wait between attempts grows."""

    FIXED = "FIXED"
    """Every wait is `retry_interval`."""
    EXPONENTIAL = "EXPONENTIAL"
    """The first wait is `retry_interval`; each further one is twice the one before."""


class ErrorPolicy(StrEnum):
    """What becomes of a job whose last attempt has failed."""

    LOG_AND_TERMINATE = "LOG_AND_TERMINATE"
    """Log the error and end the job, for all nodes."""
    TERMINATE = "TERMINATE"
    """End the job, for all nodes, without a log line of ours."""
    LOG_AND_CONTINUE = "LOG_AND_CONTINUE"
    """Log the error; the next tick runs as usual."""
    CONTINUE = "CONTINUE"
    """The next tick runs as usual."""


class WaitingPolicy(StrEnum):
    """What becomes of a tick that could not start in time."""

    WAIT = "WAIT"
    """Run it as soon as possible; none is lost."""
    IGNORE = "IGNORE"
    """Skip it."""
    LOG_AND_IGNORE = "LOG_AND_IGNORE"
    """Skip it and log that."""


class RetryConfiguration(Declaration):
    """Further attempts after a failed one.

    `max_attempts` is how many there may be besides the first. Before each passes `retry_interval`
    seconds (FIXED) or a wait that doubles from it (EXPONENTIAL: 1, 2, 4, ... for an interval of 1),
    never longer than `max_interval` seconds; None sets no such limit.

    Raises:
        DeclarationError: fewer than one attempt, an interval that is not positive, or a
            `max_interval` shorter than `retry_interval`.
    """

    max_attempts: Annotated[Count, AfterValidator(_max_attempts)]
    retry_interval: PositiveSeconds
    backoff_strategy: RetryStrategy = RetryStrategy.FIXED
    max_interval: PositiveSeconds | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_interval is not None and self.max_interval < self.retry_interval:
            raise ValueError(
                f"max_interval={self.max_interval:g} must not be shorter than "
                f"retry_interval={self.retry_interval:g}; raise max_interval or leave it out"
            )
        return self


class TaskPolicy(Declaration):
    """What to do when a job fails, when a tick is late, and when ticks overlap.

    `max_concurrent` is how many runs of the job may overlap; None leaves that to the number of
    workers.

    The other two are for jobs of a group. `on_takeover` is what becomes of a run whose node died
    while it executed: `"crash"` leaves it at that, so that a tick starts at most once; `"rerun"` runs
    it again. `on_token_loss` is what a node that has lost the token does with its runs: `"stop"` ends
    them before another node may start one; `"finish"` lets them end, beside the other node's.

    Raises:
        DeclarationError: an unknown policy, or a `max_concurrent` below 1.
    """

    error_policy: ErrorPolicy = ErrorPolicy.LOG_AND_TERMINATE
    waiting_policy: WaitingPolicy = WaitingPolicy.WAIT
    max_concurrent: Annotated[Count, AfterValidator(_max_concurrent)] | None = None
    on_takeover: Literal["crash", "rerun"] = "crash"
    on_token_loss: Literal["stop", "finish"] = "stop"


class TriggerConfiguration(Declaration):
    """When a job runs.

    Every `interval` seconds from `start_time` (None: at once) until `end_time` (None: no end), at
    most `max_count` times (-1: no limit). `task_policy` and `retry_config` may stand here or in the
    `Listener`.

    The shortest interval depends on the settings of Prefect's scheduler and is checked when the job
    is scheduled.

    Raises:
        DeclarationError: an interval that is not positive or longer than 100 years, a count of 0 or
            below -1, a time without a zone, a start after the year 9599, or an end that is not after the
            start.
    """

    interval: Annotated[Seconds, AfterValidator(positive), AfterValidator(_interval)]
    max_count: Annotated[Count, AfterValidator(_max_count)] = -1
    start_time: Annotated[Instant, AfterValidator(_start)] | None = None
    end_time: Instant | None = None
    task_policy: TaskPolicy | None = None
    retry_config: RetryConfiguration | None = None

    @property
    def policy(self) -> TaskPolicy:
        """The declared policy, or the default one."""
        return self.task_policy or TaskPolicy()

    @model_validator(mode="after")
    def _ends_after_start(self) -> Self:
        start, end = self.start_time, self.end_time
        if start is None or end is None:
            return self
        # In UTC: within one zone Python compares the wall clocks, which repeat an hour each year.
        if end.in_timezone("UTC") <= start.in_timezone("UTC"):
            raise ValueError(
                f"end_time={end.isoformat()} must be after start_time={start.isoformat()}; "
                "choose a later end_time or leave it out"
            )
        return self


class WorkerPoolConfiguration(Declaration):
    """How much each node of a work pool runs at once.

    `worker_count` is the number of runs; `waiting_time` is how long after its time a tick is not yet
    late, in seconds.

    Raises:
        DeclarationError: a count below 1, or a negative time.
    """

    called: ClassVar[str | None] = "configure_worker_pool"

    worker_count: Annotated[Count, AfterValidator(_worker_count)] = 5
    waiting_time: NonNegativeSeconds = 5.0
