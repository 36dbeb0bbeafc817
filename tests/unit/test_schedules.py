"""A trigger in Prefect's terms: slugs, schedules, the shortest interval, and the verdict on a tick."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID, uuid4

import pendulum
import pytest
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import get_current_settings

from taskadapter.declare.triggers import RetryConfiguration, TaskPolicy, TriggerConfiguration, WaitingPolicy
from taskadapter.errors import DeclarationError
from taskadapter.rules.ticks import (
    Verdict,
    between,
    check_interval,
    exhausted,
    in_utc,
    is_slug,
    is_tick,
    judge,
    run_name,
    schedule,
    skipped,
    slug,
    tick_key,
    tick_of,
)

NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
LATER = NOON + timedelta(hours=1)


def trigger(**changes):
    return TriggerConfiguration(**({"interval": 2} | changes))


# --- slug -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "readable"),
    [
        ({}, "every-2s"),
        ({"interval": 2.5}, "every-2-5s"),
        ({"interval": 0.6}, "every-0-6s"),
        ({"interval": timedelta(hours=1)}, "every-3600s"),
        ({"max_count": 5}, "every-2s-5-times"),
    ],
)
def test_a_slug_reads_as_what_it_says(changes, readable):
    """A slug begins with the interval and the count in words, and ends with eight hex digits."""
    words, _, digest = slug(trigger(**changes)).rpartition("-")

    assert words == readable
    assert len(digest) == 8
    assert set(digest) <= set("0123456789abcdef")


@pytest.mark.parametrize("interval", [0.7, 2, 86400 * 365, 1e6 + 0.5, 3e9, 1 / 3])
def test_prefect_accepts_the_slug(interval):
    """Every slug is one that Prefect's API accepts for a schedule."""
    every = IntervalSchedule(interval=timedelta(seconds=interval))

    accepted = DeploymentScheduleCreate(schedule=every, slug=slug(trigger(interval=interval)))

    assert accepted.slug == slug(trigger(interval=interval))


def test_equal_declarations_have_one_slug():
    """However a declaration spells its values, its slug is the same: moments count, not zones."""
    one = trigger(interval=timedelta(seconds=2), start_time=NOON, end_time="2030-01-01T14:00:00Z")
    same = trigger(
        interval=2.0,
        start_time=NOON.astimezone(timezone(timedelta(hours=2))),
        end_time="2030-01-01T16:00:00+02:00",
    )

    assert slug(one) == slug(same)


def test_retries_and_policy_are_no_part_of_a_slug():
    """Other retries or another policy leave the schedule, and with it the count, as it is."""
    changed = trigger(
        retry_config=RetryConfiguration(max_attempts=1, retry_interval=1),
        task_policy=TaskPolicy(max_concurrent=1),
    )

    assert slug(trigger()) == slug(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"interval": 2.000001},
        {"max_count": 5},
        {"start_time": NOON},
        {"end_time": NOON},
    ],
)
def test_a_changed_trigger_has_another_slug(changes):
    """Another interval, count, start or end is another schedule, however small the change."""
    assert slug(trigger()) != slug(trigger(**changes))


def test_start_and_end_are_told_apart():
    """A time as the start and the same time as the end are two different triggers."""
    assert slug(trigger(start_time=NOON)) != slug(trigger(end_time=NOON))


@pytest.mark.parametrize("interval", [0.7, 2, 86400 * 365, 1e6 + 0.5, 3e9, 1 / 3])
@pytest.mark.parametrize("max_count", [-1, 1, 10**6])
def test_a_slug_is_recognized_as_ours(interval, max_count):
    """Whatever its numbers, a slug that we gave is told from those of others."""
    assert is_slug(slug(trigger(interval=interval, max_count=max_count)))


@pytest.mark.parametrize("text", [None, "", "every-2s", "every-day", "by-hand", "x-every-2s-2f196da6"])
def test_other_slugs_are_not_ours(text):
    """A schedule without a slug, or with one that somebody made up, is not ours."""
    assert not is_slug(text)


# --- schedule -------------------------------------------------------------------------------------


def test_a_schedule_in_the_form_of_prefect_yaml():
    """The schedule has the interval in seconds, an aware anchor, UTC, and its slug."""
    assert schedule(trigger(interval=2.5), NOON) == {
        "interval": 2.5,
        "anchor_date": "2030-01-01T12:00:00+00:00",
        "timezone": "UTC",
        "slug": slug(trigger(interval=2.5)),
    }


def test_a_template_stays_a_template():
    """An anchor that a build step fills in is passed on as it is."""
    assert schedule(trigger(), "{{ first-tick.date }}")["anchor_date"] == "{{ first-tick.date }}"


def test_prefect_loads_the_schedule():
    """Prefect reads from it the same interval and the same moment."""
    given = schedule(trigger(interval=0.75), NOON)
    del given["slug"]

    loaded = IntervalSchedule.model_validate(given)

    assert loaded.interval == timedelta(seconds=0.75)
    assert loaded.anchor_date == NOON


