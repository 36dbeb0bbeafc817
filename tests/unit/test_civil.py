"""Civil times, offsets, and every form an instant may be given in."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from zoneinfo import ZoneInfo

import pendulum
import pytest
from pydantic import TypeAdapter, ValidationError

from taskadapter.declare.civil import Civil, Instant, ZoneOffset
from taskadapter.errors import DeclarationError, TaskError

INSTANT = TypeAdapter(Instant)


def civil(**changes):
    """The time of the module's documentation, with changes."""
    fields = {"year": 2021, "month": 4, "day": 13, "hour": 4, "minute": 50, "second": 50.52}
    return Civil(**(fields | changes))


def berlin(month, day, hour, minute=0, **changes):
    return civil(
        year=2024,
        month=month,
        day=day,
        hour=hour,
        minute=minute,
        second=0,
        **({"time_abbrev": "Europe/Berlin"} | changes),
    )


def message(call, *args, **kwargs):
    with pytest.raises(DeclarationError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_named_zone():
    """A civil time in an IANA zone is that moment, in that zone, to the fraction of the second."""
    moment = civil(time_abbrev="Asia/Colombo", utc_offset=ZoneOffset(hours=5, minutes=30))
    actual = moment.to_datetime()
    assert isinstance(actual, pendulum.DateTime)
    assert actual == datetime(2021, 4, 12, 23, 20, 50, 520000, tzinfo=UTC)
    assert actual.timezone_name == "Asia/Colombo"
    assert actual.isoformat() == "2021-04-13T04:50:50.520000+05:30"


@pytest.mark.parametrize(
    ("zone", "hour_in_utc"),
    [("Z", 4), ("UTC", 4), ("+02:00", 2), ("-03:00", 7), ("+00:00", 4), ("Africa/Lagos", 3)],
)
def test_time_abbrev_forms(zone, hour_in_utc):
    """time_abbrev is Z, UTC, an offset or an IANA zone."""
    assert civil(time_abbrev=zone).to_datetime().in_timezone("UTC").hour == hour_in_utc


def test_offset_alone():
    """An offset alone makes a civil time one moment."""
    actual = civil(utc_offset=ZoneOffset(hours=-3, minutes=-30)).to_datetime()
    assert actual.isoformat() == "2021-04-13T04:50:50.520000-03:30"


@pytest.mark.parametrize("zone", ["IST", "Asia", "../x", "", "asia/colombo", "+18:01", "+05:60", "+5"])
def test_unknown_zone(zone):
    """An unknown zone is refused with the value and the forms that are known."""
    text = message(civil, time_abbrev=zone)
    assert repr(zone) in text
    assert '"Asia/Colombo", "Z", or an offset within 18 hours such as "+05:30"' in text


def test_no_zone():
    """A time without a zone is refused, with both remedies."""
    text = message(civil)
    assert "2021-04-13 04:50:50.520000 has no zone" in text
    assert "add time_abbrev" in text
    assert "or utc_offset" in text


def test_disagreement_names_both():
    """An offset that the zone does not have at that moment is refused, naming both."""
    text = message(civil, time_abbrev="Asia/Colombo", utc_offset=ZoneOffset(hours=5))
    assert "utc_offset +05:00 and time_abbrev 'Asia/Colombo' disagree" in text
    assert "the offset is +05:30" in text
    assert "correct one of them" in text


def test_disagreement_is_judged_at_that_moment():
    """The same offset agrees in winter and disagrees in summer."""
    offset = ZoneOffset(hours=1)
    assert berlin(1, 15, 12, utc_offset=offset).to_datetime().hour == 12
    assert "disagree" in message(berlin, 7, 15, 12, utc_offset=offset)


@pytest.mark.parametrize(("year", "month", "day"), [(2021, 2, 29), (2021, 4, 31), (1900, 2, 29)], ids=str)
def test_date_that_does_not_exist(year, month, day):
    """A day that its month does not have is refused, naming the date."""
    text = message(civil, year=year, month=month, day=day, time_abbrev="Z")
    assert f"{year}-{month:02}-{day:02} does not exist; correct the day" in text


def test_leap_day():
    """29 February of a leap year is a date."""
    assert civil(year=2024, month=2, day=29, time_abbrev="Z").to_datetime().day == 29


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [("month", 1, 12), ("day", 1, 30), ("hour", 0, 23), ("minute", 0, 59), ("year", 1, 9999)],
)
def test_ranges(field, least, most):
    """The first and last value of each field are accepted, their outer neighbours are not."""
    for value in (least, most):
        assert getattr(civil(time_abbrev="Z", **{field: value}), field) == value
    for value in (least - 1, most + 1):
        assert str(value) in message(civil, time_abbrev="Z", **{field: value})


