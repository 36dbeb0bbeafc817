"""What the nodes of a pool share: database and timing, and where the secret comes from."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import WorkPool

from taskadapter.agent.worker import WarmBackupWorker
from taskadapter.declare.backup import PostgresqlConfig, WarmBackupConfig
from taskadapter.pools import another_database
from taskadapter.prefect_api.pool import Domain, PoolSize, Queues, password_of, slug_of
from taskadapter.settings import TaskadapterSettings

DATABASE = PostgresqlConfig(host="db", user="tasks", password="open sesame", database="tasks")
CONFIG = WarmBackupConfig(group_id="group", database_config=DATABASE, liveness_check_interval=6)
URL = "postgresql+psycopg://tasks@db:5432/tasks"


def pool(domain: Domain) -> WorkPool:
    return pool_of(domain.put_into(WarmBackupWorker.get_default_base_job_template()))


def pool_of(template: dict[str, Any]) -> WorkPool:
    return WorkPool.model_validate({"name": "pool", "type": "warm-backup", "base_job_template": template})


def url_with(domain: Domain, **settings: str) -> str:
    return asyncio.run(domain.database_url(TaskadapterSettings.model_validate(settings)))


def test_the_domain_of_a_listener_has_no_secret() -> None:
    """The URL is without the password, which is named by its block only."""
    domain = Domain.declared(CONFIG, "my-pool")

    assert domain == Domain(database=URL, password_block="taskadapter-my-pool", liveness_check_interval=6.0)
    assert "sesame" not in repr(domain)
    assert password_of(CONFIG) == "open sesame"


def test_no_two_pools_share_a_block() -> None:
    """Whatever a block's name cannot hold of theirs: the later deploy overwrote the other's password."""
    shared = ["ETL", "e t l", "e_t_l", "e--t-l", "\u00e9tl", "\u65e5\u672c", "***", "x" * 255, "X" * 255]
    names = ["etl", "e-t-l", *shared, slug_of("ETL").removeprefix("taskadapter-")]
    blocks = {name: Domain.declared(CONFIG, name).password_block or "" for name in names}

    assert len(set(blocks.values())) == len(names)
    assert [block for block in blocks.values() if not re.fullmatch("[a-z0-9-]+", block)] == []
    assert (blocks["etl"], blocks["e-t-l"]) == ("taskadapter-etl", "taskadapter-e-t-l")


def test_a_pool_keeps_its_domain() -> None:
    """What is put into a pool's variables is what its nodes read there."""
    domain = Domain.declared(CONFIG, "pool")

    assert Domain.of(pool(domain)) == domain


def test_a_pool_without_a_domain_has_the_defaults() -> None:
    """The timing of a pool that nobody configured is the declared default, 30 s and 1 s."""
    assert Domain.of(pool(Domain())) == Domain(liveness_check_interval=30.0, heartbeat_frequency=1.0)


def test_a_pool_made_by_hand_has_the_defaults() -> None:
    """A pool whose template knows nothing of coordination has the defaults too."""
    assert Domain.of(pool_of({})) == Domain()


def test_the_nodes_environment_wins() -> None:
    """A URL in a node's environment is used as it is."""
    domain = Domain.declared(CONFIG, "pool")

    assert url_with(domain, database_url="sqlite:///other.db") == "sqlite:///other.db"


def test_the_password_from_the_nodes_environment() -> None:
    """A password in a node's environment goes into the pool's URL, quoted where it must be."""
    url = url_with(Domain.declared(CONFIG, "pool"), database_password="a/b")

    assert url == "postgresql+psycopg://tasks:a%2Fb@db:5432/tasks"


def test_without_a_database_each_node_has_its_own() -> None:
    """A domain that names no database is SQLite in Prefect's home."""
    assert url_with(Domain()).startswith("sqlite:///")


@pytest.mark.parametrize("database", [None, URL])
def test_without_a_password_none_is_looked_for(database: str | None) -> None:
    """Where no block is named, the URL is used without a password and the API is not asked."""
    assert "@" not in url_with(Domain(database=database)).replace("tasks@", "")


def test_a_pool_keeps_its_size_beside_its_domain() -> None:
    """Size and domain are put into one template, in either order, and each is read as it was put."""
    size, domain = PoolSize(worker_count=2, waiting_time=0.0), Domain.declared(CONFIG, "pool")
    template = WarmBackupWorker.get_default_base_job_template()

    for filled in (
        domain.put_into(size.put_into(template)),
        size.put_into(domain.put_into(template)),
    ):
        found = pool_of(filled)
        assert (PoolSize.of(found), Domain.of(found)) == (size, domain)
        properties = filled["variables"]["properties"]
        assert properties["worker_count"]["title"] == "Worker count"


@pytest.mark.parametrize("template", [{}, WarmBackupWorker.get_default_base_job_template()])
def test_a_pool_without_a_size_has_the_defaults(template: dict[str, Any]) -> None:
    """Each node has its own count, and a tick is late after five seconds."""
    found = pool_of(template)

    assert PoolSize.of(found) == PoolSize(worker_count=None, waiting_time=5.0)


def test_what_differs_from_another_domain_is_told_without_a_secret() -> None:
    """By the names that users declare, as each has it."""
    declared = Domain.declared(CONFIG, "pool")

    assert declared.unlike(Domain()) == {
        "database": URL,
        "password": "given",
        "liveness_check_interval": "6",
    }
    assert Domain().unlike(declared)["liveness_check_interval"] == "30"
    assert declared.unlike(declared) == {}


@pytest.mark.parametrize(
    ("nodes", "known", "wanted", "sentences"),
    [
        (
            ["node-2"],
            None,
            URL,
            "the nodes of work pool 'nightly' (node-2) coordinate through the default database, as the "
            f"pool names none. Database {URL} has none of their counts and states. Give this listener a "
            "work_pool= of its own, leave its database_config out, or stop those nodes first.",
        ),
        (
            ["node-1", "node-2"],
            URL,
            None,
            f"the nodes of work pool 'nightly' (node-1, node-2) coordinate through database {URL}. The "
            "default one, which this listener wants, has none of their counts and states. Give this "
            "listener a work_pool= of its own, name the same database, or stop those nodes first.",
        ),
    ],
)
def test_another_database_is_refused_in_sentences(nodes, known, wanted, sentences):
    """Also where the pool, or the listener, names none."""
    assert another_database("nightly", nodes, known, wanted) == sentences


@pytest.mark.parametrize(
    ("pool", "queue", "closed"),
    [
        ({}, {}, set()),
        ({"is_paused": True}, {}, {"work pool 'mine'"}),
        ({"concurrency_limit": 0}, {}, {"work pool 'mine' (concurrency limit 0)"}),
        ({}, {"is_paused": True}, {"work queue 'gb'"}),
        ({}, {"concurrency_limit": 0}, {"work queue 'gb' (concurrency limit 0)"}),
        ({"is_paused": True}, {"is_paused": True}, {"work pool 'mine'", "work queue 'gb'"}),
        ({"concurrency_limit": 2}, {"concurrency_limit": 1}, set()),
    ],
)
def test_what_is_paused_is_a_pool_or_a_queue(pool, queue, closed):
    """Each is resumed with a command of its own; either keeps what is due in the queue from beginning."""
    defaults: dict[str, Any] = {"is_paused": False, "concurrency_limit": None}
    found: Any = SimpleNamespace(name="mine", **{**defaults, **pool})
    one: Any = SimpleNamespace(name="gb", **{**defaults, **queue})

    queues = Queues.of(found, [one])

    assert queues.closed == closed
    assert queues.paused == ({"gb"} if closed else set())
