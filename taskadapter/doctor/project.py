"""What this machine has: its settings, and the flow modules of its project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from prefect.exceptions import ScriptError
from pydantic import SecretStr, ValidationError

from taskadapter import deploy
from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.settings import TaskadapterSettings

PREFIX = "PREFECT_INTEGRATIONS_TASKADAPTER_"


def read_settings() -> tuple[TaskadapterSettings | None, list[Finding]]:
    """Return the settings of this machine, or what is wrong with them."""
    try:
        return TaskadapterSettings(), []
    except ValidationError as fault:
        return None, [_wrong_setting(wrong) for wrong in fault.errors()]


def _wrong_setting(wrong: Any) -> Finding:
    name = ".".join(map(str, wrong["loc"]))
    field = TaskadapterSettings.model_fields.get(name)
    is_secret = field is None or field.annotation == SecretStr | None
    value = "" if is_secret else f"={wrong['input']}"
    return error(
        f"setting {PREFIX}{name.upper()}{value} is refused: {wrong['msg']}; correct it, or unset it"
    )


def read_project(flows: Path, file: Path) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Return the deployments that flow modules declare, and what there is to say of them.

    Args:
        flows: the folder of flow modules; nothing is said of it where there is none.
        file: the rendered prefect.yaml.
    """
    if not flows.is_dir():
        return [], []
    try:
        text = deploy.render(flows, file)
    except DeclarationError as fault:
        return [], [_refused(fault, flows)]
    return yaml.safe_load(text)["deployments"], [_rendered(flows, file, text)]


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
    return warning(f"{file} is not what {flows}/ declares; run `taskadapter render`, and deploy")


def declared_for(deployments: list[dict[str, Any]], pool: str) -> dict[str, dict[str, Any]]:
    """Return the deployments of one work pool among those that are declared, by name."""
    return {found["name"]: found for found in deployments if found["work_pool"]["name"] == pool}


def not_deployed(
    declared: dict[str, dict[str, Any]], deployed: dict[str, Any], pool: str, file: Path
) -> Iterator[Finding]:
    """Say which jobs are declared and not deployed, or deployed otherwise.

    Args:
        declared: as `declared_for` returns them.
        deployed: the pool's jobs, by name.
        pool: its name.
        file: the rendered prefect.yaml.
    """
    remedy = f"`prefect --no-prompt deploy --prefect-file {file} --all`"
    missing = sorted(declared.keys() - deployed.keys())
    if missing:
        yield warning(
            f"not deployed in work pool {pool!r}, though declared: {', '.join(missing)}; {remedy}"
        )
    for name in sorted(declared.keys() & deployed.keys()):
        if differing := _differing(declared[name], deployed[name]):
            yield warning(f"job {name!r} is deployed with another {differing} than is declared; {remedy}")


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
