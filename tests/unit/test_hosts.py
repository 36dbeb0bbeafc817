"""The process of a run, as its agent hears it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed
from pydantic import SecretStr

from taskadapter.agent.hosts import HostPool
from taskadapter.agent.links import HostLink, LineReader, Outcome, Progress, writer_to
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


async def hung_up(host: HostLink) -> None:
    """Wait until the connection to a process is closed."""
    while host._link.fileno() >= 0:  # noqa: ASYNC110 - a socket says nothing of its end
        await asyncio.sleep(0.005)


def linked(monkeypatch: pytest.MonkeyPatch) -> list[HostLink]:
    """Return a list of all processes that pools have from now on."""
    hosts: list[HostLink] = []

    def link(*given: Any) -> HostLink:
        hosts.append(host := HostLink(*given))
        return host

    monkeypatch.setattr("taskadapter.agent.hosts.HostLink", link)
    return hosts


def test_the_last_words_of_a_process_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is gone by the time the agent says something, and has not read all."""

    monkeypatch.setattr("taskadapter.agent.links.LAST_WORDS_SECONDS", 0.01)

    async def course() -> protocol.End | Killed:
        ours, theirs = socket.socketpair()
        host = HostLink(ours, await writer_to(ours), 2**22, doubt=lambda: None)
        carrying_out = asyncio.create_task(host.carry_out(ASSIGNMENT, IGNORED))
        await asyncio.sleep(0)  # it is given its assignment
        theirs.sendall(protocol.Dropped().line())
        theirs.close()
        for _ in range(3):
            host.drop()
        host.ended(protocol.Gone(number=1, exit_code=0))
        end = (await carrying_out).end
        await hung_up(host)
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


def test_a_nursery_that_takes_long_to_start_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what it imports, and its number: it is waited for, and its node takes part in nothing."""
    monkeypatch.setattr("taskadapter.agent.hosts.SLOW_START_SECONDS", 0.01)
    monkeypatch.setattr("taskadapter.agent.hosts.Scratch", SimpleNamespace)
    held = []

    async def hangs(*_: object, pass_fds: list[int], **__: object) -> SimpleNamespace:
        held.append(os.dup(*pass_fds))
        return SimpleNamespace(pid=77)

    async def course() -> None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", hangs)
        starting = asyncio.create_task(HostPool(1).start(["pandas"]))
        while not caplog.messages:  # noqa: ASYNC110 - a log says nothing of a line
            await asyncio.sleep(0.005)
        os.close(*held)
        with pytest.raises(EOFError):
            await starting

    asyncio.run(course())
    (said,) = caplog.messages
    assert said.startswith("The nursery process 77 has been starting for 0.01 s, and no run begins before")
    assert said.endswith("it imports Prefect and pandas.")


def test_a_system_that_has_no_process_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known why, and that there are processes again is found without a run."""
    monkeypatch.setattr("taskadapter.agent.hosts.RESTART_SECONDS", 0.01)
    monkeypatch.setattr("taskadapter.agent.links.LAST_WORDS_SECONDS", 0.01)
    monkeypatch.setattr(HostLink, "end", lambda *_: None)
    hosts = linked(monkeypatch)
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
        for host in hosts:
            await hung_up(host)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        asyncio.run(course(ours, theirs))
    assert answers == []


class Nursery:
    """The agent's own pool, and a nursery that answers as a test says, or not at all.

    Attributes:
        pool: the agent's side.
        kills: how often the agent has killed it.
    """

    def __init__(self, pool: HostPool, end: socket.socket) -> None:
        self.pool = pool
        self.kills: list[None] = []
        self._end = end
        pool._process = SimpleNamespace(returncode=None, kill=lambda: self.kills.append(None))  # type: ignore[assignment]

    async def hear(self) -> tuple[int, socket.socket]:
        """Wait for a request; return its number, and the socket of the process that it asks for."""
        while True:
            try:
                line, descriptors, _, _ = socket.recv_fds(self._end, 1024, maxfds=1)
            except BlockingIOError:
                await asyncio.sleep(0.001)
                continue
            request = protocol.request(line)
            assert isinstance(request, protocol.Fork)
            return request.number, socket.socket(fileno=descriptors[0])

    def tell(self, notice: protocol.Notice) -> None:
        """Tell the agent something."""
        self._end.sendall(notice.line())


