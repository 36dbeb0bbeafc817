"""Several agents that stand in for each other, and a ledger table that their flows keep: the only judge.

Each flow writes its rows to the ledger itself, past the agent and past whatever the test does to the
agent's own way to the database. All times in it are the database's, in seconds since the epoch.
"""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from sqlalchemy import create_engine, make_url, text

from deployments.local import wait_until
from taskadapter.coordination import schema
from taskadapter.pools import ensure_work_pool
from taskadapter.prefect_api.pool import Domain
from tests.acceptance.project import PATIENCE, Prefect, Project, due, state_of
from tests.contract.proxy import Proxy
from tests.slowness import Slowness

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from deployments.local import Program

EVERY = 3.0
"""Seconds between two ticks of the counter: a slow machine, too, can do so many, and catch up."""

INTERVAL = 3.0
"""The `liveness_check_interval` of all groups here."""

HEARTBEAT = 0.5
"""Their `heartbeat_frequency`."""

MARGIN = 0.5
"""Seconds that a node stops its runs before another may take over, with that interval.

Where the machine stands still for longer than that nobody can: what goes on then is that of a frozen node.
"""

BUSY, IDLE = "busy", "idle"
"""The groups: one with a job that counts, one with nothing but an hourly job."""

_NOW = {
    "postgresql": "extract(epoch from clock_timestamp())",
    "mysql": "unix_timestamp(current_timestamp(6))",
}
_EPOCH = {"postgresql": "cast(extract(epoch from {0}) as float8)", "mysql": "unix_timestamp({0})"}

_TABLE = """
CREATE TABLE ledger (
    id VARCHAR(36) PRIMARY KEY, job VARCHAR(50), flow_run VARCHAR(36), scheduled DOUBLE PRECISION,
    run_count INT, i INT, node VARCHAR(50), term INT, pid INT, note VARCHAR(500),
    began DOUBLE PRECISION, alive DOUBLE PRECISION, ended DOUBLE PRECISION
)
"""

_KEEPER = """
import os
import time
import uuid
from pathlib import Path

from prefect.runtime import flow_run
from sqlalchemy import create_engine, make_url, text

from taskadapter import (
    Listener, MysqlConfig, PostgresqlConfig, TaskPolicy, TriggerConfiguration, WarmBackupConfig, current_run
)

url = make_url(os.environ["LEDGER_URL"])
# MySQL ends the transaction of a frozen process only if it was told when.
ends = {{"init_command": "SET SESSION wait_timeout = 2"}} if url.get_backend_name() == "mysql" else {{}}
engine = create_engine(url, pool_pre_ping=True, connect_args=ends)
NOW = {now!r}[engine.dialect.name]


class Entry:
    def __init__(self, job, i=None):
        run = current_run()
        self.id, self.job_id = str(uuid.uuid4()), str(run.job_id)
        values = {{
            "id": self.id, "job": job, "flow_run": str(flow_run.id), "i": i, "run_count": run.count,
            "scheduled": run.scheduled_time.timestamp(), "node": run.task_id, "term": run.fencing_token,
            "pid": os.getpid(),
        }}
        names = ", ".join(values)
        marks = ", ".join(":" + name for name in values)
        with engine.begin() as connection:
            connection.execute(
                text(f"INSERT INTO ledger ({{names}}, began, alive) VALUES ({{marks}}, {{NOW}}, {{NOW}})"),
                values,
            )

    def set(self, column, value=NOW, connection=None):
        if connection is None:
            with engine.begin() as connection:
                return self.set(column, value, connection)
        statement = text(f"UPDATE ledger SET {{column}} = {{value}} WHERE id = :id")
        connection.execute(statement, {{"id": self.id}})

    def go_on(self, until):
        while until and not Path(until).exists():
            self.set("alive")
            time.sleep(0.05)

    def end(self):
        self.set("ended")


config = PostgresqlConfig if url.get_backend_name() == "postgresql" else MysqlConfig
database = config(
    host=url.host, port=url.port, user=url.username, password=url.password, database=url.database
)


def listener(group, interval, **policy):
    return Listener(
        trigger=TriggerConfiguration(
            interval=interval,
            start_time={later!r} if interval > {every} else None,
            task_policy=TaskPolicy(**policy),
        ),
        warm_backup_config=WarmBackupConfig(
            group_id=group,
            database_config=database,
            liveness_check_interval={liveness},
            heartbeat_frequency={heartbeat},
        ),
    )
"""

