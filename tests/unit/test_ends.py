"""What an agent says of a job that is over."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest

from taskadapter.agent import ends, telling
from taskadapter.agent.ends import OVER_ALREADY, Ends
from taskadapter.rules import ticks
from tests.unit.given import NOON, SECOND, node, tick


def unheard(*_: object) -> None:
    """Nobody is told."""


class Ending(Ends):
    """Puts nothing away."""

    async def _end(self, job: Any, _: str) -> None:
        del self._ending[job.deployment.id]


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ([OVER_ALREADY] * 3, ["Job flow/job is over already; what is planned of it is skipped."]),
        (["it has run 3 times", OVER_ALREADY], ["Job flow/job has ended: it has run 3 times."]),
        (
            [OVER_ALREADY, "it failed"],
            [
                "Job flow/job is over already; what is planned of it is skipped.",
                "Job flow/job has ended: it failed.",
            ],
        ),
    ],
)
def test_that_a_job_is_over_already_is_said_once(caplog, reasons, said):
    """However many ticks of it are still planned; not where this node has said why it ended."""
    job: Any = SimpleNamespace(name="flow/job", deployment=SimpleNamespace(id=uuid4()))
    told: list[str] = []

    async def go() -> None:
        ending = Ending(node(), lambda _, why: told.append(why), unheard)
        for reason in reasons:
            ending.end(job, reason)
            await ending.wait()

    with caplog.at_level("INFO"):
        asyncio.run(go())
    assert [record.getMessage() for record in caplog.records] == said
    assert len(told) == len(said)


class Api:
    """Has a job with one schedule, and fails as often as it is told to."""

    def __init__(self, *, failures: int = 0, is_touched: bool = False) -> None:
        self.schedule = SimpleNamespace(id=uuid4(), slug="slug", active=True, updated=NOON)
        self.deployment = SimpleNamespace(id=uuid4(), schedules=[self.schedule])
        self.failures, self.is_touched = failures, is_touched
        self.others: list[Any] = []

    async def read_deployment(self, _: object) -> Any:
        if self.failures:
            self.failures -= 1
            raise httpx.ConnectError("away")
        moment = NOON + SECOND if self.is_touched else NOON
        schedule = SimpleNamespace(**vars(self.schedule) | {"updated": moment})
        return SimpleNamespace(id=self.deployment.id, schedules=[schedule, *self.others])

    async def update_deployment_schedule(self, _: object, __: object, *, active: bool) -> None:
        self.schedule.active = active


@pytest.mark.parametrize(
    ("failures", "is_touched", "goes_on"),
    [(0, False, False), (0, True, False), (3, False, False), (3, True, True)],
    ids=["at once", "of an older reading", "after an outage", "and a restart during it"],
)
def test_a_job_that_was_started_again_is_not_put_away(monkeypatch, failures, is_touched, goes_on):
    """Somebody has done that while this node waited for the API, to tell it of the end before."""
    monkeypatch.setattr(telling, "RETRY_SECONDS", 0)
    skipped: list[object] = []

    async def runs_of(*what: object) -> list[Any]:
        skipped.append(what)
        return []

    monkeypatch.setattr(ends, "runs_of", runs_of)
    api: Any = Api(failures=failures, is_touched=is_touched)
    job: Any = SimpleNamespace(name="flow/job", slug="slug", deployment=api.deployment)

    async def go() -> None:
        ending = Ends(node(api), unheard, unheard)
        ending.end(job, "it failed")
        await ending.wait()

    asyncio.run(go())
    assert api.schedule.active is goes_on
    assert bool(skipped) is not goes_on


def test_what_is_planned_of_another_trigger_is_not_skipped(monkeypatch):
    """A run has ended its job that began before the job was deployed anew, with another trigger."""
    api: Any = Api()
    api.others = [SimpleNamespace(id=uuid4(), slug="another", active=True, updated=NOON)]
    job_id, skipped = api.deployment.id, list[Any]()
    old, new = (
        tick(job_id, 5, planned=False).model_copy(
            update={"idempotency_key": ticks.tick_key(job_id, schedule.id, NOON)}
        )
        for schedule in (api.schedule, *api.others)
    )

    async def runs_of(*_: object) -> list[Any]:
        return [old, new]

    async def skip(run: Any, _: str) -> None:
        skipped.append(run)

    monkeypatch.setattr(ends, "runs_of", runs_of)
    job: Any = SimpleNamespace(name="flow/job", slug="slug", deployment=api.deployment)

    async def go() -> None:
        mine = node(api)
        monkeypatch.setattr(mine.teller, "skip", skip)
        ending = Ends(mine, unheard, unheard)
        ending.end(job, "it failed")
        await ending.wait()

    asyncio.run(go())
    assert not api.schedule.active
    assert api.others[0].active
    assert skipped == [old]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_what_the_scheduler_was_planning_meanwhile_ends_too(monkeypatch, is_restarted):
    """It had read the schedule before it was stopped, and stores its runs after that.

    What is due is skipped, what is not is deleted: a job that is started again has it planned anew.
    """
    api: Any = Api()
    now = (datetime.now(UTC) - NOON).total_seconds()
    due, ahead = (tick(api.deployment.id, now + seconds) for seconds in (-5, 86400))
    plans, skipped, deleted = [[], [due, ahead]], list[Any](), list[Any]()

    async def runs_of(*_: object) -> list[Any]:
        return plans.pop(0)

    async def skip(run: Any, _: str) -> None:
        skipped.append(run)

    async def delete_run(_: object, run: Any) -> None:
        deleted.append(run)

    monkeypatch.setattr(ends, "runs_of", runs_of)
    monkeypatch.setattr(ends, "delete_run", delete_run)
    monkeypatch.setattr(ends, "PLANNED_SECONDS", 0.2)
    job: Any = SimpleNamespace(name="flow/job", slug="slug", deployment=api.deployment)

    def put_away(_: object) -> None:
        api.schedule.active = is_restarted

    async def go() -> None:
        mine = node(api)
        monkeypatch.setattr(mine.teller, "skip", skip)
        ending = Ends(mine, unheard, put_away)
        ending.end(job, "it failed")
        await ending.wait()
        assert plans, "a node that stops does not wait for this"
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(go())
    assert not plans
    assert (skipped, deleted) == (([], []) if is_restarted else ([due], [ahead]))
