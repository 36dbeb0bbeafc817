"""What becomes of runs that fail, take too long, are cancelled or crash, and of the job afterwards."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Scheduled

from deployments.local import wait_until
from tests.acceptance.project import PATIENCE, Prefect, Project, due, is_alive, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun

TIMED = """
    import os, signal
    from datetime import datetime, timedelta
    from ledger import note
    from taskadapter import (
        Listener, RetryConfiguration, RetryStrategy, TaskPolicy, TriggerConfiguration, current_run
    )

    def once(start, interval, **retries):
        first = datetime.fromisoformat("{start}") + timedelta(seconds=start)
        trigger = TriggerConfiguration(interval=interval, max_count=1, start_time=first)
        return Listener(trigger=trigger, retry_config=RetryConfiguration(**retries))

    @once(0, 60, max_attempts=5, retry_interval=0.5).service("recovers")
    def recovers() -> None:
        note("recovers", "attempt", number=current_run().attempt)
        if current_run().attempt < 3:
            raise ConnectionError("not yet")

    @once(
        3,
        60,
        max_attempts=4,
        retry_interval=0.5,
        backoff_strategy=RetryStrategy.EXPONENTIAL,
        max_interval=1.5,
    ).service("gives-up")
    def gives_up() -> None:
        note("gives-up", "attempt", number=current_run().attempt)
        raise ConnectionError(f"error {{current_run().attempt}}")

    @once(2, 60, max_attempts=2, retry_interval=0.5).service("async-recovers")
    async def async_recovers() -> None:
        note("async-recovers", "attempt", number=current_run().attempt)
        if current_run().attempt < 3:
            raise ConnectionError("not yet")

    @once(5, 6, max_attempts=9, retry_interval=2.5).service("out-of-time")
    def out_of_time() -> None:
        note("out-of-time", "attempt", number=current_run().attempt)
        raise ConnectionError(f"error {{current_run().attempt}}")

    @once(6, 1, max_attempts=9, retry_interval=1).service("no-time")
    def no_time() -> None:
        note("no-time", "attempt", number=current_run().attempt)
        raise ConnectionError(f"error {{current_run().attempt}}")

    crashing = Listener(
        trigger=TriggerConfiguration(
            interval=2, max_count=3, start_time=datetime.fromisoformat("{start}") + timedelta(seconds=8)
        ),
        task_policy=TaskPolicy(max_concurrent=1),
    )

    def hook(flow, run, state):
        note("crashes", "hook", run=run.id)

    @crashing.service("crashes", on_crashed=[hook])
    def crashes() -> None:
        note("crashes", "began")
        if current_run().count == 1:
            os._exit(3)
        if current_run().count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        note("crashes", "finished")
"""

FAILING = """
    from ledger import note
    from prefect import task
    from taskadapter import ErrorPolicy, Listener, TaskPolicy, TriggerConfiguration, current_run

    def fail(name):
        note(name, "ran")
        raise ValueError("as always")

    def listener(max_count=-1, **policy):
        trigger = TriggerConfiguration(interval=1, max_count=max_count)
        return Listener(trigger=trigger, task_policy=TaskPolicy(**policy))

    @listener(max_concurrent=1).service("ends")
    def ends() -> None:
        fail("ends")

    @listener(error_policy=ErrorPolicy.TERMINATE).service("ends-silently")
    def ends_silently() -> None:
        fail("ends-silently")

    @listener(3, error_policy=ErrorPolicy.LOG_AND_CONTINUE).service("goes-on")
    def goes_on() -> None:
        fail("goes-on")

    @listener(3, max_concurrent=1).service("mended")
    def mended() -> None:
        note("mended", "ran", number=current_run().count)
        if current_run().count == 1:
            raise ValueError("not mended yet")

    @task
    def failing() -> None:
        raise ValueError("as always")

    @listener(max_concurrent=1).service("left-to-a-task")
    def left_to_a_task() -> list[object]:
        note("left-to-a-task", "ran")
        return [failing.submit()]

    @listener(2, max_concurrent=1).service("twice")
    def twice() -> None:
        note("twice", "ran", number=current_run().count)
