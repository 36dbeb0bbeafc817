"""One suite, every database: SQLite always, the others where there is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine, QueuePool, delete

from taskadapter.coordination import schema
from taskadapter.coordination.engines import Timeouts, open_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import Postgres


SERVERS = ["postgresql"] + ["mysql"] * ("TASKADAPTER_TEST_MYSQL_URL" in os.environ)
"""The databases that are servers; MySQL or MariaDB is one of them where the environment names one."""


@pytest.fixture(scope="session")
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    postgres_server.create_database("contract")
    with pytest.MonkeyPatch.context() as environment:
        # Thousands of commits need not survive a crash of this machine.
        environment.setenv("PGOPTIONS", "-c synchronous_commit=off")
        yield postgres_server.url("contract")


@pytest.fixture(scope="session")
def sqlite_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/tasks.db"


NEED_A_SERVER = {"proxy", "shared", "either"}
"""Fixtures that make sense on a server only: a route to cut, tables that Ballerina has made."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on every database, or on those that its mark `databases` names."""
    if "prepared_url" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("databases")
    servers = ("postgresql", "mysql")
    every = servers if NEED_A_SERVER & set(metafunc.fixturenames) else ("sqlite", *servers)
    wanted = mark.args if mark else every
    names = [name for name in ("sqlite", *SERVERS) if name in wanted]
    metafunc.parametrize("prepared_url", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are about MySQL where there is none."""
    if "mysql" in SERVERS:
        return
    about_mysql = [item for item in items if "mysql_url" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=about_mysql)
    items[:] = [item for item in items if item not in about_mysql]


@pytest.fixture(scope="session")
def prepared_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database with our tables, made anew once a session."""
    fixture = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mysql": "mysql_url"}
    url: str = request.getfixturevalue(fixture[request.param])
    engine = open_engine(url)
    with engine.connect() as connection:
        schema.metadata.drop_all(connection)
        connection.commit()
        schema.create_missing(connection)
    engine.dispose()
    return url


@pytest.fixture
def engine(prepared_url: str) -> Iterator[Engine]:
    """An engine on empty tables; fails the test if it leaks a connection.

    It is as patient as a test is, on a machine that may stand still for seconds.
    """
    engine = open_engine(prepared_url, timeouts=Timeouts(connect=60, statement=60))
    with engine.begin() as connection:
        for table in schema.metadata.sorted_tables:
            connection.execute(delete(table))
    yield engine
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedout() == 0
    engine.dispose()
