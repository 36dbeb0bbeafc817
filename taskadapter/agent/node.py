"""What all parts of an agent know: which node it is, and which share of its work pool it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, WorkPool

from taskadapter.agent.tasks import Tasks
from taskadapter.agent.telling import Teller
from taskadapter.declare.backup import DEFAULT_QUEUE
from taskadapter.settings import TaskadapterSettings

LONGEST_BACKOFF_SECONDS = 15.0
"""How long an agent waits at most between two tries of a look, or a takeover, that failed."""


@dataclass
class Share:
    """What an agent runs of its work pool.

    Attributes:
        queues: the queues that it serves; none for all of the pool.
        left_out: jobs of them that it leaves to other nodes.
    """

    queues: set[str] = field(default_factory=set)
    left_out: set[UUID] = field(default_factory=set)

    def serves(self, queue: str) -> bool:
        """Return whether the agent serves a queue."""
        return not self.queues or queue in self.queues

    def has_job_of(self, flow_run: FlowRun) -> bool:
        """Return whether the agent runs the job of a run, as far as the job decides that."""
        return flow_run.deployment_id not in self.left_out

    def take_up(self, queue: str | None, job_ids: Iterable[UUID]) -> None:
        """Run some jobs that were left out before, and serve their queue unless it is None."""
        if queue is not None:
            self.queues.add(queue)
        self.left_out -= set(job_ids)

    def give_up(self, queue: str | None, job_ids: Iterable[UUID]) -> None:
        """Leave some jobs to other nodes, and a queue as a whole unless it is None."""
        self.left_out |= set(job_ids)
        if queue is not None:
            self.queues.discard(queue)


@dataclass(frozen=True)
class Node:
    """A node, as the parts of its agent know it.

    Attributes:
        name: its name.
        incarnation: which of all processes that ever had it.
        work_pool: the name of the pool whose flows it runs.
        pool: returns that pool as it was last read.
        has_pool: returns whether it has been read.
        client: connected to the API.
        log: the agent's.
        settings: the agent's.
        share: what it runs of the pool.
        tasks: what it does in the background.
        teller: tells the API what became of runs, until it knows.
    """

    name: str
    incarnation: str
    work_pool: str
    pool: Callable[[], WorkPool]
    has_pool: Callable[[], bool]
    client: PrefectClient
    log: Logger | LoggerAdapter[Any]
    settings: TaskadapterSettings
    share: Share
    tasks: Tasks
    teller: Teller


def queue_of(flow_run: FlowRun) -> str:
    """Return the name of a run's work queue: its group, or the queue of jobs that have none."""
    return flow_run.work_queue_name or DEFAULT_QUEUE


def has_group(flow_run: FlowRun) -> bool:
    """Return whether a run is of a group's job."""
    return queue_of(flow_run) != DEFAULT_QUEUE
