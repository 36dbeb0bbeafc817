"""The run that is going on: what travels to a host, and what a job may ask."""

import asyncio
import threading
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from pydantic import ValidationError

from taskadapter import current_run
from taskadapter.declare.jobs import JobId
from taskadapter.declare.triggers import RetryConfiguration, TriggerConfiguration
from taskadapter.errors import TaskError
from taskadapter.execution.assignment import Assignment, Workspace
from taskadapter.execution.current import CurrentRun, running

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
SECRET = "postgresql://node:hunter2@db/tasks"
TRIGGER = TriggerConfiguration(
    interval=2,
    max_count=5,
    start_time=NOON,
    retry_config=RetryConfiguration(max_attempts=1, retry_interval=0.5),
)


def assignment(*, auto_scheduled=True, deployment_id=None, **changes):
    flow_run = FlowRun(
        id=uuid4(), flow_id=uuid4(), deployment_id=deployment_id, auto_scheduled=auto_scheduled
    )
    given = {
        "flow_run": flow_run,
        "due": NOON,
        "flow_name": "counter",
        "deployment_name": "counter",
        "entrypoint": "flows/counter.py:Counter",
        "workspace": Workspace(working_dir="/code", env={"A": "1", "B": None}),
        "node": "node-1",
        "incarnation": "incarnation-1",
        "database_url": SECRET,
        "trigger_slug": "every-2s",
        "trigger": TRIGGER,
        "initial_state": {"i": 10},
    }
    return Assignment(**(given | changes))


@pytest.fixture
def a_run():
    run = CurrentRun(job_id=JobId(uuid4()), scheduled_time=NOON, count=3)
    token = running.set(run)
    yield run
    running.reset(token)


# --- current_run ----------------------------------------------------------------------------------


def test_outside_a_run_there_is_none():
    """Outside a run it is an error that says where it may be called."""
    with pytest.raises(TaskError, match=r"outside a run; call it in execute\(\)"):
        current_run()


def test_inside_a_run_it_is_that_run(a_run):
    """Inside a run it is the one that the flow has announced."""
    assert current_run() is a_run


def test_what_a_run_knows_by_default(a_run):
    """A first attempt of an uncoordinated job has no group, no node and no token."""
    assert a_run.attempt == 1
    assert (a_run.group_id, a_run.task_id, a_run.fencing_token) == (None, None, None)


def test_a_coroutine_of_the_run_sees_it(a_run):
    """An async job, and what it sends to a thread with asyncio, see the run too."""

    async def ask():
        return [current_run(), await asyncio.to_thread(current_run)]

    assert asyncio.run(ask()) == [a_run, a_run]


def test_another_thread_is_outside_the_run(a_run):
    """A thread that runs beside the job is not in its run."""
    answers: list[object] = []

    def ask():
        try:
            answers.append(current_run())
        except TaskError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()

    assert [type(answer) for answer in answers] == [TaskError]


def test_a_run_is_frozen(a_run):
    """A job cannot change what it is told."""
    with pytest.raises(AttributeError):
        a_run.count = 4


# --- Assignment -----------------------------------------------------------------------------------


def test_an_assignment_survives_json():
    """What the agent sends is what the host reads, secret, state, trigger and due time included."""
    sent = assignment()

    read = Assignment.model_validate_json(sent.model_dump_json())

    assert read == sent
    assert read.database_url.get_secret_value() == SECRET
    assert read.trigger == TRIGGER
    assert read.due == NOON


def test_an_assignment_survives_python_values_in_json_mode():
    """The same holds by way of plain values, which the pipe to the host carries."""
    sent = assignment()

    assert Assignment.model_validate(sent.model_dump(mode="json")) == sent


def test_the_secret_is_shown_nowhere_else():
    """Neither repr, str nor a dump to Python values shows the database's URL."""
    shown = assignment()

    assert "hunter2" not in repr(shown)
    assert "hunter2" not in str(shown)
    assert "hunter2" not in repr(shown.model_dump())


def test_an_assignment_is_frozen():
    """One run's assignment is not turned into another's."""
    with pytest.raises(ValidationError, match="frozen"):
        assignment().node = "node-2"


@pytest.mark.parametrize(("auto_scheduled", "max_count"), [(True, 5), (False, -1)])
def test_a_run_by_hand_does_not_count_against_the_maximum(auto_scheduled, max_count):
    """Only what the schedule has made is limited by the trigger."""
    assert assignment(auto_scheduled=auto_scheduled).max_count == max_count


def test_a_deployment_without_our_trigger_has_no_maximum():
    """A plain Prefect deployment on our pool runs for ever."""
    assert assignment(trigger=None).max_count == -1


def test_the_job_is_the_deployment():
    """A run belongs to the job of its deployment, one without a deployment to none."""
    deployment_id = uuid4()

    assert assignment(deployment_id=deployment_id).job_id == deployment_id
    assert assignment().job_id is None
