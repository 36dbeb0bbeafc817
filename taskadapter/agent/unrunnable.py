"""What becomes of runs that no node can run: their deployment is gone, or cannot be read."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Set as AbstractSet
from uuid import UUID

from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from taskadapter.agent.jobs import Deployments
from taskadapter.agent.node import Node
from taskadapter.agent.timetable import Timetable
from taskadapter.prefect_api.client import API_FAULTS
from taskadapter.rules import ticks

TOLD_SECONDS = 60.0
"""For how long it is not said again that runs of a job are gone."""

PLANNED_ANEW = "Prefect has planned its job anew, or somebody has deleted it"
"""Why a run is gone whose deployment is there."""

REFUSED = "Job %r cannot be run as it is deployed: %s; deploy it again."
"""What is told of a job, and of each of its runs, whose deployment was edited into what cannot be read."""


class Unrunnable:
    """Deals with such runs, and says of each job once why its runs cannot be run.

    Args:
        node: whose runs they are.
        deployments: what the jobs are called.
        timetable: learns which of them are settled.
    """

    def __init__(self, node: Node, deployments: Deployments, timetable: Timetable) -> None:
        self._node = node
        self._deployments = deployments
        self._timetable = timetable
        # When it was said last that runs of a job are gone, and what of one that cannot be read.
        self._told_gone: dict[UUID | None, float] = {}
        self._refused: dict[UUID | None, tuple[str, str]] = {}

    async def is_gone(self, flow_run: FlowRun) -> None:
        """Say why a run is gone, and delete a tick whose deployment is, as Prefect does with others.

        Its scheduler, or an agent, was making it at the moment in which the deployment was deleted.
        """
        job_id, why = flow_run.deployment_id, PLANNED_ANEW
        with contextlib.suppress(ObjectNotFound, *API_FAULTS):  # else the next look finds it again
            try:
                if job_id is not None:
                    await self._node.client.read_deployment(job_id)
            except ObjectNotFound:
                why = "its deployment was deleted"
                if ticks.is_tick(flow_run) and not flow_run.run_count:
                    await self._node.client.delete_flow_run(flow_run.id)
        # A job that is planned anew has perhaps a dozen such runs.
        now, told_at = time.monotonic(), self._told_gone.get(job_id, float("-inf"))
        level = logging.INFO if now - told_at > TOLD_SECONDS else logging.DEBUG
        self._node.log.log(level, "Run %s is gone: %s.", flow_run.name, why)
        if level == logging.INFO:
            self._told_gone = {id_: at for id_, at in self._told_gone.items() if now - at <= TOLD_SECONDS}
            self._told_gone[job_id] = now

    async def cannot_be_read(self, flow_run: FlowRun, fault: str) -> None:
        """Mark a run as crashed whose deployment was edited into what cannot be read; say so once."""
        cause = self._deployments.name_of(flow_run), fault.removesuffix(".")
        if self._refused.get(flow_run.deployment_id) != cause:
            self._refused[flow_run.deployment_id] = cause
            self._node.log.error(REFUSED, *cause)
        self._timetable.settle(flow_run)
        await self._node.teller.report(flow_run, Crashed(message=REFUSED % cause))

    def was_read(self, flow_run: FlowRun) -> None:
        """Take note that a run's deployment can be read now."""
        self._refused.pop(flow_run.deployment_id, None)

    def retain(self, job_ids: AbstractSet[UUID]) -> None:
        """Remember nothing of other jobs."""
        self._refused = {id_: cause for id_, cause in self._refused.items() if id_ in job_ids}
