"""The semantics of ticks, a test for each rule: jobs that a program schedules, an agent that runs them.

One program schedules all jobs of the module, in a few acts, so that no more run side by side than a server
on a small machine can follow; the tests look at what they have entered into the ledger.
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.schemas.objects import StateType

from deployments.local import agent, wait_until
from taskadapter import (
    JobId,
    get_running_jobs,
    pause_all_jobs,
    pause_job,
    resume_all_jobs,
    resume_job,
    unschedule_job,
)
from tests.acceptance.project import PATIENCE, Entry, Prefect, Project, due, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Program

# A server on a small machine cannot follow when this is played faster.
pytestmark = pytest.mark.slow

PROMPT = 3.0
"""Seconds within which a tick on a free host has begun, also on a machine that is busy elsewhere."""

CLAIMED = 1.0
"""Seconds ahead of its time that a tick is claimed; then it begins, whatever happens to its job."""

LATE_POOL = "acceptance-conformance-late"
"""A pool whose agent starts after its jobs were due."""

TICK = """
    import time
    from ledger import note
    from taskadapter import Job, current_run

    class Tick(Job):
        \"\"\"Enters when it begins and ends.\"\"\"

        name: str
        seconds: float = 0.0
        first_seconds: float = 0.0
        fails: bool = False

        def execute(self) -> None:
            run = current_run()
            note(self.name, "began", due=run.scheduled_time.timestamp(), count=run.count)
            time.sleep(self.first_seconds if run.count == 1 and self.first_seconds else self.seconds)
            note(self.name, "ended", due=run.scheduled_time.timestamp())
            if self.fails:
                raise ValueError("as always")
"""

RETRIED = """
    from datetime import datetime
    from pathlib import Path
    from ledger import note
    from taskadapter import (
        ErrorPolicy, Listener, RetryConfiguration, RetryStrategy, Service, TaskPolicy,
        TriggerConfiguration, current_run,
    )

    START = datetime.fromisoformat(Path(__file__).with_name("start").read_text())

    def listener(interval, max_count, retry_interval, max_attempts, strategy):
        return Listener(
            trigger=TriggerConfiguration(interval=interval, max_count=max_count, start_time=START),
            retry_config=RetryConfiguration(
                max_attempts=max_attempts, retry_interval=retry_interval, backoff_strategy=strategy
            ),
            task_policy=TaskPolicy(error_policy=ErrorPolicy.CONTINUE),
        )

    def fail(name):
        run = current_run()
        note(name, "began", due=run.scheduled_time.timestamp(), count=run.count, attempt=run.attempt)
        raise ConnectionError("as always")

    @listener(6, 2, 1, 5, RetryStrategy.FIXED).service("fixed")
    def fixed() -> None:
        fail("fixed")

    @listener(6, 2, 1, 50, RetryStrategy.EXPONENTIAL).service("doubling")
    def doubling() -> None:
        fail("doubling")

    @listener(20, 1, 2, 50, RetryStrategy.EXPONENTIAL).service("long-doubling")
    def long_doubling() -> None:
        fail("long-doubling")

    @Listener(trigger=TriggerConfiguration(interval=1, max_count=3)).service("state")
    class State(Service):
        i: int = 1

        def execute(self) -> None:
            note("state", "began", value=self.i)
            self.i += 1
