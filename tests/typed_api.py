"""The public API as a user's module has it: checked by mypy in strict mode, never run.

What is wrong on purpose carries an ignore, and mypy reports an ignore that nothing needs: so this
module also says what the types must refuse.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import assert_type
from uuid import UUID

from prefect import Flow
from pydantic import SecretStr

from taskadapter import (
    Civil,
    ErrorPolicy,
    Job,
    JobId,
    Listener,
    MysqlConfig,
    PostgresqlConfig,
    RetryConfiguration,
    RetryStrategy,
    Service,
    SqliteConfig,
    TaskError,
    TaskPolicy,
    TriggerConfiguration,
    WaitingPolicy,
    WarmBackupConfig,
    ZoneOffset,
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
    current_run,
    get_running_jobs,
    pause_all_jobs,
    pause_job,
    resume_all_jobs,
    resume_job,
    schedule_job_recur_by_frequency,
    schedule_one_time_job,
    unschedule_job,
)

# --- declarations ---------------------------------------------------------------------------------

retry = RetryConfiguration(
    max_attempts=5,
    retry_interval=0.5,
    backoff_strategy=RetryStrategy.EXPONENTIAL,
    max_interval=timedelta(seconds=5),
)
policy = TaskPolicy(
    error_policy=ErrorPolicy.LOG_AND_CONTINUE,
    waiting_policy=WaitingPolicy.IGNORE,
    max_concurrent=1,
)
offset = ZoneOffset(hours=5, minutes=30)
start = Civil(year=2030, month=1, day=1, hour=12, minute=0, second=0, utc_offset=offset)
trigger = TriggerConfiguration(
    interval=2,
    max_count=5,
    start_time=start,
    end_time="2031-01-01T00:00:00Z",
    task_policy=policy,
    retry_config=retry,
)
TriggerConfiguration(interval=Decimal("2.5"), start_time=datetime(2030, 1, 1, tzinfo=UTC))
TriggerConfiguration(interval=timedelta(minutes=1), end_time=None)

databases = [
    PostgresqlConfig(host="db", port=5432, user="node", password=SecretStr("x"), database="tasks"),
    MysqlConfig(host="db", port=3306, user="node", password=SecretStr("x"), database="tasks"),
    SqliteConfig(path=Path("tasks.db")),
]
backup = WarmBackupConfig(
    group_id="task-group-01",
    task_id="node-1",
    database_config=SqliteConfig(path=Path("tasks.db")),
    liveness_check_interval=6,
    heartbeat_frequency=timedelta(seconds=1),
)

retry.max_attempts = 6  # type: ignore[misc]  # frozen

# --- listeners ------------------------------------------------------------------------------------

task_listener = Listener(
    trigger=TriggerConfiguration(interval=2, max_count=5),
    retry_config=retry,
    task_policy=policy,
    warm_backup_config=backup,
    work_pool="nightly",
)

assert_type(
    Listener.from_config("Config.toml", table="org.module", trigger=task_listener.trigger), Listener
)


@task_listener.service("job-1")
class Counter(Service):
    i: int = 1

    def execute(self) -> None:
        print("Counter:", self.i)
        self.i += 1


@task_listener.service("job-2", timeout_seconds=30, log_prints=False)
def check_inbox(days: int = 7) -> None: ...


@task_listener.service("job-3")
async def check_outbox() -> int:
    return 1


class Total(Service):
    amount: float = 0

    async def execute(self) -> None:
        self.amount += 1


attached = task_listener.attach(Total(amount=10), "job-4")
task_listener.detach("job-4")

task_listener.service("job-5")(42)  # type: ignore[arg-type]  # neither a class nor a function
task_listener.attach(check_inbox, "job-6")  # type: ignore[arg-type]  # no service
task_listener.service()  # type: ignore[call-arg]  # a name is required


def names_of_flows(flow: Flow[..., object]) -> str:
    return flow.name


names_of_flows(attached)


def run_for_a_while() -> None:
    with task_listener as started:
        assert_type(started, Listener)
    task_listener.start()
    task_listener.graceful_stop()
    task_listener.start()
    task_listener.immediate_stop()


# --- inside a run ---------------------------------------------------------------------------------


class Greeting(Job):
    message: str
    times: int = 1

    def execute(self) -> None:
        run = current_run()
        assert_type(run.job_id, JobId | None)
        assert_type(run.scheduled_time, datetime)
        assert_type(run.count, int)
        assert_type(run.attempt, int)
        assert_type(run.group_id, str | None)
        assert_type(run.task_id, str | None)
        assert_type(run.fencing_token, int | None)


def ids_and_errors() -> None:
    try:
        Greeting(message="hello", times=2).execute()
    except TaskError as error:
        assert_type(error, TaskError)
    by_text, by_uuid = JobId("00000000-0000-0000-0000-000000000000"), JobId(UUID(int=0))
    assert_type(by_text.id, UUID)
    assert by_text == by_uuid


Greeting(massage="hello")  # type: ignore[call-arg]  # a misspelled field

# --- scheduling from a program --------------------------------------------------------------------


def schedule() -> None:
    greeting = Greeting(message="hello")
    configure_worker_pool(worker_count=2, waiting_time=timedelta(seconds=1), work_pool="nightly")
    once = schedule_one_time_job(greeting, start, name="once", task_policy=policy, group_id="group")
    assert_type(once, JobId)
    often = schedule_job_recur_by_frequency(
        greeting, Decimal("2.5"), 5, start, "2031-01-01T00:00:00Z", policy
    )
    assert_type(often, JobId)
    pause_job(once)
    resume_job(once)
    pause_all_jobs()
    resume_all_jobs(work_pool="nightly")
    unschedule_job(once)
    assert_type(get_running_jobs(work_pool="nightly"), list[JobId])
    schedule_one_time_job(Greeting, start)  # type: ignore[arg-type]  # a class
    schedule_one_time_job(Counter, start)  # type: ignore[arg-type]  # a flow
    schedule_one_time_job(Total(), start)  # type: ignore[arg-type]  # a service
    schedule_one_time_job(greeting, start, "once")  # type: ignore[call-arg]  # the name is a keyword
    pause_job("once")
    resume_job("greeting/once")
    unschedule_job("once")
    pause_job(5)  # type: ignore[arg-type]  # neither an id nor a name


async def schedule_async() -> None:
    greeting = Greeting(message="hello")
    await aconfigure_worker_pool(2)
    once = await aschedule_one_time_job(greeting, "2031-01-01T00:00:00Z", work_pool="nightly")
    assert_type(once, JobId)
    often = await aschedule_job_recur_by_frequency(greeting, 2, end_time=datetime(2031, 1, 1, tzinfo=UTC))
    assert_type(often, JobId)
    await apause_job(often)
    await aresume_job(often)
    await apause_all_jobs()
    await aresume_all_jobs()
    await aunschedule_job(often)
    assert_type(await aget_running_jobs(), list[JobId])
