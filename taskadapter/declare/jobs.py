"""What a task does: jobs with inputs, services with durable state."""

from __future__ import annotations

import inspect
import json
import re
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, ConfigDict, PydanticUserError, Secret, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, SchemaValidator, core_schema

from taskadapter.declare.attached import AsService
from taskadapter.declare.base import Validated, in_our_words, named_only, shown
from taskadapter.declare.likeness import same, written
from taskadapter.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic._internal._model_construction import ModelMetaclass
    from pydantic.fields import FieldInfo
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core.core_schema import CoreSchema

if not TYPE_CHECKING:
    ModelMetaclass = type(BaseModel)  # where it stands is private

__all__ = ["Executable", "Job", "JobId", "Service", "dump_state", "load_state"]


@dataclass(frozen=True, init=False)
class JobId:
    """Identifies a scheduled job; its string is the UUID of the job's deployment.

    Raises:
        DeclarationError: `id` is neither a UUID nor the string of one.
    """

    id: UUID

    def __init__(self, id: UUID | str) -> None:  # noqa: A002  Ballerina's name
        try:
            uuid = id if isinstance(id, UUID) else UUID(id)
        except (ValueError, AttributeError, TypeError):
            raise DeclarationError(
                f"JobId: id={shown(id)}: must be a UUID; pass the id that scheduling the job returned"
            ) from None
        object.__setattr__(self, "id", uuid)

    def __str__(self) -> str:
        return str(self.id)


class _Declared(ModelMetaclass):
    """Says in our words what Pydantic refuses before there is a class that could be checked."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        try:
            return super().__new__(cls, name, bases, namespace, **options)
        except PydanticUserError as error:
            raise DeclarationError(_refusal(name, namespace, error)) from None


def _refusal(name: str, namespace: Mapping[str, Any], error: PydanticUserError) -> str:
    untyped = re.match(r"A non-annotated attribute was detected: `(\w+) = ", error.message)
    if untyped is None:
        return f"{name} cannot be declared: {error.message.splitlines()[0]}"
    field, value = untyped[1], namespace.get(untyped[1])
    return (
        f"{name}.{field} = {shown(value)} has no type; write `{field}: {type(value).__name__} = ...` for a "
        f"field, `{field}: ClassVar = ...` for what is the same in all runs, or call it _{field}"
    )


class Executable(Validated, metaclass=_Declared):
    """What `Job` and `Service` share: fields that travel as JSON, and `execute`.

    Declaring a class raises `DeclarationError` if it has no usable `execute`, an `__init__` that does
    not take its fields by name, a field whose type has no JSON form, or a field that holds a secret.
    Constructing an instance raises it if a value has no JSON form, or would not come back from it the
    same. Private attributes (`_cache`) are neither checked nor stored.
    """

    # Arbitrary types are let through so that our own check can name the class and the field.
    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        validate_default=True,
        ser_json_inf_nan="constants",  # else NaN would be stored as null without a word
    )

    @named_only
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)
        _to_json(self)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:  # noqa: D102  inherited
        loaded = super().model_validate(obj, **options)
        _to_json(loaded)
        return loaded

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.__module__ != __name__:  # Job and Service themselves are to be derived from
            _require_execute(cls)
            _require_init(cls)
            _require_json_fields(cls)

    @abstractmethod
    def execute(self) -> Any:
        """Do the task's work once; subclasses must define it, `def` or `async def`.

        It is called without arguments. Whatever it raises is the job's error, to which retries and
        error policy apply.
        """


class Job(Executable):
    """A task whose fields are its inputs.

    Derive from it, declare the inputs as fields and the work as `execute`::

        class Greeting(Job):
            message: str

            def execute(self) -> None:
                print(self.message)

    Fields are fixed at construction, because every run starts from the same ones; use a `Service`
    for what must survive from run to run, a private attribute for what need not.
    """

    model_config = ConfigDict(frozen=True)


class Service(Executable):
    """A task whose fields are durable state.

    Field values survive runs, restarts and failover: they are saved after each successful run and
    loaded before the next one. An assignment is validated. Private attributes are not saved.
    """

    model_config = ConfigDict(validate_assignment=True)

    as_service: ClassVar[AsService] = AsService()
    """Where `prefect deploy` finds the flow of an attached instance; no field may have this name."""


ServiceT = TypeVar("ServiceT", bound=Service)


def dump_state(executable: Executable) -> dict[str, Any]:
    """Return the fields of a service, or of a job, as JSON values, by name.

    Raises:
        DeclarationError: a field holds a value that has no JSON form, or not its declared type, or that
            would come back from JSON as another one.
    """
    return _to_json(executable)


def load_state(service_class: type[ServiceT], data: Mapping[str, Any]) -> ServiceT:
    """Rebuild a service from what `dump_state` returned, perhaps for an older version of the class.

    Fields that the class no longer has are dropped; fields it has gained take their defaults.

    Raises:
        DeclarationError: a value is no longer valid for its field, or a field that was gained has
            no default; the message names the field.
    """
    known = {name: data[name] for name in service_class.model_fields if name in data}
    # By way of JSON text: there, but not from Python objects, a strict date accepts its string.
    return service_class.model_validate_json(json.dumps(known))


def _to_json(executable: Executable) -> dict[str, Any]:
    """Dump the fields, and refuse those that would not come back from it as they are."""
    data: dict[str, Any] = {}
    for name in type(executable).model_fields:
        data |= _dumped(executable, name)
    _require_the_same(executable, _loaded(type(executable), data), data)
    return data


def _dumped(executable: Executable, name: str) -> dict[str, Any]:
    """Dump a field alone, so that an error can name it; what is in it, by the names that load it."""
    alias = type(executable).model_fields[name].serialization_alias
    try:
        dumped = executable.model_dump(
            mode="json", include={name}, round_trip=True, by_alias=True, warnings="error"
        )
        json.dumps(dumped, allow_nan=False, ensure_ascii=False).encode()
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise DeclarationError(
            f"{type(executable).__name__}: {name} holds a value that cannot be kept as JSON "
            f"({reason}); give it a JSON value, or keep it in a private attribute, _{name}"
        ) from None
    return {name if key == alias else key: value for key, value in dumped.items()}


def _loaded(cls: type[Executable], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are loaded from JSON values."""
    known = {name: data[name] for name in cls.model_fields if name in data}
    try:
        fields, *_ = _field_loader(cls).validate_json(json.dumps(known))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name, *inside = map(str, fault["loc"])
        reason = ": ".join(filter(None, [".".join(inside), in_our_words(fault["msg"])]))
        raise DeclarationError(
            f"{cls.__name__}: {name} holds a value that cannot be loaded again from JSON ({reason}); "
            f"declare a type that loads what it writes, or keep it in a private attribute, _{name}"
        ) from None
    return cast("dict[str, Any]", fields)


