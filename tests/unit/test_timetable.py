"""Which ticks a job owes, and what settling one does."""

import asyncio
import logging
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Scheduled

from taskadapter.agent import making
from taskadapter.agent.making import Maker
from taskadapter.agent.plans import MADE_AT_ONCE
from taskadapter.agent.timetable import Timetable
from taskadapter.coordination.executions import Entered
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.prefect_api.ticks import Due
from taskadapter.rules.ticks import slug, tick_of
from tests.unit.given import JOB, LOG, NOON, SECOND, at, line, plan, tick


def test_what_is_owed_until_the_end():
    """A tick is, until it is settled; of a job that is not known nothing is."""
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    timetable._lines = {JOB: line(end_time=NOON + 5 * SECOND)}

    assert timetable.owes(JOB, NOON + 9 * SECOND)
    timetable.settle(tick(JOB, 5))
    assert timetable.owes(JOB, NOON + 9 * SECOND), "the one before it"
    timetable.settle(tick(JOB, 0))
    assert not timetable.owes(JOB, NOON + 9 * SECOND)
    assert not timetable.owes(None, NOON)


class Api:
    """Makes ticks, except those that it is asked to fail for."""

    def __init__(self, *failing):
        self.failing = failing
        self.made = []

    async def make(self, job, tick):
        if tick in self.failing:
            raise httpx.ConnectError("away")
        self.made.append(tick)
        run_id, key = uuid4(), f"scheduled {job.deployment_id} {JOB} {tick.isoformat(sep=' ')}"
        return FlowRun(id=run_id, flow_id=JOB, deployment_id=job.deployment_id, idempotency_key=key)


def complete(api, *jobs, now, found=(), until=None):
    """What a look makes of the lines of some jobs, of which some runs were found."""
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    timetable._lines = {job.deployment_id: job for job in jobs}
    timetable._maker.make = api.make
    now = NOON + now * SECOND
    until = now if until is None else NOON + until * SECOND
    found = asyncio.run(timetable.complete(Due([*found], until), ["default"], [], now))
    return [(run.deployment_id, tick_of(run)) for run in found], timetable


def test_a_job_of_which_more_is_late_than_is_listed_is_looked_at_soon():
    """Where the node has room for all that is listed, what follows is late, too."""
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    timetable._lines = {JOB: line()}
    listed = [tick(JOB, second) for second in (0, 5, 10)]
    now = NOON + 60 * SECOND
    due = Due(listed, now + 30 * SECOND, behind={JOB: NOON + 10 * SECOND})
    assert asyncio.run(timetable.complete(due, ["default"], [], now)) == listed
    assert timetable.complete_until == now


def test_a_job_with_many_late_ticks_is_late():
    """It is known of those that the agent has looked after."""
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    done = line(job_id=uuid4())
    timetable._lines = {JOB: line(), done.deployment_id: done}
    for second in range(0, 50, 5):
        done.settle(NOON + second * SECOND)
    assert timetable.late(NOON + 45 * SECOND) == {JOB}
    assert timetable.late(NOON + 44 * SECOND) == set()


def test_a_tick_that_cannot_be_made_holds_up_its_own_job_only():
    """Later ticks of that job wait for it, those of others begin, and it is tried again soon."""
    one, other = line(), line()
    other.deployment_id = UUID(int=2)
    api: Any = Api()
    made, timetable = complete(api, one, other, now=10)
    assert made == [(job, tick) for tick in at(0, 5, 10) for job in (JOB, UUID(int=2))]
    assert timetable.complete_until == NOON + 10 * SECOND

    async def fails_for_one(job, tick):
        if (job, tick) == (one, NOON + 5 * SECOND):
            raise httpx.ConnectError("away")
        return await Api.make(api, job, tick)

    api.make = fails_for_one
    made, timetable = complete(api, one, other, now=10)
    assert [tick for job, tick in made if job == JOB] == at(0)
    assert [tick for job, tick in made if job != JOB] == at(0, 5, 10)
    assert timetable.complete_until == NOON + 10 * SECOND


