"""The ledger, on every database: what is entered, once, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine, delete, text

from taskadapter.coordination import ledger, progress, schema
from taskadapter.coordination.engines import transaction
from taskadapter.coordination.executions import (
    ABANDONED,
    Begun,
    End,
    Ended,
    Entry,
    Execution,
    Limits,
    Owner,
    Paused,
    Skipped,
    Taken,
    asked_key,
)
from taskadapter.coordination.nodes import Node, register
from taskadapter.coordination.progress import end as end_job
from taskadapter.coordination.progress import load_state, pause, save_state
from taskadapter.errors import SchemaError, TokenLostError
from tests.contract.databases import rewind
from tests.contract.entering import (
    ALONE,
    JOB,
    NEXT,
    RUN,
    TOKEN,
    count_one,
    hold,
    owner,
    take_over,
    tick,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from taskadapter.coordination.executions import Answer

LIMITS = Limits("every-2s")
LEASE = 300.0
"""Long, so that a machine that stands still for seconds makes nothing stale."""

ASKED = Execution(asked_key(RUN, 0), RUN, JOB)


def begin(engine: Engine, execution: Execution, who: Owner = ALONE, limits: Limits = LIMITS) -> Answer:
    with transaction(engine) as connection:
        return ledger.begin(connection, execution, who, limits)


def end(engine: Engine, execution: Execution, outcome: str, incarnation: str = "of another") -> bool:
    with transaction(engine) as connection:
        return ledger.end(connection, execution.key, outcome, incarnation=incarnation)


def came_to(engine: Engine, state: int, *, by_agent: bool = False, ends: str | None = None) -> None:
    """Have the first tick's process, or its agent, enter that its body has come to an end."""
    enter = ledger.settle_for if by_agent else ledger.settle
    end = End("Completed", {"i": state}, ends)
    with transaction(engine) as connection:
        enter(connection, tick(1), ALONE, end, LIMITS.trigger_slug)


def asked(times: int) -> Execution:
    """The execution of a run by hand that has been run so often."""
    return Execution(asked_key(RUN, times), RUN, JOB)


def outcomes(engine: Engine, *executions: Execution) -> list[str | None]:
    with transaction(engine) as connection:
        found = ledger.entries(connection, [execution.key for execution in executions])
    return [entry.outcome for entry in found]


def found_by(engine: Engine, execution: Execution) -> list[Entry]:
    with transaction(engine) as connection:
        return ledger.entries(connection, [execution.key])


def settle(engine: Engine, found: Entry, outcome: str) -> None:
    with transaction(engine) as connection:
        ledger.end_as_found(connection, found, outcome)


class TestCount:
    def test_counts_from_one(self, engine: Engine) -> None:
        """The first execution is number 1, and each next one is one more."""
        assert [count_one(engine) for _ in range(3)] == [1, 2, 3]

    def test_ends_at_max_count(self, engine: Engine) -> None:
        """Exactly max_count executions are counted; a refused one changes nothing."""
        ran = [count_one(engine, max_count=2) for _ in range(4)]
        assert ran == [1, 2, "Exhausted", "Exhausted"]
        assert count_one(engine, max_count=3) == 3

    def test_an_undone_run_is_not_counted(self, engine: Engine) -> None:
        """The number belongs to the caller only if its transaction commits."""
        with engine.connect() as connection:
            assert ledger.begin(connection, tick(1), ALONE, LIMITS) == Begun(1)
            connection.rollback()
        assert begin(engine, tick(1)) == Begun(1)

    def test_a_changed_trigger_starts_again(self, engine: Engine) -> None:
        """Another trigger resets the count, the same one never does."""
        for slug in ("every-2s", "every-3s"):
            assert [count_one(engine, slug, max_count=1) for _ in range(2)] == [1, "Exhausted"]

    def test_jobs_do_not_share_a_count(self, engine: Engine) -> None:
        """Each job has its own count."""
        count_one(engine)
        assert count_one(engine, job_id=RUN) == 1

    def test_racing_threads_never_share_a_number(self, engine: Engine) -> None:
        """Of racing callers exactly max_count get a number, each another one."""
        with ThreadPoolExecutor(5) as pool:
            numbers = list(pool.map(lambda _: count_one(engine, max_count=30), range(40)))
        expected: Counter[int | str] = Counter([*range(1, 31), *["Exhausted"] * 10])
        assert expected == Counter(numbers)

    def test_racing_processes_never_share_a_number(self, engine: Engine) -> None:
        """The same holds between processes, which share nothing but the database."""
        url = engine.url.render_as_string(hide_password=False)
        commands = [[sys.executable, "-c", RACER, url, str(start)] for start in (0, 1000, 2000)]
        racers = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in commands]
        numbers = [word for racer in racers for word in racer.communicate(timeout=300)[0].split()]
        assert [racer.returncode for racer in racers] == [0, 0, 0]
        assert {**dict.fromkeys(map(str, range(1, 41)), 1), "Exhausted": 20} == Counter(numbers)


