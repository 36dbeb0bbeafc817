"""Whether a node can do what it is there for: run jobs, or stand by for them.

That is what `prefect worker start --with-healthcheck` serves, and each condition is a metric.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from taskadapter.errors import CoordinationError, SchemaError

if TYPE_CHECKING:
    from taskadapter.agent.hosts import HostPool
    from taskadapter.agent.membership import Membership
    from taskadapter.agent.sight import Sight
    from taskadapter.coordination.heartbeat import Vitals


class Condition(StrEnum):
    """What a node needs; one that is not met says what is wrong."""

    API = "api"
    """Prefect's API answers."""

    DATABASE = "database"
    """The coordination database answers, and lets the node take the tokens that are free."""

    SCHEMA = "schema"
    """It has the tables of this release."""

    REGISTERED = "registered"
    """The node is entered there, under a name that no other live process has."""

    PROCESSES = "processes"
    """The node can start processes."""


class Health:
    """The health of a node.

    Args:
        membership: its part in the groups.
        hosts: the processes.
        sight: what its looks at the API come to.
    """

    def __init__(self, membership: Membership, hosts: HostPool, sight: Sight) -> None:
        self._membership = membership
        self._hosts = hosts
        self._sight = sight

    def unmet(self) -> frozenset[Condition]:
        """Return the conditions that are not met now; may be called from any thread."""
        return unmet(
            self._membership.vitals, self._sight.fault, can_start_processes=self._hosts.broken_for == 0
        )


def unmet(
    vitals: Vitals | None, fault: Exception | None, *, can_start_processes: bool
) -> frozenset[Condition]:
    """Return the conditions that are not met.

    Args:
        vitals: what the node's heartbeat says of it; None before it has looked at its work pool.
        fault: what its last look at the API failed with; None if it did not.
        can_start_processes: whether it can.
    """
    is_entered = vitals is not None and vitals.is_registered
    is_silent = vitals is not None and bool(vitals.fault)
    lacks_tables = isinstance(fault, SchemaError) or (vitals is not None and vitals.lacks_tables)
    is_of_database = isinstance(fault, CoordinationError)
    found = {
        # The first look has to do with both: what it fails with says which.
        Condition.API: vitals is None if fault is None else not is_of_database,
        Condition.DATABASE: (is_silent or is_of_database) and not lacks_tables,
        Condition.SCHEMA: lacks_tables,
        Condition.REGISTERED: not is_entered,
        Condition.PROCESSES: not can_start_processes,
    }
    return frozenset(condition for condition, is_so in found.items() if is_so)
