"""The progress of jobs, on every database."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine, insert, update

from taskadapter import progress
from taskadapter.coordination.dialects import open_engine, transaction
from taskadapter.coordination.jobs import (
    RunInFlight,
    Token,
    begin_run,
    end_flight,
    flights_before,
    forget,
    forget_flights,
    load_state,
    outcomes,
    require_token,
    save_state,
    save_state_fenced,
    start_flight,
)
from taskadapter.coordination.schema import job_progress, token_holder
from taskadapter.errors import (
    AlreadyStartedError,
    CoordinationError,
    DatabaseUnavailableError,
    TokenLostError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

JOB = "11111111-1111-4111-8111-111111111111"
RUN = "22222222-2222-4222-8222-222222222222"
TOKEN = Token("group", "node-1", 7)
FOREVER = -1


def count_one(engine: Engine, slug: str = "every-2s", max_count: int = FOREVER) -> int | None:
    with transaction(engine) as connection:
        return begin_run(connection, JOB, slug, max_count)


def hold(engine: Engine, token: Token) -> None:
    with transaction(engine) as connection:
        row = {"group_id": token.group_id, "task_id": token.task_id, "term": token.term}
        connection.execute(insert(token_holder).values(row))


def take_over(engine: Engine) -> None:
    with transaction(engine) as connection:
        connection.execute(update(token_holder).values(task_id="node-2", term=8))


class TestBeginRun:
    def test_counts_from_one(self, engine: Engine) -> None:
        """The first execution is number 1, and each next one is one more."""
        assert [count_one(engine) for _ in range(3)] == [1, 2, 3]

    def test_ends_at_max_count(self, engine: Engine) -> None:
        """Exactly max_count executions are counted; a refused one changes nothing."""
        assert [count_one(engine, max_count=2) for _ in range(4)] == [1, 2, None, None]
        assert count_one(engine, max_count=3) == 3

    def test_an_undone_run_is_not_counted(self, engine: Engine) -> None:
        """The number belongs to the caller only if its transaction commits."""
        with engine.connect() as connection:
            assert begin_run(connection, JOB, "every-2s", FOREVER) == 1
            connection.rollback()
        assert count_one(engine) == 1

    def test_a_changed_trigger_starts_again(self, engine: Engine) -> None:
        """Another trigger resets the count, the same one never does."""
        assert count_one(engine, max_count=1) == 1
        assert count_one(engine, max_count=1) is None
        assert count_one(engine, "every-3s", max_count=1) == 1
        assert count_one(engine, "every-3s", max_count=1) is None

    def test_jobs_do_not_share_a_count(self, engine: Engine) -> None:
        """Each job has its own count."""
        count_one(engine)
        with transaction(engine) as connection:
            assert begin_run(connection, RUN, "every-2s", FOREVER) == 1

    def test_forgetting_starts_again(self, engine: Engine) -> None:
        """A forgotten job has neither count nor state."""
        count_one(engine)
        with transaction(engine) as connection:
            save_state(connection, JOB, {"i": 1})
            forget(connection, JOB)
            assert load_state(connection, JOB) is None
        assert count_one(engine) == 1

    def test_racing_threads_never_share_a_number(self, engine: Engine) -> None:
        """Of racing callers exactly max_count get a number, each another one."""
        with ThreadPoolExecutor(5) as pool:
            numbers = list(pool.map(lambda _: count_one(engine, max_count=30), range(40)))
        assert {**dict.fromkeys(range(1, 31), 1), None: 10} == Counter(numbers)

    def test_racing_processes_never_share_a_number(self, engine: Engine) -> None:
        """The same holds between processes, which share nothing but the database."""
        url = engine.url.render_as_string(hide_password=False)
        command = [sys.executable, "-c", RACER, url, JOB]
        racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        numbers = [word for racer in racers for word in racer.communicate(timeout=60)[0].split()]
        assert [racer.returncode for racer in racers] == [0, 0, 0]
        assert {**dict.fromkeys(map(str, range(1, 41)), 1), "None": 20} == Counter(numbers)


RACER = """
import sys
from taskadapter.coordination.dialects import open_engine, transaction
from taskadapter.coordination.jobs import begin_run
engine = open_engine(sys.argv[1])
for _ in range(20):
    with transaction(engine) as connection:
        number = begin_run(connection, sys.argv[2], "every-2s", 40)
    print(number)