# --- ticks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5, minutes=30))])
def test_a_ticks_key_is_that_of_prefects_scheduler(zone):
    """The key names job, schedule and moment, the latter in UTC with as many digits as it has."""
    job = UUID(int=1)

    assert tick_key(job, UUID(int=2), NOON.astimezone(zone)) == (
        "scheduled 00000000-0000-0000-0000-000000000001 00000000-0000-0000-0000-000000000002 "
        "2030-01-01 12:00:00+00:00"
    )
    assert tick_key(job, "once", NOON + MICROSECOND).endswith(" once 2030-01-01 12:00:00.000001+00:00")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"auto_scheduled": True}, True),
        ({"idempotency_key": tick_key(UUID(int=1), "once", NOON)}, True),
        ({"idempotency_key": "by-hand"}, False),
        ({}, False),
        ({"auto_scheduled": True, "empirical_policy": {"retry_type": "in_process"}}, True),
        ({"auto_scheduled": True, "empirical_policy": {"retry_type": "reschedule"}}, False),
    ],
)
def test_a_tick_is_told_from_a_run_that_somebody_asks_for(run, expected):
    """Ticks are what Prefect's scheduler has planned, and what has the key of one; not the UI's "Retry"."""
    assert is_tick(FlowRun(flow_id=uuid4(), **run)) is expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"auto_scheduled": True, "expected_start_time": NOON}, NOON),
        ({"idempotency_key": tick_key(UUID(int=1), "once", NOON), "expected_start_time": LATER}, NOON),
        ({"auto_scheduled": True, "idempotency_key": "a b c d", "expected_start_time": LATER}, LATER),
        ({"auto_scheduled": True}, None),
        ({"expected_start_time": NOON}, None),
    ],
    ids=["planned", "put off", "a key of another form", "without a time", "by hand"],
)
def test_a_tick_is_of_the_moment_that_its_key_says(run, expected):
    """Whenever the run itself is to start by now; one that somebody asks for is of none."""
    assert tick_of(FlowRun(flow_id=uuid4(), **run)) == expected


# --- the shortest interval ------------------------------------------------------------------------


def test_the_least_interval_is_accepted():
    """With Prefect's defaults, 100 runs in 60 s, an interval of 0.6 s is filled without a hole."""
    check_interval(0.6, max_runs=100, loop_seconds=60)


def test_less_than_the_least_interval_is_refused():
    """A little less than 0.6 s is refused; the message names value, limit and setting."""
    with pytest.raises(DeclarationError) as refused:
        check_interval(0.59, max_runs=100, loop_seconds=60)

    message = str(refused.value)
    assert "interval 0.59 s" in message
    assert "0.6 s is the least" in message
    assert message.endswith("raise PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS on the server and here.")


def test_raised_settings_allow_a_shorter_interval():
    """The limit follows the settings: 600 runs in 60 s allow 0.1 s."""
    check_interval(0.1, max_runs=600, loop_seconds=60)


def test_the_defaults_are_prefects():
    """The numbers that the tests above work with are those of the installed Prefect."""
    scheduler = get_current_settings().server.services.scheduler

    assert (scheduler.max_runs, scheduler.loop_seconds) == (100, 60)


# --- the verdict on a tick ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("due", "verdict"),
    [(NOON - MICROSECOND, Verdict.EARLY), (NOON, Verdict.RUN), (NOON + MICROSECOND, Verdict.RUN)],
)
def test_start(due, verdict):
    """Nothing runs before the start; the tick at the start does."""
    assert judge(trigger(start_time=NOON), due).verdict is verdict


@pytest.mark.parametrize(
    ("due", "verdict"),
    [(NOON - MICROSECOND, Verdict.RUN), (NOON, Verdict.RUN), (NOON + MICROSECOND, Verdict.END)],
)
def test_end(due, verdict):
    """The tick at the end runs; there is none after it."""
    assert judge(trigger(end_time=NOON), due).verdict is verdict


@pytest.mark.parametrize("policy", [WaitingPolicy.IGNORE, WaitingPolicy.LOG_AND_IGNORE])
@pytest.mark.parametrize(("late", "verdict"), [(5 * SECOND, Verdict.RUN), (5.001 * SECOND, Verdict.SKIP)])
def test_a_late_tick_is_skipped_where_the_policy_ignores_it(policy, late, verdict):
    """A tick may be as late as the waiting time, and no later."""
    ignoring = trigger(task_policy=TaskPolicy(waiting_policy=policy))

    assert judge(ignoring, NOON, now=NOON + late, waiting_time=5).verdict is verdict


