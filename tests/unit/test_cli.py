"""The command's answers to what is no command of it."""

import sys

import pytest

from taskadapter import TaskError, cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("frobnicate", 'Unknown command "frobnicate". Available commands: '),
        ("render /nope", "/nope is more than the command takes. "),
        ("status --wat", "Unknown option: --wat. Did you mean --watch? "),
        ("ledger x --last many", 'Invalid value for --last: unable to convert "many" into int. '),
    ],
)
def test_what_it_does_not_take_is_told_in_a_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["taskadapter", *arguments.split()])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert shown.err.startswith(f"taskadapter: {said}")
    assert shown.err.endswith("See `taskadapter --help`.\n")
    assert shown.out == ""


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (0, "--last=0: must be at least 1."),
        (10**20, f"--last={10**20}: must be at most 1000000000; choose a smaller number."),
    ],
)
def test_how_many_executions_can_be_asked_for(last, said):
    """No fewer than one, and no more than an integer of a database holds; nothing is read for others."""
    with pytest.raises(TaskError) as refused:
        cli.ledger("job", last=last)
    assert str(refused.value) == said
