"""Where a deployment's code runs: its environment, its folder, its flow, imported once for one run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import inspect
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prefect.engine
from prefect import Flow
from prefect.context import refresh_global_settings_context
from prefect.deployments.steps.core import StepExecutionError, run_steps
from prefect.exceptions import MissingFlowError, ScriptError
from prefect.filesystems import LocalFileSystem
from prefect.flows import load_flow_from_entrypoint, load_function_and_convert_to_flow
from prefect.logging.configuration import setup_logging
from prefect.logging.loggers import flow_run_logger
from prefect.results import get_default_result_storage
from prefect.settings import get_current_settings
from prefect.utilities.importtools import import_object

import taskadapter
from taskadapter.declare import attached
from taskadapter.declare.jobs import Job, Service, load_state
from taskadapter.declare.registry import importing, listeners
from taskadapter.errors import TaskError, printable, words_of
from taskadapter.execution import flow as flows

if TYPE_CHECKING:
    from taskadapter.execution.assignment import Assignment, Workspace


def needs_interpreter(workspace: Workspace) -> bool:
    """Return whether the workspace sets what an interpreter reads once, when it starts."""
    return any(
        name.startswith("PYTHON") and name != "PYTHONPATH" and os.environ.get(name) != value
        for name, value in workspace.env.items()
    )


def changes_settings(workspace: Workspace) -> bool:
    """Return whether the workspace sets any of Prefect's settings."""
    return any(name.startswith("PREFECT_") and not name.startswith("PREFECT__") for name in workspace.env)


def environment(workspace: Workspace) -> dict[str, str]:
    """Return the environment of this process with the workspace's variables; None removes one."""
    merged = {**os.environ, **workspace.env}
    return {name: value for name, value in merged.items() if value is not None}


class LacksCodeError(TaskError):
    """The folder or the file of a run's code is not on this node."""


def enter(workspace: Workspace) -> None:
    """Make this process one of the workspace: environment, search path, time zone, settings, logging.

    Raises:
        LacksCodeError: its folder is not here.
    """
    _replace_search_path(os.environ.get("PYTHONPATH"), workspace.env.get("PYTHONPATH", ...))
    for name, value in workspace.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "TZ" in workspace.env:
        time.tzset()
    if changes_settings(workspace):
        refresh_global_settings_context()
    if any(name.startswith("PREFECT_LOGGING_") for name in workspace.env):
        setup_logging(incremental=False)
    sys.argv = [str(prefect.engine.__file__)]
    folder = workspace.working_dir
    try:
        _go_to(folder or Path.cwd())
    except (FileNotFoundError, NotADirectoryError):
        if folder is None:
            raise LacksCodeError("the agent's folder is gone, or another one by now; restart it") from None
        raise LacksCodeError(f"folder {folder} is not on this node; {attached.FETCH_CODE}") from None


def _go_to(folder: str | Path) -> None:
    """Make a folder the current one, and where modules are found, also by what a job starts."""
    os.chdir(folder)
    others = [other for other in _folders(os.environ.get("PYTHONPATH")) if other != sys.path[0]]
    sys.path[0] = str(Path.cwd())
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], *others])


def _replace_search_path(old: str | None, new: Any) -> None:
    """Put the folders of a new `PYTHONPATH` where those of the old one are."""
    if new is ...:
        return
    gone = set(_folders(old))
    sys.path[1:] = _folders(new) + [folder for folder in sys.path[1:] if folder not in gone]


def _folders(path: str | None) -> list[str]:
    return [str(Path(folder).absolute()) for folder in (path or "").split(os.pathsep) if folder]


def load(assignment: Assignment) -> Flow[..., Any]:
    """Return the assignment's flow, after the workspace's pull steps.

    Raises:
        LacksCodeError: the folder of a pull step, or the entrypoint's file, is not here.
        TaskError: what it names is not in it.
    """
    _pull(assignment)
    with importing("a run"):
        flow = _import(assignment)
    return _with_result_storage(flow, assignment.server_has_storage)


def _pull(assignment: Assignment) -> None:
    steps = assignment.workspace.pull_steps
    if not steps:
        return
    if assignment.workspace.working_dir is None and assignment.scratch is not None:
        assignment.scratch.mkdir(parents=True)
        _go_to(assignment.scratch)
    logger = flow_run_logger(assignment.flow_run)
    try:
        output = asyncio.run(run_steps(steps, print_function=logger.info, logger=logger))
    except StepExecutionError as fault:
        _refuse_missing_folder(fault)
        raise
    # A step may have gone somewhere itself.
    _go_to(output.get("directory") or Path.cwd())


