"""One of many jobs: it leaves a line in the ledger, or waits to be cancelled."""

import time

from taskadapter import Service, current_run
from tests.benchmarks import ledger


class Crowded(Service):
    """Does next to nothing."""

    def execute(self) -> None:
        """Leave a line."""
        began = time.time()
        ledger.append(current_run().scheduled_time.timestamp(), began)


class Endless(Service):
    """Goes on until somebody ends it."""

    def execute(self) -> None:
        """Leave a line, and wait."""
        began = time.time()
        ledger.append(current_run().scheduled_time.timestamp(), began)
        time.sleep(600)
