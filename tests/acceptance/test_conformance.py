"""The semantics of ticks, a test for each rule: jobs that a program schedules, an agent that runs them.

One program schedules all jobs of the module, in a few acts, so that no more run side by side than a server
on a small machine can follow; the tests look at what they have entered into the ledger. Late is allowed on
a busy machine, and one that stands still for seconds: what is judged is what began, what was announced, and
in which order.
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
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

PROMPT = 15.0
"""Seconds within which the quickest of several has begun, however busy the machine is elsewhere.

On an idle one it takes none to two. An agent that did not hear of a job, or forgot a tick, would find it at
its next look, and those are 30 s apart.
"""

ALLOWED = 5.0
"""Seconds that a tick may be late before a policy ignores it."""

EVERY = 5.0
"""Seconds between two ticks of the jobs that are paused."""

CLAIMED = 1.0
"""Seconds ahead of its time that a tick is claimed; then it begins, whatever happens to its job."""

LATE_POOL = "acceptance-conformance-late"
"""A pool whose agent starts after its jobs were due."""

TICK = """
    import time
    from ledger import note, noted
    from taskadapter import Job, current_run

    class Tick(Job):
        \"\"\"Enters when it begins and ends.\"\"\"

        name: str
        seconds: float = 0.0
        first_seconds: float = 0.0
        until_begun: int = 0
        fails: bool = False

        def execute(self) -> None:
            run = current_run()
            note(self.name, "began", due=run.scheduled_time.timestamp(), count=run.count)
            time.sleep(self.first_seconds if run.count == 1 and self.first_seconds else self.seconds)
            patience = time.monotonic() + 200
            while noted(self.name, "began") < self.until_begun and time.monotonic() < patience:
                time.sleep(0.05)
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
        scheduled[name] = {{"id": str(job_id), "called": called, "returned": time.time(), **times}}

    def recur(name, interval, max_count=-1, start=None, end=None, fields=(), **policy):
        called = time.time()
        job, policy = Tick(name=name, **dict(fields)), TaskPolicy(**policy)
        job_id = schedule_job_recur_by_frequency(job, interval, max_count, start, end, policy, name=name)
        times = {{key: at.timestamp() for key, at in (("start", start), ("end", end)) if at is not None}}
        note(name, called, job_id, **times)

    def once(name, at, start, **options):
        called = time.time()
        job_id = schedule_one_time_job(Tick(name=name), at, name=name, **options)
        note(name, called, job_id, start=start.timestamp())

    def refuse(name, schedule, *args):
        try:
            schedule(Tick(name=name), *args)
        except TaskError as error:
            refused[name] = str(error)

    def at(seconds):
        return datetime.now(UTC) + timedelta(seconds=seconds)

    def ahead(seconds, schedule):
        # A machine that stands still until that moment has passed is given another one.
        for lead in (seconds, 5 * seconds, 25 * seconds):
            try:
                return schedule(at(lead))
            except TaskError as error:
                if "has passed" not in str(error):
                    raise
        raise TimeoutError("scheduling takes minutes")

    def end_of_act():
        ours = {{job["id"] for job in scheduled.values()}}
        patience = time.monotonic() + {patience}
        while ours & set(map(str, get_running_jobs())) and time.monotonic() < patience:
            time.sleep(0.2)

    recur("five", 1, 5)
    end_of_act()  # the first tick is about an idle agent
    for number in (1, 2, 3):
        recur(f"prompt-{{number}}", 60, 1)
        end_of_act()

    def civil(moment):
        local = (moment + timedelta(hours=5, minutes=30)).replace(tzinfo=None)
        given = Civil(
            year=local.year, month=local.month, day=local.day, hour=local.hour, minute=local.minute,
            second=local.second, utc_offset=ZoneOffset(hours=5, minutes=30),
        )
        once("civil", given, moment.replace(microsecond=0))

    def window(start):
        recur("window", 1, start=start, end=start + timedelta(seconds=3))

    ahead(15, lambda moment: once("once", moment, moment))  # when the others have ended
    ahead(27, civil)  # what holds one up must not hold up both
    ahead(6, window)

    for policy in ErrorPolicy:
        failing = {{"fails": True}}
        # One at a time: a tick that is due already when the error is seen has not begun then.
        recur(f"fails-{{policy}}", 1.5, 3, fields=failing, error_policy=policy, max_concurrent=1)
    end_of_act()

    for policy, count in (("WAIT", 5), ("IGNORE", 4), ("LOG_AND_IGNORE", 4)):
        busy = {{"first_seconds": 11.5}}
        recur(f"busy-{{policy}}", 6, count, fields=busy, waiting_policy=policy, max_concurrent=1)

    end_of_act()

    late_start = at(12)
    Path("flows/start").write_text(late_start.isoformat())

    for policy in ("WAIT", "IGNORE"):
        options = {{"task_policy": TaskPolicy(waiting_policy=policy), "work_pool": "{late_pool}"}}
        ahead(1, lambda moment: once(f"late-{{policy}}", moment, moment, **options))

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
        ("overlapping", {{"until_begun": 3}}, {{}}), ("single", {{"seconds": 1.5}}, {{"max_concurrent": 1}})
    ):
        ahead(3, lambda start: recur(name, 1, 3, start=start, fields=fields, **policy))
    end_of_act()

    # So many that a slow machine, too, can pause them before they have ended.
    recur("paused-WAIT", {every}, 8, waiting_policy="WAIT")
    recur("paused-IGNORE", {every}, 7, waiting_policy="IGNORE")
    recur("gone", {every})  # no more often, or a slow machine has no time for the others
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
        scheduled: by name: the job's `id`, when the function was `called` and has `returned`, and `start`
            and `end`.
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
        return min(float(entry["due"]) for entry in self.project.wait_for(name, "began"))

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

    def skipped_between(self, name: str, interval: float) -> dict[int, FlowRun]:
        """Return what was skipped of a job, by number, once each tick was run or skipped.

        That is from the first one that has run, number 0, to the last one.
        """
        dues = sorted(self.dues(name))

        def number(moment: float) -> int:
            return round((moment - dues[0]) / interval)

        assert_ticks(dues, ticks(dues[0], interval, [number(moment) for moment in dues]))
        between = set(range(number(dues[-1]))) - {number(moment) for moment in dues}

        def found() -> dict[int, FlowRun]:
            skipped = self.runs(name, "Skipped")
            return {number(due(run).timestamp()): run for run in skipped}

        wait_until(lambda: between <= found().keys(), PATIENCE, f"each tick of {name} to be run or skipped")
        return {one: run for one, run in found().items() if one in between}


