"""A canary: one tick a second, on exactly one of several nodes, that proves itself.

Each tick compares its scheduled time with the one before, which its state remembers across restarts
and failover. Where PULSE_LEDGER names the coordination database, every tick also leaves a row there,
written under the node's token: a node that was paused and overtaken cannot write it.
"""

import os
from datetime import datetime

from sqlalchemy import create_engine, text

from taskadapter import (
    ErrorPolicy,
    Listener,
    Service,
    TaskPolicy,
    TriggerConfiguration,
    WarmBackupConfig,
    current_run,
    fenced,
)

pulse_listener = Listener(
    trigger=TriggerConfiguration(interval=1),
    task_policy=TaskPolicy(error_policy=ErrorPolicy.LOG_AND_CONTINUE),
    warm_backup_config=WarmBackupConfig(
        group_id="task-group-01", liveness_check_interval=3, heartbeat_frequency=0.5
    ),
)

INSERT = text("INSERT INTO pulse (scheduled, count, node, term) VALUES (:scheduled, :count, :node, :term)")


@pulse_listener.service("pulse")
class Pulse(Service):
    """Ticks every second and says how long after the tick before."""

    last: datetime | None = None

    def execute(self) -> None:
        """Note this tick, compare it with the last."""
        run = current_run()
        since = "the first" if self.last is None else f"{run.scheduled_time - self.last} after the last"
        print(f"Tick {run.count} on {run.task_id}, term {run.fencing_token}: {since}.")
        if url := os.environ.get("PULSE_LEDGER"):
            engine = create_engine(url)
            with engine.begin() as connection:
                fenced(connection)
                row = {"scheduled": run.scheduled_time, "count": run.count, "node": run.task_id}
                connection.execute(INSERT, row | {"term": run.fencing_token})
            engine.dispose()
        self.last = run.scheduled_time
