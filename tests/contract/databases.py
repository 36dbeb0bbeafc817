"""What tests do to a database that the package itself never does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, TypeVar

from sqlalchemy import Connection, Engine, text

from taskadapter.coordination.engines import transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_REWOUND = {
    "postgresql": "{0} - :seconds * interval '1 second'",
    "mysql": "{0} - INTERVAL :seconds * 1000000 MICROSECOND",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f', {0}, '-' || :seconds || ' seconds')",
}


def rewind(engine: Engine, table: str, column: str, seconds: float) -> None:
    """Make the moments of a column older, as if that time had passed."""
    moment = _REWOUND[engine.dialect.name].format(column)
    with transaction(engine) as connection:
        connection.execute(text(f"UPDATE {table} SET {column} = {moment}"), {"seconds": seconds})


def race(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Start all calls at the same moment, each in a thread, and return their results."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait(timeout=120)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


class BallerinaNode:
    """The statements of a node of Ballerina's task module, as its public source has them."""

    _UPSERTS: ClassVar = {
        "postgresql": "ON CONFLICT ({keys}) DO UPDATE SET {changes}",
        "sqlite": "ON CONFLICT ({keys}) DO UPDATE SET {changes}",
        "mysql": "ON DUPLICATE KEY UPDATE {changes}",
    }

    def __init__(self, connection: Connection, task_id: str, group_id: str, interval: int) -> None:
        self.connection, self.interval = connection, interval
        self.names = {"task_id": task_id, "group_id": group_id}

    def heartbeat(self) -> None:
        """What its scheduler does every `heartbeatFrequency`, active or not."""
        insert = (
            "INSERT INTO health_check(task_id, group_id, last_heartbeat) "
            "VALUES (:task_id, :group_id, CURRENT_TIMESTAMP) "
        )
        self._upsert(insert, "task_id, group_id", "last_heartbeat = CURRENT_TIMESTAMP")

    def has_token(self) -> bool:
        """What an active one asks before each execution."""
        query = "SELECT task_id FROM token_holder WHERE task_id = :task_id AND group_id = :group_id"
        found = self.connection.execute(text(query), self.names).first() is not None
        self.connection.commit()
        return found

    def try_to_acquire(self) -> bool:
        """What a standby does at each tick."""
        acquired = self._attempt()
        self.connection.commit()
        return acquired

    def _attempt(self) -> bool:
        query = text("SELECT task_id FROM token_holder WHERE group_id = :group_id")
        holder = self.connection.execute(query, self.names).scalar()
        if holder is None:
            return self._take()
        if holder == self.names["task_id"]:
            return True
        age = self._seconds_since_heartbeat(holder)
        return (age is None or age > self.interval) and self._take()

    def _seconds_since_heartbeat(self, holder: str) -> int | None:
        now = self.connection.execute(text("SELECT CURRENT_TIMESTAMP")).scalar_one()
        query = (
            "SELECT last_heartbeat FROM health_check WHERE task_id = :task_id "
            "AND group_id = :group_id ORDER BY last_heartbeat DESC LIMIT 1"
        )
        names = {**self.names, "task_id": holder}
        last = self.connection.execute(text(query), names).scalar()
        if last is None:
            return None
        # Its driver reads a TIMESTAMP without a zone in the zone of the session.
        same_kind = now if last.tzinfo is not None else now.replace(tzinfo=None)
        return int((same_kind - last).total_seconds())

    def _take(self) -> bool:
        insert = "INSERT INTO token_holder(task_id, group_id, term) VALUES (:task_id, :group_id, 1) "
        changes = "task_id = :task_id, term = token_holder.term + 1"
        self._upsert(insert, "group_id", changes)
        return True

    def _upsert(self, insert: str, keys: str, changes: str) -> None:
        clause = self._UPSERTS[self.connection.dialect.name]
        statement = insert + clause.format(keys=keys, changes=changes)
        self.connection.execute(text(statement), self.names)
        self.connection.commit()


BALLERINA_TABLES = (
    "CREATE TABLE token_holder (task_id VARCHAR(255) NOT NULL, "
    "group_id VARCHAR(255) NOT NULL PRIMARY KEY, term INT NOT NULL)",
    "CREATE TABLE health_check (task_id VARCHAR(255), group_id VARCHAR(36), "
    "last_heartbeat TIMESTAMP, PRIMARY KEY (task_id, group_id))",
)
"""The tables as its example has them."""