def test_that_ticks_are_made_is_told_once(caplog):
    """Until Prefect plans some again: its scheduler may be away for hours."""
    caplog.set_level("INFO")
    api: Any = Api()
    job = line()
    _, timetable = complete(api, job, now=0)
    planned = FlowRun(id=uuid4(), flow_id=JOB, deployment_id=JOB, auto_scheduled=True)

    def look(now, *found):
        moment = NOON + now * SECOND
        asyncio.run(timetable.complete(Due([*found], moment), ["default"], [], moment))
        return len(caplog.messages)

    assert (look(5), look(10), look(15, planned), look(20)) == (1, 1, 2, 2)


def test_what_prefect_withholds_is_made_once_and_waits():
    """A pause, or a limit, of the pool or a queue holds for ticks that are made, too."""
    api: Any = Api()
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    timetable._lines, timetable._maker.make = {JOB: line()}, api.make

    def look(seconds, *withheld):
        now = NOON + seconds * SECOND
        found = asyncio.run(timetable.complete(Due([], now), ["default"], [], now, withheld))
        return [tick_of(run) for run in found]

    assert look(5, "default") == []
    assert timetable.complete_until == NOON + 5 * SECOND, "they may be listed already"
    assert look(6, "default") == []
    assert timetable.complete_until > NOON + 5 * SECOND
    assert api.made == at(0, 5)
    assert look(10) == at(0, 5, 10)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_queue_that_is_lost_while_its_lines_are_begun(is_lost):
    """Where its jobs are by then is another agent's to know; they would be old when it comes back."""

    async def entered(_):
        if is_lost:
            timetable.forget("default")
        return {JOB: Entered(dues=(NOON,))}

    timetable: Any = Timetable(None, logging.getLogger("test"), entered)
    timetable._plans = {JOB: plan(created=datetime(2020, 1, 1, tzinfo=UTC))}
    timetable._deployments = {JOB: SimpleNamespace(name="job", paused=False)}
    asyncio.run(timetable.complete(Due([], NOON), ["default"], [], NOON))
    assert bool(timetable._lines) is not is_lost


def test_an_api_that_fails_for_all_is_a_fault():
    """The look has not succeeded."""
    with pytest.raises(httpx.ConnectError):
        complete(Api(*at(0, 5)), line(), now=5)


def test_of_many_jobs_the_oldest_ticks_are_made_first():
    """A bounded number at one look, so that they begin; of no job a later one without an earlier one."""
    jobs = [line() for _ in range(10)]
    for number, job in enumerate(jobs):
        job.deployment_id = UUID(int=number + 1)
    api = Api()
    made, timetable = complete(api, *jobs, now=60)

    assert len(made) == len(api.made) == MADE_AT_ONCE
    assert api.made == sorted(api.made)
    assert max(api.made) == NOON + 30 * SECOND
    assert timetable.complete_until <= NOON + 60 * SECOND


def test_where_more_is_due_than_is_listed_each_job_has_its_turn():
    """What is due later is not missing; of a job that is not in the list all is seen to."""
    deep, other = line(), line()
    other.deployment_id = UUID(int=2)
    api = Api()
    listed = [asyncio.run(Api().make(deep, tick)) for tick in at(0, 5)]
    other.through = NOON + 50 * SECOND
    found, timetable = complete(api, deep, other, now=60, found=listed, until=5)

    assert found == [(JOB, tick) for tick in at(0, 5)] + [(UUID(int=2), tick) for tick in at(55, 60)]
    assert api.made == at(55, 60)
    assert timetable.is_cut


def test_a_job_that_has_ended_goes_on_with_another_trigger():
    """A run of the former one has ended it, which went on when the job was deployed anew."""
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    timetable._plans, timetable._lines = {JOB: plan()}, {JOB: line()}
    timetable.end(JOB, slug(TriggerConfiguration(interval=7)))
    assert timetable.owes(JOB, NOON)
    timetable.end(JOB, slug(TriggerConfiguration(interval=5)))
    assert not timetable.owes(JOB, NOON)


