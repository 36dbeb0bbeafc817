"""Listeners: what can be declared on one, and what is refused at once."""

import functools
import gc
import inspect
import re
from contextlib import nullcontext
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import Flow, task
from prefect.settings import (
    PREFECT_FLOWS_DEFAULT_RETRIES,
    PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS,
    temporary_settings,
)

from taskadapter import (
    ErrorPolicy,
    Job,
    JobId,
    Listener,
    RetryConfiguration,
    RetryStrategy,
    Service,
    TaskError,
    TaskPolicy,
    TriggerConfiguration,
    WarmBackupConfig,
)
from taskadapter.agent.program import Part
from taskadapter.declare.registry import listeners
from taskadapter.deploy import Put
from taskadapter.errors import DatabaseUnavailableError, DeclarationError
from taskadapter.listener import refuse_disagreement

RETRY = RetryConfiguration(max_attempts=1, retry_interval=1)
POLICY = TaskPolicy(error_policy=ErrorPolicy.CONTINUE)


class Counter(Service):
    """Counts."""

    i: int = 1

    def execute(self):
        self.i += 1


class AsyncCounter(Counter):
    async def execute(self):
        self.i += 1


class Stateless(Service):
    _cache: int = 0

    def execute(self): ...


class Greeting(Job):
    message: str = "hello"

    def execute(self): ...


def check_inbox():
    """Look for new mail."""


async def check_outbox(): ...


def listener(**changes):
    return Listener(**({"trigger": TriggerConfiguration(interval=2)} | changes))


