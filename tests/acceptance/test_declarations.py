"""Every form of declaration, deployed with Prefect's own command and run by an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.acceptance.project import Prefect, Project

COUNTERS = """
    from ledger import note
    from taskadapter import Service

    class Counter(Service):
        job: str
        i: int = 1

        def execute(self) -> None:
            note(self.job, "ran", i=self.i)
            self.i += 1
"""

DECORATED = """
    from ledger import note
    from taskadapter import Listener, Service, TriggerConfiguration, WarmBackupConfig

    listener = Listener(
        trigger=TriggerConfiguration(interval=2),
        warm_backup_config=WarmBackupConfig(group_id="forms", liveness_check_interval=3),
    )

    @listener.service("a class")
    class Decorated(Service):
        i: int = 1

        def execute(self) -> None:
            note("a class", "ran", i=self.i)
            self.i += 1

    @listener.service("a function")
    def function() -> None:
        note("a function", "ran", i=1)

    @listener.service("an async function")
    async def async_function() -> None:
        note("an async function", "ran", i=1)

    class Here(Service):
        i: int = 1

        async def execute(self) -> None:
            note("attached in its module", "ran", i=self.i)
            self.i += 1

    listener.attach(Here(i=20), "attached in its module")
"""

ATTACHED = """
    from counters import Counter  # beside this module
    from library.counters import Counter as FromAPackage
    from taskadapter import Listener, TriggerConfiguration

    Listener(trigger=TriggerConfiguration(interval=2)).attach(Counter(job="ten", i=10), "ten")
    listener = Listener.from_config("Config.toml")
    listener.attach(Counter(job="v1.2: again", i=30), "v1.2: again")
    listener.attach(FromAPackage(job="of a package", i=40), "of a package")
"""

FORMS = {
    "a class": 1,
    "a function": 1,
    "an async function": 1,
    "attached in its module": 20,
    "ten": 10,
    "v1.2: again": 30,
    "of a package": 40,
}
"""The names of the services, and what each begins to count from."""


@pytest.fixture
def deployed(project: Project) -> None:
    """The project's jobs, deployed as the README says."""
    project.write("flows/counters.py", COUNTERS)
    project.write("library/__init__.py", "")
    project.write("library/counters.py", COUNTERS)
    project.write("flows/decorated.py", DECORATED)
    project.write("flows/attached.py", ATTACHED)
    project.write("Config.toml", "[trigger]\ninterval = 2\n")
    project.render()
    project.prefect("--no-prompt", "deploy", "--all")


@pytest.mark.usefixtures("deployed")
def test_every_form_is_deployed_and_runs(project: Project, prefect: Prefect) -> None:
    """Each runs on its schedule, and what has a state counts on from where it was declared to begin."""
    with project.agent("node-1"):
        for name, first in FORMS.items():
            entries = project.wait_for(name, "ran", 2)
            step = 0 if "function" in name else 1
            assert [entry["i"] for entry in entries[:2]] == [first, first + step], name

    assert prefect.runs("ten", "Failed", "Crashed") == []

    # Nodes and `prefect deploy` agree on what was deployed.
    names = ["a class", "an async function", "attached in its module", "v1.2: again", "of a package"]

    def deployed() -> list[dict[str, Any]]:
        # What an agent has polled shows as ready until it has not been for a minute.
        return [prefect.deployment(name).model_dump(exclude={"last_polled", "status"}) for name in names]

    before = deployed()
    project.deploy(env={"PYTHONPATH": "flows"})
    assert deployed() == before
