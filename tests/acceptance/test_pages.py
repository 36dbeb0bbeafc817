"""What the pages for users show works as it stands: its programs run, its commands can be typed so."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from deployments.local import prefect_command, running, wait_until
from tests.acceptance.project import PATIENCE
from tests.pages import blocks, commands

if TYPE_CHECKING:
    from deployments.local import Postgres
    from tests.acceptance.project import Prefect, Project

NODE, _ = blocks("programs", "python")  # the other one is tried in integration/test_scheduler.py
COMMANDS = sorted({line for line in commands() if line.startswith("prefect ")})

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_prefect_has_these_options(line: str) -> None:
    """As its help says."""
    words = shlex.split(line)[1:]
    options = [word for word in words if word.startswith("-")]
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    shown = "".join(
        subprocess.run(
            [prefect_command(), *command, "--help"],
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        ).stdout
        for command in ([], names or ["deploy"])
    )
    assert [option for option in options if not re.search(rf"(?<![\w-]){option}\b", shown)] == []


def test_the_program_that_is_its_own_node(
    project: Project, prefect: Prefect, postgres_server: Postgres
) -> None:
    """Two of them on one database of their own: one runs the jobs, and SIGTERM hands them over."""
    postgres_server.create_database("pages")
    url = make_url(postgres_server.url("pages"))
    there = f'host="{url.host}", port={url.port}, user="{url.username}", password="{url.password or ""}"'
    source, found = re.subn(
        r'host="db", user="tasks", password="\.\.\.", database="tasks"', f'{there}, database="pages"', NODE
    )
    assert found
    # On one machine both would have its name.
    source = source.replace('"reports", **', '"reports", task_id=os.environ["NODE"], **')
    project.write("report.py", "import os\n" + source.replace("interval=60)", "interval=2)"))
    first, second = (project.program("report.py", env={"NODE": name}) for name in ("node-1", "node-2"))
    with running(first), running(second):
        wait_until(lambda: "Report 102" in first.output() + second.output(), PATIENCE, "reports")
        active, standby = (first, second) if "Report 102" in first.output() else (second, first)
        assert "Report" not in standby.output()
        active.stop()
        wait_until(lambda: "Report" in standby.output(), PATIENCE, "the handover")
    numbers = re.findall(r"Report (\d+)", active.output() + standby.output())
    assert sorted(map(int, numbers)) == list(range(100, 100 + len(numbers)))