"""

PROGRAM = """
    import asyncio
    import json
    import time
    from datetime import UTC, datetime, timedelta

    from pathlib import Path

    from flows.conformance import Tick
    from taskadapter import (
        Civil, ErrorPolicy, TaskError, TaskPolicy, WaitingPolicy, ZoneOffset, get_running_jobs,
        schedule_job_recur_by_frequency, schedule_one_time_job,
    )
    from taskadapter.deploy import deploy
    from taskadapter.listener import listeners

    scheduled, refused = {{}}, {{}}

    def note(name, called, job_id, **times):
        scheduled[name] = {{"id": str(job_id), "called": called, **times}}

    def recur(name, interval, max_count=-1, start=None, end=None, fields=(), **policy):
        called = time.time()
        job, policy = Tick(name=name, **dict(fields)), TaskPolicy(**policy)
        job_id = schedule_job_recur_by_frequency(job, interval, max_count, start, end, policy, name=name)
        times = {{key: at.timestamp() for key, at in (("start", start), ("end", end)) if at is not None}}
        note(name, called, job_id, **times)

    def once(name, at, **options):
        called = time.time()
        note(name, called, schedule_one_time_job(Tick(name=name), at, name=name, **options))

    def refuse(name, schedule, *args):
        try:
            schedule(Tick(name=name), *args)
        except TaskError as error:
            refused[name] = str(error)

    def at(seconds):
        return datetime.now(UTC) + timedelta(seconds=seconds)

    def end_of_act():
        ours = {{job["id"] for job in scheduled.values()}}
        patience = time.monotonic() + 60
        while ours & set(map(str, get_running_jobs())) and time.monotonic() < patience:
            time.sleep(0.2)

    recur("five", 1, 5)
    end_of_act()  # the first tick is about an idle agent
    for name in ("prompt-1", "prompt-2"):
        recur(name, 60, 1)
        end_of_act()

    moment = at(15)  # when the others have ended
    once("once", moment)
    scheduled["once"]["start"] = moment.timestamp()
    local = (moment + timedelta(hours=5, minutes=30)).replace(tzinfo=None)
    civil = Civil(
        year=local.year, month=local.month, day=local.day, hour=local.hour, minute=local.minute,
        second=local.second, utc_offset=ZoneOffset(hours=5, minutes=30),
    )
    once("civil", civil)
    scheduled["civil"]["start"] = moment.replace(microsecond=0).timestamp()
    start = at(6)
    recur("window", 1, start=start, end=start + timedelta(seconds=3))

    for policy in ErrorPolicy:
        failing = {{"fails": True}}
        recur(f"fails-{{policy}}", 1.5, 3, fields=failing, error_policy=policy)
    end_of_act()

    for policy, count in (("WAIT", 5), ("IGNORE", 4), ("LOG_AND_IGNORE", 4)):
        busy = {{"first_seconds": 11.5}}
        recur(f"busy-{{policy}}", 6, count, fields=busy, waiting_policy=policy, max_concurrent=1)

    end_of_act()

    late_start = at(12)
    Path("flows/start").write_text(late_start.isoformat())

    for policy in ("WAIT", "IGNORE"):
        moment = at(1)
        options = {{"task_policy": TaskPolicy(waiting_policy=policy), "work_pool": "{late_pool}"}}
        once(f"late-{{policy}}", moment, **options)

    refuse("past", schedule_one_time_job, at(-60))
    refuse("short", schedule_job_recur_by_frequency, 0.01)
    refuse("none", schedule_job_recur_by_frequency, 1, 0)
    refuse("negative", schedule_job_recur_by_frequency, 1, -2)

    import flows.retried  # which reads when to start

    for listener in list(listeners):
        for name, job_id in asyncio.run(deploy(listener)).items():
            note(name, time.time(), job_id, start=late_start.timestamp())
    end_of_act()

    for name, fields, policy in (
        ("overlapping", {{"seconds": 5}}, {{}}), ("single", {{"seconds": 1.5}}, {{"max_concurrent": 1}})
    ):
        recur(name, 1, 3, start=at(3), fields=fields, **policy)
    end_of_act()

    recur("paused-WAIT", 5, 5, waiting_policy="WAIT")
    recur("paused-IGNORE", 5, 4, waiting_policy="IGNORE")
    recur("gone", 1)
    print(json.dumps({{"scheduled": scheduled, "refused": refused}}))
"""

ALL = """
    import json
    from flows.conformance import Tick
    from taskadapter import schedule_job_recur_by_frequency

    ids = [str(schedule_job_recur_by_frequency(Tick(name=name), 1)) for name in ("all-1", "all-2")]
    print(json.dumps(ids))
"""

AGAIN = """
    from flows.conformance import Tick
    from taskadapter import schedule_job_recur_by_frequency

    print(schedule_job_recur_by_frequency(Tick(name="five"), 1, 5, name="five"))
