"""Where the flow of an attached instance is found: ``flows/counters.py:Counter.as_service.ten``.

``prefect deploy`` loads a flow from the place that it is told, and takes its name from there. What a
decorator has made a flow is one by its own name. Of an attached instance there is only its class in a
module: `Service.as_service` makes a flow of that, by any name that it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from prefect import Flow

    from taskadapter.declare.jobs import Service

_MARK = ".as_service."


def entrypoint(place: str, name: str) -> str:
    """Return where the flow of a service is found whose class is at ``place``.

    A dot and a colon separate the parts of an entrypoint; those of the name are written otherwise. So is an
    underline at its beginning, for attributes that are none of the flows have such names.
    """
    if name.startswith("_"):
        name = f"%5F{name[1:]}"
    return place + _MARK + name.replace(".", "%2E").replace(":", "%3A")


def place_of(entrypoint: str) -> str:
    """Return where the class of an attached service is; any other entrypoint as it is."""
    return entrypoint.rpartition(_MARK)[0] or entrypoint


FETCH_CODE = (
    "start the agent in the project's folder, deploy with a pull step that fetches the code, or, if the "
    "file was renamed, deploy again"
)
"""What to do where a node lacks the file of an entrypoint."""


def file_of(entrypoint: str) -> Path | None:
    """Return the file that an entrypoint names; None where it names a module."""
    path, is_script, _ = place_of(entrypoint).rpartition(".py:")
    return Path(f"{path}.py") if is_script else None


class AsService:
    """The attribute `Service.as_service`: its own attributes are flows, by the names of services."""

    def __get__(self, instance: Service | None, owner: type[Service]) -> Flows:
        """Return the flows of a class."""
        return Flows(owner)


class Flows:
    """The flows that a service's class may be, each by its name.

    They have the shape of the flow that runs, for whoever deploys it; a node makes that one of the class,
    with the state and the trigger that are deployed.
    """

    def __init__(self, cls: type[Service]) -> None:
        self._cls = cls

    def __getattr__(self, name: str) -> Flow[..., Any]:
        """Return the flow of that name."""
        from taskadapter.declare.triggers import TriggerConfiguration
        from taskadapter.execution.flow import service_flow
        from taskadapter.rules.ticks import ONE_TIME

        if name.startswith("__"):
            raise AttributeError(name)
        shape = self._cls.model_construct()
        return service_flow(shape, unquote(name), TriggerConfiguration(interval=ONE_TIME))