"""


class TestState:
    def test_is_none_at_first(self, engine: Engine) -> None:
        """A job that never saved has no state, whether it has run or not."""
        with transaction(engine) as connection:
            assert load_state(connection, JOB) is None
            begin_run(connection, JOB, "every-2s", FOREVER)
            assert load_state(connection, JOB) is None

    def test_survives_and_is_replaced(self, engine: Engine) -> None:
        """What was saved last is loaded, whole and unchanged."""
        state = {"i": 1, "name": "höhe 😀", "items": [1.5, None, True], "long": "x" * 70_000}
        for saved in ({"old": 1}, state):
            with transaction(engine) as connection:
                save_state(connection, JOB, saved)
        with transaction(engine) as connection:
            assert load_state(connection, JOB) == state

    def test_leaves_the_count_alone(self, engine: Engine) -> None:
        """Saving before, between or after runs does not change their numbers."""
        for number in (1, 2):
            with transaction(engine) as connection:
                save_state(connection, JOB, {"i": number})
            assert count_one(engine) == number
        with transaction(engine) as connection:
            assert load_state(connection, JOB) == {"i": 2}

    def test_refuses_what_json_has_not(self, engine: Engine) -> None:
        """A state that could not be loaded again is not saved."""
        with pytest.raises(ValueError, match="JSON"), transaction(engine) as connection:
            save_state(connection, JOB, {"i": float("nan")})

    def test_a_broken_row_is_named(self, engine: Engine) -> None:
        """A row that holds no JSON object is reported with the remedy, not taken for no state."""
        with transaction(engine) as connection:
            save_state(connection, JOB, {})
            connection.execute(update(job_progress).values(state="[1]"))
        with (
            pytest.raises(CoordinationError, match="repair the row"),
            transaction(engine) as connection,
        ):
            load_state(connection, JOB)


class TestFencing:
    def test_the_holder_may_write(self, engine: Engine) -> None:
        """The holder of the token in its term saves its state."""
        hold(engine, TOKEN)
        with transaction(engine) as connection:
            save_state_fenced(connection, JOB, {"i": 1}, TOKEN)
        with transaction(engine) as connection:
            assert load_state(connection, JOB) == {"i": 1}

    @pytest.mark.parametrize(
        "other",
        [Token("group", "node-2", 7), Token("group", "node-1", 6), Token("other", "node-1", 7)],
    )
    def test_nobody_else_may(self, engine: Engine, other: Token) -> None:
        """Another node, an earlier term or another group is refused, and nothing is written."""
        hold(engine, TOKEN)
        with (
            pytest.raises(TokenLostError, match="no longer holds"),
            transaction(engine) as connection,
        ):
            save_state_fenced(connection, JOB, {"i": 1}, other)
        with transaction(engine) as connection:
            assert load_state(connection, JOB) is None

    def test_a_former_holder_may_not(self, engine: Engine) -> None:
        """A node that wakes up after a takeover cannot overwrite its successor's state."""
        hold(engine, TOKEN)
        take_over(engine)
        with pytest.raises(TokenLostError), transaction(engine) as connection:
            save_state_fenced(connection, JOB, {"i": 1}, TOKEN)

    def test_holds_off_a_takeover(self, engine: Engine) -> None:
        """From the check to the end of the transaction nobody can take the token."""
        hold(engine, TOKEN)
        with ThreadPoolExecutor(1) as pool:
            with transaction(engine) as connection:
                require_token(connection, TOKEN)
                taken = pool.submit(take_over, engine)
                with pytest.raises(TimeoutError):
                    taken.result(timeout=0.2)
                require_token(connection, TOKEN)
            taken.result(timeout=5)


def write_late(url: str, freeze: Callable[[], None]) -> None:
    with progress._transaction(url) as connection:
        require_token(connection, TOKEN)
        freeze()
        save_state(connection, JOB, {"i": 1})


@pytest.mark.databases("postgresql", "mysql")  # SQLite has nobody who could end a transaction
def test_a_job_that_freezes_in_a_transaction_keeps_nobody_from_taking_over(
    prepared_url: str, engine: Engine
) -> None:
    """What a frozen or cut off host has locked, the server soon unlocks, and it is not written."""
    hold(engine, TOKEN)
    with ThreadPoolExecutor(1) as pool, pytest.raises(DatabaseUnavailableError):
        write_late(prepared_url, lambda: pool.submit(take_over, engine).result(timeout=5))
    progress._engine(prepared_url).dispose()
    with transaction(engine) as connection:
        assert load_state(connection, JOB) is None


