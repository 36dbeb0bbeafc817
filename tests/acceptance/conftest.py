"""Real agents against the session's server; each module has one project folder and its own pool."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.acceptance.project import Prefect, Project
from tests.api_proxy import ApiProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import PrefectServer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a Redis where the environment names no program for it."""
    if "TASKADAPTER_TEST_REDIS_SERVER" in os.environ:
        return
    about_redis = [item for item in items if "redis_server" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=about_redis)
    items[:] = [item for item in items if item not in about_redis]


@pytest.fixture(scope="module")
def project(
    request: pytest.FixtureRequest, prefect_api: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """An empty project folder, with a work pool named after the test module; its jobs go with it."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    project = Project(tmp_path_factory.mktemp(name), prefect_api, f"acceptance-{name}")
    yield project
    with prefect_api.client() as client:
        Prefect(client).delete_jobs(project.pool)


@pytest.fixture(scope="module")
def api(prefect_api: PrefectServer) -> Iterator[ApiProxy]:
    """Its API as an agent reaches it whose requests are to fail."""
    with ApiProxy(prefect_api.port).running() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def prefect(prefect_api: PrefectServer) -> Iterator[Prefect]:
    """The server's API."""
    with prefect_api.client() as client:
        yield Prefect(client)
