"""Settings of this integration, in Prefect's own way.

Each is read from the environment as ``PREFECT_INTEGRATIONS_TASKADAPTER_<NAME>``, from
``[integrations.taskadapter]`` in ``prefect.toml`` and from ``[tool.prefect.integrations.taskadapter]``
in ``pyproject.toml``, in that order.
"""

from __future__ import annotations

import difflib
import os
from typing import Annotated, Any, ClassVar

from prefect.settings import get_current_settings
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from taskadapter.errors import DeclarationError
from taskadapter.rules import ticks

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
        description="Days for which the coordination database keeps what has been executed.",
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that a stopping agent waits for its runs before it ends them.",
    )

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
    value = "" if field.annotation == SecretStr | None else f"={wrong['input']}"
    rule = wrong["msg"].removeprefix("Value error, ")
    return f"setting {PREFIX}{name.upper()}{value} is refused: {rule}; correct it, or unset it"


def misspelt() -> list[str]:
    """Return a sentence for each variable of the environment that looks like a setting, and is none."""
    known = [name.upper() for name in TaskadapterSettings.model_fields]
    found = [name for name in sorted(os.environ) if name.upper().startswith(PREFIX)]
    return [_suggestion(name, known) for name in found if name[len(PREFIX) :].upper() not in known]


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[len(PREFIX) :].upper(), known, n=1)
    remedy = f"did you mean {PREFIX}{close[0]}?" if close else f"settings are {', '.join(known)}"
    return f"{name} is no setting and has no effect; {remedy}"
