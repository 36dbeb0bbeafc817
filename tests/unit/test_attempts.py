"""What a run says and enters when it has failed, by its last attempt or by Prefect's engine."""

import logging
from datetime import UTC, datetime
from json import JSONDecodeError
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Failed

from taskadapter.coordination.executions import Begun
from taskadapter.declare.triggers import RetryConfiguration, TaskPolicy, TriggerConfiguration
from taskadapter.errors import TokenLostError
from taskadapter.execution import attempts, record
from taskadapter.execution.attempts import consequence, enter_end_of_engine
from taskadapter.execution.current import CurrentRun, Execution
from tests.unit.test_hosts import ASSIGNMENT

RESTART = "The job ends on all nodes; `taskadapter restart hello` starts it again."
SHORT = "No further one fits in before the next tick."


@pytest.mark.parametrize(
    ("ended", "is_short", "said"),
    [
        (None, False, "The job goes on."),
        (None, True, f"{SHORT} The job goes on."),
        ("hello", False, RESTART),
        ("hello", True, f"{SHORT} {RESTART}"),
        ("my job", False, RESTART.replace("hello", "'my job'")),
    ],
)
def test_what_follows_from_a_failure_is_said_in_sentences(ended, is_short, said):
    """With the command that starts a job again, where it ends."""
    assert consequence(ended, is_short=is_short) == said


TIMED_OUT: State[Any] = Failed(name="TimedOut", message="Flow run exceeded timeout of 2.0 second(s)")


def execution(policy="LOG_AND_TERMINATE", *, is_tick=True, is_ours=True):
    """Return a run whose body has begun, the seventh of its job."""
    tick = datetime(2030, 1, 1, tzinfo=UTC)
    job_id = uuid4()
    key = f"scheduled {job_id} schedule {tick.isoformat(sep=' ')}" if is_tick else None
    flow_run = FlowRun(
        flow_id=uuid4(), deployment_id=job_id, idempotency_key=key, auto_scheduled=is_tick, name="run"
    )
    trigger = TriggerConfiguration(interval=2, task_policy=TaskPolicy(error_policy=policy))
    assignment = ASSIGNMENT.model_copy(
        update={"flow_run": flow_run, "trigger": trigger if is_ours else None}
    )
    return Execution(assignment, entered=Begun(7))


class TestAnEndOfTheEngine:
    """A timeout interrupts the body by what is no error of it: no attempt sees it."""

    @pytest.fixture
    def entered(self, monkeypatch):
        """What is entered: the outcome, and why the job is over."""
        found = []
        monkeypatch.setattr(
            record, "enter_end", lambda _run, _service, outcome, ends: found.append((outcome, ends))
        )
        return found

    @pytest.mark.parametrize("policy", ["LOG_AND_TERMINATE", "TERMINATE"])
    def test_ends_the_job(self, entered, policy, caplog):
        run = execution(policy)
        enter_end_of_engine(run, TIMED_OUT, is_failure=True)
        reason = f"run 7 failed, and the error policy is {policy}"
        assert entered == [("Failed", reason)]
        assert run.ended == reason
        said = "Ended by Prefect, and failed. The job ends on all nodes; "
        assert (said in caplog.text) == (policy != "TERMINATE")
        assert ("The error: Flow run exceeded timeout" in caplog.text) == (policy != "TERMINATE")

    @pytest.mark.parametrize(
        "run",
        [
            execution("CONTINUE"),
            execution("LOG_AND_CONTINUE"),
            execution(is_tick=False),
            execution(is_ours=False),
        ],
        ids=["goes on", "goes on, logged", "by hand", "none of ours"],
    )
    def test_ends_nothing(self, entered, run):
        enter_end_of_engine(run, TIMED_OUT, is_failure=True)
        assert entered == [("Failed", None)]
        assert run.ended is None

    def test_which_is_no_failure(self, entered):
        run = execution()
        enter_end_of_engine(run, Cancelled(), is_failure=False)
        assert entered == [("Cancelled", None)]
        assert run.ended is None

    def test_that_cannot_be_entered(self, monkeypatch):
        """Who holds the token says what became of the run; here its job is not over."""

        def lost(*_):
            raise TokenLostError("lost")

        monkeypatch.setattr(record, "enter_end", lost)
        run = execution()
        with pytest.raises(TokenLostError):
            enter_end_of_engine(run, TIMED_OUT, is_failure=True)
        assert run.ended is None


def test_an_error_without_words_is_tried_again(caplog):
    """What it raised when it was asked for them ended the attempts."""

    class WordlessError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    given: Any = object.__new__(attempts.Attempts)
    retry = RetryConfiguration(max_attempts=3, retry_interval=1)
    given.trigger = TriggerConfiguration(interval=600, retry_config=retry)
    given.started, given.log = datetime.now(UTC), logging.getLogger("run")
    given.current = CurrentRun(job_id=None, scheduled_time=given.started, count=1, attempt=1)

    assert given.failed(WordlessError()) == 1
    assert caplog.messages == ["Attempt 1 failed, next in 1 s: WordlessError: <its text cannot be shown>"]


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ConnectError("away"),
        JSONDecodeError("Expecting value", "<html>", 0),
        ObjectNotFound(httpx.ConnectError("404")),
    ],
    ids=["no answer", "a page of a proxy's", "not found"],
)
def test_no_answer_of_the_api_ends_the_attempts(monkeypatch, caplog, fault):
    """That the next one is to come, or begins, is shown in the UI where that is possible."""

    class Client:
        def __enter__(self) -> Any:
            raise fault

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(attempts, "get_client", lambda **_: Client())
    given: Any = object.__new__(attempts.Attempts)
    given.flow_run, given.log = execution().assignment.flow_run, logging.getLogger("run")

    given.announce_retry()

    assert caplog.messages == [f"Prefect's API could not be told of state Retrying: {fault}"]
