"""What can go wrong, in one family."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def listed(names: Sequence[str], at_most: int = 20) -> str:
    """Return names as a message lists them: not all, where there are many."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{', '.join(names[:at_most])}{more}"


def with_article(noun: str) -> str:
    """Return a noun as a sentence has it: a Job, an object, a UUID."""
    return f"{'an' if noun.lower().startswith(tuple('aeio')) else 'a'} {noun}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return which of the known names may be meant by one that is none; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def in_a_line(text: str) -> str:
    """Return a text of somebody else's as a message has it, without its line breaks."""
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """Return a text of somebody else's with what no database or no encoding has in escapes.

    That is NUL, and what Python makes of the bytes of a file's name that are no UTF-8.
    """
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def words_of(fault: BaseException | None) -> str:
    """Return an error of somebody else's with its name; its text may be what raises."""
    try:
        text = str(fault)
    except Exception:  # noqa: BLE001 - it is the user's code
        text = "<its text cannot be shown>"
    return printable(f"{type(fault).__name__}: {text}")


class TaskError(Exception):
    """A task could not be declared, scheduled or run as asked.

    The root of every error this package raises. Its message names the value, the rule and the
    remedy.
    """


class DeclarationError(TaskError, ValueError):
    """A declaration holds a value that its rule forbids; raised when it is constructed."""


class ApiUnavailableError(TaskError):
    """Prefect's API did not answer, failed, or refused this machine; the same call may succeed later."""


class CoordinationError(TaskError):
    """The coordination database could not be used as asked."""


class DatabaseUnavailableError(CoordinationError):
    """The database did not answer, or not in time; the same call may succeed later.

    Whether what was asked has happened is unknown.
    """


class AccessDeniedError(CoordinationError):
    """The database refused this user: a wrong password, or a right that was not granted."""


class SchemaError(CoordinationError):
    """The database lacks tables or columns that coordination needs, or they are too narrow."""


class DuplicateNodeError(CoordinationError):
    """Another live process uses this node's `task_id`; it was last seen `age` seconds ago."""

    def __init__(self, message: str, *, age: float) -> None:
        super().__init__(message)
        self.age = age


class TokenLostError(TaskError):
    """This run's node no longer holds the token of its group, in the term the run started in."""


def innermost(exc: BaseException) -> BaseException:
    """Return the error that has come alone in groups of errors, as task groups make them."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc
