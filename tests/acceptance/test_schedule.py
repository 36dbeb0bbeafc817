"""From `taskadapter render` and `prefect deploy` to ticks: each when it is due, and as many as declared."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from taskadapter.rules import ticks
from tests.acceptance.project import Entry, Prefect, Project, due

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTER = """
    from ledger import note
    from taskadapter import Listener, Service, TriggerConfiguration, current_run

    counter_listener = Listener(trigger=TriggerConfiguration(interval=1, max_count={max_count}))

    @counter_listener.service("count-to-five")
    class Counter(Service):
        i: int = 1

        def execute(self) -> None:
            note("count-to-five", "ran", value=self.i, count=current_run().count)
            self.i += 1
"""

BEAT = """
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, current_run

    beat_listener = Listener(trigger=TriggerConfiguration(interval={interval}, max_count=2))

    @beat_listener.service("beat")
    def beat() -> None:
        note("beat", "ran", count=current_run().count)
"""

TIMED = """
    from datetime import datetime
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, current_run

    listener = Listener(trigger=TriggerConfiguration(
        interval=1,
        start_time=datetime.fromisoformat("{start}"),
        end_time=datetime.fromisoformat("{end}"),
    ))

    @listener.service("{name}")
    def tick() -> None:
        note("{name}", "ran", due=current_run().scheduled_time.timestamp())
"""

OVERLAPPING = """
    import time
    from ledger import note, noted
    from taskadapter import Listener, Service, TaskPolicy, TriggerConfiguration, current_run

    def slow(name):
        note(name, "began", due=current_run().scheduled_time.timestamp())
        time.sleep(1.5)
        note(name, "ended")

    free = Listener(trigger=TriggerConfiguration(interval=1, max_count=3))
    single = Listener(
        trigger=TriggerConfiguration(interval=1, max_count=3), task_policy=TaskPolicy(max_concurrent=1)
    )

    @free.service("overlapping")
    def overlapping() -> None:
        note("overlapping", "began")
        end = time.monotonic() + 100
        while noted("overlapping", "began") < 2 and time.monotonic() < end:
            time.sleep(0.1)
        note("overlapping", "ended")

    @single.service("single")
    def one_at_a_time() -> None:
        slow("single")

    @free.service("tally")
    class Tally(Service):
        total: int = 0

        def execute(self) -> None:
            seen = self.total
            slow("tally")
            self.total = seen + 1
            note("tally", "counted", total=self.total)
"""

IDLE = """
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration

    idle_listener = Listener(trigger=TriggerConfiguration(interval=60))

    @idle_listener.service("idle")
    def idle() -> None:
        note("idle", "ran")
