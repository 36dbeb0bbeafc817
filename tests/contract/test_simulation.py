"""Two agents, one ledger, and everything that can go wrong between them and Prefect, in one thread.

The ledger and the decisions are real; Prefect, the agents and their processes are played. At each step
one of them does one thing, chosen by chance, which may fail, or be done without its answer arriving. When
all has been put right again every tick has run, once, and Prefect shows what each came to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from sqlalchemy import delete, insert, update

from taskadapter.agent import runs
from taskadapter.agent.runs import Todo, decide
from taskadapter.coordination import ledger, progress, schema
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.executions import (
    ABANDONED,
    Begun,
    End,
    Entry,
    Execution,
    Limits,
    Owner,
    Paused,
    Taken,
    asked_key,
    tick_key,
)
from taskadapter.coordination.messages import Token
from taskadapter.errors import TokenLostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

JOB = "job"
TICKS = 6
LIMITS = Limits("every-second")
SCHEDULED, PENDING, RUNNING = StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING


class ApiError(Exception):
    """The API has not answered; what was asked may have been done."""


@dataclass
class Run:
    """A flow run, as Prefect has it."""

    id: str
    tick: int
    state: StateType = SCHEDULED
    run_count: int = 0
    by_hand: bool = False

    def execution(self, run_count: int) -> Execution:
        if self.by_hand:
            return Execution(asked_key(self.id, run_count), self.id, JOB)
        due = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.tick)
        return Execution(tick_key(JOB, due), self.id, JOB, due)


@dataclass
class Process:
    """The process of a run: how far it has come, and what it said last."""

    run: Run
    execution: Execution
    owner: Owner
    step: str = "claim"
    said: str = ""
    refused: Any = None


@dataclass
class Agent:
    """An agent: its processes, and whether it has the group's token."""

    name: str
    incarnation: str
    token: Token | None = None
    processes: list[Process] = field(default_factory=list)
    suspects: dict[str, StateType] = field(default_factory=dict)

    @property
    def owner(self) -> Owner:
        return Owner(self.name, self.incarnation, self.token)


