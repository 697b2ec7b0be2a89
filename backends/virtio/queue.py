"""Virtqueues from the device's side: split and packed rings (virtio 1.2, 2.7 and 2.8).

`VirtQueue` is the compiled core; what it does, it does in batches. It does not know
what a request means, and does not wait: kicks and interrupts are the transport's.
"""

from dataclasses import astuple, dataclass
from typing import NamedTuple, Self

from backends.virtio import _core
from backends.virtio._core import Chain
from shm import AddressSpace, View
from vbus.errors import InvalidError

_DESCRIPTOR = 16
_PAGE = 4096


def record_size(size: int) -> int:
    """Bytes of the in-flight record of a ring of `size` entries."""
    return 64 + 32 * size


class RingAddresses(NamedTuple):
    """Where a ring lies: descriptors, the driver's area, the device's area.

    Split: descriptor table, available ring, used ring. Packed: descriptor ring and the
    two event suppression areas.
    """

    desc: int
    driver: int
    device: int

    @classmethod
    def legacy(cls, page_frame: int, size: int) -> Self:
        """Give the addresses in the one area that a legacy driver names (2.7.2)."""
        return cls.contiguous(page_frame * _PAGE, size)

    @classmethod
    def contiguous(cls, address: int, size: int, alignment: int = _PAGE) -> Self:
        """Give the addresses in one area whose used ring is aligned so.

        Raises InvalidError unless the alignment is a power of two from 4.
        """
        if alignment < 4 or alignment & (alignment - 1):
            raise InvalidError(f"a ring cannot be aligned to {alignment}")
        driver = address + _DESCRIPTOR * size
        end = driver + 2 * (3 + size)
        return cls(address, driver, -(-end // alignment) * alignment)


@dataclass(frozen=True)
class QueueState:
    """Where a queue stands between two chains, to go on later.

    Split: indices that run freely; the wraps are True. Packed: positions and laps.
    """

    next_avail: int = 0
    next_used: int = 0
    avail_wrap: bool = True
    used_wrap: bool = True


@dataclass(frozen=True)
class QueueStatistics:
    """Chains taken and given back; decisions to interrupt the driver, or not to."""

    size: int
    popped: int
    pushed: int
    notified: int
    suppressed: int
    broken: str | None


class VirtQueue(_core.Queue):
    """The device's end of a ring, `VirtQueue(space, size, addresses, features)`.

    A chain is walked and checked as a whole when it is taken. A driver that breaks a
    rule breaks the queue: `broken` names the rule, and no chain comes any more. What
    was taken may still be given back.

    pop_batch(limit)
        Up to `limit` chains, [] if there are none. Raises VirtQueueError when the queue
        is broken; chains before a bad one come first, without the exception.
    push(chain, written), push_batch([(chain, written), ...])
        Give chains back, whose first `written` writable bytes were filled: all or none.
        Raises InvalidError for one that is not out, or has less room; VirtQueueError
        when the ring itself is no memory any more.
    gather(chains, buffer, sizes), scatter(chains, data, sizes)
        Copy what the driver wrote back to back into `buffer`, lengths into `sizes`, an
        array("I"); copy data that lie back to back into the chains. Return how many
        chains were done; raise what a Chain raises if the first cannot be.
    should_notify()
        Is an interrupt due for what was given back since this was asked last? Once
        after a restore it always is.
    disable_kicks(), enable_kicks()
        A hint that we are awake; a wish to be kicked. If that returns True there may be
        a chain already (or the queue is broken): look again, nobody will kick.
    in_flight
        Chains that are out.
    """

    __slots__ = ()

    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        addresses: RingAddresses,
        features: int,
        state: QueueState | None = None,
        record: View | None = None,
        *,
        resume: bool = False,
    ) -> Self:
        """Attach to a ring, of the kind that the feature word says.

        `state`: go on where `save` was called. `record`: `record_size` bytes that
        outlive this process, for what is in flight; with `resume` it is there already,
        and what the process before took and did not give back comes first. Raises
        InvalidError (a size or alignment that the ring cannot have, a state or record
        that is not this ring's), FaultError (not memory of the guest).
        """
        if not 0 < size <= 0xFFFF:
            raise InvalidError(f"a ring cannot have {size} entries")
        if any(not 0 <= each < 1 << 64 for each in addresses):
            raise InvalidError("an address of the ring is outside 64 bits")
        saved = None if state is None else astuple(state)
        return super().__new__(
            cls, space, size, *addresses, features, saved, record, resume
        )

    def save(self) -> QueueState:
        """Say where the queue stands. Raises BusyError while chains are out."""
        return QueueState(*self._state())

    def statistics(self) -> QueueStatistics:
        """A snapshot of the counters."""
        return QueueStatistics(self.size, *self._counters(), self.broken)


__all__ = [
    "Chain",
    "QueueState",
    "QueueStatistics",
    "RingAddresses",
    "VirtQueue",
    "record_size",
]
