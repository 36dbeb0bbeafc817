"""How the nodes of one coordination domain keep time, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How the nodes of one coordination domain keep time; all in seconds, the same on every node.

    `heartbeat_frequency` is the time between two heartbeats, or two looks of a standby.
    `liveness_check_interval` is the age at which a heartbeat is stale, and its token free.
    """

    liveness_check_interval: float
    heartbeat_frequency: float

    def __post_init__(self) -> None:
        # Rounding must not refuse 0.3 for 0.1.
        least = 3 * self.heartbeat_frequency * (1 - 1e-9)
        if not 0 < least <= self.liveness_check_interval:
            raise ValueError(
                f"liveness_check_interval={self.liveness_check_interval:g} must be at least three "
                f"times heartbeat_frequency={self.heartbeat_frequency:g}, which must be positive"
            )

    @property
    def margin(self) -> float:
        """How long before others may take over a node stops trusting.

        That is the time to stop its runs, and covers clocks that run unequally fast: a tenth of the
        interval, but up to half a second where the interval is short (30 → 3, 6 → 0.6, 3 → 0.5).
        """
        interval = self.liveness_check_interval
        return max(interval / 10, min(0.5, interval / 6))

    @property
    def trust(self) -> float:
        """How long a confirmation holds, from before it was asked for."""
        return self.liveness_check_interval - self.margin

    @property
    def beat_timeout(self) -> float:
        """How long a heartbeat may take: short enough for another try within the trust."""
        return self.trust / 3

    @property
    def hold_off(self) -> float:
        """For how long a node that resigned leaves the token to others."""
        return 3 * self.heartbeat_frequency

    def backoff(self, faults: int) -> float:
        """Return the wait after so many failed calls in a row: h/4, h/2, h, 2h, ... to a limit.

        The limit is 5 s, or a third of the interval if that is shorter.
        """
        limit = max(self.heartbeat_frequency, min(5.0, self.liveness_check_interval / 3))
        return min(limit, self.heartbeat_frequency / 4 * 2.0 ** min(faults - 1, 30))
