"""The scheduling functions: what they refuse, before anything is asked of a server."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic import Field

import taskadapter
from deployments.local import environment
from taskadapter import (
    Civil,
    Job,
    JobId,
    Service,
    TaskError,
    TaskPolicy,
    TriggerConfiguration,
    ZoneOffset,
    aschedule_one_time_job,
    configure_worker_pool,
    pause_job,
    resume_job,
    schedule_job_recur_by_frequency,
    schedule_one_time_job,
    scheduler,
    unschedule_job,
)
from taskadapter.deploy import Put
from taskadapter.errors import ApiUnavailableError, DeclarationError
from taskadapter.rules.ticks import slug
from taskadapter.services import may_be_one, place_of

PROJECT = Path(__file__).parents[2]
PAST = datetime(2020, 1, 1, tzinfo=UTC)
NOON = datetime(2090, 1, 1, 12, 0, tzinfo=UTC)
OFFSET = ZoneOffset(hours=1)
NAMES = [
    "configure_worker_pool",
    "get_running_jobs",
    "pause_all_jobs",
    "pause_job",
    "resume_all_jobs",
    "resume_job",
    "schedule_job_recur_by_frequency",
    "schedule_one_time_job",
    "unschedule_job",
]


class Greeting(Job):
    message: str = "hello"

    def execute(self) -> None: ...


class Counter(Service):
    i: int = 1

    def execute(self) -> None: ...


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    """Return the message with which a call is refused: a server would be another kind of error."""
    with pytest.raises(TaskError) as refused:
        function(*args, **kwargs)
    return str(refused.value)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"interval": 0}, ["interval=0", "greater than 0"]),
        ({"interval": -1}, ["interval=-1", "greater than 0"]),
        ({"interval": 0.5}, ["interval 0.5 s", "0.6 s is the least"]),
        ({"interval": "soon"}, ["interval='soon'", "number of seconds"]),
        ({"max_count": 0}, ["max_count=0", "never runs", "-1"]),
        ({"max_count": -2}, ["max_count=-2", "-1 for no limit"]),
        ({"start_time": "tomorrow"}, ["start_time='tomorrow'"]),
        ({"start_time": NOON.replace(tzinfo=None)}, ["start_time=2090"]),
        ({"start_time": NOON, "end_time": NOON}, ["end_time=2090", "must be after start_time=2090"]),
        ({"start_time": PAST}, ["start_time=2020-01-01T00:00:00+00:00", "has passed, it is 20", "later"]),
        ({"end_time": PAST}, ["end_time=2020-01-01T00:00:00+00:00", "has passed, it is 20", "later"]),
        ({"task_policy": "WAIT"}, ["task_policy"]),
        ({"group_id": "a/b"}, ["group_id='a/b'", "choose another"]),
        ({"name": " "}, ["' '", "name for a job", "choose another"]),
        ({"name": "a/b"}, ["'a/b'", "name for a job", "choose another"]),
        ({"name": 5}, ["name=5", "string"]),
        ({"name": print}, ["name=<builtin_function_or_method>", "string"]),
    ],
)
def test_a_recurring_job_with_an_invalid_value(arguments: dict[str, Any], parts: list[str]) -> None:
    """Each value outside its rule is refused with the value and the rule in words."""
    message = refusal(schedule_job_recur_by_frequency, Greeting(), **{"interval": 5, **arguments})

    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("when", "parts"),
    [
        (PAST, ["trigger_time=2020-01-01T00:00:00+00:00", "has passed, it is 20", "later"]),
        ("2020-01-01T00:00:00Z", ["trigger_time=2020-01-01T00:00:00+00:00", "has passed"]),
        (Civil(year=2020, month=1, day=1, hour=0, minute=0, second=0, utc_offset=OFFSET), ["passed"]),
        ("2090-01-01T12:00:00+99:00", ["trigger_time='2090-01-01T12:00:00+99:00'"]),
        ("2090-01-01T12:00:00", ["trigger_time='2090-01-01T12:00:00'"]),
        (None, ["trigger_time=None"]),
    ],
)
def test_a_one_time_job_at_an_invalid_time(when: Any, parts: list[str]) -> None:
    """A time that has passed, one without a valid offset and none at all are refused by name."""
    message = refusal(schedule_one_time_job, Greeting(), when)

    assert [part for part in parts if part not in message] == [], message


def test_a_time_that_passes_now_is_refused_with_both_times() -> None:
    """The message names the time that was given and what time it is."""
    given = datetime.now(UTC)

    message = refusal(schedule_one_time_job, Greeting(), given)

    told = re.findall(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", message)
    assert told[0] == given.isoformat()
    assert given < datetime.fromisoformat(told[1]) < given + timedelta(minutes=1)


def test_what_is_read_from_standard_input_is_refused() -> None:
    """Its file has a name, and is none; no node could import it."""
    found: dict[str, Any] = {}
    exec(compile("def job(): ...", "<stdin>", "exec"), found)
    with pytest.raises(DeclarationError, match="it is in no file"):
        place_of(found["job"])


@pytest.mark.parametrize("function", [unschedule_job, pause_job, resume_job])
def test_an_id_that_is_none(function: Any) -> None:
    """What is neither an id nor a name is refused before a server is asked."""
    message = refusal(function, 5)

    assert "id=5" in message
    assert "UUID" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"worker_count": 0}, ["worker_count=0", "at least 1"]),
        ({"worker_count": -5}, ["worker_count=-5", "at least 1"]),
        ({"worker_count": 2.5}, ["worker_count=2.5"]),
        ({"worker_count": True}, ["worker_count=True"]),
        ({"waiting_time": -1}, ["waiting_time=-1", "must not be negative"]),
        ({"waiting_time": float("nan")}, ["waiting_time=nan", "finite"]),
    ],
)
def test_a_worker_pool_of_an_invalid_size(arguments: dict[str, Any], parts: list[str]) -> None:
    """A pool of no workers and a negative waiting time are refused."""
    message = refusal(configure_worker_pool, **arguments)

    assert [part for part in parts if part not in message] == [], message


# --- jobs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "named"),
    [
        (Greeting, "class Greeting"),
        (Counter(), "a Counter"),
        (print, "a builtin_function_or_method"),
        (None, "a NoneType"),
        (object(), "an object cannot"),
    ],
)
def test_what_is_no_job(job: Any, named: str) -> None:
    """A class, a service, a function and nothing are refused, with what to pass instead."""
    for message in (
        refusal(schedule_one_time_job, job, NOON),
        refusal(schedule_job_recur_by_frequency, job, 5),
    ):
        assert message.startswith(named)
        assert "an instance of a subclass of Job" in message


def test_a_class_of_a_function_is_refused() -> None:
    """Nodes could not import it."""

    class Local(Job):
        def execute(self) -> None: ...

    message = refusal(schedule_one_time_job, Local(), NOON)

    assert "Local" in message
    assert "module level" in message


SCRIPT = """
from taskadapter import Job, TaskError, schedule_one_time_job

