"""Whatever happens to Prefect's objects, its API, and processes: a tick begins once, and none is lost.

The bodies enter what they do into a file; what Prefect shows is read through its API.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Scheduled

from deployments.local import wait_until
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Entry, Prefect, Project, due, is_alive, state_of
from tests.api_proxy import refusal
from tests.processes import nurseries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.schemas.objects import FlowRun, State

    from deployments.local import Program
    from tests.api_proxy import ApiProxy, Request

LIVENESS, HEARTBEAT = 3.0, 0.5

PHASES = 4
"""At how many moments of a second a job is paused."""

MISSED = 25
"""Ticks of every second: more than those that are looked at one by one."""

ON_TIME = 5.0
"""Seconds that a tick is late at most, on a machine that may be slow, of a job that is not far behind."""

RUN = re.compile(r"run book-\S+( \d{4}-\S+Z)?")
"""A run as a line of the log names it."""

FLOWS = """
    import time
    from pathlib import Path
    from ledger import note
    from prefect import flow
    from prefect.flow_runs import suspend_flow_run
    from taskadapter import ErrorPolicy, Listener, TaskPolicy, TriggerConfiguration, current_run

    yearly = Listener(trigger=TriggerConfiguration(interval=31_536_000, start_time="{later}"))
    hourly = Listener(trigger=TriggerConfiguration(interval=3600))

    def begun(name):
        note(name, "began", due=current_run().scheduled_time.timestamp(), count=current_run().count)

    @yearly.service("book-quick")
    def quick(fails: bool = False) -> None:
        begun("book-quick")
        if fails:
            raise ValueError("as somebody wished")

    @yearly.service("book-slow")
    def slow(until: str = "") -> None:
        begun("book-slow")
        while not Path(until).exists():
            time.sleep(0.05)

    @hourly.service("book-hour")
    def hour() -> None:
        begun("book-hour")

    @flow
    def book_plain() -> None:
        note("book-plain", "began")

    @flow(
        retries=1,
        on_completion=[lambda *_: note("book-untold", "completed")],
        on_failure=[lambda *_: note("book-untold", "failed")],
    )
    def book_untold() -> None:
        note("book-untold", "began")

    @flow
    def book_suspended() -> None:
        note("book-suspended", "began")
        suspend_flow_run(timeout=600)
        note("book-suspended", "went on")
"""

EVERY_SECOND = """
    from ledger import note
    from taskadapter import Listener, TriggerConfiguration, current_run

    every_second = Listener(trigger=TriggerConfiguration(interval=1))

    @every_second.service("book-second")
    def second(fails: bool = False) -> None:
        run = current_run()
        note("book-second", "began", due=run.scheduled_time.timestamp(), count=run.count)
        if fails:
            raise ValueError("as somebody wished")
"""

LATE = """
    import time
    from pathlib import Path
    from ledger import note

    note("book-late", "loading")
    while Path(__file__).with_name("wait").exists():
        time.sleep(0.05)

    from taskadapter import Listener, TriggerConfiguration

    yearly = Listener(trigger=TriggerConfiguration(interval=31_536_000, start_time="{later}"))

    @yearly.service("book-late")
    def late() -> None:
        note("book-late", "began")
