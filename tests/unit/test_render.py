"""`taskadapter render`: from a folder of flow modules to a prefect.yaml, and one clear line if not."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from taskadapter import TriggerConfiguration, cli
from taskadapter.declare import attached
from taskadapter.declare.registry import listeners
from taskadapter.errors import DeclarationError
from taskadapter.render import render
from taskadapter.rules.ticks import slug

PROJECT = Path(__file__).parents[2]
FLOWS, FILE = Path("flows"), Path("deployments/prefect.yaml")


def module(project, name, body, **trigger):
    """Write a flow module: a listener with a trigger, and what is declared on it."""
    (project / FLOWS).mkdir(exist_ok=True)
    arguments = ", ".join(f"{key}={value!r}" for key, value in ({"interval": 2} | trigger).items())
    head = f"from taskadapter import *\non = Listener(trigger=TriggerConfiguration({arguments}))\n"
    (project / FLOWS / name).write_text(head + dedent(body))


COUNTER = """
    @on.service("counter")
    class Counter(Service):
        '''Counts to five: one, two.'''

        i: int = 1

        def execute(self): ...
"""

INBOX = """
    @on.service("inbox")
    async def check_inbox(): ...
"""


def rendered():
    """Return what is rendered of the current project, as Prefect will read it."""
    listeners.clear()  # a command renders once in its life
    return yaml.safe_load(render(FLOWS, FILE))


def deployment(name):
    (found,) = [entry for entry in rendered()["deployments"] if entry["name"] == name]
    return found


def command(monkeypatch, capsys, *args):
    """Run ``taskadapter``; return its exit status, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["taskadapter", *args])
    status: str | int = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


# --- the text -------------------------------------------------------------------------------------


def test_the_whole_file(project):
    """A service with a count becomes exactly this file."""
    module(project, "counter.py", COUNTER, max_count=5)

    every = slug(TriggerConfiguration(interval=2, max_count=5))
    assert render(FLOWS, FILE) == dedent(
        f"""\
        # Made by `taskadapter render` from the declarations in flows/: change those, not this file.
        # Deploy with: prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all
        pull: []
        deployments:
        - name: counter
          entrypoint: flows/counter.py:Counter
          description: 'Counts to five: one, two.'
          tags:
          - taskadapter
          work_pool:
            name: taskadapter
            work_queue_name: default
            job_variables:
              trigger:
                interval: 2.0
                max_count: 5
                task_policy:
                  max_concurrent: 1
          build:
          - taskadapter.deploy.prepare:
              job: counter
              slug: {every}
              interval: 2.0
              id: prepared
          schedules:
          - interval: 2.0
            anchor_date: '{{{{ prepared.first_tick }}}}'
            timezone: UTC
            slug: {every}
        """
    )


def test_rendering_twice_gives_the_same_text(project):
    """The same declarations give the same text, whatever has been rendered before."""
    module(project, "counter.py", COUNTER)
    module(project, "inbox.py", INBOX)

    first = fresh_render(project)

    assert fresh_render(project) == first
    assert first.count("\n- name: ") == 2


