"""The runners that are compared, and how each of them gets the job."""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prefect.client.orchestration import SyncPrefectClient

    from taskadapter import Listener

PROJECT = Path(__file__).parents[2]
INTERVAL = 2.0  # seconds between two ticks of the job


@dataclass(frozen=True)
class Runner:
    """A way to run the job: `prefect worker start --pool POOL --type KIND OPTIONS`.

    Attributes:
        name: What tables call it.
        kind: The type of its worker.
        pool: The work pool to which `deploy` deploys.
        deploy: Deploys the job, active, to a server that does not know the pool yet.
        options: More of the command line.
        drains: Whether it is also measured after an outage.
        env: What it finds in its environment besides.
    """

    name: str
    kind: str
    pool: str
    deploy: Callable[[SyncPrefectClient], UUID]
    options: tuple[str, ...] = ()
    drains: bool = True
    env: Mapping[str, str] = field(default_factory=dict, hash=False)


def deploy_plain(client: SyncPrefectClient) -> UUID:
    """Deploy the plain flow with what `prefect deploy` writes for code on this machine."""
    client.create_work_pool(WorkPoolCreate(name="bench", type="process"))
    every = IntervalSchedule(interval=dt.timedelta(seconds=INTERVAL))
    here = {"prefect.deployments.steps.set_working_directory": {"directory": str(PROJECT)}}
    return client.create_deployment(
        client.create_flow_from_name("tick"),
        "bench",
        schedules=[DeploymentScheduleCreate(schedule=every, active=True)],
        work_pool_name="bench",
        entrypoint="tests/benchmarks/plain.py:tick",
        pull_steps=[here],
    )


def deploy_declared(_: SyncPrefectClient) -> UUID:
    """Deploy the declared service as its listener would."""
    from tests.benchmarks.declared import listener

    return _deploy(listener)


def deploy_frames(_: SyncPrefectClient) -> UUID:
    """Deploy the job that imports pandas."""
    from tests.benchmarks.frames import listener

    return _deploy(listener)


def _deploy(listener: Listener) -> UUID:
    from taskadapter.deploy import deploy

    return asyncio.run(deploy(listener))["bench"].id


BASELINE = Runner("process, limit 2", "process", "bench", deploy_plain, ("--limit", "2"))
AGENT = Runner("taskadapter", "warm-backup", "taskadapter", deploy_declared, ("--limit", "2"))
RUNNERS = (
    # Without a limit a backlog is a hundred processes at once: it would measure the machine.
    Runner("process", "process", "bench", deploy_plain, drains=False),
    BASELINE,
    AGENT,
)
PRELOAD = "PREFECT_INTEGRATIONS_TASKADAPTER_PRELOAD"
IMPORTING = (
    replace(AGENT, name="imported by each run", deploy=deploy_frames),
    replace(AGENT, name="preloaded", deploy=deploy_frames, env={PRELOAD: "pandas"}),
)
"""The job that imports pandas, without and with its being imported once for all runs."""
