"""A job that fails twice and recovers: exponential backoff, visible as retries of one run."""

from taskadapter import (
    Listener,
    RetryConfiguration,
    RetryStrategy,
    TriggerConfiguration,
    current_run,
)

flaky_listener = Listener(
    trigger=TriggerConfiguration(interval=20, max_count=2),
    retry_config=RetryConfiguration(
        max_attempts=5,
        retry_interval=0.5,
        backoff_strategy=RetryStrategy.EXPONENTIAL,
        max_interval=4,
    ),
)


@flaky_listener.service("flaky")
def fetch_rates() -> None:
    """Ask a service that answers at the third attempt: waits half a second, then one."""
    attempt = current_run().attempt
    if attempt < 3:
        raise ConnectionError(f"no answer to attempt {attempt}")
    print("Recovered at attempt", attempt)
