"""A warm host: the process in which runs happen, one at a time, in its main thread.

``python -m taskadapter.host FD`` is the *nursery*: a process that has imported Prefect, runs nothing
and has no threads, so that it can fork a host in milliseconds, sharing its memory. The agent asks it
for hosts over the socket ``FD`` and passes one end of a new socket pair with each request; the nursery
answers with the exit statuses of the hosts that ended. Its first byte says that it is ready.

A host speaks JSON lines with the agent over its socket. Its main thread runs the flows, so that they
can be timed out and cancelled as in a process of their own; a second thread listens.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.context import SyncClientContext
from prefect.exceptions import Abort, Pause
from prefect.flow_engine import run_flow
from prefect.logging.loggers import flow_run_logger
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from taskadapter import prefect_private, progress, runs
from taskadapter.coordination.board import clock
from taskadapter.workspace import Desk, StaleCode

BUFFER = 65536

PRELOADED = ("taskadapter.coordination.jobs", "sqlalchemy.dialects.sqlite")
"""What a host needs soon and nothing above imports: imported once, by the nursery."""


# --- nursery ------------------------------------------------------------------------------------


def nursery(agent: socket.socket) -> None:
    """Fork a host for each socket that the agent sends, and report each that ended, until EOF."""
    for module in PRELOADED:
        importlib.import_module(module)
    # What is alive now stays shared with the hosts: their collectors need not touch it.
    gc.collect()
    gc.freeze()
    agent.sendall(b"+")
    wakeup, on_signal = socket.socketpair()
    on_signal.setblocking(False)
    signal.set_wakeup_fd(on_signal.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(agent, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wakeup in ready:
                wakeup.recv(BUFFER)
                _report_ended(agent)
            if agent in ready:
                data, descriptors, _, _ = socket.recv_fds(agent, BUFFER, maxfds=16)
                if not data:
                    return
                for descriptor in descriptors:
                    _fork_host(agent, descriptor)


def _fork_host(agent: socket.socket, descriptor: int) -> None:
    if os.fork() == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        agent.close()
        # A group of its own: the agent can end a host with everything the job has started.
        os.setsid()
        Host(socket.socket(fileno=descriptor)).serve()
        sys.exit()
    os.close(descriptor)


def _report_ended(agent: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        notice = {"pid": pid, "exit_code": os.waitstatus_to_exitcode(status)}
        agent.sendall(json.dumps(notice).encode() + b"\n")


# --- host ---------------------------------------------------------------------------------------


class Host:
    """Carries out one assignment after another until the agent says stop, or is gone."""

    def __init__(self, agent: socket.socket) -> None:
        self._agent = agent
        self._inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._dropped = threading.Event()
        self._over: str | None = None

    def serve(self) -> None:
        """Work until told to stop; returns when this process should end."""
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        self._tell("ready", pid=os.getpid())
        message = self._inbox.get()
        if message is None:
            return
        desk = Desk(runs.Assignment.model_validate(message["assignment"]).workspace)
        # The agent sends the heartbeats of its runs: a heartbeat thread here would hold the host for
        # up to a second after each run. The client is shared by all runs: a connection less for each.
        with (
            temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
            SyncClientContext.get_or_create(),
        ):
            while message is not None and self._carry_out(message, desk):
                message = self._inbox.get()

    def _listen(self) -> None:
        # An agent that is killed with something unread resets the connection instead of closing it.
        with suppress(OSError), self._agent.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                match json.loads(line):
                    case {"do": "cancel"}:
                        prefect_private.intend_cancellation()
                        os.kill(os.getpid(), signal.SIGTERM)
                    case {"do": "drop", "over": over}:
                        self._over = over
                        self._dropped.set()
                    case {"do": "stop"}:
                        self._inbox.put(None)
                        return
                    case message:
                        self._over = None
                        self._dropped.clear()
                        self._inbox.put(message)
        # Without its agent a host is nobody's: what it runs could run elsewhere already.
        os.killpg(0, signal.SIGKILL)

    def _tell(self, event: str, **details: Any) -> None:
        self._agent.sendall(json.dumps({"event": event} | details).encode() + b"\n")

    def _carry_out(self, message: dict[str, Any], desk: Desk) -> bool:
        """Do what the agent asks; returns whether this host can take another assignment."""
        assignment = runs.Assignment.model_validate(message["assignment"])
        try:
            flow = desk.flow_for(assignment)
        except StaleCode:
            self._tell("stale")
            return False
        except Exception as exc:  # noqa: BLE001 - the user's modules may raise anything
            flow_run_logger(assignment.flow_run).exception("The flow could not be loaded.")
            self._tell("crashed", message=f"The flow could not be loaded: {type(exc).__name__}: {exc}")
            return False
        if message["do"] == "hooks":
            run_hooks(flow, assignment, State.model_validate(message["state"]))
            self._tell("done", ended=None, stays=True)
            return True
        if not self._wait_until(assignment.due):
            self._tell("dropped")
            return True
        return self._run(flow, assignment)

    def _wait_until(self, due: datetime) -> bool:
        """Wait for the tick's moment; returns False when the agent drops the run before."""
        return not self._dropped.wait(max(0.0, (due - datetime.now(UTC)).total_seconds()))

    def _run(self, flow: Flow[..., Any], assignment: runs.Assignment) -> bool:
        execution = runs.Execution(assignment)
        execution.over = lambda: self._over
        execution.on_progress = lambda: self._tell("progress", ended=execution.ended)
        os.environ["PREFECT__FLOW_RUN_ID"] = str(assignment.flow_run.id)
        token = runs.execution.set(execution)
        over = threading.Event()
        if assignment.token is not None and assignment.policy.on_token_loss == "stop":
            threading.Thread(target=_guard, args=(assignment, over), name="guard", daemon=True).start()
        try:
            state = drive(flow, assignment)
            # What timed out may still be going on in a thread of the flow.
            stays = state is None or not (state.name == "TimedOut" or state.is_crashed())
        except (Abort, Pause):
            stays = True
        except Exception as exc:  # noqa: BLE001 - the engine's own trouble: the agent reports it
            self._tell("crashed", message=f"{type(exc).__name__}: {exc}")
            return False
        except BaseException:  # noqa: BLE001 - reported by the engine; this process is not to go on
            stays = False
        finally:
            over.set()
            runs.execution.reset(token)
        self._tell("done", ended=execution.ended, stays=stays)
        return stays