def refused(call, *args, **kwargs):
    with pytest.raises(DeclarationError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- what a listener is made of ------------------------------------------------------------------


def test_defaults():
    """A listener needs a trigger; by default it has no group and the pool of the settings."""
    plain = listener()

    assert plain.group_id is None
    assert plain.work_pool == "taskadapter"
    assert plain.services == {}


def test_the_group_is_that_of_the_warm_backup():
    """The coordination group of a listener is the one that its warm backup names."""
    assert listener(warm_backup_config=WarmBackupConfig(group_id="g-1")).group_id == "g-1"


def test_the_work_pool(monkeypatch):
    """The keyword wins over the setting, which wins over the default."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_TASKADAPTER_WORK_POOL", "from-the-environment")

    assert listener().work_pool == "from-the-environment"
    assert listener(work_pool="its-own").work_pool == "its-own"


@pytest.mark.parametrize("name", ["retry_config", "task_policy"])
@pytest.mark.parametrize("place", ["trigger", "listener"])
def test_retries_and_policy_stand_in_either_place(name, place):
    """What stands in the trigger means the same as what stands beside it."""
    value = {"retry_config": RETRY, "task_policy": POLICY}[name]
    in_trigger, beside = ({name: value}, {}) if place == "trigger" else ({}, {name: value})

    one = listener(trigger=TriggerConfiguration(interval=2, **in_trigger), **beside)

    assert getattr(one.trigger, name) == value


@pytest.mark.parametrize("name", ["retry_config", "task_policy"])
def test_the_same_in_both_places_is_refused(name):
    """Retries or a policy in both places are refused by name, even when they are equal."""
    value = {"retry_config": RETRY, "task_policy": POLICY}[name]
    trigger = TriggerConfiguration(interval=2, **{name: value})

    message = refused(Listener, trigger=trigger, **{name: value})

    assert f"{name} stands in the listener and in its trigger" in message


def test_one_in_each_place_is_fine():
    """Retries in the trigger and a policy beside it do not contradict each other."""
    both = listener(trigger=TriggerConfiguration(interval=2, retry_config=RETRY), task_policy=POLICY)

    assert (both.trigger.retry_config, both.trigger.task_policy) == (RETRY, POLICY)


def test_camel_case_keywords():
    """Keywords and nested tables in Ballerina's spelling mean the same."""
    spelled = Listener(
        trigger={"interval": 2, "maxCount": 5},
        retryConfig={"maxAttempts": 3, "retryInterval": 1, "backoffStrategy": "EXPONENTIAL"},
        taskPolicy={"errorPolicy": "CONTINUE"},
        warmBackupConfig={"groupId": "g-1", "taskId": "node-1", "livenessCheckInterval": 6},
        workPool="nightly",
    )

    retries = RetryConfiguration(
        max_attempts=3, retry_interval=1, backoff_strategy=RetryStrategy.EXPONENTIAL
    )
    assert spelled.trigger == TriggerConfiguration(
        interval=2, max_count=5, retry_config=retries, task_policy=POLICY
    )
    assert spelled.configuration.warm_backup_config == WarmBackupConfig(
        group_id="g-1", task_id="node-1", liveness_check_interval=6
    )
    assert spelled.work_pool == "nightly"


def test_an_unknown_keyword_is_refused():
    """A misspelled keyword is refused, and the right one suggested."""
    message = refused(listener, retry_configs=RETRY)

    assert "retry_configs is not a field" in message
    assert "did you mean retry_config?" in message


def test_a_misspelt_field_is_not_missing_as_well():
    """The typo alone is told, by the name that the user knows."""
    trigger = TriggerConfiguration(interval=2)

    assert refused(Listener, triger=trigger) == (
        "Listener: triger is not a field of Listener; did you mean trigger?"
    )
    assert "trigger is required" in refused(Listener, retries=trigger)


def test_the_trigger_is_required():
    """A listener without a trigger is refused."""
    assert "trigger is required" in refused(Listener)


def test_an_interval_that_the_scheduler_cannot_fill():
    """Prefect's defaults fill 0.6 s; less is refused, naming the setting that allows it."""
    assert listener(trigger=TriggerConfiguration(interval=0.6)).trigger.interval == 0.6

    message = refused(Listener, trigger=TriggerConfiguration(interval=0.59))

    assert "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS" in message


def test_the_named_setting_allows_it():
    """With that setting raised, the same interval is accepted."""
    with temporary_settings({PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS: 600}):
        assert listener(trigger=TriggerConfiguration(interval=0.1)).trigger.interval == 0.1


# --- service --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Counter, AsyncCounter, Stateless, check_inbox, check_outbox])
def test_a_service_is_a_flow(source):
    """A Service class, a function and a coroutine function become a flow of the service's name."""
    on = listener()

    flow = on.service("job-1")(source)

    assert isinstance(flow, Flow)
    assert flow.name == "job-1"
    assert on.services["job-1"].flow is flow
    assert on.services["job-1"].source is source


@pytest.mark.parametrize(
    ("source", "is_async"),
    [(Counter, False), (AsyncCounter, True), (check_inbox, False), (check_outbox, True)],
)
def test_an_async_job_is_an_async_flow(source, is_async):
    """The flow is async where the job is."""
    assert listener().service("job-1")(source).isasync is is_async


def test_the_flow_has_the_jobs_docstring():
    """The flow's description is the docstring of what was declared."""
    assert listener().service("job-1")(Counter).description == "Counts."
    assert listener().service("job-1")(check_inbox).description == "Look for new mail."


@pytest.mark.parametrize("source", [Stateless, check_outbox])
def test_no_docstring_is_no_description(source):
    """A job without a docstring does not borrow that of Service."""
    assert not listener().service("job-1")(source).description


def test_prints_are_logged_unless_told_otherwise():
    """What a job prints is in the UI by default."""
    assert listener().service("job-1")(Counter).log_prints is True
    assert listener().attach(Counter(), "job-1").log_prints is True
    assert listener().service("job-1", log_prints=False)(Counter).log_prints is False


def test_options_are_those_of_a_flow():
    """Anything else that a Prefect flow takes may stand beside the name."""
    assert listener().service("job-1", timeout_seconds=5)(check_inbox).timeout_seconds == 5


def test_a_functions_optional_parameters_stay():
    """A function may have parameters with defaults; they are the flow's."""

    def report(days: int = 7): ...

    flow = listener().service("job-1")(report)

    assert [*flow.parameters.properties] == ["days"]


@pytest.mark.parametrize(
    "source",
    [
        Counter(),
        Greeting,
        Greeting(),
        Service,
        Counter.execute.__get__(Counter()),
        functools.partial(check_inbox),
        print,
        int,
        None,
        "check_inbox",
    ],
    ids=[
        "an instance of a service",
        "a job",
        "an instance of a job",
        "Service",
        "a method",
        "a partial function",
        "print",
        "int",
        "None",
        "a name",
    ],
)
def test_other_things_are_refused(source):
    """What is neither a Service class nor a function is refused, naming what can be declared."""
    message = refused(listener().service("job-1"), source)

    assert "'job-1'" in message
    assert "subclass of Service" in message


def test_a_flow_is_refused():
    """A Prefect flow, another service's too, is not declared again."""
    on = listener()
    flow = on.service("job-1")(check_inbox)

    message = refused(on.service("job-2"), flow)

    assert message.startswith("flow 'job-1' cannot be service 'job-2': it is a flow already; remove @flow")


def test_a_task_is_refused():
    message = refused(listener().service("job-1"), task(check_inbox))
    assert message.startswith("task 'check_inbox' cannot be service 'job-1': it is a task; remove @task")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 3}, "timeout= is no option of a flow; did you mean timeout_seconds?"),
        ({"zzz": 3}, "zzz= is no option of a flow; there are cache_result_in_memory, "),
        ({"timeout_seconds": "abc"}, "timeout_seconds='abc' must be a number of seconds, more than 0"),
        ({"timeout_seconds": -1}, "timeout_seconds=-1 must be a number of seconds, more than 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds=nan must be a number of seconds"),
        ({"on_failure": [5]}, "Prefect does not take one of on_failure; correct it: "),
    ],
)
@pytest.mark.parametrize("source", [check_inbox, Counter])
def test_an_option_that_no_flow_has(source, options, said):
    """It is told with the service's name, before Prefect would tell it in its own way."""

    def declare():
        return listener().service("job-1", **options)(source)

    assert refused(declare).startswith(f"service 'job-1': {said}")