RACER = """
import sys
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.executions import Limits
from taskadapter.coordination.ledger import begin
from tests.contract.entering import ALONE, tick, told
engine = open_engine(sys.argv[1])
for number in range(20):
    with transaction(engine) as connection:
        answer = begin(connection, tick(int(sys.argv[2]) + number), ALONE, Limits("every-2s", 40))
    print(told(answer))
"""


class TestOnce:
    @pytest.mark.parametrize("execution", [tick(1), ASKED], ids=["tick", "asked"])
    def test_a_body_begins_once(self, engine: Engine, execution: Execution) -> None:
        """A second beginning is refused, while the first goes on and after its end, and counts nothing."""
        begin(engine, execution)
        for outcome in (None, "Completed"):
            answer = begin(engine, execution)
            assert isinstance(answer, Taken)
            assert answer.entry.outcome == outcome
            end(engine, execution, "Completed")
        assert begin(engine, tick(2)) == Begun(2 if execution.due else 1)

    @pytest.mark.parametrize("execution", [tick(1), ASKED], ids=["tick", "asked"])
    def test_of_racing_callers_one_begins(self, engine: Engine, execution: Execution) -> None:
        """However many ask at once, on whichever nodes."""
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda _: begin(engine, execution), range(20)))
        assert Counter(type(answer).__name__ for answer in answers) == {"Begun": 1, "Taken": 19}

    def test_a_tick_is_the_same_in_another_run(self, engine: Engine) -> None:
        """A flow run that was deleted and made anew does not run its tick again."""
        begin(engine, tick(1))
        again = begin(engine, tick(1, flow_run_id=JOB))
        assert isinstance(again, Taken)
        assert again.entry.flow_run_id == RUN

    def test_asking_again_is_another_execution(self, engine: Engine) -> None:
        """A person who has a run retried that has ended gets it."""
        begin(engine, ASKED)
        end(engine, ASKED, "Failed")
        assert begin(engine, asked(1)) == Begun(None)

    @pytest.mark.parametrize("ended", [None, "Completed"])
    def test_a_run_that_was_taken_away_does_not_begin(self, engine: Engine, ended: str | None) -> None:
        """Its node could not reach the database; another one had it meanwhile, as one that had been run."""
        begin(engine, asked(1))
        if ended is not None:
            end(engine, asked(1), ended)
        answer = begin(engine, asked(0))
        assert isinstance(answer, Taken)
        assert answer.entry.key == asked_key(RUN, 1)
        assert outcomes(engine, asked(0)) == []

    def test_a_run_that_goes_on_does_not_begin_again(self, engine: Engine) -> None:
        """Whoever makes Prefect take it for one that waits."""
        begin(engine, asked(0))
        assert isinstance(begin(engine, asked(1)), Taken)

    def test_what_was_abandoned_may_begin_again(self, engine: Engine) -> None:
        """An interrupted execution that is to be made again keeps its number, and begins once more."""
        hold(engine, TOKEN)
        assert begin(engine, tick(1), owner(TOKEN), Limits("every-2s", 1)) == Begun(1)
        take_over(engine)
        assert isinstance(begin(engine, tick(1), owner(NEXT)), Taken)
        end(engine, tick(1), ABANDONED)
        for paused in (True, False):
            with transaction(engine) as connection:
                pause(connection, JOB, paused=paused)
            expected = Paused() if paused else Begun(1)
            assert begin(engine, tick(1), owner(NEXT), Limits("every-2s", 1)) == expected
        again = begin(engine, tick(1), owner(NEXT))
        assert isinstance(again, Taken)
        assert (again.entry.number, again.entry.term) == (1, NEXT.term)

    def test_what_has_not_begun_may_be_too_late(self, engine: Engine) -> None:
        """It is not entered, and counts for nothing; what was in time once begins again at any time."""
        late = replace(LIMITS, too_late="9 s late")
        assert begin(engine, tick(1), limits=late) == Skipped("9 s late")
        assert found_by(engine, tick(1)) == []

        assert begin(engine, tick(2)) == Begun(1)
        end(engine, tick(2), ABANDONED)
        assert begin(engine, tick(2), limits=late) == Begun(1)
        assert isinstance(begin(engine, tick(2), limits=late), Taken)

    def test_a_job_that_is_over_says_so_before_a_tick_is_too_late(self, engine: Engine) -> None:
        """Its end is why the tick does not begin, however late that is."""
        with transaction(engine) as connection:
            end_job(connection, JOB, "enough")
        assert begin(engine, tick(1), limits=replace(LIMITS, too_late="9 s late")) == Ended("enough")

    def test_needs_the_token(self, engine: Engine) -> None:
        """Without the token nothing begins, and nothing is entered."""
        hold(engine, NEXT)
        with pytest.raises(TokenLostError):
            begin(engine, tick(1), owner(TOKEN))
        assert outcomes(engine, tick(1)) == []


