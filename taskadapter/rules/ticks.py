"""From a trigger to Prefect's terms, and back to a verdict on each tick: pure functions.

Prefect knows a phase (``anchor_date``) and an interval. It does not know a start, an end or a count;
the agent adds them, tick by tick, with `judge`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.states import Cancelled

from taskadapter.declare.triggers import ErrorPolicy, TriggerConfiguration, WaitingPolicy
from taskadapter.errors import DeclarationError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

ONE_TIME = 100 * 365 * 86400.0
"""The interval of a one-time job, in seconds: a century, so that no next tick ever limits its retries."""

ONCE = "once"
"""What the tick of a one-time job is of, in the place of a schedule's id."""

# Prefect's scheduler visits a new deployment within 5 s (its loop for recent deployments) and plans no
# tick that has passed by then: a first tick "at once" is put far enough ahead to be planned.
FIRST_TICK_LEAD = timedelta(seconds=10)


WAITING_TIME = 5.0
"""Seconds that a tick may be late before a policy that ignores late ones skips it, unless configured."""

_TICK = "scheduled"


class Verdict(Enum):
    """What becomes of a tick."""

    RUN = "run"
    EARLY = "early"
    END = "end"
    SKIP = "skip"


@dataclass(frozen=True)
class Judgement:
    """A verdict and, unless the tick runs, its reason in words for the UI."""

    verdict: Verdict
    reason: str = ""


COUNTED_BY = ("interval", "max_count", "start_time", "end_time")
"""The fields of a trigger with which its executions are counted: others may change."""


def slug(trigger: TriggerConfiguration) -> str:
    """Name the trigger's schedule, readable and unique to its content.

    The same declaration has the same slug on every deploy, so Prefect leaves its schedule as it is,
    paused or not, and its count goes on. Another interval, start, end or maximum is another slug: a new
    schedule, counted from one.
    """
    content = [getattr(trigger, name) for name in COUNTED_BY]
    digest = hashlib.sha256(repr(tuple(map(_canonical, content))).encode()).hexdigest()[:8]
    times = "" if trigger.max_count == -1 else f"-{trigger.max_count}-times"
    return f"every-{trigger.interval:g}s{times}-{digest}".replace(".", "-").replace("+", "")


def is_slug(text: str | None) -> bool:
    """Return whether a schedule's slug is one that `slug` makes, and not one that a user gave."""
    return text is not None and re.fullmatch(r"every-.+s(-\d+-times)?-[0-9a-f]{8}", text) is not None


def _canonical(value: object) -> object:
    return value.timestamp() if isinstance(value, datetime) else value


def schedule(trigger: TriggerConfiguration, anchor: datetime | str) -> dict[str, Any]:
    """Return the schedule in the form of ``prefect.yaml``.

    Args:
        trigger: what was declared.
        anchor: the moment of tick 0, or a template that a build step fills in.
    """
    return {
        "interval": trigger.interval,
        "anchor_date": anchor.isoformat() if isinstance(anchor, datetime) else anchor,
        "timezone": "UTC",
        "slug": slug(trigger),
    }


def tick_key(deployment_id: UUID, schedule_id: UUID | str, due: datetime) -> str:
    """Return the idempotency key by which Prefect's scheduler knows the run of a tick.

    Whoever is first to make a run with it makes the only one. A schedule of Prefect's is named by its
    id; a one-time job has none, and "once" in its place.

    Args:
        deployment_id: the job.
        schedule_id: what the tick is of.
        due: the tick's scheduled time, aware.
    """
    return f"{_TICK} {deployment_id} {schedule_id} {due.astimezone(UTC).isoformat(sep=' ')}"


def is_of(flow_run: FlowRun, schedule_id: UUID) -> bool:
    """Return whether a run is one of a schedule's, as its key says."""
    key = flow_run.idempotency_key or ""
    return key.startswith(f"{_TICK} {flow_run.deployment_id} {schedule_id} ")


def run_name(job: str, due: datetime) -> str:
    """Return the name that the run of a tick shows in the UI, in logs and in notifications.

    Args:
        job: the deployment's name.
        due: the tick's time, aware.
    """
    due = in_utc(due)
    moment = due.isoformat(timespec="milliseconds" if due.microsecond else "seconds")
    return f"{job} {moment.removesuffix('+00:00')}Z"


def is_tick(flow_run: FlowRun) -> bool:
    """Return whether a run is a tick of its job's trigger, and not one that somebody asks for."""
    planned = flow_run.auto_scheduled or (flow_run.idempotency_key or "").startswith(f"{_TICK} ")
    return planned and not is_retry(flow_run)


def tick_of(flow_run: FlowRun) -> datetime | None:
    """Return the moment of the tick that a run is of; None for a run that somebody asks for.

    Its key says so, whenever the run itself is to start by now.
    """
    if not is_tick(flow_run):
        return None
    parts = (flow_run.idempotency_key or "").split(" ", 3)
    if len(parts) == len((_TICK, "job", "schedule", "due")):
        with suppress(ValueError):
            return in_utc(datetime.fromisoformat(parts[-1]))
    due = flow_run.expected_start_time
    return None if due is None else in_utc(due)


