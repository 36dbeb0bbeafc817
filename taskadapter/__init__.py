"""Run a periodic Prefect job on exactly one of several machines.

Ballerina's ``task`` module gives the vocabulary: jobs and services on listeners with a trigger,
retries and a group of nodes of which one is active. Prefect gives the engine, the history and the UI.
"""

from taskadapter.civil import Civil, ZoneOffset
from taskadapter.errors import TaskError
from taskadapter.jobs import Job, JobId, Service
from taskadapter.listener import Listener
from taskadapter.model import (
    ErrorPolicy,
    MysqlConfig,
    PostgresqlConfig,
    RetryConfiguration,
    RetryStrategy,
    SqliteConfig,
    TaskPolicy,
    TriggerConfiguration,
    WaitingPolicy,
    WarmBackupConfig,
)
from taskadapter.progress import fenced
from taskadapter.runs import current_run

__all__ = [
    "Civil",
    "ErrorPolicy",
    "Job",
    "JobId",
    "Listener",
    "MysqlConfig",
    "PostgresqlConfig",
    "RetryConfiguration",
    "RetryStrategy",
    "Service",
    "SqliteConfig",
    "TaskError",
    "TaskPolicy",
    "TriggerConfiguration",
    "WaitingPolicy",
    "WarmBackupConfig",
    "ZoneOffset",
    "current_run",
    "fenced",
]
