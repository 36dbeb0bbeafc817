"""What the documentation names is there."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml
from prefect import Flow

import taskadapter
from taskadapter import cli
from taskadapter.agent import events
from taskadapter.declare.triggers import DEFAULT_QUEUE
from taskadapter.settings import TaskadapterSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
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


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(tests/[^`]+)`", TEXT))))
def test_a_test(name):
    """A file, and a test in it."""
    path, _, test = name.partition("::")
    assert not test or re.search(rf"def {test}\(", (ROOT / path).read_text())
    assert (ROOT / path).exists()


# --- the pages for users --------------------------------------------------------------------------

PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text()
    for name in ("index", "tutorial", "existing-flows", "reference")
}
BLOCKS = [
    (name, block)
    for name, text in PAGES.items()
    for block in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
]


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_block_of_python_is_a_module_of_flows(project, monkeypatch, name, block):
    """It declares what `prefect deploy` can deploy."""
    monkeypatch.syspath_prepend(str(project))
    module = f"page_{name.replace('-', '_')}"
    (project / f"{module}.py").write_text(block)
    assert any(isinstance(value, Flow) for value in vars(importlib.import_module(module)).values())


def test_the_deployment_of_an_existing_flow_is_of_the_flow_beside_it():
    """Its file, its function, and a queue that is a group."""
    text = PAGES["existing-flows"]
    (source,) = re.findall(r"```yaml[^\n]*\n(.*?)```", text, re.DOTALL)
    (deployment,) = yaml.safe_load(source)["deployments"]
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


def test_every_event_is_in_the_reference():
    source = inspect.getsource(events)
    kinds = {f"taskadapter.token.{what}" for what in ("acquired", "released", "lost")}
    kinds |= set(re.findall(r'"((?:taskadapter|prefect)\.[a-z]+[.-][a-z.-]+)"', source)) - {
        "taskadapter.task-id"
    }
    named = set(re.findall(r"^\| `([a-z.-]+)` \|", PAGES["reference"], re.MULTILINE))
    assert {kind for kind in kinds if not kind.startswith("prefect.resource")} == named


def test_every_command_is_in_the_reference():
    commands = {name for name in cli.app if not name.startswith("-")} - {"db"}
    commands |= {f"db {name}" for name in cli.database if not name.startswith("-")}
    named = set(
        re.findall(r"^\| `taskadapter ([a-z ]+?)(?: [A-Z]+)?` \|", PAGES["reference"], re.MULTILINE)
    )
    assert named == commands


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
