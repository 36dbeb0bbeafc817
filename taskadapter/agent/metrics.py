"""What an agent counts, for Prometheus.

Prefect's own server of client metrics serves it, where `PREFECT_CLIENT_METRICS_ENABLED` is true, on
`PREFECT_CLIENT_METRICS_PORT` (4201).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prefect.settings import PREFECT_CLIENT_METRICS_PORT
from prefect.utilities.services import start_client_metrics_server
from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from taskadapter.agent.health import Condition

if TYPE_CHECKING:
    from collections.abc import Iterator
    from logging import Logger, LoggerAdapter

    from prometheus_client.metrics_core import Metric

    from taskadapter.agent.dispatcher import Dispatcher
    from taskadapter.agent.hand import Hand
    from taskadapter.agent.health import Health
    from taskadapter.agent.hosts import HostPool
    from taskadapter.agent.membership import Membership

_POOL = "work_pool"

TICKS = Counter(
    "taskadapter_ticks",
    "Ticks that have begun in time (run), after their job's waiting time (late), or not at all (skipped).",
    [_POOL, "outcome"],
)
LATENESS = Histogram(
    "taskadapter_lateness_seconds",
    "From a tick's scheduled time to the beginning of its body.",
    [_POOL],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
RENEWAL = Histogram(
    "taskadapter_heartbeat_seconds",
    "How long a heartbeat takes, which renews all tokens of the node.",
    [_POOL],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
REQUESTS = Counter(
    "taskadapter_api_requests",
    "Requests of the agent itself to Prefect's API; its runs make their own.",
    [_POOL],
)


def beat(work_pool: str, seconds: float) -> None:
    """Count a heartbeat that took so long."""
    RENEWAL.labels(work_pool).observe(seconds)


def begun(work_pool: str, late: float, waiting_time: float) -> None:
    """Count a tick that has begun so many seconds late; what is within the waiting time is in time."""
    LATENESS.labels(work_pool).observe(max(0.0, late))
    TICKS.labels(work_pool, "run" if late <= waiting_time else "late").inc()


def skipped(work_pool: str) -> None:
    """Count a tick that is not run."""
    TICKS.labels(work_pool, "skipped").inc()


@dataclass(frozen=True, eq=False)
class Source:
    """An agent that gauges are read from, between `show` and `hide`.

    Attributes:
        work_pool: whose flows it runs.
        membership: its part in the groups.
        hosts: its processes.
        hand: its runs.
        health: its own.
        dispatcher: what waits for its moment, or for room.
    """

    work_pool: str
    membership: Membership
    hosts: HostPool
    hand: Hand
    health: Health
    dispatcher: Dispatcher


def can_serve(log: Logger | LoggerAdapter[Any]) -> bool:
    """Have Prefect serve all metrics, if it is to; the log says why it cannot."""
    try:
        start_client_metrics_server()
    except OSError as fault:
        port = PREFECT_CLIENT_METRICS_PORT.value()
        log.warning("The metrics cannot be served on port %d, and are not: %s", port, fault)
        return False
    return True


def show(source: Source) -> None:
    """Show an agent's gauges."""
    _GAUGES.sources.append(source)


def hide(source: Source) -> None:
    """Show an agent's gauges no longer."""
    if source in _GAUGES.sources:
        _GAUGES.sources.remove(source)


class _Gauges(Collector):
    """What is so at the moment at which somebody asks, of all agents of this process."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def collect(self) -> Iterator[Metric]:
        """Return the gauges; called in a thread of the metrics' server."""
        active = _gauge("group_active", "1 where the node is active for a group, 0 on standby.", "group")
        term = _gauge("group_term", "The term in which the node is active.", "group")
        left = _gauge("lease_left_seconds", "How long the node may go on without a heartbeat.", "group")
        met = _gauge(
            "condition", "1 where the node has what it needs; 0 fails its health check.", "condition"
        )
        busy = _gauge("processes_busy", "Runs that the node has in hand.")
        limit = _gauge("processes_limit", "How many there may be at once.")
        late = _gauge("oldest_tick_seconds", "For how long the oldest tick is due that has not begun here.")
        for one in list(self.sources):
            pool, held, unmet = one.work_pool, dict(one.membership.active), one.health.unmet()
            for name in one.membership.groups:
                active.add_metric([pool, name], name in held)
            for name, token in held.items():
                term.add_metric([pool, name], token.term)
                left.add_metric([pool, name], one.membership.seconds_left(token))
            for condition in Condition:
                met.add_metric([pool, condition], condition not in unmet)
            busy.add_metric([pool], len(one.hand))
            limit.add_metric([pool], one.hosts.limit)
            late.add_metric([pool], one.dispatcher.longest_late(datetime.now(UTC)))
        yield from (active, term, left, met, busy, limit, late)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"taskadapter_{name}", text, labels=[_POOL, *labels])


_GAUGES = _Gauges()
REGISTRY.register(_GAUGES)