class TestFlights:
    def test_a_run_in_flight_is_found_by_the_next_term(self, engine: Engine) -> None:
        """A successor sees what a former node was executing, and not its own runs."""
        hold(engine, TOKEN)
        run = RunInFlight(RUN, JOB, TOKEN)
        with transaction(engine) as connection:
            start_flight(connection, run)
            assert flights_before(connection, "group", 7) == ()
            assert flights_before(connection, "group", 8) == (run,)
            assert flights_before(connection, "other", 8) == ()
            end_flight(connection, RUN, "Completed")
            assert flights_before(connection, "group", 8) == ()

    def test_starts_once(self, engine: Engine) -> None:
        """A flow run that is in flight does not start again, by the same node or the next."""
        hold(engine, TOKEN)
        with transaction(engine) as connection:
            start_flight(connection, RunInFlight(RUN, JOB, TOKEN))
        with pytest.raises(AlreadyStartedError, match="node-1"), transaction(engine) as connection:
            start_flight(connection, RunInFlight(RUN, JOB, TOKEN), rerun=True)
        take_over(engine)
        successor = RunInFlight(RUN, JOB, Token("group", "node-2", 8))
        with pytest.raises(AlreadyStartedError), transaction(engine) as connection:
            start_flight(connection, successor)

    def test_may_be_rerun_in_a_later_term(self, engine: Engine) -> None:
        """If its declaration asks for it, the next node starts it again."""
        hold(engine, TOKEN)
        with transaction(engine) as connection:
            start_flight(connection, RunInFlight(RUN, JOB, TOKEN))
        take_over(engine)
        successor = RunInFlight(RUN, JOB, Token("group", "node-2", 8))
        with transaction(engine) as connection:
            start_flight(connection, successor, rerun=True)
            assert flights_before(connection, "group", 9) == (successor,)

    def test_does_not_start_again_after_its_end(self, engine: Engine) -> None:
        """A run that has ended is remembered: neither a stale claim nor a takeover starts it again."""
        hold(engine, TOKEN)
        run = RunInFlight(RUN, JOB, TOKEN)
        with transaction(engine) as connection:
            start_flight(connection, run)
            assert outcomes(connection, [RUN, "other"]) == {RUN: None}
            end_flight(connection, RUN, "Completed")
            assert outcomes(connection, [RUN, "other"]) == {RUN: "Completed"}
        with pytest.raises(AlreadyStartedError), transaction(engine) as connection:
            start_flight(connection, run)
        take_over(engine)
        successor = RunInFlight(RUN, JOB, Token("group", "node-2", 8))
        with pytest.raises(AlreadyStartedError), transaction(engine) as connection:
            start_flight(connection, successor, rerun=True)

    def test_may_be_retried_by_hand(self, engine: Engine) -> None:
        """Somebody who asks for a run that has ended gets it, but not beside one that goes on."""
        hold(engine, TOKEN)
        run = RunInFlight(RUN, JOB, TOKEN)
        with transaction(engine) as connection:
            start_flight(connection, run)
        with pytest.raises(AlreadyStartedError), transaction(engine) as connection:
            start_flight(connection, run, retried=True)
        with transaction(engine) as connection:
            end_flight(connection, RUN, "Failed")
            start_flight(connection, run, retried=True)
            assert flights_before(connection, "group", 8) == (run,)

    def test_is_forgotten_after_a_while(self, engine: Engine) -> None:
        """Runs that ended long ago are forgotten; those that go on, or have just ended, are not."""
        hold(engine, TOKEN)
        with transaction(engine) as connection:
            start_flight(connection, RunInFlight(RUN, JOB, TOKEN))
            forget_flights(connection, "group", 0)
            assert outcomes(connection, [RUN]) == {RUN: None}
            end_flight(connection, RUN, "Crashed")
            forget_flights(connection, "group", 3600)
            assert outcomes(connection, [RUN]) == {RUN: "Crashed"}
            forget_flights(connection, "group", -1)
            assert outcomes(connection, [RUN]) == {}

    def test_needs_the_token(self, engine: Engine) -> None:
        """Without the token nothing starts."""
        with pytest.raises(TokenLostError), transaction(engine) as connection:
            start_flight(connection, RunInFlight(RUN, JOB, TOKEN))


def test_an_engine_of_the_callers_own_is_fenced_too(prepared_url: str, engine: Engine) -> None:
    """The check works on a connection that this package did not open."""
    from sqlalchemy import create_engine

    hold(engine, TOKEN)
    own = create_engine(open_engine(prepared_url).url)
    with own.begin() as connection:
        require_token(connection, TOKEN)
    with own.begin() as connection, pytest.raises(TokenLostError):
        require_token(connection, Token("group", "node-1", 6))
    own.dispose()
