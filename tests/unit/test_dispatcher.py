"""What becomes of runs that are not claimed after all, or are put back."""

import asyncio
import signal
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Pending, Running

from taskadapter.agent import dispatcher as dispatcher_module
from taskadapter.agent import runner as runner_module
from taskadapter.agent.dispatcher import Dispatcher
from taskadapter.agent.ends import Ends
from taskadapter.agent.hand import Hand
from taskadapter.agent.hearing import Kind, News
from taskadapter.agent.jobs import Deployments
from taskadapter.agent.links import Outcome
from taskadapter.agent.queue import any_run
from taskadapter.agent.runs import Life, Phase, Signal, give_back
from taskadapter.coordination import store
from taskadapter.coordination.executions import End
from taskadapter.coordination.messages import Token
from taskadapter.declare.triggers import TaskPolicy
from taskadapter.errors import CoordinationError, DeclarationError, TokenLostError
from taskadapter.execution import protocol
from taskadapter.rules.ticks import tick_key
from tests.unit.given import JOB, NOON, SECOND, node, tick, until


def new_dispatcher(
    look_for: Any = lambda _: None, client: Any = None, deployments: Any = None, timetable: Any = None
) -> Any:
    """A dispatcher that has nothing to do."""
    nothing: Any = None
    deployments = deployments or Deployments(nothing)
    mine, hand = node(client), Hand(getattr(deployments, "known", nothing))
    ends = Ends(mine, nothing, nothing)
    return Dispatcher(mine, nothing, nothing, deployments, ends, timetable, hand, nothing, look_for)


def test_that_no_process_becomes_free_is_said_once(caplog):
    """Runs that hang keep the jobs of others waiting, whose own ledgers have nothing of it."""
    dispatcher = new_dispatcher()
    dispatcher._hosts = SimpleNamespace(limit=2)
    dispatcher._may_start = dispatcher._may_follow = lambda _: True
    late = datetime.now(UTC) - NOON
    hanging = [dispatcher._hand.take(tick(JOB, seconds), None) for seconds in (1, 2)]
    waiting = tick(uuid4(), late.total_seconds())
    dispatcher.found([waiting], time.monotonic())

    with caplog.at_level("INFO"):
        for clock in (1.0, 30.0, 32.0, 40.0):
            assert dispatcher._choose(clock)[0] is None
        dispatcher._hand.put_down(hanging[0])
        assert dispatcher._choose(41.0)[0] is waiting
        dispatcher._queue.take(waiting)
        dispatcher._choose(42.0)

    names = ", ".join(f"{run.flow_run.name} (1)" for run in hanging)
    assert caplog.messages == [
        f"No process has become free for 31 s, and what is due waits. What runs: {names}.",
        "Processes are free again.",
    ]


@pytest.mark.parametrize("fault", [httpx.ConnectError("away"), CoordinationError("away")])
def test_a_run_that_could_not_be_claimed_is_looked_for(fault, caplog):
    """It waits for that look, and the next tick of its job, which was known already, behind it."""
    news: list[News] = []
    dispatcher = new_dispatcher(news.append)
    first, second = (dispatcher._hand.take(tick(uuid4(), seconds), None) for seconds in (1, 2))
    dispatcher.found([later := tick(first.flow_run.deployment_id, 3)], time.monotonic())

    async def decide(_):
        raise fault

    dispatcher._decide = decide
    for run in (first, second):
        asyncio.run(dispatcher._handle(run))

    assert news == [News(Kind.WAITS, run.flow_run.id) for run in (first, second)]
    assert len(dispatcher._hand) == 0
    assert dispatcher._queue.first(any_run, 0.0) is None
    dispatcher.found([later, first.flow_run], time.monotonic())
    assert dispatcher._queue.first(any_run, 0.0) is first.flow_run
    assert [record.levelname for record in caplog.records] == ["WARNING"], "one line is enough"


def test_a_run_that_is_put_back_has_its_successors_given_back():
    """They are in hand already, and would begin before it: it waits in the queue again."""
    dispatcher = new_dispatcher()
    job_id = uuid4()
    runs = [dispatcher._hand.take(tick(job_id, seconds), None) for seconds in (1, 2, 3)]
    by_hand = dispatcher._hand.take(tick(job_id, 2, planned=False), None)
    runs[2].life = Life(Phase.BEGUN)

    async def decide(_):
        raise httpx.ConnectError("away")

    dispatcher._decide = decide
    asyncio.run(dispatcher._handle(runs[0]))

    assert [run.life.deferred for run in (*runs, by_hand)] == [False, True, False, False]