"""


@pytest.fixture(scope="module", autouse=True)
def _deployed(project: Project, prefect: Prefect) -> None:
    ensure_work_pool(project.pool, Domain(liveness_check_interval=LIVENESS, heartbeat_frequency=HEARTBEAT))
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    project.write("flows/jobs.py", FLOWS.format(later=later))
    project.write("flows/late.py", LATE.format(later=later))
    project.deploy()


@pytest.fixture(scope="module")
def node(project: Project, prefect: Prefect, api: ApiProxy) -> Iterator[Program]:
    """An agent that reaches Prefect by way of the proxy."""
    with project.agent("book-1", "--limit", "3", env={"PREFECT_API_URL": api.api_url}) as node:
        prefect.wait_for_end(prefect.start("book-quick"))  # its database has tables by then
        yield node


@pytest.fixture(scope="module")
def second(project: Project, node: Program) -> None:
    """A job of every second, for the last tests: a slow machine has time for nothing else once it runs."""
    project.write("flows/second.py", EVERY_SECOND)
    project.deploy("second")


def times_begun(project: Project, job: str) -> int:
    return len(project.entries(job, "began"))


def test_what_a_dead_node_was_executing_is_marked(
    project: Project, prefect: Prefect, tmp_path: Path
) -> None:
    """Without a group another node that shares the database says so; nothing runs again."""
    with ExitStack() as stack:
        dying = stack.enter_context(project.agent("book-3", "--limit", "1"))
        run = prefect.start("book-slow", parameters={"until": str(tmp_path / "never")})
        project.wait_for("book-slow", "began")
        os.kill(dying.pid, signal.SIGKILL)
        stack.enter_context(project.agent("book-4"))
        ended = prefect.wait_for_end(run)
    assert ended.state_name == "Crashed"
    assert "'book-3'" in str(state_of(ended).message)
    assert times_begun(project, "book-slow") == 1


# --- an API that fails ----------------------------------------------------------------------------


class Failing:
    """Fails requests of one kind about a run so many times, perhaps when they have been obeyed."""

    def __init__(
        self,
        method: str,
        path: str,
        part: str = "",
        *,
        times: int = 1,
        status: int = 507,
        is_obeyed: bool = False,
    ) -> None:
        self._kind = method, path, part.encode()
        self.left = times
        self._status = status
        self._is_obeyed = is_obeyed
        self._run: FlowRun | None = None
        self._api_url = ""

    def start(self, prefect: Prefect, run: FlowRun) -> None:
        """Start a run that is to start some time, and fail requests about it from now on."""
        self._run, self._api_url = run, str(prefect.client.api_url)
        prefect.client.set_flow_run_state(run.id, Scheduled(), force=True)

    def __call__(self, request: Request) -> bytes | None:
        method, path, part = self._kind
        is_meant = request.method == method and path in request.path and part in request.body
        if not is_meant or not self.left or self._run is None or str(self._run.id) not in request.path:
            return None
        self.left -= 1
        if self._is_obeyed:
            kind = {"Content-Type": "application/json"}
            url = httpx.URL(self._api_url).copy_with(path=request.path)
            httpx.request(request.method, url, content=request.body, headers=kind).raise_for_status()
        return refusal(self._status)


SET_STATE = ("POST", "/set_state")


@pytest.mark.parametrize(
    "fault",
    [
        # 500 is what the API answers while its database is away; 507 nobody repeats.
        Failing(*SET_STATE, '"RUNNING"', status=500),
        Failing(*SET_STATE, '"RUNNING"', times=2),
        Failing(*SET_STATE, '"PENDING"', times=2),
        Failing("GET", "/api/flow_runs/", times=3),
        Failing("PATCH", "/api/flow_runs/", times=2),
        Failing(*SET_STATE, '"COMPLETED"', status=500),
        Failing(*SET_STATE, '"COMPLETED"', times=2),
        Failing(*SET_STATE, '"FAILED"', times=0),
    ],
    ids=["running-500", "running", "pending", "read", "update", "completed-500", "completed", "none"],
)
@pytest.mark.usefixtures("node")
def test_an_api_that_fails_loses_no_run_and_spoils_none(
    project: Project, prefect: Prefect, api: ApiProxy, fault: Failing
) -> None:
    """Wherever on its way the API fails a run: its body runs, once, and it is Completed."""
    before = times_begun(project, "book-quick")
    run = completed_despite(fault, prefect, api)
    assert fault.left == 0
    assert times_begun(project, "book-quick") == before + 1
    # Its agent may be killed before it has mended what was told wrong.
    assert not {"Failed", "Crashed"} & {state.name for state in prefect.history(run)}


@pytest.mark.usefixtures("node")
def test_a_claim_whose_answer_is_lost(prefect: Prefect, api: ApiProxy) -> None:
    """It is the node's all the same, which finds that out at once, and need not give it back first."""
    fault = Failing(*SET_STATE, '"PENDING"', is_obeyed=True)
    run = completed_despite(fault, prefect, api)
    assert fault.left == 0
    states = [state.name for state in prefect.history(run)[1:]]
    assert [name for name in states if name != "Late"] == [
        "Scheduled",
        "Pending",
        "Running",
        "Completed",
    ]


