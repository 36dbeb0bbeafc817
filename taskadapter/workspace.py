"""Where a deployment's code is, and how a host has it at hand: imported once, fresh when it changes."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import Flow
from prefect.context import refresh_global_settings_context
from prefect.deployments.steps.core import run_steps
from prefect.exceptions import MissingFlowError
from prefect.filesystems import LocalFileSystem
from prefect.flows import load_flow_from_entrypoint, load_function_and_convert_to_flow
from prefect.logging.loggers import flow_run_logger
from prefect.results import get_default_result_storage
from prefect.settings import get_current_settings
from prefect.utilities.importtools import import_object

from taskadapter import attached
from taskadapter import flow as flows
from taskadapter.jobs import Job, Service, load_state
from taskadapter.listener import listeners

if TYPE_CHECKING:
    from taskadapter.runs import Assignment, Workspace


class StaleCode(Exception):  # noqa: N818 - a signal to the host, not an error
    """A module that this process has imported has changed since: only a new process has the new one."""


class Desk:
    """A workspace as one host has it: its environment set, its flows imported.

    Args:
        workspace: where the code is.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._flows: dict[str, Flow[..., Any]] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        self._set_environment()
        self._home = Path(workspace.working_dir or Path.cwd())
        if workspace.pull_steps and workspace.working_dir is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="taskadapter-")
            self._home = Path(self._scratch.name)

    def _set_environment(self) -> None:
        for name, value in self.workspace.env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if any(name.startswith("PREFECT_") for name in self.workspace.env):
            refresh_global_settings_context()

    def flow_for(self, assignment: Assignment) -> Flow[..., Any]:
        """Return the assignment's flow, after the workspace's pull steps; each is imported once.

        Raises:
            StaleCode: a file that a flow of this workspace came from has changed.
        """
        self._pull(assignment)
        if any(_fingerprint(file) != seen for file, seen in self._seen.items()):
            raise StaleCode
        key = assignment.model_dump_json(include={"entrypoint", "flow_name", "initial_state", "trigger"})
        if key not in self._flows:
            self._flows[key] = self._with_result_storage(_load(assignment))
            self._seen |= {file: _fingerprint(file) for file in _sources()}
        return self._flows[key]

    def _pull(self, assignment: Assignment) -> None:
        os.chdir(self._home)
        if not self.workspace.pull_steps:
            return
        logger = flow_run_logger(assignment.flow_run)
        steps = run_steps(self.workspace.pull_steps, print_function=logger.info, logger=logger)
        if directory := asyncio.run(steps).get("directory"):
            os.chdir(directory)

    def _with_result_storage(self, flow: Flow[..., Any]) -> Flow[..., Any]:
        """Give the flow the default result storage: the engine would ask the API twice for each run."""
        if flow.result_storage is not None or isinstance(self._default_storage, LocalFileSystem):
            storage: Any = flow.result_storage or get_current_settings().results.local_storage_path
            persists = get_current_settings().results.persist_by_default
        else:
            storage, persists = self._default_storage, True
        if flow.persist_result is not None:
            persists = flow.persist_result
        return flow.with_options(result_storage=storage, persist_result=persists)

    @cached_property
    def _default_storage(self) -> Any:
        return get_default_result_storage(_sync=True)  # type: ignore[call-arg]


def _load(assignment: Assignment) -> Flow[..., Any]:
    """Import what the entrypoint names: a flow, or the function or class that a job is made of."""
    listeners.clear()  # what modules of several programs declare here need not agree
    place = attached.place_of(assignment.entrypoint)
    try:
        return load_flow_from_entrypoint(place, use_placeholder_flow=False)
    except MissingFlowError:
        named = import_object(place)
    trigger, name = assignment.trigger, assignment.flow_name
    if trigger is not None and isinstance(named, type) and issubclass(named, Service):
        return flows.service_flow(load_state(named, assignment.initial_state or {}), name, trigger)
    if trigger is not None and isinstance(named, type) and issubclass(named, Job):
        return flows.job_flow(named, name, trigger)
    if trigger is not None and inspect.isfunction(named):
        return flows.function_flow(named, name, trigger)
    return load_function_and_convert_to_flow(place)


def _sources() -> Iterator[Path]:
    """Yield the sources of the imported modules that lie in the workspace, installed ones aside."""
    here, installed = Path.cwd(), Path(sys.prefix)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is None:
            continue
        path = Path(file).absolute()
        if path.is_relative_to(here) and not path.is_relative_to(installed):
            yield path


def _fingerprint(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
