"""Processes of ours, as the operating system has them."""

from __future__ import annotations

import psutil


def nurseries(pid: int) -> list[psutil.Process]:
    """Return the processes below one that fork others."""
    return [child for child in psutil.Process(pid).children() if "taskadapter.nursery" in child.cmdline()]