@lru_cache
def _field_loader(cls: type[Executable]) -> SchemaValidator:
    """Return what loads the fields of a class alone: its constructor may do more, and is run once."""
    schema: Any = cls.__pydantic_core_schema__
    definitions = schema.get("definitions", [])
    config = core_schema.CoreConfig()
    while schema["type"] != "model-fields":
        config = schema.get("config", config)
        if schema["type"] == "definition-ref":
            schema = next(known for known in definitions if known["ref"] == schema["schema_ref"])
        else:
            schema = schema["schema"]
    schema = core_schema.definitions_schema(schema, definitions)
    return SchemaValidator(schema, {**config, "loc_by_alias": False})


def _require_the_same(executable: Executable, loaded: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    cls, again = type(executable), executable.model_copy(update=dict(loaded))
    for name in cls.model_fields:
        given, back = getattr(executable, name), loaded[name]
        if same(given, back) and _dumped(again, name).get(name) == data.get(name):
            continue
        was, is_now = written(given), written(back)
        as_what, example = (f"another {was}", "") if was == is_now else (is_now, f", such as {was}")
        raise DeclarationError(
            f"{cls.__name__}: {name} holds {was}, and would come back from JSON as {as_what}; declare a "
            f"type that loads what it writes{example}, or keep it in a private attribute, _{name}"
        )


def _require_execute(cls: type[Executable]) -> None:
    is_abstract_base = any(getattr(v, "__isabstractmethod__", False) for v in vars(cls).values())
    if getattr(cls.execute, "__isabstractmethod__", False):
        if is_abstract_base:
            return
        raise DeclarationError(
            f"{cls.__name__} has no execute; define `def execute(self)` or "
            "`async def execute(self)`, or mark it with abc.abstractmethod in a base class"
        )
    if not callable(cls.execute):
        raise DeclarationError(
            f"{cls.__name__}.execute is <{type(cls.execute).__name__}> and cannot be called; define "
            "`def execute(self)`"
        )
    if inspect.isgeneratorfunction(cls.execute) or inspect.isasyncgenfunction(cls.execute):
        raise DeclarationError(
            f"{cls.__name__}.execute is a generator, so calling it does nothing; remove its yield"
        )
    takes_self = isinstance(inspect.getattr_static(cls, "execute"), FunctionType)
    try:
        inspect.signature(cls.execute).bind(*([cls] if takes_self else []))
    except TypeError:
        raise DeclarationError(
            f"{cls.__name__}.execute{inspect.signature(cls.execute)} is called without arguments; "
            "make its parameters fields of the class, or give them defaults"
        ) from None


def _require_init(cls: type[Executable]) -> None:
    """Refuse a constructor that a run cannot call, which sets the fields to what was saved."""
    signature = inspect.signature(cls.__init__)
    try:
        signature.bind(cls, **dict.fromkeys(cls.model_fields))
    except TypeError:
        raise DeclarationError(
            f"{cls.__name__}.__init__{signature} cannot be called with the fields by their names, as each "
            "run does to load them; give the fields defaults instead (model_post_init can do the rest), or "
            "take **fields, and pass them to super().__init__(**fields)"
        ) from None


class _JsonCheck(GenerateJsonSchema):
    """Generates JSON schemas, and fails where Pydantic would leave out a member of a union."""

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> JsonSchemaValue:
        raise TypeError(f"{schema['type']}: {error_info}")

    def emit_warning(self, kind: Any, detail: str) -> None:
        """Ignore what Pydantic warns about; defaults are checked as values."""


def _require_json_fields(cls: type[Executable]) -> None:
    if not cls.__pydantic_complete__:
        raise DeclarationError(
            f"{cls.__name__} has a field whose type is not known yet; import or define that type "
            "at run time, before the class"
        )
    fields = cls.model_fields.items()
    if left_out := [name for name, field in fields if field.exclude]:
        raise DeclarationError(
            f"{cls.__name__}.{left_out[0]} has exclude=True, and would be lost after each run; remove "
            f"that, or make it a private attribute, _{left_out[0]}"
        )
    faults = {name: fault for name, field in fields if (fault := _field_fault(name, field))}
    secrets = [name for name, fault in faults.items() if fault == "secret"]
    if secrets:
        raise DeclarationError(
            f"{cls.__name__}.{secrets[0]} is a secret, but fields are stored as plain JSON; load "
            "it in execute, from a Prefect block or the environment"
        )
    # Seen alone, a field lacks the serializers and validators that its class has for it.
    if faults and _fault(cls):
        name = next(iter(faults))
        raise DeclarationError(
            f"{cls.__name__}.{name} has a type without a JSON form, but fields are stored as JSON; "
            f"make it a private attribute, _{name}, or give it a serializable type"
        )


def _mentions_secret(annotation: Any) -> bool:
    """Find `Secret[...]`, which unlike `SecretStr` leaves no mark in a JSON schema."""
    if get_origin(annotation) is Secret:
        return True
    return any(_mentions_secret(argument) for argument in get_args(annotation))


def _field_fault(name: str, field: FieldInfo) -> str | None:
    if _mentions_secret(field.annotation):
        return "secret"
    probe: Any = field.rebuild_annotation()
    config = ConfigDict(arbitrary_types_allowed=True)
    return _fault(create_model(name, __config__=config, value=(probe, ...)))


def _fault(model: type[BaseModel]) -> str | None:
    """Say "secret" or "not JSON" of a model whose fields cannot be stored and loaded."""
    for mode in ("validation", "serialization"):
        try:
            schema = model.model_json_schema(schema_generator=_JsonCheck, mode=mode)
        except TypeError:
            return "not JSON"
        if '"writeOnly": true' in json.dumps(schema, default=str):
            return "secret"
    return None
