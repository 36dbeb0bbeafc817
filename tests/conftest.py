"""What tests of every kind share: a Prefect of their own, and real servers for those that ask.

The servers start when the first test asks for them, once a session; unit tests never do.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol
from sqlalchemy import create_engine, make_url, text

# Before anything imports Prefect: its settings come from here and not from who runs the tests, and
# a client without a server is an error instead of the silent start of a temporary one.
for _name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[_name]
_home = tempfile.mkdtemp(prefix="taskadapter-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {
    "PREFECT_HOME": _home,
    "PREFECT_PROFILES_PATH": f"{_home}/profiles.toml",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

from deployments.local import Postgres, PrefectServer, postgres, prefect_server  # noqa: E402 - see above
from tests.slowness import Slowness  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _pytest.terminal import TerminalReporter
    from prefect.client.orchestration import SyncPrefectClient


WORKER = os.environ.get("PYTEST_XDIST_WORKER")
"""Which of several processes that share the tests this is, such as `gw0`; None where one runs them all."""

LONGEST = [
    "acceptance/test_failover.py",
    "acceptance/test_outcomes.py",
    "acceptance/test_schedule.py",
    "acceptance/test_ledger.py",
    "acceptance/test_program.py",
    "acceptance/test_succession.py",
    "integration/test_deploy.py",
    "acceptance/test_process.py",
    "integration/test_doctor.py",
    "contract/test_heartbeat.py",
    "acceptance",
    "integration",
    "contract",
]
"""What takes longest, in that order: the files of half a minute and more, then the rest of each folder."""


MOST_WORKERS = 4
"""More of them would start more servers than they save time."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Share the tests among one worker more than there are cores: each waits a third of its time."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    # Those that this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the tests, begin with what takes longest, so that none is left with it."""

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        names = f"{folder}/{item.path.name}", folder
        return next((LONGEST.index(name) for name in names if name in LONGEST), len(LONGEST))

    if WORKER is not None:
        items.sort(key=place)


class AtOnce:
    """Says of each failure at once what it was: a run that is broken off is not broken off in vain."""

    def __init__(self, terminal: TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write one line of a test that has failed, its set-up or its end included."""
        if report.failed:
            what = getattr(report.longrepr, "reprcrash", None) or report.longrepr
            self.terminal.write_line(f"\n{report.nodeid} failed ({report.when}): {what}")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Tell of failures as they come, where this process is the one that tells."""
    plugins = session.config.pluginmanager
    if WORKER is None and (terminal := plugins.get_plugin("terminalreporter")):
        plugins.register(AtOnce(terminal))


TRIES = 3
"""How often a test that presupposes a machine which goes on is made at most."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Repeat a test that has failed while the machine stood still for longer than its mark allows.

    A lease of seconds is lost then, as it is to be, and what the test wanted to see was not there. A
    failure on a machine that has gone on is one, and so is the third.
    """
    mark = item.get_closest_marker("undisturbed")
    if mark is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(TRIES)):
        with Slowness() as slowness:
            # What is shared with other tests stays until it is known that this one is over.
            reports = runtestprotocol(item, log=False, nextitem=item.parent)  # type: ignore[arg-type]
        if not left or slowness.longest() < mark.args[0] or not any(report.failed for report in reports):
            break
        item.user_properties.append(("stood still, and is repeated", slowness.longest()))
        item._initrequest()  # type: ignore[attr-defined]
    over = pytest.CallInfo.from_call(
        lambda: item.session._setupstate.teardown_exact(nextitem), when="teardown"
    )
    if over.excinfo is not None:
        reports.append(item.ihook.pytest_runtest_makereport(item=item, call=over))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture
def slowness() -> Iterator[Slowness]:
    """How slow the machine is during a test."""
    with Slowness() as watch:
        yield watch


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A private PostgreSQL; tests that write create a database of their own in it."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mysql_url() -> Iterator[str]:
    """The database that the environment names, or one beside it for each of several workers."""
    named = make_url(os.environ["TASKADAPTER_TEST_MYSQL_URL"])
    if WORKER is None:
        yield named.render_as_string(hide_password=False)
        return
    own = named.set(database=f"{named.database}_{WORKER}")
    engine = create_engine(named.set(database=None))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE DATABASE IF NOT EXISTS `{own.database}`"))
    yield own.render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.execute(text(f"DROP DATABASE `{own.database}`"))
    engine.dispose()


@pytest.fixture(scope="session")
def prefect_api(
    postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrefectServer]:
    """A real Prefect server on PostgreSQL, shared: tests use names of their own and leave it up.

    What was just deployed is planned by a loop of its scheduler that looks back a second further than it
    waits, and on a busy machine misses some; what it misses waits for the other loop, by default a minute.
    It plans 20 ticks ahead of each job, by default 100: half of the server's work, for jobs that end soon.
    It looks for what runs that were cancelled have left behind at its start, and not each 20 s: for that it
    reads the tasks of each one, and whatever was skipped in the last day is one.
    Where the environment names another `prefect` it is that one's, of another version perhaps.
    """
    postgres_server.create_database("prefect")
    url = postgres_server.url("prefect", driver="asyncpg")
    settings = {
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "20",
        "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "3600",
    }
    command = os.environ.get("TASKADAPTER_TEST_PREFECT")
    with prefect_server(tmp_path_factory.mktemp("prefect"), url, settings, command) as server:
        yield server


@pytest.fixture
def prefect_client(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    """A client of the shared server, which this process also uses for the duration of the test.

    Jobs go with their test: the server plans them for as long as they are there, and marks as late what
    nobody runs.
    """
    with prefect_api.client() as client:
        yield client
        while jobs := client.read_deployments():
            for job in jobs:
                client.delete_deployment(job.id)