@pytest.mark.usefixtures("node")
def test_an_end_that_cannot_be_told_at_once(project: Project, prefect: Prefect, api: ApiProxy) -> None:
    """It is no failure: the body does not run again, and the hooks that are called are its own."""
    client = prefect.client
    deployment = client.create_deployment(
        client.create_flow_from_name("book-untold"),
        "untold",
        work_pool_name=project.pool,
        entrypoint="flows/jobs.py:book_untold",
    )
    try:
        api.fault = fault = Failing(*SET_STATE, '"COMPLETED"')
        run = client.create_flow_run_from_deployment(deployment, state=some_time())
        fault.start(prefect, run)
        wait_until(lambda: completed(prefect, run), PATIENCE, f"run {run.name} to be Completed")
        project.wait_for("book-untold", "completed")
    finally:
        api.fault = None
        client.delete_deployment(deployment)
    assert fault.left == 0
    assert [entry.what for entry in project.entries("book-untold")] == ["began", "completed"]


def completed_despite(fault: Failing, prefect: Prefect, api: ApiProxy) -> FlowRun:
    """Return a run of the quick job that has met a fault, and is Completed."""
    api.fault = fault
    try:
        run = prefect.start("book-quick", state=some_time())
        fault.start(prefect, run)
        wait_until(lambda: completed(prefect, run), PATIENCE, f"run {run.name} to be Completed")
    finally:
        api.fault = None
    return run


def some_time() -> State[Any]:
    """Return the state of a run that waits for somebody to start it."""
    return Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=1))


def completed(prefect: Prefect, run: FlowRun) -> bool:
    return prefect.client.read_flow_run(run.id).state_type is StateType.COMPLETED


def test_an_api_that_fails_while_a_failure_is_told(
    project: Project, prefect: Prefect, api: ApiProxy, node: Program
) -> None:
    """A run that has failed shows as Failed, whatever the engine makes of it."""
    api.fault = fault = Failing(*SET_STATE, '"FAILED"', times=1)
    try:
        run = prefect.start("book-quick", parameters={"fails": True}, state=some_time())
        fault.start(prefect, run)
        ended = prefect.wait_for_end(run)
    finally:
        api.fault = None
    assert (ended.state_name, is_alive(node.pid)) == ("Failed", True)


def test_an_api_that_talks_nonsense_ends_no_agent(
    project: Project, prefect: Prefect, api: ApiProxy, node: Program
) -> None:
    """What does not parse is told once, and the agent goes on when it does again."""
    lines = len(node.log.read_text().splitlines())

    def told() -> list[str]:
        return [line for line in node.log.read_text().splitlines()[lines:] if "warm-backup" in line]

    def failures() -> int:
        return sum("Looking for runs failed" in line for line in told())

    answered: list[Request] = []

    def nonsense(request: Request) -> bytes:
        answered.append(request)
        return refusal(200, b'{"nonsense": true}')

    api.fault = nonsense
    wait_until(lambda: failures() > 0, PATIENCE, "a look to fail")
    answered.clear()
    wait_until(lambda: len(answered) >= 5, PATIENCE, "the agent to try again")
    api.fault = None

    before = times_begun(project, "book-quick")
    run = prefect.start("book-quick")
    assert prefect.wait_for_end(run).state_name == "Completed"
    assert times_begun(project, "book-quick") == before + 1
    assert failures() == 1
    loud = [RUN.sub("run", line).split(" | ", 1)[1] for line in told() if re.search("WARNING|ERROR", line)]
    assert len(loud) == len(set(loud)), told()