class Withdrawing:
    """An API whose answers to a withdrawal are lost, so many times."""

    def __init__(self, *, lost: int) -> None:
        self.lost, self.deleted = lost, 0
        self.run = FlowRun(
            id=uuid4(), flow_id=JOB, deployment_id=JOB, work_queue_id=uuid4(), state=Scheduled()
        )

    async def create_tick(self, *_: object) -> FlowRun:
        if self.deleted:
            return FlowRun(id=uuid4(), flow_id=JOB, deployment_id=JOB, work_queue_id=JOB, state=Scheduled())
        return self.run

    async def read_deployment(self, _: object) -> Any:
        return SimpleNamespace(work_queue_id=JOB)

    async def set_flow_run_state(self, _: object, state: Any) -> Any:
        self.run.state = state
        return SimpleNamespace(status=SetStateStatus.ACCEPT)

    async def delete_flow_run(self, _: object) -> None:
        if self.lost:
            self.lost -= 1
            raise httpx.ReadTimeout("no answer")
        self.deleted += 1


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_tick_is_not_lost_that_was_being_withdrawn(monkeypatch, has_begun):
    """It waited on the former queue of its job; claimed, and not deleted, it would be nobody's."""

    async def asks(job_id, tick):
        assert (job_id, tick) == (JOB, NOON)
        return has_begun

    api: Any = Withdrawing(lost=1)
    maker, job = Maker(api, LOG, asks, keeps=lambda _: True), line()
    monkeypatch.setattr(making, "create_tick", api.create_tick)

    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(maker.make(job, NOON))
    found = asyncio.run(maker.make(job, NOON))

    assert (found is None) is has_begun
    assert api.deleted == (0 if has_begun else 1)
    assert bool(job.owed(NOON)) is not has_begun


def test_a_tick_of_a_job_that_has_ended_meanwhile_is_not_made(monkeypatch):
    """Or whose schedule was changed: it would run what is over."""
    made: list[datetime] = []

    async def create_tick(*given: Any) -> FlowRun:
        made.append(given[-1])
        return FlowRun(id=uuid4(), flow_id=JOB, work_queue_id=job.plan.queue_id, state=Scheduled())

    monkeypatch.setattr(making, "create_tick", create_tick)
    timetable: Any = Timetable(None, LOG, None)
    timetable._lines = {JOB: (job := line())}
    assert asyncio.run(timetable._maker.make(job, NOON)) is not None
    timetable.leave_out([JOB])
    assert asyncio.run(timetable._maker.make(job, NOON + 5 * SECOND)) is None
    assert made == [NOON]


def test_a_job_that_has_ended_is_over_until_somebody_switches_it_on():
    """What was read before Prefect was told of its end shows it as active; a later switch counts."""
    timetable: Any = Timetable(None, logging.getLogger("test"), None)
    trigger = TriggerConfiguration(interval=5)

    def jobs(switched, active=True):
        """Return the agent's jobs after it has read the deployment, switched at that second."""
        schedule = SimpleNamespace(
            id=JOB, slug=slug(trigger), active=active, schedule=None, updated=NOON + switched * SECOND
        )
        variables = {"trigger": trigger.model_dump(mode="json", exclude_defaults=True)}
        read = SimpleNamespace(
            id=JOB, name="job", work_queue_name="group", schedules=[schedule], job_variables=variables
        )
        timetable.learn([read])
        return [*timetable._deployments]

    assert jobs(0) == [JOB]
    timetable.end(JOB, slug(trigger))
    timetable.end(JOB, slug(trigger))  # by a run, and by a judgement
    assert jobs(0) == []
    assert jobs(0) == []
    assert jobs(9) == [JOB]
    timetable.end(JOB, slug(trigger))
    assert jobs(9) == []
    assert jobs(10, active=False) == [JOB], "it is seen to be off, and has no plan"
    assert jobs(11) == [JOB]
