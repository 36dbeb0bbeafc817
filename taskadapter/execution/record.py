"""What the process of a run asks and enters in the coordination database: its job's count, state and end.

For a job of a group each transaction begins by locking the token, and is refused when the node has lost it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from prefect.logging.loggers import flow_run_logger

from taskadapter.coordination import store
from taskadapter.coordination.board import DeadlineBoard, clock
from taskadapter.coordination.executions import Begun, End, Limits, Taken
from taskadapter.declare.jobs import Service, dump_state, load_state
from taskadapter.errors import CoordinationError, DatabaseUnavailableError, TaskError, TokenLostError
from taskadapter.execution import current, protocol
from taskadapter.execution.assignment import Assignment
from taskadapter.rules import ticks
from taskadapter.rules.ticks import Verdict

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from taskadapter.coordination.executions import Answer, Entry
    from taskadapter.execution.current import Execution

T = TypeVar("T")

UNENTERED_SECONDS = 15.0
"""After how long a process has its agent enter what its body came to: only the process may be at fault."""


class NotWantedError(Exception):
    """The agent wants a run back whose body has not begun."""


def begin(execution: Execution) -> Answer:
    """Enter the execution in the ledger, immediately before its body.

    Raises:
        NotWantedError: the agent wants the run back, and the database does not answer.
        TokenLostError: the node has lost the token of the job's group.
    """
    from taskadapter.coordination import ledger

    assignment = execution.assignment

    def ask(connection: Connection) -> Answer:
        # It is judged each time: the database may have been away for longer than the policy allows.
        limits = Limits(assignment.trigger_slug or "", assignment.max_count, _too_late(assignment))
        answer = ledger.begin(connection, assignment.execution, assignment.owner, limits)
        if execution.in_doubt and isinstance(answer, Taken) and _is_own(answer.entry, assignment):
            answer = Begun(answer.entry.number)
        execution.in_doubt = execution.in_doubt or isinstance(answer, Begun)
        return answer

    answer = _answer(execution, ask)
    require_trust(assignment)
    execution.in_doubt = False
    return answer


def _too_late(assignment: Assignment) -> str | None:
    """Return why a tick that was claimed in time is not to begin now, by its policy."""
    if assignment.trigger is None or not assignment.is_tick:
        return None
    judgement = ticks.judge(
        assignment.trigger,
        assignment.scheduled_time,
        now=datetime.now(UTC),
        waiting_time=assignment.waiting_time,
    )
    return judgement.reason if judgement.verdict is Verdict.SKIP else None


def _is_own(entry: Entry, assignment: Assignment) -> bool:
    """Return whether this process has made an entry: the answer to its commit was lost on the way."""
    return not entry.outcome and entry.is_of(assignment.execution, assignment.owner)


def prepare(assignment: Assignment) -> None:
    """Connect to the database ahead of the run's moment; a fault is left to that moment."""
    with suppress(CoordinationError):
        store.connect(assignment.database_url.get_secret_value())


def require_trust(assignment: Assignment) -> None:
    """Check the deadline until which the agent may trust its token.

    Raises:
        TokenLostError: it has passed.
    """
    if clock() >= deadline(assignment):
        raise TokenLostError(f"node {assignment.node!r} has lost the token of its group.")


def deadline(assignment: Assignment) -> float:
    """Return until when the run may go on, on the board's clock; infinite without a group."""
    if assignment.token is None or assignment.board is None:
        return float("inf")
    return _board(str(assignment.board)).read(assignment.token)


def check(execution: Execution) -> None:
    """Check the token before a further attempt.

    Raises:
        TokenLostError: the node has lost it.
    """
    from taskadapter.coordination import progress

    token = execution.assignment.token
    if token is not None:
        _answer(execution, lambda connection: progress.require_token(connection, token))
        require_trust(execution.assignment)


def saved_service(execution: Execution, cls: type[Service]) -> Service | None:
    """Return the service as its last successful run left it, None before the first.

    Raises:
        DeclarationError: the class has changed so that a saved value is not valid any more.
    """
    from taskadapter.coordination import progress

    job_id = str(execution.assignment.job_id)
    state = _answer(execution, lambda connection: progress.load_state(connection, job_id))
    return None if state is None else load_state(cls, state)


