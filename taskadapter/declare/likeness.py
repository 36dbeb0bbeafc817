"""Whether a value has come back from JSON as it was, and what to call what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from datetime import datetime
from typing import Any, cast

from pydantic import BaseModel


def same(given: object, back: object) -> bool:
    """Return whether two values are equal, or as good as that where their `==` cannot tell."""
    if _equal(given, back):
        return True
    if (parts := _parts(given)) is not None:
        others = _parts(back)
        return (
            type(given) is type(back)
            and others is not None
            and parts.keys() == others.keys()
            and all(same(part, others[key]) for key, part in parts.items())
        )
    return isinstance(given, type(back)) and not _can_tell(given)


def _can_tell(value: object) -> bool:
    """Return whether a value's `==` knows its like: not NaN, nor an object that has none of its own.

    In the hour that a zone repeats, a time is unequal to the same moment in any other zone.
    """
    if isinstance(value, datetime) or type(value).__eq__ is object.__eq__:
        return False
    return _equal(value, value)


def _equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - what a user's == raises, or that of an array
        return False


def _parts(value: object) -> dict[Any, Any] | None:
    """Return what a value consists of; None for what is one."""
    if isinstance(value, Mapping | BaseModel):
        return dict(cast("Any", value))
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def written(value: object) -> str:
    """Return the type of a value as one would declare it, such as ``dict[int, str]``."""
    name = "None" if value is None else type(value).__name__
    if isinstance(value, Mapping):
        return f"{name}[{_types(value)}, {_types(value.values())}]"
    if isinstance(value, tuple):
        return f"{name}[{_types(value)}, ...]"
    if isinstance(value, list | Set):
        return f"{name}[{_types(value)}]"
    return name


def _types(values: Iterable[object]) -> str:
    return " | ".join(dict.fromkeys(map(written, values))) or "Any"
