"""What this machine has: its settings, and the flow modules of its project."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from prefect.exceptions import ScriptError

from taskadapter import render
from taskadapter.declare.attached import file_of
from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.settings import PREFIX, TaskadapterSettings, misspelt

if TYPE_CHECKING:
    from taskadapter.doctor.server import Seen


def read_settings() -> tuple[TaskadapterSettings | None, list[Finding]]:
    """Return the settings of this machine, or what is wrong with them; and what only looks like one."""
    found = [warning(sentence) for sentence in misspelt()]
    try:
        settings = TaskadapterSettings()
    except DeclarationError as fault:
        return None, found + [error(sentence) for sentence in str(fault).splitlines()]
    return settings, found + list(_preloaded(settings.preload))


def _preloaded(modules: tuple[str, ...]) -> Iterator[Finding]:
    """Say which modules are not here that an agent is to import, without importing them."""
    for name in modules:
        try:
            is_here = find_spec(name) is not None
        except (ImportError, ValueError):  # of a package that is not here, or that cannot be imported
            is_here = False
        if not is_here:
            yield error(
                f"setting {PREFIX}PRELOAD names {name!r}, which cannot be found; install it, or take it out"
            )


def rendered_file(given: Path | None) -> Path | None:
    """Return the rendered prefect.yaml: the one that is named, or one of ours; None if none is there."""
    made = (file for file in (render.RENDERED, Path("prefect.yaml")) if _is_ours(file))
    return given or next(made, None)


def _is_ours(file: Path) -> bool:
    try:
        return file.read_bytes().startswith(render.HEADER.partition("`")[0].encode())
    except OSError:
        return False


def read_project(flows: Path, file: Path | None) -> tuple[list[dict[str, Any]] | None, list[Finding]]:
    """Return the deployments that flow modules declare, if they can be read, and what is said of them.

    Args:
        flows: the folder of flow modules.
        file: the rendered prefect.yaml; nothing is said of it where there is none.
    """
    if not flows.is_dir():
        return None, [ok(f"there is no folder {flows}/ here, and the project is left out")]
    try:
        text = render.render(flows, file or render.RENDERED)
    except render.NoJobError:
        return [], [ok(f"{flows}/ declares no job of taskadapter's")]
    except DeclarationError as fault:
        return None, [_refused(fault, flows)]
    return yaml.safe_load(text)["deployments"], [] if file is None else [_rendered(flows, file, text)]


def _refused(fault: DeclarationError, flows: Path) -> Finding:
    """Say what keeps flow modules from being rendered; what we raise has its remedy."""
    broken = fault.__cause__
    if isinstance(broken, ScriptError) and not isinstance(broken.user_exc, TaskError):
        return error(
            f"{fault}; mend that, install what the module imports, or move it out of {flows}/: meanwhile "
            "nothing of the project can be deployed"
        )
    return error(fault)


def _rendered(flows: Path, file: Path, text: str) -> Finding:
    try:
        is_same = file.exists() and file.read_bytes() == text.encode()
    except OSError as fault:
        return error(f"{file} cannot be read: {fault.strerror}; mend that, and run `taskadapter render`")
    if is_same:
        return ok(f"{file} is what {flows}/ declares")
    return warning(
        f"{file} is not what {flows}/ declares; if no module is missing here, run `taskadapter render`, "
        "and deploy"
    )


def declared_for(deployments: list[dict[str, Any]], pool: str) -> dict[str, dict[str, Any]]:
    """Return the deployments of one work pool among those that are declared, by name."""
    return {found["name"]: found for found in deployments if found["work_pool"]["name"] == pool}


def not_deployed(
    declared: dict[str, dict[str, Any]], deployed: dict[str, Any], pool: str, file: Path | None
) -> Iterator[Finding]:
    """Say which jobs are declared and not deployed, or deployed otherwise.

    Args:
        declared: as `declared_for` returns them.
        deployed: the pool's jobs, by name.
        pool: its name.
        file: the rendered prefect.yaml; None if there is none yet.
    """
    remedy = f"`prefect --no-prompt deploy --prefect-file {file or render.RENDERED} --all`"
    if file is None:
        remedy = f"`taskadapter render`, then {remedy}"
    missing = sorted(declared.keys() - deployed.keys())
    if missing:
        yield warning(
            f"not deployed in work pool {pool!r}, though declared: {', '.join(missing)}; {remedy}"
        )
    for name in sorted(declared.keys() & deployed.keys()):
        if differing := _differing(declared[name], deployed[name]):
            yield warning(f"job {name!r} is deployed with another {differing} than is declared; {remedy}")


def not_declared(declared: list[dict[str, Any]], seen: Seen, flows: Path) -> Iterator[Finding]:
    """Say which jobs are deployed that the flow modules do not declare any more.

    Args:
        declared: the deployments that they do, of all pools.
        seen: the work pool.
        flows: the folder of flow modules.
    """
    names = {one["name"] for one in declared}
    for job in sorted(seen.jobs, key=lambda job: job.name):
        # What a program schedules has its class's name for its flow's.
        was_declared = seen.flows.get(job.flow_id) == job.name and _is_in(flows, job.entrypoint)
        if was_declared and job.name not in names:
            name = shlex.quote(f"{job.name}/{job.name}")
            if (file := file_of(job.entrypoint or "")) is not None and not file.exists():
                yield error(
                    f"{file} is not here, and ticks of job {job.name!r} wait on a node of this folder; "
                    "bring it back, and meanwhile hand its group over with `taskadapter resign`; or, if "
                    f"the job was removed, `prefect deployment delete {name}`"
                )
            else:
                yield warning(
                    f"job {job.name!r} is deployed, and {flows}/ does not declare it any more; declare it "
                    f"again, or `prefect deployment delete {name}`"
                )


def _is_in(folder: Path, entrypoint: str | None) -> bool:
    file = (entrypoint or "").partition(":")[0]
    return Path(file).suffix == ".py" and Path(file).resolve().is_relative_to(folder.resolve())


def _differing(declared: dict[str, Any], deployed: Any) -> str:
    """Say what of a deployment's is not as declared; nothing of what somebody may set beside it."""
    pool = declared["work_pool"]
    trigger = (deployed.job_variables or {}).get("trigger")
    pairs = {
        "trigger": (trigger, pool["job_variables"]["trigger"]),
        "entrypoint": (deployed.entrypoint, declared["entrypoint"]),
        "group": (deployed.work_queue_name, pool["work_queue_name"]),
    }
    # What a job has lost is a finding of its own.
    return " and ".join(what for what, (found, wanted) in pairs.items() if found and found != wanted)
