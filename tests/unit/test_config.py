"""Listeners from a file: every way to write one, and every file that is refused."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from taskadapter import (
    ErrorPolicy,
    Listener,
    MysqlConfig,
    PostgresqlConfig,
    RetryConfiguration,
    RetryStrategy,
    TaskError,
    TaskPolicy,
    TriggerConfiguration,
    WaitingPolicy,
    WarmBackupConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

FLAT = """
    interval = 2.0
    maxCount = 5
    livenessCheckInterval = 6
    heartbeatFrequency = 1
    taskId = "node-1"
    groupId = "task-group-01"

    [databaseConfig]
    host = "localhost"
    port = 5432
    user = "tasks"
    password = "hunter2"
    database = "tasks"

    [startTime]
    year = 2026
    month = 12
    day = 1
    hour = 4
    minute = 50
    second = 50.52
    timeAbbrev = "Asia/Colombo"
    [startTime.utcOffset]
    hours = 5
    minutes = 30
"""

TABLES = """
    workPool = "night"

    [triggerConfig]
    interval = 20
    maxCount = 5
    endTime = 2030-01-01T00:00:00Z

    [triggerConfig.taskPolicy]
    errorPolicy = "CONTINUE"
    waitingPolicy = "IGNORE"

    [retryConfig]
    maxAttempts = 5
    retryInterval = 1
    backoffStrategy = "EXPONENTIAL"
    maxInterval = 5

    [warmBackupConfig]
    groupId = "task-group-01"
    taskId = "node-1"
    livenessCheckInterval = 6

    [warmBackupConfig.databaseConfig]
    port = 3306
    password = "hunter2"
"""

TABLES_AS_LOADED = {
    "trigger": TriggerConfiguration(
        interval=20,
        max_count=5,
        end_time=datetime(2030, 1, 1, tzinfo=UTC),
        task_policy=TaskPolicy(error_policy=ErrorPolicy.CONTINUE, waiting_policy=WaitingPolicy.IGNORE),
    ),
    "retry_config": RetryConfiguration(
        max_attempts=5, retry_interval=1, backoff_strategy=RetryStrategy.EXPONENTIAL, max_interval=5
    ),
    "task_policy": None,
    "warm_backup_config": WarmBackupConfig(
        group_id="task-group-01",
        task_id="node-1",
        liveness_check_interval=6,
        database_config=MysqlConfig(password="hunter2"),
    ),
    "work_pool": "night",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "Config.toml"


def write(file: Path, text: str) -> Path:
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return file


def refused(file: Path, text: str, **options: str) -> str:
    """Return the message with which a file is refused; it starts with the file's name."""
    with pytest.raises(TaskError) as caught:
        Listener.from_config(write(file, text), **options)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "hunter2" not in message
    assert caught.value.__cause__ is None
    return message.removeprefix(str(file))


@pytest.mark.parametrize("path", [None, 5, b"listener.toml"])
def test_a_path_is_one(path: Any) -> None:
    """A number would be taken for an open file."""
    with pytest.raises(TaskError, match="must be the path of a TOML file; name one"):
        Listener.from_config(path)
    with pytest.raises(TaskError, match="table=5 must be a dotted name"):
        Listener.from_config("listener.toml", table=5)  # type: ignore[arg-type]


def test_a_path_that_no_system_has() -> None:
    with pytest.raises(TaskError, match="must be the path of a TOML file"):
        Listener.from_config("a\x00b")


def loaded(listener: Listener) -> dict[str, object]:
    return {name: getattr(listener.configuration, name) for name in TABLES_AS_LOADED}


def test_flat_keys_load(file):
    """The configurable variables of a Ballerina program are the declaration they stand for."""
    listener = Listener.from_config(write(file, FLAT))

    assert loaded(listener) == {
        "trigger": TriggerConfiguration(
            interval=2, max_count=5, start_time="2026-12-01T04:50:50.520000+05:30"
        ),
        "retry_config": None,
        "task_policy": None,
        "warm_backup_config": WarmBackupConfig(
            group_id="task-group-01",
            task_id="node-1",
            liveness_check_interval=6,
            heartbeat_frequency=1,
            database_config=PostgresqlConfig(user="tasks", password="hunter2", database="tasks"),
        ),
        "work_pool": None,
    }


def test_tables_load(file):
    """Whole records in tables, one inside another, are the declaration they stand for."""
    assert loaded(Listener.from_config(str(write(file, TABLES)))) == TABLES_AS_LOADED


