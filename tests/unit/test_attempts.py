"""What a run says when its last attempt has failed."""

import pytest

from taskadapter.execution.attempts import consequence

RESTART = "The job ends on all nodes; `taskadapter restart hello` starts it again."
SHORT = "No further one fits in before the next tick."


@pytest.mark.parametrize(
    ("ended", "is_short", "said"),
    [
        (None, False, "The job goes on."),
        (None, True, f"{SHORT} The job goes on."),
        ("hello", False, RESTART),
        ("hello", True, f"{SHORT} {RESTART}"),
        ("my job", False, RESTART.replace("hello", "'my job'")),
    ],
)
def test_what_follows_from_a_failure_is_said_in_sentences(ended, is_short, said):
    """With the command that starts a job again, where it ends."""
    assert consequence(ended, is_short=is_short) == said
