"""The agent's view of the deployments it runs, which are read when they are needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.workers.base import BaseJobConfiguration, BaseVariables
from pydantic import Field, ValidationError

from taskadapter.declare.triggers import TaskPolicy, TriggerConfiguration
from taskadapter.errors import DeclarationError
from taskadapter.execution.assignment import Workspace
from taskadapter.prefect_api.client import API_FAULTS
from taskadapter.prefect_api.deployments import deployments_of, flow_names, stored_trigger
from taskadapter.rules import ticks

FRESH_SECONDS = 60.0
"""A deployment that was read longer ago is read again."""

BATCH = timedelta(seconds=1)
"""Runs that Prefect's scheduler makes at one visit are made within less than this."""


class WarmBackupJobConfiguration(BaseJobConfiguration):
    """How one run is run: the work pool's template, filled with the deployment's job variables."""

    working_dir: str | None = Field(default=None)
    trigger: dict[str, Any] | None = Field(default=None)
    initial_state: dict[str, Any] | None = Field(default=None)


class WarmBackupVariables(BaseVariables):
    """What a work pool sets for all its deployments, and a deployment for itself."""

    working_dir: str | None = Field(
        default=None,
        title="Working directory",
        description="Where the code is; by default where the agent was started.",
    )
    trigger: dict[str, Any] | None = Field(
        default=None,
        title="Trigger",
        description="When the job runs, how often and until when. Written by `taskadapter render`.",
    )
    initial_state: dict[str, Any] | None = Field(
        default=None,
        title="Initial state",
        description="The fields of an attached service before its first run.",
    )
    database: str | None = Field(
        default=None,
        title="Coordination database",
        description="SQLAlchemy URL without a password; by default each node's own.",
    )
    password_block: str | None = Field(
        default=None,
        title="Coordination password",
        description="The name of the Secret block that has the database's password.",
    )
    liveness_check_interval: float = Field(
        default=30.0,
        title="Liveness check interval",
        description="Seconds without heartbeat after which a node is taken for dead.",
    )
    heartbeat_frequency: float = Field(
        default=1.0,
        title="Heartbeat frequency",
        description="Seconds between two heartbeats.",
    )
    preload: list[str] = Field(
        default=[],
        title="Preload",
        description="Modules that each node imports once for all its runs, beside those of its setting.",
    )
    worker_count: int | None = Field(
        default=None,
        title="Worker count",
        description="Runs at once on a node, unless its --limit says otherwise; by default its setting.",
    )
    waiting_time: float = Field(
        default=5.0,
        title="Waiting time",
        description="Seconds after its time within which a tick is not yet late.",
    )


@dataclass(frozen=True)
class Snapshot:
    """A deployment as it was read.

    Attributes:
        deployment: as Prefect had it.
        newest_run: when the newest run known at that time was made.
        read_at: on the monotonic clock.
    """

    deployment: DeploymentResponse
    newest_run: datetime | None
    read_at: float = field(default_factory=time.monotonic)

    def serves(self, flow_run: FlowRun) -> bool:
        """Return whether this snapshot is recent enough for a run.

        A deployment that changes has its planned runs made anew. So a run made after this snapshot may
        be of a changed deployment, an older one is not.
        """
        if time.monotonic() - self.read_at > FRESH_SECONDS:
            return False
        if self.newest_run is None or flow_run.created is None:
            return False
        return flow_run.created <= self.newest_run + BATCH


