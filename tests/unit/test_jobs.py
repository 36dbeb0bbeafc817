"""Jobs and services: what a class may declare, and how state is saved and loaded."""

import json
import threading
from abc import abstractmethod
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from pydantic import Field, PrivateAttr, Secret, SecretStr

from taskadapter.declare.jobs import Job, JobId, Service, dump_state, load_state
from taskadapter.declare.triggers import PostgresqlConfig
from taskadapter.errors import DeclarationError

LOCK: Any = type(threading.Lock())


class Greeting(Job):
    msg: str

    def execute(self):
        return self.msg


class Counter(Service):
    i: int = 1
    seen: list[datetime] = Field(default_factory=list)
    extra: Any = None
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    async def execute(self):
        self.i += 1


def declare(base, annotation, **body):
    """Declare a class with one field, x."""
    body = {"execute": lambda _self: None, "__annotations__": {"x": annotation}} | body
    return type(base)("Declared", (base,), body | {"__module__": __name__})


def message(call, *args, **kwargs):
    with pytest.raises(DeclarationError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_job_fields_are_inputs():
    """A job takes its fields by name and is frozen."""
    job = Greeting(msg="Hi")
    assert job.execute() == "Hi"
    with pytest.raises(DeclarationError, match="msg cannot be assigned, Greeting is frozen"):
        job.msg = "Ho"  # type: ignore[misc]


def test_job_rejects_bad_inputs():
    """A wrong, missing or unknown input is named, and fields have no aliases."""
    assert "Greeting: msg=3: must be a valid string, not int" in message(Greeting, msg=3)
    assert "msg is required" in message(Greeting)
    assert "mesg is not a field of Greeting; did you mean msg?" in message(Greeting, msg="Hi", mesg="Hi")


@pytest.mark.parametrize("base", [Job, Service])
def test_execute_is_required(base):
    """A class without execute is refused when it is declared."""
    text = message(type(base), "Idle", (base,), {"__module__": __name__})
    assert "Idle has no execute; define `def execute(self)`" in text


def test_abstract_bases():
    """An intermediate base may leave execute, or what execute needs, to its subclasses."""

    class Base(Job):
        @abstractmethod
        def execute(self): ...

    class Template(Job):
        def execute(self):
            return self.fetch()

        @abstractmethod
        def fetch(self): ...

    class Fetching(Template):
        def fetch(self):
            return 3

    assert Fetching().execute() == 3
    with pytest.raises(TypeError, match="abstract"):
        Template()  # type: ignore[abstract]
    assert "Idle has no execute" in message(type(Job), "Idle", (Base,), {"__module__": __name__})


def test_execute_takes_no_arguments():
    """A required parameter of execute is refused, an optional one is not."""

    def optional(self, n=1, *args, **kwargs): ...

    def required(self, n): ...

    declare(Job, int, execute=optional)
    declare(Job, int, execute=staticmethod(lambda: None))
    declare(Job, int, execute=classmethod(lambda _cls: None))
    text = message(declare, Job, int, execute=required)
    assert "Declared.execute(self, n) is called without arguments" in text
    assert "make its parameters fields" in text


@pytest.mark.parametrize("value", [5, [], "word"])
def test_a_field_has_a_type(value):
    """Pydantic refuses one without before there is a class; the message says what to write."""
    body = {"execute": lambda _self: None, "i": value, "__module__": __name__}
    text = message(type(Service), "Untyped", (Service,), body)
    assert text.startswith("Untyped.i = ")
    assert f"write `i: {type(value).__name__} = ...` for a field" in text


def test_what_pydantic_refuses_otherwise():
    """A type without a schema: one line, and ours."""
    text = message(declare, Job, defaultdict)
    assert text.startswith("Declared cannot be declared: ")
    assert "\n" not in text


def test_execute_can_be_called():
    text = message(declare, Job, int, execute=property(lambda _self: None))
    assert "Declared.execute is <property> and cannot be called" in text


class TestConstructor:
    """A class may have its own, as long as a run can set its fields to what was saved."""

    def test_one_that_takes_the_fields(self):
        class Prepared(Counter):
            _ready: bool

            def __init__(self, **fields):
                super().__init__(**fields)
                self._ready = True

        assert load_state(Prepared, {"i": 5}).i == 5

        class Explicit(Counter):
            def __init__(self, i=1, seen=(), extra=None):
                super().__init__(i=i, seen=list(seen), extra=extra)

        assert load_state(Explicit, dump_state(Explicit(5))).i == 5

    def test_one_that_does_not(self):
        def of_its_own(self): ...

        text = message(declare, Service, int, __init__=of_its_own)
        assert "Declared.__init__(self) cannot be called with the fields by their names" in text

    def test_a_field_that_is_assigned_too_early(self):
        class Hasty(Counter):
            def __init__(self, **fields):
                self.i = 3
                super().__init__(**fields)

        assert message(Hasty) == "Hasty: i is assigned before super().__init__(); call that first"


def test_what_is_no_field_is_not_assigned():
    """It would be lost after the run; the message knows the field that may be meant."""
    text = message(setattr, Counter(), "sen", 3)
    assert text.startswith("Counter: sen is assigned, and is no field of Counter; did you mean seen? ")
    assert "its fields are i, seen, extra" in message(setattr, Counter(), "total", 3)


def test_execute_is_no_generator():
    """An execute that yields would do nothing when it is called."""

    def execute(self):
        yield

    assert "Declared.execute is a generator" in message(declare, Job, int, execute=execute)


@pytest.mark.parametrize("base", [Job, Service])
@pytest.mark.parametrize("annotation", [LOCK, LOCK | None, LOCK | int, list[LOCK]], ids=str)
def test_field_type_without_json(base, annotation):
    """A field whose type has no JSON form is refused at declaration, with class, field, remedy."""
    text = message(declare, base, annotation)
    assert "Declared.x has a type without a JSON form" in text
    assert "make it a private attribute, _x, or give it a serializable type" in text


@pytest.mark.parametrize("base", [Job, Service])
@pytest.mark.parametrize(
    "annotation",
    [
        SecretStr,
        SecretStr | None,
        list[SecretStr],
        Secret[int],
        dict[str, Secret[int]],
        PostgresqlConfig,
    ],
    ids=str,
)
def test_secret_field(base, annotation):
    """A secret, however deep, is refused as a field, with the places to load it from."""
    text = message(declare, base, annotation)
    assert "Declared.x is a secret" in text
    assert "load it in execute, from a Prefect block or the environment" in text


def test_unknown_type():
    """A type that is not known when the class is declared cannot be checked, so it is refused."""
    text = message(declare, Job, "Nowhere")
    assert "Declared has a field whose type is not known yet; import or define" in text


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), float("inf"), b"\xff", [LOCK]],
    ids=["an object", "not a number", "infinite", "bytes", "a lock in a list"],
)
def test_value_without_json(value):
    """A value of an open type must have a JSON form, however the instance is made."""
    for make in (Counter, lambda extra: Counter.model_validate({"extra": extra})):
        text = message(make, extra=value)
        assert "Counter: extra holds a value that cannot be kept as JSON" in text
        assert "keep it in a private attribute, _extra" in text