class Greeting(Job):
    def execute(self) -> None: ...

try:
    schedule_one_time_job(Greeting(), "2090-01-01T00:00:00Z")
except TaskError as error:
    print(error)
"""


def test_a_class_of_a_script_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    """A script outside the working directory is none that the nodes could find: its place is named."""
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    said = run_python(script, cwd=tmp_path / "elsewhere")

    assert f"Greeting in {script.resolve()} cannot be deployed" in said
    assert "outside the working directory" in said


def test_a_class_of_a_module_beside_such_a_script_is_refused(tmp_path: Path) -> None:
    """That script alone has the module in its path."""
    (tmp_path / "elsewhere").mkdir()
    module, script = tmp_path / "greetings.py", tmp_path / "script.py"
    module.write_text(SCRIPT.partition("try:")[0])
    script.write_text(f"from greetings import *\ntry:{SCRIPT.partition('try:')[2]}")

    said = run_python(script, cwd=tmp_path / "elsewhere")

    assert f"Greeting in {module} cannot be deployed from {tmp_path / 'elsewhere'}" in said
    assert "its module greetings is not found" in said


@pytest.mark.parametrize(
    ("place", "other", "is_one"),
    [
        ("sales.py:Report", "sales.py:Report", True),
        ("flows/sales.py:Report", "sales.py:Report", True),
        ("flows/sales.py:Report", "flows.sales:Report", True),
        ("project/flows/__init__.py:Report", "flows:Report", True),
        ("sales.py:Report", "stock.py:Report", False),
        ("sales/reports.py:Report", "stock/reports.py:Report", False),
        ("sales.reports:Report", "stock/reports.py:Report", False),
        ("wholesales.py:Report", "sales.py:Report", False),
        ("sales.py:Year.Report", "sales.py:Month.Report", False),
    ],
)
def test_which_places_may_be_one_class(place: str, other: str, *, is_one: bool) -> None:
    """What a program finds from another folder is the same; what two folders or modules have is not."""
    assert may_be_one(place, other) is is_one
    assert may_be_one(other, place) is is_one


def test_a_class_of_no_file_is_refused(tmp_path: Path) -> None:
    """What was typed in at a prompt is none that the nodes could find."""
    assert "Greeting cannot be deployed: nodes import" in run_python("-c", SCRIPT, cwd=tmp_path)


def run_python(*args: Any, cwd: Path) -> str:
    # A server that is not there: reaching for it would be another error.
    env = environment({"PREFECT_API_URL": "http://127.0.0.1:9/api", "PYTHONPATH": str(PROJECT)})
    run = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


class At(Job):
    at: Annotated[datetime, Field(strict=True)] = NOON

    def execute(self) -> None: ...


def test_fields_that_prefect_would_refuse_at_each_run() -> None:
    """A strict datetime is none in JSON; no server is asked."""
    for message in (
        refusal(schedule_one_time_job, At(), NOON),
        refusal(schedule_job_recur_by_frequency, At(), 5),
    ):
        assert message.startswith("At cannot be scheduled, for Prefect does not take its fields")
        assert "(at: Input should be a valid datetime)" in message


class Api:
    """Has no job, makes one, and fails at its tick."""

    def __init__(self, fault: BaseException, *, is_lost: bool = False) -> None:
        self.fault, self.is_lost, self.deleted = fault, is_lost, list[UUID]()

    async def read_deployment(self, job_id: UUID) -> Any:
        schedule = SimpleNamespace(id=uuid4(), slug=self.slug)
        return SimpleNamespace(id=job_id, paused=False, schedules=[schedule])

    async def create_flow_run_from_deployment(self, *_: Any, **__: Any) -> None:
        raise self.fault

    async def delete_deployment(self, job_id: UUID) -> None:
        if self.is_lost:
            raise httpx.ConnectError("refused")
        self.deleted.append(job_id)

    async def put(self, _: Any, declared: Any, *__: Any) -> Put:
        self.slug = slug(declared.trigger)
        return Put(JOB, self.was_there, True, True)

    was_there = False


JOB = uuid4()
ASKED = httpx.Request("POST", "http://127.0.0.1:9/api/deployments/1/create_flow_run")


def answered(status: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("no", request=ASKED, response=httpx.Response(status, request=ASKED))


@pytest.mark.parametrize("put_it", ["_put_once", "_put_recurring"])
@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        (answered(409), ApiUnavailableError),
        (answered(503), ApiUnavailableError),
        (httpx.ReadError("lost"), ApiUnavailableError),
        (asyncio.CancelledError(), asyncio.CancelledError),
    ],
    ids=["refused", "not ready", "lost", "cancelled"],
)
class TestATickThatCannotBeMade:
    """Nobody has the id of the job: it is deleted, unless it was there before."""

    def put(self, monkeypatch: Any, api: Any, put_it: str, raised: type[BaseException]) -> str:
        monkeypatch.setattr(scheduler, "put", api.put)
        trigger = TriggerConfiguration(interval=5, start_time=datetime.now(UTC) + timedelta(seconds=5))
        declared: Any = SimpleNamespace(trigger=trigger)
        monkeypatch.setattr(scheduler, "remake_ticks", nothing)
        monkeypatch.setattr(scheduler, "remove_ticks", nothing)
        with pytest.raises(raised) as told:
            asyncio.run(getattr(scheduler, put_it)(api, declared, {}))
        return str(told.value)

    def test_of_a_new_job(self, monkeypatch: Any, put_it: str, fault: Any, raised: Any) -> None:
        api = Api(fault)
        said = self.put(monkeypatch, api, put_it, raised)
        assert api.deleted == [JOB]
        assert "was made all the same" not in said

    def test_of_one_that_was_there(self, monkeypatch: Any, put_it: str, fault: Any, raised: Any) -> None:
        api = Api(fault)
        api.was_there = True
        self.put(monkeypatch, api, put_it, raised)
        assert api.deleted == []

    def test_where_it_cannot_be_deleted(
        self, monkeypatch: Any, put_it: str, fault: Any, raised: Any
    ) -> None:
        said = self.put(monkeypatch, Api(fault, is_lost=True), put_it, raised)
        assert raised is asyncio.CancelledError or said.endswith(
            f"; job {JOB} was made all the same: unschedule it."
        )


async def nothing(*_: Any) -> None: ...


# --- the two forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_function_has_an_async_twin(name: str) -> None:
    """The twin is a coroutine function with the same arguments and result, and exported too."""
    twin = getattr(taskadapter, f"a{name}")

    assert inspect.iscoroutinefunction(twin)
    assert not inspect.iscoroutinefunction(getattr(taskadapter, name))
    assert inspect.signature(twin) == inspect.signature(getattr(taskadapter, name))
    assert {name, f"a{name}"} <= set(taskadapter.__all__)


def test_an_async_twin_refuses_when_awaited() -> None:
    """The twin raises the same errors."""

    async def schedule() -> JobId:
        return await aschedule_one_time_job(Greeting(), PAST, task_policy=TaskPolicy())

    assert "has passed" in refusal(lambda: asyncio.run(schedule()))


def test_the_defaults_are_ballerinas() -> None:
    """Five workers and five seconds, no limit of runs, log and terminate."""
    size = inspect.signature(configure_worker_pool).parameters
    recurring = inspect.signature(schedule_job_recur_by_frequency).parameters

    assert (size["worker_count"].default, size["waiting_time"].default) == (5, 5)
    assert (recurring["max_count"].default, recurring["task_policy"].default) == (-1, TaskPolicy())
