"""The job as this project declares it: the seed's counter, whose state is saved after each run."""

import time

from taskadapter import Listener, Service, TriggerConfiguration, current_run
from tests.benchmarks import ledger

listener = Listener(trigger=TriggerConfiguration(interval=2))


@listener.service("bench")
class Counter(Service):
    """Counts, and does next to nothing else."""

    i: int = 1

    def execute(self) -> None:
        """Count."""
        began = time.time()
        ledger.append(current_run().scheduled_time.timestamp(), began)
        self.i += 1
