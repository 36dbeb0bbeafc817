"""What the nursery does ahead for all runs, with nothing to show for it, and without a thread."""

import logging
import signal
import threading

from prefect.flow_engine import FlowRunEngine
from prefect.settings import PREFECT_API_URL, temporary_settings

from taskadapter.execution import rehearsal
from taskadapter.execution.host import connected


def test_a_rehearsal_gets_as_far_as_the_body(monkeypatch, caplog, capfd):
    """It would be of no use if Prefect's engine ended it before; nobody hears of it."""
    reached = []
    call = FlowRunEngine.call_flow_fn

    def call_flow_fn(engine):
        reached.append(engine.state.name)
        return call(engine)

    monkeypatch.setattr(FlowRunEngine, "call_flow_fn", call_flow_fn)
    before = threading.enumerate(), signal.getsignal(signal.SIGTERM)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), connected(csrf=False):
        rehearsal.rehearse_run()

    assert reached == ["Running"]
    assert (threading.enumerate(), signal.getsignal(signal.SIGTERM)) == before
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("test").isEnabledFor(logging.CRITICAL)
