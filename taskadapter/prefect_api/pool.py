"""What all nodes of one work pool share, kept in the pool's variables: its domain and its size."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from prefect.blocks.system import Secret
from prefect.utilities.slugify import slugify

from taskadapter.declare.backup import WarmBackupConfig
from taskadapter.errors import TaskError
from taskadapter.prefect_api.client import all_pages
from taskadapter.rules import ticks
from taskadapter.settings import TaskadapterSettings

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import WorkPool, WorkQueue
    from sqlalchemy import URL


NO_POOL = (
    "there is no work pool {name!r}; deploy, or start an agent, which makes it, or name another with --pool"
)

OTHER_TYPE = (
    "work pool {name!r} is of type {type!r}, whose workers run jobs uncoordinated; name another pool, or "
    "delete that one and deploy again"
)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Database and timing of a pool's groups.

    Attributes:
        database: SQLAlchemy URL without a password; None for each node's own default.
        password_block: the name of the Prefect `Secret` block that has the password, if one does.
        liveness_check_interval: seconds without heartbeat after which a node is taken for dead.
        heartbeat_frequency: seconds between two heartbeats.
    """

    database: str | None = None
    password_block: str | None = None
    liveness_check_interval: float = 30.0
    heartbeat_frequency: float = 1.0

    @classmethod
    def declared(cls, config: WarmBackupConfig, work_pool: str) -> Self:
        """Return the domain that a listener declares for its pool."""
        url, password = _split(config)
        return cls(
            database=url,
            password_block=slug_of(work_pool) if password else None,
            liveness_check_interval=config.liveness_check_interval,
            heartbeat_frequency=config.heartbeat_frequency,
        )

    @classmethod
    def of(cls, pool: WorkPool) -> Self:
        """Return the domain as a work pool has it."""
        return cls(**_read(pool, asdict(cls())))

    def put_into(self, template: dict[str, Any]) -> dict[str, Any]:
        """Return a base job template whose variables have this domain as their defaults."""
        return _write(template, asdict(self))

    def unlike(self, other: Domain) -> dict[str, str]:
        """Return what differs from another domain, as this one has it, by the names that users declare."""
        theirs = other._in_words()
        return {name: said for name, said in self._in_words().items() if said != theirs[name]}

    def _in_words(self) -> dict[str, str]:
        return {
            "database": self.database or "each node's own",
            "password": "none" if self.password_block is None else "given",
            "liveness_check_interval": f"{self.liveness_check_interval:.12g}",
            "heartbeat_frequency": f"{self.heartbeat_frequency:.12g}",
        }

    def is_named(self, settings: TaskadapterSettings) -> bool:
        """Return whether the pool or a node's settings name the database; else each node has its own."""
        return self.database is not None or settings.database_url is not None

    async def database_url(self, settings: TaskadapterSettings) -> str:
        """Return the database's URL with its secret, from the node's environment or the block.

        Raises:
            TaskError: the block cannot be read.
        """
        if settings.database_url is not None:
            return settings.database_url.get_secret_value()
        if self.database is None:
            return settings.default_database_url()
        password = settings.database_password
        if password is not None:
            return with_password(self.database, password.get_secret_value())
        if self.password_block is None:
            return self.database
        try:
            block: Any = await Secret.aload(self.password_block)
        except ValueError as error:
            raise TaskError(
                f"the password of the coordination database is to be in the Secret block "
                f"{self.password_block!r}, which cannot be read; make that block, or set "
                "PREFECT_INTEGRATIONS_TASKADAPTER_DATABASE_PASSWORD on this node."
            ) from error
        return with_password(self.database, str(block.get()))


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """How much each node of a pool runs at once, and how long a tick may wait for that.

    Attributes:
        worker_count: runs at once on a node; None for each node's own setting.
        waiting_time: seconds after its time within which a tick is not yet late.
    """

    worker_count: int | None = None
    waiting_time: float = ticks.WAITING_TIME

    @classmethod
    def of(cls, pool: WorkPool) -> Self:
        """Return the size as a work pool has it."""
        return cls(**_read(pool, asdict(cls())))

    def put_into(self, template: dict[str, Any]) -> dict[str, Any]:
        """Return a base job template whose variables have this size as their defaults."""
        return _write(template, asdict(self))


