"""What Prefect's server is asked, and what its answers say of the server itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

import httpx
import prefect
from prefect.client.base import ServerType
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from taskadapter.doctor.findings import Finding, error, ok, warning
from taskadapter.prefect_api.client import all_pages, shown
from taskadapter.prefect_api.deployments import TAG, deployments_of_pool

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Worker, WorkPool, WorkQueue
    from prefect.client.schemas.responses import DeploymentResponse

CLOCK_SECONDS = 2.0
"""How far this machine's clock may be from the server's; the server tells its own in whole seconds."""

FAULTS = (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError)
"""What Prefect's client raises: its URL is none, or the API does not answer, refuses, or makes no sense.

The last is a ValueError, or a TypeError where an answer was taken for a list.
"""

EXAMPLE = "such as http://HOST:4200/api"


@dataclass(frozen=True)
class Seen:
    """A work pool as the server has it.

    Attributes:
        pool: the pool.
        jobs: those of its deployments that are ours.
        others: how many are not.
        queues: its queues.
        workers: those that have ever polled it.
    """

    pool: WorkPool
    jobs: list[DeploymentResponse]
    others: int
    queues: list[WorkQueue]
    workers: list[Worker]


async def read(pool_name: str) -> tuple[Seen | None, list[Finding]]:
    """Return what the server has of a work pool, if it can be asked, and what is to be said of it."""
    url = get_current_settings().api.url
    if url is None:
        return None, [
            error(
                "PREFECT_API_URL is not set, and Prefect would start a server for each command alone; set "
                f"it to the API of the server that all nodes use, {EXAMPLE}"
            )
        ]
    found: list[Finding] = []
    # A server that is busy or away is told of at once, and not after a minute.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        try:
            async with get_client() as client:
                found.append(await _version(client, shown(url)))
                found.append(clock((await client.hello()).headers.get("date"), datetime.now(UTC)))
                return await _read(client, pool_name), found
        except ObjectNotFound:
            found.append(
                error(
                    f"there is no work pool {pool_name!r}; deploy, or start an agent, which makes it, or "
                    "name another with --pool"
                )
            )
        except FAULTS as fault:
            found.append(error(in_words(fault, shown(url), is_prefect=bool(found))))
    return None, found


async def _read(client: PrefectClient, name: str) -> Seen:
    pool = await client.read_work_pool(name)
    deployments = await deployments_of_pool(client, name)
    jobs = [found for found in deployments if TAG in found.tags]
    return Seen(
        pool,
        jobs,
        len(deployments) - len(jobs),
        await all_pages(client.read_work_queues, work_pool_name=name),
        await all_pages(client.read_workers_for_work_pool, work_pool_name=name),
    )


async def _version(client: PrefectClient, url: str) -> Finding:
    if client.server_type is ServerType.CLOUD:  # it serves every version
        await client.hello()
        return ok(f"Prefect's API at {url} answers")
    return version(url, await client.api_version())


def version(url: str, theirs: object) -> Finding:
    """Compare the server's version with the one that is installed here.

    Raises:
        ValueError: it is none.
    """
    ours = prefect.__version__
    if not isinstance(theirs, str) or not re.match(r"\d+\.\d+", theirs):
        raise ValueError("not a version")
    if theirs != ours:
        return warning(
            f"Prefect's API at {url} has version {theirs}, and {ours} is installed here; install the same "
            f"on both, as with `pip install prefect=={ours}` on the server"
        )
    return ok(f"Prefect's API at {url} answers, in version {theirs}")


def clock(date: str | None, now: datetime) -> Finding:
    """Compare this machine's clock with the server's.

    Args:
        date: the header of an answer.
        now: when it had arrived, by this machine's clock.
    """
    try:
        seconds = (now - parsedate_to_datetime(date or "")).total_seconds()
    except (ValueError, TypeError):
        return warning(
            "the server's clock cannot be compared with this machine's: its answers lack the header Date; "
            "let the proxy before it pass that on"
        )
    # It is cut to a second, and the answer took its time.
    if not -CLOCK_SECONDS < seconds < 1 + CLOCK_SECONDS:
        return warning(
            f"this machine's clock is {seconds:+.0f} s from the server's, and runs start by it; keep both "
            "right, with NTP"
        )
    return ok("this machine's clock agrees with the server's")


def in_words(fault: Exception, url: str, *, is_prefect: bool) -> str:
    """Say why the API could not be used, and what to do.

    Args:
        fault: one of `FAULTS`.
        url: the API's, without a password.
        is_prefect: whether it has already answered as Prefect's API does.
    """
    who = f"Prefect's API at {url}"
    if isinstance(fault, httpx.HTTPStatusError):
        return _refused(fault.response, who, url, is_prefect=is_prefect)
    if isinstance(fault, httpx.TransportError):
        return (
            f"{who} does not answer: {str(fault) or type(fault).__name__}; start it with `prefect server "
            "start`, or name another one in PREFECT_API_URL"
        )
    if isinstance(fault, httpx.InvalidURL):
        return f"PREFECT_API_URL={url} is no URL; set it to the API of the server, {EXAMPLE}"
    if is_prefect:
        return (
            f"{who} answers what Prefect {prefect.__version__} here does not understand; install the "
            "server's version, or see whether a proxy changes its answers"
        )
    return _not_prefect(url, "its answer makes no sense")


def _refused(response: httpx.Response, who: str, url: str, *, is_prefect: bool) -> str:
    said = f"{response.status_code} {httpx.codes.get_reason_phrase(response.status_code)}".strip()
    match response.status_code:
        case 401 | 403:
            return f"{who} refuses this machine ({said}); {_credentials()}"
        case 429:
            return f"{who} is asked too often ({said}); wait a minute, or run fewer agents of this account"
        case 502 | 503 | 504:
            return f"{who} is not ready ({said}); start the server, or see why the proxy before it has none"
        case code if code < httpx.codes.INTERNAL_SERVER_ERROR and not is_prefect:
            return _not_prefect(url, said)
        case _:
            asked = f"{response.request.method} {response.request.url.path}"
            return (
                f"{who} fails at {asked} ({said}); see the server's log, and whether its database answers"
            )


def _not_prefect(url: str, why: str) -> str:
    return f"{url} is not Prefect's API ({why}); set PREFECT_API_URL to that of the server, {EXAMPLE}"


def _credentials() -> str:
    api = get_current_settings().api
    if api.auth_string is not None:
        return "make PREFECT_API_AUTH_STRING what PREFECT_SERVER_API_AUTH_STRING is on the server"
    if api.key is not None:
        return "set PREFECT_API_KEY to a key that is valid, and whose owner may use this workspace"
    return "set PREFECT_API_AUTH_STRING as on the server, or PREFECT_API_KEY for Prefect Cloud"
