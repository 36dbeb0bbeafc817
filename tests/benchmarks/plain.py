"""The job as a plain Prefect flow, for Prefect's process worker."""

import time

from prefect import flow
from prefect.runtime import flow_run

from tests.benchmarks import ledger


@flow
def tick() -> None:
    """Do next to nothing."""
    began = time.time()
    ledger.append(flow_run.scheduled_start_time.timestamp(), began)