"""


@dataclass
class Play:
    """What was scheduled and done.

    Attributes:
        project: the folder, with the ledger.
        prefect: the API.
        node: the agent.
        scheduled: by name: the job's `id`, when the function was `called`, and `start` and `end`.
        refused: the messages of what was refused, by name.
        times: when something was done, in seconds since the epoch.
        at_first: the running jobs after all were scheduled.
    """

    project: Project
    prefect: Prefect
    node: Program
    scheduled: dict[str, dict[str, Any]]
    refused: dict[str, str]
    times: dict[str, float] = field(default_factory=dict)
    at_first: list[JobId] = field(default_factory=list)

    def job_id(self, name: str) -> JobId:
        """Return the id of a job."""
        return JobId(self.scheduled[name]["id"])

    def began(self, name: str) -> list[Entry]:
        """Return the attempts of a job so far."""
        return self.project.entries(name, "began")

    def dues(self, name: str) -> list[float]:
        """Return when the attempts of a job were due, in the order of beginning."""
        return [entry["due"] for entry in self.began(name)]

    def first(self, name: str) -> float:
        """Return when a job's first tick was due."""
        return float(self.project.wait_for(name, "began")[0]["due"])

    def is_running(self, name: str) -> bool:
        """Return whether a job still has something to do."""
        return self.job_id(name) in get_running_jobs(work_pool=self.project.pool)

    def wait_for_end(self, name: str) -> None:
        """Wait until a job has had its last run."""
        wait_until(lambda: not self.is_running(name), PATIENCE, f"{name} to end")

    def runs(self, name: str, *states: str) -> list[FlowRun]:
        """Return a job's runs in any or the named states, in the order of their times."""
        found = self.prefect.runs_of(self.job_id(name).id)
        return sorted((run for run in found if not states or run.state_name in states), key=due)

    def skipped(self, name: str) -> list[float]:
        """Return when the ticks of a job that were skipped had been due."""
        return [due(run).timestamp() for run in self.runs(name, "Skipped")]

    def wait_for_skipped(self, name: str, count: int) -> list[float]:
        """Wait until so many ticks of a job show as skipped."""
        return wait_until(
            lambda: found if len(found := self.skipped(name)) >= count else [],
            PATIENCE,
            f"{count} skipped ticks of {name}",
        )


@pytest.fixture(scope="module")
def play(project: Project, prefect: Prefect) -> Iterator[Play]:
    """All jobs of the module, scheduled beside an idle agent, and what is done to some of them."""
    project.write("flows/conformance.py", TICK)
    project.write("flows/retried.py", RETRIED)
    project.write("program.py", PROGRAM.format(late_pool=LATE_POOL))
    project.write("all.py", ALL)
    project.write("again.py", AGAIN)
    # The pool must be there, or the agent would make it.
    prefect_pool(project)
    with project.agent("node-1", "--limit", "10") as node:
        wait_until(lambda: "started!" in node.output(), PATIENCE, "the agent to start")
        answer = json.loads(project.run(sys.executable, "program.py", within=240))
        played = Play(project, prefect, node, **answer)
        played.at_first = get_running_jobs(work_pool=project.pool)
        act(played)
        yield played


def prefect_pool(project: Project) -> None:
    """Make the module's pool as a program does."""
    script = "from taskadapter import configure_worker_pool; configure_worker_pool(10, 5)"
    project.run(sys.executable, "-c", script)


def act(play: Play) -> None:
    """Unschedule one job, and pause two for a while."""
    first = max(play.first("paused-WAIT"), play.first("paused-IGNORE"))
    # Between two ticks, whichever; what the calls take is part of the three seconds.
    first += 5 * max(0, math.ceil((time.time() - first - 2) / 5))
    let_pass(first + 2)
    for policy in ("WAIT", "IGNORE"):
        pause_job(play.job_id(f"paused-{policy}"))
    play.times["paused"] = time.time()
    play.first("gone")
    unschedule_job(play.job_id("gone"))
    play.times["unscheduled"] = time.time()
    let_pass(first + 13)
    for policy in ("WAIT", "IGNORE"):
        play.times[f"resumed-{policy}"] = time.time()
        resume_job(play.job_id(f"paused-{policy}"))


