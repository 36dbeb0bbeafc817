"""What several of the unit tests begin with."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun

from taskadapter.agent.node import Node, Share
from taskadapter.agent.tasks import Tasks
from taskadapter.settings import TaskadapterSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

LOG = logging.getLogger("test")

PATIENCE_SECONDS = 10.0
"""How long a test waits for what takes no time at all."""

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)


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
    )


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks go on until something is so."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not become so"
        await asyncio.sleep(0)
