"""Durations and counts, as a user may give them, and the sentences that refuse others."""

import math
from datetime import timedelta
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, StrictInt

DURATION = "must be a number of seconds or a timedelta; write 2.5 or timedelta(minutes=1)"
DURATION_IN_A_FILE = "must be a number of seconds; write 2.5"
"""The rule of a duration, in a program and in a file."""

MOST = 1_000_000_000
"""More than a job can do in a lifetime, and less than an integer of a database holds."""

LONGEST = timedelta(days=36525)
"""Of any duration: more is no moment any more, to Python or to a database, when it is added to one."""


def _to_seconds(value: object) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(DURATION)  # noqa: TRY004  Pydantic passes a TypeError through untranslated
    try:
        seconds = float(value)
    except (OverflowError, ValueError):  # an int beyond float's range, a signalling NaN
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError("must be a finite number of seconds; choose one")
    return seconds


def positive(seconds: float) -> float:
    """Return a duration that is greater than 0 seconds.

    Raises:
        ValueError: it is not.
    """
    if seconds <= 0:
        raise ValueError("must be greater than 0 seconds; choose a longer time")
    return seconds


def _not_too_long(seconds: float) -> float:
    if seconds > LONGEST.total_seconds():
        raise ValueError("must be at most 100 years (3155760000 seconds); choose a shorter time")
    return seconds


def _at_most(count: int) -> int:
    if count > MOST:
        raise ValueError(f"must be at most {MOST}; choose a smaller number")
    return count


def _not_negative(seconds: float) -> float:
    if seconds < 0:
        raise ValueError("must not be negative; choose 0 or more seconds")
    return seconds


Seconds = Annotated[float, BeforeValidator(_to_seconds)]
"""A finite duration in seconds, given as int, float, Decimal or timedelta and kept as float."""

PositiveSeconds = Annotated[Seconds, AfterValidator(positive), AfterValidator(_not_too_long)]
"""`Seconds` greater than 0, and at most 100 years."""

NonNegativeSeconds = Annotated[Seconds, AfterValidator(_not_negative), AfterValidator(_not_too_long)]
"""`Seconds` of 0 or more, and at most 100 years."""

Count = Annotated[StrictInt, AfterValidator(_at_most)]
"""A whole number that a database can hold."""