@asynccontextmanager
async def nursed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nursery]:
    """A pool with a nursery, each of whose answers may take a moment only."""
    monkeypatch.setattr("taskadapter.agent.hosts.RESTART_SECONDS", 0.01)
    monkeypatch.setattr("taskadapter.agent.links.LAST_WORDS_SECONDS", 0.01)
    monkeypatch.setattr(HostLink, "end", lambda *_: None)
    hosts = linked(monkeypatch)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        pool = HostPool(1)
        pool._nursery = ours
        watching = asyncio.create_task(pool._watch(ours, LineReader(ours), ()))
        yield Nursery(pool, theirs)
        for task in (watching, pool._prober):
            if task is not None:
                task.cancel()
        pool._end_hosts()
        for host in hosts:
            await hung_up(host)


def test_a_slow_fork_is_that_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nursery goes on, with the runs that it has forked; the process ends that comes too late."""

    async def course() -> None:
        async with nursed(monkeypatch) as nursery:
            with pytest.raises(OSError, match=r"not forked within 0\.01 s"):
                await nursery.pool.fork(0.01)
            _, late = await nursery.hear()
            with late:
                late.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(late, 1) == b"", "nobody is there"
            assert nursery.pool.broken_for > 0
            _, asked = await nursery.hear()
            with asked:
                asked.sendall(protocol.Ready(pid=2**22).line())
                assert nursery.pool._prober is not None
                await nursery.pool._prober
            assert nursery.pool.broken_for == 0
            assert nursery.kills == []

    asyncio.run(course())


def test_a_nursery_that_stands_still_for_long_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where what is late is the end of a process, and not a fork; a line says why its runs end."""
    monkeypatch.setattr("taskadapter.agent.hosts.STILL_SECONDS", 0.01)
    monkeypatch.setattr("taskadapter.agent.links.ANSWER_SECONDS", 0.0)
    monkeypatch.setattr("taskadapter.agent.links.LEAVE_SECONDS", 0.0)

    async def course() -> None:
        async with nursed(monkeypatch) as nursery:
            forking = asyncio.create_task(nursery.pool.fork())
            _, process = await nursery.hear()
            with process:
                process.sendall(protocol.Ready(pid=2**22).line())
                host = await forking
                ending = asyncio.create_task(host._end_of(is_leaving=True))
                _, asked = await nursery.hear()
                with asked:
                    assert nursery.pool._prober is not None
                    await nursery.pool._prober
            assert nursery.kills == [None]
            assert not ending.done()
            ending.cancel()

    asyncio.run(course())
    assert caplog.messages == ["The nursery process has not answered for 0.01 s, and is ended."]


@pytest.mark.parametrize("is_told_first", [True, False])
def test_a_process_that_ends_at_once(monkeypatch: pytest.MonkeyPatch, *, is_told_first: bool) -> None:
    """Its end is its own, and not that of the next one, which may have its id."""

    async def course() -> None:
        async with nursed(monkeypatch) as nursery:
            forking = asyncio.create_task(nursery.pool.fork())
            number, process = await nursery.hear()
            gone = protocol.Gone(number=number, exit_code=1)
            if is_told_first:
                nursery.tell(gone)
                await asyncio.sleep(0.01)
            process.close()
            with pytest.raises(OSError, match="it ended at once"):
                await forking
            if not is_told_first:
                nursery.tell(gone)
            assert nursery.pool._prober is not None
            number, process = await nursery.hear()
            with process:
                process.sendall(protocol.Ready(pid=2**22).line())
                await nursery.pool._prober
                (host,) = nursery.pool._hosts.values()
                assert not host._ending.done()
                nursery.tell(protocol.Gone(number=number, exit_code=-9))
                assert (await host._ending).exit_code == -9
            assert not nursery.pool._hosts
            assert not nursery.pool._asked

    asyncio.run(course())