@pytest.fixture(scope="module")
def play(project: Project, prefect: Prefect) -> Iterator[Play]:
    """All jobs of the module, scheduled beside an idle agent, and what is done to some of them."""
    project.write("flows/conformance.py", TICK)
    project.write("flows/retried.py", RETRIED)
    project.write("program.py", PROGRAM.format(late_pool=LATE_POOL, every=EVERY, patience=PATIENCE))
    project.write("all.py", ALL)
    project.write("again.py", AGAIN)
    # The pool must be there, or the agent would make it.
    prefect_pool(project)
    with project.agent("node-1", "--limit", "10") as node:
        wait_until(lambda: "started!" in node.output(), PATIENCE, "the agent to start")
        answer = json.loads(project.run(sys.executable, "program.py", within=4 * PATIENCE))
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
    first += EVERY * max(0, math.ceil((time.time() - first - 2) / EVERY))
    let_pass(first + 2)
    play.times["pausing"] = time.time()
    for policy in ("WAIT", "IGNORE"):
        pause_job(play.job_id(f"paused-{policy}"))
    play.times["paused"] = time.time()
    play.first("gone")
    unschedule_job(play.job_id("gone"))
    play.times["unscheduled"] = time.time()
    # Two ticks fall into the pause; one at least, if the calls took seconds.
    let_pass(max(first + 13, play.times["paused"] + 2 * EVERY))
    for policy in ("WAIT", "IGNORE"):
        play.times[f"resuming-{policy}"] = time.time()
        resume_job(play.job_id(f"paused-{policy}"))
        play.times[f"resumed-{policy}"] = time.time()


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
    """Without a start a job is due when it is scheduled; an idle agent begins it then, at no later look.

    That takes a second on an idle machine. An agent that found each at a look of its own, every 30 s, would
    be quick with the first of them at most, by chance: it has just looked when the next one is scheduled.
    """
    delays = []
    for name in ("five", "prompt-1", "prompt-2", "prompt-3"):
        called, returned = (play.scheduled[name][key] for key in ("called", "returned"))
        first = play.project.wait_for(name, "began")[0]
        assert called <= play.first(name) <= returned
        delays.append(first.at - called)

    assert min(delays[1:]) < PROMPT, delays


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
    assert start <= entry.at
    assert len(play.began(name)) == 1


