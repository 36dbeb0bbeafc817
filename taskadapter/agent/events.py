"""The events that an agent emits, for the UI's event feed and for automations."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from prefect.events import emit_event
from prefect.settings import get_current_settings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, WorkPool
    from prefect.client.schemas.responses import DeploymentResponse

    from taskadapter.agent.jobs import DeployedJob
    from taskadapter.agent.node import Node
    from taskadapter.coordination.messages import Token

JOB_RESTARTED = "taskadapter.job.restarted"
"""The event of ours that agents hear."""


def token_changed(node: Node, what: str, token: Token, reason: str) -> None:
    """Tell that a token was acquired, released or lost, and why."""
    emit_event(
        f"taskadapter.token.{what}",
        resource={
            "prefect.resource.id": f"taskadapter.coordination-group.{token.group_id}",
            "prefect.resource.name": token.group_id,
            "taskadapter.task-id": token.task_id,
            "taskadapter.term": str(token.term),
        },
        related=[_pool(node)],
        payload={"reason": reason},
    )


def tick_skipped(node: Node, flow_run: FlowRun, job: DeployedJob, reason: str) -> None:
    """Tell that a tick is not run, and why."""
    emit_event(
        "taskadapter.tick.skipped",
        resource=_resource("flow-run", flow_run.id, flow_run.name),
        related=[
            _related("flow", flow_run.flow_id, job.flow_name),
            _related("deployment", job.deployment.id, job.deployment.name),
            _pool(node),
        ],
        payload={"reason": reason},
    )


def job_ended(node: Node, job: DeployedJob, reason: str) -> None:
    """Tell that a job is over, and why."""
    emit_event(
        "taskadapter.job.ended",
        resource=_resource("deployment", job.deployment.id, job.deployment.name),
        related=[_related("flow", job.deployment.flow_id, job.flow_name), _pool(node)],
        payload={"reason": reason},
    )


def job_restarted(deployment: DeploymentResponse, pool: WorkPool, reason: str) -> None:
    """Tell that a job goes on that was over, and why it had been: Prefect tells of no schedule's switch."""
    emit_event(
        JOB_RESTARTED,
        resource=_resource("deployment", deployment.id, deployment.name),
        related=[_related("flow", deployment.flow_id), _related("work-pool", pool.id, pool.name)],
        payload={"reason": reason},
    )


def run_goes_on(flow_run: FlowRun) -> None:
    """Emit Prefect's heartbeat of a run, by which automations detect dead ones, unless none is wanted."""
    if get_current_settings().flows.heartbeat_frequency is None:
        return
    emit_event(
        "prefect.flow-run.heartbeat",
        resource=_resource("flow-run", flow_run.id, flow_run.name),
        related=[
            _related("flow", flow_run.flow_id),
            _related("deployment", flow_run.deployment_id),
        ],
    )


def _pool(node: Node) -> dict[str, str]:
    return _related("work-pool", node.pool().id, node.work_pool)


def _related(kind: str, object_id: UUID | None, name: str | None = None) -> dict[str, str]:
    return _resource(kind, object_id, name) | {"prefect.resource.role": kind}


def _resource(kind: str, object_id: UUID | None, name: str | None = None) -> dict[str, str]:
    named = {} if name is None else {"prefect.resource.name": name}
    return {"prefect.resource.id": f"prefect.{kind}.{object_id}"} | named
