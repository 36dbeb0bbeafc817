"""The command ``taskadapter``: only what Prefect's own command lacks."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple
from uuid import UUID

import httpx
from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from prefect.exceptions import ObjectNotFound
from rich.console import Console
from rich.live import Live
from rich.text import Text

from taskadapter import tables
from taskadapter.errors import ApiUnavailableError, TaskError, in_a_line, listed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prefect.client.schemas.objects import Worker, WorkPool
    from prefect.client.schemas.responses import DeploymentResponse
    from rich.console import Group
    from sqlalchemy import Engine

    from taskadapter.coordination.overview import Status
    from taskadapter.prefect_api.pool import Domain

WITHOUT_API = "This is by the database alone, and by the timing of a pool that declares none."
"""What is said of an answer that was to begin with the work pool."""

BY_ID = "This is by the database alone: what waits or is missing, and whether the job is over, is not told."
"""What is said of a ledger that was to be compared with the job's trigger."""

app = App(name="taskadapter", help="Periodic Prefect jobs, each on exactly one of several machines.")
database = App(name="db", help="The tables of the coordination database.")
app.command(database)
app.register_install_completion_command(help="Install completion for your shell.")

Pool = Annotated[
    str | None, Parameter(name=["--pool", "-p"], help="The work pool; by default the settings' one.")
]

Flows = Annotated[Path, Parameter(help="The folder of flow modules.")]

Job = Annotated[str, Parameter(help="The job: its name, flow/deployment, or its id.")]


@app.command
def render(
    *,
    flows: Flows = Path("flows"),
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help="The file to write; by default deployments/prefect.yaml."),
    ] = None,
    check: Annotated[
        bool, Parameter(help="Write nothing; exit with 1 if the file is not up to date.")
    ] = False,
) -> None:
    """Write the deployments that the flow modules declare into a prefect.yaml."""
    from taskadapter import render as rendering

    output = output or rendering.RENDERED
    text = rendering.render(flows, output)
    if not check:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise TaskError(f"{output} cannot be written: {error.strerror}.") from error
        print(f"Wrote {output}. To deploy it:")
        print(f"  prefect --no-prompt deploy --prefect-file {output} --all")
    elif not rendering.is_up_to_date(output, text):
        raise TaskError(f"{output} is not what {flows}/ declares; run `taskadapter render`.")


