"""Mistaken values that were accepted where they are declared, and failed later, and elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from taskadapter import (
    Listener,
    MysqlConfig,
    PostgresqlConfig,
    RetryConfiguration,
    SqliteConfig,
    TaskError,
    TriggerConfiguration,
    WarmBackupConfig,
    configure_worker_pool,
    get_running_jobs,
    pause_all_jobs,
    resume_all_jobs,
)

CENTURY = 3155760000
LAST_START = datetime(9599, 12, 31, 23, 59, 59, tzinfo=UTC)


def work() -> None: ...


def listener(**fields: Any) -> Listener:
    return Listener(trigger=TriggerConfiguration(interval=5), **fields)


def refusal(declare: Any, *args: Any, **fields: Any) -> str:
    with pytest.raises(TaskError) as refused:
        declare(*args, **fields)
    return str(refused.value)


@pytest.mark.parametrize(
    ("declare", "fields", "name"),
    [
        (WarmBackupConfig, {"group_id": "g"}, "liveness_check_interval"),
        (RetryConfiguration, {"max_attempts": 1}, "retry_interval"),
        (RetryConfiguration, {"max_attempts": 1, "retry_interval": 1}, "max_interval"),
    ],
)
@pytest.mark.parametrize("longer", [CENTURY + 1, 1e300, timedelta.max])
def test_a_duration_that_is_no_moment_when_it_is_added_to_one(
    declare: Any, fields: dict[str, Any], name: str, longer: Any
) -> None:
    """A century is accepted; more overflowed where it was used, in a node or in its database."""
    assert getattr(declare(**fields, **{name: CENTURY}), name) == CENTURY

    said = refusal(declare, **fields, **{name: longer})
    assert said.endswith(": must be at most 100 years (3155760000 seconds); choose a shorter time")


def test_a_waiting_time_that_is_longer() -> None:
    """Nothing is asked of a server."""
    assert "waiting_time=1e+300: must be at most 100 years" in refusal(configure_worker_pool, 5, 1e300)


def test_a_heartbeat_without_a_pause() -> None:
    """It would ask the database without end."""
    shortest = WarmBackupConfig(group_id="g", liveness_check_interval=3, heartbeat_frequency=0.01)
    assert shortest.heartbeat_frequency == 0.01

    said = refusal(WarmBackupConfig, group_id="g", liveness_check_interval=3, heartbeat_frequency=0.0099)
    assert "heartbeat_frequency=0.0099: must be at least 0.01 seconds; choose a longer time" in said


def test_a_start_whose_next_ticks_are_beyond_all_years() -> None:
    """Prefect's scheduler would fail at them, which plans the jobs of everybody."""
    assert TriggerConfiguration(interval=CENTURY, start_time=LAST_START).start_time == LAST_START

    too_late = LAST_START + timedelta(seconds=1)
    said = refusal(TriggerConfiguration, interval=5, start_time=too_late)
    assert (
        "start_time=9600-01-01 00:00:00+00:00: must be before the year 9600; choose a nearer time" in said
    )


@pytest.mark.parametrize("character", ["&", "<", ">"])
def test_a_group_that_prefect_takes_for_no_queue(character: str) -> None:
    """Its deploy failed with status 422; the name of a node is none of a queue."""
    said = refusal(WarmBackupConfig, group_id=f"a{character}b")
    assert f'"{character}"' in said
    assert said.endswith("choose another name")
    assert WarmBackupConfig(group_id="g", task_id=f"a{character}b").task_id == f"a{character}b"


@pytest.mark.parametrize("name", ["'", '""', " ' "])
def test_a_pool_that_prefect_takes_for_none(name: str) -> None:
    """It was refused when it was made, in Prefect's words."""
    said = refusal(listener, work_pool=name)
    assert "must not have blanks and quotes only, which Prefect takes for no name; choose another." in said


@pytest.mark.parametrize("config", [PostgresqlConfig, MysqlConfig])
@pytest.mark.parametrize("field", ["user", "password", "database"])
def test_what_no_driver_takes(config: Any, field: str) -> None:
    """The character that ends a text in C; a password is not told."""
    said = refusal(config, **{field: "open\0sesame"})
    assert f"{config.__name__}: {field}=" in said
    assert said.endswith(": must not hold the character NUL, which no driver takes; remove it")
    assert ("sesame" in said) is (field != "password")


@pytest.mark.parametrize("path", [None, 5, b"tasks.db"])
def test_a_path_that_is_none(path: Any) -> None:
    """In our words, and not by a class of Python's library."""
    said = refusal(SqliteConfig, path=path)
    assert f": must be a path, not {'None' if path is None else type(path).__name__}; pass such a" in said


@pytest.mark.parametrize("option", ["log_prints", "persist_result", "validate_parameters"])
@pytest.mark.parametrize("value", ["no", 0, []])
def test_a_switch_of_a_flow_that_is_neither_on_nor_off(option: str, value: Any) -> None:
    """Prefect takes any text for a yes."""
    said = refusal(listener().service, "a", **{option: value})
    assert said.startswith(f"service 'a': {option}=")
    assert said.endswith(" must be True or False; leave it out for Prefect's default.")


@pytest.mark.parametrize("value", [True, False, None])
def test_a_switch_of_a_flow(value: bool | None) -> None:
    """On, off, and Prefect's default."""
    assert listener().service("a", log_prints=value, persist_result=value)(work).name == "a"


def test_a_timeout_that_is_no_number() -> None:
    """True was a second."""
    said = refusal(listener().service, "a", timeout_seconds=True)
    assert "timeout_seconds=True must be a number of seconds" in said


@pytest.mark.parametrize(
    "function", [get_running_jobs, pause_all_jobs, resume_all_jobs, configure_worker_pool]
)
@pytest.mark.parametrize(("name", "rule"), [(5, "must be a string"), ("a/b", "no name for a work pool")])
def test_a_pool_is_refused_before_a_server_is_asked(function: Any, name: Any, rule: str) -> None:
    """Of a path Prefect has no pool, and the answer was that there is none of that name."""
    assert rule in refusal(function, work_pool=name)


def test_a_service_that_is_not_attached() -> None:
    """The services that are are named."""
    on = listener()
    assert refusal(on.detach, "a") == "no service 'a' is attached; none is."
    on.service("one")(work)
    on.service("two")(work)
    assert refusal(on.detach, "a") == "no service 'a' is attached; name one of one, two."