"""

STOPPED = """
    import asyncio, time
    from ledger import note
    from taskadapter import (
        ErrorPolicy, Listener, RetryConfiguration, TaskPolicy, TriggerConfiguration, current_run
    )

    def hook(name, what):
        return [lambda flow, run, state: note(name, what, run=run.id)]

    one_by_one = Listener(
        trigger=TriggerConfiguration(interval=2, max_count=2),
        task_policy=TaskPolicy(max_concurrent=1),
    )

    @one_by_one.service("cancelled", on_cancellation=hook("cancelled", "hook"))
    def cancelled() -> None:
        note("cancelled", "began")
        try:
            while current_run().count == 1:
                time.sleep(0.1)
        finally:
            note("cancelled", "cleaned up")
        note("cancelled", "finished")

    @one_by_one.service("async-cancelled", on_cancellation=hook("async-cancelled", "hook"))
    async def async_cancelled() -> None:
        note("async-cancelled", "began")
        try:
            while current_run().count == 1:
                await asyncio.sleep(0.1)
        finally:
            note("async-cancelled", "cleaned up")
        note("async-cancelled", "finished")

    @Listener(
        trigger=TriggerConfiguration(interval=86_400),
        retry_config=RetryConfiguration(max_attempts=3, retry_interval=3_600),
    ).service("retry-cancelled", on_cancellation=hook("retry-cancelled", "hook"))
    def retry_cancelled() -> None:
        note("retry-cancelled", "began")
        raise ValueError("not now")

    patient = Listener(
        trigger=TriggerConfiguration(interval=2, max_count=2),
        task_policy=TaskPolicy(error_policy=ErrorPolicy.LOG_AND_CONTINUE, max_concurrent=1),
        retry_config=RetryConfiguration(max_attempts=3, retry_interval=0.1),
    )

    @patient.service("timed-out", timeout_seconds=5)
    def timed_out() -> None:
        note("timed-out", "began")
        while current_run().count == 1:
            time.sleep(0.1)
        note("timed-out", "finished")

    @patient.service("async-timed-out", timeout_seconds=5)
    async def async_timed_out() -> None:
        note("async-timed-out", "began")
        while current_run().count == 1:
            await asyncio.sleep(0.1)
        note("async-timed-out", "finished")

    @Listener(
        trigger=TriggerConfiguration(interval=2), task_policy=TaskPolicy(max_concurrent=1)
    ).service("too-slow", timeout_seconds=2)
    def too_slow() -> None:
        note("too-slow", "began")
        while True:
            time.sleep(0.1)
