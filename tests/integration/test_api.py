"""Prefect's API is out of reach: every function and command says so in one line, and where it looked."""

from __future__ import annotations

import asyncio
import socket
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.local import free_port
from taskadapter import (
    JobId,
    Listener,
    TaskError,
    TriggerConfiguration,
    aget_running_jobs,
    cli,
    schedule_one_time_job,
    unschedule_job,
)
from tests.integration.test_scheduler import HELLO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nothing answers, and which the settings name as that of the API."""
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


def idle() -> None: ...


def start() -> None:
    listener = Listener(trigger=TriggerConfiguration(interval=60))
    listener.service("idle")(idle)
    listener.start()


CALLS = [
    start,
    lambda: schedule_one_time_job(HELLO, datetime.now(UTC) + timedelta(hours=1)),
    lambda: unschedule_job(JobId(uuid.uuid4())),
    lambda: asyncio.run(aget_running_jobs()),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_function_names_the_address_and_the_remedy(nowhere: str, call: Callable[[], object]) -> None:
    """It raises one clear error of ours."""
    with pytest.raises(TaskError, match=f"{nowhere} does not answer.*prefect server start"):
        call()


def test_a_command_says_so_in_one_line(
    nowhere: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no traceback, and the exit status is 1."""
    monkeypatch.setattr("sys.argv", ["taskadapter", "status"])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"taskadapter: Prefect's API at {nowhere} does not answer")


def test_a_server_that_never_answers_is_told_of_soon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It accepts connections, as a frozen one does; Prefect's client would try it for minutes."""
    monkeypatch.setattr("taskadapter.prefect_api.client.COMMAND_SECONDS", 0.2)
    monkeypatch.setattr("sys.argv", ["taskadapter", "status"])
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        url = f"http://127.0.0.1:{frozen.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SystemExit):
            cli.main()

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"taskadapter: Prefect's API at {url} has not answered for 0.2 s; ")