class TestAskedFor:
    def test_counts_for_nothing(self, engine: Engine) -> None:
        """A run by hand uses up none of the executions that a trigger allows."""
        assert begin(engine, ASKED, limits=Limits("every-2s", 1)) == Begun(None)
        assert count_one(engine, max_count=1) == 1
        other = Execution(asked_key(JOB, 0), JOB, JOB)
        assert begin(engine, other, limits=Limits("every-2s", 1)) == Begun(None)

    def test_begins_whatever_has_become_of_the_job(self, engine: Engine) -> None:
        """A job that is paused, or over, still runs when somebody asks for it."""
        with transaction(engine) as connection:
            pause(connection, JOB, paused=True)
            end_job(connection, JOB, "over")
        assert begin(engine, ASKED) == Begun(None)

    def test_a_tick_of_a_job_that_is_over_is_told_why(self, engine: Engine) -> None:
        """The reason is the one that its row has."""
        with transaction(engine) as connection:
            end_job(connection, JOB, "over")
        assert begin(engine, tick(1)) == Ended("over")


class TestEnd:
    def test_the_first_end_stays(self, engine: Engine) -> None:
        """An execution has one outcome; only the process that executed it knows better."""
        begin(engine, tick(1))
        assert end(engine, tick(1), "Crashed")
        assert not end(engine, tick(1), "Cancelled")
        assert outcomes(engine, tick(1)) == ["Crashed"]
        assert not end(engine, tick(1), "Completed", incarnation="another")
        assert end(engine, tick(1), "Completed", incarnation=ALONE.incarnation)
        assert outcomes(engine, tick(1)) == ["Completed"]

    def test_what_has_not_begun_has_no_end(self, engine: Engine) -> None:
        """Nothing is entered for it."""
        assert not end(engine, tick(1), "Crashed")
        assert outcomes(engine, tick(1)) == []

    def test_is_found_by_its_flow_run(self, engine: Engine) -> None:
        """The executions of a flow run are found too, the oldest first."""
        for times in range(2):
            begin(engine, asked(times))
            end(engine, asked(times), "Failed")
        with transaction(engine) as connection:
            found = ledger.entries(connection, [], [RUN])
        assert [entry.key for entry in found] == [asked_key(RUN, times) for times in range(2)]


class TestEndAsFound:
    """What another node enters of an execution whose own node is gone."""

    @pytest.mark.parametrize("outcome", ["Crashed", ABANDONED])
    def test_is_entered_once(self, engine: Engine, outcome: str) -> None:
        """What has ended, or begun again, since it was found is left."""
        begin(engine, tick(1))
        (found,) = found_by(engine, tick(1))
        for _ in range(2):
            settle(engine, found, outcome)
            assert outcomes(engine, tick(1)) == [outcome]
        settle(engine, found, "Cancelled")
        assert outcomes(engine, tick(1)) == [outcome]

    def test_does_not_touch_what_has_begun_again(self, engine: Engine) -> None:
        """Two nodes have found it; one has made it due again, and a third has begun it."""
        begin(engine, tick(1))
        (found,) = found_by(engine, tick(1))
        settle(engine, found, ABANDONED)
        begin(engine, tick(1), Owner("node-3", "incarnation-3"))
        settle(engine, found, ABANDONED)
        assert outcomes(engine, tick(1)) == [None]