@pytest.mark.parametrize("names", [("once", "civil"), ("window", "single", "overlapping", "paused-WAIT")])
def test_a_tick_on_a_free_host_is_in_time(play: Play, names: tuple[str, ...]) -> None:
    """It waits for no look of the agent: the quickest of those that nothing has held up."""
    entries = [entry for name in names for entry in play.project.wait_for(name, "began")]
    late = [entry.at - entry["due"] for entry in entries]

    assert min(late) < PROMPT, late


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

    assert play.dues(name) == sorted(play.dues(name))
    assert len(play.dues(name)) == 4
    skipped = play.skipped_between(name, 6)
    assert min(skipped) == 1  # it could begin 5.5 s late, when the one before it has ended
    assert [number for number, run in skipped.items() if not was_too_late(run)] == []


def was_too_late(run: FlowRun) -> bool:
    """Return whether a tick shows as ignored because it was late, and was so when that was decided.

    On a slow machine there may be more of them than were meant to be.
    """
    state = state_of(run)
    late = state.timestamp.timestamp() - due(run).timestamp()
    is_right = run.state_type is StateType.CANCELLED and late > ALLOWED
    return is_right and f"allows {ALLOWED:g} s" in str(state.message)


def test_only_log_and_ignore_logs(play: Play) -> None:
    """The agent's log has the skipped tick of LOG_AND_IGNORE, and that of IGNORE not."""
    play.wait_for_end("busy-IGNORE")
    play.wait_for_end("busy-LOG_AND_IGNORE")
    log = play.node.output().splitlines()
    skips = [line for line in log if "skips its tick" in line]

    assert len(skips) >= len(play.skipped_between("busy-LOG_AND_IGNORE", 6)) > 0
    assert [line for line in skips if "busy-LOG_AND_IGNORE" not in line] == []
    assert [line for line in skips if "allows 5 s" not in line] == []


def test_missed_ticks_of_a_pause_are_run(play: Play) -> None:
    """Every 5 s, paused for ten seconds, maximum 8: WAIT runs the first eight, those of the pause too."""
    play.wait_for_end("paused-WAIT")

    dues = sorted(play.dues("paused-WAIT"))
    assert_ticks(dues, ticks(dues[0], EVERY, list(range(8))))
    assert_paused(play, "WAIT")


def test_missed_ticks_of_a_pause_are_ignored(play: Play) -> None:
    """IGNORE skips the ticks that fell into the pause, and runs as many as its maximum says."""
    play.wait_for_end("paused-IGNORE")

    skipped = play.skipped_between("paused-IGNORE", EVERY)
    assert len(play.dues("paused-IGNORE")) == 7
    missed = [run for run in skipped.values() if fell_into_pause(play, run, surely=True)]
    assert missed
    others = [run for run in skipped.values() if not fell_into_pause(play, run, surely=False)]
    assert [run for run in others if not was_too_late(run)] == []
    assert [at for at in play.dues("paused-IGNORE") if play.times["paused"] < at <= resuming(play)] == []
    assert_paused(play, "IGNORE")


def resuming(play: Play) -> float:
    """Return until when the job that ignores what it misses was surely paused."""
    return play.times["resuming-IGNORE"]


def fell_into_pause(play: Play, run: FlowRun, *, surely: bool) -> bool:
    """Return whether a tick was due in the pause, which begins and ends at some time during two calls."""
    began, ended = ("paused", "resuming") if surely else ("pausing", "resumed")
    return play.times[began] < due(run).timestamp() <= play.times[f"{ended}-IGNORE"]


def assert_paused(play: Play, policy: str) -> None:
    """Nothing ran during the pause that was not claimed before it."""
    paused, resumed = play.times["paused"], play.times[f"resuming-{policy}"]
    entries = [entry for entry in play.began(f"paused-{policy}") if entry["due"] > paused + CLAIMED]
    assert [entry for entry in entries if entry.at < resumed] == []


