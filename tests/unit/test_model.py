"""Declarations: what they accept, what they refuse, and how they say so."""

import re
import socket
import traceback
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import SecretStr

from taskadapter.declare.backup import MysqlConfig, PostgresqlConfig, SqliteConfig, WarmBackupConfig
from taskadapter.declare.base import in_our_words
from taskadapter.declare.jobs import Service
from taskadapter.declare.triggers import (
    ErrorPolicy,
    RetryConfiguration,
    RetryStrategy,
    TaskPolicy,
    TriggerConfiguration,
    WaitingPolicy,
)
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.listener import Listener


def message(call, *args, **kwargs):
    with pytest.raises(DeclarationError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


class Stateless(Service):
    def execute(self):
        pass


def retry(**changes):
    return RetryConfiguration(**({"max_attempts": 5, "retry_interval": 1} | changes))


def group(**changes):
    return WarmBackupConfig(**({"group_id": "task-group-01"} | changes))


def test_defaults():
    """Fields left out have Ballerina's defaults."""
    trigger = TriggerConfiguration(interval=2)
    assert trigger.max_count == -1
    assert (trigger.start_time, trigger.end_time) == (None, None)
    assert (trigger.task_policy, trigger.retry_config) == (None, None)
    assert retry().backoff_strategy is RetryStrategy.FIXED
    assert retry().max_interval is None
    policy = TaskPolicy()
    assert policy.error_policy is ErrorPolicy.LOG_AND_TERMINATE
    assert policy.waiting_policy is WaitingPolicy.WAIT
    assert policy.max_concurrent is None
    assert (group().liveness_check_interval, group().heartbeat_frequency) == (30, 1)
    assert group().task_id == socket.gethostname()
    assert group().database_config is None


def test_ballerina_spelling():
    """A configuration in Ballerina's spelling, with nested tables, loads unchanged."""
    trigger = TriggerConfiguration.model_validate(
        {
            "interval": 20,
            "maxCount": 5,
            "startTime": {
                "year": 2021,
                "month": 3,
                "day": 31,
                "hour": 4,
                "minute": 50,
                "second": 50.52,
                "timeAbbrev": "Asia/Colombo",
                "utcOffset": {"hours": 5, "minutes": 30},
            },
            "taskPolicy": {"errorPolicy": "CONTINUE", "waitingPolicy": "LOG_AND_IGNORE"},
            "retryConfig": {
                "maxAttempts": 5,
                "retryInterval": 1,
                "backoffStrategy": "EXPONENTIAL",
                "maxInterval": 5,
            },
        }
    )
    assert trigger.max_count == 5
    assert trigger.start_time.isoformat() == "2021-03-31T04:50:50.520000+05:30"
    assert trigger.task_policy == TaskPolicy(
        error_policy=ErrorPolicy.CONTINUE, waiting_policy=WaitingPolicy.LOG_AND_IGNORE
    )
    assert trigger.retry_config == retry(backoff_strategy=RetryStrategy.EXPONENTIAL, max_interval=5)


def test_survives_json():
    """A declaration that was dumped as JSON loads as the same declaration."""
    trigger = TriggerConfiguration(interval=2.5, start_time="2021-03-31T04:50:50Z", retry_config=retry())
    assert TriggerConfiguration.model_validate_json(trigger.model_dump_json()) == trigger


@pytest.mark.parametrize(
    "value", [2.5, Decimal("2.5"), timedelta(seconds=2.5)], ids=lambda v: type(v).__name__
)
def test_seconds_forms(value):
    """Seconds may be numbers or timedeltas and are kept as a float."""
    interval = TriggerConfiguration(interval=value).interval
    assert interval == 2.5
    assert type(interval) is float


@pytest.mark.parametrize("value", [True, "2", None, [2]], ids=repr)
def test_seconds_refuse_other_types(value):
    """A bool or a string is no number of seconds."""
    text = message(TriggerConfiguration, interval=value)
    assert "interval=" in text
    assert "must be a number of seconds or a timedelta; write 2.5" in text


@pytest.mark.parametrize(
    "value", [float("inf"), float("nan"), Decimal("sNaN"), 10**400, 10**5000], ids=lambda _: ""
)
def test_seconds_are_finite(value):
    """A number that no clock reaches is refused."""
    assert "must be a finite number" in message(TriggerConfiguration, interval=value)


@pytest.mark.parametrize("value", [0, -1, timedelta(0)])
def test_interval_is_positive(value):
    """The least interval above 0 is accepted, 0 and less are not."""
    assert TriggerConfiguration(interval=1e-6).interval == 1e-6
    text = message(TriggerConfiguration, interval=value)
    assert f"interval={value}: must be greater than 0 seconds; choose a longer time" in text


def test_max_count():
    """A count is -1 or at least 1; 0 and other negatives each have their own message."""
    for value in (-1, 1, 10**9):
        assert TriggerConfiguration(interval=2, max_count=value).max_count == value
    zero = message(TriggerConfiguration, interval=2, max_count=0)
    assert "max_count=0: a job that runs 0 times never runs; choose at least 1, or -1" in zero
    negative = message(TriggerConfiguration, interval=2, max_count=-2)
    assert "max_count=-2: must be at least 1, or -1 for no limit" in negative


@pytest.mark.parametrize("value", [True, "5", 5.0, None], ids=repr)
def test_counts_are_integers(value):
    """A count is a whole number, not something that looks like one."""
    text = message(TriggerConfiguration, interval=2, max_count=value)
    assert f"max_count={value!r}: must be a valid integer" in text
    remedy = "write it without quotes" if value == "5" else "or leave max_count out for its default, -1"
    assert remedy in text


def test_an_interval_that_no_calendar_has():
    """A hundred years is the longest: beyond the year 9999 Prefect's scheduler fails."""
    century = timedelta(days=36525)
    assert TriggerConfiguration(interval=century).interval == century.total_seconds()
    text = message(TriggerConfiguration, interval=1e12)
    assert "interval=1000000000000.0: must be at most 100 years" in text


def test_end_is_after_start():
    """The end is later than the start, by a microsecond at least; the message names both."""
    start = "2021-01-01T00:00:00Z"
    for end in ("2021-01-01T00:00:00.000001Z", "2021-01-01T00:00:00-00:01"):
        TriggerConfiguration(interval=2, start_time=start, end_time=end)
    text = message(TriggerConfiguration, interval=2, start_time=start, end_time="2021-01-01T05:30:00+05:30")
    assert "end_time=2021-01-01T05:30:00+05:30 must be after" in text
    assert "start_time=2021-01-01T00:00:00+00:00; choose a later end_time" in text


def test_end_in_the_repeated_hour():
    """In the hour that a zone repeats, moments are compared, not readings of the clock."""
    clock = {"year": 2024, "month": 10, "day": 27, "hour": 2, "second": 0}
    zone = {"time_abbrev": "Europe/Berlin"}
    first = clock | zone | {"minute": 45, "utc_offset": {"hours": 2}}
    second = clock | zone | {"minute": 15, "utc_offset": {"hours": 1}}
    TriggerConfiguration(interval=2, start_time=first, end_time=second)
    assert "must be after" in message(TriggerConfiguration, interval=2, start_time=second, end_time=first)


def test_naive_start():
    """A time without a zone is refused where it stands, in the user's spelling."""
    text = message(TriggerConfiguration.model_validate, {"interval": 2, "startTime": "2021-01-01T00:00:00"})
    assert "startTime='2021-01-01T00:00:00': has no zone" in text


def test_max_attempts():
    """There is at least one further attempt; none is said by declaring no retries."""
    assert retry(max_attempts=1).max_attempts == 1
    text = message(retry, max_attempts=0)
    assert "max_attempts=0: must be at least 1; raise it, or declare no retries" in text


def test_max_interval():
    """A limit of the wait may equal the first wait, not be shorter; the message names both."""
    assert retry(retry_interval=5, max_interval=5).max_interval == 5
    text = message(retry, retry_interval=5, max_interval=4.999)
    assert "max_interval=4.999 must not be shorter than retry_interval=5; raise max_interval" in text
    assert "retry_interval=0" in message(retry, retry_interval=0)
    assert "max_interval=0" in message(retry, max_interval=0)


def test_max_concurrent():
    """At least one run at a time, or no limit."""
    assert TaskPolicy(max_concurrent=1).max_concurrent == 1
    text = message(TaskPolicy, max_concurrent=0)
    assert "max_concurrent=0: must be at least 1; raise it, or leave it out for no limit" in text


@pytest.mark.parametrize("enum", [RetryStrategy, ErrorPolicy, WaitingPolicy])
def test_policy_values_are_their_names(enum):
    """A policy's value is its name, so that configuration files can say it."""
    assert [member.value for member in enum] == [member.name for member in enum]


@pytest.mark.parametrize(("name", "said"), [("Order", "an Order"), ("TaskPolicy", "a TaskPolicy")])
def test_a_class_has_its_article(name, said):
    """Where Pydantic names it without."""
    assert in_our_words(f"Input should be a valid dictionary or instance of {name}") == f"must be {said}"


def test_unknown_policy():
    """An unknown policy is refused with those there are, and its path."""
    text = message(TriggerConfiguration, interval=2, task_policy={"errorPolicy": "STOP"})
    assert "task_policy.errorPolicy='STOP': must be 'LOG_AND_TERMINATE', 'TERMINATE'" in text


def test_unknown_field():
    """An unknown field, also a nested one, names the nearest known one and shows no value."""
    text = message(TriggerConfiguration, interval=2, maxcount=12345)
    assert "maxcount is not a field of TriggerConfiguration; did you mean max_count?" in text
    assert "12345" not in text
    nested = message(TriggerConfiguration.model_validate, {"interval": 2, "startTime": {"timeAbrev": "Z"}})
    assert "startTime.timeAbrev is not a field of Civil; did you mean timeAbbrev?" in nested


def test_every_fault_is_named():
    """One error lists every fault, each on its line; a missing field has its documented name."""
    text = message(TriggerConfiguration, max_count=0, retryConfig={"maxAttempts": 0})
    assert [line.split()[0] for line in text.splitlines()] == [
        "TriggerConfiguration:",
        "interval",
        "max_count=0:",
        "retryConfig.maxAttempts=0:",
        "retryConfig.retry_interval",
    ]
    assert "interval is required; give it a value" in text


def test_a_value_without_a_name_is_told_with_the_fields():
    """Which field it is meant for is not known, so the value, which may be the password, is not said."""
    rule = "<str> is given without a name; give each field by its name: kind, host, "
    assert message(PostgresqlConfig, "a-word", port=1).startswith(f"PostgresqlConfig: {rule}")
    assert "its name: interval, max_count, " in message(TriggerConfiguration, 60)
    assert message(Listener, 60).startswith("Listener: <int> is given without a name; ")
    assert message(Stateless, 1).endswith("; it has no field")


def test_both_spellings_of_one_field():
    """It is said twice, and is no unknown field."""
    text = message(TriggerConfiguration, interval=1, max_count=1, maxCount=2)
    assert text == "TriggerConfiguration: max_count is said twice, as maxCount too; remove one"


@pytest.mark.parametrize("host", ["", "h:5432", "a b", "postgresql://u:a-word@h/d", "u:a-word@h", "h/d"])
@pytest.mark.parametrize("config", [PostgresqlConfig, MysqlConfig])
def test_a_host_is_a_name_alone(config, host):
    """What else a URL has stands in fields of its own; a password that is among it is not said."""
    text = message(config, host=host)
    assert "must be the name or the address of a machine alone" in text
    assert "a-word" not in text
    for good in ("db", "db.example.com", "10.0.0.7", "::1", "fe80::1", "my_db-1"):
        assert config(host=good).host == good


@pytest.mark.parametrize("path", ["~/x.db", "~ada/x.db", "sqlite:///x.db", "/", "a\x00b", "."])
def test_a_path_is_a_file(path):
    """A URL, a home that is another one on each node, or a folder is refused."""
    assert re.search("correct it|name one", message(SqliteConfig, path=path))
    assert SqliteConfig(path="../x.db").path == Path("../x.db")


@pytest.mark.parametrize("group_id", ["g\n", "g\x00", "g\ud800"])
def test_what_cannot_be_printed_is_no_name(group_id):
    assert "printable characters" in message(group, group_id=group_id)


def test_a_number_that_no_database_holds():
    assert "must be at most 1000000000" in message(TriggerConfiguration, interval=1, max_count=10**30)
    assert "must be at most 1000000000" in message(retry, max_attempts=10**20)


def test_every_way_to_load_raises_the_same():
    """Constructing, loading a mapping and loading JSON text raise the same error."""
    constructed = message(TriggerConfiguration, interval=0)
    assert message(TriggerConfiguration.model_validate, {"interval": 0}) == constructed
    assert message(TriggerConfiguration.model_validate_json, '{"interval": 0}') == constructed
    assert "Invalid JSON" in message(TriggerConfiguration.model_validate_json, "{")
    with pytest.raises(TaskError):
        TriggerConfiguration(interval=0)


def test_frozen():
    """A declaration cannot change after it was validated."""
    trigger = TriggerConfiguration(interval=2)
    with pytest.raises(DeclarationError, match="interval cannot be assigned"):
        trigger.interval = 0  # type: ignore[misc]
    assert trigger.interval == 2


def test_database_defaults():
    """Databases listen where they do by default; the rest is left to the driver."""
    for config, port in ((PostgresqlConfig(), 5432), (MysqlConfig(), 3306)):
        assert (config.host, config.port) == ("localhost", port)
        assert (config.user, config.password, config.database) == (None, None, None)


@pytest.mark.parametrize("config", [PostgresqlConfig, MysqlConfig])
def test_port_range(config):
    """A port is from 1 to 65535, and a host is not empty."""
    for port in (1, 65535):
        assert config(port=port).port == port
    for port in (0, 65536):
        assert f"port={port}: must be " in message(config, port=port)
    assert "host=''" in message(config, host="")


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_sqlite_is_a_file(path):
    """A SQLite database is a file, as one in memory cannot be shared."""
    assert SqliteConfig(path="tasks.db").path == Path("tasks.db")
    assert f"path={path!r}: must be a file" in message(SqliteConfig, path=path)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"kind": "postgresql"}, PostgresqlConfig()),
        ({"kind": "mysql", "port": 5432}, MysqlConfig(port=5432)),
        ({"kind": "sqlite", "path": "a.db"}, SqliteConfig(path="a.db")),
        ({"path": "a.db"}, SqliteConfig(path="a.db")),
        ({"port": 5432, "user": "u"}, PostgresqlConfig(user="u")),
        ({"port": 3306}, MysqlConfig()),
    ],
    ids=str,
)
def test_database_from_mapping(mapping, expected):
    """A mapping is read by its kind, else by its path or its port."""
    assert group(database_config=mapping).database_config == expected
    assert group(databaseConfig=expected).database_config is expected