def let_pass(until: float) -> None:
    """Wait for a moment."""
    wait_until(lambda: time.time() >= until, max(1.0, until - time.time() + 1), "the time to pass")


def assert_ticks(actual: list[float], expected: list[float]) -> None:
    """The ticks are those expected, to the millisecond."""
    assert [round(moment, 3) for moment in actual] == pytest.approx(expected, abs=0.002)


def ticks(anchor: float, interval: float, numbers: list[int]) -> list[float]:
    """Return the moments of some ticks."""
    return [anchor + number * interval for number in numbers]


def test_a_job_runs_as_often_as_its_maximum_says(play: Play) -> None:
    """Interval 1 s and maximum 5 give five executions, at anchor + n * 1 s, and none is early."""
    play.wait_for_end("five")

    entries = play.began("five")
    dues = sorted(entry["due"] for entry in entries)
    assert_ticks(dues, ticks(dues[0], 1, [0, 1, 2, 3, 4]))
    assert sorted(entry["count"] for entry in entries) == [1, 2, 3, 4, 5]
    assert all(entry.at >= entry["due"] for entry in entries)


def test_the_first_tick_is_at_once(play: Play) -> None:
    """Without a start a job begins within two seconds of the call on an idle agent: the median of three."""
    delays = []
    for name in ("five", "prompt-1", "prompt-2"):
        called = play.scheduled[name]["called"]
        first = play.project.wait_for(name, "began")[0]
        assert called <= first["due"] <= called + 1
        delays.append(first.at - called)

    assert statistics.median(delays) < 2, delays


def test_scheduling_again_by_the_same_name_does_not_reset_the_count(play: Play) -> None:
    """The same declaration is the same job, which has had its runs."""
    play.wait_for_end("five")
    job_id = play.project.run(sys.executable, "again.py").strip()

    assert job_id == str(play.job_id("five"))
    assert not play.is_running("five")
    assert len(play.began("five")) == 5


@pytest.mark.parametrize("name", ["once", "civil"])
def test_a_one_time_job_runs_once_at_its_time(play: Play, name: str) -> None:
    """However the time is given, there is one execution, at that time and not before."""
    start = play.scheduled[name]["start"]
    (entry,) = play.project.wait_for(name, "began")
    play.wait_for_end(name)

    assert entry["due"] == pytest.approx(start, abs=0.001)
    assert start <= entry.at < start + PROMPT
    assert len(play.began(name)) == 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("past", ["passed", str(datetime.now(UTC).year)]),
        ("short", ["0.01", "shorter than Prefect's scheduler can fill", "MAX_RUNS"]),
        ("none", ["at least 1"]),
        ("negative", ["-1 for no limit"]),
    ],
)
def test_what_cannot_be_is_refused(play: Play, name: str, parts: list[str]) -> None:
    """A time in the past, an interval that is too short, a maximum of 0 or below -1 are errors."""
    assert [part for part in parts if part not in play.refused[name]] == []


def test_a_job_runs_from_its_start_to_its_end(play: Play) -> None:
    """The first tick is at the start, the last one at the end; then the job is no longer running."""
    start, end = (play.scheduled["window"][key] for key in ("start", "end"))
    play.wait_for_end("window")

    assert_ticks(sorted(play.dues("window")), ticks(start, 1, [0, 1, 2, 3]))
    assert end == pytest.approx(start + 3)
    assert all(entry.at >= start for entry in play.began("window"))


@pytest.mark.parametrize("policy", ["LOG_AND_TERMINATE", "TERMINATE"])
def test_an_error_ends_a_job(play: Play, policy: str) -> None:
    """A job that always fails runs once, its run is Failed, and the job is no longer running."""
    play.wait_for_end(f"fails-{policy}")

    assert len(play.began(f"fails-{policy}")) == 1
    assert [run.state_type for run in executed(play, f"fails-{policy}")] == [StateType.FAILED]