def test_prefect_retries_no_run_of_a_listeners():
    """Also where a setting would have it retry all flows: the job would have ended by then."""
    on = listener()
    with temporary_settings({PREFECT_FLOWS_DEFAULT_RETRIES: 2}):
        on.service("job-1")(check_inbox)
    assert on.services["job-1"].flow.retries == 0


@pytest.mark.parametrize(
    "pool", ["", " ", "a/b", "a\n", "x" * 256, "a#b", "a?b", ".", "..", "prefect", "Prefect-jobs"]
)
def test_what_is_no_name_of_a_work_pool(pool):
    """Nor can anybody ask for a name that is cut short, or is a path, where it is part of an address."""
    assert "is no name for a work pool" in refused(listener, work_pool=pool)


@pytest.mark.parametrize("group", ["a#b", "a?b", ".", ".."])
def test_what_is_no_name_of_a_group(group):
    """It is the name of a work queue."""
    assert "not all blank nor only dots" in refused(WarmBackupConfig, group_id=group)


@pytest.mark.parametrize("given", [check_inbox, Counter(i=7), Counter, functools.partial(check_inbox)])
def test_no_message_has_the_repr_of_what_was_given(given):
    """It has an address, or a user's values."""
    on = listener()
    messages = [
        refused(on.service, given),
        refused(on.attach, "job-1", given),
        refused(on.service("job-1", log_prints=False), functools.partial(check_inbox)),
        refused(on.service, "job-1", retries=given),
        refused(JobId, given),
    ]
    with pytest.raises(TaskError) as caught:
        on.detach(given)

    assert [text for text in [*messages, str(caught.value)] if " at 0x" in text or "i=7" in text] == []


@pytest.mark.parametrize("shape", ["def", "async def"])
def test_a_generator_is_refused(shape):
    """Calling a generator function does nothing, so it cannot be a job."""
    namespace: dict[str, Any] = {}
    exec(f"{shape} numbers():\n    yield 1", namespace)

    assert "remove its yield" in refused(listener().service("job-1"), namespace["numbers"])


def test_a_function_that_needs_arguments_is_refused():
    """A tick brings no arguments: parameters need defaults."""

    def report(days, *, verbose=False): ...

    message = refused(listener().service("job-1"), report)

    assert "report(days, *, verbose=False)" in message
    assert "default" in message


