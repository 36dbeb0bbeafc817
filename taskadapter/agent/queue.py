"""What is due soon or late on this node, and which run is the next to be claimed. Pure.

Moments of the clock on the wall are aware; `clock` is the monotonic one, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from taskadapter.prefect_api.client import backoff
from taskadapter.rules import ticks

CLAIM_AHEAD = timedelta(seconds=1)
"""A run is claimed, and its process made ready, this long before its time, or longer if it loads longer."""

LOAD_MARGIN = 1.5
"""How many times as long as it took before the loading of a run's code may take this time."""

LONGEST_LOAD_SECONDS = 8.0
"""A run is claimed at most this long before its time: the agent may not know of those further ahead."""

LONGEST_WAIT_SECONDS = 15.0
"""How long a run that was ended before its body waits at most before it is tried again."""

MOST_HOLDS = 5
"""So often a run that cannot be claimed keeps the later ticks of its job behind it."""

BRIEF_SECONDS = 2.0
"""A run that takes no longer has the next one of its job wait behind it, with its process made ready."""

Which = Callable[[FlowRun], bool]
"""Says of a run whether it is meant."""


def any_run(_: FlowRun) -> bool:
    """Mean every run."""
    return True


def due(flow_run: FlowRun) -> datetime:
    """Return when a run is to start: its scheduled time, or when it was made."""
    moment = flow_run.next_scheduled_start_time or flow_run.expected_start_time or flow_run.created
    return moment if moment is not None else datetime.now(UTC)


class Tries(NamedTuple):
    """How often a run was ended before its body, and from when on the clock it may be tried again."""

    times: int
    again: float


