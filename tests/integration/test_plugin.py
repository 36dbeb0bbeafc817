"""Prefect finds the agent as a plugin, and does not pay for it until it runs."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from prefect.workers.base import BaseWorker

from taskadapter.agent.program import ProgramAgent
from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.execution import protocol
from tests.acceptance.project import PATIENCE
from tests.processes import nurseries


def in_a_fresh_interpreter(script):
    """Return what a script prints as JSON in an interpreter that has imported nothing yet."""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_the_entry_point():
    """The installed package offers the worker's module to Prefect."""
    ours = [point for point in entry_points(group="prefect.collections") if point.name == "taskadapter"]

    assert [point.value for point in ours] == ["taskadapter.agent.worker"]


def test_prefect_finds_the_type():
    """`prefect worker start --type warm-backup` finds our class without our package being imported."""
    found = in_a_fresh_interpreter(
        "import json\n"
        "from prefect.cli._worker_utils import _load_worker_class\n"
        "found = _load_worker_class('warm-backup')\n"
        "print(json.dumps([found.__module__, found.__name__]))\n"
    )

    assert found == ["taskadapter.agent.worker", "WarmBackupWorker"]


def test_the_type_is_registered():
    """Importing the module registers the type with Prefect."""
    assert BaseWorker.get_worker_class_from_type("warm-backup") is WarmBackupWorker


def test_the_template_has_our_variables():
    """A work pool of the type offers what a deployment may set."""
    template = WarmBackupWorker.get_default_base_job_template()

    ours = {"working_dir", "trigger", "initial_state"}
    assert ours <= {*template["variables"]["properties"]}
    assert ours <= {*template["job_configuration"]}


def test_an_agent_that_cannot_start_leaves_no_process():
    """Prefect refuses a worker without a server; the process that was to fork its hosts ends then."""
    agent = ProgramAgent("no-server", "node-1", "default")
    asyncio.run(agent.gone())

    assert nurseries(os.getpid()) == []


def test_importing_the_worker_is_cheap():
    """Prefect imports it for each of its commands: no database driver, no server, no CLI comes along."""
    imported = in_a_fresh_interpreter(
        "import sys, json\n"
        "import taskadapter.agent.worker\n"
        "heavy = ('sqlalchemy', 'psycopg', 'pymysql', 'fastapi', 'prefect.server.api', 'cyclopts')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
    )

    assert imported == []


def test_importing_the_package_is_cheap():
    """The same holds for the module that users import to declare."""
    imported = in_a_fresh_interpreter(
        "import sys, json\n"
        "import taskadapter\n"
        "heavy = ('sqlalchemy', 'psycopg', 'pymysql', 'fastapi', 'prefect.server.api', 'cyclopts')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
    )

    assert imported == []


@pytest.mark.parametrize("line", ["pass", "raise RuntimeError('Prefect has changed')"])
def test_a_nursery_serves_whatever_its_rehearsal_comes_to(line):
    """Without it each run does for itself what it would have spared."""
    ours, theirs = socket.socketpair()
    script = (
        "import socket, sys\n"
        "from taskadapter.execution import nursery\n"
        f"def rehearse(): {line}\n"
        "nursery.rehearsal.rehearse_run = rehearse\n"
        "nursery.main(socket.socket(fileno=int(sys.argv[1])), [])\n"
    )
    with ours, theirs:
        command = [sys.executable, "-c", script, str(theirs.fileno())]
        env = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env) as process:
            theirs.close()
            said = ours.makefile("rb").readline()
            ours.shutdown(socket.SHUT_RDWR)
            process.wait(PATIENCE)

    assert protocol.notice(said) == protocol.Serving()
