"""How long tokens may be trusted, shown by an agent to its hosts through shared memory.

A host looks at the board whenever it needs to know, and needs nobody's answer: when its agent dies
or freezes, the deadline that the board shows passes by itself.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from taskadapter.coordination.messages import Token

__all__ = ["NEVER", "DeadlineBoard", "clock"]

NEVER = 0.0
"""The deadline of a token that must not be trusted: it has always passed."""

# A group, by a digest of its name, and the term and deadline of its token. Native mode ("@") writes
# an aligned number at once; the others write it byte by byte, and a reader might see half of it.
_SLOT = struct.Struct("@16sqd")
_TERM = struct.Struct("@q")
_DEADLINE = struct.Struct("@d")
_TERM_AT = 16
_DEADLINE_AT = 24
_UNUSED = bytes(16)


def clock() -> float:
    """Return seconds on the clock that leases are measured on.

    It is the same for all processes of a machine, is never set, and where the system has such a
    clock goes on while the machine sleeps, because the database's does.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class DeadlineBoard:
    """A file in memory with one deadline for each group, on `clock`.

    One process `create`s it and writes, any number `open` it and read. Use it as a context manager,
    or `close` it; its creator then removes the file.
    """

    def __init__(self, path: Path, memory: mmap.mmap, *, owner: bool) -> None:
        self.path = path
        self._memory = memory
        self._owner = owner
        self._slots: dict[str, int] = {}

    @classmethod
    def create(cls, path: str | os.PathLike[str], capacity: int = 1024) -> Self:
        """Make a board for so many groups, which only this user can read.

        Raises:
            FileExistsError: the path is in use.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        file = os.open(path, flags, 0o600)
        try:
            os.ftruncate(file, capacity * _SLOT.size)
            memory = mmap.mmap(file, capacity * _SLOT.size)
        finally:
            os.close(file)
        return cls(Path(path), memory, owner=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a board for reading.

        Raises:
            FileNotFoundError: there is none; its agent has gone.
        """
        with Path(path).open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(Path(path), memory, owner=False)

    def write(self, token: Token, deadline: float) -> None:
        """Show until when a token may be trusted; `NEVER` takes it down.

        Raises:
            ValueError: there are more groups than the board has room for.
        """
        slot = self._find(token.group_id)
        if slot is None:
            slot = self._claim(token.group_id)
        (term,) = _TERM.unpack_from(self._memory, slot + _TERM_AT)
        if term != token.term:
            # Readers must not see the new term with the old deadline, nor the other way round.
            _DEADLINE.pack_into(self._memory, slot + _DEADLINE_AT, NEVER)
            _TERM.pack_into(self._memory, slot + _TERM_AT, token.term)
        _DEADLINE.pack_into(self._memory, slot + _DEADLINE_AT, deadline)

    def read(self, token: Token) -> float:
        """Return until when a token may be trusted: `NEVER` if it is not, or in another term."""
        slot = self._find(token.group_id)
        if slot is None:
            return NEVER
        (deadline,) = _DEADLINE.unpack_from(self._memory, slot + _DEADLINE_AT)
        (term,) = _TERM.unpack_from(self._memory, slot + _TERM_AT)
        (again,) = _DEADLINE.unpack_from(self._memory, slot + _DEADLINE_AT)
        if self._memory[slot : slot + len(_UNUSED)] != _digest(token.group_id):
            return NEVER  # the slot is another group's by now
        return float(min(deadline, again)) if term == token.term else NEVER

    def close(self) -> None:
        """Let go of the memory; the board's creator also removes its file."""
        self._memory.close()
        if self._owner:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, group_id: str) -> int | None:
        if group_id not in self._slots:
            digest = _digest(group_id)
            for slot in range(0, len(self._memory), _SLOT.size):
                found = self._memory[slot : slot + len(digest)]
                if found == digest:
                    self._slots[group_id] = slot
                if found in (digest, _UNUSED):
                    break
        return self._slots.get(group_id)

    def _claim(self, group_id: str) -> int:
        slot = self._free()
        if slot is None:
            capacity = len(self._memory) // _SLOT.size
            raise ValueError(f"group {group_id!r} has no room on a board for {capacity} groups")
        self._slots = {name: other for name, other in self._slots.items() if other != slot}
        self._memory[slot : slot + len(_UNUSED)] = _digest(group_id)
        self._slots[group_id] = slot
        return slot

    def _free(self) -> int | None:
        """Return a slot that is unused, or else one whose token was taken down."""
        slots = range(0, len(self._memory), _SLOT.size)
        unused = (slot for slot in slots if self._memory[slot : slot + len(_UNUSED)] == _UNUSED)
        down = (
            slot for slot in slots if _DEADLINE.unpack_from(self._memory, slot + _DEADLINE_AT)[0] == NEVER
        )
        return next(unused, next(down, None))


def _digest(group_id: str) -> bytes:
    return blake2b(group_id.encode(), digest_size=16).digest()
