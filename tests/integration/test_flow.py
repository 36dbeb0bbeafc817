"""A declared job as a flow: called directly, and started by something other than our agent."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from prefect import flow
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Abort
from prefect.flow_engine import run_flow
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Failed
from pydantic import SecretStr

from taskadapter import (
    ErrorPolicy,
    Job,
    JobId,
    Listener,
    RetryConfiguration,
    Service,
    TaskPolicy,
    TriggerConfiguration,
    WaitingPolicy,
    current_run,
)
from taskadapter.coordination import store
from taskadapter.coordination.executions import Exhausted, Skipped
from taskadapter.deploy import deploy
from taskadapter.errors import DatabaseUnavailableError
from taskadapter.execution import current, protocol, record, turn
from taskadapter.execution.assignment import Assignment, Workspace
from taskadapter.execution.conclusion import enter_end
from taskadapter.execution.current import Execution
from taskadapter.execution.flow import job_flow
from taskadapter.execution.host import drive
from taskadapter.rules.ticks import slug

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

    from taskadapter.execution.current import CurrentRun

RETRY = RetryConfiguration(max_attempts=2, retry_interval=0.01)
TRIGGER = TriggerConfiguration(interval=3600, max_count=1, retry_config=RETRY)

seen: list[CurrentRun] = []
values: list[int] = []


def listener(**changes: object) -> Listener:
    return Listener(**({"trigger": TRIGGER, "work_pool": "test-flow"} | changes))


class Counter(Service):
    i: int = 1

    def execute(self) -> int:
        values.append(self.i)
        self.i += 1
        return self.i


class AsyncCounter(Counter):
    async def execute(self) -> int:  # type: ignore[override]
        return super().execute()


class Greeting(Job):
    """Greets.

    Once or more.
    """

    message: str
    times: int = 2

    def execute(self) -> list[str]:
        return [self.message] * self.times


def look() -> int:
    seen.append(current_run())
    return len(seen)


def dawdle() -> None:
    time.sleep(5)


async def look_async() -> int:
    return look()


def fail_twice() -> str:
    if look() < 3:
        raise ConnectionError("no answer")
    return "recovered"


async def fail_twice_async() -> str:
    return fail_twice()


def hidden() -> object:
    """As a decorator that knows nothing of async makes it."""
    return fail_twice_async()


def fail() -> None:
    look()
    raise ConnectionError("no answer")


# Prefect's engine opens a client to ask for the default result storage and leaves it to the collector.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def in_this_process(prefect_client: SyncPrefectClient) -> Iterator[None]:
    """Runs are made here, on the shared server; what they leave is collected before the next test."""
    seen.clear()
    values.clear()
    # The thread of a run's heartbeats would hold each run for up to a second after its end.
    quick = {PREFECT_LOGGING_TO_API_ENABLED: False, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(quick):
        yield
    gc.collect()


@pytest.fixture
def name() -> str:
    """A job's name that no other test has."""
    return f"job-{uuid.uuid4().hex[:8]}"


def call(on_name: str, source: Any, **changes: object) -> object:
    """Declare a job and call it, as a test or a shell would."""
    outcome = listener(**changes).service(on_name)(source)()
    return asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome


# --- called directly ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [look, look_async])
def test_a_direct_call_runs_the_body_once(name: str, source: object) -> None:
    """Called directly, a job runs at once, whatever its trigger says, and returns its result."""
    before = datetime.now(UTC)

    assert call(name, source) == 1

    (run,) = seen
    assert (run.job_id, run.count, run.attempt) == (None, 1, 1)
    assert (run.group_id, run.task_id, run.fencing_token) == (None, None, None)
    assert before <= run.scheduled_time <= datetime.now(UTC)


def test_a_direct_call_is_not_counted(name: str) -> None:
    """The maximum count of the trigger does not limit direct calls."""
    job: Any = listener().service(name)(look)

    assert [job(), job(), job()] == [1, 2, 3]


@pytest.mark.parametrize("source", [fail_twice, fail_twice_async, hidden])
def test_a_direct_call_is_retried(prefect_client: SyncPrefectClient, name: str, source: object) -> None:
    """Retries are made inside the one flow run, each with its number, and show as its states."""
    assert call(name, source) == "recovered"

    assert [run.attempt for run in seen] == [1, 2, 3]
    assert {run.scheduled_time for run in seen} == {seen[0].scheduled_time}
    (flow_run,) = runs_of(prefect_client, name)
    assert states(prefect_client, flow_run) == [
        "Pending",
        "Running",
        "AwaitingRetry",
        "Retrying",
        "AwaitingRetry",
        "Retrying",
        "Completed",
    ]


