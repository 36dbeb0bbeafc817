"""What may be a name: of a service, a job, a group, a node or a work pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskadapter.declare.base import shown
from taskadapter.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Iterable

LONGEST_NAME = 255
"""Characters of a name, of a group, a node, a service or a pool."""

BANNED = ("/", "%", "&", ">", "<", "?", "#")
"""What Prefect refuses in a name, and, last, what cuts one short where it is part of an address."""


def is_name(text: str, banned: Iterable[str]) -> bool:
    """Return whether a text may be a name, which Prefect's API has as a part of an address.

    Args:
        text: the text.
        banned: characters that it may not have.
    """
    is_path = text in {".", ".."}
    is_legible = bool(text.strip()) and text.isprintable() and len(text) <= LONGEST_NAME
    return is_legible and not is_path and not any(character in text for character in banned)


def broken_rule(name: str) -> str | None:
    """Return the rule of names that a text breaks, as a sentence about it goes on; None where it is one."""
    if is_name(name, BANNED):
        return None
    return (
        f"must have 1 to {LONGEST_NAME} printable characters, not all blank nor only dots, none of them "
        f"one of {' '.join(BANNED)}"
    )


def broken_rule_of_pools(name: str) -> str | None:
    """Return the rule of names that a text breaks as that of a work pool; None where it breaks none."""
    if name.lower().startswith("prefect"):
        return "must not begin with 'prefect', as the names of Prefect's own pools do"
    if name.strip() and not name.strip("' \""):
        return "must not have blanks and quotes only, which Prefect takes for no name"
    return broken_rule(name)


def check_name(name: str, what: str) -> None:
    """Refuse a text that Prefect does not accept as a name, of a service or a job.

    Raises:
        DeclarationError: it is blank, longer than 255 characters, a path, or holds a character that is
            banned or cannot be printed.
    """
    _refuse(name, what, broken_rule(name))


def check_pool(name: str) -> None:
    """Refuse a text that Prefect does not accept as the name of a work pool.

    Raises:
        DeclarationError: it is none, as for `check_name`; or one that Prefect keeps for itself.
    """
    _refuse(name, "work pool", broken_rule_of_pools(name))


def _refuse(name: str, what: str, rule: str | None) -> None:
    if rule is not None:
        raise DeclarationError(f"{shown(name)} is no name for a {what}: it {rule}; choose another.")
