"""The private names of Prefect that we touch: all of them, each with its reason.

A test of each fails when Prefect moves it.
"""

from __future__ import annotations

import sys

from prefect._internal import control_listener


def intend_cancellation() -> None:
    """Tell Prefect's engine in this process that the coming SIGTERM means that the run is cancelled.

    Prefect's own runner says so over a socket that it opens for each process it starts; our hosts
    outlive a run. Without it the engine reports the run as Crashed, and runs the wrong hooks.
    """
    control_listener._set_intent("cancel")


def is_being_deployed() -> bool:
    """Return whether ``prefect deploy`` is what imports the flows of this process.

    It refuses a work pool that does not exist before any step of ``prefect.yaml`` can create it;
    importing the flow comes first.
    """
    return "prefect.cli.deploy._core" in sys.modules