class Queue:
    """Runs that are known and not taken, the first of each job first."""

    def __init__(self) -> None:
        self._upcoming: dict[UUID, FlowRun] = {}
        # When runs have been through, and when some were put back: older answers do not know of it.
        self._through: dict[UUID, float] = {}
        self._returned: dict[UUID, float] = {}
        self._tries: dict[UUID, Tries] = {}
        # How often the API has failed a run's claim, and those that wait for what it tells next.
        self._failures: dict[UUID, int] = {}
        self._held: set[UUID] = set()
        # Runs whose claim had no answer, and when that was: they may be this node's.
        self._doubtful: dict[UUID, tuple[float, FlowRun]] = {}
        self._load_seconds: dict[UUID | None, float] = {}
        self._run_seconds: dict[UUID | None, float] = {}

    def __len__(self) -> int:
        """Return how many runs wait here."""
        return len(self._upcoming)

    @property
    def has_untried(self) -> bool:
        """Whether a run waits here that has not been tried, to no avail, before."""
        return any(run_id not in self._tries for run_id in self._upcoming)

    @property
    def runs(self) -> list[FlowRun]:
        """What waits here."""
        return list(self._upcoming.values())

    def found(self, runs: Iterable[FlowRun], asked: float, taken: Collection[UUID]) -> None:
        """Take note of all runs that are due soon or late; they replace those that were known.

        Args:
            runs: as the API had them.
            asked: when it was asked, on the clock: what has been through since is no news.
            taken: the runs that are not to wait here: they have been taken, and are not over.
        """
        self._through = {run_id: when for run_id, when in self._through.items() if when >= asked}
        self._returned = {run_id: when for run_id, when in self._returned.items() if when >= asked}
        through = {*taken, *self._through}
        returned = {id_: run for id_, run in self._upcoming.items() if id_ in self._returned}
        listed = {run.id: run for run in runs}
        self._doubtful = {id_: both for id_, both in self._doubtful.items() if id_ not in listed}
        found = {id_: run for id_, (when, run) in self._doubtful.items() if when < asked} | listed
        self._upcoming = {id_: run for id_, run in found.items() if id_ not in through} | returned
        known = self._upcoming.keys() | through
        self._tries = {id_: tries for id_, tries in self._tries.items() if id_ in known}
        self._failures = {id_: times for id_, times in self._failures.items() if id_ in known}
        self._held.clear()

    def forget(self, which: Which = any_run) -> None:
        """Know nothing more of some runs, or of all."""
        self._doubtful = {id_: both for id_, both in self._doubtful.items() if not which(both[1])}
        self._upcoming = {id_: run for id_, run in self._upcoming.items() if not which(run)}

    def take(self, flow_run: FlowRun) -> None:
        """Have a run wait here no longer."""
        self._doubtful.pop(flow_run.id, None)
        del self._upcoming[flow_run.id]

    def put(self, flow_run: FlowRun) -> None:
        """Have a run wait here that was taken too early."""
        self._upcoming[flow_run.id] = flow_run

    def put_back(self, flow_run: FlowRun, clock: float) -> None:
        """Have a claimed run wait here again: later ticks of its job stay behind it."""
        self.put(flow_run)
        self._returned[flow_run.id] = clock

    def hold(self, flow_run: FlowRun, clock: float) -> bool:
        """Have a run whose claim the API has failed wait for the next look, and later ticks behind it.

        Returns:
            False if it fails again and again: the job goes on without it, until a look finds it again.
        """
        times = self._failures[flow_run.id] = self._failures.get(flow_run.id, 0) + 1
        if times > MOST_HOLDS:
            return False
        self._held.add(flow_run.id)
        self.put_back(flow_run, clock)
        return True

    def doubt(self, flow_run: FlowRun, clock: float) -> None:
        """Have a run whose claim has had no answer asked for again; a look may not list it."""
        self._doubtful[flow_run.id] = clock, flow_run

    def through(self, run_id: UUID, clock: float) -> None:
        """Take note that a run is over, unless it waits here again."""
        if run_id not in self._upcoming:
            self._through[run_id] = clock

    def try_later(self, run_id: UUID, clock: float) -> int:
        """Let a run that was ended before its body wait before it is tried again, longer each time.

        Returns:
            How often it has been before.
        """
        times, _ = self._tries.get(run_id, Tries(0, 0.0))
        self._tries[run_id] = Tries(times + 1, clock + backoff(times, LONGEST_WAIT_SECONDS))
        return times

    def loaded(self, job_id: UUID | None, seconds: float) -> None:
        """Take note of how long the code of a job takes to load."""
        self._load_seconds[job_id] = seconds

    def ran(self, job_id: UUID | None, seconds: float) -> None:
        """Take note of how long a run of a job has taken from the beginning of its body."""
        self._run_seconds[job_id] = seconds

    def retain(self, job_ids: AbstractSet[UUID]) -> None:
        """Remember nothing of how long other jobs take."""
        self._load_seconds = {id_: seconds for id_, seconds in self._load_seconds.items() if id_ in job_ids}
        self._run_seconds = {id_: seconds for id_, seconds in self._run_seconds.items() if id_ in job_ids}

    def may_follow(self, flow_run: FlowRun) -> bool:
        """Return whether a tick may be claimed while those before it go on, as far as its job allows.

        They end soon, and nobody has asked for a run of the job, which is to have the next place.
        """
        job_id = flow_run.deployment_id
        if not ticks.is_tick(flow_run) or self._run_seconds.get(job_id, BRIEF_SECONDS) >= BRIEF_SECONDS:
            return False
        return all(ticks.is_tick(run) for run in self._upcoming.values() if run.deployment_id == job_id)

    def first(self, may_start: Which, clock: float) -> FlowRun | None:
        """Return the run that is to be claimed next, of those that may start."""
        in_order = sorted(self.firsts(), key=self.claimed_at)
        return next((run for run in in_order if not self._waits(run, clock) and may_start(run)), None)

    def firsts(self) -> list[FlowRun]:
        """Return what may be next: of the ticks of one job that is the first, of other runs each."""
        firsts: dict[UUID | None, FlowRun] = {}
        for run in self._upcoming.values():
            key = run.deployment_id if ticks.is_tick(run) else run.id
            if key not in firsts or due(run) < due(firsts[key]):
                firsts[key] = run
        return list(firsts.values())

    def claimed_at(self, flow_run: FlowRun) -> datetime:
        """Return when to claim a run, so that its code is loaded at its time."""
        seconds = LOAD_MARGIN * self._load_seconds.get(flow_run.deployment_id, 0.0)
        return due(flow_run) - max(CLAIM_AHEAD, timedelta(seconds=min(LONGEST_LOAD_SECONDS, seconds)))

    def _waits(self, flow_run: FlowRun, clock: float) -> bool:
        tries = self._tries.get(flow_run.id)
        return flow_run.id in self._held or (tries is not None and tries.again > clock)

    def next_try(self, clock: float) -> float | None:
        """Return in how many seconds a run may be tried again that was ended before its body."""
        seconds = [tries.again - clock for tries in self._tries.values()]
        return min((wait for wait in seconds if wait > 0), default=None)