@pytest.mark.parametrize(
    "value",
    [
        {"host": "db", "password": "hunter2"},
        {"port": 5433, "password": "hunter2"},
        {"kind": "oracle", "password": "hunter2"},
        {"kind": ["mysql"], "password": "hunter2"},
        "mysql://app:hunter2@db",
    ],
    ids=str,
)
def test_database_undecided(value):
    """A database of unknown kind is refused with the remedy and without its password."""
    text = message(group, database_config=value)
    assert "database_config" in text
    assert 'a mapping with kind "postgresql", "mysql" or "sqlite"' in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "mysql", "password": ["hunter2"]},
        {"kind": "mysql", "passwrd": "hunter2"},
        {"kind": "mysql", "password": "hunter2", "port": 0},
        {"kind": "sqlite", "password": "hunter2"},
        {"password": "hunter2"},
    ],
    ids=str,
)
def test_password_never_shows(config):
    """No error, traceback included, and no repr shows a password."""
    with pytest.raises(DeclarationError) as caught:
        group(database_config=config)
    printed = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in printed.replace(repr(config), "")
    assert caught.value.__suppress_context__
    assert "hunter2" not in str(caught.value.__context__)
    assert "hunter2" not in repr(group(database_config=MysqlConfig(password="hunter2")))


def test_password_is_readable():
    """The driver can read the password."""
    config = PostgresqlConfig(password="hunter2")
    assert config.password == SecretStr("hunter2")
    assert config.password.get_secret_value() == "hunter2"


