"""What a runner used and what its runs did, read from the outside."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.processes import nurseries

if TYPE_CHECKING:
    from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed, NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient, NaN where there is none."""
    return numerator / denominator if denominator else math.nan


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and all its descendants, living or dead, ever used.

    A living process also carries the time of the children it has waited for. So the sum misses
    nothing but children that outlived their parent, and it is exact when no process comes or goes
    while it is taken: it is taken again until that was so (and at most fifty times).
    """
    total, before = math.nan, None
    for _ in range(50):
        family = _family(pid)
        if family == before:
            return total
        before = family
        total = sum(sum(times[:4]) for process in family if (times := _cpu_times(process)))
    return total


def proportional_memory(pid: int) -> float:
    """Return the proportional set size of a process and its descendants, in MB (10**6 bytes).

    Memory that several processes share counts once in total, which is what forked hosts are about.
    """
    return sum(_proportional_set_size(process.pid) for process in _family(pid)) * 1024 / 1e6


def holdings(pid: int) -> dict[str, float]:
    """Return what a node holds: its process, and the one below it that forks others.

    Memory is what each has in RAM, in MB; connections are those of the internet's families.
    """
    held: dict[str, float] = {}
    for name, process in (("agent", psutil.Process(pid)), ("nursery", nurseries(pid)[0])):
        held |= {
            f"{name} memory": process.memory_info().rss / 1e6,
            f"{name} threads": process.num_threads(),
            f"{name} files": process.num_fds(),
            f"{name} connections": len(process.net_connections()),
        }
    return held


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_times(process: psutil.Process) -> tuple[float, ...]:
    try:
        return tuple(process.cpu_times())
    except psutil.NoSuchProcess:
        return ()


def _proportional_set_size(pid: int) -> int:
    """Return one process's share in kB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