def test_how_long_the_oldest_tick_has_been_due():
    """Of those that wait here or in their process, for room or the database; not of a paused job."""
    dispatcher: Any = new_dispatcher()
    paused, waiting, by_hand = tick(uuid4(), 0), tick(uuid4(), 10), tick(uuid4(), 0, planned=False)
    dispatcher._timetable = SimpleNamespace(is_held=lambda run: run is paused)
    assert dispatcher.longest_late(NOON) == 0
    claimed, begun = (dispatcher._hand.take(tick(uuid4(), seconds), None) for seconds in (20, 0))
    claimed.life, begun.life = Life(Phase.FORKED), Life(Phase.BEGUN)
    dispatcher.found([paused, waiting, by_hand], time.monotonic())
    assert dispatcher.longest_late(NOON + 30 * SECOND) == 20
    dispatcher.found([paused, by_hand], time.monotonic())
    assert dispatcher.longest_late(NOON + 30 * SECOND) == 10
    assert dispatcher.longest_late(NOON) == 0


def choosing(limit, max_concurrent=1):
    """A dispatcher with so much room, of jobs that allow so many runs at once, and its queue."""
    dispatcher = new_dispatcher()
    job: Any = SimpleNamespace(trigger="ours", max_concurrent=max_concurrent)
    dispatcher._deployments = SimpleNamespace(is_ending=lambda _: False, known=lambda _: job)
    dispatcher._hand = Hand(lambda _: job)
    dispatcher._membership = SimpleNamespace(may_run=lambda _: True)
    dispatcher._timetable = SimpleNamespace(is_held=lambda _: False)
    dispatcher._hosts = SimpleNamespace(limit=limit)
    return dispatcher


LATE = -1e9
"""Seconds after noon of 2030 that are long past."""


@pytest.mark.parametrize(
    ("limit", "took", "chosen"),
    [(3, 0.1, "the next"), (2, 0.1, "none"), (3, 60.0, "none"), (1, 0.1, "none")],
    ids=["room to spare", "one place left", "a long run", "no room"],
)
def test_the_next_tick_of_a_serial_job_is_made_ready_where_there_is_room(limit, took, chosen):
    """It is claimed behind the one that goes on, if that is brief."""
    dispatcher, job_id = choosing(limit), uuid4()
    first, second, third = (tick(job_id, LATE + n) for n in range(3))
    dispatcher._hand.take(first, None)
    dispatcher._queue.ran(job_id, took)
    dispatcher.found([second, third], time.monotonic())

    found, _ = dispatcher._choose(time.monotonic())
    assert found is (second if chosen == "the next" else None)
    if found is not None:
        dispatcher._queue.take(found)
        dispatcher._hand.take(found, None)
        assert dispatcher._choose(time.monotonic())[0] is None, "one is enough"


def test_what_can_begin_goes_first():
    """A tick that has to wait for others is given back when there is no room for one that has not."""
    dispatcher, job_id = choosing(limit=3), uuid4()
    runs = [dispatcher._hand.take(tick(job_id, LATE + n), None) for n in range(2)]
    dispatcher._queue.ran(job_id, 0.1)
    other, following = tick(uuid4(), LATE + 9), tick(job_id, LATE + 2)
    dispatcher.found([other, following], time.monotonic())
    assert dispatcher._choose(time.monotonic())[0] is other

    dispatcher._hosts.limit = 2
    assert dispatcher._choose(time.monotonic())[0] is None
    assert [run.life.deferred for run in runs] == [False, True]


class Client:
    """Has no such deployment, or has it, and deletes runs."""

    def __init__(self, has_deployment):
        self.has_deployment, self.deleted = has_deployment, []

    async def read_deployment(self, _):
        if not self.has_deployment:
            raise ObjectNotFound(ValueError("gone"))

    async def delete_flow_run(self, run_id):
        self.deleted.append(run_id)


