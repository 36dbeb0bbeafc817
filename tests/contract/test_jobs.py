"""The progress of jobs, on every database."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule
from sqlalchemy import Engine, select, update
from sqlalchemy.pool import QueuePool

from taskadapter.agent.switches import carry_over, reading_of
from taskadapter.coordination import store
from taskadapter.coordination.engines import open_engine, transaction
from taskadapter.coordination.executions import Switches
from taskadapter.coordination.messages import PoolKey, Token
from taskadapter.coordination.progress import (
    end,
    load_state,
    opened,
    pause,
    prune,
    read,
    require_token,
    restart,
    resumed,
    save_state,
    see,
    seen,
)
from taskadapter.coordination.schema import job_progress, metadata
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.errors import DatabaseUnavailableError, TaskError, TokenLostError
from taskadapter.rules import ticks
from tests.contract.entering import JOB, TOKEN, Row, count_one, hold, row_of, take_over

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Connection


def save_state_fenced(connection: Connection, job_id: str, state: dict[str, int], token: Token) -> None:
    """Save as the end of a run does: in the transaction that has checked the token."""
    require_token(connection, token)
    save_state(connection, job_id, state, term=token.term)


class TestState:
    def test_is_none_at_first(self, engine: Engine) -> None:
        """A job that never saved has no state, whether it has run or not."""
        with transaction(engine) as connection:
            assert load_state(connection, JOB) is None
        count_one(engine)
        with transaction(engine) as connection:
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
            pytest.raises(TaskError, match="repair the row"),
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
            taken.result(timeout=60)


def write_late(url: str, freeze: Callable[[], None]) -> None:
    with store._transaction(url) as connection:
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
        write_late(prepared_url, lambda: pool.submit(take_over, engine).result(timeout=60))
    store._engine(prepared_url).dispose()
    with transaction(engine) as connection:
        assert load_state(connection, JOB) is None


def read_from_prefect(*, paused: bool, on: bool, second: int) -> DeploymentResponse:
    """Return a job as Prefect has it, changed last in that second."""
    trigger = TriggerConfiguration(interval=60)
    updated = datetime(2030, 1, 1, 12, 0, second, tzinfo=UTC)
    schedule = DeploymentSchedule(
        id=UUID(int=2),
        deployment_id=UUID(JOB),
        schedule=IntervalSchedule(interval=timedelta(seconds=60), anchor_date=updated.replace(second=0)),
        slug=ticks.slug(trigger),
        active=on,
    )
    return DeploymentResponse(
        id=UUID(JOB),
        name="job",
        flow_id=UUID(int=3),
        paused=paused,
        updated=updated,
        schedules=[schedule],
        job_variables={"trigger": trigger.model_dump(mode="json")},
        labels={},
    )


def test_what_is_switched_in_prefect_between_two_visits_is_carried_over(
    prepared_url: str, engine: Engine
) -> None:
    """Also where an agent has seen it so before, and one of our commands has switched it back since."""

    def visit(second: int) -> Row | None:
        found = read_from_prefect(paused=False, on=True, second=second)
        asyncio.run(carry_over(prepared_url, [found]))
        with transaction(engine) as connection:
            return row_of(connection, JOB)

    def command(second: int, *, paused: bool = False, on: bool = True) -> None:
        """Switch the row, then Prefect, and take note of that, as our commands do."""
        store.pause(prepared_url, UUID(JOB), paused=paused)
        store.end_job(prepared_url, UUID(JOB), None if on else "it was unscheduled")
        found = read_from_prefect(paused=paused, on=on, second=second)
        store.see(prepared_url, [reading_of(found)])

    assert visit(0) == (False, None)
    command(1, paused=True)
    assert visit(0) == (True, None), "an answer from before that"
    assert visit(2) == (False, None)
    command(3, on=False)
    assert visit(4) == (False, None)


class TestSwitches:
    def test_a_paused_job_waits(self, engine: Engine) -> None:
        """Nothing of a paused job begins, before or after its first tick, until it is resumed."""
        for _ in range(2):
            with transaction(engine) as connection:
                pause(connection, JOB, paused=True)
            assert count_one(engine) == "Paused"
            with transaction(engine) as connection:
                assert resumed(connection, [JOB, "other"]) == set()
                pause(connection, JOB, paused=False)
                assert resumed(connection, [JOB, "other"]) == {JOB}
            assert isinstance(count_one(engine), int)

    def test_a_job_ends_with_its_trigger(self, engine: Engine) -> None:
        """A job that is over with one trigger goes on with another; its count stays."""
        assert count_one(engine) == 1
        with transaction(engine) as connection:
            end(connection, JOB, "it failed", "every-2s")
        assert count_one(engine) == "Ended"
        assert count_one(engine, "every-3s") == 1

    def test_a_job_ends_whatever_its_trigger(self, engine: Engine) -> None:
        """An end that names no trigger is one for all, until it is taken back."""
        assert count_one(engine) == 1
        with transaction(engine) as connection:
            end(connection, JOB, "unscheduled")
        assert [count_one(engine, slug) for slug in ("every-2s", "every-3s")] == ["Ended"] * 2
        with transaction(engine) as connection:
            end(connection, JOB, None)
        assert count_one(engine) == 2

    def test_a_job_that_is_over_is_started_again(self, engine: Engine) -> None:
        """Its count goes on, or begins anew; its state, and whether it is paused, stay."""
        assert [count_one(engine), count_one(engine)] == [1, 2]
        for anew, number in [(False, 3), (True, 1)]:
            with transaction(engine) as connection:
                save_state(connection, JOB, {"i": number})
                end(connection, JOB, "it failed", "every-2s")
                assert read(connection, {JOB: "every-2s", "other": ""})[JOB].ended == "it failed"
                restart(connection, JOB, "every-2s", anew=anew)
                assert read(connection, {JOB: "every-2s"})[JOB].ended is None
                assert load_state(connection, JOB) == {"i": number}
            assert count_one(engine) == number

    def test_what_is_over_is_forgotten_after_a_while(self, engine: Engine) -> None:
        """The rows of jobs that are over go; of those that are not, or with one trigger only, none."""
        with transaction(engine) as connection:
            for job_id, reason, slug in [("a", "gone", None), ("b", "failed", "s"), ("c", None, None)]:
                end(connection, job_id, reason, slug)
            prune(connection, 3600)
            assert row_of(connection, "a") is not None
            prune(connection, -1)
            assert [row_of(connection, job_id) is None for job_id in "abc"] == [True, False, False]

    def test_what_changes_in_prefect_is_carried_over(self, engine: Engine) -> None:
        """A switch that somebody turns in Prefect turns the job's."""
        assert look(engine, "1", paused=True) == Row(paused=True, ended=None)
        assert look(engine, "2", paused=False) == Row(paused=False, ended=None)
        assert look(engine, "3", on=False) == Row(paused=False, ended="its schedule was switched off")
        assert look(engine, "4") == Row(paused=False, ended=None)
        with transaction(engine) as connection:
            assert seen(connection, [JOB, "other"]) == {JOB: Switches(), "other": Switches()}

    def test_what_has_not_changed_there_is_not(self, engine: Engine) -> None:
        """A job whose row has been switched first stays so until Prefect has followed."""
        with transaction(engine) as connection:
            pause(connection, JOB, paused=True)
            end(connection, JOB, "failed", "every-2s")
        assert look(engine, "1") == Row(paused=True, ended="failed")
        assert look(engine, "2", paused=True, on=False) == Row(paused=True, ended="failed")
        assert look(engine, "3") == Row(paused=False, ended=None)

    def test_why_a_job_is_over_is_known_better(self, engine: Engine) -> None:
        """That its schedule is switched off then changes neither the reason nor for which trigger it is."""
        with transaction(engine) as connection:
            end(connection, JOB, "unscheduled")
        assert look(engine, "1", on=False) == Row(paused=False, ended="unscheduled")
        assert count_one(engine, "every-3s") == "Ended"
        with transaction(engine) as connection:
            prune(connection, -1)
            assert row_of(connection, JOB) is None

    def test_an_end_with_another_trigger_is_no_reason(self, engine: Engine) -> None:
        """A job that went on with a new trigger is over as its schedule was switched off."""
        with transaction(engine) as connection:
            end(connection, JOB, "it failed", "every-3s")
        assert look(engine, "1", on=False) == Row(paused=False, ended="its schedule was switched off")
        assert count_one(engine) == "Ended"

    @pytest.mark.parametrize("was_on", [True, False])
    def test_what_is_detached_is_not_forgotten(self, engine: Engine, was_on: bool) -> None:
        """It ends with its trigger, over before or not: its deployment stays, and so does its state."""
        look(engine, "1", on=was_on)
        with transaction(engine) as connection:
            save_state(connection, JOB, {"i": 1})
            end(connection, JOB, "detached", "every-2s")
        assert look(engine, "2", on=False) == Row(paused=False, ended="detached")
        with transaction(engine) as connection:
            prune(connection, -1)
            assert load_state(connection, JOB) == {"i": 1}
        assert look(engine, "3") == Row(paused=False, ended=None)

    def test_an_older_reading_changes_nothing(self, engine: Engine) -> None:
        """What was read before a change, and comes after it, is no change back."""
        assert look(engine, "2", paused=True) == Row(paused=True, ended=None)
        assert look(engine, "1", paused=False) == Row(paused=True, ended=None)

    def test_since_when_ticks_are_owed(self, engine: Engine) -> None:
        """That is since a schedule was switched on again, or edited; not since it was deployed again."""

        for updated, on, plan, expected in [
            ("1", True, "a hourly", None),
            ("2", True, "a hourly", None),
            ("3", False, "", None),
            ("4", True, "a hourly", "4"),
            ("5", True, "a daily", "5"),
            ("6", True, "b hourly", "5"),
        ]:
            look(engine, updated, on=on, plan=plan)
            with transaction(engine) as connection:
                assert opened(connection, [JOB]).get(JOB) == expected


