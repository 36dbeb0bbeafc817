"""The process of a run, as its agent hears it."""

from __future__ import annotations

import asyncio
import socket
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from pydantic import SecretStr

from taskadapter.agent.hosts import HostPool
from taskadapter.agent.links import HostLink, LineReader, Progress, writer_to
from taskadapter.agent.runs import Killed
from taskadapter.execution import protocol
from taskadapter.execution.assignment import Assignment, Workspace

ASSIGNMENT = Assignment(
    flow_run=FlowRun(flow_id=uuid4()),
    due=datetime(2030, 1, 1, tzinfo=UTC),
    flow_name="job",
    deployment_name="job",
    entrypoint="flows.py:job",
    workspace=Workspace(),
    node="node",
    incarnation="1",
    database_url=SecretStr("sqlite://"),
)
IGNORED = Progress(
    loaded=lambda _: None, started=lambda: None, begun=lambda _: None, came_to=lambda _: None
)


def test_the_last_words_of_a_process_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is gone by the time the agent says something, and has not read all."""

    monkeypatch.setattr("taskadapter.agent.links.LAST_WORDS_SECONDS", 0.01)

    async def course() -> protocol.End | Killed:
        ours, theirs = socket.socketpair()
        host = HostLink(ours, await writer_to(ours), 2**22, give_up=lambda: None)
        carrying_out = asyncio.create_task(host.carry_out(ASSIGNMENT, IGNORED))
        await asyncio.sleep(0)  # it is given its assignment
        theirs.sendall(protocol.Dropped().line())
        theirs.close()
        for _ in range(3):
            host.drop()
        host.ended(protocol.Gone(pid=2**22, exit_code=0))
        end = (await carrying_out).end
        await asyncio.sleep(0.05)  # it hangs up
        return end

    assert asyncio.run(course()) == protocol.Dropped()


def test_the_nursery_is_told_of_a_database_once() -> None:
    """And of another one, should the pool name one; the one that follows it is told as well."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    pool = HostPool(1)
    pool.use(SecretStr("sqlite://"))
    with ours, theirs:
        pool._nursery = ours
        pool._tell_of_database()
        assert protocol.request(theirs.recv(1000)) == protocol.Connect(database_url=SecretStr("sqlite://"))
        pool.use(SecretStr("sqlite://"))
        with pytest.raises(BlockingIOError):
            theirs.recv(1000)
        pool.use(SecretStr("sqlite:///other"))
        assert protocol.request(theirs.recv(1000)) == protocol.Connect(
            database_url=SecretStr("sqlite:///other")
        )


def test_a_nursery_that_is_back_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it runs again, and once only, however often it could not be started."""
    caplog.set_level("INFO")
    monkeypatch.setattr("taskadapter.agent.hosts.RESTART_SECONDS", 0.0)
    pool, faults = HostPool(1), [OSError("no memory"), OSError("no memory")]
    ours, theirs = socket.socketpair()

    async def start(_: object) -> None:
        if faults:
            raise faults.pop()
        pool._nursery = ours

    async def course() -> None:
        ours.setblocking(False)
        theirs.close()
        monkeypatch.setattr(pool, "_probe", lambda: None)
        await pool._watch(ours, LineReader(ours), ())

    monkeypatch.setattr(pool, "start", start)
    asyncio.run(course())

    assert [line.partition(",")[0] for line in caplog.messages] == [
        "The nursery process has ended",
        "The nursery process cannot be started",
        "The nursery process is back",
    ]


def test_a_system_that_has_no_process_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known why, and that there are processes again is found without a run."""
    monkeypatch.setattr("taskadapter.agent.hosts.RESTART_SECONDS", 0.01)
    monkeypatch.setattr("taskadapter.agent.links.LAST_WORDS_SECONDS", 0.01)
    monkeypatch.setattr(HostLink, "end", lambda *_: None)
    fault = "[Errno 11] Resource temporarily unavailable"
    answers: list[protocol.Message] = [protocol.Unforked(fault=fault)] * 2 + [protocol.Ready(pid=2**22)]

    async def course(ours: socket.socket, theirs: socket.socket) -> None:
        pool = HostPool(1)
        pool._nursery = ours

        def serve() -> None:
            _, descriptors, _, _ = socket.recv_fds(theirs, 1024, maxfds=1)
            with socket.socket(fileno=descriptors[0]) as run:
                run.sendall(answers.pop(0).line())

        loop = asyncio.get_running_loop()
        loop.add_reader(theirs, serve)
        with pytest.raises(OSError, match="Resource temporarily unavailable"):
            await pool.fork()
        assert pool.broken_for > 0
        assert pool.fault == fault
        assert pool._prober is not None
        await pool._prober
        assert pool.broken_for == 0
        loop.remove_reader(theirs)
        pool._end_hosts()
        await asyncio.sleep(0.1)  # it hangs up

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        asyncio.run(course(ours, theirs))
    assert answers == []