def enter_end(execution: Execution, service: Service | None, outcome: str, ends: str | None = None) -> None:
    """Enter what the execution came to, and save what it made of its service, if it succeeded.

    Args:
        execution: of the run.
        service: to be saved; None if there is none, or it failed.
        outcome: the name of the state that Prefect is told next.
        ends: why its job is over, if it is with this execution.

    Raises:
        DeclarationError: a field holds what cannot be saved.
        TokenLostError: the node has lost the token; nothing is saved.
    """
    from taskadapter.coordination import ledger

    assignment = execution.assignment
    end = End(outcome, None if service is None else dump_state(service), ends)

    def write(connection: Connection) -> None:
        ledger.settle(connection, assignment.execution, assignment.owner, end, assignment.trigger_slug)

    def tell(fault: str) -> None:
        execution.tell(protocol.Unentered(fault=fault, outcome=outcome, state=end.state, ends=ends))

    _answer(execution, write, tell)
    execution.tell(protocol.Settled())


def fenced(connection: Connection) -> None:
    """Join a transaction of the caller's to the token of the run that is going on.

    It locks the token's row in that transaction: no other node can take the token over before the
    transaction ends, and a node that was paused while it lost the token cannot write after its
    successor. On PostgreSQL the server ends the transaction if it is idle for longer than the lease. On
    SQLite no node can write a heartbeat meanwhile: a transaction that is longer than that ends the run.

    Args:
        connection: of SQLAlchemy, to the coordination database, in a transaction.

    Raises:
        TaskError: no run of a coordinated job is going on here.
        TokenLostError: the node has lost the token; roll back.
    """
    from taskadapter.coordination.tokens import fence

    execution = current.execution.get()
    token = None if execution is None else execution.assignment.token
    if execution is None or token is None:
        raise TaskError(
            "fenced() was called outside a run of a coordinated job; declare the job on a Listener with "
            "a warm_backup_config, and let the agent run it."
        )
    require_trust(execution.assignment)
    fence(connection, token, deadline(execution.assignment) - clock())


@contextmanager
def _timeout_stands_still() -> Iterator[None]:
    """Let what the database takes not count for the timeout of a flow, which Prefect sets as an alarm."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.0)
    try:
        yield
    finally:
        if left:
            signal.setitimer(signal.ITIMER_REAL, left, interval)


@_timeout_stands_still()
def _answer(
    execution: Execution,
    question: Callable[[Connection], T],
    unentered: Callable[[str], None] = lambda _: None,
) -> T:
    """Ask until the database answers: its faults are not the job's, and end with the node's trust.

    Args:
        execution: of the run.
        question: what to ask.
        unentered: is called once with the fault, when the database has failed this process for long.

    Raises:
        NotWantedError: the agent wants the run back meanwhile, and its body has not begun.
        TokenLostError: the node has lost the token.
    """
    assignment, faults, since, is_told = execution.assignment, set[str](), time.monotonic(), False
    while True:
        try:
            answer = store.ask(assignment.database_url.get_secret_value(), question)
        except CoordinationError as fault:  # away, or refusing: also in words that are not known here
            require_trust(assignment)
            if not execution.has_begun and execution.is_dropped():
                raise NotWantedError(f"{assignment.flow_run.name} is given back: {fault}") from fault
            if str(fault) not in faults:
                log = flow_run_logger(assignment.flow_run)
                log.warning("Waiting for the coordination database: %s", fault)
            faults.add(str(fault))
            seconds = time.monotonic() - since
            # Nobody can enter an end while it is away, and another node would take the run for interrupted.
            if not execution.has_begun or not isinstance(fault, DatabaseUnavailableError):
                execution.tell(protocol.Waits(fault=str(fault), seconds=seconds))
            if seconds >= UNENTERED_SECONDS and not is_told:
                is_told = True
                unentered(str(fault))
            execution.has_waited = True
            time.sleep(store.RETRY_SECONDS)
        else:
            if faults:
                execution.tell(protocol.Answered())
            return answer


@lru_cache(maxsize=1)
def _board(path: str) -> DeadlineBoard:
    return DeadlineBoard.open(path)
