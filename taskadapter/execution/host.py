"""The process of one run: it loads the flow, waits for the moment, runs it in its main thread, ends.

It is forked by the `nursery`, and speaks with the agent as `protocol` says. A second thread listens,
so that a run can be cancelled, called off, and ended when its agent is gone.

``python -m taskadapter.execution.host FD`` is the same in a fresh interpreter: some variables of the
environment that a deployment sets only take effect there.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, NoReturn

from prefect import Flow
from prefect.client.schemas.objects import State, StateType
from prefect.context import SyncClientContext
from prefect.events.worker import EventsWorker
from prefect.flow_engine import run_flow
from prefect.logging.handlers import APILogWorker
from prefect.logging.loggers import flow_run_logger
from prefect.settings import (
    PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
    PREFECT_CLIENT_RETRY_EXTRA_CODES,
    PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    temporary_settings,
)
from pydantic import ValidationError

from taskadapter.coordination.board import clock
from taskadapter.errors import words_of
from taskadapter.execution import current, protocol, record, turn, workspace
from taskadapter.execution.assignment import LEAVE_SECONDS, Assignment
from taskadapter.execution.conclusion import conclude, enter_end
from taskadapter.prefect_api import private

PASSING_FAULTS = {500, 504, 520, 521, 522, 523, 524}
"""What an API, or a proxy before it, answers that may answer well a moment later.

