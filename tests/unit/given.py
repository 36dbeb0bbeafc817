"""What several of the unit tests begin with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun

if TYPE_CHECKING:
    from uuid import UUID

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
