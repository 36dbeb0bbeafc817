"""Why a job is over."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock, Mock
from uuid import UUID

import pytest
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule

from taskadapter.agent import switches
from taskadapter.agent.switches import why_over
from taskadapter.coordination.executions import SWITCHED_OFF
from taskadapter.coordination.progress import JobRow
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.errors import DatabaseUnavailableError
from taskadapter.rules import ticks

FAILED = ticks.failed(3, "TERMINATE")
PAST = "2020-01-01T00:00:00+00:00"


def deployed(*, on: bool = True, **trigger: Any) -> tuple[DeploymentResponse, TriggerConfiguration]:
    declared = TriggerConfiguration(interval=60, **trigger)
    schedule = DeploymentSchedule(
        deployment_id=UUID(int=1),
        schedule=IntervalSchedule(interval=timedelta(seconds=60)),
        slug=ticks.slug(declared),
        active=on,
    )
    variables = {"trigger": declared.model_dump(mode="json")}
    job = DeploymentResponse(
        id=UUID(int=1),
        name="job",
        flow_id=UUID(int=2),
        schedules=[schedule],
        job_variables=variables,
        labels={},
    )
    return job, declared


@pytest.mark.parametrize(
    ("trigger", "on", "count", "ended", "why"),
    [
        ({}, True, 3, None, None),
        ({}, False, 3, FAILED, FAILED),
        ({}, True, 3, FAILED, FAILED),
        ({"max_count": 3}, True, 2, None, None),
        ({"max_count": 3}, False, 3, SWITCHED_OFF, "the maximum of 3 runs is reached"),
        ({"max_count": 3}, False, 3, FAILED, FAILED),
        ({"end_time": PAST}, False, 3, SWITCHED_OFF, f"the schedule ended at {PAST}"),
        ({}, False, 3, SWITCHED_OFF, SWITCHED_OFF),
        ({}, False, None, None, SWITCHED_OFF),
        ({}, True, None, None, None),
    ],
)
def test_why_a_job_is_over(trigger, on, count, ended, why):
    """The row knows it best; an agent that switches a schedule off leaves it to the trigger to say why."""
    job, declared = deployed(on=on, **trigger)
    row = None if count is None else JobRow("", ticks.slug(declared), count, count, False, ended)
    assert why_over(job, row) == why


def test_what_a_failure_says():
    """It is told from what else ends a job."""
    assert ticks.is_failure(FAILED)
    assert not ticks.is_failure(SWITCHED_OFF)
    assert not ticks.is_failure(ticks.exhausted(3))


def test_a_detach_that_fails_leaves_no_tag(monkeypatch):
    """A job that goes on is not said to be detached; the same call, repeated, ends it and says so."""
    client = AsyncMock()
    client.read_deployment.return_value, _ = deployed()
    ending = AsyncMock(side_effect=DatabaseUnavailableError("it does not answer"))
    monkeypatch.setattr(switches, "api_client", lambda: nullcontext(client))
    monkeypatch.setattr(switches, "end", ending)

    with pytest.raises(DatabaseUnavailableError):
        asyncio.run(switches.detach(UUID(int=1)))
    client.update_deployment.assert_not_awaited()

    ending.side_effect = None
    asyncio.run(switches.detach(UUID(int=1)))
    assert ending.await_args.kwargs == {"stays": True}
    assert client.update_deployment.await_args.args[1].tags == ["detached"]


@pytest.mark.parametrize("stays", [True, False])
def test_with_which_trigger_a_job_is_over(monkeypatch, stays):
    """One whose deployment stays is with its own, and so not forgotten; one that is deleted with any."""
    job, declared = deployed()
    client, ended = AsyncMock(), Mock()
    client.read_deployment.return_value = job
    monkeypatch.setattr(switches, "switch_off", AsyncMock())
    monkeypatch.setattr("taskadapter.coordination.store.end_job", ended)
    monkeypatch.setattr("taskadapter.coordination.store.see", Mock())

    asyncio.run(switches.end(client, job, "a reason", stays=stays))

    assert ended.call_args.args[1:] == (job.id, "a reason", ticks.slug(declared) if stays else None)