def is_retry(flow_run: FlowRun) -> bool:
    """Return whether somebody asks for a run that has ended, as with the UI's "Retry"."""
    return flow_run.empirical_policy.retry_type == "reschedule"


def check_interval(interval: float, *, max_runs: int, loop_seconds: float) -> None:
    """Refuse an interval that Prefect's scheduler would leave holes in.

    Args:
        interval: seconds between two ticks.
        max_runs: how many runs the scheduler plans at a time for one schedule.
        loop_seconds: seconds between two of its visits.

    Raises:
        DeclarationError: the runs planned at one visit do not reach to the next.
    """
    least = loop_seconds / max_runs
    if interval < least:
        raise DeclarationError(
            f"interval {interval:g} s is shorter than Prefect's scheduler can fill: it plans "
            f"{max_runs} runs every {loop_seconds:g} s, so {least:g} s is the least. Use a longer "
            "interval, or raise PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS on the server and here."
        )


def in_utc(moment: datetime) -> datetime:
    """Return a moment as a plain datetime in UTC.

    What Prefect's client returns are pendulum's, which lose their zone in arithmetic once they are in
    the standard library's UTC.
    """
    utc = moment.astimezone(UTC)
    return datetime.combine(utc.date(), utc.timetz())


def between(anchor: datetime, interval: float, *, after: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the moments of a schedule's ticks later than ``after`` and not later than ``until``.

    Tick *n* is at ``anchor + n * interval``, from n = 0; nothing accumulates.
    """
    anchor, after = in_utc(anchor), in_utc(after)
    step = timedelta(seconds=interval)
    number = max(0, (after - anchor) // step + 1)
    while (tick := anchor + number * step) <= until:
        yield tick
        number += 1


def is_on(anchor: datetime, interval: float, moment: datetime) -> bool:
    """Return whether a moment is one of a schedule's ticks, be it written a millisecond apart."""
    since, step = in_utc(moment) - in_utc(anchor), timedelta(seconds=interval)
    return abs(since - round(since / step) * step) <= timedelta(milliseconds=1)


def judge(
    trigger: TriggerConfiguration,
    due: datetime,
    *,
    now: datetime | None = None,
    waiting_time: float = WAITING_TIME,
    paused: bool = False,
    begun: bool = False,
) -> Judgement:
    """Decide what becomes of the tick that is due at ``due``.

    Args:
        trigger: the job's trigger as deployed.
        due: the tick's scheduled time, aware.
        now: when it could start; None for on time.
        waiting_time: seconds after which a tick is too late for the waiting policies that ignore it.
        paused: whether the job was paused when it was due: then those policies ignore it, late or not.
        begun: whether it may have begun before, on a node that was lost: then it was not too late, and the
            ledger is to say.

    Returns:
        EARLY for what Prefect planned before ``start_time`` (no tick of the job: it leaves no trace);
        END, with the reason, after ``end_time``; SKIP, with the reason, when it is too late for the
        policy; else RUN.
    """
    if trigger.start_time is not None and due < trigger.start_time:
        return Judgement(Verdict.EARLY, f"before the start, {trigger.start_time.isoformat()}")
    if trigger.end_time is not None and due > trigger.end_time:
        return Judgement(Verdict.END, ended_at(trigger.end_time))
    policy, late = trigger.policy.waiting_policy, (now - due).total_seconds() if now else 0.0
    if policy is WaitingPolicy.WAIT or begun:
        return Judgement(Verdict.RUN)
    if paused:
        return Judgement(Verdict.SKIP, f"the job was paused then, and {policy} makes up for nothing")
    if late > waiting_time:
        reason = f"it could start {late:.1f} s late, and {policy} allows {waiting_time:g} s"
        return Judgement(Verdict.SKIP, reason)
    return Judgement(Verdict.RUN)


def skipped(reason: str) -> State[Any]:
    """Return the state of a tick that is not run: never a failure."""
    return Cancelled(name="Skipped", message=f"Skipped: {reason}.")


def ended_at(end_time: datetime) -> str:
    """Say that the job's time has passed."""
    return f"the schedule ended at {end_time.isoformat()}"


def ended_by(number: int, policy: ErrorPolicy, *, is_tick: bool) -> str | None:
    """Return why a job is over whose run has failed; None where it goes on.

    Args:
        number: which run of the job it was.
        policy: the job's.
        is_tick: whether it was one: what somebody has asked for ends nothing.
    """
    is_end = policy in {ErrorPolicy.LOG_AND_TERMINATE, ErrorPolicy.TERMINATE}
    return failed(number, policy) if is_end and is_tick else None


def failed(number: int, policy: str) -> str:
    """Say that the job ends with a run that has failed, as its error policy says."""
    return f"run {number} failed, and the error policy is {policy}"


def is_failure(reason: str) -> bool:
    """Return whether it is one of those that `failed` says."""
    return re.fullmatch(r"run \d+ failed, and the error policy is \w+", reason) is not None


def exhausted(max_count: int) -> str:
    """Say that the job has had its runs."""
    return f"the maximum of {max_count} run{'s' if max_count != 1 else ''} is reached"
