"""Coordination at scale: what a heartbeat costs a node, and its database, for many groups and standbys."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import psutil

from taskadapter.coordination.engines import Timeouts, exclusive, open_engine
from taskadapter.coordination.messages import Token
from taskadapter.coordination.nodes import Node, register
from taskadapter.coordination.schema import create_missing
from taskadapter.coordination.tokens import acquire, pulse
from tests.benchmarks.measure import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from deployments.local import Postgres
    from tests.benchmarks.bench import Figures

INTERVAL = 10.0
BEAT = 1.0


def renewals(database: Postgres, groups: int, standbys: int = 0, beats: int = 60) -> Figures:
    """Return what the heartbeats of a node that holds so many groups' tokens take and cost.

    Args:
        database: a server; a database of its own is made.
        groups: how many.
        standbys: how many other nodes, each of its own connection, stand by for the groups.
        beats: how many heartbeats, one a second.
    """
    name = f"groups_{uuid.uuid4().hex}"
    database.create_database(name)
    names = [f"group-{n:04d}" for n in range(groups)]
    with _connected(database.url(name)) as connection, ExitStack() as stack:
        me, tokens = _take(connection, names)
        for n in range(standbys):
            stack.enter_context(_standby(database.url(name), n, groups))
        gc.collect()
        gc.freeze()  # as an agent does: what this process has imported is more than that has
        used = _cpu(database)
        seconds = []
        for _ in range(beats):
            began = time.monotonic()
            answer = pulse(connection, me, tokens, names, INTERVAL)
            seconds.append(time.monotonic() - began)
            assert all(sighting.renewed for sighting in answer.sightings)
            time.sleep(max(0.0, began + BEAT - time.monotonic()))
        cpu = (_cpu(database) - used) / (beats * BEAT)
    return {
        "p50": percentile(seconds, 0.5) * 1000,
        "p99": percentile(seconds, 0.99) * 1000,
        "cpu": cpu * 100,
    }


def _take(connection: Connection, names: list[str]) -> tuple[Node, list[Token]]:
    create_missing(connection)
    me = Node("active", str(uuid.uuid4()), "here", 1)
    with exclusive(connection):
        register(connection, me, names, INTERVAL)
    with exclusive(connection):
        taken = acquire(connection, me, names, INTERVAL).taken
    assert len(taken) == len(names)
    return me, [Token(one.group_id, me.task_id, one.term) for one in taken]


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    """Connect as a node's courier does: each statement commits."""
    engine = open_engine(url, timeouts=Timeouts(connect=5, statement=5, idle=60), pre_ping=False)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection
    engine.dispose()


@contextmanager
def _standby(url: str, number: int, groups: int) -> Iterator[None]:
    """Stand by in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.groups", url, str(number), str(groups)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has sent its first heartbeat
        yield
    finally:
        process.kill()
        process.communicate()


def _cpu(database: Postgres) -> float:
    """Return the CPU seconds of this process, and of the database's."""
    server = psutil.Process(database.pid)
    times = [process.cpu_times() for process in [server, *server.children()]]
    return time.process_time() + sum(spent.user + spent.system for spent in times)


def _stand_by(url: str, number: str, groups: str) -> None:
    names = [f"group-{n:04d}" for n in range(int(groups))]
    me = Node(f"standby-{number}", str(uuid.uuid4()), "here", 1)
    with _connected(url) as connection:
        with exclusive(connection):
            register(connection, me, names, INTERVAL)
        while True:
            pulse(connection, me, [], names, INTERVAL)
            print("stands by", flush=True)
            time.sleep(BEAT)


if __name__ == "__main__":
    _stand_by(*sys.argv[1:])