class TestGivenUp:
    """What came of an execution whose process is gone."""

    @staticmethod
    def give_up(engine: Engine, execution: Execution, outcome: str = "Crashed") -> None:
        with transaction(engine) as connection:
            ledger.give_up(connection, execution, ALONE, outcome, "no module\nof that \x00 name")

    def test_a_run_that_is_retried_begins(self, engine: Engine) -> None:
        """Somebody has mended the code, and asks for it again: it has not been run in between."""
        self.give_up(engine, ASKED)
        assert outcomes(engine, ASKED) == []
        assert begin(engine, ASKED) == Begun(None)

    def test_a_tick_never_begins_later(self, engine: Engine) -> None:
        """Its code could not be loaded: once that is mended the next one runs. It is not counted."""
        self.give_up(engine, tick(1))
        answer = begin(engine, tick(1))
        assert isinstance(answer, Taken)
        assert answer.entry.outcome == "Crashed"
        with transaction(engine) as connection:
            (past,) = ledger.history(connection, JOB, 9)
        assert (past.reason, past.age, past.entry.number) == ("no module of that name", None, None)
        assert begin(engine, tick(2)) == Begun(1)

    def test_what_was_abandoned_is_over(self, engine: Engine) -> None:
        """It was to begin again, and could not."""
        begin(engine, tick(1))
        end(engine, tick(1), ABANDONED)
        self.give_up(engine, tick(1))
        assert outcomes(engine, tick(1)) == ["Crashed"]
        assert isinstance(begin(engine, tick(1)), Taken)

    @pytest.mark.parametrize(("before", "after"), [(None, "Cancelled"), ("Completed", "Completed")])
    def test_what_has_an_end_keeps_it(self, engine: Engine, before: str | None, after: str) -> None:
        """One that had begun has not."""
        begin(engine, tick(1))
        if before is not None:
            end(engine, tick(1), before)
        self.give_up(engine, tick(1), "Cancelled")
        assert outcomes(engine, tick(1)) == [after]

    def test_what_another_node_has_begun_goes_on(self, engine: Engine) -> None:
        """It is that one's to say what came of it."""
        begin(engine, tick(1), replace(ALONE, incarnation="another"))
        self.give_up(engine, tick(1))
        assert outcomes(engine, tick(1)) == [None]

    @pytest.mark.parametrize("write", [ledger.skip, ledger.give_up])
    def test_a_former_holder_says_nothing_of_a_tick(
        self, engine: Engine, write: Callable[..., object]
    ) -> None:
        """Its word comes late, and would keep its successor from beginning."""
        hold(engine, TOKEN)
        take_over(engine)
        words = ("too late",) if write is ledger.skip else ("Crashed", "it is gone")
        with pytest.raises(TokenLostError), transaction(engine) as connection:
            write(connection, tick(1), owner(TOKEN), *words)
        assert begin(engine, tick(1), owner(NEXT)) == Begun(1)