The engine takes it for the end of its run. It repeats what is answered with 429, 502 and 503 anyhow.
"""


@contextlib.contextmanager
def connected(*, csrf: bool = True) -> Iterator[None]:
    """Have Prefect as a run has it: one client for all its calls, and what the agent does is left to it.

    That is the heartbeats, whose thread would hold the process for up to a second after its run, and the
    look at the server's version, which would leave the nursery with an open connection.

    Args:
        csrf: whether clients ask the server for a token first, which most servers do not have.
    """
    with (
        temporary_settings(
            {
                PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
                PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False,
                PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: csrf and PREFECT_CLIENT_CSRF_SUPPORT_ENABLED.value(),
                PREFECT_CLIENT_RETRY_EXTRA_CODES: PASSING_FAULTS | PREFECT_CLIENT_RETRY_EXTRA_CODES.value(),
            }
        ),
        SyncClientContext.get_or_create(),
    ):
        yield


DROPPED_WITHIN_SECONDS = 2.0
"""How long after a run the agent gets a signal that both are sent, at most, and has told the run."""


class Host:
    """Carries out one assignment of the agent's.

    Args:
        agent: the socket to it.
        warm: what has opened `connected` before the fork; None if nobody has.
    """

    def __init__(self, agent: socket.socket, warm: contextlib.ExitStack | None) -> None:
        self._agent = agent
        self._agent.settimeout(None)  # a module that is imported ahead may have set one for all sockets
        self._warm = warm
        self._pid = os.getpid()
        self._inbox: queue.SimpleQueue[protocol.Run | protocol.RunHooks] = queue.SimpleQueue()
        self._dropped = threading.Event()
        self._released = threading.Event()
        self._is_to_end = threading.Event()
        self._unheeded = threading.Event()

    def serve(self) -> NoReturn:
        """Carry out what the agent says, and end this process."""
        private.escape_what_cannot_be_sent()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        self._tell(protocol.Ready(pid=os.getpid()))
        order = self._inbox.get()
        try:
            if workspace.needs_interpreter(order.assignment.workspace):
                self._start_afresh(order.assignment)
            self._carry_out(order)
        except BaseException as exc:  # noqa: BLE001 - the agent reports it
            self._tell(protocol.Crashed(fault=words_of(exc)))
        leave()

    def _start_afresh(self, assignment: Assignment) -> NoReturn:
        """Become a fresh interpreter in the deployment's environment; the agent says all again."""
        flow_run_logger(assignment.flow_run).info(
            "The deployment sets variables that Python reads at its start; it gets its own interpreter."
        )
        APILogWorker.drain_all(timeout=LEAVE_SECONDS)
        self._agent.set_inheritable(True)
        command = [sys.executable, "-m", "taskadapter.execution.host", str(self._agent.fileno())]
        environment = workspace.environment(assignment.workspace)
        os.execve(sys.executable, command, environment)  # noqa: S606 - there is no shell to need

    def _listen(self) -> None:
        # An agent that is killed with something unread resets the connection instead of closing it.
        with contextlib.suppress(OSError), self._agent.makefile("r", encoding="utf-8") as lines:
            for order in filter(None, map(_parsed, lines)):
                match order:
                    case protocol.Cancel():
                        private.intend_cancellation()
                        self._is_to_end.set()
                        os.kill(os.getpid(), signal.SIGTERM)
                    case protocol.Stop():
                        self._is_to_end.set()
                        if self._unheeded.is_set():  # the signal came first
                            os.kill(os.getpid(), signal.SIGTERM)
                    case protocol.Drop():
                        self._dropped.set()
                        self._released.set()
                    case protocol.Go():
                        self._released.set()
                    case protocol.Run() | protocol.RunHooks():
                        self._inbox.put(order)
        # Without its agent a process is nobody's: what it runs could run elsewhere already.
        os.killpg(0, signal.SIGKILL)

    def _is_meant(self) -> bool:
        """Return whether a SIGTERM that has come is to end the run.

        A service manager sends it to all processes of a node. Then the agent, which gets it too, drops what
        has not begun, lets the others end, and says when they must.
        """
        if not self._is_to_end.is_set():
            self._unheeded.set()
            if not self._dropped.is_set():
                threading.Timer(DROPPED_WITHIN_SECONDS, self._end_unless_dropped).start()
        return self._is_to_end.is_set()

    def _end_unless_dropped(self) -> None:
        if not self._dropped.is_set():
            self._is_to_end.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, report: protocol.Report) -> None:
        if os.getpid() != self._pid:  # a body has forked, and its child goes on where the body ends
            return
        # A job may have closed every file that it found open.
        with contextlib.suppress(OSError):
            self._agent.sendall(report.line())

    def _carry_out(self, order: protocol.Run | protocol.RunHooks) -> None:
        began, assignment = time.monotonic(), order.assignment
        if self._warm is not None and workspace.changes_settings(assignment.workspace):
            self._warm.close()
            self._warm = None
        try:
            workspace.enter(assignment.workspace)
            if self._warm is None:
                self._warm = contextlib.ExitStack()
                self._warm.enter_context(connected())
            flow = workspace.load(assignment)
        except Exception as exc:  # noqa: BLE001 - the user's modules may raise anything
            line, text = workspace.shown(exc)
            waits = assignment.is_tick and isinstance(exc, workspace.LacksCodeError)
            # Its hooks are those of a run that has said so; and one that waits is tried again and again.
            if isinstance(order, protocol.Run) and not waits:
                flow_run_logger(assignment.flow_run).error("The flow could not be loaded: %s", text)
            self._tell(protocol.Unloadable(fault=f"The flow could not be loaded: {line}", waits=waits))
            return
        if isinstance(order, protocol.RunHooks):
            run_hooks(flow, assignment, order.state, self._tell)
            self._tell(protocol.Told())
            return
        record.prepare(assignment)
        self._tell(protocol.Loaded(seconds=time.monotonic() - began))
        if self._wait_until(assignment.due):
            self._tell(protocol.Started())
            self._run(flow, assignment)
        else:
            self._tell(protocol.Dropped())

    def _wait_until(self, due: datetime) -> bool:
        """Wait for the tick's moment and its turn; returns False when the agent drops the run before."""
        if self._dropped.wait(max(0.0, (due - datetime.now(UTC)).total_seconds())):
            return False
        self._released.wait()
        return not self._dropped.is_set()

    def _run(self, flow: Flow[..., Any], assignment: Assignment) -> None:
        execution = current.Execution(assignment, tell=self._tell, is_dropped=self._dropped.is_set)
        token = current.execution.set(execution)
        over = threading.Event()
        if assignment.token is not None and assignment.policy.on_token_loss == "stop":
            threading.Thread(target=_guard, args=(assignment, over), name="guard", daemon=True).start()
        state: State[Any] | None = None
        fault: BaseException | None = None
        turn.keep(flow, enter_end)
        private.heed_sigterm_only_if(self._is_meant)
        if assignment.trigger is not None and assignment.is_tick and flow.flow_run_name is None:
            private.name_run(assignment.flow_run.id, assignment.flow_run.name)
        private.abort_if_untold(assignment.flow_run.id, partial(setattr, execution, "untold"))
        try:
            state = drive(flow, assignment)
        except BaseException as exc:  # noqa: BLE001 - reported by the engine, or no longer ours to run
            fault = exc
        finally:
            over.set()
            current.execution.reset(token)
        end = conclude(execution, state, fault)
        if execution.has_begun and execution.untold is not None:
            run_hooks(flow, assignment, execution.untold, self._tell)
        self._tell(end)


