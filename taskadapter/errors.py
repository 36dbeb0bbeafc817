"""What can go wrong, in one family."""

from __future__ import annotations


class TaskError(Exception):
    """A task could not be declared, scheduled or run as asked.

    The root of every error this package raises. Its message names the value, the rule and the
    remedy.
    """


class DeclarationError(TaskError, ValueError):
    """A declaration holds a value that its rule forbids; raised when it is constructed."""
