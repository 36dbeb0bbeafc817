"""The base of every declaration: validated once, at construction, with one clear error."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from datetime import date, timedelta
from decimal import Decimal
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from taskadapter.errors import DeclarationError, closest, with_article

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

P = ParamSpec("P")

# A value under such a name may hold a credential, perhaps inside a URL: it is never quoted.
_SECRET_NAME = re.compile(r"password|secret|token|credential|api_?key|database_?config", re.IGNORECASE)
# So may a text with a user and a password in front of a host, wherever it stands.
_CREDENTIALS = re.compile(r":[^\s]*@")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100
_SHOWN_TYPES = (str, int, float, Decimal, timedelta, date, type(None))


def named_only(init: Callable[P, None], model: type[BaseModel] | None = None) -> Callable[P, None]:
    """Have a constructor answer a value that is given without a name with a `DeclarationError`.

    Args:
        init: the constructor.
        model: what has the fields, if not the class itself.
    """

    @wraps(init)
    def construct(self: BaseModel, *unnamed: object, **data: Any) -> None:
        if unnamed:
            owner = model or type(self)
            fields = ", ".join(owner.model_fields)
            rule = f"give each field by its name: {fields}" if fields else "it has no field"
            # Which field is meant is not known: it may be the password.
            raise DeclarationError(
                f"{_called(owner)}: <{_kind(unnamed[0])}> is given without a name; {rule}"
            )
        cast("Callable[..., None]", init)(self, **data)

    return cast("Callable[P, None]", construct)


class Validated(BaseModel):
    """A model that answers invalid values with one `DeclarationError` instead of Pydantic's error.

    Constructing, loading (`model_validate`, `model_validate_json`) and assigning raise it. Its
    message has one line for each fault: field, value, rule, remedy. Neither the message nor the
    chained traceback holds a password.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    @named_only
    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise refusal(type(self), error) from None

    # Tells Pydantic that this is its own constructor: a nested model is then validated in place,
    # and its faults keep their full path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Load from a mapping or an instance; options are Pydantic's.

        Raises:
            DeclarationError: a value is invalid, a field is missing or unknown.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise refusal(cls, error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Load from JSON text; options are Pydantic's.

        Raises:
            DeclarationError: the text is not JSON, a value is invalid, a field missing or unknown.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise refusal(cls, error) from None

    if not TYPE_CHECKING:  # a visible __setattr__ would let type checkers accept any attribute

        def __setattr__(self, name: str, value: object) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise refusal(type(self), error) from None
            except AttributeError:
                if hasattr(self, "__pydantic_fields_set__"):
                    raise
                raise DeclarationError(
                    f"{type(self).__name__}: {name} is assigned before super().__init__(); call that first"
                ) from None


class Declaration(Validated):
    """A frozen set of values that a user declares.

    Keys may be in Python's spelling (`max_count`) or in Ballerina's (`maxCount`); an unknown key is
    an error.
    """

    model_config = ConfigDict(frozen=True, alias_generator=to_camel)

    called: ClassVar[str | None] = None
    """What a user calls it, where that is not the name of its class."""


def refusal(model: type[BaseModel], error: ValidationError) -> DeclarationError:
    """Translate Pydantic's error for `model` into ours, with a line for each fault."""
    details = error.errors(include_url=False)
    meant = {_meant(model, detail) for detail in details if detail["type"] == "extra_forbidden"}
    faults = [
        _describe(model, detail)
        for detail in details
        # A field that was misspelt is not missing as well.
        if detail["type"] != "missing" or _missing(model, detail) not in meant
    ]
    separator = " " if len(faults) == 1 else "\n  "
    return DeclarationError(f"{_called(model)}:{separator}" + separator.join(faults))


def _called(model: type[BaseModel]) -> str:
    return (issubclass(model, Declaration) and model.called) or model.__name__


def _missing(model: type[BaseModel], detail: ErrorDetails) -> str:
    """Return the path of a field that is missing."""
    owner, field, path = _locate(model, detail["loc"])
    # Pydantic names a missing field by its alias, which the user need not have used.
    head, dot, _ = path.rpartition(".")
    return f"{head}{dot}{next(name for name, known in owner.model_fields.items() if known is field)}"


def _meant(model: type[BaseModel], detail: ErrorDetails) -> str | None:
    """Return the path of the field that an unknown one stands for, by its spelling; None for no field."""
    owner, _, path = _locate(model, detail["loc"])
    head, dot, name = path.rpartition(".")
    close = _close(owner, name)
    return f"{head}{dot}{_spellings(owner)[close]}" if close else None


def _describe(model: type[BaseModel], detail: ErrorDetails) -> str:
    owner, field, path = _locate(model, detail["loc"])
    if detail["type"] == "missing":
        return f"{_missing(model, detail)} is required; give it a value"
    if detail["type"] == "extra_forbidden":
        if (name := path.rpartition(".")[2]) in _spellings(owner):
            return f"{path} is said twice, as {to_camel(name)} too; remove one"
        return f"{path} is not a field of {_called(owner)}; {_nearest(owner, path)}"
    if detail["type"] == "no_such_attribute":
        return (
            f"{path} is assigned, and is no field of {_called(model)}; {_nearest(owner, path)} (what need "
            f"not survive a run may be a private attribute, _{path})"
        )
    if detail["type"] == "frozen_instance":
        return (
            f"{path} cannot be assigned, {_called(model)} is frozen; construct a new one instead "
            "(only the fields of a Service may change)"
        )
    rule = _rule(detail, field, path)
    return f"{path}{_shown(path, detail['input'])}: {rule}" if path else rule


def _rule(detail: ErrorDetails, field: FieldInfo | None, path: str) -> str:
    """Our own rules carry their remedy; Pydantic's get the field's default as theirs."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if "_tag_" in detail["type"]:  # an undecided union: the message is our own
        return detail["msg"]
    rule, value = in_our_words(detail["msg"]), detail["input"]
    given = f"{rule}, not {_kind(value)}" if "_type" in detail["type"] else rule
    if detail["type"] == "int_type" and isinstance(value, str) and _INTEGER.fullmatch(value):
        return f"{given}; write it without quotes"
    if field is None or field.is_required() or field.default_factory is not None:
        return f"{given}; pass such a value"
    if value is field.default:
        return f"{given}; give the field another default"
    return f"{given}; pass such a value, or leave {path} out for its default, {field.default!s}"


def in_our_words(message: str) -> str:
    """Return a rule of Pydantic's as our messages say it."""
    rule = message.removeprefix("Value error, ").partition(", unable to parse")[0]
    rule = re.sub(r"^(?:Input|String) should (have|be)", r"must \1", rule)
    rule = re.sub(r"^Input is not a valid path.*", "must be a path", rule)
    return re.sub(r"a valid dictionary or instance of (\w+)", lambda found: with_article(found[1]), rule)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def shown(value: object) -> str:
    """Return a plain value as it is written, of others the type: a repr has addresses, or users' values."""
    is_secret = isinstance(value, str) and _CREDENTIALS.search(value)
    if is_secret or not isinstance(value, _SHOWN_TYPES):
        return f"<{_kind(value)}>"
    if isinstance(value, date | timedelta | Decimal):
        return str(value)
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print an int of thousands of digits
        return f"<{_kind(value)}>"


def _shown(path: str, value: object) -> str:
    """Quote a plain value; name only the type of others and of what may hold a credential."""
    if isinstance(value, Mapping):
        return ""
    return f"=<{_kind(value)}>" if _SECRET_NAME.search(path) else f"={shown(value)}"


def _nearest(owner: type[BaseModel], path: str) -> str:
    if close := _close(owner, path.rpartition(".")[2]):
        return f"did you mean {close}?"
    fields = ", ".join(owner.model_fields)
    return f"its fields are {fields}" if fields else "it has no field"


def _close(owner: type[BaseModel], name: str) -> str | None:
    """Return the spelling of a field that is closest to a name; None where none is close."""
    return closest(name, _spellings(owner))


def _spellings(owner: type[BaseModel]) -> dict[str, str]:
    """Return the fields by each of their spellings."""
    return {key: field for field in owner.model_fields for key in (field, to_camel(field))}


def _locate(
    model: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[type[BaseModel], FieldInfo | None, str]:
    """Follow an error's location: the model it ends in, the field, the path as the user wrote it.

    Pydantic's location also names the chosen member of a union. Ours are tagged with the name of
    the model, or with nothing; those are not part of what the user wrote.
    """
    tags = {declared.__name__: declared for declared in Declaration.__subclasses__()}
    owner = inside = model
    field, path = None, list[str]()
    for part in location:
        if part in tags:
            inside = tags[str(part)]
        elif part != "":
            path.append(str(part))
            owner, field = inside, _field(inside, part)
            inside = next(_models(field.annotation), inside) if field else inside
    return owner, field, ".".join(path)


def _field(model: type[BaseModel], part: int | str) -> FieldInfo | None:
    fields = model.model_fields.items()
    return next((field for name, field in fields if part in (name, field.alias)), None)


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation such as `RetryConfiguration | None` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