@pytest.mark.parametrize(
    ("has_deployment", "kind", "is_deleted"),
    [
        (False, {"auto_scheduled": True}, True),
        (False, {"idempotency_key": tick_key(JOB, JOB, NOON)}, True),
        (False, {}, False),
        (True, {"auto_scheduled": True}, False),
    ],
    ids=["planned too late", "made too late", "by hand", "of a job that is there"],
)
def test_a_run_that_is_gone_is_a_reason_to_look_at_its_job(has_deployment, kind, is_deleted, caplog):
    """Somebody may have deleted that: what the scheduler, or an agent, was making of it then goes, too.

    Or the job was planned anew, as after each deploy: of many runs one line is enough.
    """
    caplog.set_level("INFO")
    news: list[News] = []
    client, job_id = Client(has_deployment), uuid4()
    dispatcher = new_dispatcher(news.append, client)
    run, another = (
        dispatcher._hand.take(tick(job_id, seconds, planned=False).model_copy(update=kind), None)
        for seconds in (1, 2)
    )

    async def decide(_):
        raise ObjectNotFound(ValueError("gone"))

    dispatcher._decide = decide
    for gone in (run, another):
        asyncio.run(dispatcher._handle(gone))

    assert news == [News(Kind.DEPLOYMENT, run.flow_run.deployment_id)] * 2
    why = (
        "Prefect has planned its job anew, or somebody" if has_deployment else "its deployment was deleted"
    )
    (line,) = caplog.messages
    assert line.startswith(f"Run {run.flow_run.name} is gone: {why}")
    assert client.deleted == ([gone.flow_run.id for gone in (run, another)] if is_deleted else [])


def test_a_job_that_was_edited_into_nonsense_is_told_once(caplog, monkeypatch):
    """In one line, with the job's name and the remedy, which its crashed runs have as well."""
    job_id, told = uuid4(), []
    settled: list[Any] = []  # else they would be made due again, as what an engine has crashed
    faults = ["interval=-1", "interval=-1", "interval=-2", None, "interval=-2"]

    async def job_of(*_):
        fault = faults.pop(0)
        raise DeclarationError(f"{fault}: must be greater") if fault else ObjectNotFound(ValueError("gone"))

    async def report(_, state):
        told.append(state)

    deployments = SimpleNamespace(job_of=job_of, name_of=lambda _: "a/shaky")
    dispatcher = new_dispatcher(
        client=Client(has_deployment=True),
        deployments=deployments,
        timetable=SimpleNamespace(settle=settled.append),
    )
    monkeypatch.setattr(dispatcher._node.teller, "report", report)
    for n in range(5):
        asyncio.run(dispatcher._handle(dispatcher._hand.take(tick(job_id, n), None)))

    words = "Job 'a/shaky' cannot be run as it is deployed: interval={}: must be greater; deploy it again."
    assert caplog.messages == [words.format(-1), words.format(-2)]
    assert not any(record.exc_info for record in caplog.records)
    assert [state.message for state in told] == [words.format(n) for n in (-1, -1, -2, -2)]
    assert {state.type for state in told} == {StateType.CRASHED}
    assert len(settled) == len(told)


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (Phase.FORKED, [Signal.DROP, Signal.KILL]),
        (Phase.BEGUN, [Signal.DROP, Signal.TERMINATE, Signal.KILL]),
    ],
)
def test_a_drain_ends_with_a_kill(phase, told, monkeypatch):
    """A body that does not end when its time is up, nor when it is told to, is ended."""
    monkeypatch.setattr(dispatcher_module, "TERMINATE_GRACE_SECONDS", 0.01)
    dispatcher, heard = new_dispatcher(), []

    async def drain():
        run = dispatcher._hand.take(tick(uuid4(), 1), None)
        run.life, run.host = Life(phase, finishes=True), SimpleNamespace(heed=heed)
        await dispatcher.drain(0.01)

    def heed(signal):
        heard.append(signal)
        if signal is Signal.KILL:
            for run in dispatcher._hand:
                dispatcher._hand.put_down(run)

    asyncio.run(drain())
    assert heard == told


