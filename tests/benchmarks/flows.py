"""The job that every runner runs: the seed's, as trivial as a job can be."""

import os
import time

from prefect import flow
from prefect.runtime import flow_run


@flow
def tick(ledger: str) -> None:
    """Append one line: the moment this run was due, the moment its body began, its process."""
    began = time.time()
    due = flow_run.scheduled_start_time.timestamp()
    with open(ledger, "a") as file:  # noqa: PTH123 - one write of one line, appended whole
        file.write(f"{due} {began} {os.getpid()}\n")