@pytest.mark.parametrize(
    ("policy", "verdict"),
    [
        (WaitingPolicy.WAIT, Verdict.RUN),
        (WaitingPolicy.IGNORE, Verdict.SKIP),
        (WaitingPolicy.LOG_AND_IGNORE, Verdict.SKIP),
    ],
)
def test_a_tick_that_fell_into_a_pause_is_made_up_for_only_by_waiting(policy, verdict):
    """However little late it is, a policy that ignores missed ticks ignores it."""
    job = trigger(task_policy=TaskPolicy(waiting_policy=policy))

    judgement = judge(job, NOON, now=NOON + SECOND, paused=True)
    assert judgement.verdict is verdict
    skipped_because = f"the job was paused then, and {policy} makes up for nothing"
    assert judgement.reason == ("" if verdict is Verdict.RUN else skipped_because)


@pytest.mark.parametrize("policy", list(WaitingPolicy))
def test_what_has_begun_before_is_never_too_late(policy):
    """A tick that is run again, because its node was lost, did start in time."""
    job = trigger(task_policy=TaskPolicy(waiting_policy=policy, on_takeover="rerun"))

    assert judge(job, NOON, now=NOON + timedelta(days=1), begun=True).verdict is Verdict.RUN


def test_a_late_tick_waits_by_default():
    """Under WAIT a tick is never too late."""
    assert judge(trigger(), NOON, now=NOON + timedelta(days=365)).verdict is Verdict.RUN


def test_the_reason_for_a_skip_says_how_late_and_by_what_policy():
    """Who reads it in the UI learns the lateness, the policy and the time that was allowed."""
    ignoring = trigger(task_policy=TaskPolicy(waiting_policy=WaitingPolicy.IGNORE))

    reason = judge(ignoring, NOON, now=NOON + 12 * SECOND, waiting_time=7).reason
    assert reason == "it could start 12.0 s late, and IGNORE allows 7 s"


def test_zones_do_not_matter_to_a_verdict():
    """A tick is compared with start and end as a moment."""
    bounded = trigger(start_time="2030-01-01T14:00:00+02:00", end_time="2030-01-01T10:00:01-02:00")

    assert judge(bounded, NOON - SECOND).verdict is Verdict.EARLY
    assert judge(bounded, NOON).verdict is Verdict.RUN
    assert judge(bounded, NOON + SECOND).verdict is Verdict.RUN
    assert judge(bounded, NOON + 2 * SECOND).verdict is Verdict.END


def test_a_reason_is_given_for_what_does_not_run():
    """The reason names the bound that was reached; a tick that runs needs none."""
    bounded = trigger(start_time=NOON, end_time=NOON + SECOND)

    assert judge(bounded, NOON - SECOND).reason == "before the start, 2030-01-01T12:00:00+00:00"
    assert judge(bounded, NOON).reason == ""
    assert judge(bounded, NOON + 2 * SECOND).reason == "the schedule ended at 2030-01-01T12:00:01+00:00"


def test_one_run_and_several():
    """The reason counts in English."""
    assert exhausted(1) == "the maximum of 1 run is reached"
    assert exhausted(2) == "the maximum of 2 runs is reached"


@pytest.mark.parametrize("zone", [UTC, "UTC", "Asia/Colombo"])
def test_ticks_of_pendulums_datetimes(zone):
    """Anchor and limits as Prefect's client returns them give the same ticks, plain and in UTC."""
    moment = (
        pendulum.instance(NOON.astimezone(UTC))
        if zone is UTC
        else pendulum.instance(NOON).in_timezone(zone)
    )
    found = list(between(moment, 2, after=moment + 3 * SECOND, until=moment + 8 * SECOND))

    assert found == [NOON + n * SECOND for n in (4, 6, 8)]
    assert all(type(tick) is datetime and tick.tzinfo is UTC for tick in found)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Colombo"])
def test_a_moment_in_utc_is_the_same_moment(zone):
    """Of a pendulum datetime it is a plain one, with which Python computes as with any other."""
    moment = in_utc(pendulum.instance(NOON).in_timezone(zone).astimezone(UTC))

    assert type(moment) is datetime
    assert moment - MICROSECOND == NOON - MICROSECOND


def test_a_skipped_run_says_so_by_its_name_and_why():
    """Prefect has no state of that kind: it is Cancelled, with a name of its own."""
    state = skipped("it is late")

    assert (state.type, state.name, state.message) == (
        StateType.CANCELLED,
        "Skipped",
        "Skipped: it is late.",
    )


@pytest.mark.parametrize(
    ("microsecond", "name"), [(0, "job 2030-01-01T11:00:00Z"), (887544, "job 2030-01-01T11:00:00.887Z")]
)
def test_the_name_of_a_run_is_its_job_and_its_time_in_utc(microsecond, name):
    """Milliseconds where there are some; whatever kind of time it is."""
    due = datetime(2030, 1, 1, 12, microsecond=microsecond, tzinfo=timezone(timedelta(hours=1)))

    assert run_name("job", due) == name
    assert run_name("job", pendulum.instance(due)) == name
