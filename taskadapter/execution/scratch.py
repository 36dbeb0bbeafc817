"""Folders in the temporary directory that do not outlive their agent, also if that is killed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "taskadapter-agent-"

_LOCK = ".lock"

_YOUNG_SECONDS = 60.0
"""A folder without a lock that is younger may be one that is just being made."""


class Scratch:
    """A folder of this agent's own, until it is closed; what killed agents left is removed with it."""

    def __init__(self) -> None:
        _remove_left()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # As long as it is open nobody else takes the folder for one that was left.
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # gone meanwhile, or another user's
            continue


def _is_left(folder: Path) -> bool:
    """Return whether a folder's agent is gone."""
    lock = folder / _LOCK
    if not lock.exists():
        return folder.is_dir() and time.time() - folder.stat().st_mtime > _YOUNG_SECONDS
    with lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
