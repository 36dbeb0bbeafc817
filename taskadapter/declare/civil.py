"""Civil time: a date and a wall clock with the zone they are read in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import ROUND_DOWN, Decimal
from typing import Annotated, Self

import pendulum
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    PlainValidator,
    StrictInt,
    Tag,
    model_validator,
)

from taskadapter.declare.base import Declaration

__all__ = ["Civil", "Instant", "ZoneOffset"]

_LARGEST_OFFSET = timedelta(hours=18)
_MICROSECOND = Decimal("0.000001")
_OFFSET = re.compile(r"([+-])(\d\d):(\d\d)(?::(\d\d))?")


def _whole(value: object) -> object:
    """Ballerina writes the seconds of an offset as a decimal (`0.0`); a fraction has no meaning."""
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


class ZoneOffset(Declaration):
    """How far a local clock is ahead of UTC (positive) or behind it (negative).

    `hours`, `minutes` and `seconds` are whole numbers that share one sign: UTC-03:30 is
    `ZoneOffset(hours=-3, minutes=-30)`. At most 18 hours in either direction.

    Raises:
        DeclarationError: signs differ, or a number is out of range.
    """

    hours: StrictInt = Field(ge=-18, le=18)
    minutes: StrictInt = Field(default=0, ge=-59, le=59)
    seconds: Annotated[StrictInt, Field(ge=-59, le=59), BeforeValidator(_whole)] = 0

    @model_validator(mode="after")
    def _is_one_offset(self) -> Self:
        parts = (self.hours, self.minutes, self.seconds)
        given = f"hours={self.hours}, minutes={self.minutes}, seconds={self.seconds}"
        if min(parts) < 0 < max(parts):
            raise ValueError(f"{given} must share one sign; give all of them the sign of the offset")
        if abs(self.to_timedelta()) > _LARGEST_OFFSET:
            raise ValueError(f"{given} must be within 18 hours of UTC; correct the offset")
        return self

    def to_timedelta(self) -> timedelta:
        """Return local time minus UTC."""
        return timedelta(hours=self.hours, minutes=self.minutes, seconds=self.seconds)

    def __str__(self) -> str:
        return _format_offset(self.to_timedelta())


def _cut_to_microseconds(value: Decimal) -> Decimal:
    return value.quantize(_MICROSECOND, rounding=ROUND_DOWN) if value != int(value) else value


class Civil(Declaration):
    """A moment as people write it: date, wall clock, and zone.

    `second` is a decimal from 0 up to, not including, 60. Fractions are kept to the microsecond;
    further digits are cut off, never rounded up, so that 59.9999999 stays within its minute.

    The zone is `time_abbrev`, `utc_offset` or both, which must then agree at that moment.
    `time_abbrev` is an IANA zone ("Asia/Colombo"), "Z" or "UTC", or an offset ("+05:30"). In the
    hour that a zone repeats when its summer time ends, `utc_offset` says which of the two is meant.

    Raises:
        DeclarationError: no such date, no zone, an unknown zone, a zone and an offset that
            disagree, a time that the zone's clock skips, or, without `utc_offset`, one that it
            shows twice.
    """

    year: StrictInt = Field(ge=1, le=9999)
    month: StrictInt = Field(ge=1, le=12)
    day: StrictInt = Field(ge=1, le=31)
    hour: StrictInt = Field(ge=0, le=23)
    minute: StrictInt = Field(ge=0, le=59)
    second: Annotated[Decimal, Field(ge=0, lt=60), AfterValidator(_cut_to_microseconds)]
    utc_offset: ZoneOffset | None = None
    time_abbrev: str | None = None

    @model_validator(mode="after")
    def _is_one_moment(self) -> Self:
        self.to_datetime()
        return self

    def to_datetime(self) -> pendulum.DateTime:
        """Return the moment, in `time_abbrev`'s zone if there is one, else at `utc_offset`."""
        clock = self._clock()
        if self.time_abbrev is not None:
            zone = _zone(self.time_abbrev)
            offset = self._offset_in(zone, clock)
        elif self.utc_offset is not None:
            offset = self.utc_offset.to_timedelta()
            zone = _fixed(offset)
        else:
            raise ValueError(
                f"{clock} has no zone, so it is not one moment; add time_abbrev, such as "
                '"Asia/Colombo" or "Z", or utc_offset'
            )
        return _in_zone(clock.replace(tzinfo=_fixed(offset)), zone)

    def _clock(self) -> datetime:
        whole = int(self.second)
        micros = int((self.second - whole) / _MICROSECOND)
        try:
            return datetime(  # noqa: DTZ001  what the wall clock shows has no zone yet
                self.year, self.month, self.day, self.hour, self.minute, whole, micros
            )
        except ValueError:
            date = f"{self.year:04}-{self.month:02}-{self.day:02}"
            raise ValueError(f"{date} does not exist; correct the day, month or year") from None

    def _offset_in(self, zone: tzinfo, clock: datetime) -> timedelta:
        """Return the one offset that the zone has at that reading of its clock."""
        earlier, later = (_offset(clock.replace(tzinfo=zone, fold=fold)) for fold in (0, 1))
        if earlier < later:
            raise ValueError(
                f"{clock} does not exist in {self.time_abbrev}, whose clock skips from UTC"
                f"{_format_offset(earlier)} to UTC{_format_offset(later)} then; choose a time "
                "before or after the gap, or give utc_offset alone"
            )
        both = f"{_format_offset(earlier)} or {_format_offset(later)}"
        if self.utc_offset is None:
            if earlier != later:
                raise ValueError(
                    f"{clock} occurs twice in {self.time_abbrev}; add utc_offset, {both}, to choose"
                )
            return earlier
        if self.utc_offset.to_timedelta() not in (earlier, later):
            actual = _format_offset(earlier) if earlier == later else both
            raise ValueError(
                f"utc_offset {self.utc_offset} and time_abbrev {self.time_abbrev!r} disagree: "
                f"there the offset is {actual} at {clock}; correct one of them or leave it out"
            )
        return self.utc_offset.to_timedelta()


