"""What Prefect's server is asked, and what its answers say of the server itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import prefect
from prefect.client.orchestration import PrefectClient, get_client
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from taskadapter.doctor.findings import Finding, Level, error, ok, warning
from taskadapter.prefect_api.client import all_pages, briefly, in_words, server_version
from taskadapter.prefect_api.deployments import TAG, deployments_of_pool, flow_names
from taskadapter.prefect_api.faults import FAULTS, UNSET, explain, shown
from taskadapter.prefect_api.pool import NO_POOL
from taskadapter.prefect_api.workers import workers_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from uuid import UUID

    from prefect.client.schemas.objects import Worker, WorkPool, WorkQueue
    from prefect.client.schemas.responses import DeploymentResponse

CLOCK_SECONDS = 2.0
"""How far this machine's clock may be from the server's."""

EVENTS_SECONDS = 5.0
"""How long the stream of events may take to open."""

CLOCK_TRIES = 4
"""How often they are compared until they agree."""

CLOCK_PAUSE_SECONDS = 1.0
"""How long after each time; a server renews the date that it sends once a second, a busy one later."""


@dataclass(frozen=True)
class Seen:
    """A work pool as the server has it.

    Attributes:
        pool: the pool.
        jobs: those of its deployments that are ours.
        others: how many are not.
        flows: the names of their flows.
        used: the queues that a deployment names, ours or not.
        queues: its queues.
        workers: those that have ever polled it.
    """

    pool: WorkPool
    jobs: list[DeploymentResponse]
    others: int
    flows: Mapping[UUID, str]
    used: Collection[str | None]
    queues: list[WorkQueue]
    workers: list[Worker]


async def read(pool_name: str) -> tuple[Seen | None, list[Finding]]:
    """Return what the server has of a work pool, if it can be asked, and what is to be said of it."""
    url = get_current_settings().api.url
    if url is None:
        return None, [error(UNSET)]
    found: list[Finding] = []
    with briefly():
        try:
            async with get_client() as client:
                found.append(await _version(client, shown(url)))
                found.append(await compare_clocks(client))
                found += await _events()
                return await _read(client, pool_name), found
        except ObjectNotFound:
            found.append(error(NO_POOL.format(name=pool_name)))
        except FAULTS as fault:
            found.append(error(explain(fault, is_prefect=bool(found))))
    return None, found


async def _read(client: PrefectClient, name: str) -> Seen:
    pool = await client.read_work_pool(name)
    deployments = await deployments_of_pool(client, name)
    jobs = [found for found in deployments if TAG in found.tags]
    return Seen(
        pool,
        jobs,
        len(deployments) - len(jobs),
        await flow_names(client, {job.flow_id for job in jobs}),
        {found.work_queue_name for found in deployments},
        await all_pages(client.read_work_queues, work_pool_name=name),
        await workers_of(client, name),
    )


async def _version(client: PrefectClient, url: str) -> Finding:
    theirs, ours = await server_version(client), prefect.__version__
    if theirs is None:
        return ok(f"Prefect's API at {url} answers")
    if theirs != ours:
        return warning(
            f"Prefect's API at {url} has version {theirs}, and {ours} is installed here; install the same "
            f"on both, as with `pip install prefect=={ours}` on the server"
        )
    return ok(f"Prefect's API at {url} answers, in version {theirs}")


async def _events() -> list[Finding]:
    """Say that the stream of events cannot be heard, where it cannot; agents do without it."""
    # Without a filter the server sends all that has happened lately, and what nobody reads delays the end.
    nothing = EventFilter(event=EventNameFilter(name=["taskadapter.nothing"]))
    try:
        async with asyncio.timeout(EVENTS_SECONDS), get_events_subscriber(nothing, reconnection_attempts=0):
            return []
    except TimeoutError:
        why = f"no answer within {EVENTS_SECONDS:g} s"
    except Exception as fault:  # noqa: BLE001 - whatever it is, the agents meet it, too
        why = in_words(fault)
    return [
        warning(
            f"Prefect's event stream, the websocket /api/events/out, is blocked: {why}; agents ask the API "
            "150 times a minute instead, and see runs by hand and pauses half a second later: let the "
            "proxy before the server pass websockets on"
        )
    ]


async def compare_clocks(client: PrefectClient) -> Finding:
    """Compare the clocks; a server that is busy tells a time that has passed, and is asked again."""
    for left in reversed(range(CLOCK_TRIES)):
        asked = datetime.now(UTC)
        answer = await client.hello()
        finding = clock(answer.headers.get("date"), asked, datetime.now(UTC))
        if finding.level is Level.OK or not left:
            break
        await asyncio.sleep(CLOCK_PAUSE_SECONDS)
    return finding


def clock(date: str | None, asked: datetime, now: datetime) -> Finding:
    """Compare this machine's clock with the server's, by what they differ by at least.

    Args:
        date: the header of an answer, cut to a second.
        asked: when it was asked for, by this machine's clock.
        now: when it had arrived.
    """
    try:
        theirs = parsedate_to_datetime(date or "")
        ahead = (asked - theirs).total_seconds() - 1
        behind = (now - theirs).total_seconds()
    except (ValueError, TypeError):
        return warning(
            "the server's clock cannot be compared with this machine's: its answers lack the header Date; "
            "let the proxy before it pass that on"
        )
    if abs(seconds := max(ahead, 0.0) or min(behind, 0.0)) >= CLOCK_SECONDS:
        return warning(
            f"this machine's clock is {seconds:+.0f} s from the server's, and runs start by it; keep both "
            "right, with NTP"
        )
    return ok("this machine's clock agrees with the server's")
