"""What the guide for those who come from Ballerina shows can be declared, block by block."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from taskadapter import (
    Civil,
    Job,
    Listener,
    MysqlConfig,
    RetryConfiguration,
    Service,
    TaskError,
    WaitingPolicy,
    schedule_job_recur_by_frequency,
)
from taskadapter.declare.registry import listeners
from tests.pages import blocks

BLOCKS, TOML = (blocks("from-ballerina", kind) for kind in ("python", "toml"))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_python_declares(project: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As a module of a project does, beside the configuration file that the guide shows."""
    monkeypatch.syspath_prepend(str(project))
    (project / "Config.toml").write_text(TOML[0])
    (project / f"guide_{number}.py").write_text("ticker = None\n" + BLOCKS[number])
    module = importlib.import_module(f"guide_{number}")

    declared = {value for value in vars(module).values() if isinstance(value, Listener)}
    assert bool(declared) is ("Listener(" in BLOCKS[number] or "from_config" in BLOCKS[number])
    assert declared == set(listeners)


def test_a_job_that_counts_is_a_service(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the two programs that stand side by side, ours counts as Ballerina's does."""
    monkeypatch.syspath_prepend(str(project))
    (source,) = [block for block in BLOCKS if "MyCounter" in block]
    (project / "counting.py").write_text(source)
    module = importlib.import_module("counting")
    declared = module.every_second.services["my-counter"]

    counter = declared.instance
    counter.execute()
    counter.execute()

    assert (declared.initial_state, module.every_second.trigger.interval) == ({"i": 0}, 1)
    assert capsys.readouterr().out == "MyCounter: 1\nMyCounter: 2\n"


NO_PORT = {"groupId": "g", "databaseConfig": {"host": "db"}}
"""A group whose database may be of either kind."""


class Counting(Job):
    """What Ballerina's first program does."""

    i: int

    def execute(self) -> None:
        """Change a field."""
        self.i += 1  # type: ignore[misc]


class Counter(Service):
    """The same, where it may."""

    i: int = 0

    def execute(self) -> None:
        """Change a field."""
        self.i += 1


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: Counting(i=1).execute(), "Counting is frozen"),
        (lambda: schedule_job_recur_by_frequency(Counter(), 1), "a Service .* is declared on a Listener"),  # type: ignore[arg-type]
        (lambda: Counting(1), "by its name: i"),  # type: ignore[call-arg]
        (lambda: Listener(trigger={"interval": 2}).start(), "no service to run"),
        (lambda: Listener(trigger={"interval": 2}).attach(Counter(), ["a"]), "needs a name"),  # type: ignore[arg-type]
        (lambda: Civil(year=2030, month=1, day=1, hour=0, minute=0, second=0), "has no zone"),
        (lambda: MysqlConfig.model_validate({"options": {}}), "options is not a field"),
        (lambda: MysqlConfig.model_validate({"connectionPool": {}}), "connectionPool is not a field"),
        (lambda: Listener(trigger={"interval": 2}, warmBackupConfig=NO_PORT), "which database"),
    ],
)
def test_what_differs_is_said_when_it_is_tried(
    project: Path, attempt: Callable[[], object], message: str
) -> None:
    """Of what the guide says is refused here, each has an error of its own."""
    with pytest.raises((TaskError, TypeError), match=message):
        attempt()


def test_retries_and_policy_may_stand_in_the_trigger(project: Path) -> None:
    """In Ballerina's spelling, with a port that says which database it is."""
    listener = Listener(
        trigger={
            "interval": 5,
            "taskPolicy": {"waitingPolicy": "IGNORE"},
            "retryConfig": {"maxAttempts": 2, "retryInterval": 1},
        },
        warmBackupConfig={"groupId": "g", "databaseConfig": {"host": "db", "port": 3306}},
    )
    backup = listener.configuration.warm_backup_config

    assert listener.trigger.policy.waiting_policy is WaitingPolicy.IGNORE
    assert listener.trigger.retry_config == RetryConfiguration(max_attempts=2, retry_interval=1)
    assert backup is not None
    assert isinstance(backup.database_config, MysqlConfig)


def test_the_file_of_the_guide_says_what_it_shows(project: Path) -> None:
    """Every key of it, in Ballerina's spelling."""
    (project / "Config.toml").write_text(TOML[0])
    listener = Listener.from_config("Config.toml", table="acme.reports")

    assert (listener.trigger.interval, listener.trigger.max_count) == (60, 100)
    assert listener.group_id == "reports"
    assert listener.domain is not None
    assert (listener.domain.liveness_check_interval, listener.domain.heartbeat_frequency) == (30, 1)
