"""The tutorial works as it stands: what its blocks say is written, started and run, in their order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from deployments.local import free_port, wait_until
from deployments.program import HOST, Program, environment, running
from tests.acceptance.project import PATIENCE

TEXT = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
PORT = "4200"


class Block(NamedTuple):
    """A block of the tutorial: what is typed where, or a file."""

    title: str
    text: str


BLOCKS = [
    Block(*found) for found in re.findall(r'```(?:console|python) title="(.*?)"\n(.*?)```', TEXT, re.DOTALL)
]


def of(title: str) -> list[str]:
    """Return the texts of the blocks with a title, in their order."""
    found = [block.text for block in BLOCKS if block.title == title]
    assert found, title
    return found


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    """From a folder with one file to a job that has been taken over, with no tick lost or doubled."""
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    (start,) = of("every terminal")
    # The page's virtual environment is that of this test.
    activate = home / "taskadapter" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    env = environment(
        {
            "HOME": str(home),
            "PREFECT_HOME": str(home / ".prefect"),
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONUNBUFFERED": "1",
        }
    )

    def shell(text: str) -> list[str]:
        """Return the command that types a text into a terminal which the page has begun."""
        return ["sh", "-ec", start.replace(PORT, str(port)) + text]

    deploy, status, kill, look = of("terminal 2")

    def program(title: str) -> Program:
        (command,) = of(title)
        return Program(title, shell(f"exec {command}"), log=tmp_path / f"{title}.log", cwd=home, env=env)

    def run(text: str) -> str:
        return subprocess.run(
            shell(text), cwd=home, env=env, check=True, capture_output=True, text=True
        ).stdout

    def is_up() -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/api/health", timeout=5):
                return True
        except OSError:
            return False

    with ExitStack() as stack:
        stack.enter_context(running(program("terminal 1")))
        wait_until(is_up, PATIENCE, "the server")
        run("pwd")  # makes the project's folder
        (home / "hello" / "flows" / "hello.py").write_text(*of("flows/hello.py"))
        run(deploy)

        first = stack.enter_context(running(program("terminal 3")))
        wait_until(lambda: "active for greetings in term 1" in first.output(), PATIENCE, "node-1")
        wait_until(lambda: "Hello number 2 from node-1" in first.output(), PATIENCE, "its second greeting")
        second = stack.enter_context(running(program("terminal 4")))
        wait_until(lambda: "node-2" in run(status), PATIENCE, "the standby")
        assert re.search(r"greetings .*node-1", run(status))

        # By a name that others on this machine may have, too: so it is only seen whom it would reach.
        command, *_, pattern = shlex.split(kill)
        assert command == "pkill"
        lines = [" ".join(psutil.Process(node.pid).cmdline()) for node in (first, second)]
        assert [re.search(pattern, line) is not None for line in lines] == [True, False]
        first.kill()
        wait_until(lambda: "active for greetings in term 2" in second.output(), PATIENCE, "the takeover")
        wait_until(lambda: second.output().count("from node-2") >= 3, PATIENCE, "it to go on")
        seen = run(look)

    assert re.search(r"greetings .*node-2", seen)
    assert "missing" not in seen
    numbers = [
        int(number) for number in re.findall(r"Hello number (\d+) from", first.output() + second.output())
    ]
    # The last one of the node that was killed may have been in the middle of its body.
    assert sorted(numbers) == list(range(1, max(numbers) + 1))
    assert len(numbers) == len(set(numbers))