class World:
    """Everything, and the chance that rules it.

    Args:
        engine: the coordination database.
        seed: of the chance.
        grouped: whether the job has a group, whose token one agent holds at a time.
        reruns: whether an interrupted execution is made again.
    """

    def __init__(self, engine: Engine, seed: int, *, grouped: bool, reruns: bool) -> None:
        self.engine, self.chance = engine, random.Random(seed)
        self.grouped, self.reruns = grouped, reruns
        self.runs: dict[str, Run] = {}
        self.begun: list[str] = []
        self.interrupted: set[str] = set()
        self.unwanted: set[str] = set()
        self.unseen: set[str] = set()
        self.faults = True
        self.paused = False
        self._numbers = iter(range(10**6))
        self.agents = [self._agent(name) for name in ("node-1", "node-2")]
        if grouped:
            with transaction(engine) as connection:
                connection.execute(insert(schema.token_holder).values(group_id="group", task_id="", term=0))
            self.take_over(self.agents[0])

    def _agent(self, name: str) -> Agent:
        return Agent(name, f"incarnation-{next(self._numbers)}")

    # --- Prefect ----------------------------------------------------------------------------------

    def call(self, work: Callable[[], Any]) -> Any:
        """Ask the API: it may not be reached, or not answer."""
        luck = self.chance.random() if self.faults else 1.0
        if luck < 0.07:
            raise ApiError
        answer = work()
        if luck < 0.14:
            raise ApiError
        return answer

    def plan(self) -> None:
        """Make the runs of ticks that have none: the scheduler, or a timetable."""
        with transaction(self.engine) as connection:
            for tick in range(TICKS):
                key = Run("", tick).execution(0).key
                has_run = any(run.tick == tick and not run.by_hand for run in self.runs.values())
                if not has_run and not ledger.entries(connection, [key]):
                    self._make(tick)

    def renew(self) -> None:
        """Make due again what shows as crashed and has not begun: a timetable finds it by the gap."""
        held = {process.run.id for agent in self.agents for process in agent.processes}
        for run in self.runs.values():
            if run.state is StateType.CRASHED and not run.by_hand and run.id not in held:
                entry = self._entry(run.execution(0))
                if entry is None or entry.outcome == ABANDONED:
                    run.state = SCHEDULED

    def _make(self, tick: int) -> None:
        run = Run(f"run-{next(self._numbers)}", tick)
        self.runs[run.id] = run

    def claim(self, run: Run) -> bool:
        """Prefect lets a run be claimed that is due, and one that has ended."""
        if run.id not in self.runs or run.state in {PENDING, RUNNING, StateType.CANCELLING}:
            return False
        run.state = PENDING
        return True

    def set(self, run: Run, state: StateType) -> None:
        if state is RUNNING:
            run.run_count += 1
        run.state = state

    # --- a process --------------------------------------------------------------------------------

    def advance(self, agent: Agent, process: Process) -> None:
        """Let a process do its next step; at its end the agent settles what it has left."""
        try:
            getattr(self, f"_{process.step}")(agent, process)
        except ApiError:
            # The agent does not know whether it has the run: a sweep, or the process, will see.
            process.step = "over"
        if process.step == "over":
            agent.processes.remove(process)

    def _claim(self, _: Agent, process: Process) -> None:
        process.step = "enter" if self.call(lambda: self.claim(process.run)) else "over"

    def _enter(self, _: Agent, process: Process) -> None:
        """The engine's step to Running; where that fails it tells of a crash, if it can."""
        process.step = "begin"
        try:
            if process.run.state is not PENDING:
                process.step = "settle"
            else:
                self.call(lambda: self.set(process.run, RUNNING))
        except ApiError:
            process.step = "settle"
            if self.chance.random() < 0.5:
                self.set(process.run, StateType.CRASHED)

    def _begin(self, _: Agent, process: Process) -> None:
        try:
            with transaction(self.engine) as connection:
                process.refused = ledger.begin(connection, process.execution, process.owner, LIMITS)
        except TokenLostError:
            process.step = "over"
            return
        process.step = "settle"
        if isinstance(process.refused, Begun):
            self.begun.append(process.execution.key)
            process.step = "body"

    def _body(self, _: Agent, process: Process) -> None:
        outcome = self.chance.choice(["Completed", "Failed"])
        try:
            with transaction(self.engine) as connection:
                ledger.settle(connection, process.execution, process.owner, End(outcome), None)
        except TokenLostError:
            self.interrupted.add(process.execution.key)
            process.step = "over"
            return
        process.step, process.said = "tell", outcome

    def _tell(self, _: Agent, process: Process) -> None:
        process.step = "over"
        try:
            self.call(lambda: self.set(process.run, StateType(process.said.upper())))
        except ApiError:
            process.step = "settle"
            if process.run.state is RUNNING and self.chance.random() < 0.5:
                # The engine takes that for the body's failure, or its own crash.
                self.set(process.run, self.chance.choice([StateType.FAILED, StateType.CRASHED]))

    def _settle(self, agent: Agent, process: Process) -> None:
        """What an agent does about a process that has ended without telling."""
        run = process.run
        entry = self._entry(process.execution)
        known = run.state if run.id in self.runs else None
        mine = entry is None or entry.incarnation == agent.incarnation
        lost = agent.token != process.owner.token
        todo = decide(entry, known, ended_here=True, lives=not mine or lost)
        if not (lost and known in {PENDING, RUNNING}):  # else it is the next holder's
            self._do(todo, run, process.execution.key, entry)
        process.step = "over"

    # --- what agents do ---------------------------------------------------------------------------

    def _entry(self, execution: Execution) -> Entry | None:
        with transaction(self.engine) as connection:
            found = ledger.entries(connection, [execution.key])
        return found[0] if found else None

    def _do(self, todo: Todo, run: Run, key: str, entry: Entry | None) -> None:
        """Carry out a decision: the ledger first, then Prefect, which is told until it knows."""
        known = run.state if run.id in self.runs else None
        outcome = {Todo.CRASH: "Crashed", Todo.AGAIN: ABANDONED, Todo.ENTER: runs.outcome_of(known)}
        if todo in outcome:
            assert entry is not None
            if todo in {Todo.CRASH, Todo.AGAIN}:
                self.interrupted.add(key)
            with transaction(self.engine) as connection:
                ledger.end_as_found(connection, entry, outcome[todo])
        match todo:
            case Todo.PUT_BACK | Todo.AGAIN:
                self.set(run, SCHEDULED)
            case Todo.CRASH:
                self.set(run, StateType.CRASHED)
            case Todo.TELL:
                assert entry is not None
                self.set(run, runs.state_of(entry).type)

    def start(self, agent: Agent) -> None:
        """Take a run that is due, as it was found a while ago: another may have run it since."""
        mine = {process.run.id for process in agent.processes}
        free = [run for run in self.runs.values() if run.id not in mine]
        is_stale = self.faults and self.chance.random() < 0.1
        found = free if is_stale else [run for run in free if run.state is SCHEDULED]
        if found and (not self.grouped or agent.token):
            run = self.chance.choice(found)
            stale = run.run_count - (self.faults and run.by_hand and self.chance.random() < 0.1)
            agent.processes.append(Process(run, run.execution(max(0, stale)), agent.owner))

    def sweep(self, agent: Agent) -> None:
        """Settle what nobody has in hand."""
        if self.grouped and agent.token is None:
            return
        with transaction(self.engine) as connection:
            left = (
                ledger.interrupted(connection, [agent.token])
                if agent.token
                else [entry for entry in self._open(connection) if not self._lives(entry)]
            )
        for entry in left:
            run = self.runs.get(entry.flow_run_id)
            known = None if run is None else run.state
            todo = decide(entry, known, reruns=self.reruns)
            self._do(todo, run or Run(entry.flow_run_id, -1), entry.key, entry)
        mine = {process.run.id for process in agent.processes}
        claimed = [run for run in self.runs.values() if run.state in {PENDING, RUNNING}]
        idle = {run.id: run for run in claimed if run.id not in mine}
        for run in idle.values():
            if agent.suspects.get(run.id) is run.state:
                count = run.run_count - (run.state is RUNNING)
                entry_or_none = self._entry(run.execution(count))
                todo = decide(entry_or_none, run.state, lives=True)
                self._do(todo, run, run.execution(count).key, entry_or_none)
        agent.suspects = {run.id: run.state for run in idle.values()}

    def _open(self, connection: Any) -> list[Entry]:
        return ledger._found(connection, schema.ledger.c.ended.is_(None))

    def _lives(self, entry: Entry) -> bool:
        return entry.incarnation in {agent.incarnation for agent in self.agents}

    # --- what happens -----------------------------------------------------------------------------

    def take_over(self, agent: Agent) -> None:
        """Give the token to an agent; what the former holder runs is ended, or soon finds out."""
        with transaction(self.engine) as connection:
            row = schema.token_holder
            connection.execute(update(row).values(task_id=agent.name, term=row.c.term + 1))
            term = connection.execute(row.select()).one().term
        for other in self.agents:
            if other.token is not None:
                other.token = None
                for process in [*other.processes]:
                    if self.chance.random() < 0.7:  # the others are frozen, and wake up later
                        self._end(other, process)
        agent.token = Token("group", agent.name, term)

    def _kill(self, agent: Agent, process: Process) -> None:
        agent.processes.remove(process)
        if process.step in {"body", "tell"}:
            self.interrupted.add(process.execution.key)

    def _end(self, agent: Agent, process: Process) -> None:
        """Kill a process; its agent sees that."""
        self._kill(agent, process)
        if process.step != "claim":
            self._settle(agent, process)

    def crash(self, agent: Agent) -> None:
        """Kill a node with all that it runs; another incarnation takes its place."""
        for process in [*agent.processes]:
            self._kill(agent, process)
            if process.step == "settle":
                # The engine may have told of a crash of its own, and nobody is left who knows better.
                self.unseen.add(process.run.id)
        fresh = self._agent(agent.name)
        self.agents[self.agents.index(agent)] = fresh
        if self.grouped and agent.token is not None:
            self.take_over(self.chance.choice(self.agents))

    def happen(self) -> None:
        """Let one thing happen to the job, its runs, or a node."""
        agent = self.chance.choice(self.agents)
        luck = self.chance.random()
        if luck < 0.2 and agent.processes:
            self._end(agent, self.chance.choice(agent.processes))
        elif luck < 0.3:
            self.crash(agent)
        elif luck < 0.45 and self.runs:
            gone = self.runs.pop(self.chance.choice(sorted(self.runs)))
            self.unwanted.add(gone.execution(0).key)
        elif luck < 0.6:
            self.paused = not self.paused
            with transaction(self.engine) as connection:
                progress.pause(connection, JOB, paused=self.paused)
        elif luck < 0.7 and self.grouped:
            self.take_over(agent)
        elif luck < 0.8:
            ended = [run for run in self.runs.values() if run.state in TERMINAL_STATES]
            if ended:
                run = self.chance.choice(ended)
                if not any(process.run is run for one in self.agents for process in one.processes):
                    run.by_hand, run.state = True, SCHEDULED

    def play(self, steps: int) -> None:
        """Let chance rule for so many steps, then put all right, and let everything come to its end."""
        for _ in range(steps):
            self.plan()
            agent = self.chance.choice(self.agents)
            luck = self.chance.random()
            if luck < 0.5 and agent.processes:
                self.advance(agent, self.chance.choice(agent.processes))
            elif luck < 0.8:
                self.start(agent)
            elif luck < 0.9:
                self.sweep(agent)
            else:
                self.happen()
        self.faults = self.paused = False
        with transaction(self.engine) as connection:
            progress.pause(connection, JOB, paused=False)
        for _ in range(60):
            self.plan()
            self.renew()
            for agent in self.agents:
                self.start(agent)
                while agent.processes:
                    self.advance(agent, agent.processes[0])
                self.sweep(agent)