def test_pythons_spelling_loads(file):
    """Keys may be written as in Python, flat and in tables."""
    listener = Listener.from_config(
        write(
            file,
            "max_count = 3\nretry_interval = 1\n[trigger]\ninterval = 5\n[retry_config]\nmax_attempts = 2",
        )
    )

    assert listener.configuration.trigger == TriggerConfiguration(interval=5, max_count=3)
    assert listener.configuration.retry_config == RetryConfiguration(max_attempts=2, retry_interval=1)


@pytest.mark.parametrize("table", ["org.night", "night"])
def test_the_table_of_a_module_loads(file, table):
    """A dotted name says which table is read; the keys outside of it do not count."""
    text = (
        f"strange = 1\n[{table}]\ninterval = 3\n[{table}.retryConfig]\nmaxAttempts = 1\nretryInterval = 1"
    )
    listener = Listener.from_config(write(file, text), table=table)

    assert listener.trigger.interval == 3
    assert listener.trigger.retry_config == RetryConfiguration(max_attempts=1, retry_interval=1)


def test_the_tables_of_ballerinas_modules_do_not_count(file):
    """What the same file says to Ballerina's log is no business of a listener."""
    listener = Listener.from_config(write(file, 'interval = 3\n[ballerina.log]\nlevel = "DEBUG"'))

    assert listener.trigger.interval == 3


@pytest.mark.parametrize("name", ["retry_config", "retryConfig"])
@pytest.mark.parametrize("place", ["", "trigger."])
def test_a_keyword_wins_over_the_file(file, name, place):
    """What a program says wins over the file, wherever it stands; the rest is the file's."""
    retries = RetryConfiguration(max_attempts=1, retry_interval=2)
    text = f"interval = 9\n[{place}retryConfig]\nmaxAttempts = 7\nretryInterval = 1\nmaxInterval = 4"
    options: dict[str, Any] = {name: retries}
    listener = Listener.from_config(write(file, text), **options)

    assert listener.trigger.retry_config == retries.model_copy(update={"max_interval": 4})
    assert listener.trigger.interval == 9


def test_a_trigger_in_code_wins_with_its_retries(file):
    """A trigger in code wins over the file's; the retries in it over those beside the file's."""
    trigger = TriggerConfiguration(
        interval=30, retry_config=RetryConfiguration(max_attempts=1, retry_interval=2)
    )
    listener = Listener.from_config(write(file, TABLES), trigger=trigger)

    assert (listener.trigger.interval, listener.trigger.max_count) == (30, 5)
    assert listener.trigger.retry_config == RetryConfiguration(
        max_attempts=1, retry_interval=2, backoff_strategy=RetryStrategy.EXPONENTIAL, max_interval=5
    )
    assert listener.group_id == "task-group-01"


POSTGRESQL = PostgresqlConfig(user="tasks", password="hunter2", database="tasks")


@pytest.mark.parametrize(
    ("said", "differs"),
    [
        (WarmBackupConfig(group_id="x"), {"group_id": "x"}),
        ({"groupId": "x"}, {"group_id": "x"}),
        ({"liveness_check_interval": 30}, {"liveness_check_interval": 30}),
        (
            {"databaseConfig": {"port": 6543}},
            {"database_config": POSTGRESQL.model_copy(update={"port": 6543})},
        ),
        (
            WarmBackupConfig(group_id="x", database_config=PostgresqlConfig(host="db")),
            {"group_id": "x", "database_config": POSTGRESQL.model_copy(update={"host": "db"})},
        ),
        (
            {"database_config": MysqlConfig(host="db")},
            {"database_config": MysqlConfig(host="db")},
        ),
        ({"database_config": None}, {"database_config": None}),
    ],
)
def test_what_is_not_said_in_code_is_the_files(file, said, differs):
    """Key by key, also in the database; one of another kind has nothing of the file's."""
    listener = Listener.from_config(write(file, FLAT), warmBackupConfig=said)

    plain = Listener.from_config(file).configuration.warm_backup_config
    assert plain is not None
    assert listener.configuration.warm_backup_config == plain.model_copy(update=differs)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"trigger": {"taskPolicy": {"waitingPolicy": "WAIT"}}}, WaitingPolicy.WAIT),
        ({"task_policy": TaskPolicy(max_concurrent=1)}, WaitingPolicy.IGNORE),
        ({"taskPolicy": {"max_concurrent": 1}}, WaitingPolicy.IGNORE),
        ({"task_policy": TaskPolicy(waiting_policy=WaitingPolicy.WAIT)}, WaitingPolicy.WAIT),
    ],
)
def test_a_policy_in_code_is_over_the_files_wherever_it_stands(file, said, expected):
    """A default that is said is said."""
    policy = Listener.from_config(write(file, TABLES), **said).trigger.policy

    assert (policy.error_policy, policy.waiting_policy) == (ErrorPolicy.CONTINUE, expected)


