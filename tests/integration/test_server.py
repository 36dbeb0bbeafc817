"""Prefect's own server does its part with the versions that are installed beside this package."""

from __future__ import annotations

import datetime as dt
import http.client
import itertools
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import IntervalSchedule

from deployments.local import PrefectServer, prefect_server, wait_until
from tests.acceptance.project import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

PROJECT = Path(__file__).parents[2]
INTERVAL = 10.0  # seconds


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrefectServer]:
    """`prefect server start` as it comes, with its SQLite file, and the session's on PostgreSQL."""
    if request.param == "postgresql":
        yield request.getfixturevalue("prefect_api")
    else:
        with prefect_server(tmp_path_factory.mktemp("sqlite")) as own:
            yield own


def deploy(client: SyncPrefectClient) -> UUID:
    """Deploy a flow that is due every ten seconds, as any user of Prefect may."""
    every = IntervalSchedule(interval=dt.timedelta(seconds=INTERVAL))
    schedule = DeploymentScheduleCreate(schedule=every, active=True)
    flow = client.create_flow_from_name("test-server")
    return client.create_deployment(flow, "every-ten-seconds", schedules=[schedule])


def test_the_installed_versions_are_ones_the_project_allows() -> None:
    """What the tests of this module prove, they prove for the ranges in `pyproject.toml`."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    required = [Requirement(line) for line in project["dependencies"]]

    refused = [str(r) for r in required if not r.specifier.contains(version(r.name))]

    assert refused == []


@pytest.mark.parametrize("path", ["/api/health", "/api/ready", "/api/admin/version", "/"])
def test_the_server_answers(server: PrefectServer, path: str) -> None:
    """The API is healthy, its database is there, and the UI is served."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()

    assert status in {200, 307}


def test_a_deployed_interval_schedule_produces_runs(server: PrefectServer) -> None:
    """The scheduler fills the next minutes with runs that are exactly one interval apart."""
    with server.client() as client:
        ours = DeploymentFilter(id=DeploymentFilterId(any_=[deploy(client)]))

        def several() -> list[dt.datetime]:
            runs = client.read_flow_runs(deployment_filter=ours)
            times = [r.expected_start_time for r in runs if r.expected_start_time is not None]
            return sorted(times) if len(times) >= 3 else []

        times = wait_until(several, PATIENCE, "three scheduled runs")

    steps = {(later - earlier).total_seconds() for earlier, later in itertools.pairwise(times)}
    assert steps == {INTERVAL}
