"""What the command shows."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from taskadapter import tables
from taskadapter.audit import Line
from taskadapter.coordination.overview import GroupStatus, NodeStatus, Status
from taskadapter.prefect_api.pool import Domain

LONG = "orders-of-all-customers-in-northern-europe-" + "x" * 40
PLACE = "database tasks.db"
DOMAIN = Domain(liveness_check_interval=30)


def group(name: str = "group", holder: str | None = "node-1", **changes: object) -> GroupStatus:
    values: dict[str, object] = {
        "group_id": name,
        "holder": holder,
        "term": 7,
        "heartbeat_age": 1.5,
        "held_for": 3600.0 if holder else None,
        "reason": "node 'node-2' was silent for 31.2 s" if holder else None,
        "resign_requested": False,
    }
    return GroupStatus(**(values | changes))  # type: ignore[arg-type]


def node(name: str, *groups: str, age: float = 0.4) -> NodeStatus:
    return NodeStatus(
        task_id=name,
        host=f"{name}.example.com",
        pid=4711,
        group_ids=groups,
        last_seen_age=age,
        up_for=86400.0,
    )


def shown(what: object) -> str:
    """Return what a screen of eighty columns shows."""
    screen = io.StringIO()
    Console(file=screen, width=80).print(what)
    return screen.getvalue().replace("\N{NO-BREAK SPACE}", " ")


def cells(text: str) -> list[str]:
    """Return each column's text, its lines joined: a folded cell is whole again."""
    rows = [line.strip("│").split("│") for line in text.splitlines() if line.startswith("│")]
    width = max(len(row) for row in rows)
    return ["".join(row[n].strip() for row in rows if len(row) > n) for n in range(width)]


def test_the_status_says_who_is_active_and_who_would_take_over():
    """For each group; also whether somebody has asked for a handover."""
    now = Status(
        (group(resign_requested=True), group("idle", None)),
        (node("node-1", "group"), node("node-2", "group", "idle")),
    )
    text = shown(tables.status(now, DOMAIN, PLACE))

    for part in (
        "in term 7",
        "for 1 h",
        "expires in 28.5 s",
        "asked to hand over",
        "nobody",
        "group: active",
        f"As {PLACE} has it.",
    ):
        assert part in text
    found = tables.status_as_json(now, DOMAIN, PLACE)["groups"]
    assert isinstance(found, list)
    assert [one["standing_by"] for one in found] == [["node-2"], ["node-2"]]
    assert [one["expires_in"] for one in found] == [28.5, None]


def test_a_node_that_is_silent_stands_by_for_nothing():
    """After a lease without a sign of life it is gone, whether it was active or a standby."""
    now = Status(
        (group(heartbeat_age=36.9),),
        (node("node-1", "group", age=36.9), node("node-2", "group", age=48), node("node-3", "group")),
    )
    text = shown(tables.status(now, DOMAIN, PLACE))

    for part in ("expired 6.9 s ago", "group: was active", "silent for 48.0 s", "group: gone"):
        assert part in text
    assert text.count("up for") == 1
    assert text.count("standby") == 1
    found: Any = tables.status_as_json(now, DOMAIN, PLACE)
    assert found["groups"][0]["standing_by"] == ["node-3"]
    assert [one["lives"] for one in found["nodes"]] == [False, False, True]


def test_what_is_paused_is_told_with_who_is_active():
    """A node holds its groups all the same."""
    now = Status((group(),), (node("node-1", "group"),))
    paused = {"work queue 'group' (concurrency limit 0)", "work pool 'pool'"}

    text = shown(tables.status(now, DOMAIN, PLACE, paused))

    assert "Paused in Prefect, and nothing begins until it is resumed: work pool 'pool', " in text
    assert tables.status_as_json(now, DOMAIN, PLACE, paused)["paused"] == sorted(paused)
    assert "Paused" not in shown(tables.status(now, DOMAIN, PLACE))


