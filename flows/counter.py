"""Count to five: the smallest service with a state.

Its field survives runs, restarts and failover. Every two seconds, five times; then the job has ended.
"""

from taskadapter import Listener, Service, TriggerConfiguration

task_listener = Listener(trigger=TriggerConfiguration(interval=2, max_count=5))


@task_listener.service("counter")
class Counter(Service):
    """Prints 1 to 5, one number every two seconds."""

    i: int = 1

    def execute(self) -> None:
        """Print the number, and remember the next."""
        print("Counter:", self.i)
        self.i += 1
