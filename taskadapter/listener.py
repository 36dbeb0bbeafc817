"""Listeners: jobs that share a trigger, its retries and a coordination group."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, cast
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.settings import get_current_settings
from pydantic import field_validator, model_validator

from taskadapter.agent import switches
from taskadapter.agent.program import Part, ProgramAgent, agents, done, stop_all
from taskadapter.agent.signals import at_a_signal
from taskadapter.declare.backup import DEFAULT_QUEUE, WarmBackupConfig
from taskadapter.declare.base import Declaration, named_only
from taskadapter.declare.jobs import Service
from taskadapter.declare.names import check_pool
from taskadapter.declare.registry import importing, listeners, refuse_while_importing
from taskadapter.declare.toml import overridden, read_config
from taskadapter.declare.triggers import RetryConfiguration, TaskPolicy, TriggerConfiguration
from taskadapter.declare.values import DURATION, DURATION_IN_A_FILE
from taskadapter.errors import CoordinationError, DeclarationError, TaskError, listed
from taskadapter.execution.current import execution
from taskadapter.pools import aensure_work_pool
from taskadapter.prefect_api import private
from taskadapter.prefect_api.client import api_client, run_sync
from taskadapter.prefect_api.pool import Domain, password_of
from taskadapter.services import (
    Declarable,
    Declared,
    check_service,
    named,
    service_of,
    service_of_instance,
)
from taskadapter.settings import TaskadapterSettings, check_interval

_with_services: set[Listener] = set()
"""A module need not keep a listener that it declares services on."""


class ListenerConfiguration(Declaration):
    """What a listener is made of.

    Attributes:
        trigger: when its services run.
        retry_config: how they are retried; here or in the trigger, not in both.
        task_policy: what an error means; here or in the trigger, not in both.
        warm_backup_config: the group whose active node alone runs them; None for every node.
        work_pool: the work pool, by default the one that the settings name.
    """

    called: ClassVar[str | None] = "Listener"

    trigger: TriggerConfiguration
    retry_config: RetryConfiguration | None = None
    task_policy: TaskPolicy | None = None
    warm_backup_config: WarmBackupConfig | None = None
    work_pool: str | None = None

    @field_validator("work_pool")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None:
            check_pool(name)
        return name

    @model_validator(mode="after")
    def _say_it_once(self) -> Self:
        for name in ("retry_config", "task_policy"):
            if getattr(self, name) is not None and getattr(self.trigger, name) is not None:
                raise ValueError(
                    f"{name} stands in the listener and in its trigger; say it in one place only"
                )
        return self

    @property
    def effective_trigger(self) -> TriggerConfiguration:
        """The trigger with the retries and the policy that apply, wherever they were declared."""
        return self.trigger.model_copy(
            update={
                "retry_config": self.retry_config or self.trigger.retry_config,
                "task_policy": self.task_policy or self.trigger.task_policy,
            }
        )


class Listener:
    """Runs the services that are declared on it by its trigger.

    Args:
        configuration: the fields of `ListenerConfiguration`, as keywords, in Python's or in
            Ballerina's spelling.

    Raises:
        DeclarationError: a value breaks its rule; the message names both, and the remedy. Or it names this
            node otherwise than another listener of the program on the same work pool.
    """

    @partial(named_only, model=ListenerConfiguration)
    def __init__(self, **configuration: Any) -> None:
        self.configuration = ListenerConfiguration(**configuration)
        self.trigger = self.configuration.effective_trigger
        self.services: dict[str, Declared] = {}
        self._agent: ProgramAgent | None = None
        self._part: Part | None = None
        self._place = _calling_line()
        check_interval(self.trigger.interval)
        if private.is_being_deployed():
            with _ending_prefect_deploy():
                # Else each import would give the pool, with all its nodes, the timing of another listener.
                refuse_disagreement([*listeners, self])
                self.ensure_work_pool()
        else:
            self._check_task_id()
        listeners.add(self)

    @classmethod
    def from_config(cls, path: str | Path, *, table: str | None = None, **configuration: Any) -> Self:
        """Return the listener that a TOML file describes, such as a Ballerina program's ``Config.toml``.

        Args:
            path: the file. The fields of the trigger, the retries, the policy and the group stand in
                tables (``[trigger]``, ``[retryConfig]``, ``[taskPolicy]``, ``[warmBackupConfig]``) or
                flat, in Python's or in Ballerina's spelling; durations are seconds.
            table: the dotted name of the table that has them, such as ``"org.module"``; by default they
                stand outside of any.
            configuration: as for the constructor. Each key wins over the file's, also inside a
                configuration, of which only what was set explicitly counts. A mapping of some keys will do.

        Raises:
            DeclarationError: the file cannot be read or is no TOML, a key is unknown or said twice, or a
                value breaks its rule. No message holds a password.
        """
        found = read_config(path, table)
        try:
            return cls(**overridden(found, configuration))
        except DeclarationError as error:
            # TOML has no timedelta.
            said = str(error).replace(DURATION, DURATION_IN_A_FILE)
            raise DeclarationError(f"{path}: {said}") from None

    @property
    def work_pool(self) -> str:
        """The name of the work pool."""
        return self.configuration.work_pool or TaskadapterSettings().work_pool

    @property
    def domain(self) -> Domain | None:
        """The database and timing that it declares for its pool; None if it declares no group."""
        backup = self.configuration.warm_backup_config
        return None if backup is None else Domain.declared(backup, self.work_pool)

    def ensure_work_pool(self) -> None:
        """Do what `aensure_work_pool` does, from code that is not async."""

        async def ensure() -> None:
            async with api_client() as client:
                await self.aensure_work_pool(client)

        run_sync(ensure())

    async def aensure_work_pool(self, client: PrefectClient) -> None:
        """Make the work pool unless it is there, with the database, timing and queue of this listener.

        Args:
            client: connected to the API.

        Raises:
            TaskError: there is a pool of that name and another type.
        """
        backup = self.configuration.warm_backup_config
        password = None if backup is None else password_of(backup)
        await aensure_work_pool(client, self.work_pool, self.domain, password, queue=self.group_id)

    def _says(self, domain: Domain, other: Domain) -> str:
        """Return what it says of its pool otherwise than another listener, and where it does."""
        values = ", ".join(f"{name}={value}" for name, value in domain.unlike(other).items())
        place = self._place.removeprefix(f"{Path.cwd()}/")
        return f"group {self.group_id!r} ({place}) has {values}"

    @property
    def group_id(self) -> str | None:
        """The coordination group, which is the work queue; None for jobs that every node may run."""
        backup = self.configuration.warm_backup_config
        return None if backup is None else backup.group_id

    @property
    def task_id(self) -> str | None:
        """The name that it gives this node; None if it leaves that to the host's."""
        backup = self.configuration.warm_backup_config
        return backup.task_id if backup is not None and "task_id" in backup.model_fields_set else None

    def _check_task_id(self) -> None:
        for other in listeners:
            names = {self.task_id, other.task_id} - {None}
            if len(names) > 1 and other.work_pool == self.work_pool:
                raise DeclarationError(
                    f"task_id={self.task_id!r}: another listener of this program on work pool "
                    f"{self.work_pool!r} has task_id={other.task_id!r}, and a program is one node of its "
                    "pool; give both the same, or give one another work_pool."
                )

    def service(self, name: str, **options: Any) -> Callable[[Declarable], Flow[..., Any]]:
        """Declare a service: decorates a `Service` class or a function, sync or async.

        Args:
            name: the service's name, unique on this listener; it becomes the flow's.
            options: anything that `prefect.flow` takes, such as ``timeout_seconds``, ``log_prints``
                (on by default, so that what a job prints is in the UI) or state hooks; but not its
                ``retries``, which a `RetryConfiguration` declares.

        Returns:
            A decorator that returns the `prefect.Flow`. On a listener that is started it also deploys it.

        Raises:
            DeclarationError: the name is taken or none that Prefect accepts, an option is one that
                the listener has, or what is decorated is neither of the two or cannot be called
                without arguments.
        """
        check_service(name, options)

        def declare(source: Declarable) -> Flow[..., Any]:
            declared = service_of(source, name, self.trigger, options)
            self._add(declared)
            if self.is_started:
                run_sync(self._bring_up(name))
            return declared.flow

        return declare

    service.__defaults__ = ("",)  # type checkers refuse `service()`; a person gets our sentence about it

    def attach(self, service: Service, name: str) -> Flow[..., Any]:
        """Declare an instance as a service; its field values are the initial state on every node.

        On a listener that is started it is deployed, and runs at once.

        Args:
            service: of a class that the nodes can import.
            name: the service's name, unique on this listener.

        Returns:
            The `prefect.Flow`.

        Raises:
            DeclarationError: the name is taken or none that Prefect accepts, or what is attached is no
                service, or its class cannot be imported by its name.
            TaskError: it could not be deployed; then it is not attached. Or the agent has ended since; then
                it is.
        """
        declared = service_of_instance(service, name, self.trigger)
        self._add(declared)
        if self.is_started:
            run_sync(self._bring_up(name))
        return declared.flow

    async def aattach(self, service: Service, name: str) -> Flow[..., Any]:
        """Do what `attach` does, from async code."""
        declared = service_of_instance(service, name, self.trigger)
        self._add(declared)
        if self.is_started:
            await self._bring_up(name)
        return declared.flow

    attach.__defaults__ = aattach.__defaults__ = ("",)  # as for `service`

    def detach(self, service: str | Service) -> None:
        """Take a service off this listener.

        On a listener that is started it is unscheduled too: nothing of it begins any more, on any node,
        until it is attached or deployed again. A run that has begun goes on; the history stays.

        Args:
            service: the service's name, or the instance that was attached.

        Raises:
            TaskError: there is no such service, or it could not be unscheduled; then it is still attached,
                and the same call may be repeated.
        """
        run_sync(self.adetach(service))

    async def adetach(self, service: str | Service) -> None:
        """Do what `detach` does, from async code."""
        name = self._name_of(service)
        if self._agent is not None and self._part is not None and self.is_started:
            await self._unschedule(self._agent, self._part, self._part.jobs[name])
            del self._part.jobs[name]
        del self.services[name]
        if not self.services:
            _with_services.discard(self)

    async def _unschedule(self, agent: ProgramAgent, part: Part, job_id: UUID) -> None:
        """Have nothing of a job begin any more; where that fails, this agent runs it as before."""
        try:
            await agent.call_off(job_id, switches.WAS_DETACHED)
            await switches.detach(job_id)
            # Now it is known to be off: what Prefect's scheduler was planning meanwhile is skipped.
            await agent.look_again(part)
        except BaseException:
            # No other node would run it: this one holds their group's token.
            with suppress(TaskError):
                await agent.look_again(part)
            raise

    def _name_of(self, service: str | Service) -> str:
        for name, declared in self.services.items():
            if declared.instance is service or name == service:
                return name
        called = named(service)
        others = listed(sorted(self.services))
        known = f"name one of {others}" if others else "none is"
        raise TaskError(f"no service {called} is attached; {known}.")

    def _add(self, declared: Declared) -> None:
        if declared.name in self.services:
            raise DeclarationError(
                f"service {declared.name!r} is declared twice on one listener; give one another name."
            )
        if self.is_started:
            self._refuse_namesakes([declared.name])
        self.services[declared.name] = declared
        _with_services.add(self)
        listeners.add(self)  # a module that another one has imported before may have made it

    def _refuse_namesakes(self, names: Iterable[str]) -> None:
        """Refuse services that are, by their names, the deployments of another listener that runs here."""
        for other in listeners:
            taken = sorted(set(names) & set(other.services))
            if taken and other is not self and other.is_started:
                raise TaskError(
                    f"service {taken[0]!r} is run by another listener of this program already; its name is "
                    "its deployment's, so give one another name."
                )

    # --- running ----------------------------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        """Whether it has been started, and neither been stopped nor lost its agent since."""
        return self._part is not None and not self._part.over.done()

    @property
    def failed(self) -> TaskError | None:
        """What has ended the agent that runs the services here; None as long as nothing has."""
        if self._part is None or not self._part.over.done():
            return None
        return cast("TaskError | None", self._part.over.exception())

    def start(self) -> None:
        """Deploy the services, and run them in the background of this program, as a node of their pool.

        It returns when this node takes part: it runs the services, or stands by for the active node of
        their group. All listeners of a program on one work pool share one agent.

        Raises:
            TaskError: a run imports this file or calls this, it is started already, nothing is declared,
                another listener of the program runs a service of that name, the work pool is of another
                type or has another database or timing, another live process has this node's name, or
                Prefect's API or the coordination database is not named or does not answer (it is given
                some seconds).
        """
        _refuse_while_deploying()
        run_sync(self.astart())

    async def astart(self) -> None:
        """Do what `start` does, from async code."""
        from taskadapter.deploy import deploy

        _refuse_while_deploying()
        self._check_start()
        jobs = await deploy(self)
        ids = {name: job_id.id for name, job_id in jobs.items()}
        part = Part(self.group_id or DEFAULT_QUEUE, self.domain, ids)
        names = [other.task_id for other in listeners if other.work_pool == self.work_pool]
        name = next(filter(None, names), None)
        self._agent = await ProgramAgent.take_part(self.work_pool, name, socket.gethostname(), part)
        self._part = part

    def _check_start(self) -> None:
        refuse_while_importing("start()")
        if execution.get() is not None:
            raise TaskError("start() was called inside a run; call it in a program of its own.")
        if self.is_started:
            raise TaskError("the listener is started already; stop it before it is started again.")
        if not self.services:
            raise TaskError("the listener has no service to run; declare one with service().")
        if get_current_settings().api.url is None:
            raise TaskError(
                "PREFECT_API_URL is not set, and an agent needs a server that stays: start one with "
                "`prefect server start`, and set PREFECT_API_URL to its address."
            )
        self._refuse_namesakes(self.services)
        refuse_disagreement([self, *(other for other in listeners if other.is_started)])

    async def _bring_up(self, name: str) -> None:
        """Deploy a service that was declared on this listener after its start, and run it at once.

        Once it is deployed it is attached, whatever fails after that: nodes run it, and `detach` takes it
        off. Its deployment is not deleted again, which another program may have found meanwhile.
        """
        from taskadapter.deploy import deploy

        part, agent = self._part, self._agent
        if part is None or agent is None:
            return
        try:
            jobs = await deploy(self, [name])
        except BaseException:
            del self.services[name]
            raise
        part.jobs[name] = jobs[name].id
        with suppress(CoordinationError):  # then the next look will see it
            await agent.look_again(part)

    def graceful_stop(self) -> None:
        """Start no tick of its services here any more, let the running ones finish, then hand over.

        Other listeners of the program go on; the last one that stops ends the agent. It does nothing where
        the listener has stopped already, as at a signal in `wait`.

        Raises:
            TaskError: it was never started.
        """
        run_sync(self.agraceful_stop())

    async def agraceful_stop(self) -> None:
        """Do what `graceful_stop` does, from async code."""
        await self._stop(end_runs=False)

    def immediate_stop(self) -> None:
        """Do as `graceful_stop`, but end what is running: it shows as Crashed."""
        run_sync(self.aimmediate_stop())

    async def aimmediate_stop(self) -> None:
        """Do what `immediate_stop` does, from async code."""
        await self._stop(end_runs=True)

    async def _stop(self, *, end_runs: bool) -> None:
        part, agent = self._started()
        await agent.leave([part], end_runs=end_runs)

    def _started(self) -> tuple[Part, ProgramAgent]:
        if self._part is None or self._agent is None:
            raise TaskError("the listener is not started; call start() first.")
        return self._part, self._agent

    def wait(self) -> None:
        """Wait until the listener is stopped.

        In the main thread SIGTERM and Ctrl-C stop all listeners of the program meanwhile, in order: what is
        running finishes, and the groups are handed over; a second signal ends what is running.

        Raises:
            TaskError: its agent has failed, with this error; or it was never started.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self.await_())
        else:
            run_sync(self.await_())

    async def await_(self) -> None:
        """Do what `wait` does, from async code."""
        part, _ = self._started()
        stopping: list[asyncio.Task[None]] = []

        def stop() -> None:
            if stopping:
                for agent in agents():
                    agent.hurry()
            else:
                stopping.append(asyncio.create_task(stop_all()))

        with at_a_signal(stop):
            await done(part.over)
            await asyncio.gather(*stopping)
        part.over.result()

    def __enter__(self) -> Self:
        """Start the listener."""
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it gracefully."""
        self.graceful_stop()

    async def __aenter__(self) -> Self:
        """Start the listener."""
        await self.astart()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it gracefully."""
        await self.agraceful_stop()


@contextmanager
def _ending_prefect_deploy() -> Iterator[None]:
    """Have `prefect deploy` end with our sentence: around an error it would print two tracebacks."""
    try:
        yield
    except (TaskError, httpx.HTTPStatusError) as error:
        sys.exit(f"taskadapter: {error}")


def _refuse_while_deploying() -> None:
    """Refuse to begin a program whose file `prefect deploy` imports."""
    if private.is_being_deployed():
        with _ending_prefect_deploy(), importing("`prefect deploy`"):
            refuse_while_importing("start()")


def _calling_line() -> str:
    """Return file and line of the first caller outside this package."""
    frame, package = inspect.currentframe(), f"{Path(__file__).parent}{os.sep}"
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return "somewhere"
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def refuse_disagreement(found: Iterable[Listener]) -> None:
    """Refuse listeners that give one work pool several databases or timings.

    Raises:
        DeclarationError: two do; the message names both.
    """
    first: dict[str, tuple[Listener, Domain]] = {}
    for listener in found:
        domain = listener.domain
        if domain is None:
            continue
        other, known = first.setdefault(listener.work_pool, (listener, domain))
        if known != domain:
            raise DeclarationError(
                f"two listeners disagree about work pool {listener.work_pool!r}, whose nodes share one "
                f"database and timing: {other._says(known, domain)}, and {listener._says(domain, known)}; "
                "declare the same for both, or give one another work_pool."
            )