def test_second_range():
    """A second is at least 0 and less than 60; a leap second is refused."""
    assert civil(second=0, time_abbrev="Z").to_datetime().second == 0
    assert civil(second="59.999999", time_abbrev="Z").to_datetime().microsecond == 999999
    assert "second=60: must be less than 60" in message(civil, second=60, time_abbrev="Z")
    assert "second=-1" in message(civil, second=-1, time_abbrev="Z")


def test_second_is_cut_to_microseconds():
    """Digits beyond the microsecond are cut off, never rounded into the next minute."""
    moment = civil(second=Decimal("59.9999999"), time_abbrev="Z")
    assert moment.second == Decimal("59.999999")
    assert moment.to_datetime().minute == 50


@pytest.mark.parametrize("minute", [0, 30, 59])
def test_gap(minute):
    """A time that summer time skips is refused, also with an offset, and the remedy is named."""
    for changes in ({}, {"utc_offset": ZoneOffset(hours=1)}):
        text = message(berlin, 3, 31, 2, minute, **changes)
        assert f"2024-03-31 02:{minute:02}:00 does not exist in Europe/Berlin" in text
        assert "from UTC+01:00 to UTC+02:00" in text
        assert "before or after the gap" in text


def test_around_the_gap():
    """The last minute before the gap and the first after it are one minute apart."""
    before, after = berlin(3, 31, 1, 59).to_datetime(), berlin(3, 31, 3, 0).to_datetime()
    assert after - before == timedelta(minutes=1)


def test_fold_without_offset():
    """A time that occurs twice is refused without an offset, naming the two to choose from."""
    text = message(berlin, 10, 27, 2, 30)
    assert "2024-10-27 02:30:00 occurs twice in Europe/Berlin" in text
    assert "add utc_offset, +02:00 or +01:00" in text


def test_fold_with_offset():
    """In a repeated hour the offset decides; an offset that is neither is refused."""
    summer = berlin(10, 27, 2, 30, utc_offset=ZoneOffset(hours=2)).to_datetime()
    winter = berlin(10, 27, 2, 30, utc_offset=ZoneOffset(hours=1)).to_datetime()
    # Python never calls a time in a repeated hour equal to one of another zone.
    assert summer.timestamp() == datetime(2024, 10, 27, 0, 30, tzinfo=UTC).timestamp()
    assert winter.timestamp() == datetime(2024, 10, 27, 1, 30, tzinfo=UTC).timestamp()
    assert "+02:00 or +01:00" in message(berlin, 10, 27, 2, 30, utc_offset=ZoneOffset(hours=3))


def test_around_the_fold():
    """The minutes next to the repeated hour need no offset."""
    assert berlin(10, 27, 1, 59).to_datetime().utcoffset() == timedelta(hours=2)
    assert berlin(10, 27, 3, 0).to_datetime().utcoffset() == timedelta(hours=1)


def test_out_of_utc_range():
    """A time that UTC cannot express is refused."""
    text = message(civil, year=1, month=1, day=1, time_abbrev="+14:00")
    assert "outside the years 1 to 9999" in text


def test_historic_offset_with_seconds():
    """A zone's offset with seconds is matched by a ZoneOffset with seconds."""
    offset = ZoneOffset(hours=5, minutes=19, seconds=32)
    actual = civil(year=1890, time_abbrev="Asia/Colombo", utc_offset=offset).to_datetime()
    assert actual.utcoffset() == offset.to_timedelta()


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_offset(sign):
    """18 hours are allowed in both directions, a second more is not."""
    assert ZoneOffset(hours=18 * sign).to_timedelta() == sign * timedelta(hours=18)
    text = message(ZoneOffset, hours=18 * sign, seconds=sign)
    assert "must be within 18 hours of UTC" in text
    assert f"hours={18 * sign}" in text
    assert "hours=19" in message(ZoneOffset, hours=19)


def test_offset_shares_one_sign():
    """Hours, minutes and seconds of unlike signs are refused; zeros go with either."""
    assert str(ZoneOffset(hours=0, minutes=-30)) == "-00:30"
    assert str(ZoneOffset(hours=-3, minutes=0, seconds=-5)) == "-03:00:05"
    text = message(ZoneOffset, hours=5, minutes=-30)
    assert "hours=5, minutes=-30, seconds=0 must share one sign" in text


