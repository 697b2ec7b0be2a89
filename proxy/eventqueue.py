"""The guest's end of one event queue (ABI 4.2): a ring of empty buffers for events.

Takes events out, hands the buffers back zeroed, and follows the wake-up protocol of
ABI 5.3. What an event means is not known here.
"""

from collections.abc import Callable

from ioq import Index, Ring, ring_size
from proxy.memory import PAGE_SIZE, DmaMemory
from shm import Locality
from vbus.abi import EVENT, EVENT_SIZE, Event, QueueEntry
from vbus.errors import ProtocolError

_EMPTY = bytes(EVENT_SIZE)


class EventQueue:
    """One event queue; `notify` tells the host that there is room again."""

    def __init__(
        self, memory: DmaMemory, count: int, notify: Callable[[], object]
    ) -> None:
        """Lay the ring and post all `count` buffers. Raises NoSpaceError."""
        self._count = count
        self._data = memory.allocate(EVENT_SIZE * count, alignment=PAGE_SIZE)
        try:
            self._memory = memory.allocate(ring_size(count), alignment=PAGE_SIZE)
        except BaseException:
            self._data.close()
            raise
        self._data.view.write(0, bytes(self._data.size))
        Ring.format(self._memory.view, count)
        self._ring = Ring(self._memory.view, memory.space, Locality.NORTH, notify)
        addresses = range(
            self._data.addr, self._data.addr + self._data.size, EVENT_SIZE
        )
        buffers = [(n, address, EVENT_SIZE) for n, address in enumerate(addresses)]
        self._ring.push(buffers, Index.VALID)
        self._ring.signal.enable()

    @property
    def entry(self) -> QueueEntry:
        """What QREG says of this queue."""
        return QueueEntry(self._count, self._memory.addr, self._data.addr)

    def waiting(self) -> bool:
        """Is there an event for us? Raises RingFault."""
        return self._ring.owned()

    def begin(self) -> None:
        """A notification came, or another batch follows: 5.3 a."""
        self._ring.signal.wakeup_begin()

    def end(self) -> bool:
        """All was taken: 5.3 b and c. True: something came meanwhile, begin again."""
        return self._ring.signal.wakeup_end()

    def take(self, limit: int) -> list[Event]:
        """Take up to `limit` events. Raises RingFault, and ProtocolError."""
        taken = self._ring.peek(limit)
        events = [self._take_one(cookie) for cookie, _, _ in taken]
        if taken:
            self._ring.pop(len(taken))
            self._ring.signal.inject()
        return events

    def _take_one(self, number: int) -> Event:
        if number >= self._count:
            raise ProtocolError(f"the host changed an event buffer's cookie: {number}")
        at = number * EVENT_SIZE
        event = EVENT.unpack(self._data.view.read(at, EVENT_SIZE))
        self._data.view.write(at, _EMPTY)
        return event

    def close(self) -> None:
        """Free the memory; the host must have let go of it. Idempotent."""
        self._memory.close()
        self._data.close()
