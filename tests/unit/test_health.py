"""What a node needs, and which of it is not there."""

from __future__ import annotations

import httpx
import pytest

from taskadapter.agent.health import Condition, unmet
from taskadapter.coordination.heartbeat import Vitals
from taskadapter.errors import DatabaseUnavailableError, SchemaError

WELL = Vitals(is_registered=True, fault="", lacks_tables=False)
SILENT = Vitals(is_registered=True, fault="it has not answered", lacks_tables=False)
WITHOUT_TABLES = Vitals(is_registered=False, fault="token_holder: missing", lacks_tables=True)
TWIN = Vitals(is_registered=False, fault="", lacks_tables=False)
API_FAULT = httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("vitals", "fault", "found"),
    [
        (WELL, None, set()),
        (None, None, {Condition.API, Condition.REGISTERED}),
        (WELL, API_FAULT, {Condition.API}),
        (WELL, RuntimeError("ours"), {Condition.API}),
        (SILENT, None, {Condition.DATABASE}),
        (SILENT, API_FAULT, {Condition.API, Condition.DATABASE}),
        (WELL, DatabaseUnavailableError("away"), {Condition.DATABASE}),
        (WITHOUT_TABLES, None, {Condition.SCHEMA, Condition.REGISTERED}),
        (WELL, SchemaError("of version 1"), {Condition.SCHEMA}),
        (None, SchemaError("of version 999"), {Condition.SCHEMA, Condition.REGISTERED}),
        (None, API_FAULT, {Condition.API, Condition.REGISTERED}),
        (TWIN, None, {Condition.REGISTERED}),
    ],
)
def test_a_condition_that_is_not_met_says_what_is_wrong(vitals, fault, found):
    assert unmet(vitals, fault, can_start_processes=True) == found


def test_a_node_that_can_start_no_process():
    assert unmet(WELL, None, can_start_processes=False) == {Condition.PROCESSES}