# --- runs that are made anew, asked for again, or somebody's --------------------------------------


@pytest.mark.usefixtures("node")
def test_a_tick_that_is_made_anew_does_not_run_again(project: Project, prefect: Prefect) -> None:
    """A flow run that was deleted and planned again shows what its tick came to."""
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    key = f"scheduled {prefect.deployment('book-hour').id} somebody {moment.isoformat(sep=' ')}"

    def make() -> FlowRun:
        return prefect.start("book-hour", state=Scheduled(scheduled_time=moment), idempotency_key=key)

    def times() -> int:
        began = project.entries("book-hour", "began")
        return sum(entry["due"] == moment.timestamp() for entry in began)

    first = prefect.wait_for_end(make())
    prefect.client.delete_flow_run(first.id)
    second = prefect.wait_for_end(make())

    assert (first.state_name, second.state_name, second.id != first.id) == ("Completed", "Completed", True)
    assert times() == 1
    # Somebody who asks for that very run gets it.
    prefect.client.set_flow_run_state(second.id, Scheduled(scheduled_time=moment))
    wait_until(lambda: times() == 2, PATIENCE, "the retry")
    prefect.wait_for_end(second)


@pytest.mark.usefixtures("node")
def test_a_process_that_is_killed_before_the_body(project: Project, prefect: Prefect) -> None:
    """Whoever ends it: the run has begun nothing, and is made again."""
    before = len(project.entries("book-late", "loading"))
    wait = project.folder / "flows" / "wait"
    wait.touch()
    run = prefect.start("book-late")
    loading = project.wait_for("book-late", "loading", before + 1)[-1]
    os.kill(loading.pid, signal.SIGKILL)
    wait.unlink()

    assert prefect.wait_for_end(run).state_name == "Completed"
    assert times_begun(project, "book-late") == 1


@pytest.mark.usefixtures("node")
def test_a_deployment_that_is_none_of_ours(project: Project, prefect: Prefect) -> None:
    """A plain flow with a schedule of its owner's own runs, each tick once."""
    client = prefect.client
    every = IntervalSchedule(interval=timedelta(seconds=2))
    deployment = client.create_deployment(
        client.create_flow_from_name("book-plain"),
        "mine",
        work_pool_name=project.pool,
        entrypoint="flows/jobs.py:book_plain",
        schedules=[DeploymentScheduleCreate(schedule=every, active=True, slug="mine")],
    )
    try:
        project.wait_for("book-plain", "began", 3)

        def ran() -> list[FlowRun]:
            return [run for run in prefect.runs_of(deployment) if run.state_name == "Completed"]

        wait_until(lambda: len(ran()) > 1, PATIENCE, "two runs to be Completed")
        done = ran()
        assert len({due(run) for run in done}) == len(done)
    finally:
        client.delete_deployment(deployment)


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("is_tick", [True, False], ids=["tick", "by hand"])
def test_a_run_that_suspends_itself(project: Project, prefect: Prefect, is_tick: bool) -> None:
    """It has not crashed, and when somebody resumes it, its body begins again."""
    client = prefect.client
    deployment = client.create_deployment(
        client.create_flow_from_name("book-suspended"),
        f"suspended-{is_tick}",
        work_pool_name=project.pool,
        entrypoint="flows/jobs.py:book_suspended",
    )
    before = times_begun(project, "book-suspended")
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    key = f"scheduled {deployment} somebody {moment.isoformat(sep=' ')}" if is_tick else None
    run = client.create_flow_run_from_deployment(
        deployment, state=Scheduled(scheduled_time=moment), idempotency_key=key
    )

    def is_suspended() -> bool:
        return client.read_flow_run(run.id).state_type is StateType.PAUSED

    wait_until(is_suspended, PATIENCE, "the run to suspend itself")
    time.sleep(3)  # longer than its process takes to end
    assert is_suspended()
    client.resume_flow_run(run.id)
    assert prefect.wait_for_end(run).state_name == "Completed"
    assert times_begun(project, "book-suspended") == before + 2
    client.delete_deployment(deployment)


