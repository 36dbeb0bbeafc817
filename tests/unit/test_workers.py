"""Which of the workers that poll a pool are none of its nodes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from taskadapter.prefect_api.workers import strangers


@pytest.mark.parametrize(
    ("worker", "is_one"),
    [
        ({}, True),
        ({"heartbeat_interval_seconds": None}, True),
        ({"name": "node-1"}, False),
        ({"status": "OFFLINE"}, False),
        # It was stopped: Prefect takes it for online for a while, and it has not polled when it would have.
        ({"seconds": 50}, False),
        ({"seconds": 50, "heartbeat_interval_seconds": 60}, True),
    ],
)
def test_who_polls_a_pool_and_is_no_node_of_it(worker: dict[str, Any], is_one: bool) -> None:
    """It coordinates elsewhere, or not at all."""
    then = datetime.now(UTC) - timedelta(seconds=worker.pop("seconds", 12))
    usual = {"name": "node-3", "status": "ONLINE", "heartbeat_interval_seconds": 30}
    found: Any = SimpleNamespace(last_heartbeat_time=then, **(usual | worker))

    assert strangers([found], {"node-1", "node-2"}) == ([found] if is_one else [])
