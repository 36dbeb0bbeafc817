"""What a user declares about a task: its trigger, retries, policy and coordination."""

import contextlib
import ipaddress
import math
import re
import socket
from collections.abc import Collection, Mapping
from datetime import timedelta
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import pendulum
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SecretStr,
    StrictInt,
    Tag,
    model_validator,
)

from taskadapter.declare.base import Declaration
from taskadapter.declare.civil import Instant
from taskadapter.declare.names import BANNED, LONGEST_NAME, is_name

__all__ = [
    "DEFAULT_QUEUE",
    "DatabaseConfig",
    "ErrorPolicy",
    "MysqlConfig",
    "NonNegativeSeconds",
    "PositiveSeconds",
    "PostgresqlConfig",
    "RetryConfiguration",
    "RetryStrategy",
    "Seconds",
    "SqliteConfig",
    "TaskPolicy",
    "TriggerConfiguration",
    "WaitingPolicy",
    "WarmBackupConfig",
    "WorkerPoolConfiguration",
]

DEFAULT_QUEUE = "default"
"""The queue of jobs without a group: every agent polls it."""

DURATION = "must be a number of seconds or a timedelta; write 2.5 or timedelta(minutes=1)"
DURATION_IN_A_FILE = "must be a number of seconds; write 2.5"
"""The rule of a duration, in a program and in a file."""

_MIN_HEARTBEATS = 3
MOST = 1_000_000_000
"""More than a job can do in a lifetime, and less than an integer of a database holds."""

_LONGEST = timedelta(days=36525)
"""Of any duration: more is no moment any more, to Python or to a database, when it is added to one."""

_LATEST_START = 9600
"""A year: Prefect's scheduler plans three ticks ahead, and fails at one beyond the year 9999."""

_SHORTEST_HEARTBEAT = 0.01
"""Seconds: less than a round trip to a database takes."""


def _to_seconds(value: object) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError(DURATION)  # noqa: TRY004  Pydantic passes a TypeError through untranslated
    try:
        seconds = float(value)
    except (OverflowError, ValueError):  # an int beyond float's range, a signalling NaN
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError("must be a finite number of seconds; choose one")
    return seconds


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError("must be greater than 0 seconds; choose a longer time")
    return seconds


def _not_too_long(seconds: float) -> float:
    if seconds > _LONGEST.total_seconds():
        raise ValueError("must be at most 100 years (3155760000 seconds); choose a shorter time")
    return seconds


def _interval(seconds: float) -> float:
    if seconds > _LONGEST.total_seconds():
        raise ValueError(
            "must be at most 100 years (3155760000 seconds); choose a shorter time, and max_count=1 for a "
            "job that runs once"
        )
    return seconds


def _start(when: pendulum.DateTime) -> pendulum.DateTime:
    if when.year >= _LATEST_START:
        raise ValueError(f"must be before the year {_LATEST_START}; choose a nearer time")
    return when


def _heartbeat(seconds: float) -> float:
    if seconds < _SHORTEST_HEARTBEAT:
        raise ValueError(f"must be at least {_SHORTEST_HEARTBEAT:g} seconds; choose a longer time")
    return seconds


def _at_most(count: int) -> int:
    if count > MOST:
        raise ValueError(f"must be at most {MOST}; choose a smaller number")
    return count


def _max_count(count: int) -> int:
    if count == 0:
        raise ValueError("a job that runs 0 times never runs; choose at least 1, or -1 for no limit")
    if count < -1:
        raise ValueError("must be at least 1, or -1 for no limit; choose one of these")
    return count


def _max_attempts(count: int) -> int:
    if count < 1:
        raise ValueError("must be at least 1; raise it, or declare no retries at all")
    return count


def _worker_count(count: int) -> int:
    if count < 1:
        raise ValueError("must be at least 1, or nothing runs; raise it")
    return count


def _group_id(name: str) -> str:
    _require_name(name, BANNED)
    if name == DEFAULT_QUEUE:
        raise ValueError(
            f"must not be {DEFAULT_QUEUE!r}: that is the queue of jobs without a group, which every node "
            "runs; choose another name"
        )
    return name