def test_service_assignment_is_validated():
    """A service changes, but only to valid values; a refused one leaves the old."""
    counter = Counter()
    counter.i += 1
    assert counter.i == 2
    with pytest.raises(DeclarationError, match="Counter: i='x': must be a valid integer"):
        counter.i = "x"  # type: ignore[assignment]
    assert counter.i == 2


def test_default_is_validated():
    """A default that its own type forbids is found at construction."""
    wrong = declare(Service, int, x=None)
    assert "Declared: x=None: must be a valid integer" in message(wrong)


def test_state_survives():
    """What is dumped is plain JSON without private attributes, and loads as an equal service."""
    counter = Counter(i=7, seen=[datetime(2021, 4, 13, tzinfo=UTC)], extra={"a": [1, None]})
    state = dump_state(counter)
    assert state == {"i": 7, "seen": ["2021-04-13T00:00:00Z"], "extra": {"a": [1, None]}}
    loaded = load_state(Counter, json.loads(json.dumps(state)))
    assert dump_state(loaded) == state
    assert loaded.seen == counter.seen


def test_state_of_strict_and_aliased_fields():
    """State loads by field name and from JSON's types, also for strict and aliased fields."""
    strict = declare(Service, datetime, x=Field(strict=True, alias="theX"))
    service = strict(theX=datetime(2021, 4, 13, tzinfo=UTC))
    assert load_state(strict, dump_state(service)) == service


def test_state_of_an_older_class():
    """Fields the class has lost are dropped, fields it has gained take their defaults."""
    loaded = load_state(Counter, {"i": 3, "gone": "x"})
    assert dump_state(loaded) == {"i": 3, "seen": [], "extra": None}


def test_state_that_no_longer_fits():
    """A saved value that is no longer valid, or missing without a default, names its field."""
    assert "Counter: i='many': must be a valid integer" in message(load_state, Counter, {"i": "many"})
    required = declare(Service, int)
    assert "Declared: x is required" in message(load_state, required, {})


def test_state_changed_in_place():
    """A value that was put into a container without validation is found when state is saved."""
    counter = Counter()
    counter.seen.append("yesterday")  # type: ignore[arg-type]
    assert "Counter: seen holds a value" in message(dump_state, counter)


def test_job_id():
    """A JobId is made from a UUID or its string, is its string, and is a key."""
    text = "6f2c1d7e-0b0a-4c55-9f2e-8f4f4c1f2a3b"
    assert JobId(text) == JobId(id=UUID(text))
    assert str(JobId(text)) == text
    assert {JobId(text): 1}[JobId(UUID(text))] == 1
    with pytest.raises(AttributeError):
        JobId(text).id = UUID(text)  # type: ignore[misc]


@pytest.mark.parametrize("value", ["job-1", "", None, 5], ids=repr)
def test_job_id_is_a_uuid(value):
    """Anything but a UUID is refused with the value and the remedy."""
    text = message(JobId, value)
    assert f"id={value!r}: must be a UUID; pass the id that scheduling the job returned" in text


def test_a_default_that_is_invalid_is_no_remedy():
    """Leaving the field out would bring the same value."""

    class Counted(Service):
        i: int = "x"  # type: ignore[assignment]

        def execute(self): ...

    assert "i='x': must be a valid integer" in message(Counted)
    assert message(Counted).endswith("give the field another default")
