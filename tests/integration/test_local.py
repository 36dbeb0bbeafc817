"""The servers that the other tests break: paused, killed and started again, they are the same."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest

from deployments.local import Postgres, Program, postgres, running, wait_until
from tests.acceptance.project import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IGNORES_SIGTERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(999)"
HAS_A_CHILD = "import subprocess; subprocess.run(['sleep', '999'], start_new_session=True)"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL that these tests may break."""
    with postgres() as own:
        yield own


def python(code: str, tmp_path: Path) -> Program:
    """A program that is one line of Python."""
    return Program("test", [sys.executable, "-uc", code], log=tmp_path / "log")


def test_a_copied_database_has_the_rows_of_its_template(server: Postgres) -> None:
    """A database made from a template starts with what is in it."""
    server.create_database("original")
    with server.connect("original") as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS value")

    server.create_database("copy", template="original")

    with server.connect("copy") as connection:
        assert connection.execute("SELECT value FROM kept").fetchall() == [(1,)]


def test_killed_postgres_starts_again_on_its_port_with_its_data(server: Postgres) -> None:
    """What was committed is there after a crash, and old connections are dead."""
    server.create_database("durable")
    old, pid = server.connect("durable"), server.pid

    server.kill()
    server.start()

    with pytest.raises(psycopg.OperationalError), old:
        old.execute("SELECT 1")
    server.connect("durable").close()
    assert server.pid != pid


def test_paused_postgres_answers_after_it_resumes(server: Postgres) -> None:
    """A frozen server keeps its connections, also those of backends outside its process group."""
    with server.connect() as connection:
        server.pause()
        backend = psutil.Process(connection.info.backend_pid)
        wait_until(lambda: backend.status() == psutil.STATUS_STOPPED, PATIENCE, "the backend to freeze")
        server.resume()

        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_postgres_leaves_no_process_and_no_file() -> None:
    """A throw-away server is gone when its block ends."""
    with postgres() as server:
        pid, home = server.pid, server.log.parent

    assert not psutil.pid_exists(pid)
    assert not home.exists()


def test_stop_kills_what_does_not_end_in_time(tmp_path: Path) -> None:
    """A program that ignores the request to stop is killed at the end of its grace."""
    program = python(IGNORES_SIGTERM, tmp_path)
    program.start()
    wait_until(lambda: "up" in program.output(), PATIENCE, "the program to be up")
    process = program.process
    assert process is not None

    program.stop(within=0.1)

    assert process.returncode == -signal.SIGKILL


def test_stop_kills_what_it_may_not_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a program takes its time to end."""
    program = python(IGNORES_SIGTERM, tmp_path)
    program.start()
    wait_until(lambda: "up" in program.output(), PATIENCE, "the program to be up")
    process = program.process
    assert process is not None
    wait = process.wait

    def interrupted(seconds: float) -> int:
        monkeypatch.setattr(process, "wait", wait)
        raise KeyboardInterrupt(seconds)

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.stop()

    assert process.returncode == -signal.SIGKILL


def test_kill_reaches_children_in_other_sessions(tmp_path: Path) -> None:
    """Nothing a program has started outlives it."""
    with running(python(HAS_A_CHILD, tmp_path)) as program:
        parent = psutil.Process(program.pid)
        children = wait_until(parent.children, PATIENCE, "the child")

        program.kill()

        assert not any(child.is_running() for child in children)


def test_a_program_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path) -> None:
    """Whoever waits for a program learns why it will never be ready."""
    program = Program("test", ["ls", "/nowhere"], log=tmp_path / "log", ready=lambda: False)

    with pytest.raises(RuntimeError, match=r"test ended with \d+:\n.*/nowhere"):
        program.start()


def test_wait_until_names_what_it_waited_for() -> None:
    """A missed deadline says what did not happen."""
    with pytest.raises(TimeoutError, match="waited 0 s for the moon"):
        wait_until(lambda: False, 0, "the moon")