def test_a_node_of_ballerinas_is_active_too():
    """Of it the database knows less."""
    text = shown(tables.status(Status((group(held_for=None, reason=None),), ()), DOMAIN, PLACE))
    assert "in term 7" in text
    assert "for " not in text


def test_nothing_is_cut_on_a_screen_of_eighty_columns():
    """However long names are."""
    now = Status((group(LONG, f"node-{LONG}"),), (node(f"node-{LONG}", LONG),))
    text = shown(tables.status(now, DOMAIN, PLACE))

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert any(LONG in cell for cell in cells(text))


AT = "2026-01-01T00:00:00+00:00"

CAUSE = (
    "its code could not be loaded: ModuleNotFoundError: No module named 'warehouse.connections'; install it"
)


def test_a_long_reason_is_told_once_and_whole():
    """Below the table, where there is room: in a cell it would be cut to pieces, and again in each row."""
    lines = [Line(AT, "Crashed", number, CAUSE) for number in range(1, 51)]
    text = shown(
        tables.ledger([*lines, Line(AT, "Skipped", reason="another, but as long as the first one is")])
    )

    assert text.endswith(
        "(1) its code could not be loaded: ModuleNotFoundError: No module named \n"
        "'warehouse.connections'; install it\n"
        "(2) another, but as long as the first one is\n"
    )
    assert text.count("Crashed: (1)") == 50
    assert text.count("Skipped: (2)") == 1
    assert len(text.splitlines()) == 3 + 50 * 3 + 2 + 3


def test_why_a_node_is_active_is_told_whole():
    """Of a node that has given the group up, as the log has it."""
    text = shown(
        tables.status(Status((group(reason=CAUSE), group("other", reason=CAUSE)), ()), DOMAIN, PLACE)
    )
    assert text.count(" (1) ") == 2
    assert text.replace(" \n", " ").count(f"(1) {CAUSE}") == 1


def test_what_is_told_is_shown_as_it_is():
    """Brackets in it are no style."""
    text = shown(tables.ledger([Line(AT, "Skipped", reason="not a [red] one"), Line(AT, "[bold]")]))
    assert "[red]" in text
    assert "[bold]" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (59.9, "59.9 s"),
        (60, "1 min"),
        (87.5, "1 min 27 s"),
        (3687, "1 h 1 min"),
        (93600, "1 d 2 h"),
    ],
)
def test_a_time_is_short(seconds, words):
    """It stays on one line of its cell."""
    assert f"│ {words} " in shown(tables.ledger([Line(AT, "waiting", late=seconds)]))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            Line(AT, "Completed", 3, None, 0.25, 1.5, "node-1", "group", 7, "x" * 36),
            ["no. 3", "Completed", "0.2 s", "term 7"],
        ),
        (
            Line(AT, "AwaitingConcurrencySlot", 3, None, 95000.0, 1.5, f"node-{LONG}", LONG, 7, "x" * 36),
            ["2026-01-01 00:00:00 UTC", "x" * 36, "AwaitingConcurrencySlot", f"node-{LONG}", "term 7"],
        ),
        (Line("2026-01-01T00:00:00.500+00:00", "missing"), ["2026-01-01 00:00:00.500 UTC"]),
        (Line(None, "Failed", took=1.5, node="node-1", flow_run="x" * 36), ["by hand", "Failed"]),
        (Line(AT, "missing"), ["missing"]),
        (Line(AT, "waiting", late=95), ["waiting", "1 min 35 s"]),
        (Line(AT, "Skipped", reason="it is late"), ["Skipped: it is late"]),
    ],
    ids=["a tick", "long names", "half a second", "by hand", "missing", "waiting", "skipped"],
)
def test_the_ledger_says_what_became_of_each_tick(line, parts):
    """When, how late, how long, where, and why not."""
    text = shown(tables.ledger([line]))
    assert "…" not in text
    for part in parts:
        assert any(part.replace(" ", "") in cell.replace(" ", "") for cell in cells(text)), text
