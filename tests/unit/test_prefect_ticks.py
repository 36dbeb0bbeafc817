"""What an agent reads of a pool, against an API that lists so many runs at once."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import NAMESPACE_OID, uuid4, uuid5

from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

from taskadapter.prefect_api import ticks

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
PAGE, MANY = 4, 2
POOL = "pool"


class Api:
    """Lists the runs of one queue after the other, as a pool's queues come, each by time.

    Those of a queue come as the jobs, by their letters, and the minutes after noon at which each is due.
    """

    def __init__(self, *queues):
        self.queues = [[run(job, at) for job, at in self.pairs(queue)] for queue in queues]
        self.asked = 0

    @staticmethod
    def pairs(queue):
        return [(job, at) for job, times in queue.items() for at in times]

    async def get_scheduled_flow_runs_for_work_pool(self, pool, *, work_queue_names, scheduled_before):
        self.asked += 1
        assert pool == POOL
        queues = (
            self.queues if work_queue_names is None else [self.queues[int(n)] for n in work_queue_names]
        )
        runs = [one for queue in queues for one in by_time(queue) if when(one) <= scheduled_before]
        return [SimpleNamespace(flow_run=one) for one in runs[:PAGE]]

    async def get_scheduled_flow_runs_for_deployments(self, job_ids, scheduled_before):
        self.asked += 1
        runs = by_time([one for queue in self.queues for one in queue if one.deployment_id in job_ids])
        return [one for one in runs if when(one) <= scheduled_before][:PAGE]


def when(run):
    return run.next_scheduled_start_time


def by_time(runs):
    return sorted(runs, key=when)


def after(minutes):
    return NOON + timedelta(minutes=minutes)


def job_id(letter):
    return uuid5(NAMESPACE_OID, letter.lower())


def run(letter, at):
    """A tick of a job, or with a capital letter a run of it that somebody has asked for."""
    return FlowRun(
        id=uuid4(),
        name=f"{letter}{at}",
        flow_id=uuid4(),
        deployment_id=job_id(letter),
        expected_start_time=after(at),
        next_scheduled_start_time=after(at),
        auto_scheduled=letter.islower(),
        work_pool_name=POOL,
    )


def found(monkeypatch, api, jobs, late="", **how):
    """What a look at noon finds, of jobs of which some are known to be late."""
    monkeypatch.setattr(ticks, "PAGE", PAGE)
    monkeypatch.setattr(ticks, "MANY_LATE", MANY)
    monkeypatch.setattr(ticks, "datetime", SimpleNamespace(now=lambda _: NOON))
    queues = how.pop("queues", None)
    ids, known = ([job_id(letter) for letter in letters] for letters in (jobs, late))
    return asyncio.run(ticks.due(api, POOL, queues, after(60), job_ids=ids, late=lambda: known, **how))


def test_what_fits_into_one_list_is_asked_for_once(monkeypatch):
    """And all that is due is there."""
    api: Any = Api({"a": [-2, 5]}, {"b": [3]})
    due = found(monkeypatch, api, "ab")
    assert {one.name for one in due.runs} == {"a-2", "a5", "b3"}
    assert (due.until, due.is_cut, due.behind, api.asked) == (after(60), False, {}, 1)


def test_a_job_that_is_late_hides_no_run_of_another(monkeypatch):
    """Neither a tick of it, nor what somebody asks for or retries; nor do two, in whatever queues."""
    api: Any = Api({"a": range(-50, 0), "b": range(-40, 0), "C": [-1]}, {"d": [-3, 20]})
    due = found(monkeypatch, api, "abcd")
    names = {one.name for one in due.runs}
    assert {"a-50", "b-40", "C-1", "d-3", "d20"} <= names
    assert (due.until, due.is_cut) == (after(60), False)
    assert due.behind == {job_id("a"): after(-47), job_id("b"): after(-37)}
    assert names == {"a-50", "a-49", "a-48", "a-47", "b-40", "b-39", "b-38", "b-37", "C-1", "d-3", "d20"}


def test_many_late_jobs_hide_no_run_of_another(monkeypatch):
    """However their backlogs mix; and each of them goes on, the ones that came later, too."""
    late = "abcdef"
    api: Any = Api({letter: range(-50, 0) for letter in late} | {"G": [-1], "h": [20]})
    due = found(monkeypatch, api, late + "gh", late=late)
    assert {"G-1", "h20"} | {f"{letter}-50" for letter in late} <= {one.name for one in due.runs}
    assert (due.until, due.is_cut) == (after(60), False)
    assert due.behind.keys() == {job_id(letter) for letter in late}
    assert api.asked == 1 + 2 + 1


def test_a_late_job_with_runs_that_were_asked_for_hides_no_other(monkeypatch):
    """They come by their time, as far as one list goes."""
    api: Any = Api({"A": [-9, -8, -7, -6, -5], "a": [-4], "b": [-1]})
    due = found(monkeypatch, api, "ab", late="a")
    assert {one.name for one in due.runs} == {"A-9", "A-8", "A-7", "A-6", "b-1"}
    assert (due.until, due.is_cut) == (after(-6) - timedelta.resolution, True)


def test_a_job_that_is_not_late_is_listed_as_far_as_one_list_goes(monkeypatch):
    """All until some moment are, and perhaps others at that very moment."""
    api: Any = Api({"a": range(10, 60), "b": [11]})
    due = found(monkeypatch, api, "ab")
    assert {one.name for one in due.runs} == {"a10", "a11", "b11", "a12"}
    assert (due.until, due.is_cut, due.behind) == (after(12) - timedelta.resolution, True, {})


def test_many_jobs_that_are_a_little_late_come_by_their_time(monkeypatch):
    """Whatever their queues: the oldest come first."""
    api: Any = Api({letter: [-1] for letter in "efghi"}, {letter: [-5] for letter in "abcd"})
    due = found(monkeypatch, api, "abcdefghi")
    assert {"a-5", "b-5", "c-5", "d-5"} <= {one.name for one in due.runs}
    assert (due.until, due.is_cut) == (after(-5) - timedelta.resolution, True)


def test_what_is_withheld_is_listed_as_prefect_lets_it_through(monkeypatch):
    """A queue that is limited is not asked for by its jobs: they would be more than it may have."""
    api: Any = Api({"a": range(-50, 0)}, {"b": [-2]}, {"c": [-3]})
    due = found(monkeypatch, api, "ac", withheld={"1"})
    assert {"b-2", "c-3"} <= {one.name for one in due.runs}
    assert not due.is_cut


def test_what_is_left_of_a_job_in_another_pool_is_not_this_ones(monkeypatch):
    """A late tick stays there when its deployment moves."""
    api: Any = Api({"a": range(-50, 0), "b": [-1]})
    api.queues[0][-1].work_pool_name = "other"
    names = {one.name for one in found(monkeypatch, api, "ab").runs}
    assert "b-1" not in names


def test_what_waits_in_its_process_for_another_attempt_is_not_due(monkeypatch):
    """It is Scheduled for Prefect; no pool lists it, but a job does."""
    api: Any = Api({"a": range(-50, 0), "b": [-2, -1]})
    api.queues[0][-1].empirical_policy.retry_type = "in_process"
    names = {one.name for one in found(monkeypatch, api, "ab").runs}
    assert "b-2" in names
    assert "b-1" not in names


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
