"""Run a periodic Prefect job on exactly one of several machines.

Ballerina's ``task`` module gives the vocabulary: jobs and services on listeners with a trigger,
retries and a group of nodes of which one is active. Prefect gives the engine, the history and the UI.
"""

from taskadapter.declare.backup import MysqlConfig, PostgresqlConfig, SqliteConfig, WarmBackupConfig
from taskadapter.declare.civil import Civil, ZoneOffset
from taskadapter.declare.jobs import Job, JobId, Service
from taskadapter.declare.triggers import (
    ErrorPolicy,
    RetryConfiguration,
    RetryStrategy,
    TaskPolicy,
    TriggerConfiguration,
    WaitingPolicy,
)
from taskadapter.errors import TaskError
from taskadapter.execution.current import current_run
from taskadapter.execution.record import fenced
from taskadapter.listener import Listener
from taskadapter.scheduler import (
    aconfigure_worker_pool,
    aget_running_jobs,
    apause_all_jobs,
    apause_job,
    aresume_all_jobs,
    aresume_job,
    aschedule_job_recur_by_frequency,
    aschedule_one_time_job,
    aunschedule_job,
    configure_worker_pool,
    get_running_jobs,
    pause_all_jobs,
    pause_job,
    resume_all_jobs,
    resume_job,
    schedule_job_recur_by_frequency,
    schedule_one_time_job,
    unschedule_job,
)

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
    "aconfigure_worker_pool",
    "aget_running_jobs",
    "apause_all_jobs",
    "apause_job",
    "aresume_all_jobs",
    "aresume_job",
    "aschedule_job_recur_by_frequency",
    "aschedule_one_time_job",
    "aunschedule_job",
    "configure_worker_pool",
    "current_run",
    "fenced",
    "get_running_jobs",
    "pause_all_jobs",
    "pause_job",
    "resume_all_jobs",
    "resume_job",
    "schedule_job_recur_by_frequency",
    "schedule_one_time_job",
    "unschedule_job",
]
