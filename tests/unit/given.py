"""What several of the unit tests begin with."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from prefect.client.schemas.objects import FlowRun

from taskadapter.agent.node import Node, Share
from taskadapter.agent.plans import Line, Plan
from taskadapter.agent.tasks import Tasks
from taskadapter.agent.telling import Teller
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.settings import TaskadapterSettings

if TYPE_CHECKING:
    from collections.abc import Callable

LOG = logging.getLogger("test")

PATIENCE_SECONDS = 10.0
"""How long a test waits for what takes no time at all."""

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
JOB, OTHER = UUID(int=1), UUID(int=2)


def at(*seconds: float) -> list[datetime]:
    """The moments so many seconds after noon."""
    return [NOON + timedelta(seconds=second) for second in seconds]


def line(
    through: datetime = NOON - SECOND, job_id: UUID = JOB, *, is_new: bool = True, **trigger: Any
) -> Line:
    """The line of a job that is due at noon and every five seconds, unless its trigger says otherwise."""
    return Line(job_id, "job", plan(**trigger), through, is_new=is_new)


def plan(anchor: datetime = NOON, created: datetime = NOON, **trigger: Any) -> Plan:
    """The plan of such a job."""
    declared = TriggerConfiguration(**({"interval": 5} | trigger))
    return Plan("default", JOB, JOB, anchor, declared.interval, declared, created=created)


def tick(job_id: UUID, seconds: float, planned: bool = True) -> FlowRun:
    """A job's tick, so many seconds after noon; one that is not planned is a run by hand."""
    return FlowRun(
        id=uuid4(),
        flow_id=uuid4(),
        deployment_id=job_id,
        expected_start_time=NOON + timedelta(seconds=seconds),
        auto_scheduled=planned,
    )


def node(client: Any = None, pool: Any = None, share: Share | None = None) -> Node:
    """A node of work pool `pool`."""
    return Node(
        name="node-1",
        incarnation="first",
        work_pool="pool",
        pool=lambda: pool,
        has_pool=lambda: True,
        client=client,
        log=LOG,
        settings=TaskadapterSettings(),
        share=share or Share(),
        tasks=Tasks(LOG),
        teller=Teller(client, LOG),
    )


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks go on until something is so."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not become so"
        await asyncio.sleep(0)
