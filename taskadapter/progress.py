"""How far a job has come: its count and its state, kept in the coordination database."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from taskadapter.coordination import dialects, jobs, schema
from taskadapter.jobs import Service, dump_state, load_state
from taskadapter.runs import Assignment

if TYPE_CHECKING:
    from sqlalchemy import Engine


@lru_cache(maxsize=1)
def _engine(url: str) -> Engine:
    """Return this process's engine, its tables made."""