def fresh_render(project):
    """Render in an interpreter of its own."""
    run = subprocess.run(
        [sys.executable, "-c", "from taskadapter.cli import main; main()", "render", "-o", "out.yaml"],
        cwd=project,
        env={
            "PYTHONPATH": str(PROJECT),
            "PREFECT_HOME": str(project / "home"),
            "PYTHONHASHSEED": "random",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    return (project / "out.yaml").read_text()


def test_deployments_are_in_the_order_of_their_names(project):
    """Which module declares a job does not matter to its place in the file."""
    module(project, "a.py", INBOX)
    module(project, "z.py", COUNTER)

    assert [entry["name"] for entry in rendered()["deployments"]] == ["counter", "inbox"]


def test_no_pull_step(project):
    """The deploying machine's directory is not written into a deployment: nodes have their own."""
    module(project, "counter.py", COUNTER)

    assert rendered()["pull"] == []


def test_entrypoints(project):
    """A class and a function are named by their file, relative to the project."""
    module(project, "counter.py", COUNTER)
    module(project, "inbox.py", INBOX)

    assert deployment("counter")["entrypoint"] == "flows/counter.py:Counter"
    assert deployment("inbox")["entrypoint"] == "flows/inbox.py:check_inbox"


def test_an_attached_class_is_named_where_it_is_defined(project):
    """Nodes import the class of an attached service: from its own module, not from the listener's."""
    (project / "library.py").write_text(
        "from taskadapter import Service\n\n\nclass Counter(Service):\n    i: int = 1\n\n"
        "    def execute(self): ...\n"
    )
    module(project, "counter.py", 'from library import Counter\non.attach(Counter(i=10), "counter")\n')

    assert deployment("counter")["entrypoint"] == "library.py:Counter.as_service.counter"


def test_a_listener_nobody_keeps_is_still_rendered(project):
    """A flow module may declare a job without giving the listener a name."""
    module(project, "counter.py", COUNTER.replace("@on.service", "@Listener(trigger=on.trigger).service"))
    module(
        project,
        "ten.py",
        """
        from flows.counters import Counter
        Listener(trigger=TriggerConfiguration(interval=2)).attach(Counter(i=10), "ten")
    """,
    )
    (project / FLOWS / "counters.py").write_text(
        "from taskadapter import Service\nclass Counter(Service):\n    i: int\n    def execute(self): ...\n"
    )

    assert {entry["name"] for entry in rendered()["deployments"]} == {"counter", "ten"}


def test_flow_modules_need_not_agree_about_the_node(project):
    """Each may be a program of its own, on a machine of its own."""
    backup = 'WarmBackupConfig(group_id="g", task_id="{0}")'
    for name in ("one", "two"):
        body = f"""
            on = Listener(trigger=on.trigger, warm_backup_config={backup.format(name)})
            @on.service("{name}")
            def job(): ...
        """
        module(project, f"{name}.py", body)

    assert {entry["name"] for entry in rendered()["deployments"]} == {"one", "two"}


@pytest.mark.parametrize("name", ["ten", "counts to 10", "v1.2", "a:b", "_cls", "__x"])
def test_prefect_finds_the_flow_of_an_attached_instance(project, name):
    """The entrypoint leads to a flow of the service's name, also where its class asks for values."""
    (project / "library.py").write_text(
        "from taskadapter import Service\nclass Counter(Service):\n    i: int\n    def execute(self): ...\n"
    )
    module(project, "ten.py", f'from library import Counter\non.attach(Counter(i=10), "{name}")\n')

    flow: Any = load_flow_from_entrypoint(deployment(name)["entrypoint"])

    assert (flow.name, attached.place_of(deployment(name)["entrypoint"])) == (name, "library.py:Counter")


TIMED = """
from functools import wraps

def timed(fn):
    @wraps(fn)
    def call(*args, **kwargs):
        return fn(*args, **kwargs)
    return call
"""


@pytest.mark.parametrize("where", ["lib", "."])
def test_a_decorated_function_is_named_where_it_is_defined(project, where):
    """Not where its decorator is, which may be in the project or elsewhere."""
    folder = project / where if where == "lib" else project.parent / f"{project.name}-util"
    folder.mkdir()
    (folder / "timing.py").write_text(TIMED)
    sys.path.append(str(folder))
    module(
        project, "inbox.py", "from timing import timed\n" + dedent(INBOX).replace(")\n", ")\n@timed\n", 1)
    )

    assert deployment("inbox")["entrypoint"] == "flows/inbox.py:check_inbox"
    assert load_flow_from_entrypoint(deployment("inbox")["entrypoint"]).name == "inbox"


def test_what_is_decorated_under_another_name_is_refused(project):
    """Nodes would import the function without its decorator."""
    (project / "library.py").write_text("def check(): ...\n" + TIMED)
    module(project, "inbox.py", "import library\njob = on.service('inbox')(library.timed(library.check))\n")

    with pytest.raises(
        DeclarationError, match=r"check in .*library\.py .*find it undecorated\. Decorate it"
    ):
        rendered()


def test_a_linked_module_is_named_by_its_place_in_the_project(project):
    """So Kubernetes mounts the files of a ConfigMap; where they lead to changes with each version."""
    module(project, "inbox.py", INBOX)
    module(project, "counter.py", COUNTER)
    for name, at in (
        ("inbox.py", project / "..2026"),
        ("counter.py", project.parent / f"{project.name}-x"),
    ):
        at.mkdir()
        (project / FLOWS / name).rename(at / name)
        (project / FLOWS / name).symlink_to(at / name)

    assert deployment("inbox")["entrypoint"] == "flows/inbox.py:check_inbox"
    assert deployment("counter")["entrypoint"] == "flows/counter.py:Counter"


def test_a_project_that_is_reached_through_a_link(project):
    """What is imported by way of the link lies in the project all the same."""
    link = project.parent / f"{project.name}-link"
    link.symlink_to(project)
    sys.path.append(str(link / "lib"))
    (project / "lib").mkdir()
    (project / "lib" / "checks.py").write_text("def check(): ...\n")
    module(project, "inbox.py", "from checks import check\non.service('inbox')(check)\n")

    assert deployment("inbox")["entrypoint"] == "lib/checks.py:check"


@pytest.mark.parametrize("is_found", [True, False])
def test_a_module_outside_of_the_project_is_one_that_nodes_find(project, is_found):
    """It is named as a module, which is refused where it is none that they could import by that name."""
    folder = project.parent / f"{project.name}-outside"
    (folder / "checks").mkdir(parents=True)
    (folder / "checks" / "inbox.py").write_text("def check(): ...\n")
    sys.path.append(str(folder))
    forget = "" if is_found else f"import sys; sys.path.remove({str(folder)!r})\n"
    module(project, "job.py", f"from checks.inbox import check\n{forget}on.service('inbox')(check)\n")

    if is_found:
        assert deployment("inbox")["entrypoint"] == "checks.inbox:check"
    else:
        with pytest.raises(
            DeclarationError, match=r"check in .* from there its module checks\.inbox is not"
        ):
            rendered()


@pytest.mark.parametrize(
    "body",
    [
        'def make():\n    @on.service("local")\n    def job(): ...\nmake()\n',
        f"def make():\n{indent(dedent(COUNTER), '    ')}\nmake()\n",
        'job = on.service("nameless")(lambda: None)\n',
    ],
    ids=["function", "class", "lambda"],
)
def test_what_nodes_cannot_import_is_refused(project, body):
    """A job inside a function, or a lambda, has no name by which a node could import it."""
    module(project, "local.py", body)

    with pytest.raises(DeclarationError, match="module level"):
        render(FLOWS, FILE)


def test_slugs(project):
    """The schedule has the trigger's slug, and so has the step that prepares it."""
    module(project, "counter.py", COUNTER, interval=2.5, max_count=5)

    every = slug(TriggerConfiguration(interval=2.5, max_count=5))
    entry = deployment("counter")
    assert [schedule["slug"] for schedule in entry["schedules"]] == [every]
    assert entry["build"][0]["taskadapter.deploy.prepare"]["slug"] == every


@pytest.mark.parametrize(
    ("docstring", "description"),
    [
        ("'''Counts.'''", "Counts."),
        ("'''Counts.\n\n        Further.\n        '''", "Counts.\n\nFurther."),
        ("'''Zählt: \"eins\", zwei #3'''", 'Zählt: "eins", zwei #3'),
        ("", "Job counter in flows/counter.py:Counter"),
    ],
)
def test_the_description_is_the_docstring(project, docstring, description):
    """The docstring is the description, without its indentation; none is none."""
    body = COUNTER.replace(COUNTER[COUNTER.index("'''") : COUNTER.rindex("'''") + 3], docstring)
    module(project, "counter.py", body)

    assert deployment("counter")["description"] == description


def test_job_variables_hold_the_whole_trigger(project):
    """The agent finds in the job variables what Prefect's schedule cannot say."""
    module(
        project,
        "inbox.py",
        INBOX,
        max_count=3,
        start_time="2030-01-01T12:00:00Z",
        end_time="2030-01-02T14:00:00+02:00",
        retry_config={"max_attempts": 2, "retry_interval": 0.5, "max_interval": 4},
        task_policy={"error_policy": "CONTINUE"},
    )

    variables = deployment("inbox")["work_pool"]["job_variables"]
    read = TriggerConfiguration.model_validate(variables["trigger"])
    assert read == TriggerConfiguration(
        interval=2,
        max_count=3,
        start_time="2030-01-01T12:00:00Z",
        end_time="2030-01-02T12:00:00Z",
        retry_config={"max_attempts": 2, "retry_interval": 0.5, "max_interval": 4},
        task_policy={"error_policy": "CONTINUE"},
    )


def test_an_attached_services_values_travel(project):
    """The field values of an attached instance are job variables; a decorated class needs none."""
    body = COUNTER.replace('@on.service("counter")', "") + '    on.attach(Counter(i=10), "attached")\n'
    module(project, "attached.py", body)
    module(project, "counter.py", COUNTER)

    assert deployment("attached")["work_pool"]["job_variables"]["initial_state"] == {"i": 10}
    assert "initial_state" not in deployment("counter")["work_pool"]["job_variables"]


def test_the_group_is_the_work_queue(project):
    """A coordinated listener's jobs go to the queue of its group, in the pool that it names."""
    (project / FLOWS).mkdir()
    (project / FLOWS / "grouped.py").write_text(
        "from taskadapter import *\n"
        'backup = WarmBackupConfig(group_id="task-group-01", task_id="node-1")\n'
        "on = Listener(trigger=TriggerConfiguration(interval=2), warm_backup_config=backup,\n"
        '              work_pool="nightly")\n' + dedent(INBOX)
    )

    pool = deployment("inbox")["work_pool"]
    assert (pool["name"], pool["work_queue_name"]) == ("nightly", "task-group-01")


def test_a_start_time_is_the_anchor(project):
    """With a start time the first tick is known, and no template stands in its place."""
    module(project, "inbox.py", INBOX, start_time="2030-01-01T14:00:00+02:00")

    entry = deployment("inbox")
    assert [schedule["anchor_date"] for schedule in entry["schedules"]] == ["2030-01-01T14:00:00+02:00"]


def test_a_listener_without_a_name_is_rendered(project):
    """The listener may stand in the decorator itself."""
    (project / FLOWS).mkdir()
    (project / FLOWS / "inbox.py").write_text(
        "from taskadapter import *\n\n\n"
        '@Listener(trigger=TriggerConfiguration(interval=2)).service("inbox")\n'
        "def check_inbox(): ...\n"
    )

    assert deployment("inbox")["entrypoint"] == "flows/inbox.py:check_inbox"


# --- what is refused ------------------------------------------------------------------------------


def test_a_program_does_not_begin_when_it_is_rendered(project):
    """Its file is imported for what it declares."""
    module(project, "program.py", "@on.service('job')\ndef job(): ...\n\non.start()\n")

    with pytest.raises(DeclarationError, match=r"line 6: start\(\) was called while `taskadapter render` "):
        rendered()


def test_a_name_twice_is_refused(project):
    """Two listeners cannot have jobs of one name; the message names both places."""
    module(project, "one.py", INBOX)
    module(project, "two.py", INBOX)

    with pytest.raises(DeclarationError) as refused:
        render(FLOWS, FILE)

    message = str(refused.value)
    assert "'inbox' is declared twice" in message
    assert "flows/one.py:check_inbox" in message
    assert "flows/two.py:check_inbox" in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1 / 0\n", "flows/broken.py, line 1: ZeroDivisionError: division by zero"),
        ("\n\nx = (\n", "flows/broken.py, line 3: SyntaxError: '(' was never closed"),
        (
            "\nimport not_here\n",
            "flows/broken.py, line 2: ModuleNotFoundError: No module named 'not_here'",
        ),
        (
            "from taskadapter import *\nTriggerConfiguration(interval=0)\n",
            "flows/broken.py, line 2: TriggerConfiguration: interval=0: must be greater than 0 seconds; "
            "choose a longer time",
        ),
        (
            "def f():\n    raise OSError('no disk')\nf()\n",
            "flows/broken.py, line 2: OSError: no disk",
        ),
        ("import helper\n", "flows/broken.py, line 1: KeyError: 'a'"),
    ],
)
def test_a_broken_module_is_one_clear_line(project, monkeypatch, capsys, text, line):
    """The line names the module, the place in it and the error; nothing is written."""
    module(project, "broken.py", "")
    (project / FLOWS / "broken.py").write_text(text)
    (project / "helper.py").write_text("{}['a']\n")

    assert command(monkeypatch, capsys, "render") == (1, "", f"taskadapter: {line}\n")
    assert not (project / FILE).exists()