def _not_negative(seconds: float) -> float:
    if seconds < 0:
        raise ValueError("must not be negative; choose 0 or more seconds")
    return seconds


def _max_concurrent(count: int) -> int:
    if count < 1:
        raise ValueError("must be at least 1; raise it, or leave it out for no limit")
    return count


def _task_id(name: str) -> str:
    _require_name(name, ("/", "%", "?", "#"))
    return name


def _require_name(text: str, banned: Collection[str]) -> None:
    if not is_name(text, banned):
        *most, last = map('"{}"'.format, banned)
        raise ValueError(
            f"must have 1 to {LONGEST_NAME} printable characters, not all blank nor only dots, none of "
            f"them {', '.join(most)} or {last} (this one has {len(text)}); choose another name"
        )


def _host(name: str) -> str:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return name
    if not re.fullmatch(r"[^\s:/@?#%\\]+", name) or not name.isprintable():
        raise ValueError(
            "must be the name or the address of a machine alone; port, user, password and database have "
            "fields of their own"
        )
    return name


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold the character NUL, which no driver takes; remove it")
    return text


def _password(secret: SecretStr) -> SecretStr:
    _without_nul(secret.get_secret_value())
    return secret


Seconds = Annotated[float, BeforeValidator(_to_seconds)]
"""A finite duration in seconds, given as int, float, Decimal or timedelta and kept as float."""

PositiveSeconds = Annotated[Seconds, AfterValidator(_positive), AfterValidator(_not_too_long)]
"""`Seconds` greater than 0, and at most 100 years."""

NonNegativeSeconds = Annotated[Seconds, AfterValidator(_not_negative), AfterValidator(_not_too_long)]
"""`Seconds` of 0 or more, and at most 100 years."""

_Count = Annotated[StrictInt, AfterValidator(_at_most)]
_Host = Annotated[str, AfterValidator(_host)]
_Text = Annotated[str, AfterValidator(_without_nul)]
_Port = Annotated[StrictInt, Field(ge=1, le=65535)]


class RetryStrategy(StrEnum):
    """How the wait between attempts grows."""

    FIXED = "FIXED"
    """Every wait is `retry_interval`."""
    EXPONENTIAL = "EXPONENTIAL"
    """The first wait is `retry_interval`; each further one is twice the one before."""


class ErrorPolicy(StrEnum):
    """What becomes of a job whose last attempt has failed."""

    LOG_AND_TERMINATE = "LOG_AND_TERMINATE"
    """Log the error and end the job, for all nodes."""
    TERMINATE = "TERMINATE"
    """End the job, for all nodes, without a log line of ours."""
    LOG_AND_CONTINUE = "LOG_AND_CONTINUE"
    """Log the error; the next tick runs as usual."""
    CONTINUE = "CONTINUE"
    """The next tick runs as usual."""


class WaitingPolicy(StrEnum):
    """What becomes of a tick that could not start in time."""

    WAIT = "WAIT"
    """Run it as soon as possible; none is lost."""
    IGNORE = "IGNORE"
    """Skip it."""
    LOG_AND_IGNORE = "LOG_AND_IGNORE"
    """Skip it and log that."""


class RetryConfiguration(Declaration):
    """Further attempts after a failed one.

    `max_attempts` is how many there may be besides the first. Before each passes `retry_interval`
    seconds (FIXED) or a wait that doubles from it (EXPONENTIAL: 1, 2, 4, ... for an interval of 1),
    never longer than `max_interval` seconds; None sets no such limit.

    Raises:
        DeclarationError: fewer than one attempt, an interval that is not positive, or a
            `max_interval` shorter than `retry_interval`.
    """

    max_attempts: Annotated[_Count, AfterValidator(_max_attempts)]
    retry_interval: PositiveSeconds
    backoff_strategy: RetryStrategy = RetryStrategy.FIXED
    max_interval: PositiveSeconds | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.max_interval is not None and self.max_interval < self.retry_interval:
            raise ValueError(
                f"max_interval={self.max_interval:g} must not be shorter than "
                f"retry_interval={self.retry_interval:g}; raise max_interval or leave it out"
            )
        return self


