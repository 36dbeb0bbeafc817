"""How our functions and commands call Prefect's API: one line says that it is out of reach."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from json import JSONDecodeError
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect.client.base import ServerType
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    get_current_settings,
    temporary_settings,
)
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import ValidationError

from taskadapter.errors import ApiUnavailableError, TaskError, in_a_line
from taskadapter.prefect_api.faults import FAULTS, UNSET, explain, unreachable, without_users

T = TypeVar("T")

AT_ONCE = 8
"""How many calls are made side by side: a server on SQLite gains nothing from more, and others little."""

COMMAND_SECONDS = 15.0
"""How long a command waits for an answer of the API, which takes milliseconds."""

PAGE = 200
"""As many as Prefect's API returns at a time."""

API_FAULTS = (httpx.HTTPError, ValidationError, JSONDecodeError)
"""What Prefect's client raises when the API does not answer, refuses, or does not make sense."""

AWAY = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
"""What becomes of a question to an API that is away: its address may be right."""

_REFUSED = {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN, httpx.codes.TOO_MANY_REQUESTS}
"""What is answered to whoever asks, whatever is asked; so is that the server fails."""


def is_gone(fault: Exception) -> bool:
    """Return whether there is no such thing: methods of the client raise one or the other fault then."""
    if isinstance(fault, httpx.HTTPStatusError):
        return fault.response.status_code == httpx.codes.NOT_FOUND
    return isinstance(fault, ObjectNotFound)


def in_words(fault: Exception) -> str:
    """Return a fault in one line."""
    if isinstance(fault, ValidationError | JSONDecodeError):
        return "the API's answer makes no sense"
    if isinstance(fault, httpx.TransportError):
        return unreachable(fault)
    if isinstance(fault, ObjectNotFound):
        return "it is gone from Prefect"
    return without_users(in_a_line(str(fault))) or type(fault).__name__


def backoff(failures: int, longest: float) -> float:
    """Return how many seconds to wait after failures in a row: half a one, then twice as many each time.

    Args:
        failures: from 1; after none it is half as long.
        longest: how many seconds it is at most.
    """
    return min(longest, 2.0 ** min(failures, 10) / 4)


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine does, from code that is not async; also while an event loop is running."""
    return cast("T", run_coro_as_sync(work))


async def side_by_side(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Make calls a few at a time, and return what they return, in their order.

    Raises:
        Exception: what the first of them has raised, once all have ended.
    """
    places = asyncio.Semaphore(AT_ONCE)

    async def make(call: Coroutine[Any, Any, T]) -> T:
        async with places:
            return await call

    answers = await asyncio.gather(*map(make, calls), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return cast("list[T]", answers)


@asynccontextmanager
async def api_client() -> AsyncIterator[PrefectClient]:
    """Yield a client for the duration of the block.

    Raises:
        ApiUnavailableError: the API did not answer a call that was made in it, refuses whoever makes it,
            or fails.
    """
    try:
        async with get_client() as client:
            yield client
    except (httpx.TransportError, httpx.InvalidURL) as fault:
        raise ApiUnavailableError(f"{explain(fault, is_prefect=False)}.") from None
    except httpx.HTTPStatusError as refusal:
        code = refusal.response.status_code
        if code not in _REFUSED and code < httpx.codes.INTERNAL_SERVER_ERROR:
            raise
        raise ApiUnavailableError(f"{explain(refusal, is_prefect=True)}.") from None


@contextmanager
def briefly() -> Iterator[None]:
    """Have Prefect's client say soon, and not after minutes, that a server does not answer."""
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: COMMAND_SECONDS}):
        yield


@asynccontextmanager
async def server_client() -> AsyncIterator[PrefectClient]:
    """Yield a client of the server that the settings name, once that has answered as Prefect's API does.

    For commands: where none is named, Prefect would start one that knows of nothing.

    Raises:
        ApiUnavailableError: none is named; or it does not answer, refuses, or is something else.
    """
    if get_current_settings().api.url is None:
        raise ApiUnavailableError(f"{UNSET}.")
    is_prefect = False
    with briefly():
        try:
            async with get_client() as client:
                await server_version(client)
                is_prefect = True
                yield client
        except TaskError:
            raise
        except FAULTS as fault:
            raise ApiUnavailableError(f"{explain(fault, is_prefect=is_prefect)}.") from fault


async def server_version(client: PrefectClient) -> str | None:
    """Return the version of Prefect's server; None of Prefect Cloud, which serves every version.

    Raises:
        HTTPError: as any of `FAULTS`: the API failed, or is none of Prefect's.
    """
    if client.server_type is ServerType.CLOUD:
        await client.hello()
        return None
    found: object = await client.api_version()
    if not isinstance(found, str) or not re.match(r"\d+\.\d+", found):
        raise ValueError("not a version")
    return found


async def all_pages(read: Callable[..., Awaitable[list[Any]]], **filters: Any) -> list[Any]:
    """Return all pages of what a method of Prefect's client returns."""
    found: dict[UUID, Any] = {}
    for offset in itertools.count(0, PAGE):
        page = await read(limit=PAGE, offset=offset, **filters)
        found |= {one.id: one for one in page}
        if len(page) < PAGE:
            break
    return list(found.values())
