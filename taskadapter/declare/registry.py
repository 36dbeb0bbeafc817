"""The listeners of this program: those that have a service, and those that somebody keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from taskadapter.listener import Listener

listeners: WeakSet[Listener] = WeakSet()
