"""What a virtqueue must do, whatever its ring: two lines of chains and two wishes.

Counts never wrap here, and nothing lies in memory. `units` of a chain are what the ring
counts: one in a split ring, its descriptors in a packed one.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelChain:
    """What the driver added; `units` as above, `takes` descriptors of the ring."""

    token: int
    data: bytes
    writable: int
    takes: int
    units: int


@dataclass
class Wish:
    """When one side wants to hear of the other's moves.

    `at`: when the count passes this (EVENT_IDX); None: always, unless `quiet`.
    """

    at: int | None
    quiet: bool = False
    told: int = 0
    """The other side's count when it last decided."""
    unknown: bool = False
    """It was restored and does not know; then it tells once."""

    def due(self, count: int) -> bool:
        old, self.told = self.told, count
        if self.unknown:
            self.unknown = False
            return True
        if count == old or self.quiet:
            return False
        return self.at is None or old <= self.at < count


@dataclass
class Model:
    """A queue of `size` descriptors, between its two ends."""

    size: int
    packed: bool
    event_idx: bool
    available: deque[ModelChain] = field(default_factory=deque)
    taken: dict[int, ModelChain] = field(default_factory=dict)
    used: deque[tuple[ModelChain, int]] = field(default_factory=deque)
    room: int = 0
    added: int = 0
    popped: int = 0
    pushed: int = 0
    collected: int = 0

    def __post_init__(self) -> None:
        self.room = self.size
        # A fresh ring is zeroes: for a split one that is the event index 0.
        first = 0 if self.event_idx and not self.packed else None
        self.kicks = Wish(first)
        self.interrupts = Wish(first)

    def add(self, chain: ModelChain) -> bool:
        if chain.takes > self.room:
            return False
        self.room -= chain.takes
        self.added += chain.units
        self.available.append(chain)
        return True

    def pop(self, limit: int) -> list[ModelChain]:
        out = []
        while self.available and len(out) < limit:
            chain = self.available.popleft()
            self.taken[chain.token] = chain
            self.popped += chain.units
            out.append(chain)
        return out

    def push(self, token: int, written: int) -> None:
        chain = self.taken.pop(token)
        self.pushed += chain.units
        self.used.append((chain, written))

    def collect(self, limit: int) -> list[tuple[ModelChain, int]]:
        out = []
        while self.used and len(out) < limit:
            chain, written = self.used.popleft()
            self.room += chain.takes
            self.collected += chain.units
            out.append((chain, written))
        return out

    def disable(self, wish: Wish) -> None:
        if self.packed or not self.event_idx:
            wish.quiet = True

    def enable_kicks(self) -> bool:
        return self._enable(self.kicks, self.popped, bool(self.available))

    def enable_interrupts(self) -> bool:
        return self._enable(self.interrupts, self.collected, bool(self.used))

    def _enable(self, wish: Wish, seen: int, more: bool) -> bool:
        wish.quiet = False
        wish.at = seen if self.event_idx else None
        return more