@pytest.mark.parametrize("policy", ["LOG_AND_CONTINUE", "CONTINUE"])
def test_a_job_goes_on_after_an_error(play: Play, policy: str) -> None:
    """A job that always fails runs as often as its maximum says, and each run is Failed."""
    play.wait_for_end(f"fails-{policy}")

    assert len(play.began(f"fails-{policy}")) == 3
    assert [run.state_type for run in executed(play, f"fails-{policy}")] == [StateType.FAILED] * 3


def executed(play: Play, name: str) -> list[FlowRun]:
    """Return the runs of a job that are neither skipped nor still to come, all of them final."""

    def final() -> list[FlowRun]:
        runs = [run for run in play.runs(name) if run.start_time and run.state_name != "Skipped"]
        return runs if all(state_of(run).is_final() for run in runs) else []

    return wait_until(final, PATIENCE, f"the runs of {name} to end")


def test_a_tick_waits_for_a_busy_job(play: Play) -> None:
    """WAIT runs what was due while the job's only place was taken, in order, and skips nothing."""
    play.wait_for_end("busy-WAIT")

    dues = play.dues("busy-WAIT")
    assert_ticks(dues, ticks(dues[0], 6, [0, 1, 2, 3, 4]))


@pytest.mark.parametrize("policy", ["IGNORE", "LOG_AND_IGNORE"])
def test_a_tick_that_waits_too_long_is_ignored(play: Play, policy: str) -> None:
    """Of two ticks that a busy job held up, the one later than 5 s is skipped; it does not count."""
    name = f"busy-{policy}"
    play.wait_for_end(name)

    dues = play.dues(name)
    assert_ticks(dues, ticks(dues[0], 6, [0, 2, 3, 4]))
    late, *beyond = play.wait_for_skipped(name, 1)
    assert_ticks([late], ticks(dues[0], 6, [1]))
    assert all(moment > dues[-1] for moment in beyond)
    run = play.runs(name, "Skipped")[0]
    assert run.state_type is StateType.CANCELLED
    assert "allows 5 s" in str(state_of(run).message)


def test_only_log_and_ignore_logs(play: Play) -> None:
    """The agent's log has the skipped tick of LOG_AND_IGNORE, and that of IGNORE not."""
    play.wait_for_end("busy-IGNORE")
    play.wait_for_end("busy-LOG_AND_IGNORE")
    log = play.node.output().splitlines()
    skips = [line for line in log if "skips its tick" in line]

    assert len(skips) == 1
    assert "busy-LOG_AND_IGNORE" in skips[0]
    assert "allows 5 s" in skips[0]


def test_missed_ticks_of_a_pause_are_run(play: Play) -> None:
    """Every 5 s, paused from second 3 to 13, maximum 5: WAIT runs all five, the last in second 20."""
    entries = play.project.wait_for("paused-WAIT", "began", 5)
    play.wait_for_end("paused-WAIT")

    first = entries[0]["due"]
    assert_ticks(play.dues("paused-WAIT"), ticks(first, 5, [0, 1, 2, 3, 4]))
    last = max(first + 21, play.times["resumed-WAIT"])  # it is due in second 20
    assert entries[-1].at < last + PROMPT
    assert_paused(play, "WAIT")


def test_missed_ticks_of_a_pause_are_ignored(play: Play) -> None:
    """IGNORE skips the ticks that fell into the pause, and runs as many as its maximum says."""
    play.project.wait_for("paused-IGNORE", "began", 4)
    play.wait_for_end("paused-IGNORE")

    first, *_ = dues = play.dues("paused-IGNORE")
    paused, resumed = play.times["paused"], play.times["resumed-IGNORE"]
    missed = [number for number in range(9) if paused < first + 5 * number <= resumed]
    assert 1 <= len(missed) <= 2  # two, unless it took three seconds to pause
    assert_ticks(dues, ticks(first, 5, [number for number in range(9) if number not in missed][:4]))
    early = [moment for moment in play.wait_for_skipped("paused-IGNORE", len(missed)) if moment < dues[-1]]
    assert_ticks(early, ticks(first, 5, missed))
    assert_paused(play, "IGNORE")


