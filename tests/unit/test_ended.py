"""What an agent says of a job that is over."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from taskadapter.agent.jobs import OVER_ALREADY, Deployments


class Ending(Deployments):
    """Puts nothing away."""

    async def _end(self, job: Any, _: str) -> None:
        del self._ending[job.deployment.id]


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ([OVER_ALREADY] * 3, ["Job flow/job is over already; what is planned of it is skipped."]),
        (["it has run 3 times", OVER_ALREADY], ["Job flow/job has ended: it has run 3 times."]),
        (
            [OVER_ALREADY, "it failed"],
            [
                "Job flow/job is over already; what is planned of it is skipped.",
                "Job flow/job has ended: it failed.",
            ],
        ),
    ],
)
def test_that_a_job_is_over_already_is_said_once(caplog, reasons, said):
    """However many ticks of it are still planned; not where this node has said why it ended."""
    job: Any = SimpleNamespace(name="flow/job", deployment=SimpleNamespace(id=uuid4()))
    client: Any = None
    told: list[str] = []

    async def go() -> None:
        deployments = Ending(client, logging.getLogger("agent"), lambda _, why: told.append(why))
        for reason in reasons:
            deployments.end(job, reason)
            await deployments.wait_for_ends()

    with caplog.at_level("INFO"):
        asyncio.run(go())
    assert [record.getMessage() for record in caplog.records] == said
    assert len(told) == len(said)
