"""What the process of a run makes of its workspace: environment, search path, folder, flow."""

import os
import re
import shutil
import sys
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import refresh_global_settings_context
from prefect.deployments.steps.core import StepExecutionError
from prefect.exceptions import ScriptError
from prefect.settings import get_current_settings

from taskadapter import Listener, TaskError
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.execution import workspace
from taskadapter.execution.assignment import Assignment, Workspace
from taskadapter.execution.current import Execution, execution

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
def restored(project, monkeypatch):
    """What a process changes of itself is as it was after a test, and of other tests it knows no module."""
    monkeypatch.chdir(project)
    for name in ("aside", "broken", "helper", "inner", "jobs", "typo", "wrong"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    monkeypatch.undo()
    refresh_global_settings_context()


@pytest.fixture
def jobs(project):
    """A module of jobs, one that it imports, and one that nobody does."""
    (project / "jobs.py").write_text(FLOWS)
    (project / "helper.py").write_text("VALUE = 1\n")
    (project / "aside.py").write_text("")


def assignment(entrypoint, **changes):
    given = {
        "flow_run": FlowRun(id=uuid4(), flow_id=uuid4()),
        "due": datetime(2030, 1, 1, tzinfo=UTC),
        "flow_name": "job-1",
        "deployment_name": "job-1",
        "entrypoint": entrypoint,
        "workspace": Workspace(),
        "node": "node-1",
        "incarnation": "incarnation-1",
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
def test_a_flow_is_taken_as_it_is(jobs, entrypoint, name):
    """What a decorator has made a flow has its own name."""
    assert workspace.load(assignment(entrypoint)).name == name


@pytest.mark.parametrize("entrypoint", ["jobs.py:Attached", "jobs.py:Greeting", "jobs.py:undecorated"])
def test_what_is_no_flow_becomes_the_deployments(jobs, entrypoint):
    """An attached service's class, a job's, or a function becomes the flow of the deployment's name."""
    flow = workspace.load(assignment(entrypoint))

    assert isinstance(flow, Flow)
    assert flow.name == "job-1"
    assert flow.log_prints is True


def test_a_function_with_a_trigger_is_one_of_our_jobs(jobs):
    """A function that is declared elsewhere is counted and retried like any job of ours."""
    flow = workspace.load(assignment("jobs.py:undecorated"))

    assert flow.fn.__code__.co_filename.endswith("taskadapter/execution/flow.py")


def test_a_function_without_a_trigger_is_prefects(jobs):
    """A plain Prefect deployment of a function on our pool is an ordinary flow."""
    flow = workspace.load(assignment("jobs.py:undecorated", trigger=None, trigger_slug=None))

    assert flow.name == "undecorated"


def test_a_jobs_fields_are_parameters(jobs):
    """The fields of a job class are the flow's parameters."""
    assert [*workspace.load(assignment("jobs.py:Greeting")).parameters.properties] == ["message"]


def test_a_module_that_fails_to_import(project, jobs):
    """A module that raises has no flow."""
    (project / "jobs.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(ScriptError):
        workspace.load(assignment("jobs.py:plain"))


# --- where it is ----------------------------------------------------------------------------------


def test_a_relative_folder(project, monkeypatch):
    """It is relative to where the process was, and its modules are found, also by a job's interpreters."""
    (project / "sub").mkdir()

    workspace.enter(Workspace(working_dir="sub"))

    assert os.getcwd() == sys.path[0] == str(project / "sub")  # noqa: PTH109 - what the process has
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(project / "sub")


def test_the_environment_is_that_of_the_workspace(project, monkeypatch):
    """Variables are set, and one that is None is removed."""
    monkeypatch.setenv("TASKADAPTER_TEST_KEPT", "before")
    monkeypatch.setenv("TASKADAPTER_TEST_GONE", "before")
    monkeypatch.setenv("TASKADAPTER_TEST_NEW", "before")

    workspace.enter(Workspace(env={"TASKADAPTER_TEST_NEW": "after", "TASKADAPTER_TEST_GONE": None}))

    assert os.environ["TASKADAPTER_TEST_KEPT"] == "before"
    assert os.environ["TASKADAPTER_TEST_NEW"] == "after"
    assert "TASKADAPTER_TEST_GONE" not in os.environ


def test_a_search_path_replaces_the_one_before(project, monkeypatch):
    """The folders of the agent's own `PYTHONPATH` give way to those of the deployment's."""
    monkeypatch.setenv("PYTHONPATH", "/of/the/agent")
    monkeypatch.setattr(sys, "path", ["/work", "/of/the/agent", "/lib"])

    workspace.enter(Workspace(env={"PYTHONPATH": "/one:/two"}))

    assert sys.path == [str(project), "/one", "/two", "/lib"]


def test_prefects_settings_in_the_environment_take_effect(project, jobs, monkeypatch):
    """A setting of Prefect's in a deployment's job variables is what the flow sees."""
    monkeypatch.setenv("PREFECT_RESULTS_PERSIST_BY_DEFAULT", "false")
    where = Workspace(env={"PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true"})

    assert workspace.changes_settings(where)
    workspace.enter(where)

    assert get_current_settings().results.persist_by_default is True
    assert workspace.load(assignment("jobs.py:plain")).persist_result is True


def test_the_names_of_a_run_are_no_settings():
    """What Prefect's workers tell a run of itself changes none of its settings."""
    assert not workspace.changes_settings(Workspace(env={"PREFECT__FLOW_RUN_ID": "1", "OTHER": "2"}))


@pytest.mark.parametrize(
    ("env", "needs"),
    [
        ({"PYTHONOPTIMIZE": "1"}, True),
        ({"PYTHONUTF8": None}, True),
        ({"PYTHONPATH": "/one"}, False),
        ({"PYTHONHASHSEED": "0"}, False),
        ({"OTHER": "1"}, False),
    ],
)
def test_what_needs_an_interpreter_of_its_own(monkeypatch, env, needs):
    """A variable that Python reads once needs one, unless it is what this process has already."""
    monkeypatch.setenv("PYTHONUTF8", "1")
    monkeypatch.setenv("PYTHONHASHSEED", "0")

    assert workspace.needs_interpreter(Workspace(env=env)) is needs
    assert workspace.environment(Workspace(env=env)).get("PYTHONUTF8") == env.get("PYTHONUTF8", "1")


# --- what keeps a flow from being loaded ----------------------------------------------------------


def why(entrypoint, **changes):
    """What is said of a flow that cannot be loaded: in a line, and in the run's log."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - a module may raise anything
        workspace.load(assignment(entrypoint, **changes))
    trace = caught.value.__traceback__
    return workspace.shown(caught.value.with_traceback(trace and trace.tb_next))


@pytest.mark.parametrize(
    ("entrypoint", "module", "name"),
    [
        ("jobs.py:append", "jobs.py", "append"),
        ("jobs.py:Attached.nothing", "jobs.py", "Attached.nothing"),
        ("jobs:append", "jobs", "append"),
    ],
)
def test_what_a_module_lacks_is_named(jobs, entrypoint, module, name):
    """In one sentence, without a traceback of what looked for it."""
    line, text = why(entrypoint)

    assert line == text
    assert line.startswith(f"{module} has no {name!r}, which the deployment's entrypoint names; ")


def test_an_error_is_told_whatever_its_text_holds(project):
    """The name of a file that is not UTF-8, which no message and no line of a log can have."""
    (project / "jobs.py").write_text(r'raise ValueError("caf\udce9")')
    line, text = why("jobs.py:append")

    assert line == r"ValueError: caf\udce9"
    assert line in text
    assert text.isascii()


def test_a_folder_without_the_file_is_named(project):
    """An agent was started somewhere else than in the project."""
    line, text = why("flows/appender.py:append")

    assert line == text
    assert line.startswith(f"folder {project} lacks flows/appender.py, ")
    assert "start the agent in the project's folder" in line
    assert line.endswith("or, if the file was renamed, deploy again")


@pytest.mark.parametrize("what", ["nothing", "a file"])
def test_a_working_directory_that_is_not_here_is_named(project, what):
    """It is on another node, perhaps."""
    folder = project / "elsewhere"
    if what == "a file":
        folder.write_text("")
    with pytest.raises(workspace.LacksCodeError, match=f"folder {folder} is not on this node; start the"):
        workspace.enter(Workspace(working_dir=str(folder)))


def test_a_folder_that_was_replaced_is_named(project):
    """By a release, perhaps: the agent stays in the old one."""
    project.rename(project.with_name("old"))
    shutil.rmtree(project.with_name("old"))
    with pytest.raises(workspace.LacksCodeError, match=r"the agent's folder is gone, .* restart it"):
        workspace.enter(Workspace())


def failing(step, fault, monkeypatch):
    """Return a workspace whose pull step fails so, as Prefect tells it; Prefect itself needs a server."""

    async def run_steps(steps, **_):
        raise StepExecutionError(f"Encountered error while running {step}") from fault

    monkeypatch.setattr(workspace, "run_steps", run_steps)
    return Workspace(pull_steps=[{step: {}}])


@pytest.mark.parametrize("kind", [FileNotFoundError, NotADirectoryError])
def test_a_pull_step_whose_folder_is_missing_is_named(project, jobs, monkeypatch, kind):
    """`prefect deploy` adds one with the folder of the machine that deploys."""
    fault = kind(2, "No such file or directory", "/no/such/folder")
    where = failing("prefect.deployments.steps.set_working_directory", fault, monkeypatch)

    line, text = why("jobs.py:plain", workspace=where)

    assert line == text
    assert line.startswith("pull step set_working_directory wants folder /no/such/folder, which ")
    assert "`pull: []`" in line


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("run_shell_script", FileNotFoundError(2, "No such file or directory", "git")),
        ("set_working_directory", PermissionError(13, "Permission denied", "/root")),
    ],
)
def test_another_pull_step_that_fails_is_shown_as_it_is(project, jobs, monkeypatch, step, fault):
    """What it lacks need not be a folder of the project."""
    where = failing(f"prefect.deployments.steps.{step}", fault, monkeypatch)

    line, text = why("jobs.py:plain", workspace=where)

    assert line.startswith("StepExecutionError: ")
    assert type(fault).__name__ in text


@pytest.mark.parametrize("entrypoint", ["broken.py:job", "broken:job", "broken.job"])
@pytest.mark.parametrize("name", ["nosuchmod", "'NoneType' object has no attribute 'get'"])
def test_a_module_that_raises_is_shown_where_it_does(project, entrypoint, name):
    """Only the lines of the user's own modules, those of a cause too."""
    statement = "import nosuchmod" if name == "nosuchmod" else "None.get(1)"
    (project / "inner.py").write_text(f"def find():\n    {statement}\n")
    (project / "broken.py").write_text(
        "import inner\n\ntry:\n    inner.find()\nexcept Exception as fault:\n"
        "    raise ValueError('no luck') from fault\n"
    )
    sys.path.insert(0, str(project))
    line, text = why(entrypoint)

    assert line == "ValueError: no luck"
    assert text.endswith("ValueError: no luck")
    assert name in text
    assert {found.rpartition("/")[2] for found in re.findall(r'File "(.*?)"', text)} == {
        "broken.py",
        "inner.py",
    }


@pytest.mark.parametrize("entrypoint", ["wrong.py:job", "wrong:job"])
def test_an_attribute_that_the_users_module_misses_is_its_own(project, entrypoint):
    """It is not that the module lacks what the entrypoint names."""
    (project / "wrong.py").write_text("import os\n\nos.nothing\n")
    sys.path.insert(0, str(project))

    line, text = why(entrypoint)

    assert line == "AttributeError: module 'os' has no attribute 'nothing'"
    assert text.count("File ") == 1


CALLS = {
    "start()": "on.start()",
    "schedule_one_time_job()": 'schedule_one_time_job(Greeting(), "2090-01-01T00:00:00Z")',
    "schedule_job_recur_by_frequency()": "schedule_job_recur_by_frequency(Greeting(), 60)",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_program_does_not_begin_in_a_run(project, call):
    """A run imports its file: one that starts a listener there would have an agent in each run."""
    (project / "jobs.py").write_text(
        "from taskadapter import *\n\non = Listener(trigger=TriggerConfiguration(interval=2))\n\n"
        "class Greeting(Job):\n    def execute(self): ...\n\n"
        f"@on.service('job')\ndef job(): ...\n\n{CALLS[call]}\n"
    )

    line, text = why("jobs.py:job")

    assert line.endswith(
        f'{call} was called while a run imports this file; put the call under `if __name__ == "__main__":`'
    )
    assert 'jobs.py", line 11' in text
    assert text.count("File ") == 1


def test_a_listener_does_not_start_in_a_body(monkeypatch):
    """The agent would end with the run."""
    on = Listener(trigger=TRIGGER)
    on.service("job")(lambda: None)
    token = execution.set(Execution(assignment("jobs.py:job")))
    try:
        with pytest.raises(TaskError, match=r"start\(\) was called inside a run"):
            on.start()
    finally:
        execution.reset(token)


def test_a_mistake_in_writing_is_shown(project):
    """A syntax error has no frame, and its line."""
    (project / "typo.py").write_text("def job(:\n")

    line, text = why("typo.py:job")

    assert line.startswith("SyntaxError: ")
    assert "typo.py" in text
    assert "importlib" not in text
