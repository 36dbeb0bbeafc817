"""What an agent reads of a pool, against an API that lists so many runs at once."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from taskadapter.prefect_api import ticks

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
PAGE = 4


class Api:
    """Lists the runs of one queue after the other, as a pool's queues come, each by time."""

    def __init__(self, *queues):
        self.queues = queues
        self.asked = 0

    async def get_scheduled_flow_runs_for_work_pool(self, *_, scheduled_before, **__):
        self.asked += 1
        moments = [at for queue in self.queues for at in sorted(queue) if after(at) <= scheduled_before]
        return [
            SimpleNamespace(flow_run=SimpleNamespace(next_scheduled_start_time=after(at)))
            for at in moments[:PAGE]
        ]


def after(seconds):
    return NOON + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("queues", "listed", "until"),
    [
        ([[1, 2], [3]], [1, 2, 3], 60),
        ([[11, 12, 13, 14, 15], [1, 2, 3]], [1, 2], 2),
        ([[1, 2, 3, 4, 5, 6], []], [1, 2, 3], 3),
        ([[7] * 5, []], [7] * PAGE, 7),
        ([[8, 9, 9, 9, 9], []], [8], 8),
    ],
    ids=["few", "a queue that comes later is later", "one queue", "one moment", "one before a moment"],
)
def test_all_until_a_moment_are_listed(monkeypatch, queues, listed, until):
    """However many are due, the oldest come first, whatever their queues."""
    monkeypatch.setattr(ticks, "PAGE", PAGE)
    api: Any = Api(*queues)
    runs, moment = asyncio.run(ticks.due(api, "pool", None, after(60)))

    assert [run.next_scheduled_start_time for run in runs] == [after(at) for at in listed]
    assert after(max(listed)) <= moment <= after(until)


def test_a_run_that_is_deleted_while_its_job_is_ended():
    """It is the run that is gone, and not the job: what else is planned is ended."""
    gone, other = (SimpleNamespace(id=name, state_type=StateType.PENDING) for name in ("gone", "other"))
    ended = []

    class Ending:
        async def read_flow_runs(self, **_):
            return [gone, other]

        async def set_flow_run_state(self, run_id, *_, **__):
            if run_id == "gone":
                raise ObjectNotFound(Exception())
            ended.append(run_id)

    api: Any = Ending()
    deployment: Any = SimpleNamespace(id=uuid4(), schedules=[])
    asyncio.run(ticks.switch_off(api, deployment, "over"))

    assert ended == ["other"]