def _offset(moment: datetime) -> timedelta:
    return moment.utcoffset() or timedelta(0)


def _format_offset(offset: timedelta) -> str:
    total = int(abs(offset).total_seconds())
    hours, minutes, seconds = total // 3600, total // 60 % 60, total % 60
    sign = "-" if offset < timedelta(0) else "+"
    return f"{sign}{hours:02}:{minutes:02}" + (f":{seconds:02}" if seconds else "")


def _fixed(offset: timedelta) -> pendulum.FixedTimezone:
    return pendulum.FixedTimezone(int(offset.total_seconds()))


def _zone(name: str) -> pendulum.Timezone | pendulum.FixedTimezone:
    if name == "Z":
        return pendulum.UTC
    if match := _OFFSET.fullmatch(name):
        sign, *digits = match.groups(default="0")
        hours, minutes, seconds = (int(sign + part) for part in digits)
        offset = timedelta(hours=hours, minutes=minutes, seconds=seconds)
        if max(abs(minutes), abs(seconds)) < 60 and abs(offset) <= _LARGEST_OFFSET:
            return _fixed(offset)
    try:
        return pendulum.timezone(name)
    except (ValueError, OSError):  # OSError: the name of a directory of zones, such as "Asia"
        raise ValueError(
            f"time_abbrev {name!r} is not a known zone; name an IANA zone such as "
            '"Asia/Colombo", "Z", or an offset within 18 hours such as "+05:30"'
        ) from None


def _in_zone(moment: datetime, zone: pendulum.Timezone | pendulum.FixedTimezone) -> pendulum.DateTime:
    """Convert by way of UTC: pendulum shifts a wall clock that its zone skips."""
    try:
        return pendulum.instance(moment.astimezone(UTC)).in_timezone(zone)
    except OverflowError:
        raise ValueError(f"{moment} is outside the years 1 to 9999 in UTC; choose a nearer time") from None


def _aware(value: object) -> pendulum.DateTime:
    """Read a datetime or an ISO 8601 string that says its offset."""
    moment = _parse(value) if isinstance(value, str) else value
    if not isinstance(moment, datetime):
        raise ValueError(  # noqa: TRY004  Pydantic passes a TypeError through untranslated
            "must be a Civil, an aware datetime, or an ISO 8601 string with its offset, such as "
            '"2021-04-13T04:50:50+05:30"'
        )
    offset = moment.utcoffset()
    if offset is None:
        raise ValueError(
            'has no zone, so it is not one moment; add the offset to the string ("+05:30", "Z") or '
            "tzinfo to the datetime"
        )
    zone = pendulum.instance(moment).timezone
    return _in_zone(moment, zone or _fixed(offset))


def _parse(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError('is not an ISO 8601 time; write it like "2021-04-13T04:50:50+05:30"') from None


def _form(value: object) -> str:
    return "Civil" if isinstance(value, Civil | Mapping) else ""


_AnyForm = Annotated[
    Annotated[Civil, AfterValidator(Civil.to_datetime), Tag("Civil")]
    | Annotated[datetime, PlainValidator(_aware, json_schema_input_type=datetime), Tag("")],
    Discriminator(_form),
    PlainSerializer(pendulum.DateTime.isoformat, return_type=str, when_used="json"),
]

Instant = Annotated[
    pendulum.DateTime,
    GetPydanticSchema(lambda _source, handler: handler.generate_schema(_AnyForm)),
]
"""A field's type: an aware moment, always a `pendulum.DateTime` once it is validated.

Accepts a `Civil`, a mapping in Civil's form, any aware datetime, or an ISO 8601 string with its
offset. A datetime or string without one is refused. In JSON it is an ISO 8601 string.
"""
