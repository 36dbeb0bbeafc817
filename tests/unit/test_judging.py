"""Which of the runs that have a place are not to be claimed."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent import judging
from taskadapter.agent.hand import Hand
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.jobs import Deployments
from taskadapter.agent.judging import Judge
from taskadapter.agent.queue import Queue, any_run
from taskadapter.agent.runs import Life, Phase
from taskadapter.declare.triggers import TriggerConfiguration
from tests.unit.given import JOB, NOON, SECOND, node, tick


def new_judge(look_for: Any) -> Any:
    """One of a node that has no run in hand."""
    nothing: Any = None
    hand = Hand(Deployments(nothing).known)
    return Judge(node(), nothing, nothing, Queue(), hand, nothing, look_for)


@pytest.mark.parametrize(
    "before", ["in hand", "to be made", "another node's", "begun", "before the start", "none"]
)
def test_a_tick_after_the_end_waits_for_those_before_it(monkeypatch, before):
    """It ends its job, and what has not begun by then never does: a busy agent takes many ticks at once."""
    news: list[News] = []
    judge = new_judge(news.append)
    ended: list[str] = []
    judge._ends = SimpleNamespace(end=lambda _, reason: ended.append(reason))
    trigger = TriggerConfiguration(interval=1, start_time=NOON - 2 * SECOND, end_time=NOON)
    job: Any = SimpleNamespace(trigger=trigger, slug="slug", deployment=SimpleNamespace(id=JOB))
    judge._node = SimpleNamespace(pool=lambda: SimpleNamespace(base_job_template={}))
    judge._timetable = SimpleNamespace(
        fell_into_pause=lambda _: False, owes=lambda *_: before == "to be made", end=lambda *_: None
    )
    after = judge._hand.take(tick(JOB, 1), None)
    at_prefect = [tick(JOB, 1), tick(JOB, 2), tick(JOB, -9, planned=False)]
    if before in {"in hand", "begun"}:
        last = judge._hand.take(tick(JOB, 0), None)
        last.life = Life(Phase.BEGUN if before == "begun" else Phase.CLAIMED)
        at_prefect.append(last.flow_run)
    if before == "another node's":
        at_prefect.append(tick(JOB, 0))
    if before == "before the start":
        at_prefect.append(tick(JOB, -3))

    async def runs_of(*_: object) -> list[Any]:
        return at_prefect

    monkeypatch.setattr(judging, "runs_of", runs_of)
    assert asyncio.run(judge._is_unwanted(after, job))

    if before in {"begun", "before the start", "none"}:
        assert ended == ["the schedule ended at 2030-01-01T12:00:00+00:00"]
    else:
        assert ended == []
        assert news == [News(Kind.WAITS, after.flow_run.id)], "they may not be known here"
        assert judge._queue.firsts() == [after.flow_run]
        assert judge._queue.first(any_run, time.monotonic()) is None, "not at once again"
        assert judge._queue.first(any_run, time.monotonic() + 15) is after.flow_run


class Client:
    """Has each deployment, and deletes runs."""

    def __init__(self):
        self.deleted = []

    async def read_deployment(self, _):
        pass

    async def delete_flow_run(self, run_id):
        self.deleted.append(run_id)


@pytest.mark.parametrize(("now", "is_left"), [(5, True), (2, False), (None, False)])
def test_what_was_planned_before_an_edit_is_deleted(now, is_left, monkeypatch):
    """If its schedule has no such tick now; where it has, the plan that is known is an old one."""
    news: list[News] = []
    judge, job_id = new_judge(news.append), uuid4()
    judge._timetable = SimpleNamespace(is_off_plan=lambda _: True)
    judge._client = client = Client()
    monkeypatch.setattr(judging, "plan_of", lambda _: now)
    monkeypatch.setattr(judging, "is_off", lambda plan, _: plan == 5)
    planned = tick(job_id, 2)

    assert asyncio.run(judge._is_off_plan(planned)) is is_left
    assert client.deleted == ([planned.id] if is_left else [])
    assert news == ([] if is_left else [News(Kind.DEPLOYMENT, job_id)])
    begun = planned.model_copy(update={"run_count": 1})
    assert not asyncio.run(judge._is_off_plan(begun)), "it has begun on another node"