def assert_paused(play: Play, policy: str) -> None:
    """Nothing ran during the pause that was not claimed before it."""
    paused, resumed = play.times["paused"], play.times[f"resumed-{policy}"]
    entries = [entry for entry in play.began(f"paused-{policy}") if entry["due"] > paused + CLAIMED]
    assert [entry for entry in entries if entry.at < resumed] == []


def test_an_unscheduled_job_stops_at_once(play: Play) -> None:
    """No tick begins that was not claimed before the call; the deployment is gone, the history stays."""
    let_pass(play.times["unscheduled"] + 5)

    entries = play.began("gone")
    assert entries
    assert [entry for entry in entries if entry["due"] > play.times["unscheduled"] + CLAIMED] == []
    assert play.job_id("gone") in play.at_first
    assert not play.is_running("gone")
    # What Prefect's scheduler was planning at that moment an agent deletes when it finds it.
    wait_until(
        lambda: {run.state_name for run in play.runs("gone")} <= {"Completed", "Skipped"},
        PATIENCE,
        "what was planned to be put away",
    )
    assert len(play.runs("gone")) >= len(entries)


def test_an_unscheduled_job_is_over_whatever_its_trigger(play: Play) -> None:
    """Its row says so before Prefect does; that of a job which has ended has its count."""
    play.wait_for_end("five")
    with sqlite3.connect(play.project.home / "taskadapter.db") as connection:
        query = "SELECT job_id, run_count, ended, ended_trigger FROM taskadapter_job"
        rows = {job_id: rest for job_id, *rest in connection.execute(query).fetchall()}
    _, ended, trigger = rows[str(play.job_id("gone"))]
    assert (ended is not None, trigger) == (True, None)
    assert rows[str(play.job_id("five"))][0] == 5


def test_fixed_retries_fill_the_interval(play: Play) -> None:
    """Every 6 s, five retries after 1 s each, maximum 2, always failing: 12 executions of the body."""
    play.wait_for_end("fixed")

    assert_attempts(play, "fixed", [0, 1, 2, 3, 4, 5], runs=2, interval=6)


def test_doubling_retries_end_before_the_next_tick(play: Play) -> None:
    """Every 6 s, waits doubling from 1 s, maximum 2: at 0, 1 and 3 s; the next, at 7 s, is not made."""
    play.wait_for_end("doubling")

    assert_attempts(play, "doubling", [0, 1, 3], runs=2, interval=6)


def test_doubling_retries_of_a_long_interval(play: Play) -> None:
    """In 20 s, waits doubling from 2 s: at 0, 2, 6 and 14 s, and no more."""
    play.wait_for_end("long-doubling")
    play.prefect.wait_for_put_away("long-doubling")

    assert_attempts(play, "long-doubling", [0, 2, 6, 14], runs=1, interval=20)


def assert_attempts(play: Play, name: str, moments: list[float], *, runs: int, interval: float) -> None:
    """Each tick made its attempts at these seconds after its time, none early.

    The last one is not made where a machine is so slow that it would begin with the next tick.
    """
    wait_until(lambda: len(executed(play, name)) >= runs, PATIENCE, f"the runs of {name}")
    final = [state_of(play.prefect.wait_for_end(run)).name for run in executed(play, name)]
    assert final == ["Failed"] * runs
    for number in range(runs):
        begins = play.scheduled[name]["start"] + number * interval
        entries = [entry for entry in play.began(name) if entry["count"] == number + 1]
        made = len(entries)
        assert [entry["attempt"] for entry in entries] == [*range(1, made + 1)]
        late = [entry.at - begins - moment for entry, moment in zip(entries, moments[:made], strict=True)]
        assert min(late) >= 0
        assert max(late) < PROMPT, late
        if made < len(moments):
            assert made == len(moments) - 1
            assert entries[-1].at + moments[made] - moments[made - 1] > begins + interval - 0.5


def test_ticks_overlap_where_nothing_prevents_it(play: Play) -> None:
    """On free hosts a tick begins at its time though the one before it has not ended."""
    play.wait_for_end("overlapping")
    ended = play.project.wait_for("overlapping", "ended", 3)

    assert_ticks(
        sorted(play.dues("overlapping")), ticks(play.scheduled["overlapping"]["start"], 1, [0, 1, 2])
    )
    assert all(entry.at - entry["due"] < PROMPT for entry in play.began("overlapping"))
    assert max(entry.at for entry in play.began("overlapping")) < min(entry.at for entry in ended)


