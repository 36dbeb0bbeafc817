"""One at a time, whichever machine: a lock that Prefect's server keeps.

The server makes a deployment anew when two ask for it at once, with another schedule: so only one may
ask. A variable can be made once, which is all that a lock needs; it is gone when the lock is given back.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

import httpx
from prefect.client.schemas.actions import VariableCreate
from prefect.exceptions import ObjectAlreadyExists

from taskadapter.prefect_api.client import is_gone

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import PrefectClient

STALE_SECONDS = 30.0
"""A lock that one holder has kept for so long is taken from it: it has died, or it would be through."""

PAUSE_SECONDS = 0.1
"""About how long to wait between two tries."""


@asynccontextmanager
async def lock(client: PrefectClient, what: str) -> AsyncIterator[None]:
    """Hold the lock of that name for the duration of the block.

    Args:
        client: connected to the API.
        what: what is locked, in words; the same words are the same lock.
    """
    held = await _acquire(client, what)
    try:
        yield
    finally:
        await _delete(client, held)


async def _acquire(client: PrefectClient, what: str) -> UUID:
    name = f"taskadapter_lock_{sha256(what.encode()).hexdigest()[:16]}"
    value = f"{what}: process {os.getpid()} on {socket.gethostname()}"
    other, since = None, 0.0
    while True:
        try:
            return (await client.create_variable(VariableCreate(name=name, value=value))).id
        except ObjectAlreadyExists:
            holder = await client.read_variable_by_name(name)
        if holder is not None and holder.id != other:
            other, since = holder.id, time.monotonic()
        elif holder is not None and time.monotonic() - since > STALE_SECONDS:
            await _delete(client, holder.id)
        await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - not for secrets


async def _delete(client: PrefectClient, variable_id: UUID) -> None:
    """Delete a lock by its id: one of the same name may be somebody else's by now."""
    try:
        await client.request("DELETE", "/variables/{id}", path_params={"id": variable_id})
    except httpx.HTTPStatusError as fault:
        if not is_gone(fault):
            raise