@dataclass(frozen=True)
class DeployedJob:
    """A deployment as it was read, and what a run of it needs.

    Attributes:
        snapshot: the deployment.
        flow_name: its flow's name.
        configuration: the pool's template, filled.
        trigger: as declared; None for a deployment that is not of ours.
    """

    snapshot: Snapshot
    flow_name: str
    configuration: WarmBackupJobConfiguration
    trigger: TriggerConfiguration | None

    @property
    def deployment(self) -> DeploymentResponse:
        """The deployment as it was read."""
        return self.snapshot.deployment

    @property
    def name(self) -> str:
        """``flow/deployment``, as the UI and the command line have it."""
        return f"{self.flow_name}/{self.deployment.name}"

    @property
    def slug(self) -> str | None:
        """The slug of the trigger's schedule."""
        return None if self.trigger is None else ticks.slug(self.trigger)

    def has_planned(self, flow_run: FlowRun) -> bool:
        """Return whether a run is a tick of the trigger's schedule, and not of another trigger's."""
        own = (schedule for schedule in self.deployment.schedules if schedule.slug == self.slug)
        return is_of_any(flow_run, own)

    @property
    def policy(self) -> TaskPolicy:
        """As declared, or the default one."""
        return TaskPolicy() if self.trigger is None else self.trigger.policy

    @property
    def max_concurrent(self) -> int | None:
        """How many of its runs may go on at once; None for no limit."""
        return self.policy.max_concurrent

    @property
    def finishes(self) -> bool:
        """Whether its runs may go on when their node has lost the token."""
        return self.policy.on_token_loss == "finish"

    def workspace_of(self, flow_run: FlowRun, node: str) -> Workspace:
        """Return where the code of a run is; its environment names the run as under Prefect's workers."""
        names: dict[str, str | None] = {
            "PREFECT__FLOW_RUN_ID": str(flow_run.id),
            "PREFECT__FLOW_ID": str(flow_run.flow_id),
            "PREFECT__FLOW_NAME": self.flow_name,
            "PREFECT__DEPLOYMENT_ID": str(self.deployment.id),
            "PREFECT__DEPLOYMENT_NAME": self.deployment.name,
            "PREFECT__WORKER_NAME": node,
        }
        return Workspace(
            working_dir=self.configuration.working_dir or self.deployment.path,
            pull_steps=self.deployment.pull_steps or [],
            env=names | self.configuration.env,
        )


