"""The listeners of this program, and whether a file is being imported for what it declares."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

from taskadapter.errors import TaskError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from taskadapter.listener import Listener

listeners: WeakSet[Listener] = WeakSet()
"""Those that have a service, and those that somebody keeps."""

_imports: list[str] = []


@contextmanager
def importing(who: str) -> Iterator[None]:
    """Import a file for what it declares; its program must not begin meanwhile.

    Args:
        who: what imports it, such as "a run".
    """
    _imports.append(who)
    try:
        yield
    finally:
        _imports.pop()


def refuse_while_importing(call: str) -> None:
    """Refuse a call that would begin the program of a file which is being imported.

    Raises:
        TaskError: it is; each run would make that call again.
    """
    # Not a context variable: a module may call it in a thread of its own.
    if _imports:
        raise TaskError(
            f"{call} was called while {_imports[-1]} imports this file; put the call under "
            '`if __name__ == "__main__":`'
        )
