"""When a failed attempt is tried again: the worked examples of the semantics, and each boundary."""

import math
from datetime import UTC, datetime, timedelta

import pytest

from taskadapter.declare.triggers import RetryConfiguration, RetryStrategy
from taskadapter.rules.retries import backoff, wait_before_retry, window_start

DUE = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def retry(max_attempts=5, retry_interval=1.0, **more):
    return RetryConfiguration(max_attempts=max_attempts, retry_interval=retry_interval, **more)


def exponential(max_attempts=10, retry_interval=1.0, **more):
    return retry(max_attempts, retry_interval, backoff_strategy=RetryStrategy.EXPONENTIAL, **more)


def executions(policy, interval, *, lasting=0.0):
    """Return the moments, in seconds since the tick, at which its failing attempts start."""
    starts = [0.0]
    while True:
        failed = starts[-1] + lasting
        wait = wait_before_retry(policy, attempt=len(starts), interval=interval, elapsed=failed)
        if wait is None:
            return starts
        starts.append(failed + wait)


# --- backoff --------------------------------------------------------------------------------------


def test_fixed_waits_are_equal():
    """FIXED waits the same time after every attempt."""
    assert [backoff(retry(retry_interval=1.5), n) for n in (1, 2, 3, 50)] == [1.5] * 4


def test_exponential_waits_double():
    """EXPONENTIAL doubles from the retry interval."""
    assert [backoff(exponential(retry_interval=0.5), n) for n in (1, 2, 3, 4)] == [0.5, 1, 2, 4]


def test_max_interval_caps_the_wait():
    """From 1 s with at most 5 s, the waits are 1, 2, 4, 5, 5."""
    capped = exponential(max_interval=5)

    assert [backoff(capped, n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]


@pytest.mark.parametrize(("cap", "third"), [(3.999, 3.999), (4, 4), (4.001, 4)])
def test_both_sides_of_the_cap(cap, third):
    """A cap below the doubled wait takes its place; one above it does not."""
    assert backoff(exponential(max_interval=cap), 3) == third


def test_a_fixed_wait_may_equal_its_cap():
    """FIXED with a cap of its own length waits just that."""
    assert backoff(retry(retry_interval=2, max_interval=2), 7) == 2


@pytest.mark.parametrize("attempt", [1000, 1024, 1025, 10**6, 10**12])
def test_huge_attempt_numbers(attempt):
    """The wait after very many attempts is capped, or astronomic, but always a number."""
    assert backoff(exponential(max_interval=5), attempt) == 5
    assert backoff(exponential(), attempt) > 1e200
    assert not math.isnan(backoff(exponential(retry_interval=3155760000), attempt))


# --- wait_before_retry ----------------------------------------------------------------------------


def test_five_fixed_retries_fit_into_six_seconds():
    """Interval 6 s, five FIXED retries of 1 s: six executions, one a second, and then the next tick."""
    assert executions(retry(max_attempts=5, retry_interval=1), 6) == [0, 1, 2, 3, 4, 5]


def test_more_fixed_retries_do_not_fit():
    """However many retries are allowed, none starts at the next tick."""
    assert executions(retry(max_attempts=100, retry_interval=1), 6) == [0, 1, 2, 3, 4, 5]


def test_exponential_from_one_second_in_six():
    """EXPONENTIAL from 1 s in 6 s gives three executions: at 3 s the wait would be 4 s."""
    assert executions(exponential(retry_interval=1), 6) == [0, 1, 3]


def test_exponential_from_two_seconds_in_twenty():
    """EXPONENTIAL from 2 s in 20 s gives four executions: at 14 s the wait would be 16 s."""
    assert executions(exponential(retry_interval=2), 20) == [0, 2, 6, 14]


def test_exponential_with_a_cap_goes_on():
    """With waits of at most 2 s, EXPONENTIAL from 1 s in 8 s starts at 0, 1, 3, 5 and 7."""
    assert executions(exponential(retry_interval=1, max_interval=2), 8) == [0, 1, 3, 5, 7]


def test_the_attempts_take_time_too():
    """The wait begins when an attempt has failed: attempts of 0.5 s leave room for fewer."""
    assert executions(retry(max_attempts=5, retry_interval=1), 6, lasting=0.5) == [0, 1.5, 3, 4.5]


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
def test_max_attempts_are_further_ones(max_attempts):
    """There are as many retries as declared, besides the first execution."""
    assert len(executions(retry(max_attempts=max_attempts), 1000)) == 1 + max_attempts


@pytest.mark.parametrize(
    ("elapsed", "wait"), [(4.999, 1), (5, None), (5.001, None), (6, None), (1000, None)]
)
def test_no_attempt_starts_at_or_after_the_next_tick(elapsed, wait):
    """With a wait of 1 s in an interval of 6 s the last moment to fail is just before 5 s."""
    assert wait_before_retry(retry(), attempt=1, interval=6, elapsed=elapsed) == wait


@pytest.mark.parametrize(("retry_interval", "wait"), [(5.999, 5.999), (6, None), (6.001, None)])
def test_no_retry_when_it_is_as_long_as_the_interval(retry_interval, wait):
    """A retry interval that is not shorter than the job's makes no retry."""
    policy = retry(retry_interval=retry_interval)

    assert wait_before_retry(policy, attempt=1, interval=6, elapsed=0) == wait


def test_no_retry_of_such_length_even_before_the_tick():
    """That holds too when a clock that was set back says that the tick is not due yet."""
    assert wait_before_retry(retry(retry_interval=6), attempt=1, interval=6, elapsed=-3) is None


@pytest.mark.parametrize("elapsed", [0, 5, 1000])
def test_no_policy_makes_one_attempt(elapsed):
    """Without a retry configuration nothing is tried again."""
    assert wait_before_retry(None, attempt=1, interval=6, elapsed=elapsed) is None


# --- the window of a late tick --------------------------------------------------------------------


@pytest.mark.parametrize("late", [timedelta(0), timedelta(seconds=3), timedelta(seconds=6) - MICROSECOND])
def test_a_tick_in_time_counts_from_its_due_time(late):
    """A tick that starts before the next one is due may be retried until that is due."""
    assert window_start(DUE, DUE + late, 6) == DUE


@pytest.mark.parametrize("late", [timedelta(seconds=6), timedelta(seconds=6.5), timedelta(hours=5)])
def test_a_tick_that_waited_out_an_outage_counts_from_its_start(late):
    """A tick that starts when its next is due, or later, has one interval of its own."""
    assert window_start(DUE, DUE + late, 6) == DUE + late


def test_a_tick_that_starts_early_counts_from_its_due_time():
    """A clock that is a little behind does not lengthen or shorten the window."""
    assert window_start(DUE, DUE - MICROSECOND, 6) == DUE