@pytest.fixture
def world(engine: Engine) -> Callable[..., World]:
    def make(seed: int, *, grouped: bool = False, reruns: bool = False) -> World:
        with transaction(engine) as connection:
            for table in schema.metadata.sorted_tables:
                connection.execute(delete(table))
        return World(engine, seed, grouped=grouped, reruns=reruns)

    return make


def judge(world: World) -> None:
    """Every tick has run, once unless it was interrupted and is made again, and Prefect shows it."""
    keys = [Run("", tick).execution(0).key for tick in range(TICKS)]
    for key in {*keys, *world.begun}:
        times = world.begun.count(key)
        assert (
            times == 1
            or (world.reruns and key in world.interrupted and times > 0)
            or (times == 0 and key not in keys)
        ), (key, times)
    with transaction(world.engine) as connection:
        outcomes = {entry.key: entry.outcome for entry in ledger.entries(connection, [*world.begun])}
    assert None not in outcomes.values(), outcomes
    # Somebody who deletes a run that was to be made again does not want it.
    again = {key for key in keys if outcomes[key] == ABANDONED}
    assert not again - world.unwanted, outcomes
    for run in world.runs.values():
        assert run.state in TERMINAL_STATES, run
        if not run.by_hand:
            key = run.execution(0).key
            is_known = run.id not in world.unseen or run.state is not StateType.CRASHED
            right = runs.outcome_of(run.state) == outcomes[key] or key in world.interrupted
            assert right or not is_known, run


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("reruns", [False, True], ids=["crashes", "reruns"])
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 100), marks=pytest.mark.slow)], ids=str)
def test_every_tick_runs_once(
    world: Callable[..., World], seeds: range, grouped: bool, reruns: bool
) -> None:
    """Whatever happens, in whatever order."""
    for seed in seeds:
        playing = world(seed, grouped=grouped, reruns=reruns)
        playing.play(250)
        judge(playing)


