"""Many nodes under every fault we know of: never two that trust, and soon one that does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from taskadapter.coordination.messages import ReleaseAsked, StopAsked
from taskadapter.coordination.timing import Timing
from tests.unit.simulation import GROUPS, Mutation, Network, World

if TYPE_CHECKING:
    from collections.abc import Callable

TIMINGS = [
    Timing(liveness_check_interval=interval, heartbeat_frequency=frequency)
    for interval, frequency in [(3.0, 1.0), (6.0, 1.0), (30.0, 5.0)]
]
NAMES = ["node-1", "node-2", "node-3"]

# In units of the interval, so that faults last about as long as trust does.
delays = st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0, 1.5])
spans = st.sampled_from([0.01, 0.05, 0.2, 0.35, 0.5, 0.9, 1.0, 1.1, 3.0])
networks = st.builds(Network, there=delays, back=delays, lost=st.booleans(), deaf=st.booleans())
rates = st.sampled_from([0.99, 1.0, 1.01])
offsets = st.sampled_from([-1000.0, 0.0, 5.0])
which = st.integers(0, 9)


class Simulation(RuleBasedStateMachine):
    """What can happen to the nodes, in any order. `World.check` runs at every event."""

    mutation = Mutation.NONE

    @initialize(timing=st.sampled_from(TIMINGS), offset=offsets)
    def begin(self, timing: Timing, offset: float) -> None:
        self.world = World(timing, offset=offset, mutation=self.mutation)
        for name in NAMES[:2]:
            self.world.start(name)
        self.pass_time(1.0)

    @rule(span=spans)
    def pass_time(self, span: float) -> None:
        self.world.advance(span * self.world.timing.liveness_check_interval)

    @rule(which=which, network=networks)
    def disturb(self, which: int, network: Network) -> None:
        unit = self.world.timing.liveness_check_interval
        if process := self.pick(which):
            process.network = replace(network, there=network.there * unit, back=network.back * unit)

    @rule(which=which)
    def pause_or_resume(self, which: int) -> None:
        if process := self.pick(which):
            if process.paused:
                self.world.resume(process)
            else:
                process.paused = True

    @rule(which=which)
    def crash(self, which: int) -> None:
        if process := self.pick(which):
            self.world.crash(process)

    @rule(name=st.sampled_from(NAMES), rate=rates, offset=offsets)
    def start(self, name: str, rate: float, offset: float) -> None:
        if len(self.world.processes) < 4:
            self.world.start(name, rate=rate, offset=offset)

    @rule(which=which, group_id=st.sampled_from(sorted(GROUPS)), stop=st.booleans())
    def hand_over(self, which: int, group_id: str, stop: bool) -> None:
        if process := self.pick(which):
            self.world.tell(process, StopAsked() if stop else ReleaseAsked(group_id))

    def pick(self, which: int) -> Any:
        processes = self.world.processes
        return processes[which % len(processes)] if processes else None

    def teardown(self) -> None:
        """Faults stop: soon every group has a node that trusts, and keeps it."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for process in list(world.processes):
            process.network = Network()
            if process.paused:
                world.resume(process)
        world.start("node-4")
        # The slowest call is still under way, a name may have to become free, and then a token.
        world.advance(6 * world.timing.liveness_check_interval + 10)
        self.assert_settled()
        world.advance(2 * world.timing.liveness_check_interval)
        self.assert_settled()

    def assert_settled(self) -> None:
        for group_id in GROUPS:
            assert len(self.world.trusting(group_id)) == 1, self.logs()

    def logs(self) -> str:
        return "\n".join(f"{p.incarnation}: {p.log}" for p in self.world.processes)


def test_never_two_and_soon_one() -> None:
    """At most one node trusts at any time, terms only rise, and once faults stop one is active."""
    seeded = settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=60,
        stateful_step_count=30,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Simulation, settings=seeded)


def the_last_answer_comes_late(world: World) -> None:
    holder = world.start("node-1")
    world.advance(0.5)
    world.start("node-2")
    holder.network = Network(back=1.7)
    world.advance(1)
    holder.network = Network(there=100)
    world.advance(10)


def two_nodes_start_at_once(world: World) -> None:
    for name in NAMES:
        world.start(name).network = Network(there=0.1)
    world.advance(10)


def a_renewal_takes_as_long_as_a_takeover(world: World) -> None:
    holder = world.start("node-1")
    world.start("node-2")
    world.advance(1)
    holder.network = Network(there=5.2, deaf=True)
    world.advance(10)


@pytest.mark.parametrize(
    ("mutation", "happens"),
    [
        (Mutation.DEADLINE_FROM_ANSWER, the_last_answer_comes_late),
        (Mutation.UNLOCKED_TAKEOVER, two_nodes_start_at_once),
        (Mutation.UNLOCKED_RENEWAL, a_renewal_takes_as_long_as_a_takeover),
    ],
)
def test_a_broken_rule_is_noticed(mutation: Mutation, happens: Callable[[World], None]) -> None:
    """Each mistake that the protocol avoids lets two nodes trust; the protocol itself does not."""
    timing = Timing(liveness_check_interval=6, heartbeat_frequency=1)
    happens(World(timing))
    with pytest.raises(AssertionError, match="trust"):
        happens(World(timing, mutation=mutation))
