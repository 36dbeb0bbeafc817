"""What the documentation names is there."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from enum import Enum
from inspect import Parameter
from operator import attrgetter
from pathlib import Path
from textwrap import indent

import pytest
import yaml
from prefect import Flow
from pydantic import BaseModel
from sqlalchemy import create_engine

import taskadapter
from taskadapter import Job, Listener, TaskError, cli
from taskadapter.agent import events
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.settings import TaskadapterSettings
from tests.pages import PAGES, ROOT, blocks, commands

TEXT = PAGES["architecture"]
ROOMS = "declare|rules|coordination|prefect_api|execution|agent|listener|scheduler|pools|deploy"


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"`((?:{ROOMS})\.[a-zA-Z_.]+)`", TEXT))))
def test_a_name_of_the_package(name):
    """A module, or what it has, by the path that the text gives it."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["taskadapter", *parts[:depth]]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[depth:]:
            found = getattr(found, attribute)
        return
    pytest.fail(f"there is no {name}")


PACKAGE = Path(taskadapter.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.glob("*/*.py")
    if path.stem != "__init__" and path.parent.name != "doctor"
]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module(name):
    """Each is in one of the tables that say what it is."""
    assert re.search(rf"^\| [^|]*`{name}`", TEXT, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", TEXT))))
def test_a_test(name):
    """A file, and a test in it."""
    path, _, test = name.partition("::")
    assert not test or re.search(rf"def {test}\(", (ROOT / path).read_text())
    assert (ROOT / path).exists()


# --- the pages for users --------------------------------------------------------------------------

BLOCKS = [
    (name, block)
    for name in PAGES
    for block in blocks(name, "python")
    if name != "from-ballerina"  # which has a test of its own
]
BEFORE = {
    "coordination": "from taskadapter import fenced\n",
    "declarations": "from taskadapter import Listener\n",
}
"""What the page has said before a block."""


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_block_of_python_is_a_module_of_flows(project, monkeypatch, name, block):
    """It declares what can be deployed; or it is what a flow does, and uses what there is."""
    monkeypatch.syspath_prepend(str(project))
    (project / "Config.toml").write_text("[org.module.trigger]\ninterval = 60\n")
    module = f"page_{name.replace('-', '_')}_{len(block)}"
    inside = "def body(engine):\n" + indent(block, "    ") if "engine.begin" in block else block
    (project / f"{module}.py").write_text(BEFORE.get(name, "") + inside)
    found = vars(importlib.import_module(module))
    if "engine.begin" in block:
        engine = create_engine("sqlite://")
        with pytest.raises(TaskError, match="outside a run"):
            found["body"](engine)
        engine.dispose()
    else:
        kinds = (Flow, Listener, type(Job))
        assert any(isinstance(value, kinds) for value in found.values())


def typed(command):
    """Return each way of typing a command that lines of the pages show: [a | b], a | b | c."""
    for line in filter(re.compile(rf"(\S+ )?{command}\b").match, commands()):
        parts = re.split(r"[][]", line)  # what is not optional, what is, and so on
        for options in itertools.product(*(part.split(" | ") for part in parts[1::2])):
            first, *others = parts[0].strip().split(" | ")
            for way in [first, *(" ".join([*first.split()[:-1], other]) for other in others)]:
                yield [*way[way.index(command) :].split()[1:], *" ".join(options).split()]


@pytest.mark.parametrize("words", list(typed("taskadapter")), ids=" ".join)
def test_a_command_can_be_typed_so(words):
    """With these options and arguments."""
    cli.app.parse_args(words, print_error=False, exit_on_error=False)


@pytest.mark.parametrize("words", list(typed("make")), ids=" ".join)
def test_a_target_of_make(words):
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_there_are_such_commands():
    """They are found, not remembered."""
    assert len(list(typed("taskadapter"))) > 12
    assert len(list(typed("make"))) > 1


@pytest.mark.parametrize(
    ("name", "path"),
    [(n, p) for n, t in PAGES.items() for p in re.findall(r"`((?:deployments|tests|flows)/[\w./-]+)`", t)],
)
def test_a_file_that_a_page_names(name, path):
    assert (ROOT / path).exists(), name


def test_the_deployment_of_an_existing_flow_is_of_the_flow_beside_it():
    """Its file, its function, and a queue that is a group."""
    text = PAGES["existing-flows"]
    (source,) = blocks("existing-flows", "yaml")
    content = yaml.safe_load(source)
    assert content["pull"] == []  # else `prefect deploy` adds the folder of its own machine
    (deployment,) = content["deployments"]
    path, _, function = deployment["entrypoint"].partition(":")
    assert f'title="{path}"' in text
    assert f"def {function}(" in text
    assert deployment["work_pool"]["work_queue_name"] != DEFAULT_QUEUE


def test_all_that_is_public_is_in_the_reference():
    """The twins for async code aside, which are named together."""
    named = set(re.findall(r"::: taskadapter\.([a-zA-Z_]+)$", PAGES["reference"], re.MULTILINE))
    public = set(taskadapter.__all__) - {"TaskError"}  # which is on its module's page
    assert named - {"errors"} == {
        name for name in public if name.removeprefix("a") not in public or name[0] != "a"
    }


def test_the_reference_begins_with_a_line_for_each_name():
    """As it is called, and what it is: what a reader sees where nothing fills in the docstrings."""
    names = re.findall(r"::: taskadapter\.([a-zA-Z_.]+)$", PAGES["reference"], re.MULTILINE)
    things = [attrgetter(name)(taskadapter) for name in names]
    rows = [
        f"| `{called(thing)}` | {inspect.getdoc(thing).splitlines()[0]} |"
        for thing in things
        if not inspect.ismodule(thing)
    ]
    assert "\n".join(["| name | what it is, or does |", "| --- | --- |", *rows]) in PAGES["reference"]


def called(thing):
    """Return a name with what it takes."""
    if inspect.isclass(thing) and issubclass(thing, Enum):
        return f"{thing.__name__}: {', '.join(thing)}"
    if inspect.isclass(thing) and issubclass(thing, BaseModel):
        fields = thing.model_fields.items()
        given = [Parameter(n, Parameter.KEYWORD_ONLY, default=default_of(field)) for n, field in fields]
        return f"{thing.__name__}{signature_of(given).replace('(*, ', '(')}"
    return f"{thing.__name__}{signature_of(inspect.signature(thing).parameters.values())}"


def default_of(field):
    return Parameter.empty if field.is_required() else ... if field.default_factory else field.default


def plain(default):
    return str(default) if isinstance(default, Enum) else ... if isinstance(default, BaseModel) else default


def signature_of(parameters):
    """Return parameters without their types, with a default as it is written."""
    bare = [
        one.replace(
            annotation=Parameter.empty,
            default=plain(one.default),
        )
        for one in parameters
    ]
    return str(inspect.Signature(bare)).replace("Ellipsis", "...")


def test_every_event_is_in_the_reference():
    source = inspect.getsource(events)
    kinds = {f"taskadapter.token.{what}" for what in ("acquired", "released", "lost")}
    kinds |= set(re.findall(r'"((?:taskadapter|prefect)\.[a-z]+[.-][a-z.-]+)"', source)) - {
        "taskadapter.task-id"
    }
    named = set(re.findall(r"^\| `([a-z.-]+)` \|", PAGES["reference"], re.MULTILINE))
    assert {kind for kind in kinds if not kind.startswith("prefect.resource")} == named


def test_every_command_is_in_the_reference():
    known = {name for name in cli.app if not name.startswith("-")} - {"db"}
    known |= {f"db {name}" for name in cli.database if not name.startswith("-")}
    named = set(
        re.findall(r"^\| `taskadapter ([a-z ]+?)(?: [A-Z]+)?` \|", PAGES["reference"], re.MULTILINE)
    )
    assert named == known


def test_every_setting_is_in_the_reference_as_the_code_has_it():
    rows = [
        f"| `{name.upper()}` | {shown(field.default)} | {field.description} |"
        for name, field in TaskadapterSettings.model_fields.items()
    ]
    assert (
        "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows]) in PAGES["reference"]
    )


def shown(default):
    return f"`{default}`" if default or default == 0 else ""
