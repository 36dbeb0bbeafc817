"""What a node does with the runs that another one left behind, before it starts any of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable
from logging import Logger, LoggerAdapter
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from taskadapter.agent import runs
from taskadapter.agent.jobs import Deployments
from taskadapter.agent.runs import Todo
from taskadapter.agent.telling import Teller
from taskadapter.coordination import store
from taskadapter.coordination.executions import ABANDONED, Entry
from taskadapter.coordination.messages import Token
from taskadapter.errors import CoordinationError, DeclarationError
from taskadapter.execution.assignment import execution_of
from taskadapter.prefect_api.client import API_FAULTS, side_by_side
from taskadapter.prefect_api.ticks import all_runs
from taskadapter.rules.ticks import is_tick

CLAIMED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


class Takeover:
    """Puts a queue's house in order: at the beginning of a term, and from time to time in it.

    Args:
        client: connected to the API.
        deployments: reads the policies of the jobs.
        pool_name: the work pool's name.
        database_url: the coordination database.
        log: the agent's.
    """

    def __init__(
        self,
        client: PrefectClient,
        deployments: Deployments,
        pool_name: str,
        database_url: str,
        log: Logger | LoggerAdapter[Any],
    ) -> None:
        self._client = client
        self._deployments = deployments
        # Its next try finds out anew what is to be done.
        self._teller = Teller(client, log, patient=False)
        self._pool_name = pool_name
        self.database_url = database_url
        self._log = log
        self._suspects: dict[UUID, UUID | None] = {}
        self._troubles: set[str] = set()

    async def clean_up(self, tokens: Collection[Token]) -> None:
        """End what earlier holders were executing, and make due again what they had only claimed.

        It may be repeated: each step is done once.

        Raises:
            CoordinationError: the database failed.
            HTTPError: the API failed.
        """
        await self._end_all(await asyncio.to_thread(store.interrupted, self.database_url, tokens))
        await self._settle(await self._claimed([token.group_id for token in tokens]))

    async def sweep(self, queues: Collection[str], in_hand: Callable[[], frozenset[UUID]]) -> None:
        """Do the same for runs that are nobody's: a former holder's claim came too late to be seen.

        Only a run that was in the same state, and not in hand, at two sweeps in a row is nobody's; and
        where another node has it all the same, the ledger lets one of the two begin.

        Args:
            queues: the groups whose tokens this node holds, and the queue of jobs without one.
            in_hand: returns the runs that this node has claimed.

        Raises:
            CoordinationError: the database failed.
            HTTPError: the API failed.
        """
        busy = in_hand()
        claimed = await self._claimed(queues)
        idle = [run for run in claimed if run.id not in busy | in_hand()]
        await self._settle([run for run in idle if self._suspects.get(run.id) == run.state_id])
        self._suspects = {run.id: run.state_id for run in idle}

    async def end_orphans(self, interval: float) -> None:
        """End what nodes that are gone were executing without a group.

        Args:
            interval: seconds after which a node that does not show that it lives is taken for dead.

        Raises:
            CoordinationError: the database failed.
            HTTPError: the API failed.
        """
        await self._end_all(await asyncio.to_thread(store.orphaned, self.database_url, interval))

    async def _end_all(self, interrupted: Iterable[Entry]) -> None:
        await side_by_side(self._apart(entry.flow_run_id, self._end(entry)) for entry in interrupted)

    async def _end(self, entry: Entry) -> None:
        """Settle one: Prefect first, so that what fails half-way is found again."""
        flow_run = await self._read(entry.flow_run_id)
        known = None if flow_run is None else flow_run.state_type
        reruns = flow_run is not None and await self._reruns(flow_run)
        todo = runs.decide(entry, known, reruns=reruns)
        outcome = ABANDONED if todo is Todo.SUSPEND else runs.outcome_of(known)
        if flow_run is not None and todo in {Todo.AGAIN, Todo.CRASH}:
            outcome = await self._tell(flow_run, entry, todo)
        await asyncio.to_thread(store.end_as_found, self.database_url, entry, outcome)

    async def _tell(self, flow_run: FlowRun, entry: Entry, todo: Todo) -> str:
        """Tell Prefect of an interrupted run, and return what is to be entered."""
        message = f"This run was being executed {entry.where}, which is gone."
        self._log.warning("Run %s: %s", flow_run.name, message)
        if todo is Todo.AGAIN:
            await self._put_back(flow_run, message)
            return ABANDONED
        is_cancelling = flow_run.state_type is StateType.CANCELLING
        state: State[Any] = Cancelled(message=message) if is_cancelling else Crashed(message=message)
        await self._teller.report(flow_run, state, force=True)
        return runs.outcome_of(state.type)

    async def _apart(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Let one run's trouble not keep the others waiting; the API's and the database's are all runs'."""
        try:
            await work
        except (*API_FAULTS, CoordinationError):
            raise
        except Exception:  # noqa: BLE001 - whatever it is, it is told, and is this run's alone
            if what not in self._troubles:
                self._log.exception(
                    "An error in the agent itself about run %s; other runs go on. Please report it.", what
                )
            self._troubles.add(what)

    async def _settle(self, claimed: list[FlowRun]) -> None:
        """Do about runs that nobody has in hand what the ledger says."""
        if not claimed:
            return
        keys = [key for run in claimed for key in _keys(run)]
        ids = [str(run.id) for run in claimed]
        found = await asyncio.to_thread(store.entries, self.database_url, keys, ids)
        await side_by_side(
            self._apart(run.name, self._settle_one(run, _entry_of(run, found))) for run in claimed
        )

    async def _settle_one(self, flow_run: FlowRun, entry: Entry | None) -> None:
        match runs.decide(entry, flow_run.state_type, lives=True):
            case Todo.PUT_BACK:
                self._log.info("Run %s was claimed and has not begun; it is due again.", flow_run.name)
                await self._put_back(flow_run)
            case Todo.CRASH:  # it was being cancelled before it had begun
                cancelled: State[Any] = Cancelled(message="Cancelled before it began.")
                await self._teller.report(flow_run, cancelled, force=True)
            case Todo.TELL if entry is not None:
                await self._teller.tell(flow_run, entry)

    async def _put_back(self, flow_run: FlowRun, message: str | None = None) -> None:
        due = flow_run.expected_start_time or flow_run.created
        assert due is not None  # noqa: S101 - the API has made it
        await self._teller.put_back(flow_run, due, message)

    async def _read(self, flow_run_id: str) -> FlowRun | None:
        try:
            return await self._client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            return None

    async def _reruns(self, flow_run: FlowRun) -> bool:
        """Return whether an interrupted run is to be run again, as far as its deployment still says."""
        try:
            return await self._deployments.reruns(flow_run)
        except (ObjectNotFound, DeclarationError):
            return False

    async def _claimed(self, queues: Collection[str]) -> list[FlowRun]:
        return await all_runs(
            self._client,
            FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=CLAIMED))),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._pool_name])),
            work_queue_filter=WorkQueueFilter(name=WorkQueueFilterName(any_=list(queues))),
        )


def _keys(flow_run: FlowRun) -> set[str]:
    """Return the keys under which an execution of a run may be entered."""
    return {execution_of(flow_run, is_ours=is_ours).key for is_ours in (True, False)}


def _entry_of(flow_run: FlowRun, found: Iterable[Entry]) -> Entry | None:
    """Return the entry of what a claimed run is an execution of."""
    # The releases before the ledger had entries by flow run.
    keys = _keys(flow_run) | {str(flow_run.id)}
    known = [entry for entry in found if entry.key in keys]
    if not known and not is_tick(flow_run) and flow_run.state_type is not StateType.PENDING:
        # The run counts once more by now than when it was claimed.
        known = [entry for entry in found if entry.flow_run_id == str(flow_run.id)]
    return known[-1] if known else None
