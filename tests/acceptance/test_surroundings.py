"""What a flow finds around it is what it finds under Prefect's process worker."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.schemas.actions import WorkPoolCreate

from deployments.local import agent
from taskadapter.pools import ensure_work_pool
from tests.acceptance.project import Prefect, Project, state_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = pytest.mark.slow

LOOK = """
    import asyncio, gc, json, locale, logging, multiprocessing, os
    import resource, signal, sys, threading, warnings
    from prefect import flow

    def umask() -> int:
        mask = os.umask(0)
        os.umask(mask)
        return mask

    def limits(name: str) -> tuple[int, int]:
        return resource.getrlimit(getattr(resource, name))

    def handled(handler: object) -> str:
        return getattr(handler, "__name__", str(handler))

    def has_loop() -> bool:
        try:
            return asyncio.get_running_loop() is not None
        except RuntimeError:
            return False

    @flow
    def look() -> None:
        found = {
            "cwd": os.getcwd(),
            "sys.path": sys.path,
            "sys.argv": sys.argv,
            "__name__": __name__,
            "__main__": sys.modules["__main__"].__spec__.name,
            "umask": umask(),
            "signals": {number.name: handled(signal.getsignal(number)) for number in signal.Signals},
            "blocked signals": [str(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "in the main thread": threading.current_thread() is threading.main_thread(),
            "in a loop": has_loop(),
            "loop policy": type(asyncio.get_event_loop_policy()).__name__,
            "root handlers": [type(handler).__name__ for handler in logging.getLogger().handlers],
            "levels": [logging.getLogger(name).level for name in ("", "prefect", "prefect.flow_runs")],
            "encodings": [stream.encoding for stream in (sys.stdin, sys.stdout, sys.stderr)],
            "terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
            "files": sorted(kind(name) for name in os.listdir("/proc/self/fd")),
            "priority": os.nice(0),
            "limits": {name: limits(name) for name in dir(resource) if "RLIMIT_" in name},
            "flags": str(sys.flags),
            "garbage collector": [gc.isenabled(), gc.get_threshold()],
            "recursion": sys.getrecursionlimit(),
            "start method": multiprocessing.get_start_method(),
            "process name": multiprocessing.current_process().name,
            "locale": locale.setlocale(locale.LC_ALL),
            "warnings": sorted(str(each) for each in warnings.filters),
            "environment": dict(os.environ),
        }
        with open(os.environ["FOUND"], "w") as file:
            json.dump(found, file)

    def kind(descriptor: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0]
        except OSError:
            return "closed meanwhile"
"""

DIFFERENT = {
    "__main__": "the module that waits for the run",
    "threads": "Prefect's listeners there, ours here",
    "files": "sockets and pipes of either",
}
"""What may differ, and why."""

ITS_OWN = {
    "FOUND",
    "PREFECT__DEPLOYMENT_ID",
    "PREFECT__DEPLOYMENT_NAME",
    "PREFECT__FLOW_RUN_ID",
    "PREFECT__WORKER_NAME",
}
"""Variables that name the run or its deployment: both have them, with values of their own."""

PREFECTS_OWN = {"PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", "PREFECT__FLOW_ENTRYPOINT"}
"""Variables by which Prefect's worker tells its engine what to do."""


def test_a_run_finds_what_it_finds_under_the_process_worker(project: Project, prefect: Prefect) -> None:
    """Environment, folder, search path, signals, logging and limits are equal; differences are listed."""
    project.write("look.py", LOOK)
    other = f"{project.pool}-process"
    ensure_work_pool(project.pool)
    prefect.client.create_work_pool(WorkPoolCreate(name=other, type="process"))
    theirs = look(project, prefect, other, "process")
    ours = look(project, prefect, project.pool, "warm-backup")

    different = {name for name in ours if ours[name] != theirs[name]}
    assert different - {"environment", "sys.path"} <= DIFFERENT.keys()
    # The folder may be there twice: of the command, and of the environment.
    assert list(dict.fromkeys(ours["sys.path"])) == list(dict.fromkeys(theirs["sys.path"]))
    assert environment(ours) == environment(theirs)


def environment(found: dict[str, Any]) -> dict[str, str]:
    """Return the variables that matter to a job; Prefect's worker repeats its settings there."""
    return {
        name: value if name not in ITS_OWN else "its own"
        for name, value in found["environment"].items()
        if name not in PREFECTS_OWN and not name.startswith("PREFECT_SERVER_")
    }


def look(project: Project, prefect: Prefect, pool: str, kind: str) -> dict[str, Any]:
    """Return what a flow finds in a run under a worker."""
    file = project.folder / f"{kind}.json"
    deploy(prefect.client, pool, str(project.folder), {"FOUND": str(file), "OF_THE_DEPLOYMENT": "set"})
    with agent(f"look-{kind}", pool, project.env, project.folder, kind=kind):
        ended = prefect.wait_for_end(prefect.start(f"look/{pool}"))
    assert state_of(ended).name == "Completed", state_of(ended).message
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def deploy(client: SyncPrefectClient, pool: str, folder: str, env: dict[str, str]) -> None:
    """Deploy the flow to a pool, as `prefect deploy` does for code on this machine."""
    client.create_deployment(
        client.create_flow_from_name("look"),
        pool,
        entrypoint="look.py:look",
        work_pool_name=pool,
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": folder}}],
        job_variables={"env": env},
        enforce_parameter_schema=False,
    )