@pytest.mark.parametrize("field", ["group_id", "task_id"])
@pytest.mark.parametrize("value", ["", " ", "a/b", "50%", "x" * 256], ids=lambda v: v[:3])
def test_identifiers(field, value):
    """An id can name a worker, and fits its column: 255 characters do, 256 do not."""
    for accepted in ("x", "x" * 255, "node 1"):
        assert getattr(group(**{field: accepted}), field) == accepted
    text = message(group, **{field: value})
    assert f"{field}=" in text
    assert "must have 1 to 255 printable characters" in text
    assert f"this one has {len(value)}); choose another name" in text


def test_default_task_id_is_checked(monkeypatch):
    """A host name that cannot name a worker is refused like any other task_id."""
    monkeypatch.setattr(socket, "gethostname", lambda: "a/b")
    assert group(task_id="node").task_id == "node"
    assert "choose another name" in message(group)


def test_liveness_leaves_room_for_three_heartbeats():
    """Three heartbeats fit, also where floats do not add up; less is refused, naming both."""
    group(liveness_check_interval=3, heartbeat_frequency=1)
    group(liveness_check_interval=0.3, heartbeat_frequency=0.1)
    text = message(group, liveness_check_interval=2.999, heartbeat_frequency=1)
    assert "liveness_check_interval=2.999 must be at least 3 times heartbeat_frequency=1" in text
    assert "raise it to 3 or send heartbeats more often" in text
    for field in ("liveness_check_interval", "heartbeat_frequency"):
        assert f"{field}=0: must be greater than 0" in message(group, **{field: 0})
