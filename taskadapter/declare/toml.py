"""Listeners from a file: a TOML file with the names that a declaration has, such as Ballerina's.

A key stands in a table of its own (``[trigger]``, ``[retryConfig]``, ``[taskPolicy]``,
``[warmBackupConfig]``) or flat, as the configurable variables of a Ballerina program do.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic.alias_generators import to_camel

from taskadapter.declare.backup import (
    MysqlConfig,
    PostgresqlConfig,
    SqliteConfig,
    WarmBackupConfig,
    database_class,
)
from taskadapter.declare.base import Declaration, shown
from taskadapter.declare.triggers import RetryConfiguration, TaskPolicy, TriggerConfiguration
from taskadapter.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic import BaseModel

_SECTIONS: dict[str, type[BaseModel]] = {
    "trigger": TriggerConfiguration,
    "retry_config": RetryConfiguration,
    "task_policy": TaskPolicy,
    "warm_backup_config": WarmBackupConfig,
}
_SHARED = {"retry_config", "task_policy"}  # they stand in the trigger or beside it
_LIBRARIES = ("ballerina", "ballerinax")  # the tables of Ballerina's own modules, such as its log


def _spelled(names: Mapping[str, str]) -> dict[str, str]:
    """Return the names by each of their spellings."""
    return {spelling: name for key, name in names.items() for spelling in (key, to_camel(key))}


_TABLES = _spelled({name: name for name in _SECTIONS} | {"trigger_config": "trigger"})
_FIELDS: dict[str, tuple[str, str]] = {
    spelling: (section, name)
    for section, model in _SECTIONS.items()
    for spelling, name in _spelled({field: field for field in model.model_fields}).items()
    if name not in _SECTIONS  # the retries of a trigger have a table of their own
}
_POOL = _spelled({"work_pool": "work_pool"})
_DATABASES: tuple[type[BaseModel], ...] = (PostgresqlConfig, MysqlConfig, SqliteConfig)
_KINDS = {model.__name__: {"kind": model.model_fields["kind"].default} for model in _DATABASES}
_NESTED = {*_SECTIONS, "database_config"}
"""What is a table itself: of these each key is said for itself."""
_PYTHONS = _spelled(
    {
        name: name
        for model in (*_SECTIONS.values(), *_DATABASES)
        for name in ("work_pool", *_SECTIONS, *model.model_fields)
    }
)
"""The names of all fields by each of their spellings."""
_Located: TypeAlias = tuple[str, str | None, str, Any]
"""A key as it is written, the section it belongs to (None for none), its name, its value."""


def read_config(path: str | Path, table: str | None = None) -> dict[str, Any]:
    """Return what a file says of a listener, as keywords for it; their values are not checked yet.

    Args:
        path: a TOML file. Durations are seconds; times are tables in `Civil`'s form, ISO 8601 strings
            or TOML's own date-times with an offset.
        table: the dotted name of the table to read, such as ``"org.module"``; by default the keys
            outside of any, and the tables of Ballerina's own modules do not count.

    Raises:
        DeclarationError: the file cannot be read or is no TOML, the table is not in it, or a key is
            unknown or stands in two places. No value of the file is quoted.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise DeclarationError(
            f"path={shown(path)} must be the path of a TOML file; name one that is there."
        )
    if not isinstance(table, str | None):
        raise DeclarationError(
            f'table={shown(table)} must be a dotted name, such as "org.module"; write one.'
        )
    content = _select(_load(path), path, table)
    listener: dict[str, Any] = {}
    for place, section, name, value in _located(content, path, table):
        target = listener.setdefault(section, {}) if section else listener
        if name in target:
            raise DeclarationError(
                f"{path}: {place} is said twice, flat or in a table or in two spellings; remove one."
            )
        target[name] = value
    return listener