@pytest.mark.parametrize("waits", [True, False])
def test_a_tick_that_waits_for_its_turn_is_not_passed_over(waits):
    """The answer to a look from before it was put off has it still, and one that is through not."""
    dispatcher = new_dispatcher()
    first, second = (tick(uuid4(), seconds) for seconds in (1, 2))
    run = dispatcher._hand.take(first, None)

    async def decide(run):
        if waits:
            dispatcher._queue.put(run.flow_run)

    dispatcher._decide = decide
    asked = time.monotonic()
    asyncio.run(dispatcher._handle(run))
    dispatcher.found([first, second], asked)

    waiting = {run.id for run in dispatcher._queue.firsts()}
    assert waiting == ({first.id, second.id} if waits else {second.id})


@pytest.mark.parametrize("dropped", [True, False])
def test_a_tick_that_is_put_back_is_not_passed_over(dropped):
    """It stays the first of its job, unless this agent is to begin nothing more: older answers lack it."""
    dispatcher = new_dispatcher()
    job_id = uuid4()
    first, second = (tick(job_id, seconds) for seconds in (1, 2))
    run = dispatcher._hand.take(first, None)
    run.life = Life(dropped=dropped)

    async def told(*_, **__):
        pass

    dispatcher._teller.put_back = told
    dispatcher._decide = lambda run: dispatcher._runner.give_back(run, give_back(run.life))
    asked = time.monotonic()
    asyncio.run(dispatcher._handle(run))
    dispatcher.found([second], asked)

    assert [found.id for found in dispatcher._queue.firsts()] == [second.id if dropped else first.id]
    dispatcher.found([second], time.monotonic())
    assert [found.id for found in dispatcher._queue.firsts()] == [second.id]


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_may_be_entered_is_withdrawn_before_it_is_put_back(monkeypatch, is_lost):
    """However long the database is away; what has lost its token is the next holder's to judge."""
    dispatcher = new_dispatcher()
    run = dispatcher._hand.take(tick(uuid4(), 1), None)
    done: list[str] = []
    faults = [CoordinationError("away")] * 2

    def withdraw(*_: object) -> None:
        if faults:
            raise faults.pop()
        done.append("withdrawn")

    async def in_a_process(*_: object) -> Outcome:
        run.life = Life(Phase.FORKED, lost=is_lost)
        return Outcome(protocol.Dropped(in_doubt=True))

    async def give_back(*_: object) -> None:
        done.append("put back")

    async def has_storage() -> bool:
        return True

    monkeypatch.setattr(store, "withdraw", withdraw)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0)
    runner = dispatcher._runner
    runner._membership = SimpleNamespace(database_url="")
    runner._deployments = SimpleNamespace(server_has_storage=has_storage)
    runner._assignment = lambda *_, **__: SimpleNamespace(execution=None, owner=None, trigger_slug=None)
    runner._in_a_process, runner.give_back = in_a_process, give_back
    asyncio.run(runner.run(run, None))
    assert done == (["put back"] if is_lost else ["withdrawn", "put back"])


@pytest.mark.parametrize("then", ["it cannot either", "it can", "it is over", "the token is lost"])
def test_what_a_process_cannot_enter_its_agent_does(monkeypatch, caplog, then):
    """However long the database is away; a process that cannot reach it even then is of no more use."""
    dispatcher = new_dispatcher()
    runner: Any = dispatcher._runner
    entered: list[Any] = []
    ended: list[Any] = []
    jobs: list[str] = []
    faults = [CoordinationError("away")]
    run = dispatcher._hand.take(tick(uuid4(), 1), None)
    run.life = Life(Phase.BEGUN, lost=then == "the token is lost")
    host: Any = SimpleNamespace(end=ended.append)
    run.host = None if then == "it is over" else host

    def settle(*what: object) -> None:
        if faults:
            raise faults.pop()
        entered.append(what)
        if then == "it can":
            run.meet(protocol.Settled())

    monkeypatch.setattr(store, "settle_for", settle)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0)
    monkeypatch.setattr(runner_module, "ANSWERS_WITHIN_SECONDS", 0)
    runner._membership = SimpleNamespace(database_url="url")
    runner._end_job = lambda _, reason: jobs.append(reason)
    assignment: Any = SimpleNamespace(execution="execution", owner="owner", trigger_slug="slug")
    unentered = protocol.Unentered(fault="no files", outcome="Failed", ends="run 1 failed")
    asyncio.run(runner._enter_for(run, assignment, None, unentered))

    is_entered = then != "the token is lost"
    end = End("Failed", ends="run 1 failed")
    assert entered == [("url", "execution", "owner", end, "slug")] * is_entered
    assert jobs == ["run 1 failed"] * is_entered
    assert ended == [signal.SIGKILL] * (then == "it cannot either")
    said = [
        text for text in caplog.messages if "does not reach the database, and is ended: no files" in text
    ]
    assert len(said) == len(ended)