def runs_of(client: SyncPrefectClient, name: str) -> list[uuid.UUID]:
    ours = FlowFilter(name=FlowFilterName(any_=[name]))
    found = client.read_flow_runs(flow_filter=ours, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
    return [run.id for run in found]


def states(client: SyncPrefectClient, flow_run: uuid.UUID) -> list[str | None]:
    found = client.read_flow_run_states(flow_run)
    return [state.name for state in sorted(found, key=lambda state: state.timestamp)]


@pytest.mark.parametrize("policy", [*ErrorPolicy])
def test_the_last_error_is_reported(
    prefect_client: SyncPrefectClient, name: str, policy: ErrorPolicy
) -> None:
    """When every attempt has failed, the caller gets the last error and Prefect a failed run."""
    with pytest.raises(ConnectionError, match="no answer"):
        call(name, fail, task_policy=TaskPolicy(error_policy=policy))

    assert [run.attempt for run in seen] == [1, 2, 3]
    (flow_run,) = runs_of(prefect_client, name)
    assert states(prefect_client, flow_run)[-1] == "Failed"


def test_no_retry_reaches_into_the_next_tick(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A retry interval that is not shorter than the job's makes none in a direct call, and it is said."""
    trigger = TriggerConfiguration(
        interval=2, retry_config=RetryConfiguration(max_attempts=5, retry_interval=2)
    )

    with pytest.raises(ConnectionError):
        call(name, fail, trigger=trigger)

    assert [run.attempt for run in seen] == [1]
    assert "Failed after 1 attempt(s). No further one fits in before the next tick. The job" in caplog.text
    assert "The error: ConnectionError: no answer" in caplog.text


@pytest.mark.parametrize("source", [Counter, AsyncCounter])
def test_a_direct_call_saves_no_state(
    name: str, source: type[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called directly, a service starts from its declared values each time, and touches no database."""
    opened: list[str] = []
    monkeypatch.setattr(store, "_engine", opened.append)

    assert [call(f"{name}-{n}", source) for n in (1, 2)] == [2, 2]

    assert (values, opened) == ([1, 1], [])


def test_a_direct_call_of_an_attached_service(name: str) -> None:
    """An attached instance starts from its own values, and is itself left as it is."""
    counter = Counter(i=10)
    job = listener().attach(counter, name)

    assert [job(), job()] == [11, 11]
    assert counter.i == 10


def test_a_job_within_a_flow(name: str) -> None:
    """A job that another flow calls is a subflow like any other."""
    job: Any = listener().service(name)(look)

    @flow
    def parent() -> Any:
        return job() + job()

    assert parent() == 3


# --- a job's fields -------------------------------------------------------------------------------


def test_a_jobs_fields_are_the_flows_parameters() -> None:
    """The fields are parameters with type, default and schema; the class gives the description."""
    job = job_flow(Greeting, "greeting", TRIGGER)

    schema = job.parameters.model_dump(exclude_none=True)
    assert schema["required"] == ["message"]
    assert {name: field["type"] for name, field in schema["properties"].items()} == {
        "message": "string",
        "times": "integer",
    }
    assert schema["properties"]["times"]["default"] == 2
    assert job.description == "Greets.\n\nOnce or more."


def test_a_job_is_called_with_its_fields() -> None:
    """Parameters become fields, defaults stay."""
    job = job_flow(Greeting, "greeting", TRIGGER)

    assert job(message="hello") == ["hello", "hello"]
    assert job(message="hi", times=1) == ["hi"]


# --- started by something other than our agent ----------------------------------------------------


@pytest.mark.parametrize("source", [look, look_async])
def test_a_deployed_run_without_our_agent_refuses(
    prefect_client: SyncPrefectClient, name: str, source: Any
) -> None:
    """A deployed run that another worker starts fails before its body, and says what to start."""
    on = listener()
    job = on.service(name)(source)
    deployment_id = asyncio.run(deploy(on))[name].id
    flow_run = prefect_client.create_flow_run_from_deployment(deployment_id)

    state = run_flow(job, flow_run=flow_run, return_type="state")
    if asyncio.iscoroutine(state):
        state = asyncio.run(state)

    assert (state.name, seen) == ("Failed", [])
    assert "prefect worker start --pool POOL --type warm-backup" in str(state.message)
    assert prefect_client.read_flow_run(flow_run.id).state_name == "Failed"


def test_nothing_is_counted_then(
    prefect_client: SyncPrefectClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run is not retried, and asks no database: it is not one of the job's executions."""
    on = listener()
    job = on.service(name)(fail)
    deployment_id = asyncio.run(deploy(on))[name].id
    flow_run = prefect_client.create_flow_run_from_deployment(deployment_id)
    asked: list[object] = []
    monkeypatch.setattr("taskadapter.execution.record.begin", asked.append)

    run_flow(job, flow_run=flow_run, return_type="state")

    assert states(prefect_client, flow_run.id) == ["Scheduled", "Running", "Failed"]
    assert asked == []


# --- given to a host by our agent -----------------------------------------------------------------


@dataclass
class Agent:
    """Gives one run after another of one job to a host, which is this process."""

    client: SyncPrefectClient
    name: str
    database_url: str
    on: Listener
    job: Flow[..., object]
    told: list[protocol.Step] = field(default_factory=list)

    def run(
        self, *, auto_scheduled: bool = False, late: float = 0.0
    ) -> tuple[State[object] | None, Execution]:
        """Start a run of the job now, so many seconds after its time.

        Returns its final state, None if its body is not to begin, and what the flow tells the agent.
        """
        deployment_id = asyncio.run(deploy(self.on))[self.name].id
        flow_run = self.client.create_flow_run_from_deployment(deployment_id)
        trigger = self.on.services[self.name].trigger
        due = datetime.now(UTC) - timedelta(seconds=late)
        ours = {"auto_scheduled": auto_scheduled, "expected_start_time": due}
        execution = Execution(
            Assignment(
                flow_run=flow_run.model_copy(update=ours),
                due=due,
                flow_name=self.name,
                deployment_name=self.name,
                entrypoint="",
                workspace=Workspace(),
                node="node-1",
                incarnation="incarnation-1",
                database_url=SecretStr(self.database_url),
                trigger_slug=slug(trigger),
                trigger=trigger,
            ),
            tell=self.told.append,
        )
        token = current.execution.set(execution)
        state = None
        try:
            state = drive(self.job, execution.assignment)
        except Abort:
            pass
        finally:
            current.execution.reset(token)
        return state, execution


@pytest.fixture
def given(prefect_client: SyncPrefectClient, name: str, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    def give(
        source: Any, on_hooks: Sequence[Any] = (), timeout_seconds: float | None = None, **changes: object
    ) -> Agent:
        on = listener(**changes)
        hooks = [*on_hooks] or None
        job = on.service(name, on_completion=hooks, on_failure=hooks, timeout_seconds=timeout_seconds)(
            source
        )
        turn.keep(job, enter_end)
        return Agent(prefect_client, name, f"sqlite:///{tmp_path}/tasks.db", on, job)

    yield give
    store._engine_on.cache_clear()


def test_a_job_knows_its_run(given: Callable[..., Agent]) -> None:
    """A run that the agent gives knows its job, its time, its number and its node."""
    agent = given(look, trigger=TriggerConfiguration(interval=3600))

    for _ in range(2):
        state, execution = agent.run(auto_scheduled=True)
        assert state is not None
        assert state.is_completed()

    first, second = seen
    assert first.job_id == second.job_id == JobId(execution.assignment.job_id)
    assert (first.count, second.count, second.attempt) == (1, 2, 1)
    assert second.task_id == "node-1"
    assert second.scheduled_time == execution.assignment.due


def test_the_agent_is_told_of_each_hook(given: Callable[..., Agent]) -> None:
    """It ends one that hangs, and not a run that goes on after it."""

    def first(*_: object) -> None:
        pass

    async def second(*_: object) -> None:
        assert agent.told[-1] == protocol.Hook(name="second")

    def third(*_: object) -> None:
        assert agent.told[-1] == protocol.Hook(name="third")
        raise ValueError("a hook that fails")

    agent = given(look, on_hooks=[first, second, partial(third)])
    agent.run(auto_scheduled=True)

    hooks = [step.name for step in agent.told if isinstance(step, protocol.Hook)]
    assert list(dict.fromkeys(name for name in hooks if name)) == ["first", "second", "third"]
    assert hooks[-1] is None


def test_an_end_is_entered_before_a_hook_that_may_hang(given: Callable[..., Agent]) -> None:
    """Also where Prefect makes the end: a run that is too slow ends its job, as its policy says."""

    def hang(*_: object) -> None:
        outcomes.append(current.execution.get())
        assert isinstance(agent.told[-2], protocol.Begun)
        reasons.append(agent.told[-2].ended)

    outcomes: list[Execution | None] = []
    reasons: list[str | None] = []
    agent = given(dawdle, on_hooks=[hang], timeout_seconds=1)
    agent.run(auto_scheduled=True)

    (execution,) = outcomes
    assert execution is not None
    assert execution.outcome == "Failed"
    assert reasons == [execution.ended]
    assert execution.ended is not None


def test_the_last_of_the_counted_runs_ends_the_job(given: Callable[..., Agent]) -> None:
    """The run that reaches the maximum says so; one more is skipped, and its body does not run."""
    agent = given(look)

    last, execution = agent.run(auto_scheduled=True)
    assert last is not None
    assert (last.is_completed(), execution.ended) == (True, "the maximum of 1 run is reached")

    nothing, execution = agent.run(auto_scheduled=True)
    assert (nothing, execution.entered) == (None, Exhausted())
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("policy", "ran"),
    [(WaitingPolicy.WAIT, 1), (WaitingPolicy.IGNORE, 0), (WaitingPolicy.LOG_AND_IGNORE, 0)],
)
def test_a_tick_that_was_claimed_in_time_and_begins_too_late(
    given: Callable[..., Agent], policy: WaitingPolicy, ran: int
) -> None:
    """What held up its process counts too: the policy decides, and a skipped tick is not counted."""
    agent = given(look, task_policy=TaskPolicy(waiting_policy=policy))

    state, execution = agent.run(auto_scheduled=True, late=6)

    assert (state is not None, isinstance(execution.entered, Skipped)) == (bool(ran), not ran)
    assert len(seen) == ran


def test_a_services_state_is_saved(given: Callable[..., Agent]) -> None:
    """Each run starts from what the one before it has saved."""
    agent = given(Counter)

    for _ in range(3):
        agent.run()

    assert values == [1, 2, 3]


class Stumbling(Counter):
    def execute(self) -> int:
        super().execute()
        if look() in (1, 3, 4, 5):
            raise ConnectionError("no answer")
        return self.i


def test_a_failed_attempt_leaves_nothing_behind(given: Callable[..., Agent]) -> None:
    """A retry, and the run after a failed one, start from the last saved state."""
    agent = given(Stumbling)

    ended = [agent.run()[0] for _ in range(3)]

    assert [state and state.name for state in ended] == ["Completed", "Failed", "Completed"]
    assert values == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("policy", "ends"),
    [
        (ErrorPolicy.LOG_AND_TERMINATE, True),
        (ErrorPolicy.TERMINATE, True),
        (ErrorPolicy.LOG_AND_CONTINUE, False),
        (ErrorPolicy.CONTINUE, False),
    ],
)
def test_the_error_policy(given: Callable[..., Agent], policy: ErrorPolicy, ends: bool) -> None:
    """After the last attempt the job ends or goes on as its policy says; the run has failed anyhow."""
    policies = TaskPolicy(error_policy=policy)
    agent = given(
        fail, trigger=TriggerConfiguration(interval=3600, retry_config=RETRY), task_policy=policies
    )
    state, execution = agent.run(auto_scheduled=True)

    assert state is not None
    assert state.is_failed()
    assert (execution.ended is not None) is ends


class Refusing(Counter):
    def execute(self) -> Any:
        super().execute()
        return Failed(message="the day has no rate") if look() == 1 else None


def test_a_body_that_returns_a_failed_state_has_failed(given: Callable[..., Agent]) -> None:
    """As one that raises: its job ends, and its state is not saved; it is not tried again."""
    agent = given(Refusing, trigger=TriggerConfiguration(interval=3600, retry_config=RETRY))
    state, execution = agent.run(auto_scheduled=True)
    agent.run()

    assert state is not None
    assert (state.name, state.message) == ("Failed", "the day has no rate")
    assert (execution.outcome, execution.ended is not None) == ("Failed", True)
    assert values == [1, 1]


def test_a_run_by_hand_ends_nothing(given: Callable[..., Agent]) -> None:
    """Whatever its job's policy: somebody has tried something, and its schedule goes on."""
    state, execution = given(fail).run()

    assert state is not None
    assert (state.is_failed(), execution.ended) == (True, None)


@pytest.mark.parametrize("call", ["saved_service", "enter_end"])
def test_a_fault_of_the_database_ends_no_job(
    given: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Only the job's own errors count: where the database does not answer, the run fails, no more."""

    def gone(*_: object) -> None:
        raise DatabaseUnavailableError("no answer")

    agent = given(Counter, retry_config=None, trigger=TriggerConfiguration(interval=3600))
    monkeypatch.setattr(record, call, gone)

    state, execution = agent.run(auto_scheduled=True)

    assert state is not None
    assert (state.is_failed(), execution.ended) == (True, None)
