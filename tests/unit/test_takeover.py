"""What a node does with the runs that another one left: each once, and never to what is its own."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus, StateAcceptDetails
from prefect.exceptions import ObjectNotFound

from taskadapter.agent import takeover
from taskadapter.agent.jobs import Deployments
from taskadapter.agent.takeover import Takeover
from taskadapter.coordination import store
from taskadapter.coordination.executions import ABANDONED, Entry, asked_key
from taskadapter.coordination.messages import Token

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

    async def read_flow_run_states(self, _: object) -> list[State]:
        return []

    async def update_flow_run(self, *_: object, **__: object) -> None: ...

    async def set_flow_run_state(
        self, run_id: UUID, state: State, *, force: bool
    ) -> OrchestrationResult[Any]:
        assert force
        self.told.append((run_id, state.type.value.capitalize()))
        self.runs[run_id] = flow_run(state.type, run_id)
        details = StateAcceptDetails()
        return OrchestrationResult(state=state, status=SetStateStatus.ACCEPT, details=details)


class Policies(Deployments):
    """Says of every job whether its interrupted runs are run again."""

    def __init__(self, api: Any, reruns: bool) -> None:
        super().__init__(api)
        self._reruns = reruns

    async def reruns(self, _: FlowRun) -> bool:
        return self._reruns


class Ledger:
    """Executions that have begun: by a former holder and going on, or ended."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *open_: UUID, ended: dict[UUID, str] | None = None
    ) -> None:
        outcomes = dict.fromkeys(open_) | (ended or {})
        self.entries = {asked_key(str(i), 0): entry(i, outcome) for i, outcome in outcomes.items()}
        monkeypatch.setattr(store, "interrupted", lambda *_: list(self.open))
        monkeypatch.setattr(store, "orphaned", lambda *_: list(self.open))
        monkeypatch.setattr(store, "entries", lambda *_: list(self.entries.values()))
        monkeypatch.setattr(store, "end_as_found", self.end)

    @property
    def open(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.outcome is None]

    @property
    def outcomes(self) -> list[str | None]:
        return [entry.outcome for entry in self.entries.values()]

    def end(self, _: object, found: Entry, outcome: str) -> None:
        self.entries[found.key] = replace(self.entries[found.key], outcome=outcome)


def entry(run_id: UUID, outcome: str | None) -> Entry:
    return Entry(
        key=asked_key(str(run_id), 0),
        flow_run_id=str(run_id),
        job_id=None,
        due=None,
        number=None,
        group_id=FORMER.group_id,
        task_id=FORMER.task_id,
        term=FORMER.term,
        incarnation="incarnation-1",
        outcome=outcome,
    )


def flow_run(state: StateType, run_id: UUID | None = None) -> FlowRun:
    state_id = uuid4()
    return FlowRun(
        id=run_id or uuid4(),
        name="run",
        flow_id=uuid4(),
        state=State(id=state_id, type=state),
        state_type=state,
        expected_start_time=datetime(2030, 1, 1, tzinfo=UTC),
        state_id=state_id,
    )


def of(api: Api, *, reruns: bool = False) -> Takeover:
    log = logging.getLogger("test")
    parts: Any = (api, Policies(api, reruns), "pool", "sqlite://", log)
    return Takeover(*parts)


@pytest.mark.parametrize("state", [StateType.PENDING, StateType.RUNNING])
def test_what_was_only_claimed_is_due_again(monkeypatch: pytest.MonkeyPatch, state: StateType) -> None:
    """A run that no body was started for is scheduled again."""
    claimed = flow_run(state)
    Ledger(monkeypatch)

    asyncio.run(of(api := Api(claimed)).clean_up([HELD]))

    assert api.told == [(claimed.id, "Scheduled")]


def test_what_was_only_claimed_and_is_cancelled_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who has cancelled a run gets no other of it."""
    cancelling = flow_run(StateType.CANCELLING)
    Ledger(monkeypatch)

    asyncio.run(of(api := Api(cancelling)).clean_up([HELD]))

    assert api.told == [(cancelling.id, "Cancelled")]


def test_what_was_executing_is_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose body had been started is Crashed, and entered as such."""
    running = flow_run(StateType.RUNNING)
    ledger = Ledger(monkeypatch, running.id)

    asyncio.run(of(api := Api(running)).clean_up([HELD]))

    assert (api.told, ledger.outcomes) == ([(running.id, "Crashed")], ["Crashed"])


