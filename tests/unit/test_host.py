"""What the process of a run tells its agent before the flow is run, and for whom it speaks."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from taskadapter.execution import host, protocol, workspace
from tests.unit.test_hosts import ASSIGNMENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from taskadapter.execution.assignment import Assignment


def told_without(
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    lack: Callable[[object], None],
    assignment: Assignment = ASSIGNMENT,
) -> list[protocol.Report]:
    """What a process tells its agent that lacks something at a step towards its flow."""
    told: list[protocol.Report] = []
    agent, ours = socket.socketpair()
    with agent, ours:
        process = host.Host(ours, ExitStack())
        monkeypatch.setattr(process, "_tell", told.append)
        monkeypatch.setattr(workspace, "enter", lambda _: None)
        monkeypatch.setattr(workspace, step, lack)
        process._carry_out(protocol.Run(assignment=assignment))
    return told


@pytest.mark.parametrize("step", ["enter", "load"])
def test_what_is_not_here_may_be_on_another_node(monkeypatch, step):
    """A folder, or a file: the agent asks whether one has it."""

    def lack(_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/no/such")

    (report,) = told_without(monkeypatch, step, lack)
    assert isinstance(report, protocol.Unloadable)
    assert "/no/such" in report.fault


@pytest.mark.parametrize("is_tick", [True, False])
def test_a_tick_waits_for_code_that_is_not_here(monkeypatch, is_tick):
    """Whoever has asked for a run is told at once."""

    def lack(_: object) -> None:
        raise workspace.LacksCodeError("folder /srv lacks flows/job.py")

    key = "scheduled 1 2 2026-11-29" if is_tick else None
    flow_run = ASSIGNMENT.flow_run.model_copy(update={"auto_scheduled": is_tick, "idempotency_key": key})
    assignment = ASSIGNMENT.model_copy(update={"flow_run": flow_run})
    told = told_without(monkeypatch, "load", lack, assignment)
    fault = "The flow could not be loaded: folder /srv lacks flows/job.py"
    assert told == [protocol.Unloadable(fault=fault, waits=is_tick)]


def test_no_timeout_of_a_users_module_ends_the_talk_with_the_agent():
    """One that is imported ahead may set it for all sockets."""
    agent, ours = socket.socketpair()
    with agent, ours:
        ours.settimeout(2.0)
        host.Host(ours, None)
        assert ours.gettimeout() is None


def test_only_the_process_of_a_run_speaks_for_it(monkeypatch):
    """A body may fork, and its child go on where the body ends: the run's own process is not over."""
    agent, ours = socket.socketpair()
    with agent, ours:
        process = host.Host(ours, None)
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: 2**22)
            process._tell(protocol.Told())
        process._tell(protocol.Untold())
        assert protocol.report(agent.recv(1000)) == protocol.Untold()
