"""What a killed agent leaves in the temporary folder is gone when the next one has started."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from taskadapter.errors import TaskError
from taskadapter.execution.scratch import PREFIX, Scratch


@pytest.fixture(autouse=True)
def _temporary(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def killed(tmp_path):
    """The folder of an agent that was killed with SIGKILL."""
    program = "import os, signal\nfrom taskadapter.execution.scratch import Scratch\nfolder = Scratch()\n"
    program += "(folder.path / 'code').mkdir()\nprint(folder.path, flush=True)\n"
    program += "os.kill(os.getpid(), signal.SIGKILL)"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    return Path(done.stdout.strip())


def test_what_a_killed_agent_left_is_removed(tmp_path):
    """The next agent removes it, and leaves alone what another one uses."""
    living, left = Scratch(), killed(tmp_path)
    assert left.exists()
    next_one = Scratch()
    assert (left.exists(), living.path.exists(), next_one.path.exists()) == (False, True, True)
    for folder in (living, next_one):
        folder.close()
        assert not folder.path.exists()


@pytest.mark.parametrize(("age", "stays"), [(0, True), (3600, False)])
def test_a_folder_that_is_being_made(tmp_path, age, stays):
    """One without a lock is somebody's who has just made it, or was left by one who was killed then."""
    folder = tmp_path / f"{PREFIX}new"
    folder.mkdir()
    moment = time.time() - age
    os.utime(folder, (moment, moment))
    Scratch().close()
    assert folder.exists() is stays


def test_a_folder_that_is_about_to_be_locked(monkeypatch):
    """An agent whose folder another one removes in that moment makes itself a new one."""
    flock = fcntl.flock

    def too_late(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        Scratch().close()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    folder = Scratch()
    assert folder.path.exists()
    Scratch().close()
    assert folder.path.exists()
    folder.close()


def test_a_machine_without_room_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing can be written, `tempfile` finds no folder at all, and names many."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(TaskError, match="no folder for temporary files can be made: No such file"):
        Scratch()
