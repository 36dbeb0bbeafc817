"""Listeners: jobs that share a trigger, its retries and a coordination group."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

from prefect import Flow
from prefect.settings import get_current_settings
from prefect.types.names import BANNED_CHARACTERS
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import model_validator

from taskadapter import flow as flows
from taskadapter import prefect_private
from taskadapter.background import BackgroundAgent
from taskadapter.config import overridden, read_config
from taskadapter.declaration import Declaration
from taskadapter.domain import Domain, password_of
from taskadapter.errors import DeclarationError, TaskError
from taskadapter.jobs import Job, Service, dump_state
from taskadapter.model import (
    RetryConfiguration,
    TaskPolicy,
    TriggerConfiguration,
    WarmBackupConfig,
)
from taskadapter.pools import ensure_work_pool
from taskadapter.settings import TaskadapterSettings, check_interval
from taskadapter.worker import DEFAULT_QUEUE

Declarable = type[Job] | type[Service] | Callable[..., Any]

listeners: set[Listener] = set()
"""The listeners of this process, for `taskadapter render`; a module need not keep its own."""


class ListenerConfiguration(Declaration):
    """What a listener is made of.

    Attributes:
        trigger: when its services run.
        retry_config: how they are retried; here or in the trigger, not in both.
        task_policy: what an error means; here or in the trigger, not in both.
        warm_backup_config: the group whose active node alone runs them; None for every node.
        work_pool: the work pool, by default the one that the settings name.
    """

    trigger: TriggerConfiguration
    retry_config: RetryConfiguration | None = None
    task_policy: TaskPolicy | None = None
    warm_backup_config: WarmBackupConfig | None = None
    work_pool: str | None = None

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


@dataclass(frozen=True)
class Declared:
    """A service as a listener knows it.

    Attributes:
        name: its name, and its deployment's.
        flow: what Prefect runs.
        trigger: the listener's, with what this service adds to it.
        source: the function or class that was declared.
        initial_state: the fields of an attached instance; None where a decorator declared it.
        parameters: what its runs are given, kept as declared; None for the flow's defaults, which the UI
            may change.
    """

    name: str
    flow: Flow[..., Any]
    source: Declarable
    trigger: TriggerConfiguration
    initial_state: dict[str, Any] | None = None
    parameters: dict[str, Any] | None = None


class Listener:
    """Runs the services that are declared on it by its trigger.

    Args:
        configuration: the fields of `ListenerConfiguration`, as keywords, in Python's or in
            Ballerina's spelling.

    Raises:
        DeclarationError: a value breaks its rule; the message names both, and the remedy.
    """

    def __init__(self, **configuration: Any) -> None:
        self.configuration = ListenerConfiguration(**configuration)
        self.trigger = self.configuration.effective_trigger
        self.services: dict[str, Declared] = {}
        self._agent: BackgroundAgent | None = None
        check_interval(self.trigger.interval)
        listeners.add(self)
        if prefect_private.is_being_deployed():
            self.ensure_work_pool()

    @classmethod
    def from_config(cls, path: str | Path, *, table: str | None = None, **configuration: Any) -> Self:
        """Return the listener that a TOML file describes, such as a Ballerina program's ``Config.toml``.

        Args:
            path: the file. The fields of the trigger, the retries, the policy and the group stand in
                tables (``[trigger]``, ``[retryConfig]``, ``[taskPolicy]``, ``[warmBackupConfig]``) or
                flat, in Python's or in Ballerina's spelling; durations are seconds.
            table: the dotted name of the table that has them, such as ``"org.module"``; by default they
                stand outside of any.
            configuration: as for the constructor; each replaces all that the file says of it.

        Raises:
            DeclarationError: the file cannot be read or is no TOML, a key is unknown or said twice, or a
                value breaks its rule. No message holds a password.
        """
        found = read_config(path, table)
        try:
            return cls(**overridden(found, configuration))
        except DeclarationError as error:
            raise DeclarationError(f"{path}: {error}") from None

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
        """Make the work pool unless it is there, with the database and timing of this listener.

        Raises:
            TaskError: there is a pool of that name and another type.
        """
        backup = self.configuration.warm_backup_config
        password = None if backup is None else password_of(backup)
        ensure_work_pool(self.work_pool, self.domain, password)

    @property
    def group_id(self) -> str | None:
        """The coordination group, which is the work queue; None for jobs that every node may run."""
        backup = self.configuration.warm_backup_config
        return None if backup is None else backup.group_id

    def service(self, name: str, **options: Any) -> Callable[[Declarable], Flow[..., Any]]:
        """Declare a service: decorates a `Service` class or a function, sync or async.

        Args:
            name: the service's name, unique on this listener; it becomes the flow's.
            options: anything that `prefect.flow` takes, such as ``timeout_seconds``, ``log_prints``
                (on by default, so that what a job prints is in the UI) or state hooks; but not its
                ``retries``, which a `RetryConfiguration` declares.

        Returns:
            A decorator that returns the `prefect.Flow`.

        Raises:
            DeclarationError: the name is taken or none that Prefect accepts, an option is one that
                the listener has, or what is decorated is neither of the two or cannot be called
                without arguments.
        """
        _check_name(name)
        _check_options(name, options)

        def declare(source: Declarable) -> Flow[..., Any]:
            trigger = self.trigger
            if _is_service(source):
                trigger = _one_writer(source, trigger)
                flow = flows.service_flow(source(), name, trigger, **options)
            elif inspect.isfunction(source):
                _check_function(source, name)
                flow = flows.function_flow(source, name, trigger, **options)
            else:
                raise DeclarationError(
                    f"{source!r} cannot be service {name!r}: decorate a subclass of Service, or a function."
                )
            self._add(Declared(name, flow, source, trigger))
            return flow

        return declare

    def attach(self, service: Service, name: str) -> Flow[..., Any]:
        """Declare an instance as a service; its field values are the initial state on every node.

        Args:
            service: of a class that the nodes can import.
            name: the service's name, unique on this listener.

        Returns:
            The `prefect.Flow`.

        Raises:
            DeclarationError: the name is taken or none that Prefect accepts, or what is attached is no
                service, or its class cannot be imported by its name.
        """
        _check_name(name)
        cls = type(service)
        if not issubclass(cls, Service):
            raise DeclarationError(
                f"{service!r} cannot be attached as {name!r}: pass an instance of a Service."
            )
        if "<locals>" in cls.__qualname__:
            raise DeclarationError(
                f"{cls.__qualname__} cannot be attached as {name!r}: nodes import a service's class, "
                "and cannot import one that is defined inside a function. Move it to module level."
            )
        trigger = _one_writer(cls, self.trigger)
        flow = flows.service_flow(service, name, trigger)
        self._add(Declared(name, flow, cls, trigger, dump_state(service)))
        return flow

    def detach(self, name: str) -> None:
        """Take a service off this listener; what is deployed already is left as it is.

        Raises:
            TaskError: there is no such service.
        """
        if self.services.pop(name, None) is None:
            raise TaskError(f"no service {name!r} is attached; there are {sorted(self.services)}.")

    def _add(self, declared: Declared) -> None:
        if declared.name in self.services:
            raise DeclarationError(
                f"service {declared.name!r} is declared twice on one listener; give one another name."
            )
        self.services[declared.name] = declared

    # --- running ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Deploy the services, and run this node's agent in the background of this program.

        Raises:
            TaskError: it is started already, nothing is declared, the work pool is of another type, or
                Prefect's API is not named or does not answer.
        """
        from taskadapter.deploy import deploy

        if self._agent is not None:
            raise TaskError("the listener is started already; stop it before it is started again.")
        if not self.services:
            raise TaskError("the listener has no service to run; declare one with service().")
        if get_current_settings().api.url is None:
            raise TaskError(
                "PREFECT_API_URL is not set, and an agent needs a server that stays: start one with "
                "`prefect server start`, and set PREFECT_API_URL to its address."
            )
        run_coro_as_sync(deploy(self))
        backup = self.configuration.warm_backup_config
        queue = self.group_id or DEFAULT_QUEUE
        name = socket.gethostname() if backup is None else backup.task_id
        self._agent = BackgroundAgent(self.work_pool, queue, name)

    def graceful_stop(self) -> None:
        """Let the running jobs finish, then end the agent; no tick starts any more."""
        self._stop(BackgroundAgent.drain)

    def immediate_stop(self) -> None:
        """End the agent and the jobs it is running, which show as Crashed."""
        self._stop(BackgroundAgent.abort)

    def _stop(self, how: Callable[[BackgroundAgent], None]) -> None:
        agent, self._agent = self._agent, None
        if agent is None:
            raise TaskError("the listener is not started; call start() first.")
        how(agent)

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


