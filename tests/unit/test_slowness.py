"""The watch that tells how slow a machine is, and the tests that are repeated on one that stood still."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slowness import Slowness

PROJECT = Path(__file__).parents[2]

FAILING = """
import pytest
from pathlib import Path

@pytest.mark.undisturbed(60)
def test_fails():
    with Path(__file__).with_name("tries").open("a") as file:
        file.write("once ")
    raise AssertionError
"""

tries: list[float] = []


def stand_still(seconds: float) -> None:
    """Have this process stopped for a while."""
    pid = os.getpid()
    script = f"kill -STOP {pid}; sleep {seconds}; kill -CONT {pid}"
    with subprocess.Popen(["sh", "-c", script]) as stopper:
        stopper.wait()


def test_it_tells_for_how_long_the_machine_stood_still() -> None:
    """Be it told already or not."""
    with Slowness() as watch:
        before = time.time()
        stand_still(0.5)
        assert watch.longest(before) >= 0.3
        assert watch.since(before) >= 0.3


def test_it_tells_of_a_span() -> None:
    """As one delay, and as part of all delays since a moment; not before it, nor after it."""
    watch = Slowness()
    watch._due = time.monotonic() + 3600
    watch._late = [(100.0, 0.5), (105.0, 0.25)]
    assert [watch.since(moment) for moment in (99, 101, 106)] == [0.75, 0.25, 0]
    assert [watch.longest(moment) for moment in (99, 101, 106)] == [0.5, 0.25, 0]
    assert [watch.longest(until=moment) for moment in (99, 99.6, 104.8)] == [0, 0.5, 0.5]


@pytest.mark.undisturbed(0.3)
def test_a_test_is_repeated_on_a_machine_that_stood_still() -> None:
    """This one is: its first try fails."""
    tries.append(time.time())
    if len(tries) == 1:
        stand_still(0.5)
    assert len(tries) > 1


def test_a_failure_on_a_machine_that_goes_on_is_one(tmp_path: Path) -> None:
    """It is made once, and told."""
    (tmp_path / "test_it.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    options = ["-c", str(PROJECT / "pyproject.toml"), "--rootdir", str(tmp_path), "test_it.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = str(PROJECT)
    done = subprocess.run([*command, *options], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "tries").read_text() == "once "