def test_an_unscheduled_job_stops_at_once(play: Play) -> None:
    """No tick begins that was not claimed before the call; the deployment is gone, the history stays."""
    let_pass(play.times["unscheduled"] + 2 * EVERY)

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
    """Each tick made its attempts so many seconds after its time, none early.

    On a slow machine each is later than the wait before it says, and the last ones are not made where they
    would begin with the next tick. How long each wait was to be is what was announced of it.
    """
    wait_until(lambda: len(executed(play, name)) >= runs, PATIENCE, f"the runs of {name}")
    final = [play.prefect.wait_for_end(run) for run in executed(play, name)]
    assert [run.state_name for run in final] == ["Failed"] * runs
    for number, run in enumerate(final):
        tick = play.scheduled[name]["start"] + number * interval
        assert due(run).timestamp() == pytest.approx(tick, abs=0.002)
        entries = [entry for entry in play.began(name) if abs(entry["due"] - tick) < 0.002]
        assert [entry["attempt"] for entry in entries] == [*range(1, len(entries) + 1)]
        assert entries[0].at >= tick
        assert_waits(play, run, [entry.at for entry in entries], moments, interval)


def assert_waits(
    play: Play, run: FlowRun, times: list[float], moments: list[float], interval: float
) -> None:
    """Each wait between those attempts was announced as declared, and kept; no further one fitted in."""
    waits = [later - earlier for earlier, later in itertools.pairwise(moments)]
    states = [state for state in play.prefect.history(run) if state.name == "AwaitingRetry"]
    assert len(states) == len(times) - 1 <= len(waits)
    assert run.start_time is not None
    tick, started = due(run).timestamp(), run.start_time.timestamp()
    # A tick that begins when the next one is due already has its time from then on.
    end = (tick if started - tick < interval else started) + interval
    for state, wait, (before, after) in zip(states, waits, itertools.pairwise(times), strict=False):
        assert state.state_details.scheduled_time is not None
        at = state.state_details.scheduled_time.timestamp()
        assert before + wait <= at <= after + 0.05
        assert at <= state.timestamp.timestamp() + wait + 0.05
        assert at < end + 0.05
    if len(times) < len(moments):  # it was decided before it was told
        assert state_of(run).timestamp.timestamp() + waits[len(states)] > end - 0.05


def test_ticks_overlap_where_nothing_prevents_it(play: Play) -> None:
    """On free hosts a tick begins at its time though the one before it has not ended."""
    play.wait_for_end("overlapping")
    ended = play.project.wait_for("overlapping", "ended", 3)

    assert_ticks(
        sorted(play.dues("overlapping")), ticks(play.scheduled["overlapping"]["start"], 1, [0, 1, 2])
    )
    assert max(entry.at for entry in play.began("overlapping")) <= min(entry.at for entry in ended)


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


def is_complete(play: Play, name: str, since: float) -> bool:
    """Return whether a job has run a tick that was due after a moment, and all before it."""
    dues = sorted(play.dues(name))
    return dues[-1] > since and len(dues) > round(dues[-1] - dues[0])


def test_all_jobs_can_be_paused_and_resumed(play: Play) -> None:
    """While all are paused nothing runs, and they count as running; then every missed tick is run."""
    pool = play.project.pool
    ids = [JobId(text) for text in json.loads(play.project.run(sys.executable, "all.py"))]
    names = ["all-1", "all-2"]
    for name in names:
        play.first(name)
    pause_all_jobs(work_pool=pool)
    paused = time.time()
    assert set(ids) <= set(get_running_jobs(work_pool=pool))
    let_pass(paused + 4)
    assert [entry for name in names for entry in play.began(name) if entry["due"] > paused + CLAIMED] == []

    resume_all_jobs(work_pool=pool)
    resumed = time.time()
    for name in names:
        wait_until(partial(is_complete, play, name, resumed), PATIENCE, f"{name} to run what it missed")
    for job_id in ids:
        unschedule_job(job_id)
    for name in names:
        assert len(play.dues(name)) == len(set(play.dues(name)))


def test_a_one_time_job_runs_though_no_agent_was_there(play: Play) -> None:
    """What was due before any agent started runs once, late; IGNORE skips it."""
    due_at = max(play.scheduled[f"late-{policy}"]["start"] for policy in ("WAIT", "IGNORE"))
    let_pass(due_at + ALLOWED + 1)
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
