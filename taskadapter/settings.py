"""Settings of this integration, in Prefect's own way.

Each is read from the environment as ``PREFECT_INTEGRATIONS_TASKADAPTER_<NAME>``, from
``[integrations.taskadapter]`` in ``prefect.toml`` and from ``[tool.prefect.integrations.taskadapter]``
in ``pyproject.toml``, in that order.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from prefect.settings import get_current_settings
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from prefect.settings.sources import (
    PrefectTomlConfigSettingsSource,
    ProfileSettingsTomlLoader,
    PyprojectTomlConfigSettingsSource,
)
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from taskadapter.declare.base import in_our_words, shown
from taskadapter.declare.names import broken_rule_of_pools
from taskadapter.errors import DeclarationError, closest
from taskadapter.rules import ticks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEFAULT_WORK_POOL = "taskadapter"

PREFIX = "PREFECT_INTEGRATIONS_TASKADAPTER_"
"""What the name of each setting begins with in the environment."""


def check_interval(interval: float) -> None:
    """Refuse an interval that Prefect's scheduler would leave holes in, by its settings as known here.

    Args:
        interval: seconds between two ticks.

    Raises:
        DeclarationError: as `ticks.check_interval`.
    """
    scheduler = get_current_settings().server.services.scheduler
    ticks.check_interval(interval, max_runs=scheduler.max_runs, loop_seconds=scheduler.loop_seconds)


class TaskadapterSettings(PrefectBaseSettings):
    """What a node or a deploying machine may set; every field has a default that works.

    A variable of the environment that is empty is as one that is not set.

    Raises:
        DeclarationError: values that are refused, with a line for each.
    """

    # Compose's ${NAME:-} is empty where NAME is not set.
    model_config: ClassVar[SettingsConfigDict] = build_settings_config(
        ("integrations", "taskadapter")
    ) | SettingsConfigDict(env_ignore_empty=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise DeclarationError("\n".join(map(_refusal, error.errors()))) from None

    work_pool: str = Field(
        default=DEFAULT_WORK_POOL,
        description="The work pool of listeners and scheduling functions that name none.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description=(
            "SQLAlchemy URL of the coordination database, instead of the one that the work pool "
            "names. Default without either: a SQLite file in Prefect's home, good for one machine."
        ),
    )
    database_password: SecretStr | None = Field(
        default=None,
        description=(
            "The password for the database that the work pool names. Default: the one in the pool's "
            "Secret block."
        ),
    )
    worker_count: int = Field(
        default=5,
        ge=1,
        description="How many runs a node executes at once, unless its --limit says otherwise.",
    )
    poll_seconds: float = Field(
        default=0.6,
        gt=0,
        description=(
            "Seconds between two looks for new runs of an idle agent that cannot hear Prefect's event "
            "stream: a run by hand begins so much later. One that has something to run takes three times "
            "as long. PREFECT_WORKER_QUERY_SECONDS, where set, wins for both."
        ),
    )
    preload: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Modules, separated by commas, that a node imports once for all its runs, such as pandas: "
            "ones that change only with a restart, and start no threads. The pool's variable preload names "
            "some for all its nodes."
        ),
    )
    ledger_days: float = Field(
        default=7.0,
        gt=0,
        description=(
            "Days for which the coordination database keeps what has been executed, and who took part."
        ),
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that a stopping agent waits for its runs before it ends them.",
    )

    @field_validator("work_pool")
    @classmethod
    def _is_a_pool(cls, name: str) -> str:
        if (rule := broken_rule_of_pools(name)) is not None:
            raise ValueError(rule)
        return name

    @field_validator("preload", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Take a list, or names separated by commas."""
        if isinstance(value, str):
            return [name.strip() for name in value.split(",") if name.strip()]
        return value

    def default_database_url(self) -> str:
        """Return the URL of the database where nothing is configured."""
        return f"sqlite:///{get_current_settings().home / 'taskadapter.db'}"


def _refusal(wrong: Any) -> str:
    name = str(wrong["loc"][0])
    field = TaskadapterSettings.model_fields[name]
    value = "" if field.annotation == SecretStr | None else f"={_as_set(wrong['input'])}"
    rule = in_our_words(wrong["msg"])
    return f"setting {PREFIX}{name.upper()}{value} is refused: it {rule}; correct it, or unset it"


def _as_set(value: object) -> str:
    """Return a value as it is written in the environment; in quotes what could not be read there."""
    text = str(value)
    return text if shown(text) == f"'{text}'" and text.strip() else shown(text)


def misspelt() -> list[str]:
    """Return a sentence for each name that stands where a setting does, and is none; no value is told."""
    fields = list(TaskadapterSettings.model_fields)
    variables = [name.upper() for name in fields]
    profile = ProfileSettingsTomlLoader(TaskadapterSettings).profile_settings
    found = [_suggestion(name, PREFIX, short.upper(), variables) for name, short in _ours(os.environ)]
    found += [
        _suggestion(f"{name} in Prefect's profile", PREFIX, short, variables)
        for name, short in _ours(profile)
    ]
    for place, keys in _tables():
        found += [_suggestion(f"{key} in {place}", "", key, fields) for key in sorted(keys)]
    return [sentence for sentence in found if sentence is not None]


def _ours(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return those that begin as a setting does, with what follows."""
    return [(name, name[len(PREFIX) :]) for name in sorted(names) if name.upper().startswith(PREFIX)]


def _tables() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield our table of each file that settings are read from: where it is, and what is in it."""
    prefect = PrefectTomlConfigSettingsSource(TaskadapterSettings)
    yield "[integrations.taskadapter] of prefect.toml", prefect.toml_data
    project = PyprojectTomlConfigSettingsSource(TaskadapterSettings)
    yield "[tool.prefect.integrations.taskadapter] of pyproject.toml", project.toml_data


def _suggestion(place: str, prefix: str, name: str, known: list[str]) -> str | None:
    """Say that a name is no setting, and which one it may be; None where it is one."""
    if name in known:
        return None
    spelled = name.upper() if prefix else name.lower()
    close = closest(spelled, known)
    remedy = f"did you mean {prefix}{close}?" if close else f"settings are {', '.join(known)}"
    return f"{place} is no setting and has no effect; {remedy}"
