"""What ends an agent before it has begun, as Prefect's command shows it and as a program hears it."""

import asyncio
from contextlib import contextmanager

import pytest
from prefect.workers.base import BaseWorker

from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.errors import CoordinationError, DeclarationError, TaskError
from taskadapter.settings import PREFIX


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORKER_COUNT", "abc", "setting PREFECT_INTEGRATIONS_TASKADAPTER_WORKER_COUNT=abc is refused: "),
        ("DATABASE_URL", "hello", "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL: the URL of the coordi"),
        ("DATABASE_URL", "oracle://db", "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL: oracle: not a d"),
        ("DATABASE_URL", "sqlite:///x.db", "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL: the SQLite "),
        ("DATABASE_URL", "mysql://me:a@b@db/x", "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL: the URL"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_the_command_with_a_line(monkeypatch, name, value, said):
    """And raises the same sentence in a program."""
    monkeypatch.setenv(PREFIX + name, value)

    with pytest.raises(SystemExit) as ended:
        WarmBackupWorker("pool", name="node-1")
    with pytest.raises((CoordinationError, DeclarationError)) as raised:
        WarmBackupWorker("pool", name="node-1", is_command=False)

    assert str(raised.value).startswith(said)
    assert ended.value.code == f"Agent 'node-1' has ended: {raised.value}"


@pytest.mark.parametrize(
    "value", ["postgresql://node:a%40b@nowhere.invalid/tasks", "sqlite:////nowhere/x.db"]
)
def test_a_database_that_does_not_answer_ends_nothing(monkeypatch, value):
    """It may answer later."""
    monkeypatch.setenv(PREFIX + "DATABASE_URL", value)

    WarmBackupWorker("pool", name="node-1")


def started(monkeypatch, error, **options):
    """Start an agent that ends with an error."""

    async def start(*_):
        raise error

    @contextmanager
    def at_a_signal(_):
        yield

    monkeypatch.setattr(BaseWorker, "start", start)
    monkeypatch.setattr("taskadapter.agent.worker.at_a_signal", at_a_signal)
    asyncio.run(WarmBackupWorker("pool", name="node-1", **options).start())


def test_an_error_of_ours_ends_the_command_with_a_line(monkeypatch):
    """Out of the groups that it comes in; a name that is in use, for example."""
    error = ExceptionGroup("of tasks", [ExceptionGroup("of tasks", [TaskError("it is in use")])])

    with pytest.raises(SystemExit, match=r"^Agent 'node-1' has ended: it is in use$"):
        started(monkeypatch, error)
    with pytest.raises(ExceptionGroup):
        started(monkeypatch, error, is_command=False)


def test_another_error_is_shown_as_it_is(monkeypatch):
    """It is a mistake, of which the traceback is needed."""
    with pytest.raises(RuntimeError, match="a mistake"):
        started(monkeypatch, RuntimeError("a mistake"))