def _check_name(name: object) -> None:
    """Refuse what cannot be the name of a flow and a deployment."""
    if not isinstance(name, str):
        raise DeclarationError(
            f'{name!r} is no name for a service; write service("a-name") above it, and '
            'attach(instance, "a-name").'
        )
    check_name(name, "service")


def check_name(name: str, what: str) -> None:
    """Refuse a text that Prefect does not accept as a name, of a service or a job.

    Raises:
        DeclarationError: it is blank, or holds a character that is banned.
    """
    if not name.strip() or any(character in name for character in BANNED_CHARACTERS):
        raise DeclarationError(
            f"{name!r} is no name for a {what}: it must not be blank, nor hold any of "
            f"{' '.join(BANNED_CHARACTERS)}; choose another."
        )


def _is_service(source: object) -> TypeGuard[type[Service]]:
    return inspect.isclass(source) and issubclass(source, Service) and not inspect.isabstract(source)


def _check_function(fn: Callable[..., Any], name: str) -> None:
    """Refuse a function that a tick cannot call."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise DeclarationError(
            f"{fn.__qualname__} cannot be service {name!r}: it is a generator, so calling it does "
            "nothing; remove its yield."
        )
    try:
        inspect.signature(fn).bind()
    except TypeError:
        raise DeclarationError(
            f"{fn.__qualname__}{inspect.signature(fn)} cannot be service {name!r}: it is called "
            "without arguments; give its parameters defaults."
        ) from None


def _check_options(name: str, options: dict[str, Any]) -> None:
    for option in ("retries", "retry_delay_seconds"):
        if option in options:
            raise DeclarationError(
                f"service {name!r}: {option}={options[option]!r} would have Prefect retry what the "
                "listener retries already; declare a RetryConfiguration instead."
            )


def _one_writer(cls: type[Service], trigger: TriggerConfiguration) -> TriggerConfiguration:
    """Return the trigger for a service: one that has state runs one tick at a time.

    Each run starts from the state that the one before it has saved; two at once would lose one of two
    changes.
    """
    if not cls.model_fields:
        return trigger
    policy = trigger.policy
    return trigger.model_copy(update={"task_policy": policy.model_copy(update={"max_concurrent": 1})})
