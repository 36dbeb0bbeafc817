"""The file to which each body of the benchmarked job appends one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

VARIABLE = "TASKADAPTER_BENCH_LEDGER"


class Line(NamedTuple):
    """One run, as its body saw it."""

    due: float  # seconds since the epoch
    began: float
    pid: int


def append(due: float, began: float) -> None:
    """Append this run's line to the file that the environment names, in one write."""
    with open(os.environ[VARIABLE], "a") as file:  # noqa: PTH123 - as trivial as a body can be
        file.write(f"{due} {began} {os.getpid()}\n")


def read(path: Path) -> list[Line]:
    """Return the lines of all bodies that have begun, in their order."""
    if not path.exists():
        return []
    fields = (line.split() for line in path.read_text().splitlines())
    return [Line(float(due), float(began), int(pid)) for due, began, pid in fields]
