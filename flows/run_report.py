"""Report how the runs of the last hour went, from Prefect's own history, as a table in its UI.

Runs, failures, retries and lateness of each deployment; the table is the artifact `run-report`.
"""

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from statistics import quantiles

from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType

from taskadapter import Listener, TriggerConfiguration

PAGE = 200  # what the API returns at most
ENDED = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED]

report_listener = Listener(trigger=TriggerConfiguration(interval=10))


@report_listener.service("run-report")
async def run_report() -> None:
    """A table of the last hour's runs: how many, how late, how many failed or were retried."""
    now = datetime.now(UTC)
    recent = FlowRunFilter(
        expected_start_time=FlowRunFilterExpectedStartTime(after_=now - timedelta(hours=1), before_=now),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ENDED)),
    )
    by_deployment: dict[str, list[FlowRun]] = defaultdict(list)
    async with get_client() as client:
        names = {deployment.id: deployment.name for deployment in await client.read_deployments()}
        offset = 0
        while page := await client.read_flow_runs(flow_run_filter=recent, limit=PAGE, offset=offset):
            offset += PAGE
            for run in page:
                if run.deployment_id in names:
                    by_deployment[names[run.deployment_id]].append(run)
    table = [_row(name, runs) for name, runs in sorted(by_deployment.items())]
    await acreate_table_artifact(table, key="run-report", description="Runs of the last hour.")
    print(f"Reported {sum(map(len, by_deployment.values()))} runs of {len(table)} deployments.")


def _row(name: str, runs: list[FlowRun]) -> dict[str, str | int]:
    p50, p95 = _lateness(runs)
    return {
        "deployment": name,
        "runs": len(runs),
        "failed": sum(run.state_type is not StateType.COMPLETED for run in runs),
        "retries": sum(max(0, run.run_count - 1) for run in runs),
        "late p50": f"{p50:.3f} s",
        "late p95": f"{p95:.3f} s",
    }


def _lateness(runs: list[FlowRun]) -> tuple[float, float]:
    """Seconds from the scheduled to the actual start, at the 50th and the 95th percentile."""
    late = [
        (run.start_time - run.expected_start_time).total_seconds()
        for run in runs
        if run.start_time and run.expected_start_time
    ] or [0.0]
    cuts = quantiles(late, n=100, method="inclusive") if len(late) > 1 else late * 99
    return cuts[49], cuts[94]
