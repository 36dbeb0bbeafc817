"""A job whose module imports pandas, as one that works with tables does."""

import time

import pandas as pd

from taskadapter import Listener, TriggerConfiguration, current_run
from tests.benchmarks import ledger

listener = Listener(trigger=TriggerConfiguration(interval=2))


@listener.service("bench")
def rows() -> None:
    """Make a small table, and leave a line."""
    began = time.time()
    ledger.append(current_run().scheduled_time.timestamp(), began)
    pd.DataFrame({"value": range(3)}).sum()
