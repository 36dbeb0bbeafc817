"""Processes of ours, as the operating system has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import signal


def nurseries(pid: int) -> list[psutil.Process]:
    """Return the processes below one that fork others."""
    return [
        child
        for child in psutil.Process(pid).children()
        if "taskadapter.execution.nursery" in child.cmdline()
    ]


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
