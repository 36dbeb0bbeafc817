"""One run, as the agent hands it to a process."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from pydantic import BaseModel, SecretStr, field_serializer

from taskadapter.coordination import executions
from taskadapter.coordination.executions import Owner
from taskadapter.coordination.messages import Token
from taskadapter.declare.triggers import TaskPolicy, TriggerConfiguration
from taskadapter.rules.ticks import WAITING_TIME, is_tick, tick_of

LEAVE_SECONDS = 5.0
"""How long the end of a process may take: what it has logged is sent, its `atexit` functions are called."""


class Workspace(BaseModel, frozen=True):
    """Where a deployment's code runs.

    Attributes:
        working_dir: relative to where the agent was started; there, if it is None.
        pull_steps: what fetches the code, as in ``prefect.yaml``.
        env: variables of the environment; None removes one.
    """

    working_dir: str | None = None
    pull_steps: list[dict[str, Any]] = []
    env: dict[str, str | None] = {}


class Assignment(BaseModel, frozen=True):
    """One run, as the agent hands it to a process.

    Attributes:
        flow_run: as polled.
        due: when its body is to start.
        flow_name: the flow's name.
        deployment_name: the deployment's, by which commands know the job.
        entrypoint: what of the workspace it runs.
        workspace: where the code is.
        node: the agent's name.
        incarnation: which of all processes that ever had that name.
        database_url: the coordination database.
        token: what the node holds of the run's group; None for a run of no group.
        board: the file with the deadline of that token.
        scratch: a folder of the run's own, which its pull steps may make; the agent removes it.
        trigger_slug: names the trigger, for the count.
        trigger: as deployed; None for a deployment that is not of ours.
        initial_state: of an attached service.
        waiting_time: seconds that it may be late where its policy ignores late ticks.
        server_has_storage: whether the server may name a storage for results.
    """

    flow_run: FlowRun
    due: datetime
    flow_name: str
    deployment_name: str
    entrypoint: str
    workspace: Workspace
    node: str
    incarnation: str
    database_url: SecretStr
    token: Token | None = None
    board: Path | None = None
    scratch: Path | None = None
    trigger_slug: str | None = None
    trigger: TriggerConfiguration | None = None
    initial_state: dict[str, Any] | None = None
    waiting_time: float = WAITING_TIME
    server_has_storage: bool = True

    @field_serializer("database_url", when_used="json")
    def _reveal(self, value: SecretStr) -> str:
        # The pipe to the process is the one place where the secret is written.
        return value.get_secret_value()

    @property
    def job_id(self) -> UUID | None:
        """The deployment's id; None for a run that belongs to none."""
        return self.flow_run.deployment_id

    @property
    def policy(self) -> TaskPolicy:
        """The job's policy."""
        return TaskPolicy() if self.trigger is None else self.trigger.policy

    @property
    def is_tick(self) -> bool:
        """Whether the run is a tick of its job's trigger, and not one that somebody asks for."""
        return is_tick(self.flow_run)

    @property
    def max_count(self) -> int:
        """The executions that the trigger allows; -1 for a run that somebody started by hand."""
        return -1 if self.trigger is None or not self.is_tick else self.trigger.max_count

    @property
    def owner(self) -> Owner:
        """Who executes it."""
        return Owner(self.node, self.incarnation, self.token)

    @property
    def scheduled_time(self) -> datetime:
        """When the tick was due, whenever Prefect has put it since; of other runs, when it is to start."""
        return self.execution.due or self.due

    @property
    def execution(self) -> executions.Execution:
        """What is executed once."""
        return execution_of(self.flow_run, is_ours=self.trigger is not None)


def execution_of(flow_run: FlowRun, *, is_ours: bool) -> executions.Execution:
    """Return what a run is an execution of: a tick, whichever run shows it, or the run itself.

    Args:
        flow_run: as polled.
        is_ours: whether its job has a trigger of ours. Other deployments may have several schedules that
            are due at the same moment: their ticks are told apart as Prefect does.
    """
    flow_run_id = str(flow_run.id)
    job_id = None if flow_run.deployment_id is None else str(flow_run.deployment_id)
    due = tick_of(flow_run)
    if due is None or job_id is None:
        key = executions.asked_key(flow_run_id, flow_run.run_count)
    elif is_ours:
        key = executions.tick_key(job_id, due)
    else:
        key = flow_run.idempotency_key or executions.tick_key(job_id, due)
    return executions.Execution(key, flow_run_id, job_id, due)