@app.command
def status(
    *,
    pool: Pool = None,
    watch: Annotated[bool, Parameter(help="Go on showing it, until Ctrl-C.")] = False,
    as_json: Annotated[bool, Parameter(name="--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the groups, who is active for them, and the nodes."""
    from taskadapter.coordination.engines import transaction
    from taskadapter.coordination.faults import where
    from taskadapter.coordination.overview import read_status

    shared = _shared(pool, asks_what_is_paused=True)
    domain, place = shared.domain, where(shared.engine.url)

    def read() -> Status:
        with transaction(shared.engine) as connection:
            return read_status(connection, shared.name)

    def show() -> Group:
        return tables.status(read(), domain, place, shared.closed)

    if as_json:
        print(json.dumps(tables.status_as_json(read(), domain, place, shared.closed), indent=2))
    elif not watch:
        Console().print(show())
    else:
        with Live(show(), auto_refresh=False) as live:
            while True:
                time.sleep(domain.heartbeat_frequency)
                live.update(show(), refresh=True)


@app.command
def resign(
    group: str,
    /,
    *,
    pool: Pool = None,
    force: Annotated[bool, Parameter(negative=(), help="Also where nobody stands by.")] = False,
) -> None:
    """Ask the active node of a group to hand over to a standby, once its runs have ended."""
    from taskadapter.coordination.engines import transaction
    from taskadapter.coordination.overview import read_status
    from taskadapter.coordination.tokens import request_resign

    shared = _shared(pool)
    with transaction(shared.engine) as connection:
        status = read_status(connection, shared.name)
        standing_by = status.standing_by(shared.domain.liveness_check_interval)
        if group not in standing_by:
            names = listed(list(standing_by)) or "none until an agent starts"
            raise TaskError(
                f"there is no group {group!r} in work pool {shared.name!r}, which has {names}; name "
                "another pool with --pool."
            )
        if not standing_by[group] and not force:
            raise TaskError(
                f"nobody stands by for group {group!r}, and its jobs would only pause and come back to the "
                "same node; start another agent, or add --force."
            )
        asked = request_resign(connection, group)
    print(f"Asked node {asked.task_id!r}, which holds {group!r} in term {asked.term}, to hand over.")


@app.command
def ledger(
    job: Job,
    /,
    *,
    last: Annotated[int, Parameter(help="How many of its executions.")] = 50,
    as_json: Annotated[bool, Parameter(name="--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what a job has executed: when, where, how late, and which ticks between them are missing.

    If the API does not answer, name the job by its id to see what the database has.
    """
    from taskadapter.audit import WAITING, executed, history, not_shown, standing
    from taskadapter.declare.values import MOST

    if last < 1:
        raise TaskError(f"--last={last}: must be at least 1.")
    if last > MOST:
        raise TaskError(f"--last={last}: must be at most {MOST}; choose a smaller number.")
    deployment, engine, job_id = _found(job)
    lines = history(engine, deployment, last) if deployment else executed(engine, job_id, last)
    if as_json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
        return
    if deployment is None:
        Console().print(tables.ledger(lines) if lines else "The ledger has nothing of that job.")
        return
    more = not_shown(deployment, lines, last)
    if all(line.outcome == WAITING for line in lines):
        count = len(lines) + (more[0] if more else 0)
        Console().print(tables.nothing_yet(count, lines[-1].due if lines else None), highlight=False)
    else:
        Console().print(tables.ledger(lines))
        if more is not None:
            Console().print(tables.not_shown(*more), highlight=False)
    if (how := standing(engine, deployment)) is not None:
        Console().print(f"The job is {how}.", highlight=False)


@app.command
def restart(job: Job, /) -> None:
    """Start a job again that has ended, by its error policy or otherwise.

    Ticks between its end and now are not run.
    """
    from taskadapter.agent import switches
    from taskadapter.prefect_api.client import server_client
    from taskadapter.prefect_api.deployments import find_job

    async def start() -> tuple[DeploymentResponse, str]:
        async with server_client() as client:
            deployment = await find_job(client, job)
            return deployment, await switches.restart(client, deployment)

    deployment, why = asyncio.run(start())
    print(f"Job {deployment.name!r} is started again. It had ended: {why}.")
    if deployment.paused:
        print(f"It is paused, too; resume it in the UI, or with `taskadapter resume {shlex.quote(job)}`.")


@app.command
def pause(job: Job, /) -> None:
    """Pause a job on all nodes, until it is resumed; a run that has begun goes on."""
    from taskadapter.scheduler import apause_job

    asyncio.run(_on_the_server(lambda: apause_job(job)))
    print(f"Job {job!r} is paused.")


@app.command
def resume(job: Job, /) -> None:
    """Resume a job that is paused; its waiting policy says what becomes of the ticks that it missed."""
    from taskadapter.scheduler import aresume_job

    asyncio.run(_on_the_server(lambda: aresume_job(job)))
    print(f"Job {job!r} is not paused any more.")


async def _on_the_server(do: Callable[[], Awaitable[None]]) -> None:
    """Do what is for programs, too, once the server has answered that the settings name."""
    from taskadapter.prefect_api.client import server_client

    async with server_client():
        await do()


class _Found(NamedTuple):
    """A job, the database that has its ledger, and the job's id; no job while the API does not answer."""

    deployment: DeploymentResponse | None
    engine: Engine
    job_id: UUID


def _found(job: str) -> _Found:
    """Return a job; while the API does not answer, what this machine's settings and its id say of it.

    Raises:
        TaskError: there is no such job; or the API does not answer, and it was not named by its id, or no
            setting names the database.
    """
    from taskadapter.prefect_api.client import AWAY, server_client
    from taskadapter.prefect_api.deployments import find_job
    from taskadapter.settings import PREFIX, TaskadapterSettings

    async def find() -> DeploymentResponse:
        async with server_client() as client:
            return await find_job(client, job)

    try:
        deployment = asyncio.run(find())
    except ApiUnavailableError as fault:
        if not isinstance(fault.__cause__, AWAY):
            raise
        job_id, url = _as_id(job), TaskadapterSettings().database_url
        if job_id is None or url is None:
            raise ApiUnavailableError(
                f"{str(fault).removesuffix('.')}; without it, name the job by its id, and the database in "
                f"{PREFIX}DATABASE_URL."
            ) from fault
        print(f"taskadapter: {fault} {BY_ID}", file=sys.stderr)
        return _Found(None, _open(url.get_secret_value()), job_id)
    return _Found(deployment, _shared(deployment.work_pool_name).engine, deployment.id)


def _as_id(job: str) -> UUID | None:
    try:
        return UUID(job)
    except ValueError:
        return None


@app.command
def doctor(
    *,
    pool: Pool = None,
    flows: Flows = Path("flows"),
    file: Annotated[
        Path | None,
        Parameter(name=["--file", "-f"], help="The rendered file; by default whichever there is."),
    ] = None,
) -> None:
    """Look at what jobs need, say what is wrong and how to put it right; exit with 1 at an error."""
    from taskadapter.doctor import Level, examine

    colours = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}
    console = Console(highlight=False)

    async def look() -> bool:
        is_well = True
        async for finding in examine(pool, flows, file):
            mark = Text(f"{finding.level:8}", style=colours[finding.level])
            console.print(mark + Text(finding.text), soft_wrap=True)
            is_well &= finding.level is not Level.ERROR
        return is_well

    if not asyncio.run(look()):
        sys.exit(1)


@database.command
def init(*, pool: Pool = None) -> None:
    """Make the tables that the database lacks; of a new database agents do so themselves where they may."""
    from taskadapter.coordination.engines import connected
    from taskadapter.coordination.schema import create_missing

    engine = _shared(pool, makes_it=True).engine
    with connected(engine) as connection:
        made = create_missing(connection, lost=True)
    print(f"Made {', '.join(made)}." if made else "All tables are there.")


@database.command
def upgrade(*, pool: Pool = None) -> None:
    """Bring the tables of an older release along, and widen those that Ballerina made narrower than ours.

    No node of the older release may run meanwhile.
    """
    from taskadapter.coordination import schema
    from taskadapter.coordination.engines import connected, transaction

    engine = _shared(pool, makes_it=True).engine
    with connected(engine) as connection:
        steps = schema.upgrade(connection)
    for step in steps:
        print(f"Step {step} is done.")
    init(pool=pool)
    with transaction(engine) as connection:
        statements = schema.upgrades(connection)
        for statement in statements:
            connection.exec_driver_sql(statement)
    print("\n".join(statements) or "All columns are as wide as they should be.")


@database.command
def sql(*, pool: Pool = None) -> None:
    """Print the script that makes the tables, for a DBA to run."""
    from taskadapter.coordination.schema import ddl

    engine = _shared(pool, makes_it=True).engine
    print(ddl(engine.dialect))


class _Shared(NamedTuple):
    """What the nodes of a work pool share: its name, domain and database; and, if asked, what is paused."""

    name: str
    domain: Domain
    engine: Engine
    closed: frozenset[str]


def _shared(pool: str | None, *, makes_it: bool = False, asks_what_is_paused: bool = False) -> _Shared:
    """Return what a pool's nodes share; while the API does not answer, by this machine's settings.

    Args:
        pool: the pool's name; None for the settings' one.
        makes_it: whether a SQLite file that is not there is to be made.
        asks_what_is_paused: whether Prefect is asked for it.

    Raises:
        TaskError: there is no such pool, or no such database; or the API does not answer, and no setting
            names the database.
    """
    from taskadapter.agent.worker import WarmBackupWorker
    from taskadapter.prefect_api.client import AWAY, server_client
    from taskadapter.prefect_api.pool import NO_POOL, OTHER_TYPE, Domain, Queues
    from taskadapter.prefect_api.workers import workers_of
    from taskadapter.settings import TaskadapterSettings

    settings = TaskadapterSettings()
    name = pool or settings.work_pool

    async def read() -> tuple[Domain, str, frozenset[str], _Polled | None]:
        async with server_client() as client:
            try:
                found = await client.read_work_pool(name)
            except ObjectNotFound:
                raise TaskError(f"{NO_POOL.format(name=name)}.") from None
            if found.type != WarmBackupWorker.type:
                raise TaskError(f"{OTHER_TYPE.format(name=name, type=found.type)}.")
            domain = Domain.of(found)
            may_be_apart = not makes_it and not domain.is_named(settings)
            polled = _Polled(found, await workers_of(client, name)) if may_be_apart else None
            closed = (await Queues.read(client, name)).closed if asks_what_is_paused else frozenset[str]()
            return domain, await domain.database_url(settings), closed, polled

    try:
        domain, url, closed, polled = asyncio.run(read())
    except ApiUnavailableError as fault:
        if settings.database_url is None or not isinstance(fault.__cause__, AWAY):
            raise
        # At night, and the database has the answer.
        domain, url, closed, polled = Domain(), settings.database_url.get_secret_value(), frozenset(), None
        print(f"taskadapter: {fault} {WITHOUT_API}", file=sys.stderr)
    return _Shared(name, domain, _open(url, polled, makes_it=makes_it), closed)


class _Polled(NamedTuple):
    """A work pool that names no database, and the workers that have polled it."""

    pool: WorkPool
    workers: list[Worker]


def _open(url: str, polled: _Polled | None = None, *, makes_it: bool = False) -> Engine:
    """Return an engine on a database; a SQLite file that is not there is made only where it is to be.

    Where the workers that poll the pool have another database, as far as can be seen, that is said.

    Raises:
        TaskError: there is no such file.
    """
    from taskadapter.coordination.engines import open_engine, would_make_file
    from taskadapter.coordination.faults import where
    from taskadapter.doctor.database import not_named

    engine = open_engine(url)
    if polled is not None and (said := not_named(engine, *polled)) is not None:
        if would_make_file(engine.url):
            raise TaskError(said)
        # Perhaps a node without a group, which was stopped just now, and has left nothing here.
        print(f"taskadapter: {said}", file=sys.stderr)
    if not makes_it and would_make_file(engine.url):
        raise TaskError(
            f"{where(engine.url)}: there is no such file on this machine; start an agent here, which makes "
            "it, or name the database that the nodes have."
        )
    return engine


def main() -> None:
    """Run the command; an error is one line on standard error, and exit status 1."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        try:
            app(sys.argv[1:], print_error=False, exit_on_error=False)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who reads, such as `head`, has had enough; the interpreter would fail once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (TaskError, httpx.HTTPStatusError) as error:
        print(f"taskadapter: {error}", file=sys.stderr)
        sys.exit(1)
    except CycloptsError as error:
        said = in_a_line(str(error))
        if isinstance(error, UnusedCliTokensError):
            said = f"{' '.join(error.unused_tokens or ())} is more than the command takes."
        stop = "" if said.endswith((".", "?")) else "."
        print(f"taskadapter: {said}{stop} See `taskadapter --help`.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
