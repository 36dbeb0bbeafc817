"""Count to five: the smallest service with a state, on the active one of several nodes.

Its field survives runs, restarts and failover. Every two seconds, five times; then the job has ended.
"""

from taskadapter import Listener, Service, TriggerConfiguration, WarmBackupConfig

task_listener = Listener(
    trigger=TriggerConfiguration(interval=2, max_count=5),
    warm_backup_config=WarmBackupConfig(
        group_id="task-group-01", liveness_check_interval=3, heartbeat_frequency=0.5
    ),
)


@task_listener.service("counter")
class Counter(Service):
    """Prints 1 to 5, one number every two seconds."""

    i: int = 1

    def execute(self) -> None:
        """Print the number, and remember the next."""
        print("Counter:", self.i)
        self.i += 1


if __name__ == "__main__":  # `python flows/counter.py` deploys it, and is a node until Ctrl-C or SIGTERM
    with task_listener:
        task_listener.wait()
