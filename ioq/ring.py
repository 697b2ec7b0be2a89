"""IOQ rings, version 4, from either side (ABI section 6).

Descriptors travel between north, which owns the memory, and south, the device. `Ring`
is the compiled core with its signal; what it does, it does in batches. `Iterator` is
the step-by-step form of 6.3. Nothing here waits: see `ioq.aio`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from ioq import _core
from shm import AddressSpace, Gauge, Locality, ShmSignal, View

_HEAD_SIZE = 56
_DESCRIPTOR_SIZE = 32
_SIGNAL_OFFSET = 8

LIMIT = 2048
"""Descriptors that venet and the event queues accept in one ring."""


class Index(IntEnum):
    """The two indices of a ring; how they are used depends on the queue (6.4)."""

    VALID = 0
    INUSE = 1


def ring_size(count: int) -> int:
    """Bytes of memory a ring of `count` descriptors takes, exactly."""
    return _HEAD_SIZE + _DESCRIPTOR_SIZE * count


@dataclass(frozen=True)
class RingStatistics:
    """Descriptors pushed and popped by us, and signalling.

    `dropped` are messages that `forward` could not fit; `injects` the signals asked
    for, of which `notifications` crossed the boundary.
    """

    count: Gauge
    pushed: int
    popped: int
    dropped: int
    injects: int
    notifications: int
    fault: str | None


class Ring(_core.Ring):
    """One side's end of a ring, `Ring(view, space, locality, notify)`.

    `view` is the ring's memory, `space` what its descriptors point into; `notify` is
    called when the peer is to be told (see `ShmSignal`). A fresh ring is laid by
    `Ring.format(view, count)`, by north. One end attaches once; both ends may be in
    one process.

    Batches return how much they did, 0 if the peer has to move first. None of them
    signals: call `signal.inject()` once after a batch. They raise `InvalidError` when
    misused, and `RingFault` when the peer broke the ring; then `fault` names why, and
    nothing works any more.

    push(entries, index=INUSE, both=False)
        Hand over descriptors holding these (cookie, ptr, len). `both`: on the valid
        index, with inuse moving along, as north fills a transmit queue.
    peek(limit, index=INUSE), pop(limit, index=INUSE, flip=True)
        Descriptors that are ours; `pop` hands them back. North reaps what the device
        completed with pop(limit, VALID, flip=False).
    produce(payload, sizes, slots=None)
        Send messages that lie back to back, `sizes` being one length for all or
        array("I"). Each is copied to the buffer the peer posted or, with
        slots=(address, size), to our own buffer of that descriptor.
    consume(payload, sizes, limit, repost=None)
        Receive messages back to back, lengths into the array("I") `sizes`. North
        posts the buffers again with `repost` bytes of room.
    forward(to, limit)
        Move messages into the buffers posted on another ring.
    owned(), room()
        Is a message there for us; may we produce?
    entries(index=INUSE)
        What the indices say, a hint (6.2).
    """

    signal: ShmSignal
    space: AddressSpace
    locality: Locality

    def __new__(
        cls,
        view: View,
        space: AddressSpace,
        locality: Locality,
        notify: Callable[[], object],
        *,
        limit: int = LIMIT,
    ) -> Self:
        """Attach, with all checks of 6.1; `InvalidError` names the one that failed."""
        self = super().__new__(cls, view, space, locality, limit)
        self.signal = ShmSignal(view, _SIGNAL_OFFSET, locality, notify)
        self.space = space
        self.locality = locality
        return self

    def iterator(
        self,
        index: Index | None = None,
        *,
        auto_update: bool = False,
        flip_owner: bool = True,
    ) -> "Iterator":
        """Open an iterator at position 0; `index` None: valid, inuse moves along."""
        return Iterator(self, index, auto_update, flip_owner)

    def statistics(self) -> RingStatistics:
        """A snapshot of the counters."""
        signal = self.signal.statistics()
        return RingStatistics(
            self.count,
            *self._counters(),
            signal.injects,
            signal.notifications,
            self.fault,
        )


class Iterator(_core.Iterator):
    """A position on a ring, and the descriptor there: `cookie`, `ptr`, `len`, `valid`.

    Fields may be set, and `push` and `pop` work, only on a descriptor that is ours,
    the latter two at the tail and at the head of the index: else `InvalidError`.
    """

    ring: Ring
    auto_update: bool

    def __new__(
        cls, ring: Ring, index: Index | None, auto_update: bool, flip_owner: bool
    ) -> Self:
        """See `Ring.iterator`."""
        at = Index.VALID if index is None else index
        self = super().__new__(cls, ring, at, index is None, flip_owner)
        self.ring = ring
        self.auto_update = auto_update
        return self

    def push(self) -> None:
        """Hand the descriptor over at the tail, step on; signal if `auto_update`."""
        super().push()
        if self.auto_update:
            self.ring.signal.inject()

    def pop(self) -> None:
        """Hand the descriptor back at the head, step on; signal if `auto_update`."""
        super().pop()
        if self.auto_update:
            self.ring.signal.inject()
