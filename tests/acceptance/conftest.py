"""Real agents against the session's server; each module has one project folder and its own pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.acceptance.project import Prefect, Project

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.local import PrefectServer


@pytest.fixture(scope="module")
def project(
    request: pytest.FixtureRequest, prefect_api: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """An empty project folder, with a work pool named after the test module."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    return Project(tmp_path_factory.mktemp(name), prefect_api, f"acceptance-{name}")


@pytest.fixture(scope="module")
def prefect(prefect_api: PrefectServer) -> Iterator[Prefect]:
    """The server's API."""
    with prefect_api.client() as client:
        yield Prefect(client)
