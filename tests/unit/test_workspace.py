"""A host's desk: flows imported once, fresh when their code changes, in the workspace's environment."""

import os
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import refresh_global_settings_context
from prefect.exceptions import ScriptError
from prefect.settings import get_current_settings

from taskadapter.model import RetryConfiguration, TriggerConfiguration
from taskadapter.runs import Assignment, Workspace
from taskadapter.workspace import Desk, StaleCode

TRIGGER = TriggerConfiguration(interval=2)

FLOWS = """\
from prefect import flow

from taskadapter import Job, Listener, Service, TriggerConfiguration
from helper import VALUE

listener = Listener(trigger=TriggerConfiguration(interval=2))


@listener.service("declared")
class Declared(Service):
    i: int = VALUE

    def execute(self): ...


@listener.service("function")
def function(): ...


@flow
def plain(): ...


class Attached(Service):
    i: int = 1

    def execute(self): ...


class Greeting(Job):
    message: str = "hello"

    def execute(self): ...


def undecorated(): ...
"""


@pytest.fixture(autouse=True)
def settings_are_restored():
    """Prefect's settings are read from the environment again when a test has left it as it was."""
    yield
    refresh_global_settings_context()


@pytest.fixture
def jobs(project):
    """A module of jobs, one that it imports, and one that nobody does."""
    (project / "jobs.py").write_text(FLOWS)
    (project / "helper.py").write_text("VALUE = 1\n")
    (project / "aside.py").write_text("")


@pytest.fixture
def desk(project, jobs):
    return Desk(Workspace(working_dir=str(project)))


def assignment(entrypoint, **changes):
    given = {
        "flow_run": FlowRun(id=uuid4(), flow_id=uuid4()),
        "due": datetime(2030, 1, 1, tzinfo=UTC),
        "flow_name": "job-1",
        "entrypoint": entrypoint,
        "workspace": Workspace(),
        "node": "node-1",
        "database_url": "sqlite://",
        "trigger": TRIGGER,
        "trigger_slug": "every-2s",
    }
    return Assignment(**(given | changes))


# --- what an entrypoint names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrypoint", "name"),
    [
        ("jobs.py:Declared", "declared"),
        ("jobs.py:function", "function"),
        ("jobs.py:plain", "plain"),
        ("jobs.Declared", "declared"),
    ],
)
def test_a_flow_is_taken_as_it_is(desk, entrypoint, name):
    """What a decorator has made a flow has its own name."""
    assert desk.flow_for(assignment(entrypoint)).name == name


@pytest.mark.parametrize("entrypoint", ["jobs.py:Attached", "jobs.py:Greeting", "jobs.py:undecorated"])
def test_what_is_no_flow_becomes_the_deployments(desk, entrypoint):
    """An attached service's class, a job's, or a function becomes the flow of the deployment's name."""
    flow = desk.flow_for(assignment(entrypoint))

    assert isinstance(flow, Flow)
    assert flow.name == "job-1"
    assert flow.log_prints is True


def test_a_function_with_a_trigger_is_one_of_our_jobs(desk):
    """A function that is declared elsewhere is counted and retried like any job of ours."""
    flow = desk.flow_for(assignment("jobs.py:undecorated"))

    assert flow.fn.__code__.co_filename.endswith("taskadapter/flow.py")


def test_a_function_without_a_trigger_is_prefects(desk):
    """A plain Prefect deployment of a function on our pool is an ordinary flow."""
    flow = desk.flow_for(assignment("jobs.py:undecorated", trigger=None, trigger_slug=None))

    assert flow.name == "undecorated"


def test_a_jobs_fields_are_parameters(desk):
    """The fields of a job class are the flow's parameters."""
    assert [*desk.flow_for(assignment("jobs.py:Greeting")).parameters.properties] == ["message"]


def test_a_module_that_fails_to_import(project, desk):
    """A module that raises leaves no flow behind: the next assignment tries it again."""
    (project / "jobs.py").write_text("raise RuntimeError('not today')\n")
    for _ in range(2):
        with pytest.raises(ScriptError):
            desk.flow_for(assignment("jobs.py:plain"))


# --- warm -----------------------------------------------------------------------------------------


def test_the_second_assignment_is_warm(desk):
    """A second run of a job has the same flow object: nothing is imported again."""
    assert desk.flow_for(assignment("jobs.py:Declared")) is desk.flow_for(assignment("jobs.py:Declared"))