@dataclass(frozen=True)
class Queues:
    """A work pool's queues, and of which of them Prefect lists no run, or only some.

    Attributes:
        names: all of them.
        paused: those that are paused, or all where the pool is; a limit of 0 is a pause.
        limited: those that have a limit of their own, or all where the pool has one.
        closed: what is paused itself, in words: the pool, or queues.
    """

    names: frozenset[str]
    paused: frozenset[str] = frozenset()
    limited: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()

    @classmethod
    async def read(cls, client: PrefectClient, work_pool: str) -> Self:
        """Return those of a pool.

        Raises:
            ObjectNotFound: there is no such pool.
        """
        pool = await client.read_work_pool(work_pool)
        return cls.of(pool, await all_pages(client.read_work_queues, work_pool_name=work_pool))

    @classmethod
    def of(cls, pool: WorkPool, queues: Collection[WorkQueue]) -> Self:
        """Return those of a pool that was read."""
        limits = {one.name: {pool.concurrency_limit, one.concurrency_limit} - {None} for one in queues}
        closed = [one for one in queues if _is_closed(one)]
        words = [f"work queue {one.name!r}{_by(one)}" for one in closed]
        if _is_closed(pool):
            words.append(f"work pool {pool.name!r}{_by(pool)}")
        return cls(
            names=frozenset(limits),
            paused=frozenset(limits if _is_closed(pool) else (one.name for one in closed)),
            limited=frozenset(name for name, limit in limits.items() if limit),
            closed=frozenset(words),
        )

    @property
    def withheld(self) -> frozenset[str]:
        """Those of which a run that is not listed may be there all the same."""
        return self.paused | self.limited


def _is_closed(found: WorkPool | WorkQueue) -> bool:
    """Return whether a pool, or a queue, lets nothing through: a limit of 0 is a pause."""
    return found.is_paused or found.concurrency_limit == 0


def _by(found: WorkPool | WorkQueue) -> str:
    """Return what to add of one whose switch is on, and that lets nothing through all the same."""
    return "" if found.is_paused else " (concurrency limit 0)"


def slug_of(work_pool: str) -> str:
    """Return what a pool's block and artifact are called: of lower-case letters, digits and dashes only.

    No two pools have the same, though their names may differ in nothing else: `etl`, `ETL`, `e t l`.
    """
    name = f"taskadapter-{work_pool}"
    slug = slugify(name)
    # A slug has no two dashes in a row: no other pool's name is one with a digest.
    return slug if slug == name else f"{slug}--{sha256(name.encode()).hexdigest()[:16]}"


def preload_of(pool: WorkPool) -> tuple[str, ...]:
    """Return the modules that a pool has each node import once."""
    return tuple(_read(pool, ["preload"]).get("preload", ()))


def working_dir_of(pool: WorkPool) -> str | None:
    """Return the folder in which a pool has its runs run, if it names one."""
    return _read(pool, ["working_dir"]).get("working_dir")


def _read(pool: WorkPool, names: Iterable[str]) -> dict[str, Any]:
    """Return the defaults that a pool's variables have, without those that have none."""
    properties = pool.base_job_template.get("variables", {}).get("properties", {})
    defaults = {name: properties.get(name, {}).get("default") for name in names}
    return {name: value for name, value in defaults.items() if value is not None}


def _write(template: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a base job template with these defaults; its other variables stay as they are."""
    properties = dict(template["variables"]["properties"])
    for name, value in values.items():
        properties[name] = properties.get(name, {}) | {"default": value}
    return template | {"variables": template["variables"] | {"properties": properties}}


def password_of(config: WarmBackupConfig) -> str | None:
    """Return the password that a listener declares, for the block that keeps it."""
    return _split(config)[1]


def _split(config: WarmBackupConfig) -> tuple[str | None, str | None]:
    if config.database_config is None:
        return None, None
    from taskadapter.coordination.engines import url_of

    url: URL = url_of(config.database_config)
    return url._replace(password=None).render_as_string(), url.password


def with_password(url: str, password: str) -> str:
    """Return a database's URL with its password in it: never log it."""
    from taskadapter.coordination.engines import url_of

    return url_of(url).set(password=password).render_as_string(hide_password=False)