class TestSettled:
    """What a body came to is entered by its process, or by its agent, whoever is first."""

    @staticmethod
    def state(engine: Engine) -> object:
        with transaction(engine) as connection:
            return load_state(connection, JOB)

    @pytest.mark.parametrize("by_agent", [False, True])
    def test_the_other_one_is_too_late(self, engine: Engine, by_agent: bool) -> None:
        """The next run has made another state of it by then, or somebody has started the job again."""
        begin(engine, tick(1))
        came_to(engine, 1, by_agent=by_agent, ends="it failed")
        with transaction(engine) as connection:
            save_state(connection, JOB, {"i": 2})
            end_job(connection, JOB, None)
        came_to(engine, 1, by_agent=not by_agent, ends="it failed")
        assert self.state(engine) == {"i": 2}
        assert begin(engine, tick(2)) == Begun(2)
        assert outcomes(engine, tick(1)) == ["Completed"]

    @pytest.mark.parametrize("outcome", [None, "Crashed"])
    def test_an_agent_enters_what_is_open(self, engine: Engine, outcome: str | None) -> None:
        """What has been given up meanwhile keeps its end, and what is not there has none."""
        came_to(engine, 0, by_agent=True)
        begin(engine, tick(1))
        if outcome is not None:
            end(engine, tick(1), outcome)
        came_to(engine, 1, by_agent=True)
        assert self.state(engine) == ({"i": 1} if outcome is None else None)
        assert outcomes(engine, tick(1)) == [outcome or "Completed"]

    def test_an_end_is_corrected(self, engine: Engine) -> None:
        """A body may have returned what fails behind it."""
        begin(engine, tick(1))
        came_to(engine, 1)
        with transaction(engine) as connection:
            ledger.settle(connection, tick(1), ALONE, End("Failed", ends="it failed"), LIMITS.trigger_slug)
        assert outcomes(engine, tick(1)) == ["Failed"]
        assert begin(engine, tick(2)) == Ended("it failed")


class TestWithdrawn:
    """A process that was not told of its commit has given its run back."""

    @staticmethod
    def withdraw(engine: Engine, execution: Execution, who: Owner = ALONE) -> None:
        with transaction(engine) as connection:
            ledger.withdraw(connection, execution, who, LIMITS.trigger_slug)

    def test_it_begins_anew_and_counts_once(self, engine: Engine) -> None:
        """As if it had never been entered, too late for its policy included."""
        assert begin(engine, tick(1)) == Begun(1)
        assert begin(engine, tick(2)) == Begun(2)
        self.withdraw(engine, tick(2))
        assert outcomes(engine, tick(2)) == []
        assert begin(engine, tick(2), limits=replace(LIMITS, too_late="late")) == Skipped("late")
        assert begin(engine, tick(2)) == Begun(2)

    def test_the_last_of_a_job_is_still_to_come(self, engine: Engine) -> None:
        """Its maximum is not reached by what has not begun."""
        limits = replace(LIMITS, max_count=1)
        assert begin(engine, tick(1), limits=limits) == Begun(1)
        self.withdraw(engine, tick(1))
        assert begin(engine, tick(1), limits=limits) == Begun(1)

    def test_as_many_are_executed_as_there_may_be(self, engine: Engine) -> None:
        """Of ticks that overlap, in whatever order they are withdrawn, and whatever was counted since."""
        limits = replace(LIMITS, max_count=3)
        for number in (1, 2):
            begin(engine, tick(number), limits=limits)
        for number in (1, 2):
            self.withdraw(engine, tick(number))
        assert [begin(engine, tick(number), limits=limits) for number in (1, 2)] == [Begun(1), Begun(2)]
        self.withdraw(engine, tick(1))
        assert [begin(engine, tick(number), limits=limits) for number in (1, 3)] == [Begun(2), Begun(3)]

    def test_another_trigger_s_count_stays(self, engine: Engine) -> None:
        """It was counted for the one that the job had then."""
        changed = Limits("every-3s")
        begin(engine, tick(1))
        begin(engine, tick(2), limits=changed)
        self.withdraw(engine, tick(1))
        assert begin(engine, tick(3), limits=changed) == Begun(2)

    @pytest.mark.databases("postgresql", "mysql")
    def test_a_commit_that_is_on_its_way_is_waited_for(self, engine: Engine) -> None:
        """The server may get it, or end with it, when it has been given up long since."""
        with engine.connect() as connection, ThreadPoolExecutor(1) as pool:
            assert ledger.begin(connection, tick(1), ALONE, LIMITS) == Begun(1)
            withdrawn = pool.submit(self.withdraw, engine, tick(1))
            with pytest.raises(TimeoutError):
                withdrawn.result(0.5)
            connection.commit()
            withdrawn.result()
        assert outcomes(engine, tick(1)) == []

    def test_what_is_made_again_is_to_be_made_again(self, engine: Engine) -> None:
        """It has been counted, and its job may have ended with it."""
        limits = replace(LIMITS, max_count=1)
        assert begin(engine, tick(1), limits=limits) == Begun(1)
        with transaction(engine) as connection:
            end_job(connection, JOB, "it was the last", LIMITS.trigger_slug)
        end(engine, tick(1), ABANDONED)
        for _ in range(2):
            assert begin(engine, tick(1), limits=limits) == Begun(1)
            self.withdraw(engine, tick(1))
            assert outcomes(engine, tick(1)) == [ABANDONED]

    def test_a_run_by_hand(self, engine: Engine) -> None:
        """It is counted for nothing."""
        begin(engine, tick(1))
        begin(engine, ASKED)
        self.withdraw(engine, ASKED)
        assert begin(engine, ASKED) == Begun(None)
        assert begin(engine, tick(2)) == Begun(2)

    @pytest.mark.parametrize("outcome", [None, ABANDONED, "Crashed"])
    def test_what_is_another_s_or_over_stays(self, engine: Engine, outcome: str | None) -> None:
        """A successor has said what came of it; and what was never entered is no fault."""
        begin(engine, tick(1))
        if outcome is not None:
            end(engine, tick(1), outcome)
        self.withdraw(engine, tick(1), ALONE if outcome else replace(ALONE, incarnation="another"))
        self.withdraw(engine, tick(2))
        self.withdraw(engine, tick(1, flow_run_id="another"))
        assert outcomes(engine, tick(1)) == [outcome]
        assert begin(engine, tick(3)) == Begun(2)