def test_what_waits_for_a_retry_is_crashed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run between two attempts is Scheduled in Prefect's terms, and was executing all the same."""
    waiting = flow_run(StateType.SCHEDULED)
    Ledger(monkeypatch, waiting.id)

    asyncio.run(of(api := Api(waiting)).clean_up([HELD]))

    assert api.told == [(waiting.id, "Crashed")]


def test_a_job_may_ask_for_a_rerun(monkeypatch: pytest.MonkeyPatch) -> None:
    """With on_takeover="rerun" an interrupted run is due again, and may begin once more."""
    running = flow_run(StateType.RUNNING)
    ledger = Ledger(monkeypatch, running.id)

    asyncio.run(of(api := Api(running), reruns=True).clean_up([HELD]))

    assert (api.told, ledger.outcomes) == ([(running.id, "Scheduled")], [ABANDONED])


@pytest.mark.parametrize("is_there", [True, False])
def test_what_ended_after_all_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """A run that is final, or was deleted, is only entered: as what Prefect has of it."""
    completed = flow_run(StateType.COMPLETED)
    ledger = Ledger(monkeypatch, completed.id)

    asyncio.run(of(api := Api(*[completed] * is_there)).clean_up([HELD]))

    assert (api.told, ledger.outcomes) == ([], ["Completed" if is_there else "Crashed"])


@pytest.mark.parametrize("outcome", ["Completed", "Failed", "Crashed"])
def test_what_ended_unreported_is_reported(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    """A run whose node died between the end of the body and the report has its state, and is not due."""
    running = flow_run(StateType.RUNNING)
    Ledger(monkeypatch, ended={running.id: outcome})

    asyncio.run(of(api := Api(running)).clean_up([HELD]))

    assert api.told == [(running.id, outcome)]


def test_cleaning_up_twice_does_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was held up half-way may be done again."""
    running, claimed = flow_run(StateType.RUNNING), flow_run(StateType.PENDING)
    Ledger(monkeypatch, running.id)
    cleaner = of(api := Api(running, claimed))

    asyncio.run(cleaner.clean_up([HELD]))
    told = list(api.told)
    asyncio.run(cleaner.clean_up([HELD]))

    assert api.told == told


def test_what_a_node_that_is_gone_was_executing_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is Crashed too, by whoever sees it first."""
    running = flow_run(StateType.RUNNING)
    ledger = Ledger(monkeypatch, running.id)

    asyncio.run(of(api := Api(running)).end_orphans(30))

    assert (api.told, ledger.outcomes) == ([(running.id, "Crashed")], ["Crashed"])


def test_a_sweep_takes_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is in the same state at two sweeps, and in nobody's hand, is due again."""
    stuck = flow_run(StateType.PENDING)
    Ledger(monkeypatch)
    cleaner = of(api := Api(stuck))

    asyncio.run(cleaner.sweep(["group"], frozenset))
    assert api.told == []

    asyncio.run(cleaner.sweep(["group"], frozenset))
    assert api.told == [(stuck.id, "Scheduled")]


def test_a_sweep_leaves_what_is_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's own runs are not swept, however long they take."""
    mine = flow_run(StateType.RUNNING)
    Ledger(monkeypatch)
    cleaner = of(api := Api(mine))

    for _ in range(3):
        asyncio.run(cleaner.sweep(["group"], lambda: frozenset([mine.id])))

    assert api.told == []


def test_a_sweep_leaves_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was in another state at the sweep before is somebody's."""
    run = flow_run(StateType.PENDING)
    Ledger(monkeypatch)
    cleaner = of(api := Api(run))

    asyncio.run(cleaner.sweep(["group"], frozenset))
    api.runs[run.id] = flow_run(StateType.RUNNING, run.id)
    asyncio.run(cleaner.sweep(["group"], frozenset))

    assert api.told == []