def _refuse_missing_folder(fault: StepExecutionError) -> None:
    """Name the folder that a pull step wants and this node lacks; any other fault is left as it is.

    Raises:
        LacksCodeError: that is what has failed.
    """
    cause, step = fault.__cause__, str(fault).rpartition(".")[2]
    if step == "set_working_directory" and isinstance(cause, FileNotFoundError | NotADirectoryError):
        raise LacksCodeError(
            f"pull step {step} wants folder {cause.filename}, which this node lacks; make the folder "
            "here, or put `pull: []` into prefect.yaml and deploy again: the code is then looked for in "
            "the folder in which the agent was started"
        ) from None


def _with_result_storage(flow: Flow[..., Any], server_has_one: bool) -> Flow[..., Any]:
    """Give the flow the default result storage: the engine would ask the API twice for each run."""
    settings = get_current_settings().results
    storage: Any = flow.result_storage or settings.local_storage_path
    persists = settings.persist_by_default
    if flow.result_storage is None and (server_has_one or settings.default_storage_block is not None):
        found = get_default_result_storage(_sync=True)  # type: ignore[call-arg]
        if not isinstance(found, LocalFileSystem):
            storage, persists = found, True
    if flow.persist_result is not None:
        persists = flow.persist_result
    return flow.with_options(result_storage=storage, persist_result=persists)


def _import(assignment: Assignment) -> Flow[..., Any]:
    """Import what the entrypoint names: a flow, or the function or class that a job is made of."""
    listeners.clear()  # what modules of several programs declare here need not agree
    place = attached.place_of(assignment.entrypoint)
    _require_file(place)
    try:
        return load_flow_from_entrypoint(place, use_placeholder_flow=False)
    except MissingFlowError:
        pass
    named = _named(place)
    trigger, name = assignment.trigger, assignment.flow_name
    if trigger is not None and isinstance(named, type) and issubclass(named, Service):
        return flows.service_flow(load_state(named, assignment.initial_state or {}), name, trigger)
    if trigger is not None and isinstance(named, type) and issubclass(named, Job):
        return flows.job_flow(named, name, trigger)
    if trigger is not None and inspect.isfunction(named):
        return flows.function_flow(named, name, trigger)
    return load_function_and_convert_to_flow(place)


def _require_file(place: str) -> None:
    """Refuse an entrypoint whose file is not there.

    Raises:
        LacksCodeError: it is not.
    """
    file = attached.file_of(place)
    if file is not None and not file.is_file():
        raise LacksCodeError(
            f"folder {Path.cwd()} lacks {file}, which the deployment's entrypoint names; "
            f"{attached.FETCH_CODE}"
        )


def _named(place: str) -> Any:
    """Return what an entrypoint names.

    Raises:
        TaskError: its module has nothing of that name.
    """
    module, _, name = place.rpartition(":" if ":" in place else ".")
    try:
        return import_object(place)
    except AttributeError as fault:
        if fault.name not in name.split("."):
            raise  # the module itself looks for something that is not there
        raise TaskError(
            f"{module} has no {name!r}, which the deployment's entrypoint names; put it back, or deploy it "
            "by the name that it has now"
        ) from None


def shown(fault: Exception) -> tuple[str, str]:
    """Return what keeps a flow from being loaded: in a line, and with where in the user's code it was."""
    if isinstance(fault, TaskError):
        return (line := printable(str(fault))), line
    if isinstance(fault, ScriptError):
        fault = fault.user_exc
    found = traceback.TracebackException.from_exception(fault)
    inner: traceback.TracebackException | None = found
    while inner is not None:
        inner.stack = _of_user(inner.stack)
        inner = inner.__cause__ or inner.__context__
    return words_of(fault), printable("".join(found.format()).rstrip())


def _of_user(frames: traceback.StackSummary) -> traceback.StackSummary:
    """Return those frames of a traceback that are neither Prefect's, ours, nor of what calls the user's."""
    others = (*_MACHINERY, "<frozen importlib")
    return traceback.StackSummary.from_list(
        [frame for frame in frames if not frame.filename.startswith(others)]
    )


_MACHINERY = tuple(
    f"{Path(str(module.__file__)).parent}{os.sep}"
    for module in (prefect, taskadapter, importlib, asyncio, concurrent.futures)
)