def test_a_folder_that_is_not_there(project, monkeypatch, capsys):
    """A misspelled folder does not empty the file."""
    status, out, err = command(monkeypatch, capsys, "render", "--flows", "flow")

    assert (status, out) == (1, "")
    assert err.startswith("taskadapter: flow/ ")
    assert err.count("\n") == 1


def test_a_folder_without_jobs(project, monkeypatch, capsys):
    """Neither does a folder in which nothing is declared."""
    module(project, "empty.py", "")
    (project / "prefect.yaml").write_text("as it was\n")

    status, out, err = command(monkeypatch, capsys, "render", "-o", "prefect.yaml")

    assert (status, out) == (1, "")
    assert "flows/ declares no job" in err
    assert (project / "prefect.yaml").read_text() == "as it was\n"


def test_a_file_that_cannot_be_written(project, monkeypatch, capsys):
    """Where the file cannot be written, one line says so."""
    module(project, "inbox.py", INBOX)

    status, out, err = command(monkeypatch, capsys, "render", "--output", "flows/inbox.py/prefect.yaml")

    assert (status, out) == (1, "")
    assert err == "taskadapter: flows/inbox.py/prefect.yaml cannot be written: File exists.\n"


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_the_file(project, monkeypatch, capsys):
    """By default flows/ becomes deployments/prefect.yaml, and the next step is named."""
    module(project, "inbox.py", INBOX)
    (project / "deployments").mkdir()

    status, out, err = command(monkeypatch, capsys, "render")

    assert (status, err) == (0, "")
    assert out == (
        "Wrote deployments/prefect.yaml. To deploy it:\n"
        "  prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all\n"
    )
    assert yaml.safe_load((project / FILE).read_text())["deployments"][0]["name"] == "inbox"


