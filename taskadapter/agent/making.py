"""Makes the ticks that nobody has planned, and anew those whose runs nobody would find.

Whoever makes a tick that has a run already is given that run: it waits, is over, or is on another queue.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from datetime import datetime
from itertools import starmap
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Pending

from taskadapter.agent.plans import Line, Missing
from taskadapter.agent.telling import Teller
from taskadapter.prefect_api.client import API_FAULTS, is_gone, side_by_side
from taskadapter.prefect_api.ticks import create_tick, delete_run

WITHDRAWN = "Its deployment has moved to another queue."
"""What a run says that is about to be deleted, and made anew."""


class Maker:
    """Makes ticks that are missing.

    Args:
        client: connected to the API.
        log: the agent's.
        has_begun: whether the database has a job's tick.
        keeps: whether the timetable still has a job as it was when its ticks were found missing.
    """

    def __init__(
        self,
        client: PrefectClient,
        log: Logger | LoggerAdapter[Any],
        has_begun: Callable[[UUID, datetime], Awaitable[bool]],
        keeps: Callable[[Line], bool],
    ) -> None:
        self._client = client
        self._log = log
        self._has_begun = has_begun
        self._keeps = keeps
        self._teller = Teller(client, log, patient=False)
        # The jobs of which it has been said that their ticks are made, until Prefect plans some again.
        self._told_of: set[UUID | None] = set()

    def see_planned(self, job_ids: Iterable[UUID | None]) -> None:
        """Take note that Prefect plans some jobs."""
        self._told_of.difference_update(job_ids)

    async def make_all(self, missing: Missing, withheld: Collection[str]) -> list[FlowRun]:
        """Make ticks side by side; where the API fails for some, those of other jobs go on.

        What is made of a queue that is withheld waits there, until Prefect lists it.

        Raises:
            HTTPError: the API fails for all.
        """
        faults: list[Exception] = []

        async def make(tick: datetime, line: Line) -> FlowRun | None:
            try:
                run = await self.make(line, tick)
            except API_FAULTS as fault:
                faults.append(fault)
                missing.hold_up(line, tick)
                return None
            if run is not None and line.plan.queue in withheld:
                line.left.add(tick)
                missing.has_left = True
                return None
            return run

        made = [run for run in await side_by_side(starmap(make, missing.ticks)) if run is not None]
        if len(faults) == len(missing.ticks) and faults:
            raise faults[0]
        names = {line.deployment_id: line.name for _, line in missing.ticks}
        for job_id, count in Counter(run.deployment_id for run in made).items():
            self._log.log(
                logging.DEBUG if job_id in self._told_of else logging.INFO,
                "Made %d tick(s) of job %s that Prefect had not planned.",
                count,
                names[job_id or UUID(int=0)],
            )
            self._told_of.add(job_id)
        return made

    async def make(self, line: Line, tick: datetime) -> FlowRun | None:
        """Return the run of a tick if it waits: made now, unless somebody was quicker."""
        if not self._keeps(line):
            return None
        try:
            return await self._made(line, tick)
        except (ObjectNotFound, httpx.HTTPStatusError) as fault:
            if not is_gone(fault):
                raise
            line.held = True  # the deployment is gone
            return None

    async def _made(self, line: Line, tick: datetime) -> FlowRun | None:
        run = await create_tick(self._client, line.deployment_id, line.plan.schedule_id, tick)
        if run.state is not None and run.state.is_scheduled():
            if run.work_queue_id == line.plan.queue_id:
                return run
            if (await self._client.read_deployment(line.deployment_id)).work_queue_id != line.plan.queue_id:
                line.held = True  # it has moved, and is another agent's
                return None
            if await self._withdraw(run):
                return await create_tick(self._client, line.deployment_id, line.plan.schedule_id, tick)
        # The engine takes an API that fails it before the body for a crash, and then its node has died.
        is_crashed = run.state is not None and run.state.is_crashed()
        if is_crashed and not await self._has_begun(line.deployment_id, tick):
            await self._teller.put_back(run, tick)
            return await self._client.read_flow_run(run.id)
        if is_stranded(run) and not await self._has_begun(line.deployment_id, tick):
            await delete_run(self._client, run)
            return await create_tick(self._client, line.deployment_id, line.plan.schedule_id, tick)
        line.settle(tick)
        return None

    async def _withdraw(self, run: FlowRun) -> bool:
        """Take a tick back from the queue that its job was on before; False if an agent there has it.

        When a deployment moves to another queue or pool, Prefect makes its future ticks anew, but leaves
        the late ones where they are. Perhaps nobody looks there any more; and were they claimed from
        here, a takeover would not find them.
        """
        claim: OrchestrationResult[Any] = await self._client.set_flow_run_state(
            run.id, Pending(message=WITHDRAWN)
        )
        if claim.status is not SetStateStatus.ACCEPT:
            return False
        await delete_run(self._client, run)
        return True


def is_stranded(flow_run: FlowRun) -> bool:
    """Return whether a run is claimed, and no takeover is to find it.

    Somebody has deleted its queue since; or it was to be withdrawn, and that had no answer.
    """
    if flow_run.state is None or flow_run.state.type not in {StateType.PENDING, StateType.RUNNING}:
        return False
    return flow_run.work_queue_id is None or flow_run.state.message == WITHDRAWN