# --- two work pools -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("node")
def test_two_pools_that_name_one_group(project: Project, prefect: Prefect) -> None:
    """The second is told whose it is, by its agent and by the doctor, and holds no token."""
    client = prefect.client
    client.create_work_queue("etl", work_pool_name=project.pool)
    wait_until(lambda: "etl" in project.taskadapter("status", "--pool", project.pool), PATIENCE, "a holder")
    second = f"{project.pool}-2"
    template = client.read_work_pool(project.pool).base_job_template
    client.create_work_pool(WorkPoolCreate(name=second, type="warm-backup", base_job_template=template))
    client.create_work_queue("etl", work_pool_name=second)
    try:
        with project.agent("book-5", pool=second) as other:
            said = f"group 'etl' belongs to work pool '{project.pool}'"
            wait_until(lambda: said in other.log.read_text(), PATIENCE, "the second pool to be refused")
            with pytest.raises(AssertionError, match=said):
                project.taskadapter("doctor", "--pool", second)
            assert other.log.read_text().count(said) == 1
    finally:
        client.delete_work_pool(second)


# --- a node that can start no process -------------------------------------------------------------


@pytest.mark.slow
def test_a_node_that_can_start_no_process_leaves_its_groups(
    project: Project, prefect: Prefect, node: Program
) -> None:
    """It says why, once, and another node is active; when it can again, it takes part again."""
    group = f"{project.pool}-group"
    prefect.client.create_work_queue(group, work_pool_name=project.pool)

    def holder() -> str:
        return next((one["holder"] for one in project.groups() if one["group_id"] == group), "")

    wait_until(lambda: holder() == "book-1", PATIENCE, "the group to be held")
    with project.agent("book-6"):
        wait_until(
            lambda: "book-6" in project.taskadapter("status", "--pool", project.pool),
            PATIENCE,
            "a standby",
        )
        broken = project.folder / "httpx.py"
        broken.write_text("raise RuntimeError('broken on purpose')")
        try:
            for nursery in nurseries(node.pid):
                os.kill(nursery.pid, signal.SIGKILL)
            wait_until(lambda: holder() == "book-6", PATIENCE, "the standby to be active")
            said = "This node cannot start processes"
            wait_until(lambda: said in node.log.read_text(), PATIENCE, "the node to say why")
        finally:
            broken.unlink()
        again = "This node can run jobs again"
        wait_until(lambda: again in node.log.read_text(), PATIENCE, "the node to take part again")
        assert node.log.read_text().count(said) == 1
    wait_until(lambda: holder() == "book-1", PATIENCE, "the node to be active again")


# --- a job of every second ------------------------------------------------------------------------


@pytest.mark.usefixtures("second")
def test_a_run_by_hand_counts_for_nothing_and_ends_nothing(project: Project, prefect: Prefect) -> None:
    """A failure that somebody has asked for leaves the schedule as it is, and keeps its name."""
    project.wait_for("book-second", "began", 2)
    run = prefect.start("book-second", parameters={"fails": True}, name="by hand")

    ended = prefect.wait_for_end(run)
    assert (ended.state_name, ended.name) == ("Failed", "by hand")

    after = times_begun(project, "book-second")
    project.wait_for("book-second", "began", after + 2)

    def are_counted() -> bool:
        # They may overlap, so that one enters it before another that began before it.
        counts = sorted(entry["count"] for entry in ticks_begun(project))
        return counts == list(range(1, len(counts) + 1))

    wait_until(are_counted, PATIENCE, "each tick to be counted, and no other run")


def anchor(project: Project) -> float:
    """Return the fraction of a second at which the ticks of the job are due: most entries are ticks."""
    fractions = Counter(entry["due"] % 1 for entry in project.entries("book-second", "began"))
    return float(fractions.most_common(1)[0][0])


def ticks_begun(project: Project) -> list[Entry]:
    """Return what the bodies of the job of every second noted when they began, without runs by hand."""
    fraction = anchor(project)
    return [entry for entry in project.entries("book-second", "began") if entry["due"] % 1 == fraction]