def overridden(found: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says, with each key that a program says itself in its place.

    Of a declaration, or a mapping, only what is said in it counts: its other fields are the file's. So it
    is with those inside it; but a database of another kind than the file's replaces that.
    """
    ours = _said(given)
    for name in _SHARED:
        if _says(found, name) and _says(ours, name):
            found, ours = _beside_the_trigger(found, name), _beside_the_trigger(ours, name)
    merged: dict[str, Any] = _over(found, ours)
    return merged


def _says(said: Mapping[str, Any], name: str) -> bool:
    """Return whether one side says something of retries or policy, in the trigger or beside it."""
    return name in said or name in _keys(said.get("trigger"))


def _keys(value: Any) -> dict[str, Any]:
    """Return what is said in a declaration, or a mapping; nothing of what is neither."""
    said: dict[str, Any] = _said(value) if isinstance(value, Declaration | Mapping) else {}
    return said


def _beside_the_trigger(said: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what one side says, with its retries, or policy, beside the trigger, if it says them once."""
    trigger = _keys(said.get("trigger"))
    if name in said or name not in trigger:
        return said
    rest = {key: value for key, value in trigger.items() if key != name}
    return said | {"trigger": rest, name: trigger[name]}


def _over(below: Any, above: Any) -> Any:
    """Return one value, or table, with another in its place; of tables key by key."""
    under, over = _said(below), _said(above)
    if not isinstance(under, dict) or not isinstance(over, dict) or _are_two_kinds(under, over):
        return above
    return under | {
        key: _over(under[key], value) if key in _NESTED and key in under else value
        for key, value in over.items()
    }


def _said(value: Any) -> Any:
    """Return what is said in a declaration, or a mapping, in Python's spelling; anything else as it is.

    A database says its kind, whichever way it has told that.
    """
    fields: dict[str, Any]
    if isinstance(value, Declaration):
        fields = {name: getattr(value, name) for name in value.model_fields_set}
    elif isinstance(value, Mapping):
        fields = {}
        for key, inner in value.items():
            name = _PYTHONS.get(str(key), str(key))
            # What is said twice, in both spellings, stays so, and is refused.
            fields[to_camel(name) if name in fields else name] = inner
    else:
        return value
    return _KINDS.get(database_class(value) or "", {}) | fields


def _are_two_kinds(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether these are two databases, and not of one kind."""
    return "kind" in one and "kind" in other and one["kind"] != other["kind"]


def _load(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  a path may be given as a string
            return tomllib.load(file, parse_float=Decimal)
    except OSError as error:
        raise DeclarationError(
            f"{path} cannot be read ({error.strerror}); name a TOML file that is there."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # Not as the cause: from Python 3.14 on it holds the text, and the password in it.
        reason = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8"
        raise DeclarationError(f"{path} is not valid TOML: {reason}; correct it there.") from None


def _select(content: dict[str, Any], path: str | Path, table: str | None) -> dict[str, Any]:
    """Return the content of a table; of the file, without the tables of Ballerina's own modules."""
    if table is None:
        return {key: value for key, value in content.items() if key not in _LIBRARIES}
    for part in table.split("."):
        inner = content.get(part)
        if not isinstance(inner, dict):
            raise DeclarationError(f"{path} has no table [{table}]; add it, or name one that is there.")
        content = inner
    return content


def _located(content: dict[str, Any], path: str | Path, table: str | None) -> Iterator[_Located]:
    """Yield every key that is part of a listener."""
    for key, value in content.items():
        if key in _POOL:
            yield key, None, _POOL[key], value
        elif key in _FIELDS:
            section, name = _FIELDS[key]
            yield key, section, name, value
        elif key in _TABLES:
            yield from _inside(key, value, path)
        else:
            raise DeclarationError(f"{path}: {key} is no part of a listener; {_remedy(value, table)}")


def _inside(key: str, value: Any, path: str | Path) -> Iterator[_Located]:
    """Yield what a section's own table says; its unknown keys are left to the section's model."""
    if not isinstance(value, dict):
        raise DeclarationError(f"{path}: {key} must be a table; write [{key}] and its fields below.")
    fields: dict[str, Any] = value
    section = _TABLES[key]
    spellings = _spelled({field: field for field in _SECTIONS[section].model_fields})
    for name, inner in fields.items():
        yield f"{key}.{name}", section, spellings.get(name, name), inner


def _remedy(value: Any, table: str | None) -> str:
    if isinstance(value, dict) and table is None:
        return 'remove it, or pass table="its.dotted.name" if the listener\'s keys are inside.'
    return (
        f"remove it; the tables are {', '.join(_SECTIONS)}, and their fields may stand flat. What is the "
        "program's own belongs in another table, or file."
    )