class TestSkipped:
    def test_what_has_begun_is_not(self, engine: Engine) -> None:
        """Whether it goes on or has ended; and what is skipped does not begin."""
        begin(engine, tick(1))
        begin(engine, tick(2))
        end(engine, tick(2), "Completed")
        with transaction(engine) as connection:
            said = [ledger.skip(connection, tick(number), ALONE, "too late") for number in (1, 2, 3, 3)]
        assert said == [False, False, True, True]
        assert isinstance(begin(engine, tick(3)), Taken)


class TestLeftBehind:
    def test_is_found_by_the_next_term(self, engine: Engine) -> None:
        """A successor sees what a former node was executing, and not what is its own or has ended."""
        hold(engine, TOKEN)
        for number in (1, 2):
            begin(engine, tick(number), owner(TOKEN))
        end(engine, tick(2), "Completed")
        with transaction(engine) as connection:
            assert ledger.interrupted(connection, [TOKEN]) == []
            assert [entry.key for entry in ledger.interrupted(connection, [NEXT])] == [tick(1).key]

    def test_without_a_group_is_found_when_the_node_is_gone(self, engine: Engine) -> None:
        """A node that shows life keeps what it executes; what one leaves that does not is found."""
        with transaction(engine) as connection:
            register(connection, Node("node-1", ALONE.incarnation, "host", 1), [], LEASE)
        begin(engine, tick(1))
        with transaction(engine) as connection:
            assert ledger.orphaned(connection, LEASE) == []
            # Its heartbeat is older than that.
            assert [entry.key for entry in ledger.orphaned(connection, -1)] == [tick(1).key]
            connection.execute(delete(schema.node))
            # It may not be registered yet.
            assert ledger.orphaned(connection, LEASE) == []

    def test_of_a_group_is_its_next_holders_alone(self, engine: Engine) -> None:
        """A holder sees nothing of other groups; nor is it taken for what a node without a group left."""
        hold(engine, TOKEN)
        begin(engine, tick(1), owner(TOKEN))
        rewind(engine, "taskadapter_ledger", "begun", 2 * LEASE + 1)
        with transaction(engine) as connection:
            assert ledger.interrupted(connection, [replace(NEXT, group_id="another")]) == []
            assert ledger.orphaned(connection, LEASE) == []

    def test_is_found_among_the_living(self, engine: Engine) -> None:
        """Of two nodes one lives; the other's is found once it is so old that it must have registered."""
        dead = Owner("node-2", "incarnation-2")
        with transaction(engine) as connection:
            register(connection, Node("node-1", ALONE.incarnation, "host", 1), [], LEASE)
        begin(engine, tick(1))
        begin(engine, tick(2), dead)
        begin(engine, tick(3), dead)
        end(engine, tick(3), "Completed")
        for seconds, keys in [(2 * LEASE - 20, []), (21, [tick(2).key])]:
            rewind(engine, "taskadapter_ledger", "begun", seconds)
            with transaction(engine) as connection:
                assert [entry.key for entry in ledger.orphaned(connection, LEASE)] == keys
        rewind(engine, "taskadapter_node", "last_seen", LEASE + 1)
        with transaction(engine) as connection:
            found = ledger.orphaned(connection, LEASE)
        assert sorted((entry.key, entry.incarnation, entry.job_id) for entry in found) == sorted(
            (tick(number).key, f"incarnation-{number}", JOB) for number in (1, 2)
        )

    def test_is_told_in_the_order_of_beginning(self, engine: Engine) -> None:
        """The oldest first, whatever its key."""
        hold(engine, TOKEN)
        for number in (2, 1):
            begin(engine, tick(number), owner(TOKEN))
            rewind(engine, "taskadapter_ledger", "begun", 5)
        with transaction(engine) as connection:
            found = ledger.interrupted(connection, [NEXT])
        assert [entry.key for entry in found] == [tick(number).key for number in (2, 1)]

    def test_is_forgotten_after_a_while(self, engine: Engine) -> None:
        """What ended long ago is removed, what goes on is not."""
        begin(engine, tick(1))
        begin(engine, tick(2))
        end(engine, tick(1), "Completed")
        for seconds, left in [(3600, 2), (-1, 1)]:
            with transaction(engine) as connection:
                ledger.prune(connection, seconds)
            assert len(outcomes(engine, tick(1), tick(2))) == left
        # How far each job is stays known, however long it has been paused.
        end(engine, tick(2), "Completed")
        begin(engine, tick(9, "another"))
        end(engine, tick(9, "another"), "Failed")
        with transaction(engine) as connection:
            ledger.prune(connection, -1)
        assert outcomes(engine, tick(2), tick(9, "another")) == ["Completed", "Failed"]

    def test_is_forgotten_bit_by_bit(self, engine: Engine) -> None:
        """However many jobs there are: a statement has room for so many keys only."""
        for number in range(1, 6):
            for job in (JOB, "another"):
                begin(engine, tick(number, job))
                end(engine, tick(number, job), "Completed")
        begin(engine, ASKED)
        end(engine, ASKED, "Completed")
        more, rounds = True, 0
        while more:
            with transaction(engine) as connection:
                more = ledger.prune(connection, -1, at_most=4)
            rounds += 1
        assert rounds == 3
        left = [tick(number, job) for number in range(1, 6) for job in (JOB, "another")]
        assert outcomes(engine, *left, ASKED) == ["Completed", "Completed"]


