"""What a node does with the runs that another one left: each once, and never to what is its own."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound

from taskadapter import progress, takeover
from taskadapter.coordination.jobs import RunInFlight
from taskadapter.coordination.messages import Token
from taskadapter.takeover import Takeover

FORMER, HELD = Token("group", "node-1", 7), Token("group", "node-2", 8)


class Api:
    """As much of Prefect's API as a takeover uses, and a list of what it was told."""

    def __init__(self, *runs: FlowRun) -> None:
        self.runs = {run.id: run for run in runs}
        self.told: list[tuple[UUID, str]] = []

    async def read_flow_runs(self, **_: object) -> list[FlowRun]:
        return [run for run in self.runs.values() if run.state and run.state.type in takeover.CLAIMED]

    async def read_flow_run(self, run_id: UUID) -> FlowRun:
        if run_id not in self.runs:
            raise ObjectNotFound(ValueError("gone"))
        return self.runs[run_id]

    async def update_flow_run(self, *_: object, **__: object) -> None: ...

    async def set_flow_run_state(self, run_id: UUID, state: State, *, force: bool) -> None:
        assert force
        self.told.append((run_id, state.name or ""))
        self.runs[run_id] = flow_run(state.type, run_id)


class Policies:
    """Says of every job whether its interrupted runs are run again."""

    def __init__(self, reruns: bool) -> None:
        self._reruns = reruns

    async def reruns(self, _: FlowRun) -> bool:
        return self._reruns


class Database:
    """Runs that have been started: by a former holder still going on, or ended."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *open_: UUID, ended: dict[UUID, str] | None = None
    ) -> None:
        self.open = {str(run_id) for run_id in open_}
        self.started = dict.fromkeys(self.open) | {str(i): name for i, name in (ended or {}).items()}
        monkeypatch.setattr(progress, "left_behind", self.left_behind)
        monkeypatch.setattr(progress, "outcomes", lambda *_: self.started)
        monkeypatch.setattr(progress, "end_flight", lambda _, run_id: self.open.discard(run_id))

    def left_behind(self, *_: object) -> list[RunInFlight]:
        return [RunInFlight(run_id, None, FORMER) for run_id in sorted(self.open)]


def flow_run(state: StateType, run_id: UUID | None = None) -> FlowRun:
    state_id = uuid4()
    return FlowRun(
        id=run_id or uuid4(),
        name="run",
        flow_id=uuid4(),
        state=State(id=state_id, type=state),
        state_id=state_id,
    )


def of(api: Api, *, reruns: bool = False) -> Takeover:
    log = logging.getLogger("test")
    parts: Any = (api, Policies(reruns), "pool", "sqlite://", log)
    return Takeover(*parts)


@pytest.mark.parametrize("state", [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
def test_what_was_only_claimed_is_due_again(monkeypatch: pytest.MonkeyPatch, state: StateType) -> None:
    """A run that no body was started for is scheduled again."""
    claimed = flow_run(state)
    Database(monkeypatch)

    asyncio.run(of(api := Api(claimed)).clean_up(HELD))

    assert api.told == [(claimed.id, "Scheduled")]


def test_what_was_executing_is_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose body had been started is Crashed, and not in flight any more."""
    running = flow_run(StateType.RUNNING)
    database = Database(monkeypatch, running.id)

    asyncio.run(of(api := Api(running)).clean_up(HELD))

    assert (api.told, database.open) == ([(running.id, "Crashed")], set())


def test_what_waits_for_a_retry_is_crashed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run between two attempts is Scheduled in Prefect's terms, and was executing all the same."""
    waiting = flow_run(StateType.SCHEDULED)
    Database(monkeypatch, waiting.id)

    asyncio.run(of(api := Api(waiting)).clean_up(HELD))

    assert api.told == [(waiting.id, "Crashed")]


def test_a_job_may_ask_for_a_rerun(monkeypatch: pytest.MonkeyPatch) -> None:
    """With on_takeover="rerun" an interrupted run is due again, and stays in flight until it begins."""
    running = flow_run(StateType.RUNNING)
    database = Database(monkeypatch, running.id)

    asyncio.run(of(api := Api(running), reruns=True).clean_up(HELD))

    assert (api.told, database.open) == ([(running.id, "Scheduled")], {str(running.id)})


@pytest.mark.parametrize("is_there", [True, False])
def test_what_ended_after_all_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """A run that is final, or was deleted, is only taken off the runs in flight."""
    completed = flow_run(StateType.COMPLETED)
    database = Database(monkeypatch, completed.id)

    asyncio.run(of(api := Api(*[completed] * is_there)).clean_up(HELD))

    assert (api.told, database.open) == ([], set())


@pytest.mark.parametrize("outcome", ["Completed", "Failed", "Crashed"])
def test_what_ended_unreported_is_reported(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    """A run whose node died between the end of the body and the report has its state, and is not due."""
    running = flow_run(StateType.RUNNING)
    Database(monkeypatch, ended={running.id: outcome})

    asyncio.run(of(api := Api(running)).clean_up(HELD))

    assert api.told == [(running.id, outcome)]


def test_cleaning_up_twice_does_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held up half-way may be done again."""
    running, claimed = flow_run(StateType.RUNNING), flow_run(StateType.PENDING)
    Database(monkeypatch, running.id)
    cleaner = of(api := Api(running, claimed))

    asyncio.run(cleaner.clean_up(HELD))
    told = list(api.told)
    asyncio.run(cleaner.clean_up(HELD))

    assert api.told == told


def test_a_sweep_takes_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is in the same state at two sweeps, and in nobody's hand, is due again."""
    stuck = flow_run(StateType.PENDING)
    Database(monkeypatch)
    cleaner = of(api := Api(stuck))

    asyncio.run(cleaner.sweep(HELD, frozenset))
    assert api.told == []

    asyncio.run(cleaner.sweep(HELD, frozenset))
    assert api.told == [(stuck.id, "Scheduled")]


def test_a_sweep_leaves_what_is_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's own runs are not swept, however long they take."""
    mine = flow_run(StateType.RUNNING)
    Database(monkeypatch)
    cleaner = of(api := Api(mine))

    for _ in range(3):
        asyncio.run(cleaner.sweep(HELD, lambda: frozenset([mine.id])))

    assert api.told == []


def test_a_sweep_leaves_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was in another state at the sweep before is somebody's."""
    run = flow_run(StateType.PENDING)
    Database(monkeypatch)
    cleaner = of(api := Api(run))

    asyncio.run(cleaner.sweep(HELD, frozenset))
    api.runs[run.id] = flow_run(StateType.RUNNING, run.id)
    asyncio.run(cleaner.sweep(HELD, frozenset))

    assert api.told == []