def test_a_limit_prevents_overlap(play: Play) -> None:
    """With `max_concurrent=1` each tick begins after the end of the one before it."""
    play.wait_for_end("single")
    ended = play.project.wait_for("single", "ended", 3)

    began = play.began("single")
    assert_ticks([entry["due"] for entry in began], ticks(play.scheduled["single"]["start"], 1, [0, 1, 2]))
    assert all(later.at >= earlier.at for earlier, later in zip(ended, began[1:], strict=False))


def test_the_state_of_a_service_goes_on(play: Play) -> None:
    """Each run of a service begins with the fields that the one before it has left."""
    entries = play.project.wait_for("state", "began", 3)

    assert [entry["value"] for entry in entries] == [1, 2, 3]


def test_running_jobs_are_those_that_have_something_to_do(play: Play) -> None:
    """The jobs of the last act are listed at its beginning, once; those that have ended are not."""
    ours = {name for name in play.scheduled if not name.startswith("late-")}
    assert len(play.at_first) == len(set(play.at_first))
    lasting = {"paused-WAIT", "paused-IGNORE", "gone"}
    assert set(play.at_first) == {play.job_id(name) for name in lasting}
    for name in ours:
        if name != "gone":
            play.wait_for_end(name)
    assert get_running_jobs(work_pool=play.project.pool) == []


def goes_on(play: Play, name: str, since: float) -> bool:
    """Return whether a job has run that was due after a moment."""
    return max(play.dues(name)) > since


def test_all_jobs_can_be_paused_and_resumed(play: Play) -> None:
    """While all are paused nothing runs, and they count as running; then every missed tick is run."""
    pool = play.project.pool
    ids = [JobId(text) for text in json.loads(play.project.run(sys.executable, "all.py"))]
    names = ["all-1", "all-2"]
    firsts = [play.first(name) for name in names]
    pause_all_jobs(work_pool=pool)
    paused = time.time()
    assert set(ids) <= set(get_running_jobs(work_pool=pool))
    let_pass(paused + 4)
    assert [entry for name in names for entry in play.began(name) if entry["due"] > paused + CLAIMED] == []

    resume_all_jobs(work_pool=pool)
    resumed = time.time()
    for name, first in zip(names, firsts, strict=True):
        wait_until(partial(goes_on, play, name, resumed), PATIENCE, f"{name} to go on")
        last = round(max(play.dues(name)) - first)
        assert_ticks(sorted(play.dues(name)), ticks(first, 1, list(range(last + 1))))
    for job_id in ids:
        unschedule_job(job_id)


def test_a_one_time_job_runs_though_no_agent_was_there(play: Play) -> None:
    """What was due before any agent started runs once, late; IGNORE skips it."""
    due_at = max(play.scheduled[f"late-{policy}"]["called"] for policy in ("WAIT", "IGNORE")) + 2
    let_pass(due_at + 5)
    with agent("late-node", LATE_POOL, play.project.env, play.project.folder):
        play.project.wait_for("late-WAIT", "began")
        play.wait_for_skipped("late-IGNORE", 1)
        wait_until(
            lambda: not get_running_jobs(work_pool=LATE_POOL), PATIENCE, "the one-time jobs to be over"
        )

    assert len(play.began("late-WAIT")) == 1
    assert play.began("late-IGNORE") == []


def test_no_tick_runs_twice_and_none_is_early(play: Play) -> None:
    """Of all that this module has run, each attempt of each tick is there once, at or after its time."""
    for name in play.scheduled:
        entries = [entry for entry in play.began(name) if "due" in entry.details]
        assert all(entry.at >= entry["due"] for entry in entries), name
        keys = sorted((entry["due"], entry.details.get("attempt", 1)) for entry in entries)
        assert [key for key, other in itertools.pairwise(keys) if key == other] == [], name
