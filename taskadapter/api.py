"""Clients of Prefect's API for our functions and commands: one line says that it is out of reach."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.settings import get_current_settings

from taskadapter.errors import ApiUnavailableError


@asynccontextmanager
async def api_client() -> AsyncIterator[PrefectClient]:
    """Yield a client for the duration of the block.

    Raises:
        ApiUnavailableError: the API did not answer a call that was made in it.
    """
    with _told():
        async with get_client() as client:
            yield client


@contextmanager
def sync_api_client() -> Iterator[SyncPrefectClient]:
    """Yield a client for code that is not async; as `api_client`."""
    with _told(), get_client(sync_client=True) as client:
        yield client


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as fault:
        raise ApiUnavailableError(
            f"Prefect's API at {get_current_settings().api.url} does not answer: "
            f"{str(fault) or type(fault).__name__}; start it with `prefect server start`, or name another "
            "one in PREFECT_API_URL."
        ) from None