"""

JOBS = ["count-to-five", "beat", "overlapping", "single", "tally", "idle"]


def deploy(project: Project, *names: str) -> None:
    """Deploy as a user does: some deployments, or all."""
    project.render()
    chosen = [option for name in names for option in ("--name", name)]
    project.prefect("--no-prompt", "deploy", *(chosen or ["--all"]))


@pytest.fixture(scope="module", autouse=True)
def start(project: Project) -> Iterator[datetime]:
    """An agent, and the jobs of this module deployed; yields when those start that have a start time."""
    project.write("flows/counter.py", COUNTER.format(max_count=5))
    project.write("flows/beat.py", BEAT.format(interval=1))
    project.write("flows/overlapping.py", OVERLAPPING)
    project.write("flows/idle.py", IDLE)
    deploy(project)
    with project.agent("node-1", "--limit", "10"):
        yield deploy_before_the_start(project)


def named(job: str, start: datetime) -> str:
    """Return the name of a job with a start time: a later one, if there was need, is another job."""
    return f"{job}-{start:%H-%M-%S}"


def deploy_before_the_start(project: Project) -> datetime:
    """Deploy jobs with a start time early enough for their first tick to be planned."""
    for lead in (25, 60, 180):  # seconds; a busy machine needs the longer ones
        start = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=lead)
        jobs = [named("window", start), named("steady", start)]
        for name, after, seconds in [("window", 0, 3), ("steady", 5, 9)]:
            first = start + timedelta(seconds=after)
            last = first + timedelta(seconds=seconds)
            source = TIMED.format(name=named(name, start), start=first, end=last)
            # A file for each: what was deployed too late runs its own code.
            project.write(f"flows/{name}_{start:%H%M%S}.py", source)
        deploy(project, *jobs)
        if datetime.now(UTC) < start - timedelta(seconds=6):
            return start
    raise TimeoutError("deploying takes minutes")


def intervals(entries: list[Entry]) -> list[tuple[Entry, Entry]]:
    """Return the beginning and the end of each run of `slow`, in the order of their beginnings."""
    ends = {entry.pid: entry for entry in entries if entry.what == "ended"}
    return [(entry, ends[entry.pid]) for entry in entries if entry.what == "began"]


def test_a_job_is_executed_max_count_times_then_its_schedule_ends(
    project: Project, prefect: Prefect
) -> None:
    """Five executions count 1 to 5 in order; then the schedule is inactive and nothing is left to run."""
    project.wait_for("count-to-five", "ran", 5)
    prefect.wait_for_put_away("count-to-five")

    assert [entry["value"] for entry in project.entries("count-to-five", "ran")] == [1, 2, 3, 4, 5]
    assert [entry["count"] for entry in project.entries("count-to-five", "ran")] == [1, 2, 3, 4, 5]
    assert len(prefect.runs("count-to-five", "Completed")) == 5
    assert prefect.runs("count-to-five", "Failed", "Crashed", "Pending", "Running") == []


def test_ticks_of_a_job_overlap_when_it_outlives_its_interval(project: Project) -> None:
    """With free hosts a tick does not wait for the one before it."""
    project.wait_for("overlapping", "ended", 3)

    runs = intervals(project.entries("overlapping"))
    assert len({began.pid for began, _ in runs}) > 1
    assert any(later.at < end.at for (_, end), (later, _) in itertools.pairwise(runs))


@pytest.mark.parametrize("job", ["single", "tally"])
def test_ticks_that_must_not_overlap_run_one_after_another(project: Project, job: str) -> None:
    """One at a time, by policy or because the job has a state; none is lost, and their order stays."""
    entries = project.wait_for(job, "ended", 3) and project.entries(job)
    order = [entry.what for entry in entries if entry.what in {"began", "ended"}]
    times = [entry["due"] for entry in entries if entry.what == "began"]

    assert order == ["began", "ended"] * 3
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == [1, 1]


def test_a_service_loses_no_update(project: Project, prefect: Prefect) -> None:
    """Each run of a service starts from what the run before it has saved."""
    prefect.wait_for_put_away("tally")

    assert [entry["total"] for entry in project.entries("tally", "counted")] == [1, 2, 3]


def test_nothing_runs_before_the_start_or_after_the_end(
    project: Project, prefect: Prefect, start: datetime
) -> None:
    """The ticks are those from the start time to the end time, both included; then the schedule ends."""
    job = named("window", start)
    project.wait_for(job, "ran", 4)
    prefect.wait_for_put_away(job)

    expected = [(start + timedelta(seconds=tick)).timestamp() for tick in range(4)]
    entries = project.entries(job, "ran")
    assert sorted(entry["due"] for entry in entries) == expected
    assert all(entry.at >= expected[0] for entry in entries)
    assert [due(run).timestamp() for run in prefect.executed(job)] == expected


def test_no_tick_is_early(project: Project, prefect: Prefect, start: datetime) -> None:
    """A body never starts before its time; the UI says the same, and names each run after its tick."""
    job = named("steady", start)
    project.wait_for(job, "ran", 10)
    prefect.wait_for_put_away(job)

    entries = project.entries(job, "ran")
    first = (start + timedelta(seconds=5)).timestamp()
    assert sorted(entry["due"] for entry in entries) == [first + tick for tick in range(10)]
    assert all(entry.at >= entry["due"] for entry in entries)  # how late they are, `make bench` measures
    runs = prefect.executed(job)
    assert len(runs) == 10
    assert all(run.start_time is not None and run.start_time >= due(run) for run in runs)
    assert [run.name for run in runs] == [ticks.run_name(job, due(run)) for run in runs]


def test_deploying_again_changes_nothing(project: Project, prefect: Prefect, start: datetime) -> None:
    """The same declarations keep their schedules: ended, paused by hand, or active as they are."""
    jobs = [named("window", start), named("steady", start), *JOBS]
    for job in jobs[:-1]:
        prefect.wait_for_put_away(job)
    deployment = prefect.deployment("idle")
    (schedule,) = deployment.schedules
    prefect.client.update_deployment_schedule(deployment.id, schedule.id, active=False)

    def deployed() -> dict[str, Any]:
        # Prefect notes each deploy in `updated`; nothing depends on it.
        ignored: Any = {"updated": True, "last_polled": True, "status": True}
        ignored["schedules"] = {"__all__": {"updated"}}
        return {job: prefect.deployment(job).model_dump(exclude=ignored) for job in jobs}

    before = deployed()
    deploy(project)

    assert deployed() == before
    assert not prefect.is_active("count-to-five")
    assert not prefect.is_active("idle")
    assert len(project.entries("count-to-five", "ran")) == 5
    assert prefect.waiting("idle") == []


def test_a_changed_trigger_counts_from_one_again(project: Project, prefect: Prefect) -> None:
    """Another maximum or another interval starts a new count; the state goes on."""
    prefect.wait_for_put_away("count-to-five")
    prefect.wait_for_put_away("beat")
    project.write("flows/counter.py", COUNTER.format(max_count=2))
    project.write("flows/beat.py", BEAT.format(interval=1.5))
    deploy(project)
    project.wait_for("count-to-five", "ran", 7)
    project.wait_for("beat", "ran", 4)
    prefect.wait_for_put_away("count-to-five")
    prefect.wait_for_put_away("beat")

    assert [entry["value"] for entry in project.entries("count-to-five", "ran")] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["count"] for entry in project.entries("count-to-five", "ran")] == [1, 2, 3, 4, 5, 1, 2]
    assert [entry["count"] for entry in project.entries("beat", "ran")] == [1, 2, 1, 2]
