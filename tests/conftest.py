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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.orchestration import SyncPrefectClient


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A private PostgreSQL; tests that write create a database of their own in it."""
    with postgres() as server:
        yield server


@pytest.fixture(scope="session")
def prefect_api(
    postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrefectServer]:
    """A real Prefect server on PostgreSQL, shared: tests use names of their own and leave it up.

    Where the environment names another `prefect` it is that one's, of another version perhaps.
    """
    postgres_server.create_database("prefect")
    url = postgres_server.url("prefect", driver="asyncpg")
    command = os.environ.get("TASKADAPTER_TEST_PREFECT")
    with prefect_server(tmp_path_factory.mktemp("prefect"), url, command=command) as server:
        yield server


@pytest.fixture
def prefect_client(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    """A client of the shared server, which this process also uses for the duration of the test."""
    with prefect_api.client() as client:
        yield client
