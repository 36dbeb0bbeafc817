"""Folders in the temporary directory that do not outlive their agent, also if that is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from taskadapter.errors import TaskError

PREFIX = "taskadapter-agent-"

_LOCK = ".lock"

_YOUNG_SECONDS = 60.0
"""A folder without a lock that is younger may be one that is just being made."""


class Scratch:
    """A folder of this agent's own, until it is closed; what killed agents left is removed with it.

    Raises:
        TaskError: none can be made.
    """

    def __init__(self) -> None:
        try:
            self._make()
        except OSError as error:
            raise TaskError(
                f"no folder for temporary files can be made: {error.strerror or error}; see that the disk "
                "has room, and that TMPDIR names a folder that may be written."
            ) from error

    def _make(self) -> None:
        _remove_left()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            # As long as it is open nobody else takes the folder for one that was left.
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.fstat(self._lock.fileno()).st_nlink:
                return
            self._lock.close()  # somebody has, in the moment before it was locked

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            _remove_if_left(folder)
        except OSError:  # gone meanwhile, or another user's
            continue


def _remove_if_left(folder: Path) -> None:
    """Remove a folder whose agent is gone; until it is removed, nobody else can lock it."""
    lock = folder / _LOCK
    if not lock.exists():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _YOUNG_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
        return
    with lock.open("r+") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