@pytest.mark.parametrize(
    "changes",
    [
        {"initial_state": {"i": 10}},
        {"flow_name": "job-2"},
        {
            "trigger": TRIGGER.model_copy(
                update={"retry_config": RetryConfiguration(max_attempts=1, retry_interval=1)}
            )
        },
    ],
    ids=["initial state", "name", "retries"],
)
def test_another_declaration_of_one_class_is_another_flow(desk, changes):
    """Another initial state, name or retry makes another flow, though the trigger has its old slug."""
    first = desk.flow_for(assignment("jobs.py:Attached"))

    assert desk.flow_for(assignment("jobs.py:Attached", **changes)) is not first


# --- fresh ----------------------------------------------------------------------------------------


def rewrite(file, text):
    """Change a file; its time of change moves even where the clock of the file system is coarse."""
    before = file.stat()
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("name", ["jobs.py", "helper.py"])
def test_a_changed_module_is_stale(project, desk, name):
    """When the flow's module or one that it imports changes, the host says so before the next run."""
    desk.flow_for(assignment("jobs.py:Declared"))

    rewrite(project / name, (project / name).read_text() + "\n# changed\n")

    with pytest.raises(StaleCode):
        desk.flow_for(assignment("jobs.py:Declared"))


def test_a_change_of_the_same_length_is_stale(project, desk):
    """The time of change counts, not only the size."""
    desk.flow_for(assignment("jobs.py:Declared"))

    rewrite(project / "helper.py", "VALUE = 2\n")

    with pytest.raises(StaleCode):
        desk.flow_for(assignment("jobs.py:Declared"))


def test_a_change_of_size_within_one_tick_of_the_clock_is_stale(project, desk):
    """The size counts, not only the time of change."""
    desk.flow_for(assignment("jobs.py:Declared"))
    file = project / "helper.py"
    before = file.stat()

    file.write_text("VALUE = 22\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(StaleCode):
        desk.flow_for(assignment("jobs.py:Declared"))


def test_a_module_that_is_gone_is_stale(project, desk):
    """A removed file makes the host stale too."""
    desk.flow_for(assignment("jobs.py:Declared"))

    (project / "helper.py").unlink()

    with pytest.raises(StaleCode):
        desk.flow_for(assignment("jobs.py:Declared"))


def test_a_file_that_nobody_imported_does_not_matter(project, desk):
    """A change elsewhere in the workspace keeps the host warm."""
    first = desk.flow_for(assignment("jobs.py:Declared"))

    rewrite(project / "aside.py", "VALUE = 3\n")
    (project / "data.csv").write_text("1,2\n")

    assert desk.flow_for(assignment("jobs.py:Declared")) is first


def test_a_changed_module_is_stale_for_another_job_too(project, desk):
    """A host has one interpreter: another entrypoint of a changed workspace needs a new one as well."""
    desk.flow_for(assignment("jobs.py:Declared"))

    rewrite(project / "helper.py", "VALUE = 22\n")

    with pytest.raises(StaleCode):
        desk.flow_for(assignment("jobs.py:function"))


# --- where it is ----------------------------------------------------------------------------------


def test_the_working_directory_is_that_of_the_workspace(project, desk, monkeypatch):
    """Wherever the last job went, the next one starts in its workspace."""
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")

    desk.flow_for(assignment("jobs.py:Declared"))

    assert os.getcwd() == str(project)  # noqa: PTH109 - what the process has, unresolved


def test_the_environment_is_that_of_the_workspace(project, monkeypatch):
    """Variables are set, and one that is None is removed."""
    monkeypatch.setenv("TASKADAPTER_TEST_KEPT", "before")
    monkeypatch.setenv("TASKADAPTER_TEST_GONE", "before")
    monkeypatch.setenv("TASKADAPTER_TEST_NEW", "before")

    Desk(Workspace(env={"TASKADAPTER_TEST_NEW": "after", "TASKADAPTER_TEST_GONE": None}))

    assert os.environ["TASKADAPTER_TEST_KEPT"] == "before"
    assert os.environ["TASKADAPTER_TEST_NEW"] == "after"
    assert "TASKADAPTER_TEST_GONE" not in os.environ


def test_prefects_settings_in_the_environment_take_effect(project, jobs, monkeypatch):
    """A setting of Prefect's in a deployment's job variables is what the flow sees."""
    monkeypatch.setenv("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
    desk = Desk(Workspace(working_dir=str(project), env={"PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true"}))

    assert get_current_settings().results.persist_by_default is True
    assert desk.flow_for(assignment("jobs.py:plain")).persist_result is True