@pytest.mark.usefixtures("second")
def test_the_ledger_is_shown(project: Project) -> None:
    """The command says what ran when, where and how late, what waits, and that nothing is missing."""
    project.wait_for("book-second", "began", 5)
    lines = json.loads(project.taskadapter("ledger", "book-second/book-second", "--json"))
    assert len(lines) >= 5
    assert {line["node"] for line in lines if line["outcome"] != "waiting"} == {"book-1"}
    assert "missing" not in {line["outcome"] for line in lines}
    assert all(-0.001 < line["late"] < PATIENCE for line in lines if line["due"])
    assert "Completed" in project.taskadapter("ledger", "book-second/book-second")


def begun_at(project: Project) -> list[float]:
    """Return when the last bodies of the job of every second began: they tell of it some time later."""
    found = json.loads(project.taskadapter("ledger", "book-second", "--last", "50", "--json"))
    lines = [line for line in found if line["number"] is not None]
    return [datetime.fromisoformat(line["due"]).timestamp() + line["late"] for line in lines]


@pytest.mark.slow
@pytest.mark.usefixtures("second")
def test_pausing_holds_whatever_the_moment(project: Project, prefect: Prefect) -> None:
    """With two agents, at any phase of the job's ticks: nothing begins while it is paused, none is lost."""
    from taskadapter import pause_job, resume_job
    from taskadapter.declare.jobs import JobId

    job = JobId(prefect.deployment("book-second").id)
    with pytest.MonkeyPatch.context() as environment, project.agent("book-2", "--limit", "3"):
        for name in ("PREFECT_HOME", "PREFECT_PROFILES_PATH"):
            environment.setenv(name, project.env[name])
        url = f"sqlite:///{project.home / 'taskadapter.db'}"
        environment.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL", url)
        for phase in range(PHASES):
            project.wait_for("book-second", "began", times_begun(project, "book-second") + 2)
            time.sleep(phase / PHASES)
            pause_job(job)
            paused = time.time()
            time.sleep(2.5)
            resumed = time.time()
            resume_job(job)
            begun = begun_at(project)
            assert min(begun) < paused
            assert [at for at in begun if paused + 0.01 < at < resumed] == []

        def ticks() -> list[float]:
            return sorted(entry["due"] for entry in ticks_begun(project))

        until = ticks()[-1] + 5

        def is_none_lost() -> bool:
            # Agents that share a queue may each begin some of its late ticks: not all in one order.
            begun = ticks()
            return begun[-1] >= until and begun == [begun[0] + number for number in range(len(begun))]

        wait_until(is_none_lost, PATIENCE, "every tick to begin, once")


@pytest.mark.slow
@pytest.mark.usefixtures("second")
def test_a_backlog_is_drained_in_order(project: Project, prefect: Prefect) -> None:
    """A job that is far behind is on time again soon, though its new ticks go on; none is lost."""
    job = prefect.deployment("book-second").id
    project.wait_for("book-second", "began")
    prefect.client.pause_deployment(job)
    paused = time.time()
    time.sleep(MISSED)
    resumed = time.time()
    prefect.client.resume_deployment(job)

    def is_on_time() -> bool:
        since = [entry for entry in ticks_begun(project) if entry["due"] > resumed]
        return any(entry.at - entry["due"] < ON_TIME for entry in since)

    wait_until(is_on_time, PATIENCE, "the job to be on time again")

    def in_order() -> list[float]:
        found = [entry["due"] for entry in sorted(ticks_begun(project), key=lambda entry: entry["count"])]
        return found if sorted(found) == [min(found) + number for number in range(len(found))] else []

    begun = wait_until(in_order, PATIENCE, "every tick to begin, once")
    # What was due before the pause may have been claimed by an agent that has since been stopped.
    missed_and_since = [due for due in begun if due > paused]
    assert len(missed_and_since) > MISSED
    assert missed_and_since == sorted(missed_and_since)
