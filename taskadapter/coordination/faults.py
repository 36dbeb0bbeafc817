"""What a database fails with, in words that say what to do: drivers differ, and have other readers."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from taskadapter.errors import (
    AccessDeniedError,
    CoordinationError,
    DatabaseUnavailableError,
    SchemaError,
    in_a_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import URL

__all__ = ["is_of_session", "translated", "where"]


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn a driver's errors into ours: the one place where that happens.

    Raises:
        DatabaseUnavailableError: no route, no answer in time, a lock or a deadlock; try again.
        AccessDeniedError: a wrong user or password, or a missing grant.
        SchemaError: a missing table or column, or a value longer than its column.
        CoordinationError: anything else the driver reports.
    """
    try:
        yield
    except DBAPIError as exc:
        raise _explain(exc, url) from exc


def _explain(exc: DBAPIError, url: URL) -> CoordinationError:
    kind = _CLASSIFY[url.get_backend_name()](exc)
    reason = _words(exc)
    if re.search(_NO_TABLE, reason):
        return kind(f"{where(url)}: {_UNUSED}")
    return kind(f"{where(url)}: {reason}; {_remedy(exc, kind, reason, url)}")


def _words(exc: DBAPIError) -> str:
    """Return what the database says, without the statement that PostgreSQL's driver shows behind it."""
    said = getattr(getattr(exc.orig, "diag", None), "message_primary", None) or str(exc.orig)
    return in_a_line(said)


def _remedy(exc: DBAPIError, kind: type[CoordinationError], reason: str, url: URL) -> str:
    if _is_late(exc):
        return _IF_LATE
    if re.search(r"[Dd]atabase [\"'].*[\"'] does not exist|Unknown database", reason):
        return "make that database, or name another one"
    if re.search(_FULL, reason):
        return _IF_FULL
    if re.search(r"read[- ]only", reason, re.IGNORECASE):
        return "name the primary and not a replica of it, or let this user write"
    if kind is AccessDeniedError and url.get_backend_name() == "sqlite":
        return "name a file that this user may write, in a folder that is there"
    return _REMEDIES[kind]


def where(url: URL) -> str:
    """Say which database it is, without a secret."""
    if url.get_backend_name() == "sqlite":
        return f"database {url.database}"
    user = f"{url.username}@" if url.username else ""
    port = f":{url.port}" if url.port else ""
    return f"database {user}{url.host or ''}{port}/{url.database or ''}"


_REMEDIES: dict[type[CoordinationError], str] = {
    DatabaseUnavailableError: "check that it runs and can be reached from this host",
    AccessDeniedError: "correct the user, its password or its grants",
    SchemaError: "run `taskadapter db upgrade`",
    CoordinationError: "see the database's own log, and `taskadapter doctor`",
}

_NO_TABLE = r"no such table|relation \".*\" does not exist|Table '.*' doesn't exist"

_UNUSED = (
    "it lacks tables. If no node has used it yet, start an agent, or run `taskadapter db init`; else they "
    "are gone, and `taskadapter doctor` names them, and what to do"
)

# Of a server, or of one user or database: whoever cannot connect has only these words.
_FULL = r"[Tt]oo many (clients|connections)|connection slots are reserved|max_user_connections"

_IF_FULL = "raise that limit, or have fewer nodes and runs at once"

_IF_LATE = "the statement took too long: the database is overloaded, or another session holds a lock"


def _is_late(exc: DBAPIError) -> bool:
    """Return whether a server that can be reached did not finish a statement in time."""
    if getattr(exc.orig, "sqlstate", None) in {"57014", "55P03"}:
        return True
    code = _code(exc)
    words = str(exc.orig)
    return code in {1205, 1969, 3024} or (code == 2013 and "timed out" in words) or "is locked" in words


def is_of_session(exc: DBAPIError, url: URL) -> bool:
    """Return whether a new session may do what this one could not: it is not late, nor lost a race."""
    if _CLASSIFY[url.get_backend_name()](exc) is not _GONE or _is_late(exc):
        return False
    state = getattr(exc.orig, "sqlstate", None) or ""
    return not state.startswith("40") and _code(exc) != _DEADLOCK


def _code(exc: DBAPIError) -> Any:
    """Return the number of an error of MySQL's; 0 of what its driver says of itself."""
    code = exc.orig.args[0] if exc.orig and exc.orig.args else 0
    return code if isinstance(code, int) else 0


_DEADLOCK = 1213

_DENIED, _GONE, _SCHEMA = AccessDeniedError, DatabaseUnavailableError, SchemaError


def _classify_postgresql(exc: DBAPIError) -> type[CoordinationError]:
    # https://www.postgresql.org/docs/current/errcodes-appendix.html
    state: str = getattr(exc.orig, "sqlstate", None) or ""
    if state in {"42P01", "42703", "22001"}:
        return _SCHEMA
    if state.startswith("28") or state in {"42501", "3D000"}:
        return _DENIED
    # The last two: a transaction that was idle for too long, and a server that became a replica.
    if state[:2] in {"08", "40", "53", "55", "57"} or state in {"25P03", "25006"}:
        return _GONE
    if state:
        return CoordinationError
    # A refused connection has no state, only the server's words.
    refusals = ("authentication failed", "no pg_hba.conf entry", '" does not exist', "no password")
    return _DENIED if any(words in str(exc.orig) for words in refusals) else _GONE


# 1040, 1203 and 1226: too many connections. 1290, 1792 and 1836: a server, or a session, that is read-only.
_PASSING = {1040, 1053, 1158, 1159, 1160, 1161, 1203, 1205, _DEADLOCK, 1226, 1290, 1317, 1792, 1836}


def _classify_mysql(exc: DBAPIError) -> type[CoordinationError]:
    # https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
    code = _code(exc)
    if code in {1054, 1146, 1406}:
        return _SCHEMA
    if code in {1044, 1045, 1049, 1130, 1142, 1143, 1227, 1370, 1698}:
        return _DENIED
    if code in _PASSING or code >= 2000:
        return _GONE
    return _GONE if isinstance(exc, InterfaceError) or exc.connection_invalidated else CoordinationError


def _classify_sqlite(exc: DBAPIError) -> type[CoordinationError]:
    words = str(exc.orig)
    if any(lack in words for lack in ("no such table", "no such column", "has no column named")):
        return _SCHEMA
    if "readonly" in words or "unable to open" in words or "not a database" in words:
        return _DENIED
    return _GONE if isinstance(exc, OperationalError) else CoordinationError


_CLASSIFY = {
    "postgresql": _classify_postgresql,
    "mysql": _classify_mysql,
    "sqlite": _classify_sqlite,
}