class TaskPolicy(Declaration):
    """What to do when a job fails, when a tick is late, and when ticks overlap.

    `max_concurrent` is how many runs of the job may overlap; None leaves that to the number of
    workers.

    The other two are for jobs of a group. `on_takeover` is what becomes of a run whose node died
    while it executed: `"crash"` leaves it at that, so that a tick starts at most once; `"rerun"` runs
    it again. `on_token_loss` is what a node that has lost the token does with its runs: `"stop"` ends
    them before another node may start one; `"finish"` lets them end, beside the other node's.

    Raises:
        DeclarationError: an unknown policy, or a `max_concurrent` below 1.
    """

    error_policy: ErrorPolicy = ErrorPolicy.LOG_AND_TERMINATE
    waiting_policy: WaitingPolicy = WaitingPolicy.WAIT
    max_concurrent: Annotated[_Count, AfterValidator(_max_concurrent)] | None = None
    on_takeover: Literal["crash", "rerun"] = "crash"
    on_token_loss: Literal["stop", "finish"] = "stop"


class TriggerConfiguration(Declaration):
    """When a job runs.

    Every `interval` seconds from `start_time` (None: at once) until `end_time` (None: no end), at
    most `max_count` times (-1: no limit). `task_policy` and `retry_config` may stand here or in the
    `Listener`.

    The shortest interval depends on the settings of Prefect's scheduler and is checked when the job
    is scheduled.

    Raises:
        DeclarationError: an interval that is not positive or longer than 100 years, a count of 0 or
            below -1, a time without a zone, a start after the year 9599, or an end that is not after the
            start.
    """

    interval: Annotated[Seconds, AfterValidator(_positive), AfterValidator(_interval)]
    max_count: Annotated[_Count, AfterValidator(_max_count)] = -1
    start_time: Annotated[Instant, AfterValidator(_start)] | None = None
    end_time: Instant | None = None
    task_policy: TaskPolicy | None = None
    retry_config: RetryConfiguration | None = None

    @property
    def policy(self) -> TaskPolicy:
        """The declared policy, or the default one."""
        return self.task_policy or TaskPolicy()

    @model_validator(mode="after")
    def _ends_after_start(self) -> Self:
        start, end = self.start_time, self.end_time
        if start is None or end is None:
            return self
        # In UTC: within one zone Python compares the wall clocks, which repeat an hour each year.
        if end.in_timezone("UTC") <= start.in_timezone("UTC"):
            raise ValueError(
                f"end_time={end.isoformat()} must be after start_time={start.isoformat()}; "
                "choose a later end_time or leave it out"
            )
        return self


class WorkerPoolConfiguration(Declaration):
    """How much each node of a work pool runs at once.

    `worker_count` is the number of runs; `waiting_time` is how long after its time a tick is not yet
    late, in seconds.

    Raises:
        DeclarationError: a count below 1, or a negative time.
    """

    called: ClassVar[str | None] = "configure_worker_pool"

    worker_count: Annotated[_Count, AfterValidator(_worker_count)] = 5
    waiting_time: NonNegativeSeconds = 5.0


class PostgresqlConfig(Declaration):
    """A PostgreSQL database that the nodes coordinate through.

    A `user`, `password` or `database` of None is left to the driver, which asks the environment.
    The password is never shown; read it with `get_secret_value()`.

    Raises:
        DeclarationError: a port outside 1 to 65535, or a host that is no name or address alone.
    """

    kind: Literal["postgresql"] = "postgresql"
    host: _Host = "localhost"
    port: _Port = 5432
    user: _Text | None = None
    password: Annotated[SecretStr, AfterValidator(_password)] | None = None
    database: _Text | None = None


class MysqlConfig(Declaration):
    """A MySQL database that the nodes coordinate through; fields as in `PostgresqlConfig`.

    Raises:
        DeclarationError: a port outside 1 to 65535, or a host that is no name or address alone.
    """

    kind: Literal["mysql"] = "mysql"
    host: _Host = "localhost"
    port: _Port = 3306
    user: _Text | None = None
    password: Annotated[SecretStr, AfterValidator(_password)] | None = None
    database: _Text | None = None