@pytest.mark.parametrize("what", ["a folder", "no text"])
def test_check_of_what_is_no_such_file(project, monkeypatch, capsys, what):
    """It is not what is declared, whatever it is."""
    module(project, "inbox.py", INBOX)
    if what == "a folder":
        (project / FILE).mkdir(parents=True)
    else:
        (project / "deployments").mkdir()
        (project / FILE).write_bytes(b"\xff\xfe")
    listeners.clear()
    status, _, said = command(monkeypatch, capsys, "render", "--check")
    assert (status, said.partition(" is not")[0]) == (1, "taskadapter: deployments/prefect.yaml")


@pytest.mark.parametrize("state", ["current", "stale", "missing"])
def test_check(project, monkeypatch, capsys, state):
    """`--check` exits with 0 when the file is up to date, else 1 and the remedy; it never writes."""
    module(project, "inbox.py", INBOX)
    (project / "deployments").mkdir()
    text = {"current": render(FLOWS, FILE), "stale": "deployments: []\n", "missing": None}[state]
    if text is not None:
        (project / FILE).write_text(text)
    listeners.clear()

    outcome = command(monkeypatch, capsys, "render", "--check")

    message = (
        "taskadapter: deployments/prefect.yaml is not what flows/ declares; run `taskadapter render`.\n"
    )
    assert outcome == ((0, "", "") if state == "current" else (1, "", message))
    assert (project / FILE).read_text() == text if text else not (project / FILE).exists()