def test_a_service_needs_defaults():
    """A class whose field has no value cannot start; the message names the field."""

    class Needy(Service):
        amount: int

        def execute(self): ...

    assert "amount is required" in refused(listener().service("job-1"), Needy)


@pytest.mark.parametrize("name", ["", " ", "a/b", "50%", "a&b", "<a>", None, 7, Counter])
def test_names_that_prefect_has_no_place_for(name):
    """A name must be one that a flow and a deployment can have; it is refused before anything is."""
    assert "name" in refused(listener().service, name)
    assert "name" in refused(listener().attach, Counter(), name)


@pytest.mark.parametrize("name", ["x", "a b", "nächtlich", "job.1:2_3"])
def test_names_that_prefect_accepts(name):
    """Every other name is fine."""
    assert listener().service(name)(check_inbox).name == name


def test_the_decorator_without_parentheses_is_refused():
    """`@listener.service` alone would lose the job without a word."""
    message = refused(listener().service, check_inbox)

    assert "needs a name in parentheses, not function check_inbox" in message
    assert 'service("a-name")' in message


def test_the_decorator_without_a_name_is_refused():
    """By the same sentence, and not by Python's about its arguments."""
    assert 'needs a name in parentheses; write service("a-name")' in refused(listener().service)
    assert "needs a name in parentheses; write" in refused(listener().attach, Counter())


def test_the_message_about_two_timings_says_who_has_which():
    """Group and place of each, and only what differs."""
    one, two = (
        listener(warm_backup_config=WarmBackupConfig(group_id=group, liveness_check_interval=lease))
        for group, lease in [("mine", 5), ("slow", 10)]
    )

    message = refused(refuse_disagreement, [one, listener(), two])

    places = (
        r"group 'mine' \(\S*test_listener.py, line \d+\) has liveness_check_interval=5, and group 'slow'"
    )
    assert re.search(places, message)
    assert "liveness_check_interval=10; declare the same for both" in message
    assert "heartbeat" not in message
    assert "Domain" not in message


@pytest.mark.parametrize("again", ["service", "attach"])
def test_a_name_twice_is_refused(again):
    """One listener has one service of a name, however it was declared."""
    on = listener()
    on.service("job-1")(Counter)

    with pytest.raises(DeclarationError, match="'job-1' is declared twice"):
        on.service("job-1")(check_inbox) if again == "service" else on.attach(Counter(), "job-1")

    assert on.services["job-1"].source is Counter


def test_two_listeners_may_declare_one_class():
    """Another listener, or another name, makes another job of the same class."""
    on = listener()

    assert on.service("job-1")(Counter) is not on.service("job-2")(Counter)
    assert listener().service("job-1")(Counter).name == "job-1"


# --- one writer for a state -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "max_concurrent"), [(Counter, 1), (Stateless, None), (check_inbox, None)]
)
def test_a_service_with_fields_runs_one_tick_at_a_time(source, max_concurrent):
    """What has a state has one writer; what has none may overlap."""
    on = listener()
    on.service("job-1")(source)

    policy = on.services["job-1"].trigger.task_policy
    assert (policy.max_concurrent if policy else None) == max_concurrent


def test_the_rest_of_the_policy_stays():
    """One writer changes neither the error policy nor the listener's own trigger."""
    on = listener(task_policy=POLICY)
    on.service("job-1")(Counter)
    on.attach(Counter(i=10), "job-2")

    expected = TaskPolicy(error_policy=ErrorPolicy.CONTINUE, max_concurrent=1)
    assert on.services["job-1"].trigger.task_policy == expected
    assert on.services["job-2"].trigger.task_policy == expected
    assert on.trigger.task_policy == POLICY


# --- attach and detach ----------------------------------------------------------------------------


def test_attach_keeps_the_values():
    """An attached instance's field values are the initial state on every node."""
    on = listener()

    flow = on.attach(Counter(i=10), "job-1")

    declared = on.services["job-1"]
    assert (flow.name, declared.source, declared.initial_state) == ("job-1", Counter, {"i": 10})


def test_a_decorated_class_has_no_initial_state():
    """Where a decorator declared it, the class itself has the values."""
    on = listener()
    on.service("job-1")(Counter)

    assert on.services["job-1"].initial_state is None