# --- each rule is needed --------------------------------------------------------------------------


def without_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body begins whenever its run may be claimed."""
    begin = ledger.begin

    def always(connection: Any, execution: Execution, owner: Owner, limits: Limits) -> Any:
        answer = begin(connection, execution, owner, limits)
        return Begun(1) if isinstance(answer, Taken) else answer

    monkeypatch.setattr(ledger, "begin", always)


def without_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick that is refused because its job is paused is taken for one that has run."""
    begin = ledger.begin

    def never(connection: Any, execution: Execution, owner: Owner, limits: Limits) -> Any:
        answer = begin(connection, execution, owner, limits)
        if isinstance(answer, Paused):
            ledger.skip(connection, execution, owner, "paused")
        return answer

    monkeypatch.setattr(ledger, "begin", never)


def without_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Prefect shows decides: a run that it takes for ended has run."""

    def by_state(entry: Entry | None, known: StateType | None, **options: Any) -> Todo:
        if entry is None and known is StateType.CRASHED:
            return Todo.LEAVE
        return runs.decide(entry, known, **options)

    monkeypatch.setattr("tests.contract.test_simulation.decide", by_state)
    monkeypatch.setattr(World, "renew", lambda _: None)


def without_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine has told last stays."""

    def never(entry: Entry | None, known: StateType | None, **options: Any) -> Todo:
        todo = runs.decide(entry, known, **options)
        return Todo.LEAVE if todo is Todo.TELL else todo

    monkeypatch.setattr("tests.contract.test_simulation.decide", never)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "without", [without_the_refusal, without_the_pause, without_the_entry, without_telling]
)
def test_the_simulation_sees_what_is_missing(
    world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    without: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """With a rule taken out, as it was once, some course of events loses a tick, or runs one twice."""
    without(monkeypatch)
    for seed in range(60):
        playing = world(seed)
        playing.play(250)
        try:
            judge(playing)
        except (AssertionError, KeyError):
            return
    pytest.fail("nothing was seen")