def test_the_committed_file_is_what_flows_declares():
    """`deployments/prefect.yaml` is up to date; it is not when somebody changes flows/ alone."""
    run = subprocess.run(
        [sys.executable, "-c", "from taskadapter.cli import main; main()", "render", "--check"],
        cwd=PROJECT,
        env={"PYTHONPATH": str(PROJECT), "PREFECT_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )

    assert (run.returncode, run.stderr) == (0, "")


def test_the_file_at_the_root_is_the_same():
    """`prefect deploy` at the project's root finds the rendered file."""
    assert (PROJECT / "prefect.yaml").resolve() == PROJECT / FILE


def test_a_template_in_a_docstring_is_refused(project):
    """What `prefect deploy` would fill in and so change is refused, with its text."""
    greeting = "@on.service('inbox')\ndef check_inbox():\n    '''Greets {{ name }}.'''\n"
    module(project, "inbox.py", greeting)

    with pytest.raises(DeclarationError, match=r"Greets \{\{ name \}\}.*template"):
        render(FLOWS, FILE)


def test_a_module_that_another_imports(project):
    """A job whose module is imported by another flow module is still one job."""
    module(project, "jobs.py", INBOX)
    (project / FLOWS / "again.py").write_text("import jobs\n")

    assert [entry["name"] for entry in rendered()["deployments"]] == ["inbox"]


def test_modules_that_share_an_imported_listener(project):
    """Each of them declares a job on it; it is made when the first of them imports it."""
    (project / "common.py").write_text(
        "from taskadapter import *\nshared = Listener(trigger=TriggerConfiguration(interval=2))\n"
    )
    (project / FLOWS).mkdir()
    for name in ("one", "two"):
        text = f"from common import shared\n@shared.service({name!r})\ndef {name}(): ...\n"
        (project / FLOWS / f"{name}.py").write_text(text)

    assert [entry["name"] for entry in rendered()["deployments"]] == ["one", "two"]


@pytest.mark.parametrize("where", ["name", "group"])
def test_a_template_in_a_name_is_refused(project, where):
    """The job would have another name, or no group."""
    name = "{{ x }}" if where == "name" else "job"
    backup = "WarmBackupConfig(group_id='{{ x }}')" if where == "group" else None
    body = f"""
        on = Listener(trigger=on.trigger, warm_backup_config={backup})
        @on.service({name!r})
        def job(): ...
    """
    module(project, "job.py", body)

    with pytest.raises(DeclarationError, match=r"\{\{ x \}\}.*template"):
        render(FLOWS, FILE)
