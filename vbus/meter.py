"""What the bus counts of a device, beside whatever the device counts itself."""

from dataclasses import dataclass

from shm import Gauge

BUCKETS = 24
"""Enough for calls of up to 4 s; all longer ones are in the last."""
_NS_PER_US = 1000


@dataclass(frozen=True)
class LatencyStatistics:
    """How long calls took: `buckets[i]` counts those under 2**i us, over half of that.

    The last one holds everything else.
    """

    count: int
    total_us: float
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class MeterStatistics:
    """A device as its guests use it, since it was made.

    `refusals` are calls that failed; `signals` were sent to guests, `coalesced` of them
    while the one before was still waiting: the guest sees both as one.
    """

    connections: Gauge
    opens: int
    shares: int
    calls: int
    refusals: int
    signals: int
    coalesced: int
    latency: LatencyStatistics


class Meter:
    """The counters of one device; whoever serves its guests counts."""

    __slots__ = (
        "_buckets",
        "_ns",
        "coalesced",
        "opens",
        "refusals",
        "shares",
        "signals",
    )

    def __init__(self) -> None:
        self.opens = self.shares = self.refusals = self.signals = self.coalesced = 0
        self._ns = 0
        self._buckets = [0] * BUCKETS

    def called(self, nanoseconds: int, refused: bool) -> None:
        """Count a call that ended after so long."""
        bucket = (nanoseconds // _NS_PER_US).bit_length()
        self._buckets[bucket if bucket < BUCKETS else -1] += 1
        self._ns += nanoseconds
        self.refusals += refused

    def statistics(self, connections: int) -> MeterStatistics:
        """Take a snapshot; `connections` are open now."""
        calls = sum(self._buckets)
        return MeterStatistics(
            connections=connections,
            opens=self.opens,
            shares=self.shares,
            calls=calls,
            refusals=self.refusals,
            signals=self.signals,
            coalesced=self.coalesced,
            latency=LatencyStatistics(
                calls, self._ns / _NS_PER_US, tuple(self._buckets)
            ),
        )