def _parsed(line: str) -> protocol.Order | None:
    """Return an order; None for the rest of one that another interpreter has begun to read."""
    try:
        return protocol.order(line)
    except ValidationError:
        return None


def _guard(assignment: Assignment, over: threading.Event) -> None:
    """End this process at the deadline of its token: the agent that would do so may be frozen."""
    while not over.wait(max(0.01, min(1.0, record.deadline(assignment) - clock()))):
        if clock() >= record.deadline(assignment):
            os.killpg(0, signal.SIGKILL)


def drive(flow: Flow[..., Any], assignment: Assignment) -> State[Any] | None:
    """Run the flow with Prefect's engine, in this thread; returns its final state, a generator's none.

    The engine is given the run without its deployment's id: with it, it would open a websocket for
    each run to watch for a suspension, half a second of every run's time. It reads the whole run, id
    included, from the API before the body starts.

    Raises:
        Exception: what a generator raised, after the engine has reported it.
    """
    flow_run = assignment.flow_run.model_copy(update={"deployment_id": None})
    options: dict[str, Any] = {"flow_run": flow_run, "error_logger": flow_run_logger(assignment.flow_run)}
    if flow.isgenerator:
        items: Any = run_flow(flow, **options)
        asyncio.run(_exhaust(items)) if flow.isasync else [*items]
        return None
    outcome: Any = run_flow(flow, return_type="state", **options)
    if asyncio.iscoroutine(outcome):
        outcome = asyncio.run(outcome)
    return outcome if isinstance(outcome, State) else None


async def _exhaust(items: Any) -> None:
    async for _ in items:
        pass


def run_hooks(
    flow: Flow[..., Any],
    assignment: Assignment,
    state: State[Any],
    tell: Callable[[protocol.Report], None],
) -> None:
    """Run the hooks for a state that the engine has not told, and tell the agent of each."""
    hooks = {
        StateType.COMPLETED: flow.on_completion_hooks,
        StateType.FAILED: flow.on_failure_hooks,
        StateType.CANCELLED: flow.on_cancellation_hooks,
        StateType.CRASHED: flow.on_crashed_hooks,
    }[state.type]
    logger = flow_run_logger(assignment.flow_run, flow)
    for hook in hooks:
        try:
            with turn.calling(hook, tell):
                outcome = hook(flow, assignment.flow_run, state)
                if asyncio.iscoroutine(outcome):
                    asyncio.run(outcome)
        except Exception:
            logger.exception("Hook %r failed.", turn.name_of(hook))


def leave() -> NoReturn:
    """End this process once its logs and events are sent and its `atexit` functions have been called.

    The interpreter's own way out frees all that the nursery has imported, object by object, and may wait
    for threads; this takes milliseconds, and never longer than `LEAVE_SECONDS`.
    """
    last = threading.Timer(LEAVE_SECONDS, os._exit, [0])
    last.daemon = True
    last.start()
    with contextlib.suppress(Exception):
        EventsWorker.drain_all()
    with contextlib.suppress(Exception):
        APILogWorker.drain_all()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    Host(socket.socket(fileno=int(sys.argv[1])), None).serve()
