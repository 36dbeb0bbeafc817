"""What a check says: how much it matters, and a sentence with the remedy where one is needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from taskadapter.errors import in_a_line


class Level(StrEnum):
    """How much a finding matters: a warning works today, an error does not."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What one check found; `text` has the remedy where one is needed."""

    level: Level
    text: str


def ok(text: str) -> Finding:
    """Return a finding that needs no remedy."""
    return _finding(Level.OK, text)


def warning(text: str) -> Finding:
    """Return a finding of what works today, and may not tomorrow."""
    return _finding(Level.WARNING, text)


def error(text: object) -> Finding:
    """Return a finding of what does not work."""
    return _finding(Level.ERROR, text)


def _finding(level: Level, text: object) -> Finding:
    sentence = in_a_line(str(text)).removesuffix(".")
    return Finding(level, sentence if sentence.endswith("?") else f"{sentence}.")