class Deployments:
    """Reads deployments.

    Args:
        client: connected to the API.
    """

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._snapshots: dict[UUID, Snapshot] = {}
        self._flow_names: dict[UUID, str] = {}
        # When the newest run was made that the agent knows of.
        self._newest_run: datetime | None = None
        self._jobs: dict[UUID, DeployedJob] = {}
        self._reading = asyncio.Lock()
        self._server_has_storage = True
        self._storage_asked_at = float("-inf")

    async def prepare(self, flow_runs: Iterable[FlowRun]) -> None:
        """Read what `job_of` will need for some runs, of all of them at once.

        Raises:
            HTTPError: as any of `API_FAULTS`: the API failed.
        """
        flow_runs = list(flow_runs)
        made = [run.created for run in flow_runs if run.created is not None]
        newest = self._newest_run = max([*made, *filter(None, [self._newest_run])], default=None)
        wanted = {run.deployment_id for run in flow_runs if run.deployment_id and not self._is_read(run)}
        if not wanted:
            return
        found = await deployments_of(self._client, wanted)
        unknown = {deployment.flow_id for deployment in found} - self._flow_names.keys()
        if unknown:
            self._flow_names |= await flow_names(self._client, unknown)
        for job_id in wanted:
            self._snapshots.pop(job_id, None)
        self._snapshots |= {deployment.id: Snapshot(deployment, newest) for deployment in found}

    def _is_read(self, flow_run: FlowRun) -> bool:
        snapshot = self._snapshots.get(flow_run.deployment_id) if flow_run.deployment_id else None
        return snapshot is not None and snapshot.serves(flow_run)

    async def job_of(self, flow_run: FlowRun, pool: WorkPool) -> DeployedJob:
        """Return the deployment of a run.

        Args:
            flow_run: the run.
            pool: its work pool.

        Raises:
            ObjectNotFound: the deployment is gone.
            DeclarationError: its trigger was edited into something invalid.
        """
        assert flow_run.deployment_id is not None  # noqa: S101 - a pool's runs have one
        async with self._reading:
            if not self._is_read(flow_run):
                await self.prepare([flow_run])
            snapshot = self._snapshots.get(flow_run.deployment_id)
            flow_name = self._flow_names.get(flow_run.flow_id)
            if snapshot is None or flow_name is None:
                raise ObjectNotFound(LookupError(f"the deployment of run {flow_run.name}"))
            known = self._jobs.get(flow_run.deployment_id)
            if known is not None and known.snapshot is snapshot and not flow_run.job_variables:
                return known
            job = await self._fill(flow_run, pool, snapshot, flow_name)
            if not flow_run.job_variables:
                self._jobs[flow_run.deployment_id] = job
        return job

    async def _fill(
        self, flow_run: FlowRun, pool: WorkPool, snapshot: Snapshot, flow_name: str
    ) -> DeployedJob:
        """Fill the pool's template with what a deployment and a run of it say."""
        values = {**(snapshot.deployment.job_variables or {}), **(flow_run.job_variables or {})}
        try:
            configuration = await self._configuration(pool, values)
        except ValidationError as error:
            raise DeclarationError(
                f"its job variables do not fit the work pool's template: {error}"
            ) from error
        trigger = stored_trigger({"trigger": configuration.trigger})
        return DeployedJob(snapshot, flow_name, configuration, trigger)

    async def _configuration(self, pool: WorkPool, values: dict[str, Any]) -> WarmBackupJobConfiguration:
        found: WarmBackupJobConfiguration = await WarmBackupJobConfiguration.from_template_and_values(
            base_job_template=pool.base_job_template, values=values, client=self._client
        )
        return found

    async def server_has_storage(self) -> bool:
        """Return whether the server may name a storage for results, asked once a minute for all runs."""
        if time.monotonic() - self._storage_asked_at > FRESH_SECONDS:
            try:
                found = await self._client.read_server_default_result_storage()
            except API_FAULTS:
                return True  # each run asks for itself
            self._server_has_storage = found.default_result_storage_block_id is not None
            self._storage_asked_at = time.monotonic()
        return self._server_has_storage

    async def reruns(self, flow_run: FlowRun) -> bool:
        """Return whether a run whose node died while it executed is to be run again."""
        if flow_run.deployment_id is None:
            return False
        deployment = await self._client.read_deployment(flow_run.deployment_id)
        trigger = stored_trigger(deployment.job_variables)
        return trigger is not None and trigger.policy.on_takeover == "rerun"

    def retain(self, job_ids: AbstractSet[UUID]) -> None:
        """Remember nothing of other jobs: where many come and go, most of them are deleted by now."""
        self._snapshots = {id_: snapshot for id_, snapshot in self._snapshots.items() if id_ in job_ids}
        self._jobs = {id_: job for id_, job in self._jobs.items() if id_ in job_ids}

    def forget(self, job_id: UUID) -> None:
        """Have a job read anew that has been changed."""
        self._snapshots.pop(job_id, None)

    def known(self, flow_run: FlowRun) -> DeployedJob | None:
        """Return the deployment of a run as it was last read, if it was."""
        return self._jobs.get(flow_run.deployment_id) if flow_run.deployment_id else None

    def name_of(self, flow_run: FlowRun) -> str:
        """Return the name of a run's job, also of one that cannot be run, or the run's own."""
        snapshot = self._snapshots.get(flow_run.deployment_id) if flow_run.deployment_id else None
        flow_name = self._flow_names.get(flow_run.flow_id)
        if snapshot is None or flow_name is None:
            return flow_run.name
        return f"{flow_name}/{snapshot.deployment.name}"


def is_of_any(flow_run: FlowRun, schedules: Iterable[DeploymentSchedule]) -> bool:
    """Return whether a run is a tick of one of some schedules."""
    return any(ticks.is_of(flow_run, schedule.id) for schedule in schedules)