_FLOWS = """
import os
import signal
import threading
import time
from pathlib import Path

from keeper import Entry, engine, listener
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from taskadapter import Service, fenced
from taskadapter.errors import TokenLostError

@listener({busy!r}, {every}).service("counter")
class Counter(Service):
    i: int = 1

    def execute(self) -> None:
        entry = Entry("counter", self.i)
        self.i += 1
        entry.end()


@listener({busy!r}, 3600).service("slow")
def slow(until: str = "") -> None:
    entry = Entry("slow")
    entry.go_on(until)
    entry.end()


@listener({busy!r}, 3600, on_takeover="rerun").service("again")
def again(until: str = "") -> None:
    entry = Entry("again")
    entry.go_on(until)
    entry.end()


@listener({busy!r}, 3600, on_token_loss="finish").service("fencer")
def fencer(until: str = "") -> None:
    entry = Entry("fencer")
    while until and not Path(until).exists():
        try:
            with engine.begin() as connection:
                fenced(connection)
                entry.set("alive", connection=connection)
                if engine.dialect.name == "postgresql":
                    time.sleep(0.2)
        except TokenLostError as lost:
            entry.set("note", "'TokenLostError'")
            raise
        except DBAPIError:
            pass  # the server has ended a transaction that was idle for too long
        time.sleep(0.02)
    entry.end()


@listener({busy!r}, 3600).service("brink")
class Brink(Service):
    # Its process stops when its state is saved, and Prefect does not know yet.
    i: int = 1

    def execute(self) -> None:
        entry = Entry("brink", self.i)
        if self.i == 1:
            threading.Thread(target=stop_when_saved, args=(entry,), daemon=True).start()
        self.i += 1
        entry.end()


def stop_when_saved(entry):
    query = text("SELECT state FROM taskadapter_job WHERE job_id = :job_id")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.execute(query, {{"job_id": entry.job_id}}).scalar() is None:
            time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGSTOP)


@listener({idle!r}, 3600).service("hourly")
def hourly(until: str = "") -> None:
    entry = Entry("hourly")
    entry.go_on(until)
    entry.end()
"""

_HEAVY = """
import time
from pathlib import Path

from keeper import Entry, listener

while Path(__file__).with_name("wait").exists():
    time.sleep(0.05)


@listener({busy!r}, 3600).service("heavy")
def heavy() -> None:
    Entry("heavy").end()
"""


@dataclass(frozen=True)
class Row:
    """What one execution has entered into the ledger.

    `alive` is when it last wrote; `ended` is None if it never came to its end.
    """

    id: str
    job: str
    flow_run: str
    scheduled: float
    run_count: int
    i: int | None
    node: str
    term: int
    pid: int
    note: str | None
    began: float
    alive: float
    ended: float | None

    @property
    def last(self) -> float:
        """The last sign of life."""
        return max(self.alive, self.ended or 0.0)


@dataclass(frozen=True)
class Tenure:
    """Who was given a group's token, and when."""

    term: int
    node: str
    acquired: float
    released: float | None
    reason: str


@dataclass
class Node:
    """One agent, with a way of its own to the database."""

    name: str
    program: Program
    gate: Proxy

    @property
    def log(self) -> str:
        """All that it ever wrote."""
        return self.program.output()

    def signal(self, number: signal.Signals) -> None:
        """Signal the agent alone, and not its hosts."""
        os.kill(self.program.pid, number)

    def drain(self) -> None:
        """Send SIGTERM to an agent that executes something, and wait until it says that it drains."""
        words = "may still end"
        before = self.log.count(words)
        self.signal(signal.SIGTERM)
        wait_until(lambda: self.log.count(words) > before, PATIENCE, f"node {self.name} to drain")

    def wait_for_exit(self, within: float = PATIENCE) -> int:
        """Wait until the agent has ended, and return its exit status."""
        assert self.program.process is not None
        return self.program.process.wait(within)