def look(
    engine: Engine, updated: str, *, paused: bool = False, on: bool = True, plan: str = ""
) -> Row | None:
    with transaction(engine) as connection:
        see(connection, JOB, "every-2s", Switches(paused, on, plan), updated)
        return row_of(connection, JOB)


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


def test_a_rehearsal_leaves_nothing(prepared_url: str, engine: Engine) -> None:
    """What is found out about the server is there for all processes; no row, and no connection, stays."""
    store.rehearse(prepared_url)
    ours: Any = store._engine(prepared_url)

    assert ours.dialect.server_version_info > (0,)
    if isinstance(ours.pool, QueuePool):  # of a file none is kept
        assert ours.pool.checkedout() == ours.pool.checkedin() == 0
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            if table.name != "taskadapter_schema":
                assert connection.execute(select(table)).all() == [], table.name
    ours.dispose()


@pytest.mark.databases("sqlite")
def test_a_file_that_came_back_without_its_log(tmp_path: Path) -> None:
    """Somebody has moved the file alone, and back: no idle connection keeps a process to the old log."""
    file = tmp_path / "tasks.db"
    url = f"sqlite:///{file}"
    store.claim_groups(url, PoolKey("pool"), {"group"})
    away = file.rename(tmp_path / "away")
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE other (x)")  # the log is not this file's, and is removed
    away.rename(file)
    with transaction(open_engine(url)) as connection:
        metadata.create_all(connection)
    store.claim_groups(url, PoolKey("pool"), {"group"})
