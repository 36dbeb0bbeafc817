"""When a failed attempt is tried again: a pure rule over numbers.

Prefect retries a flow after one fixed delay of whole seconds. Ballerina's ``retryConfig`` asks for
fractions, for a backoff, and for no attempt that would reach into the next tick; so the attempts are
made inside the flow run, and this module says when.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from taskadapter.declare.triggers import RetryConfiguration, RetryStrategy


def backoff(retry: RetryConfiguration, attempt: int) -> float:
    """Return the seconds to wait after attempt number ``attempt`` has failed (1 is the first).

    FIXED waits ``retry_interval`` each time; EXPONENTIAL waits ``retry_interval * 2 ** (attempt - 1)``.
    Neither waits longer than ``max_interval``. From 1 s with ``max_interval=5``: 1, 2, 4, 5, 5.
    """
    wait = retry.retry_interval
    if retry.backoff_strategy is RetryStrategy.EXPONENTIAL:
        # 2.0 ** 1024 overflows; no wait that long is ever made.
        wait *= 2.0 ** min(attempt - 1, 1000)
    return wait if retry.max_interval is None else min(wait, retry.max_interval)


def wait_before_retry(
    retry: RetryConfiguration | None, *, attempt: int, interval: float, elapsed: float
) -> float | None:
    """Return the seconds to wait before the next attempt, or None when none is made.

    Args:
        retry: the job's policy; None makes one attempt only.
        attempt: how many attempts have failed, at least 1.
        interval: seconds between two ticks of the job.
        elapsed: seconds since this tick (see `window_start`).

    No attempt is made beyond ``max_attempts`` further ones, nor when it would start at or after the
    next tick, nor at all when ``retry_interval`` is not shorter than the interval.
    """
    if retry is None or attempt > retry.max_attempts or retry.retry_interval >= interval:
        return None
    wait = backoff(retry, attempt)
    return wait if elapsed + wait < interval else None


def window_start(due: datetime, started: datetime, interval: float) -> datetime:
    """Return the moment from which a tick's retry window of one interval counts.

    It is the tick's due time. A tick that starts when its next one is due already (it was waiting out
    an outage) has its window from its own start: it would have no retries otherwise.
    """
    return due if started - due < timedelta(seconds=interval) else started