def _file(path: Path) -> Path:
    if path.name in {"", ":memory:"} or not str(path).isprintable():
        raise ValueError("must be a file, which agents can share; name one, such as tasks.db")
    if path.parts[0].startswith("~") or path.parts[0].endswith(":"):
        raise ValueError(
            'must be the path of a file, written in full, without "~" or "sqlite:"; correct it'
        )
    return path


class SqliteConfig(Declaration):
    """A SQLite file, through which agents on one machine coordinate.

    A relative `path` begins at the folder of the program that declares it.

    Raises:
        DeclarationError: the path is empty, ":memory:", a URL, or begins with "~".
    """

    kind: Literal["sqlite"] = "sqlite"
    path: Annotated[Path, AfterValidator(_file)]


_KINDS = {"postgresql": PostgresqlConfig, "mysql": MysqlConfig, "sqlite": SqliteConfig}
_PORTS = {5432: PostgresqlConfig, 3306: MysqlConfig}


def database_class(value: object) -> str | None:
    """Name the class that a value is or describes; None if it does not say."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    if "kind" in value:
        chosen = _KINDS.get(str(value["kind"]))
    elif "path" in value:
        chosen = SqliteConfig
    else:
        port = value.get("port")
        chosen = _PORTS.get(port) if isinstance(port, int) else None
    return chosen.__name__ if chosen else None


DatabaseConfig = Annotated[
    Annotated[PostgresqlConfig, Tag("PostgresqlConfig")]
    | Annotated[MysqlConfig, Tag("MysqlConfig")]
    | Annotated[SqliteConfig, Tag("SqliteConfig")],
    Discriminator(
        database_class,
        custom_error_type="database_tag_invalid",
        custom_error_message="must say which database it is; pass a PostgresqlConfig, MysqlConfig "
        'or SqliteConfig, or a mapping with kind "postgresql", "mysql" or "sqlite", '
        "or with the number 5432 or 3306 as port",
    ),
]
"""Any of the three databases.

Loads from a mapping too: its `kind` says which; without one a `path` means SQLite, and a `port` of
5432 or 3306 PostgreSQL or MySQL.
"""


class WarmBackupConfig(Declaration):
    """How several nodes run one group of tasks, one of them at a time.

    Nodes of one `group_id` stand in for each other. `task_id` names this node and must be unique
    among them; it is the host name unless given. A node sends a heartbeat every
    `heartbeat_frequency` seconds and is taken for dead `liveness_check_interval` seconds after the
    last, which must leave room for three. A `database_config` of None leaves the choice to the
    settings.

    Raises:
        DeclarationError: an id that is blank, longer than 255 characters or holds "/", "%" or what cannot
            be printed, or a `group_id` that holds what Prefect refuses in a queue's name; the `group_id`
            "default", the queue of jobs without a group; a time that is not positive or longer than 100
            years; a `heartbeat_frequency` below 0.01; a `liveness_check_interval` below three heartbeats.
    """

    group_id: Annotated[str, AfterValidator(_group_id)]
    task_id: Annotated[str, AfterValidator(_task_id)] = Field(
        default_factory=lambda: socket.gethostname(), validate_default=True
    )
    database_config: DatabaseConfig | None = None
    liveness_check_interval: PositiveSeconds = 30.0
    heartbeat_frequency: Annotated[PositiveSeconds, AfterValidator(_heartbeat)] = 1.0

    @model_validator(mode="after")
    def _survives_lost_heartbeats(self) -> Self:
        shortest = _MIN_HEARTBEATS * self.heartbeat_frequency
        # 3 * 0.1 is a little more than 0.3: a microsecond decides nothing.
        if round(shortest - self.liveness_check_interval, 6) > 0:
            raise ValueError(
                f"liveness_check_interval={self.liveness_check_interval:g} must be at least "
                f"{_MIN_HEARTBEATS} times heartbeat_frequency={self.heartbeat_frequency:g}, or one "
                f"late heartbeat is taken for a dead node; raise it to {shortest:g} or send "
                "heartbeats more often"
            )
        return self