@dataclass
class Cluster:
    """Agents of one pool over one database.

    Args:
        url: the database, reached directly.
        project: an empty folder, and the pool.
        prefect: the API.
    """

    url: str
    project: Project
    prefect: Prefect
    nodes: dict[str, Node] = field(default_factory=dict)
    paused: set[int] = field(default_factory=set)
    """The terms in which the busy group's holder was frozen with its hosts, on purpose."""

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self.slowness = self._stack.enter_context(Slowness())
        self.engine = create_engine(self.url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
        self.dialect = self.engine.dialect.name
        self.project.env["LEDGER_URL"] = self.url
        self._stack.callback(self.engine.dispose)

    def close(self) -> None:
        """Stop every agent, and delete the jobs: those of the next cluster have the same names."""
        self._stack.close()
        self.prefect.delete_jobs(self.project.pool)

    # --- set up -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the ledger, the flows and the pool; agents may be started then."""
        with self.engine.connect() as connection:
            connection.execute(text(_TABLE))
        later = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
        keeper = _KEEPER.format(now=_NOW, later=later, every=EVERY, liveness=INTERVAL, heartbeat=HEARTBEAT)
        self.project.write("keeper.py", keeper)
        self.project.write("flows/jobs.py", _FLOWS.format(busy=BUSY, idle=IDLE, every=EVERY))
        self.project.write("flows/heavy.py", _HEAVY.format(busy=BUSY))
        domain = Domain(liveness_check_interval=INTERVAL, heartbeat_frequency=HEARTBEAT)
        ensure_work_pool(self.project.pool, domain)

    def add_node(self, name: str) -> Node:
        """Start one more agent."""
        url = make_url(self.url)
        assert url.host is not None
        gate = Proxy(url.host, url.port or 3306)
        self._stack.callback(gate.close)
        ours = url.set(host="127.0.0.1", port=gate.port).render_as_string(hide_password=False)
        env = {"PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_URL": ours}
        program = self._stack.enter_context(self.project.agent(name, env=env))
        self.nodes[name] = Node(name, program, gate)
        return self.nodes[name]

    def ready(self, nodes: int = 2) -> None:
        """Wait until so many agents take part, and the busy group's jobs run.

        One of three may still be starting, after what the last test has done to it.
        """
        query = text(
            "SELECT task_id FROM taskadapter_node "
            f"WHERE {_EPOCH[self.dialect].format('last_seen')} > {_NOW[self.dialect]} - 1"
        )

        wait_until(self._has_tables, PATIENCE, "the nodes to make their tables")
        wait_until(lambda: len(self._read(query)) >= nodes, PATIENCE, f"{nodes} nodes to take part")
        wait_until(self._counts, PATIENCE, "the counter to count")

    def taskadapter(self, *args: str) -> str:
        """Run our own command; its password comes from the block that the declaration has made."""
        return self.project.taskadapter(*args)

    # --- reading ----------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the time on the database's clock."""
        return float(self._read(text(f"SELECT {_NOW[self.dialect]}"))[0][0])

    def rows(self, job: str | None = None, run: FlowRun | None = None) -> list[Row]:
        """Return what was entered, of all jobs, one, or one run, in the order of beginning."""
        found = [Row(*row) for row in self._read(text("SELECT * FROM ledger ORDER BY began"))]
        return [
            row for row in found if job in {None, row.job} and (run is None or row.flow_run == str(run.id))
        ]

    def tenures(self, group: str = BUSY) -> list[Tenure]:
        """Return who held a group's token, oldest first."""
        epoch = _EPOCH[self.dialect]
        query = text(
            f"SELECT term, task_id, {epoch.format('acquired')}, {epoch.format('released')}, reason "
            "FROM taskadapter_tenure WHERE group_id = :group ORDER BY term"
        ).bindparams(group=group)
        return [
            Tenure(term, node, float(acquired), None if released is None else float(released), reason)
            for term, node, acquired, released, reason in self._read(query)
        ]

    def active(self, group: str = BUSY) -> Node:
        """Return the node that was given the token last."""
        return self.nodes[self.tenures(group)[-1].node]

    def term(self, group: str = BUSY) -> int:
        """Return the term that began last."""
        return self.tenures(group)[-1].term

    def _counts(self) -> bool:
        """Return whether the node that has the token now has run the counter's tick, or the one before."""
        rows = self.rows("counter")
        return bool(rows) and rows[-1].term == self.term() and self.now() - rows[-1].began < EVERY

    def _has_tables(self) -> bool:
        with self.engine.connect() as connection:
            return not schema.missing_tables(connection)

    def _read(self, query: Any) -> list[Any]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query).all()]

    # --- doing and waiting ------------------------------------------------------------------------

    def start(self, job: str, until: Path) -> FlowRun:
        """Start a run that goes on until a file is there, and wait for its body to begin."""
        run = self.prefect.start(job, parameters={"until": str(until)})
        wait_until(lambda: self.rows(run=run), PATIENCE, f"{job} to begin")
        return run

    def wait_for_term(self, after: int, group: str = BUSY, within: float = PATIENCE) -> Tenure:
        """Wait for the term that follows one."""

        def next_term() -> Tenure | None:
            later = [tenure for tenure in self.tenures(group) if tenure.term > after]
            return later[0] if later else None

        tenure = wait_until(next_term, within, f"the term after {after} of group {group}")
        assert tenure is not None
        return tenure

    def wait_for_execution(self, term: int, within: float = PATIENCE) -> Row:
        """Wait for the first execution of the busy group in a term or a later one."""

        def first() -> Row | None:
            later = [row for row in self.rows() if row.term >= term and row.job != "hourly"]
            return later[0] if later else None

        row = wait_until(first, within, f"an execution in term {term}")
        assert row is not None
        return row

    # --- judging ----------------------------------------------------------------------------------

    def wait_for_ticks(self, until: float) -> None:
        """Wait until the counter has run a tick that is due after a time, and all before it."""
        wait_until(
            lambda: any(row.scheduled > until and row.ended for row in self.rows("counter")),
            PATIENCE,
            "the counter to catch up",
        )

    def crashed(self, job: str) -> dict[str, FlowRun]:
        """Return the runs of a job that show as Crashed, by id."""
        found = self.prefect.client.read_flow_runs(
            deployment_filter=DeploymentFilter(
                id=DeploymentFilterId(any_=[self.prefect.deployment(job).id])
            ),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED]))
            ),
        )
        return {str(run.id): run for run in found}

    def lost_ticks(self) -> list[str]:
        """Return the ticks of the counter, up to its last, that have neither a row nor a reason.

        A reason is that the run shows as Crashed and says on which node, or that a signal has ended it: it
        was killed in the moment between the start of its execution and its entry.
        """
        due_ticks = [row.scheduled for row in self.rows("counter")]
        first, last = min(due_ticks), max(due_ticks)

        def number(tick: float) -> int:
            return round((tick - first) / EVERY)

        missing = set(range(number(last))) - {number(tick) for tick in due_ticks}
        if missing:
            crashed = self.crashed("counter").values()
            reasons = ("termination signal", *self.nodes)
            explained = [run for run in crashed if any(reason in message(run) for reason in reasons)]
            missing -= {number(due(run).timestamp()) for run in explained}
        return [self._tell(first + EVERY * one) for one in sorted(missing)]

    def _tell(self, tick: float) -> str:
        near = FlowRunFilterExpectedStartTime(
            after_=datetime.fromtimestamp(tick - 0.6, UTC), before_=datetime.fromtimestamp(tick + 0.6, UTC)
        )
        runs = self.prefect.client.read_flow_runs(flow_run_filter=FlowRunFilter(expected_start_time=near))
        return "\n".join([f"{datetime.fromtimestamp(tick, UTC)}:", *map(self._history, runs)])

    def _history(self, run: FlowRun) -> str:
        """Return the states a run has been in, and what the nodes have logged of it."""
        states = self.prefect.history(run)
        history = [f"{state.timestamp:%T.%f} {state.name}: {state.message or ''}" for state in states]
        logged = [
            f"{name}: {line}"
            for name, node in self.nodes.items()
            for line in node.log.splitlines()
            if run.name in line
        ]
        return "\n".join([f"{run.name}, due {due(run)}, made {run.created}", *history, *logged])

    def counted(self) -> list[int | None]:
        """Return the counter's field in the order of executions.

        An execution that crashed has saved nothing: the next one begins with the same number, and
        stands for both.
        """
        rows = self.rows("counter")
        numbers = Counter(row.i for row in rows)
        crashed = self.crashed("counter") if len(numbers) < len(rows) else {}
        return [row.i for row in rows if numbers[row.i] == 1 or row.flow_run not in crashed]

    def doubled(self) -> list[list[Row]]:
        """Return the ticks that were started more than once, but for the job that asks for it."""
        ticks = defaultdict(list)
        for row in self.rows():
            ticks[row.job, row.scheduled].append(row)
        return [rows for (job, _), rows in ticks.items() if len(rows) > 1 and job != "again"]

    def overlapping(self) -> list[tuple[Row, Row]]:
        """Return the executions of the busy group which began while one of an earlier term lived."""
        rows = [row for row in self.rows() if row.job != "hourly"]
        return [
            (earlier, later)
            for earlier in rows
            for later in rows
            if earlier.term < later.term and later.began <= self._end_of(earlier)
        ]

    def _end_of(self, row: Row) -> float:
        # What code does that was frozen and does not ask for the token is its own affair.
        return row.began if self._was_frozen(row) and row.job != "fencer" else row.last

    def _was_frozen(self, row: Row) -> bool:
        stood_still = self.slowness.longest(row.scheduled, row.last)
        return row.term in self.paused or stood_still >= MARGIN

    def in_order(self) -> list[Row]:
        """Return the executions of the busy group that no frozen node has entered, in that order."""
        return [row for row in self.rows() if row.job != "hourly" and not self._was_frozen(row)]


def message(run: FlowRun) -> str:
    """Return what the UI says of a run's state."""
    return state_of(run).message or ""
