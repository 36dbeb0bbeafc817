"""What agent and process say arrives as it was said, and nothing else is taken for a message."""

from __future__ import annotations

from typing import get_args

import pytest
from prefect.states import Crashed
from pydantic import SecretStr, ValidationError

from taskadapter.execution import protocol
from tests.unit.test_hosts import ASSIGNMENT

ORDERS = [
    protocol.Run(assignment=ASSIGNMENT),
    protocol.RunHooks(assignment=ASSIGNMENT, state=Crashed(message="killed")),
    protocol.Go(),
    protocol.Drop(),
    protocol.Cancel(),
    protocol.Stop(),
]
REPORTS = [
    protocol.Ready(pid=1),
    protocol.Loaded(seconds=0.5),
    protocol.Started(),
    protocol.Begun(ended="it is over"),
    protocol.Waits(fault="permission denied", seconds=0.5),
    protocol.Answered(),
    protocol.Settled(),
    protocol.Hook(name="notify"),
    protocol.Told(),
    protocol.Untold(ended="it is over"),
    protocol.Dropped(),
    protocol.Paused(),
    protocol.Skipped(reason="too late"),
    protocol.Crashed(fault="no such module\nat all"),
    protocol.Unloadable(fault="no such module"),
    protocol.Unentered(fault="no files", outcome="Failed", state={"i": 1}, ends="run 1 failed"),
]
REQUESTS = [protocol.Fork(number=1), protocol.Connect(database_url=SecretStr("sqlite://"))]
NOTICES = [
    protocol.Serving(),
    protocol.Refused(reason="no"),
    protocol.Gone(number=1, exit_code=-9, left=("a",)),
]


@pytest.mark.parametrize(
    ("parse", "messages", "kinds"),
    [
        (protocol.order, ORDERS, protocol.Order),
        (protocol.report, REPORTS, protocol.Report),
        (protocol.request, REQUESTS, protocol.Request),
        (protocol.notice, NOTICES, protocol.Notice),
    ],
)
def test_each_message_arrives_as_it_was_said(parse, messages, kinds):
    """On a line of its own, whatever its texts hold; no kind is forgotten here."""
    assert {type(message) for message in messages} == set(get_args(kinds))
    for message in messages:
        line = message.line()
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert parse(line) == message


def test_the_password_of_the_database_arrives():
    """A secret is shown nowhere else."""
    order = protocol.order(ORDERS[0].line())

    assert isinstance(order, protocol.Run)
    assert order.assignment.database_url.get_secret_value() == "sqlite://"
    assert "sqlite" not in repr(order)


@pytest.mark.parametrize("line", [b"", b"{}", b"not json", b'{"kind": "no such kind"}'])
@pytest.mark.parametrize("parse", [protocol.order, protocol.report, protocol.request, protocol.notice])
def test_nothing_else_is_a_message(parse, line):
    """Such as the rest of a line of which another interpreter has read the beginning."""
    with pytest.raises(ValidationError):
        parse(line)


def test_what_json_cannot_keep_is_said_in_escapes():
    """The name of a file that is not UTF-8: the process's last word was that it could not say it."""
    said = protocol.Unloadable(fault="ValueError: caf\udce9").line()
    assert protocol.report(said) == protocol.Unloadable(fault=r"ValueError: caf\udce9")
    left = protocol.Gone(number=1, exit_code=0, left=("cat caf\udce9",)).line()
    assert protocol.notice(left) == protocol.Gone(number=1, exit_code=0, left=(r"cat caf\udce9",))