def test_what_is_attached_is_a_copy():
    """Changing the instance afterwards does not change what was declared."""
    on, counter = listener(), Counter(i=10)
    on.attach(counter, "job-1")

    counter.i = 99

    assert on.services["job-1"].initial_state == {"i": 10}


def test_a_class_inside_a_function_cannot_be_attached():
    """Nodes import the class of an attached service, so it must be importable."""

    class Local(Service):
        def execute(self): ...

    message = refused(listener().attach, Local(), "job-1")

    assert "Local" in message
    assert "Move it to module level" in message


@pytest.mark.parametrize(
    "thing",
    [Counter, Greeting(), check_inbox, None],
    ids=["a service", "an instance of a job", "a function", "None"],
)
def test_only_a_service_can_be_attached(thing):
    """A class, a job or a function is refused, naming what can be attached."""
    assert "an instance of a Service" in refused(listener().attach, thing, "job-1")


def test_detach():
    """A detached service is gone from the listener, and its name is free again."""
    on = listener()
    on.service("job-1")(Counter)

    on.detach("job-1")

    assert on.services == {}
    assert on.service("job-1")(check_inbox).name == "job-1"


def test_detach_of_the_instance():
    """As in Ballerina, the service itself names what is detached."""
    on, counter = listener(), Counter()
    on.attach(counter, "job-1")
    on.attach(Counter(), "job-2")

    on.detach(counter)

    assert [*on.services] == ["job-2"]


def test_detach_of_an_unknown_name():
    """What is not attached cannot be detached; the message names what is."""
    on = listener()
    on.service("job-1")(Counter)

    with pytest.raises(TaskError, match="no service 'job-2' is attached; name one of job-1"):
        on.detach("job-2")


UNAVAILABLE = DatabaseUnavailableError("it does not answer")


class Agent:
    """What a listener that is started has of its agent: which of its jobs that runs."""

    def __init__(self, *job_ids: UUID) -> None:
        self.runs = {*job_ids}

    async def call_off(self, job_id, _reason):
        self.runs.discard(job_id)

    async def look_again(self, part):
        self.runs |= part.job_ids


@pytest.fixture
def started(monkeypatch):
    """A listener that runs two services, until the test is over."""
    monkeypatch.setattr("taskadapter.deploy.api_client", lambda: nullcontext(None))
    monkeypatch.setattr(Listener, "aensure_work_pool", AsyncMock())
    on = listener()
    for name in ("job-1", "job-2"):
        on.service(name)(Counter)
    on._part = Part("default", None, {name: uuid4() for name in on.services})
    on._agent = Agent(*on._part.job_ids)
    yield on
    on._part.over.set_result(None)


def test_a_detach_that_fails_changes_nothing(started, monkeypatch):
    """The service is still attached, and runs on this node as before; the same call may be repeated."""
    before = started._agent.runs.copy()
    detaching = AsyncMock(side_effect=UNAVAILABLE)
    monkeypatch.setattr("taskadapter.listener.switches.detach", detaching)

    with pytest.raises(DatabaseUnavailableError):
        started.detach("job-1")
    assert [*started.services] == ["job-1", "job-2"]
    assert started._agent.runs == before

    detaching.side_effect = None
    started.detach("job-1")
    assert [*started.services] == [*started._part.jobs] == ["job-2"]


def test_an_attach_that_is_not_deployed(started, monkeypatch):
    """Nothing is attached, and the same call may be repeated."""
    monkeypatch.setattr("taskadapter.deploy.put", AsyncMock(side_effect=UNAVAILABLE))

    for _ in range(2):
        with pytest.raises(DatabaseUnavailableError):
            started.attach(Counter(), "job-3")
    assert [*started.services] == [*started._part.jobs] == ["job-1", "job-2"]


@pytest.mark.parametrize("fault", ["no first tick", "no database"])
def test_an_attach_that_fails_when_it_is_deployed(started, monkeypatch, fault):
    """Nodes run it by now: it is attached, and can be detached; the agent sees to what has failed."""
    job_id = uuid4()
    monkeypatch.setattr("taskadapter.deploy.put", AsyncMock(return_value=Put(job_id, False, True, True)))
    first_tick = AsyncMock(side_effect=httpx.ReadTimeout("") if fault == "no first tick" else None)
    monkeypatch.setattr("taskadapter.deploy.make_first_tick", first_tick)
    if fault == "no database":
        started._agent.look_again = AsyncMock(side_effect=UNAVAILABLE)

    started.attach(Counter(), "job-3")

    assert [*started.services] == ["job-1", "job-2", "job-3"]
    assert started._part.jobs["job-3"] == job_id


