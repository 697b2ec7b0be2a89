"""One event queue in guest memory: an IOQ whose empty buffers the guest supplies.

The real `QueueEnd` of `vbus.events`. Whatever the guest wrote into the ring is checked
before it is used; what is wrong with it is raised as a VbusError.
"""

from collections.abc import Callable

from ioq import Index, Ring, RingFault, ring_size
from shm import AddressSpace, Doorbell, Locality
from vbus.abi import EVENT_SIZE, RING_LIMIT, QueueEntry
from vbus.errors import InvalidError


class EventRing:
    """The south end of one event queue."""

    def __init__(
        self,
        entry: QueueEntry,
        memory: AddressSpace,
        interrupt: Callable[[], object],
        doorbell: Doorbell | None = None,
    ) -> None:
        """Attach; own `doorbell`, or make one. Raises InvalidError or FaultError."""
        self.entry = entry
        self.doorbell = Doorbell() if doorbell is None else doorbell
        try:
            if not 1 <= entry.descriptors <= RING_LIMIT:
                raise InvalidError(f"an event queue of {entry.descriptors} descriptors")
            self._data = memory.view(entry.data, EVENT_SIZE * entry.descriptors)
            self._view = memory.view(entry.ring, ring_size(entry.descriptors))
            self._ring = Ring(
                self._view, memory, Locality.SOUTH, interrupt, limit=RING_LIMIT
            )
        except BaseException:
            self.doorbell.close()
            raise
        self._tail = self._ring.iterator(Index.INUSE)
        self._tail.seek_tail()

    def put(self, record: bytes) -> bool:
        """Copy an event into the next buffer and hand it over; False: none is ours."""
        tail = self._tail
        if tail.owner != Locality.SOUTH:
            return False
        address, length = tail.ptr, tail.len
        at = address - self._data.addr
        if length < EVENT_SIZE:
            raise RingFault(f"event buffer of {length} bytes")
        if not 0 <= at <= self._data.size - EVENT_SIZE:
            raise RingFault(f"event buffer at {address:#x} is outside of the block")
        self._data.write(at, record)
        tail.push()
        return True

    def signal(self) -> None:
        """Raise the interrupt, unless the guest is masked or at work already."""
        self._ring.signal.inject()

    def ask_for_room(self) -> None:
        """Let the guest ring when it pops. If it just did, ring in its place."""
        if self._ring.signal.enable():
            self.doorbell.ring()

    def stop_asking(self) -> None:
        """Mask the guest's doorbell again and take note that it rang."""
        signal = self._ring.signal
        signal.disable()
        signal.wakeup_begin()
        signal.wakeup_end()

    def close(self) -> None:
        """Let go of the guest's memory; safe to repeat."""
        self.doorbell.close()
        self._view.close()
        self._data.close()
