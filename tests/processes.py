"""Processes of ours, as the operating system has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import signal

NURSERY = "taskadapter.execution.nursery"


def nurseries(pid: int) -> list[psutil.Process]:
    """Return the processes below one that fork others, without those that are just ending."""
    return [child for child in psutil.Process(pid).children() if NURSERY in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