def _guard(assignment: runs.Assignment, over: threading.Event) -> None:
    """End this process at the deadline of its token: the agent that would do so may be frozen."""
    while not over.wait(max(0.01, min(1.0, progress.deadline(assignment) - clock()))):
        if clock() >= progress.deadline(assignment):
            os.killpg(0, signal.SIGKILL)


def drive(flow: Flow[..., Any], assignment: runs.Assignment) -> State[Any] | None:
    """Run the flow with Prefect's engine, in this thread; returns its final state.

    The engine is given the run without its deployment's id: with it, it would open a websocket for
    each run to watch for a suspension, half a second of every run's time. It reads the whole run, id
    included, from the API before the body starts.
    """
    flow_run = assignment.flow_run.model_copy(update={"deployment_id": None})
    logger: Any = flow_run_logger(assignment.flow_run)
    outcome: Any = run_flow(flow, flow_run=flow_run, error_logger=logger, return_type="state")
    if asyncio.iscoroutine(outcome):
        outcome = asyncio.run(outcome)
    elif flow.isgenerator:
        outcome = asyncio.run(_exhaust(outcome)) if flow.isasync else [*outcome] and None
    return outcome if isinstance(outcome, State) else None


async def _exhaust(items: Any) -> None:
    async for _ in items:
        pass


def run_hooks(flow: Flow[..., Any], assignment: runs.Assignment, state: State[Any]) -> None:
    """Run the hooks of a run whose own host did not live to run them."""
    hooks = flow.on_cancellation_hooks if state.is_cancelled() else flow.on_crashed_hooks
    logger = flow_run_logger(assignment.flow_run, flow)
    for hook in hooks:
        try:
            outcome = hook(flow, assignment.flow_run, state)
            if asyncio.iscoroutine(outcome):
                asyncio.run(outcome)
        except Exception:
            logger.exception("Hook %r failed.", getattr(hook, "__name__", hook))


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))