@pytest.mark.parametrize("said", [{"retry_config": None}, {"trigger": {"retry_config": None}}])
def test_none_in_code_is_over_the_files(file, said):
    """There are no retries then."""
    assert Listener.from_config(write(file, TABLES), **said).trigger.retry_config is None


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"trigger": 5}, "trigger=5: must be a TriggerConfiguration"),
        ({"trigger": {"maxCount": 1, "max_count": 2}}, "max_count is said twice"),
        (
            {"trigger": {"task_policy": {}}, "task_policy": {}},
            "task_policy stands in the listener and in its",
        ),
        ({"trigger": {"intervall": 2}}, "did you mean interval?"),
        (
            {"retry_config": {"retry_interval": 9}},
            "max_interval=5 must not be shorter than retry_interval=9",
        ),
    ],
)
def test_what_code_says_wrongly_is_refused(file, said, part):
    with pytest.raises(TaskError) as caught:
        Listener.from_config(write(file, TABLES), **said)

    assert part in str(caught.value)


def test_a_trigger_in_code_leaves_the_files_retries(file):
    """A trigger in code without retries has those of the file."""
    listener = Listener.from_config(write(file, TABLES), trigger={"interval": 30})

    assert listener.trigger.interval == 30
    assert listener.trigger.retry_config == TABLES_AS_LOADED["retry_config"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("intervall = 2", "intervall is no part of a listener; remove it"),
        ("[org.night]\ninterval = 2", "org is no part of a listener; remove it, or pass table="),
        (
            "[trigger]\nintervall = 2",
            ": Listener: trigger.intervall is not a field of TriggerConfiguration; ",
        ),
        ("[trigger]\nintervall = 2", "did you mean interval?"),
        ("interval = 'soon'", "interval='soon': must be a number of seconds; write 2.5"),
        ("trigger = 5", "trigger must be a table"),
        ("interval = 1\n[trigger]\ninterval = 2", "trigger.interval is said twice"),
        ("maxCount = 1\nmax_count = 1\ninterval = 1", "max_count is said twice"),
        ("maxCount = 1", "interval is required"),
        ("interval = -1", "interval=-1: must be greater than 0"),
        ("interval = inf", "must be a finite number"),
        ("interval = 0.01", "shorter than Prefect's scheduler can fill"),
        ("interval = 2\nstartTime = 2026-12-01T04:50:50", "has no zone"),
        (
            "interval = 2\ngroupId = 'a'\n[databaseConfig]\nkind = 'mysql'\nport = 0\npassword = 'hunter2'",
            "port",
        ),
        (
            "interval = 2\ngroupId = 'a'\ndatabaseConfig = 'hunter2'",
            "database_config=<str>: must say which",
        ),
        ("password = 'hunter2' 'hunter2'", "is not valid TOML: "),
        ("interval = 2\npassword = 'hunter2'", "password is no part of a listener"),
    ],
)
def test_a_wrong_file_is_refused(file, text, part):
    """The one sentence names file, key and rule, and never a password."""
    assert part in refused(file, text)


@pytest.mark.parametrize("table", ["night", "org.night", "trigger.interval"])
def test_a_missing_table_is_refused(file, table):
    """A table that is not in the file is named."""
    assert f"has no table [{table}]" in refused(file, "[trigger]\ninterval = 2\n[org]", table=table)


def test_a_missing_file_is_refused(tmp_path):
    """A file that is not there, or a folder, is named with the reason."""
    for path, reason in [(tmp_path / "none.toml", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(TaskError, match=f"{path} cannot be read .{reason}"):
            Listener.from_config(path)


def test_a_file_that_is_no_text_is_refused(file):
    """Bytes that are not UTF-8 are refused like other broken files."""
    file.write_bytes(b"interval = '\xff'")

    with pytest.raises(TaskError, match="is not valid TOML: it is not UTF-8"):
        Listener.from_config(file)
