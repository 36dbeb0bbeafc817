"""Who holds a group's token, as the database has it: the rules of taking, keeping and giving back.

Every function works inside the caller's transaction, and takes effect when that commits. `pulse`
alone also does well without one, on a connection that commits each statement.

Three rules make at most one node the holder:

- Only the database's clock is compared with another time, and only in SQL.
- Taking over locks the token's row first, and then looks, in a statement of its own, how old the
  holder's heartbeat is: one statement would wait for the lock and go on with what it saw before.
- Renewing locks the same row, so that it waits for a takeover and then finds another term.

A node writes heartbeats for the tokens it holds and no others. A standby's heartbeat would keep a
token alive that its own dead predecessor holds under the same name.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    and_,
    any_,
    case,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    true,
    update,
)

from taskadapter.coordination.board import clock
from taskadapter.coordination.dialects import (
    database_now,
    ensured,
    fitting,
    has_writable_ctes,
    limit_idle,
    notices,
    seconds_since,
    storable,
    together,
    upsert,
)
from taskadapter.coordination.messages import Acquired, PulseAnswer, Sighting, Taken, Token
from taskadapter.coordination.schema import health_check, node, tenure, token_holder
from taskadapter.errors import CoordinationError, TokenLostError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import ColumnElement, Connection, Dialect, Row, Select, Table, Update
    from sqlalchemy.sql.dml import UpdateBase

    from taskadapter.coordination.nodes import Node

__all__ = [
    "acquire",
    "fence",
    "give_up",
    "pulse",
    "release",
    "request_resign",
    "require_token",
    "tokens_with_heartbeats",
]

NOBODY = ""


def require_token(connection: Connection, token: Token) -> None:
    """Lock the token until the transaction ends, so that nobody takes it over meanwhile.

    Transactions of the same holder do not wait for each other, except on SQLite.

    Raises:
        TokenLostError: the token has another holder or term by now, or none.
    """
    if connection.dialect.name == "sqlite":
        # It has no row locks, and a caller's own engine may not have locked at BEGIN.
        change = update(token_holder).where(_held([token])).values(term=token_holder.c.term)
        locked = connection.execute(change).rowcount
    else:
        rows = select(token_holder.c.term).where(_held([token])).with_for_update(read=True)
        locked = len(connection.execute(rows).all())
    if locked != 1:
        raise TokenLostError(
            f"node {token.task_id!r} no longer holds the token of group {token.group_id!r} in term "
            f"{token.term}: another node may run its jobs now, so this one must not write"
        )


def fence(connection: Connection, token: Token, seconds: float) -> None:
    """Do as `require_token`, for a transaction of somebody else's that may freeze.

    PostgreSQL ends the transaction if it does nothing for so many seconds, normally what is left of
    the lease, so that a frozen process cannot keep its successor from taking over. On MySQL it can,
    until the server drops its connection (`wait_timeout`).
    """
    limit_idle(connection, seconds)  # first: it may freeze as soon as it has the lock
    require_token(connection, token)


def pulse(
    connection: Connection, me: Node, tokens: Sequence[Token], group_ids: Collection[str], interval: float
) -> PulseAnswer:
    """Renew tokens, show that the node lives, and look at its groups, in one round trip."""
    if has_writable_ctes(connection.dialect):
        return _pulse_at_once(connection, me, tokens, group_ids, interval)
    # Terms never come back: a token that is ours now was ours when it was renewed. Without its row
    # in health_check, though, there was nothing to renew.
    renewed = and_(_held(tokens), health_check.c.last_heartbeat.is_not(None))
    beats = [_renewal(me, health_check.c.group_id.in_(_kept(tokens)))] if tokens else []
    *_, rows = together(connection, *beats, _touch(me), _look(me, group_ids, interval, renewed))
    return _answer(rows)


def _pulse_at_once(
    connection: Connection,
    me: Node,
    tokens: Sequence[Token],
    group_ids: Collection[str],
    interval: float,
) -> PulseAnswer:
    touched = _touch(me).cte("touched")
    if not tokens:
        look = _look(me, group_ids, interval, false())
        return _answer(connection.execute(look.add_cte(touched)).all())
    # Apart, or PostgreSQL may lock all of them anew for each heartbeat that it writes. As an array, or it
    # may go through all of them for each: it takes them for a single row while it has no statistics.
    kept = _kept(tokens).order_by(token_holder.c.group_id).cte("kept")
    among = any_(func.array(select(kept).scalar_subquery()))
    beaten = _renewal(me, health_check.c.group_id == among).returning(health_check.c.group_id).cte("beaten")
    # The look sees what was there before the renewal; only what the renewal returns is certain.
    renewed = token_holder.c.group_id.in_(select(beaten))
    look = _look(me, group_ids, interval, renewed)
    return _answer(connection.execute(look.add_cte(touched, kept, beaten)).all())


def _held(tokens: Iterable[Token]) -> ColumnElement[bool]:
    """Say in SQL that a row of `token_holder` is one of these tokens."""
    return _of(tokens, token_holder)


def _of(tokens: Iterable[Token], table: Table) -> ColumnElement[bool]:
    """Say in SQL that a row is about one of these tokens: by term, so that groups are found in a list."""
    columns = table.c
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for token in tokens:
        groups[token.task_id, token.term].append(token.group_id)
    rows = (
        and_(columns.task_id == task_id, columns.term == term, columns.group_id.in_(group_ids))
        for (task_id, term), group_ids in groups.items()
    )
    return or_(false(), *rows)


def _kept(tokens: Iterable[Token]) -> Select[Any]:
    """Select the groups of tokens that are still held, waiting for whoever is taking one over."""
    return select(token_holder.c.group_id).where(_held(tokens)).with_for_update(read=True)


def _renewal(me: Node, kept: ColumnElement[bool]) -> Update:
    """Write a heartbeat for each group whose token is kept."""
    mine = update(health_check).where(health_check.c.task_id == me.task_id, kept)
    return mine.values(last_heartbeat=database_now())


def _touch(me: Node) -> Update:
    columns = node.c
    mine = and_(columns.task_id == me.entry, columns.incarnation == me.incarnation)
    return update(node).where(mine).values(last_seen=database_now())


def tokens_with_heartbeats() -> Any:
    """Return the tokens, each beside its holder's heartbeat and term, for a query to select from."""
    beats, terms = health_check.c, tenure.c
    same_holder = and_(beats.group_id == token_holder.c.group_id, beats.task_id == token_holder.c.task_id)
    same_term = and_(terms.group_id == token_holder.c.group_id, terms.term == token_holder.c.term)
    return token_holder.outerjoin(health_check, same_holder).outerjoin(tenure, same_term)