class TestDues:
    def test_are_those_that_need_not_run(self, engine: Engine) -> None:
        """Ticks that have begun or are skipped, the newest first; runs by hand are none."""
        for execution in (tick(2), tick(1), ASKED):
            begin(engine, execution)
        with transaction(engine) as connection:
            ledger.skip(connection, tick(3), ALONE, "too late")
            ledger.skip(connection, tick(2), ALONE, "too late")
            found = ledger.dues(connection, [JOB, "another"], 9)
            assert [due[17:19] for due in found.pop(JOB)] == ["03", "02", "01"]
            assert found == {}
            assert [due[17:19] for due in ledger.dues(connection, [JOB], 2)[JOB]] == ["03", "02"]
        assert outcomes(engine, tick(2)) + outcomes(engine, tick(3)) == [None, "Skipped"]
        assert isinstance(begin(engine, tick(3)), Taken)

    def test_are_told_of_many_jobs_at_once(self, engine: Engine) -> None:
        """However many there are, and each with its own."""
        names = [f"job-{number}" for number in range(2 * ledger.JOBS_AT_ONCE + 1)]
        for name in names[::50]:
            begin(engine, tick(1, name))
        with transaction(engine) as connection:
            assert sorted(ledger.dues(connection, names, 9)) == sorted(names[::50])
            assert ledger.dues(connection, [], 9) == {}
            assert progress.opened(connection, names) == {}

    def test_the_newest_are_told_first(self, engine: Engine) -> None:
        """By when they were due, whatever began first; runs by hand come last; as many as are wanted."""
        begin(engine, ASKED)
        for number in (3, 1, 2):
            begin(engine, tick(number))
        with transaction(engine) as connection:
            found = [past.entry.key for past in ledger.history(connection, JOB, 9)]
            assert ledger.history(connection, JOB, 2)[1].entry.key == found[1]
            assert len(ledger.history(connection, JOB, 2)) == 2
        assert found == [*(tick(number).key for number in (3, 2, 1)), ASKED.key]

    def test_what_has_run_is_told(self, engine: Engine) -> None:
        """Whoever looks back sees when and where, how late, how long, and why not."""
        begin(engine, tick(1))
        end(engine, tick(1), "Completed")
        rewind(engine, "taskadapter_ledger", "begun", 1000)
        rewind(engine, "taskadapter_ledger", "ended", 700)
        with transaction(engine) as connection:
            ledger.skip(connection, tick(2), ALONE, "too late")
            skipped, completed = ledger.history(connection, JOB, 9)
        assert (skipped.entry.outcome, skipped.reason, skipped.age) == ("Skipped", "too late", None)
        assert (completed.entry.task_id, completed.entry.number) == ("node-1", 1)
        assert (completed.entry.job_id, completed.entry.due) == (JOB, "2030-01-01 00:00:01.000000+00:00")
        assert completed.late is not None
        assert completed.age is not None
        assert 1000 <= completed.age < 1100
        assert completed.took is not None
        assert 299 <= completed.took < 400


