"""Programs that are forked from one that has imported Prefect: they are as others."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from deployments.local import prefect_command, wait_until
from tests import warm
from tests.acceptance.project import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

TELLS = """
import os, sys
print(sys.argv[1:], os.getcwd(), dict(os.environ), sys.path[0], sys.stdin.read(), __name__, end="")
print("error", file=sys.stderr)
sys.exit(3)
"""


def test_a_program_has_what_it_was_given(tmp_path: Path) -> None:
    """Words, folder, environment, nothing to read; what it prints and exits with is returned."""
    (tmp_path / "tell.py").write_text(TELLS)
    env = {"ONLY": "this"}
    for code, first in (["-c", TELLS], ""), ([str(tmp_path / "tell.py")], str(tmp_path)):
        done = warm.run(sys.executable, *code, "one", "2", cwd=tmp_path, env=env)
        told = f"['one', '2'] {tmp_path} {env} {first}  __main__"
        assert (done.returncode, done.stdout, done.stderr) == (3, told, "error\n")


def test_a_program_has_the_settings_of_its_own_environment(tmp_path: Path) -> None:
    """And not those of the process that it is forked from, or of the tests."""
    env = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = warm.run(prefect_command(), "config", "view", "--show-sources", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "PREFECT_API_URL='http://127.0.0.1:9/api' (from env)" in done.stdout


def test_a_program_that_a_signal_ends(tmp_path: Path) -> None:
    """As `subprocess` tells it."""
    code = "import os; os.kill(os.getpid(), 9)"
    assert warm.run(sys.executable, "-c", code, cwd=tmp_path, env={}).returncode == -9


def test_a_program_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    """Whatever it is that keeps whoever has started it from waiting."""
    code = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(999)"
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run(sys.executable, "-c", code, cwd=tmp_path, env={}, within=2.0)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(pid), PATIENCE, "it to be killed")