@pytest.mark.parametrize(
    ("waits", "is_passed_on", "is_cancelled", "done"),
    [
        (True, False, False, "waits"),
        (True, False, True, "settled"),
        (False, False, False, "settled"),
        (True, True, False, "passed on"),
    ],
)
def test_what_no_node_can_load_waits_if_it_is_only_not_here(
    caplog, waits, is_passed_on, is_cancelled, done
):
    """It is tried again, later each time, and that is said once."""
    dispatcher = new_dispatcher()
    runner, came_to = dispatcher._runner, []

    async def pass_on(*_: object) -> Any:
        return is_passed_on

    async def give_back(run: Any, _: object) -> None:
        came_to.append("passed on" if run.life.dropped else "waits")

    async def settle(*_: object, **__: object) -> None:
        came_to.append("settled")

    runner._succession = SimpleNamespace(pass_on=pass_on)
    runner.give_back, runner._settle = give_back, settle
    one = tick(uuid4(), 1)
    for _ in range(2):
        run = dispatcher._hand.take(one, None)
        run.life = Life(Phase.FORKED, cancelled=0.0 if is_cancelled else None)
        asyncio.run(runner._pass_on(run, None, "folder /srv lacks job.py", waits=waits))
    assert came_to == [done] * 2
    said = [text for text in caplog.messages if "waits until its code is here. folder /srv" in text]
    assert len(said) == (1 if done == "waits" else 0) * 2, "in the agent's log, and in the run's"
    assert (dispatcher._queue.next_try(time.monotonic()) is not None) == (done == "waits")


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_crash_is_entered_before_prefect_is_told(monkeypatch, caplog, is_lost):
    """However long the database is away: the ledger knows nothing else of what has not begun."""
    dispatcher = new_dispatcher()
    run = dispatcher._hand.take(tick(uuid4(), 1), None)
    run.life = Life(Phase.FORKED, lost=is_lost)
    done: list[str] = []
    faults = [CoordinationError("away")] * 3

    def give_up(*given: object) -> None:
        if faults:
            raise faults.pop()
        done.append(f"entered: {given[3]}, {given[4]}")

    async def report(*_: object, **__: object) -> bool:
        done.append("told")
        return False

    monkeypatch.setattr(store, "give_up", give_up)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0)
    runner = dispatcher._runner
    runner._membership = SimpleNamespace(database_url="")
    runner._teller = SimpleNamespace(report=report)
    assignment: Any = SimpleNamespace(execution=None, owner=None)
    asyncio.run(runner._report_crash(run, assignment, "no module of that name"))
    assert done == ([] if is_lost else ["entered: Crashed, no module of that name", "told"])
    assert caplog.text.count("waits for the database: away") == (0 if is_lost else 1)


@pytest.mark.parametrize("holder", ["this node", "another one", "nobody, of a run without a group"])
def test_only_the_holder_of_a_group_puts_its_runs_back(holder):
    """Another one has settled them, perhaps long ago, when the API takes what this one has to say."""
    dispatcher = new_dispatcher()
    token = None if holder.startswith("nobody") else Token("group", "node-1", 1)
    run = dispatcher._hand.take(tick(uuid4(), 1, planned=False), token)
    told: list[UUID] = []

    async def set_flow_run_state(run_id: UUID, *_: Any, **__: Any) -> Any:
        told.append(run_id)
        return SimpleNamespace(status=SetStateStatus.ACCEPT)

    dispatcher._teller._client = SimpleNamespace(set_flow_run_state=set_flow_run_state)
    dispatcher._runner._membership = SimpleNamespace(holds=lambda _: holder == "this node")

    asyncio.run(dispatcher._runner.give_back(run, give_back(run.life)))
    assert told == ([] if holder == "another one" else [run.flow_run.id])