class TestUpgrade:
    @pytest.mark.usefixtures("first_releases")
    def test_brings_the_first_releases_along(self, engine: Engine) -> None:
        """Their counts go on, and the runs that they were executing are found by the next term."""
        with engine.connect() as connection:
            assert schema.version(connection) == 1
            with pytest.raises(SchemaError, match="taskadapter db upgrade"):
                schema.create_missing(connection)
            assert schema.upgrade(connection) == (2, 3, 4)
            assert schema.upgrade(connection) == ()
            assert schema.create_missing(connection) == ()
        with transaction(engine) as connection:
            (entry,) = ledger.interrupted(connection, [NEXT])
        assert (entry.flow_run_id, entry.task_id, entry.term) == (RUN, "node-1", 7)
        assert count_one(engine) == 6

    def test_a_newer_release_is_left_alone(self, engine: Engine) -> None:
        """Tables that a newer release has made are not touched, and both versions are named."""
        with engine.begin() as connection:
            connection.execute(schema.schema_step.insert().values(step=99))
        with engine.connect() as connection, pytest.raises(SchemaError, match=r"version 99.*version 4"):
            schema.create_missing(connection)
        with engine.connect() as connection, pytest.raises(SchemaError, match="99"):
            schema.upgrade(connection)


@pytest.fixture
def first_releases(engine: Engine) -> Iterator[None]:
    """Leave the tables, a job's count and a run in flight of the releases before the ledger."""
    with engine.begin() as connection:
        for table in (schema.ledger, schema.schema_step, schema.job_progress):
            table.drop(connection)
        connection.execute(
            text(
                "CREATE TABLE taskadapter_job (job_id VARCHAR(36) PRIMARY KEY, trigger_slug VARCHAR(255) "
                "NOT NULL, run_count BIGINT NOT NULL, state TEXT, term BIGINT, updated TIMESTAMP NULL)"
            )
        )
        connection.execute(
            text(
                "CREATE TABLE taskadapter_run (flow_run_id VARCHAR(36) PRIMARY KEY, job_id VARCHAR(36), "
                "group_id VARCHAR(255) NOT NULL, task_id VARCHAR(255) NOT NULL, term BIGINT NOT NULL, "
                "started TIMESTAMP NULL, ended TIMESTAMP NULL, outcome VARCHAR(32))"
            )
        )
        job = (
            f"INSERT INTO taskadapter_job (job_id, trigger_slug, run_count) VALUES ('{JOB}', 'every-2s', 5)"
        )
        run = (
            "INSERT INTO taskadapter_run (flow_run_id, job_id, group_id, task_id, term) "
            f"VALUES ('{RUN}', '{JOB}', 'group', 'node-1', 7)"
        )
        for statement in (job, run):
            connection.execute(text(statement))
    yield
    with engine.begin() as connection:
        schema.metadata.drop_all(connection)
    with engine.connect() as connection:
        schema.create_missing(connection)
