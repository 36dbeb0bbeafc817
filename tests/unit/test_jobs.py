"""Jobs and services: what a class may declare, and how state is saved and loaded."""

import json
import threading
from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from pydantic import (
    BaseModel,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    Secret,
    SecretStr,
    WithJsonSchema,
    model_validator,
)

from taskadapter.declare.backup import PostgresqlConfig
from taskadapter.declare.jobs import Job, JobId, Service, dump_state, load_state
from taskadapter.declare.triggers import TriggerConfiguration
from taskadapter.errors import DeclarationError
from taskadapter.execution.flow import job_flow

LOCK: Any = type(threading.Lock())
NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


class LogLevel(Enum):
    LOW = 1


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
    [object(), float("nan"), float("inf"), b"\xff", [LOCK], "caf\udce9", {"caf\udce9": 1}],
    ids=["an object", "not a number", "infinite", "bytes", "a lock", "a file name", "in a mapping"],
)
def test_value_without_json(value):
    """A value of an open type must have a JSON form, however the instance is made."""
    for make in (Counter, lambda extra: Counter.model_validate({"extra": extra})):
        text = message(make, extra=value)
        assert "Counter: extra holds a value that cannot be kept as JSON" in text
        assert "keep it in a private attribute, _extra" in text


class Plain:
    def __init__(self, a):
        self.a = a


OF_PLAIN = (
    PlainValidator(lambda value: value if isinstance(value, Plain) else Plain(value)),
    PlainSerializer(lambda plain: plain.a),
    WithJsonSchema({}),
)


class Nested(BaseModel):
    a: int = Field(0, alias="A")
    nested: "Nested | None" = None
    hidden: int = Field(0, exclude=True)
    _cache: int = 0


class Split(BaseModel):
    a: int = Field(validation_alias="in", serialization_alias="out")


@dataclass
class Pair:
    of: Decimal
    at: datetime


BERLIN = ZoneInfo("Europe/Berlin")
TWICE = datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN)
"""In the hour that is repeated, which no other zone's time is equal to."""


@pytest.mark.parametrize(
    ("annotation", "value", "parts"),
    [
        (dict, {1: 2, 3: None}, ["holds dict[int, int | None]", "as dict[str, int | None]"]),
        (Any, NOON, ["holds datetime", "as str", "such as datetime"]),
        (list[Any], [[NOON]], ["holds list[list[datetime]]", "as list[list[str]]"]),
        (Any, (1, 2), ["holds tuple[int, ...]", "as list[int]"]),
        (Any, {"a"}, ["holds set[str]", "as list[str]"]),
        (Any, Nested(A=1), ["holds Nested", "as dict[str, int | None]"]),
        (Nested, Nested(hidden=1), ["holds Nested, and would come back from JSON as another Nested; "]),
        (Split, Split(**{"in": 1}), ["cannot be loaded again from JSON (in: Field required)"]),
    ],
)
@pytest.mark.parametrize("base", [Job, Service])
def test_what_would_not_come_back_the_same(base, annotation, value, parts):
    """It is refused at once, and not by each run after the first."""
    text = message(declare(base, annotation), x=value)
    assert text.startswith("Declared: x holds ")
    assert "; declare a type that loads what it writes" in text
    assert text.endswith("or keep it in a private attribute, _x")
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (dict[int, int], {1: 2}),
        (set[datetime], {NOON}),
        (tuple[int, str], (1, "a")),
        (frozenset[tuple[int, ...]], {(1, 2)}),
        (datetime, TWICE),
        (list[datetime], [TWICE]),
        (float, 0.1 + 0.2),
        (Annotated[Decimal, Field(allow_inf_nan=True)], Decimal("NaN")),
        (timedelta, -timedelta(days=9999, microseconds=1)),
        (Nested, Nested(A=1, nested=Nested(A=2))),
        (list[Nested], [Nested(A=1)]),
        (Pair, Pair(Decimal("1.10"), TWICE)),
        (Annotated[Any, *OF_PLAIN], Plain(1)),
        (list[Annotated[Any, *OF_PLAIN]], [Plain(1)]),
        (Any, {"a": [1, 2.5, None, True, "x"]}),
        (bytes, b"abc"),
        (Path, Path("a/b")),
        (LogLevel, LogLevel.LOW),
    ],
)
@pytest.mark.parametrize("base", [Job, Service])
def test_what_comes_back_the_same(base, annotation, value):
    """Of the type that is declared; also where its == does not know it again."""
    cls = declare(base, annotation)
    state = json.loads(json.dumps(dump_state(cls(x=value))))
    assert type(load_state(cls, state).x) is type(cls(x=value).x)
    assert dump_state(load_state(cls, state)) == state
    if base is Job:  # as Prefect hands its parameters over
        flow = job_flow(cls, "declared", TriggerConfiguration(interval=1))
        assert dump_state(cls(**flow.validate_parameters(state))) == state


def test_state_that_would_not_come_back_is_found_when_it_is_saved():
    """What the class is told at first need not be what it holds later."""
    counter = Counter(extra={})
    counter.extra[5] = NOON
    text = message(dump_state, counter)
    assert "extra holds dict[int, datetime], and would come back from JSON as dict[str, str]" in text


def test_a_constructor_is_called_once():
    """What else it does, or what Pydantic calls after it, is no matter of what comes back."""
    calls = []

    class Prepared(Counter):
        def __init__(self, **fields):
            calls.append("init")
            super().__init__(**fields)

        def model_post_init(self, _):
            calls.append("post")
            self.i += 1

    assert dump_state(Prepared(i=4))["i"] == 5
    assert calls == ["init", "post"]


def test_a_class_that_holds_its_like():
    """Pydantic keeps the fields of such a class elsewhere."""
    chain = Chain(i=1, rest=Chain(i=2))
    assert load_state(Chain, dump_state(chain)) == chain


class Chain(Service):
    i: int
    rest: "Chain | None" = None

    @model_validator(mode="after")
    def positive(self):
        return self

    def execute(self): ...


@pytest.mark.parametrize("base", [Job, Service])
def test_a_field_that_is_left_out(base):
    """It would be lost; a private attribute says so."""
    text = message(declare, base, int, x=Field(0, exclude=True))
    assert text.startswith("Declared.x has exclude=True, and would be lost after each run; remove that, ")


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