"""


@pytest.fixture(scope="module", autouse=True)
def node(project: Project) -> Iterator[None]:
    """An agent, and the jobs of this module."""
    project.write("flows/failing.py", FAILING)
    project.write("flows/stopped.py", STOPPED)
    with project.agent("node-1", "--limit", "8"):
        begun = datetime.now(UTC)
        project.deploy()
        # The waits of retries are measured: those jobs start one after another, behind the others. A crash
        # takes the latest lines of its host's log with it, so the job that crashes comes last. They are
        # half as many, and are there in half the time; where they are not, an interval is waited for.
        start = datetime.now(UTC) + (datetime.now(UTC) - begun)
        project.write("flows/timed.py", TIMED.format(start=start))
        project.deploy("timed")
        yield


def began(run: FlowRun) -> datetime:
    """Return when a run that was executed started."""
    assert run.start_time is not None
    return run.start_time


def only_run(project: Project, prefect: Prefect, job: str) -> FlowRun:
    """Return the one run of a job that was executed, once it is final."""
    # A whole interval later, if it was deployed too late.
    project.wait_for(job, "attempt", within=2 * PATIENCE)
    prefect.wait_for_put_away(job)
    (run,) = prefect.executed(job)
    return prefect.wait_for_end(run)


def assert_waited(
    project: Project, prefect: Prefect, run: FlowRun, job: str, expected: list[float]
) -> None:
    """Each wait was announced as declared, and lasted no shorter; longer it is on a busy machine.

    The server says when it was told of a wait, which is somewhat later than that was decided.
    """
    times = [entry.at for entry in project.entries(job, "attempt")]
    states = [state for state in prefect.history(run) if state.name == "AwaitingRetry"]
    assert len(times) - 1 == len(states) == len(expected)
    for state, wanted, (before, after) in zip(states, expected, itertools.pairwise(times), strict=True):
        assert state.state_details.scheduled_time is not None
        due = state.state_details.scheduled_time.timestamp()
        assert before + wanted <= due <= after + 0.05
        assert due <= state.timestamp.timestamp() + wanted + 0.05


@pytest.mark.parametrize("job", ["recovers", "async-recovers"])
def test_a_job_that_recovers_is_completed(project: Project, prefect: Prefect, job: str) -> None:
    """Two failures and a success are one Completed run, whose retries show in the UI."""
    run = only_run(project, prefect, job)

    assert state_of(run).name == "Completed"
    states = [state.name for state in prefect.history(run) if state.name != "Late"]
    assert states[:3] == ["Scheduled", "Pending", "Running"], states
    assert states[3:] == [
        "AwaitingRetry",
        "Retrying",
        "AwaitingRetry",
        "Retrying",
        "Completed",
    ], states
    assert run.run_count == 3
    assert [entry["number"] for entry in project.entries(job, "attempt")] == [1, 2, 3]
    assert_waited(project, prefect, run, job, [0.5, 0.5])


def test_a_job_that_does_not_recover_reports_its_last_error(project: Project, prefect: Prefect) -> None:
    """The waits double up to their limit; when no attempt is left the run fails with the last error."""
    run = only_run(project, prefect, "gives-up")

    assert state_of(run).name == "Failed"
    assert "error 5" in str(state_of(run).message)
    assert run.run_count == 5
    assert_waited(project, prefect, run, "gives-up", [0.5, 1, 1.5, 1.5])


def test_no_attempt_reaches_into_the_next_tick(project: Project, prefect: Prefect) -> None:
    """An attempt that would start with the next tick or after it is not made, but every other is."""
    run = only_run(project, prefect, "out-of-time")

    attempts = project.entries("out-of-time", "attempt")
    # A tick that starts when the next one is due already has its window from its own start.
    late = began(run) - due(run) >= timedelta(seconds=6)
    end = (began(run) if late else due(run)).timestamp() + 6
    # What comes too late on a slow machine is announced, and not made; the next one was due at 7.5 s.
    assert [entry for entry in attempts if entry.at >= end + 1] == []
    told = state_of(run).timestamp.timestamp()  # it was decided between the attempt and that
    assert told + 2.5 > end - 1
    assert 1 <= len(attempts) <= 3
    assert state_of(run).name == "Failed"
    assert f"error {len(attempts)}" in str(state_of(run).message)


def test_no_retry_is_made_that_waits_for_an_interval(project: Project, prefect: Prefect) -> None:
    """With a `retry_interval` as long as the interval there is one attempt."""
    run = only_run(project, prefect, "no-time")

    assert len(project.entries("no-time", "attempt")) == 1
    assert state_of(run).name == "Failed"
    assert "error 1" in str(state_of(run).message)


@pytest.mark.parametrize(("job", "is_logged"), [("ends", True), ("ends-silently", False)])
def test_an_error_ends_the_job(project: Project, prefect: Prefect, job: str, is_logged: bool) -> None:
    """When the job ends no other run starts; its schedule is inactive and nothing is left to run."""
    project.wait_for(job, "ran")
    prefect.wait_for_put_away(job)
    first, *others = sorted(map(prefect.wait_for_end, prefect.executed(job)), key=began)

    assert state_of(first).name == "Failed"
    assert "as always" in str(state_of(first).message)
    # A tick was due a second later, and was claimed already.
    (schedule,) = prefect.deployment(job).schedules
    assert schedule.updated is not None
    assert [run for run in others if began(run) > schedule.updated] == []
    assert len(project.entries(job, "ran")) == 1 + len(others)
    assert prefect.runs(job, "Late", "Scheduled", "Pending", "Running") == []
    log = prefect.wait_for_logs(first, "as always")
    said = f"The job ends on all nodes; `taskadapter restart {job}` starts it again."
    assert any(said in line for line in log) == is_logged


def test_a_task_that_fails_after_the_body_has_returned_it(project: Project, prefect: Prefect) -> None:
    """The engine waits for it, and what it comes to the run does, in the ledger, too: the job ends."""
    job = "left-to-a-task"
    prefect.wait_for_put_away(job)
    (run,) = prefect.executed(job)

    assert state_of(prefect.wait_for_end(run)).name == "Failed"
    (line,) = json.loads(project.taskadapter("ledger", job, "--json"))
    assert line["outcome"] == "Failed"
    assert "The job is over: run 1 failed" in project.taskadapter("ledger", job)


def test_an_error_ends_a_job_that_runs_one_at_a_time_at_once(project: Project, prefect: Prefect) -> None:
    """A tick that was waiting for the failed run is not executed."""
    prefect.wait_for_put_away("ends")

    assert len(project.entries("ends", "ran")) == 1
    assert len(prefect.executed("ends")) == 1


def test_a_run_that_somebody_retries_runs_though_its_job_has_ended(
    project: Project, prefect: Prefect
) -> None:
    """The UI's "Retry" of a failed run is a person's wish, and no tick of the job."""
    prefect.wait_for_put_away("ends")
    (failed,) = prefect.executed("ends")
    prefect.client.set_flow_run_state(failed.id, Scheduled(message="Retry from the UI"))
    project.wait_for("ends", "ran", 2)
    ended = prefect.wait_for_end(failed)

    assert (ended.state_name, ended.run_count) == ("Failed", failed.run_count + 1)
    assert not prefect.is_active("ends")


def test_an_error_does_not_end_a_job_that_is_to_continue(project: Project, prefect: Prefect) -> None:
    """Each tick fails, and the next one runs."""
    project.wait_for("goes-on", "ran", 3)
    prefect.wait_for_put_away("goes-on")

    assert len(project.entries("goes-on", "ran")) == 3
    assert len(prefect.wait_for_runs("goes-on", "Failed", count=3)) == 3
    assert len(prefect.executed("goes-on")) == 3


@pytest.mark.parametrize(
    ("job", "first", "why", "then"),
    [
        ("mended", [1], "run 1 failed, and the error policy is ", [2, 3]),
        ("twice", [1, 2], "the maximum of 2 runs is reached", [1, 2]),
    ],
    ids=["failed", "counted"],
)
def test_a_job_that_has_ended_is_started_again(
    project: Project, prefect: Prefect, job: str, first: list[int], why: str, then: list[int]
) -> None:
    """Its count goes on, or begins anew at its maximum; what was due while it was over does not run.

    Every tick since does, from the next one on: the agent hears of it at once.
    """
    project.wait_for(job, "ran", len(first))
    prefect.wait_for_put_away(job)
    assert f"The job is over: {why}" in project.taskadapter("ledger", job)
    restarted = datetime.now(UTC)

    said = project.taskadapter("restart", job)
    done = datetime.now(UTC)
    ran = project.wait_for(job, "ran", len(first) + len(then))
    prefect.wait_for_put_away(job)

    assert said.startswith(f"Job '{job}' is started again. It had ended: {why}")
    assert [entry["number"] for entry in ran] == first + then
    runs = sorted(prefect.executed(job), key=due)
    assert len(runs) == len(ran)
    later = [due(run) for run in runs[len(first) :]]
    interval = timedelta(seconds=prefect.deployment(job).job_variables["trigger"]["interval"])
    assert restarted - interval < later[0] < done + interval
    assert later == [later[0] + number * interval for number in range(len(later))]
    lines = json.loads(project.taskadapter("ledger", job, "--json"))
    assert {line["outcome"] for line in lines} <= {"Completed", "Failed", "Skipped"}


@pytest.mark.parametrize("job", ["cancelled", "async-cancelled"])
def test_a_cancelled_run_is_interrupted(project: Project, prefect: Prefect, job: str) -> None:
    """Its body can clean up, its hook runs, it ends as Cancelled, and the next tick runs elsewhere."""
    (began,) = project.wait_for(job, "began")
    (run,) = prefect.wait_for_runs(job, "Running", count=1)
    prefect.client.set_flow_run_state(run.id, Cancelling())
    ended = prefect.wait_for_end(run)

    assert state_of(ended).name == "Cancelled"
    assert len(project.entries(job, "cleaned up")) >= 1
    hooks = project.wait_for(job, "hook")
    assert [hook["run"] for hook in hooks] == [str(run.id)]
    (finished,) = project.wait_for(job, "finished")
    assert finished.pid != began.pid
    assert not is_alive(began.pid)
    assert len(prefect.wait_for_runs(job, "Completed", count=1)) == 1


def test_a_run_that_is_cancelled_between_two_attempts(project: Project, prefect: Prefect) -> None:
    """There is no further one: it does not wait for that, and its hook runs."""
    (began,) = project.wait_for("retry-cancelled", "began")
    (run,) = prefect.wait_for_runs("retry-cancelled", "AwaitingRetry", count=1)
    prefect.client.set_flow_run_state(run.id, Cancelling())

    assert state_of(prefect.wait_for_end(run)).name == "Cancelled"
    project.wait_for("retry-cancelled", "hook")
    wait_until(lambda: not is_alive(began.pid), PATIENCE, "its process to end")
    assert project.entries("retry-cancelled", "began") == [began]


@pytest.mark.parametrize("job", ["timed-out", "async-timed-out"])
def test_a_run_that_takes_too_long_is_ended(project: Project, prefect: Prefect, job: str) -> None:
    """It fails as TimedOut, whatever its retries; the next tick runs, for its job goes on."""
    (run,) = prefect.wait_for_runs(job, "TimedOut", count=1)
    began, *others = project.wait_for(job, "began", 2)
    (finished,) = project.wait_for(job, "finished")

    assert state_of(run).type is StateType.FAILED
    assert [other.pid for other in others] == [finished.pid]
    assert finished.pid != began.pid
    assert len(prefect.wait_for_runs(job, "Completed", count=1)) == 1


def test_a_run_that_takes_too_long_ends_its_job(project: Project, prefect: Prefect) -> None:
    """By default an error does, and that is one."""
    prefect.wait_for_put_away("too-slow")
    (run,) = prefect.executed("too-slow")
    assert state_of(run).name == "TimedOut"
    assert len(project.entries("too-slow", "began")) == 1
    prefect.wait_for_logs(run, "The job ends on all nodes; `taskadapter restart too-slow` starts it again.")


def test_a_crash_is_reported_and_the_job_goes_on(project: Project, prefect: Prefect) -> None:
    """An exit and a signal each show as Crashed with status and node; the third tick completes."""
    project.wait_for("crashes", "finished")
    exited, killed = prefect.wait_for_runs("crashes", "Crashed", count=2)
    (completed,) = prefect.wait_for_runs("crashes", "Completed", count=1)
    hooks = project.wait_for("crashes", "hook", 2)

    assert "exited with status 3" in str(state_of(exited).message)
    assert "SIGKILL" in str(state_of(killed).message)
    assert all("node-1" in str(state_of(run).message) for run in (exited, killed))
    assert [hook["run"] for hook in hooks] == [str(exited.id), str(killed.id)]
    assert due(exited) < due(killed) < due(completed)