def test_a_process_that_has_ended_before_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nursery's word may come before its own."""

    async def course() -> None:
        async with nursed(monkeypatch) as nursery:
            forking = asyncio.create_task(nursery.pool.fork())
            number, process = await nursery.hear()
            nursery.tell(protocol.Gone(number=number, exit_code=3))
            await asyncio.sleep(0.01)
            with process:
                process.sendall(protocol.Ready(pid=2**22).line())
                host = await forking
            assert (await host._ending).exit_code == 3
            assert not nursery.pool._hosts

    asyncio.run(course())


async def process(monkeypatch: pytest.MonkeyPatch) -> tuple[HostLink, socket.socket]:
    """A process that says what a test does, and ends when it is killed; and its end of the link."""
    monkeypatch.setattr("taskadapter.agent.links.LAST_WORDS_SECONDS", 0.01)
    monkeypatch.setattr(HostLink, "end", lambda host, _: host.ended(protocol.Gone(number=1, exit_code=-9)))
    ours, theirs = socket.socketpair()
    return HostLink(ours, await writer_to(ours), 2**22, doubt=lambda: None), theirs


def test_a_hook_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run would keep its place; what the run came to, the ledger says."""
    monkeypatch.setattr("taskadapter.agent.links.HOOKS_SECONDS", 0.05)

    async def course() -> Outcome:
        host, theirs = await process(monkeypatch)
        with theirs:
            theirs.sendall(protocol.Settled().line() + protocol.Hook(name="notify").line())
            async with asyncio.timeout(5):
                outcome = await host.carry_out(ASSIGNMENT, IGNORED)
            await hung_up(host)
        return outcome

    outcome = asyncio.run(course())
    assert outcome.end == Killed()
    assert outcome.hook == "notify"


def test_a_hook_that_has_returned_limits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that the body has not waited for may go on after it."""
    monkeypatch.setattr("taskadapter.agent.links.HOOKS_SECONDS", 0.05)

    async def course() -> Outcome:
        host, theirs = await process(monkeypatch)
        with theirs:
            theirs.sendall(protocol.Hook(name="notify").line() + protocol.Hook().line())
            carrying_out = asyncio.create_task(host.carry_out(ASSIGNMENT, IGNORED))
            await asyncio.sleep(0.2)
            theirs.sendall(protocol.Told().line())
            await asyncio.sleep(0.01)
            host.ended(protocol.Gone(number=1, exit_code=0))
            outcome = await carrying_out
            await hung_up(host)
        return outcome

    outcome = asyncio.run(course())
    assert outcome.end == protocol.Told()
    assert outcome.hook is None


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ([protocol.Hook(name="notify"), protocol.Hook(), protocol.Hook(name="mail")], "hook mail"),
        ([], "to load them"),
    ],
)
def test_hooks_of_a_run_that_is_gone_are_ended_too(
    monkeypatch: pytest.MonkeyPatch, said: list[protocol.Report], what: str
) -> None:
    """Whoever reads the log is told which hook it was."""
    monkeypatch.setattr("taskadapter.agent.links.HOOKS_SECONDS", 0.05)

    async def course() -> None:
        host, theirs = await process(monkeypatch)
        with theirs:
            theirs.sendall(b"".join(report.line() for report in said))
            with pytest.raises(OSError, match=f"{what} took longer than 0.05 s, and was ended"):
                await host.run_hooks(ASSIGNMENT, Crashed(message="killed"))
            await hung_up(host)

    asyncio.run(course())


def test_what_is_no_message_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job may write into every file that it finds open: its process is waited for all the same."""

    async def course() -> protocol.End | Killed:
        host, theirs = await process(monkeypatch)
        with theirs:
            theirs.sendall(b"junk\n" + protocol.Dropped().line())
            carrying_out = asyncio.create_task(host.carry_out(ASSIGNMENT, IGNORED))
            await asyncio.sleep(0.01)
            host.ended(protocol.Gone(number=1, exit_code=0))
            end = (await carrying_out).end
            await hung_up(host)
        return end

    assert asyncio.run(course()) == protocol.Dropped()