@pytest.mark.parametrize(
    ("answer", "is_skipped"),
    [
        (True, True),
        (False, False),
        (TokenLostError("another node holds it"), False),
        (CoordinationError("away"), True),
    ],
    ids=["entered", "begun elsewhere", "token lost", "database away"],
)
def test_what_another_node_may_have_begun_is_not_shown_as_skipped(monkeypatch, answer, is_skipped):
    """Who was frozen finds a tick too late that ran elsewhere; where nobody answers, it is too late."""
    runner = new_dispatcher()._runner
    told: list[str] = []

    def skip(*_: object) -> bool:
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    async def tell(_, reason):
        told.append(reason)

    monkeypatch.setattr(store, "skip", skip)
    monkeypatch.setattr("taskadapter.agent.events.tick_skipped", lambda *_: None)
    runner._assignment = lambda *_: SimpleNamespace(execution=None, owner=None, trigger_slug=None)
    runner._membership = SimpleNamespace(database_url="")
    runner._teller = SimpleNamespace(skip=tell)
    runner._timetable = SimpleNamespace(settle=lambda _: None)
    job: Any = SimpleNamespace(policy=TaskPolicy())

    run: Any = SimpleNamespace(flow_run=tick(uuid4(), 1))
    assert asyncio.run(runner.skip(run, job, "too late")) is is_skipped
    assert told == (["too late"] if is_skipped else [])


class Api:
    """Answers claims, and knows the state of the run."""

    def __init__(self, *answers: Any, state: Any = None) -> None:
        self.answers = [*answers]
        self.state = state
        self.asked: list[Any] = []

    async def set_flow_run_state(self, _: UUID, state: Any) -> Any:
        self.asked.append(state)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            await until(answer)
            answer = SetStateStatus.ACCEPT
        return SimpleNamespace(status=answer, details=None)

    async def read_flow_run(self, _: UUID) -> Any:
        return SimpleNamespace(state=self.state)


MINE: Any = Pending(message="Claimed by node-1.")


@pytest.mark.parametrize(
    ("answer", "state", "is_had"),
    [
        (SetStateStatus.ACCEPT, None, True),
        (SetStateStatus.REJECT, MINE, False),
        (SetStateStatus.ABORT, MINE, True),
        (SetStateStatus.ABORT, Pending(message="Claimed by node-2."), False),
        (SetStateStatus.ABORT, Pending(), False),
        (SetStateStatus.ABORT, Running(), False),
        (SetStateStatus.ABORT, None, False),
    ],
)
def test_a_run_is_had_that_says_whose_it_is(answer, state, is_had):
    """The answer to the claim may have been lost; Prefect's client asks again by itself."""
    dispatcher = new_dispatcher()
    dispatcher._client = Api(answer, state=state)
    assert asyncio.run(dispatcher._claim(tick(uuid4(), 1))) is is_had
    (asked,) = dispatcher._client.asked
    assert (asked.type, asked.message) == (MINE.type, MINE.message)


def test_a_claim_without_an_answer_is_made_again():
    """Though no look lists the run any more, which may be this node's."""
    dispatcher = new_dispatcher()
    dispatcher._client = Api(httpx.ReadError("reset"))
    run = dispatcher._hand.take(tick(uuid4(), 1), None)
    dispatcher._decide = lambda run: dispatcher._claim(run.flow_run)
    asyncio.run(dispatcher._handle(run))
    dispatcher.found([], time.monotonic())
    assert dispatcher._queue.first(any_run, 0.0) is run.flow_run


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_claim_that_waits_for_an_answer_is_a_reason_for_a_look(monkeypatch, is_slow):
    """Which finds out whether the API answers at all."""
    monkeypatch.setattr(dispatcher_module, "SLOW_CLAIM_SECONDS", 0.0 if is_slow else 60.0)
    news: list[News] = []
    dispatcher, flow_run = new_dispatcher(news.append), tick(uuid4(), 1)
    dispatcher._client = Api((lambda: news) if is_slow else SetStateStatus.ACCEPT)
    assert asyncio.run(dispatcher._claim(flow_run))
    assert news == ([News(Kind.WAITS, flow_run.id)] if is_slow else [])