def _free(me: Node, interval: float) -> ColumnElement[bool]:
    """Say in SQL that a token may be taken.

    Nobody holds it, its holder has no heartbeat (as Ballerina has it too) or a stale one, or this
    very process took it and does not trust it any more. Only ask of tokens that it does not trust.
    """
    return or_(
        token_holder.c.task_id == NOBODY,
        health_check.c.last_heartbeat.is_(None),
        seconds_since(health_check.c.last_heartbeat) > interval,
        func.coalesce(tenure.c.incarnation, "") == me.incarnation,
    )


def _look(
    me: Node, group_ids: Collection[str], interval: float, renewed: ColumnElement[bool]
) -> Select[Any]:
    """Read the tokens of the groups.

    That is one row of NULLs if there are none, and no row at all if the node is not registered.
    """
    wanted = token_holder.c.group_id.in_(group_ids)
    tokens = (
        select(
            token_holder.c.group_id,
            token_holder.c.task_id,
            token_holder.c.term,
            seconds_since(health_check.c.last_heartbeat).label("age"),
            _free(me, interval).label("free"),
            renewed.label("renewed"),
            tenure.c.resign_requested.is_not(None).label("resign_requested"),
        )
        .select_from(tokens_with_heartbeats())
        .where(wanted)
        .subquery("tokens")
    )
    mine = and_(node.c.task_id == me.entry, node.c.incarnation == me.incarnation)
    return select(tokens).select_from(node.outerjoin(tokens, true())).where(mine)


def _answer(rows: Sequence[Row[Any]]) -> PulseAnswer:
    sightings = tuple(_sighting(row) for row in rows if row.group_id is not None)
    return PulseAnswer(registered=bool(rows), sightings=sightings)


def _sighting(row: Row[Any]) -> Sighting:
    return Sighting(
        group_id=row.group_id,
        holder=row.task_id,
        term=row.term,
        age=None if row.age is None else float(row.age),
        free=bool(row.free),
        renewed=bool(row.renewed),
        resign_requested=bool(row.resign_requested),
    )


def acquire(connection: Connection, me: Node, group_ids: Collection[str], interval: float) -> Acquired:
    """Take the tokens of groups, of those that are free, each in a higher term than any before.

    However many they are, it takes two round trips. Only name groups whose token this process does not
    trust that it holds.
    """
    # All of them lock in this order, so that none waits for another that waits for it.
    names = sorted(group_ids)
    # Of several nodes that insert a row at once, the primary key lets one succeed; the others wait.
    rows = [{"group_id": name, "task_id": NOBODY, "term": 0} for name in names]
    made = ensured(connection.dialect, token_holder, rows)
    looked = _last_terms(names), _lock(names), _whether_free(me, names, interval)
    _, recorded, locked, seen = together(connection, made, *looked)
    terms = {row.group_id: row.term for row in recorded}
    for row in locked:
        # A row that somebody has deleted begins anew; terms do not.
        terms[row.group_id] = max(row.term, terms.get(row.group_id, 0))
    taken = tuple(
        Taken(row.group_id, terms[row.group_id] + 1, _why_free(row, terms[row.group_id]))
        for row in seen
        if row.free
    )
    if not taken:
        return Acquired()
    since = clock()
    together(connection, *_taking(connection.dialect, me, taken))
    return Acquired(taken, since)


