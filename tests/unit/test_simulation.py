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
from tests.unit.simulation import GROUPS, Mutation, Network, Process, World

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
steps = st.sampled_from([-1000.0, -1.1, -0.3, 0.3, 1.1, 1000.0])
which = st.integers(0, 9)


class Simulation(RuleBasedStateMachine):
    """What can happen to the nodes, in any order. `World.check` runs at every event."""

    mutation = Mutation.NONE
    stepped_at = float("-inf")

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
        if self.world.now - self.stepped_at < self.world.timing.liveness_check_interval:
            self.pass_time(1.0)
        if len(self.world.processes) < 4:
            self.world.start(name, rate=rate, offset=offset)

    @rule(step=steps)
    def step_clock(self, step: float) -> None:
        # Of a heartbeat that is older than its first look a node knows nothing but its age.
        if all(process.lease.looked_at >= 0 for process in self.world.processes):
            self.world.step_clock(step * self.world.timing.liveness_check_interval)
            self.stepped_at = self.world.now

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


def the_database_has_its_clock_set(world: World) -> None:
    world.start("node-1")
    world.advance(0.5)
    world.start("node-2")  # which looks half a second after each heartbeat
    world.advance(9.7)
    world.step_clock(60)
    world.advance(10)


@pytest.mark.parametrize(
    ("mutation", "happens"),
    [
        (Mutation.DEADLINE_FROM_ANSWER, the_last_answer_comes_late),
        (Mutation.UNLOCKED_TAKEOVER, two_nodes_start_at_once),
        (Mutation.UNLOCKED_RENEWAL, a_renewal_takes_as_long_as_a_takeover),
        (Mutation.DATABASE_CLOCK, the_database_has_its_clock_set),
    ],
)
def test_a_broken_rule_is_noticed(mutation: Mutation, happens: Callable[[World], None]) -> None:
    """Each mistake that the protocol avoids lets two nodes trust; the protocol itself does not."""
    timing = Timing(liveness_check_interval=6, heartbeat_frequency=1)
    happens(World(timing))
    with pytest.raises(AssertionError, match="trust"):
        happens(World(timing, mutation=mutation))


@pytest.mark.parametrize("step", [-1000.0, -1.1, -0.3, 0.3, 1.1, 1000.0])
@pytest.mark.parametrize(
    "timing", [*TIMINGS, Timing(liveness_check_interval=30, heartbeat_frequency=1)], ids=str
)
class TestClockSteps:
    """The database's clock is set, by so many intervals, at any moment between two heartbeats."""

    def settle(self, timing: Timing) -> tuple[World, Process, Process]:
        world = World(timing)
        active = world.start("node-1")
        world.advance(timing.heartbeat_frequency / 3)
        standby = world.start("node-2")
        world.advance(2 * timing.liveness_check_interval)
        return world, active, standby

    def test_who_lives_keeps_its_token(self, timing: Timing, step: float) -> None:
        """Whether a standby has watched it for long, has just come back, or has just been started."""
        world, active, standby = self.settle(timing)
        interval, beat = timing.liveness_check_interval, timing.heartbeat_frequency
        for phase in range(7):
            standby.network = Network(lost=phase % 2 == 1)
            world.advance(interval)
            world.advance(beat * phase / 7)
            world.step_clock(step * interval)
            standby.network = Network()
            late = world.start(f"node-{phase + 3}")
            for _ in range(20):
                world.advance(interval / 10)
                assert [world.trusting(group_id) for group_id in GROUPS] == [[active], [active]], active.log
            world.crash(late)
        assert {token.term for token in world.database.tokens.values()} == {1}

    @pytest.mark.parametrize("phase", range(8))
    def test_who_is_dead_is_followed_in_time(self, timing: Timing, step: float, phase: int) -> None:
        """Whenever the step comes after its last heartbeat; that may have been seen after the step only."""
        world, active, standby = self.settle(timing)
        interval, beat = timing.liveness_check_interval, timing.heartbeat_frequency
        world.advance(0.02)  # its heartbeat has arrived, and the standby has not looked
        last = [sent for sent, _ in active.calls][-1] + active.network.there
        world.crash(active)
        world.advance(phase * interval / 8)
        world.step_clock(step * interval)
        # When the last heartbeat came, which the standby had not seen, only that clock could have said.
        unknown = beat if phase == 0 and step < 0 else 0
        world.advance(last + interval + max(1, unknown) + 0.1 - world.now)
        assert [world.trusting(group_id) for group_id in GROUPS] == [[standby], [standby]], standby.log