# --- start and stop, as far as they need no server ------------------------------------------------


def test_a_listener_without_a_service_does_not_start():
    """There must be something to run."""
    with pytest.raises(TaskError, match="no service to run"):
        listener().start()


def test_a_listener_without_a_server_does_not_start():
    """A temporary server, which Prefect's client starts where none is named, is not for an agent."""
    on = listener()
    on.service("job-1")(Counter)

    with pytest.raises(TaskError, match=r"PREFECT_API_URL is not set.*prefect server start"):
        on.start()


@pytest.mark.parametrize("stop", ["graceful_stop", "immediate_stop"])
def test_what_is_not_started_cannot_be_stopped(stop):
    """Stopping a listener that is not started is an error that says so."""
    with pytest.raises(TaskError, match="not started"):
        getattr(listener(), stop)()


# --- one program, one node -----------------------------------------------------------------------


def backup(**names):
    return WarmBackupConfig(group_id="g-1", **names)


def test_a_program_names_its_node_once():
    """Two listeners of one pool that name the node differently are refused; the message has both names."""
    one = listener(warm_backup_config=backup(task_id="node-1"))

    message = refused(listener, warm_backup_config=backup(task_id="node-2"))

    assert one.task_id == "node-1"
    assert "'node-1'" in message
    assert "'node-2'" in message
    assert "work_pool" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"warm_backup_config": backup(task_id="node-1")},
        {"warm_backup_config": backup()},
        {"warm_backup_config": None},
        {"warm_backup_config": backup(task_id="node-2"), "work_pool": "another"},
    ],
    ids=["the same", "the host's", "no group", "another pool"],
)
def test_what_agrees_about_the_node_is_declared(changes):
    """The same name, no name, or another name for another pool contradict nothing."""
    one = listener(warm_backup_config=backup(task_id="node-1"))

    assert listener(**changes).task_id in {"node-1", "node-2", None}
    assert one.task_id == "node-1"


def test_a_listener_that_is_gone_is_no_part_of_the_program():
    """What a notebook declares again may have another name for the node."""
    one = listener(warm_backup_config=backup(task_id="node-1"))
    del one
    gc.collect()

    assert listener(warm_backup_config=backup(task_id="node-2")).task_id == "node-2"


def test_a_listener_nobody_keeps_is_still_there():
    """A flow module may declare a job without giving the listener a name."""
    name = "kept-by-nobody"
    listener().service(name)(check_inbox)
    gc.collect()

    assert [one for one in listeners if name in one.services] != []


def test_what_was_never_started_cannot_be_waited_for():
    """It would wait for ever."""
    with pytest.raises(TaskError, match="not started"):
        listener().wait()


def test_what_was_never_started_has_not_failed():
    """Nothing has gone wrong, and nothing runs."""
    on = listener()

    assert (on.failed, on.is_started) == (None, False)


def test_the_signature_that_users_see():
    """The public methods are those of the design, by name."""
    public = {name for name, _ in inspect.getmembers(Listener, inspect.isfunction) if name[0] != "_"}

    assert public == {
        "aattach",
        "adetach",
        "aensure_work_pool",
        "agraceful_stop",
        "aimmediate_stop",
        "astart",
        "attach",
        "await_",
        "detach",
        "ensure_work_pool",
        "graceful_stop",
        "immediate_stop",
        "service",
        "start",
        "wait",
    }


@pytest.mark.parametrize("option", ["retries", "retry_delay_seconds"])
def test_prefects_own_retries_are_refused(option):
    """Two kinds of retries of one job would multiply: the listener's is the one to declare."""
    with pytest.raises(DeclarationError, match=f"{option}=2.*RetryConfiguration"):
        Listener(trigger=TriggerConfiguration(interval=60)).service("job", **{option: 2})