def test_offset_seconds_may_be_a_whole_decimal():
    """Ballerina's 0.0 seconds are 0; a fraction of a second or infinity is refused."""
    assert ZoneOffset(hours=5, minutes=30, seconds=Decimal("0.0")).seconds == 0
    for value in (0.5, float("inf"), float("nan")):
        assert f"seconds={value}: must be a valid integer" in message(ZoneOffset, hours=5, seconds=value)


@pytest.mark.parametrize("field", ["hours", "minutes", "seconds"])
def test_offset_refuses_bool_and_text(field):
    """An offset's numbers are numbers."""
    for value in (True, "1"):
        assert f"{field}={value!r}" in message(ZoneOffset, **({"hours": 1} | {field: value}))


def test_civil_is_frozen():
    """A civil time cannot be changed, and the refusal says so in our own error."""
    moment = civil(time_abbrev="Z")
    with pytest.raises(DeclarationError, match="year cannot be assigned, Civil is frozen"):
        moment.year = 2022


FORMS = [
    Civil(year=2021, month=4, day=13, hour=4, minute=50, second=50, time_abbrev="Asia/Colombo"),
    {
        "year": 2021,
        "month": 4,
        "day": 13,
        "hour": 4,
        "minute": 50,
        "second": 50,
        "utcOffset": {"hours": 5, "minutes": 30},
        "timeAbbrev": "Asia/Colombo",
    },
    datetime(2021, 4, 12, 23, 20, 50, tzinfo=UTC),
    datetime(2021, 4, 13, 4, 50, 50, tzinfo=ZoneInfo("Asia/Colombo")),
    datetime(2021, 4, 13, 4, 50, 50, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    pendulum.datetime(2021, 4, 13, 4, 50, 50, tz="Asia/Colombo"),
    "2021-04-13T04:50:50+05:30",
    "2021-04-12T23:20:50Z",
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_instant_forms(form):
    """Every accepted form yields the same aware pendulum DateTime."""
    actual = INSTANT.validate_python(form)
    assert isinstance(actual, pendulum.DateTime)
    assert actual == datetime(2021, 4, 12, 23, 20, 50, tzinfo=UTC)


def test_instant_keeps_the_zone():
    """A named zone survives, as later computations depend on its rules."""
    actual = INSTANT.validate_python(datetime(2021, 4, 13, tzinfo=ZoneInfo("Asia/Colombo")))
    assert actual.timezone_name == "Asia/Colombo"


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize(("month", "day"), [(3, 31), (10, 27)], ids=["gap", "fold"])
def test_instant_never_shifts(month, day, fold):
    """An aware datetime in a gap or a fold stays the moment that Python means by it."""
    given = datetime(2024, month, day, 2, 30, fold=fold, tzinfo=ZoneInfo("Europe/Berlin"))
    assert INSTANT.validate_python(given).timestamp() == given.timestamp()


@pytest.mark.parametrize(
    "naive",
    [datetime(2021, 4, 13, tzinfo=UTC).replace(tzinfo=None), "2021-04-13T04:50:50", "2021-04-13"],
    ids=str,
)
def test_instant_refuses_naive(naive):
    """A datetime or string without offset is refused with the remedy."""
    with pytest.raises(ValidationError, match=r"has no zone.*add the offset.*or tzinfo"):
        INSTANT.validate_python(naive)


@pytest.mark.parametrize("value", [1618267850, None, True, ""], ids=repr)
def test_instant_refuses_the_rest(value):
    """A number or a text that is no time is refused with the form to use."""
    with pytest.raises(ValidationError, match=r"2021-04-13T04:50:50\+05:30"):
        INSTANT.validate_python(value)


def test_instant_survives_json():
    """In JSON an instant is an ISO 8601 string, which loads as the same moment."""
    moment = INSTANT.validate_python("2021-04-13T04:50:50.520000+05:30")
    text = INSTANT.dump_json(moment)
    assert text == b'"2021-04-13T04:50:50.520000+05:30"'
    assert INSTANT.validate_json(text) == moment


def test_errors_are_one_family():
    """A caller may catch the package's root or ValueError."""
    with pytest.raises(TaskError):
        civil()
    with pytest.raises(ValueError, match="no zone"):
        civil()