def _last_terms(names: Sequence[str]) -> Select[Any]:
    columns = tenure.c
    last = func.max(columns.term).label("term")
    return select(columns.group_id, last).where(columns.group_id.in_(names)).group_by(columns.group_id)


def _lock(names: Sequence[str]) -> Select[Any]:
    columns = token_holder.c
    rows = select(columns.group_id, columns.term).where(columns.group_id.in_(names))
    return rows.order_by(columns.group_id).with_for_update()


def _whether_free(me: Node, names: Sequence[str], interval: float) -> Select[Any]:
    columns = token_holder.c
    age = seconds_since(health_check.c.last_heartbeat).label("age")
    return (
        select(
            columns.group_id,
            columns.task_id,
            age,
            _free(me, interval).label("free"),
            tenure.c.task_id.label("last_holder"),
            tenure.c.given_up,
            tenure.c.resign_requested.is_not(None).label("resign_requested"),
        )
        .select_from(tokens_with_heartbeats())
        .where(columns.group_id.in_(names))
        .order_by(columns.group_id)
    )


def _why_free(seen: Row[Any], last_term: int) -> str:
    if seen.task_id == NOBODY and seen.given_up:
        return f"node {seen.last_holder!r} gave it up: {seen.given_up}"
    if seen.task_id == NOBODY:
        if seen.resign_requested:
            return "it was released, as somebody had asked"
        return "it was released" if last_term else "the first to take it"
    if seen.age is None:
        return f"node {seen.task_id!r} has no heartbeat"
    return f"node {seen.task_id!r} was silent for {seen.age:.1f} s"


def _taking(dialect: Dialect, me: Node, taken: Sequence[Taken]) -> list[UpdateBase]:
    """Return what makes a node the holder of tokens whose rows are locked.

    That includes their first heartbeats, without which the tokens would count as free.
    """
    columns = token_holder.c
    terms = {one.group_id: one.term for one in taken}
    new = {"task_id": me.task_id, "term": case(terms, value=columns.group_id)}
    now = {"last_heartbeat": database_now()}
    beats = [{"task_id": me.task_id, "group_id": one.group_id, **now} for one in taken]
    tenures = [
        {
            "group_id": one.group_id,
            "term": one.term,
            "task_id": me.task_id,
            "incarnation": me.incarnation,
            "reason": fitting(one.reason),
            "acquired": database_now(),
        }
        for one in taken
    ]
    return [
        update(token_holder).where(columns.group_id.in_(terms)).values(new),
        upsert(dialect, health_check, beats, now),
        insert(tenure).values(tenures),
    ]


def release(connection: Connection, tokens: Iterable[Token]) -> tuple[Token, ...]:
    """Give tokens back, wake the standbys, and return those that were still held.

    The rows keep their terms and lose their holder. So a renewal that is still under way comes to
    nothing, and the next holder's term is higher. However many they are, it takes two round trips.
    """
    columns, beats = token_holder.c, health_check.c
    wanted = {token.group_id: token for token in tokens}
    held = select(columns.group_id).where(_held(wanted.values())).order_by(columns.group_id)
    (rows,) = together(connection, held.with_for_update())
    released = tuple(wanted[row.group_id] for row in rows)
    if not released:
        return ()
    names = [token.group_id for token in released]
    theirs = [and_(beats.task_id == token.task_id, beats.group_id == token.group_id) for token in released]
    together(
        connection,
        update(token_holder).where(columns.group_id.in_(names)).values(task_id=NOBODY),
        delete(health_check).where(or_(*theirs)),
        update(tenure).where(_of(released, tenure)).values(released=database_now()),
        *notices(connection.dialect, names),
    )
    return released


def give_up(connection: Connection, tokens: Collection[Token], reason: str | None) -> None:
    """Enter why a holder leaves groups to other nodes, which it cannot run: who has one next says so.

    With None for a reason, it can again: it is no worse a successor than others.
    """
    mine = update(tenure).where(_of(tokens, tenure))
    connection.execute(mine.values(given_up=None if reason is None else fitting(storable(reason))))


def request_resign(connection: Connection, group_id: str) -> Token:
    """Ask the holder of a group's token to hand over, and return the token.

    Raises:
        CoordinationError: nobody holds it, or a Ballerina node, which cannot be asked.
    """
    columns, terms = token_holder.c, tenure.c
    row = connection.execute(
        select(columns.task_id, columns.term).where(columns.group_id == group_id)
    ).one_or_none()
    if row is None or row.task_id == NOBODY:
        raise CoordinationError(f"nobody holds the token of group {group_id!r}; see `taskadapter status`")
    theirs = terms.group_id == group_id, terms.term == row.term, terms.task_id == row.task_id
    asked, *_ = together(
        connection,
        update(tenure).where(*theirs).values(resign_requested=database_now()),
        *notices(connection.dialect, [group_id]),
    )
    if asked != 1:
        raise CoordinationError(
            f"node {row.task_id!r}, which holds the token of group {group_id!r}, is no taskadapter "
            "node and cannot be asked to resign; stop it instead"
        )
    return Token(group_id, row.task_id, row.term)
