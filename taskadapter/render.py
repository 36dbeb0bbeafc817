"""From the declarations of a folder of flow modules to the ``prefect.yaml`` that `prefect deploy` reads."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from prefect.exceptions import ScriptError
from prefect.utilities.importtools import load_script_as_module

from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.declare.registry import importing, listeners
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.listener import Listener, refuse_disagreement
from taskadapter.prefect_api.deployments import TAG
from taskadapter.rules import ticks
from taskadapter.services import Declared, description, entrypoint, job_variables

HEADER = """\
# Made by `taskadapter render` from the declarations in {flows}/: change those, not this file.
# Deploy with: prefect --no-prompt deploy --prefect-file {file} --all
"""


RENDERED = Path("deployments/prefect.yaml")
"""Where `taskadapter render` writes to, unless it is told otherwise."""


class NoJobError(DeclarationError):
    """The modules of a folder can be imported, and declare nothing."""


def render(flows: Path, file: Path) -> str:
    """Return the ``prefect.yaml`` of every listener in a folder of flow modules.

    The same declarations give the same text.

    Args:
        flows: the folder; its modules are imported.
        file: where the text will be kept, for its first comment.

    Raises:
        DeclarationError: there is no such folder or no job in it, a module cannot be imported or holds
            an invalid declaration, or two jobs would be one deployment.
    """
    if not flows.is_dir():
        raise DeclarationError(f"{flows}/ is no folder; name the one with the flow modules.")
    found = []
    for module in sorted(flows.glob("*.py")):
        listeners.clear()  # each module may be a program of its own: they need not agree about the node
        _import(module)
        found += [(on, declared) for on in listeners for declared in on.services.values()]
    if not found:
        raise NoJobError(f"{flows}/ declares no job; decorate one with a listener's service().")
    found = _once_each(found)
    _refuse_duplicates(declared for _, declared in found)
    refuse_disagreement(listener for listener, _ in found)
    content = {
        "pull": [],
        "deployments": [_entry(listener, declared) for listener, declared in found],
    }
    return HEADER.format(flows=flows, file=file) + yaml.safe_dump(content, sort_keys=False, width=100)


def is_up_to_date(file: Path, text: str) -> bool:
    """Return whether a file has a text."""
    try:
        return file.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _once_each(found: list[tuple[Listener, Declared]]) -> list[tuple[Listener, Declared]]:
    """Return the jobs by name; one whose module another one imports is declared twice, and is one."""
    places = {(declared.name, entrypoint(declared)): (on, declared) for on, declared in found}
    return [places[key] for key in sorted(places)]


def _import(module: Path) -> None:
    try:
        with importing("`taskadapter render`"):
            load_script_as_module(str(module))
    except ScriptError as error:
        raise DeclarationError(f"{module}{_what_broke(module, error.user_exc)}") from error
    except SystemExit as error:
        raise DeclarationError(
            f'{module} ends the program that imports it; do that under `if __name__ == "__main__":`.'
        ) from error


def _what_broke(module: Path, exc: Exception) -> str:
    """Say where in a module an error came from, and what it is; ours need no class to be clear."""
    if isinstance(exc, SyntaxError):
        place = "" if exc.lineno is None else f", line {exc.lineno}"
        return f"{place}: {type(exc).__name__}: {exc.msg}"
    frames = traceback.extract_tb(exc.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == module.resolve()]
    place = f", line {lines[-1]}" if lines else ""
    return f"{place}: {exc}" if isinstance(exc, TaskError) else f"{place}: {type(exc).__name__}: {exc}"


def _refuse_duplicates(found: Iterable[Declared]) -> None:
    seen: dict[str, Declared] = {}
    for declared in found:
        if declared.name in seen:
            places = f"{entrypoint(seen[declared.name])} and {entrypoint(declared)}"
            raise DeclarationError(
                f"service {declared.name!r} is declared twice, in {places}; its name is its "
                "deployment's, so give one another name."
            )
        seen[declared.name] = declared


def _entry(listener: Listener, declared: Declared) -> dict[str, Any]:
    slug = ticks.slug(listener.trigger)
    texts = declared.name, listener.group_id, listener.work_pool, description(declared)
    _refuse_templates(declared, *texts, declared.initial_state)
    entry: dict[str, Any] = {
        "name": declared.name,
        "entrypoint": entrypoint(declared),
        "description": description(declared),
        "tags": [TAG],
        "work_pool": {
            "name": listener.work_pool,
            "work_queue_name": listener.group_id or DEFAULT_QUEUE,
            "job_variables": job_variables(declared),
        },
    }
    step: dict[str, Any] = {"job": declared.name, "slug": slug, "interval": listener.trigger.interval}
    if listener.trigger.start_time is not None:
        step["start_time"] = listener.trigger.start_time.isoformat()
    step["id"] = "prepared"
    entry["build"] = [{"taskadapter.deploy.prepare": step}]
    anchor = listener.trigger.start_time or "{{ prepared.first_tick }}"
    entry["schedules"] = [ticks.schedule(listener.trigger, anchor)]
    return entry


def _refuse_templates(declared: Declared, *texts: object) -> None:
    """Refuse what ``prefect deploy`` would take for a template, and change."""
    for text in map(str, texts):
        if "{{" in text:
            raise DeclarationError(
                f"service {declared.name!r}: {text!r} has '{{{{', which `prefect deploy` fills in as a "
                "template; write it without, or deploy with Listener.start()."
            )
