"""What the guide for those who come from Ballerina shows can be declared, block by block."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from taskadapter import Listener
from taskadapter.declare.registry import listeners
from tests.pages import blocks

BLOCKS, TOML = (blocks("from-ballerina", kind) for kind in ("python", "toml"))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_python_declares(project: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As a module of a project does, beside the configuration file that the guide shows."""
    monkeypatch.syspath_prepend(str(project))
    (project / "Config.toml").write_text(TOML[0])
    (project / f"guide_{number}.py").write_text("ticker = None\n" + BLOCKS[number])
    module = importlib.import_module(f"guide_{number}")

    declared = {value for value in vars(module).values() if isinstance(value, Listener)}
    assert bool(declared) is ("Listener(" in BLOCKS[number] or "from_config" in BLOCKS[number])
    assert declared == set(listeners)


def test_the_file_of_the_guide_says_what_it_shows(project: Path) -> None:
    """Every key of it, in Ballerina's spelling."""
    (project / "Config.toml").write_text(TOML[0])
    listener = Listener.from_config("Config.toml", table="acme.reports")

    assert (listener.trigger.interval, listener.trigger.max_count) == (60, 100)
    assert listener.group_id == "reports"
    assert listener.domain is not None
    assert (listener.domain.liveness_check_interval, listener.domain.heartbeat_frequency) == (30, 1)
