"""What a user declares about the nodes that stand in for each other, and the database between them."""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, SecretStr, StrictInt, Tag, model_validator

from taskadapter.declare.base import Declaration
from taskadapter.declare.names import BANNED, LONGEST_NAME, is_name
from taskadapter.declare.values import PositiveSeconds

DEFAULT_QUEUE = "default"
"""The queue of jobs without a group: every agent polls it."""

_MIN_HEARTBEATS = 3

_SHORTEST_HEARTBEAT = 0.01
"""Seconds: less than a round trip to a database takes."""


def _heartbeat(seconds: float) -> float:
    if seconds < _SHORTEST_HEARTBEAT:
        raise ValueError(f"must be at least {_SHORTEST_HEARTBEAT:g} seconds; choose a longer time")
    return seconds


def _group_id(name: str) -> str:
    _require_name(name, BANNED)
    if name == DEFAULT_QUEUE:
        raise ValueError(
            f"must not be {DEFAULT_QUEUE!r}: that is the queue of jobs without a group, which every node "
            "runs; choose another name"
        )
    return name


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


_Host = Annotated[str, AfterValidator(_host)]
_Text = Annotated[str, AfterValidator(_without_nul)]
_Port = Annotated[StrictInt, Field(ge=1, le=65535)]
_Password = Annotated[SecretStr, AfterValidator(_password)]


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
    password: _Password | None = None
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
    password: _Password | None = None
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
