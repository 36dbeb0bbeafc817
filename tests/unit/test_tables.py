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
        "for 1 hour",
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
        (Line(AT, "waiting", late=95), ["waiting", "1 minute 35 seconds"]),
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
