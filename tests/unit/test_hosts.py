"""The process of a run, as its agent hears it."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from taskadapter.agent.hosts import Ending, Host, Progress, writer_to

ASSIGNMENT: Any = SimpleNamespace(model_dump=lambda **_: {})
IGNORED = Progress(loaded=lambda _: None, started=lambda: None, begun=lambda _: None)


def test_the_last_words_of_a_process_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is gone by the time the agent says something, and has not read all."""

    monkeypatch.setattr("taskadapter.agent.hosts.LAST_WORDS_SECONDS", 0.01)

    async def course() -> str:
        ours, theirs = socket.socketpair()
        host = Host(ours, await writer_to(ours), 2**22, give_up=lambda: None)
        carrying_out = asyncio.create_task(host.carry_out(ASSIGNMENT, IGNORED))
        await asyncio.sleep(0)  # it is given its assignment
        theirs.sendall(json.dumps({"event": "dropped"}).encode() + b"\n")
        theirs.close()
        for _ in range(3):
            host.drop()
        host.ended(Ending(0))
        kind = (await carrying_out).kind
        await asyncio.sleep(0.05)  # it hangs up
        return kind

    assert asyncio.run(course()) == "dropped"
