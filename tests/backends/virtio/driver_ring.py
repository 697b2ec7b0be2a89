"""A driver's hand on a ring, byte by byte: nothing here keeps it from breaking rules.

It shares no code with the product: rings are written and read with `struct` alone.
"""

import os
import struct
from collections.abc import Sequence
from itertools import pairwise

from backends.virtio.queue import QueueState, RingAddresses, VirtQueue
from shm import AddressSpace, create_memfd

SIZE = 1 << 20
RING = 0x10000
TABLES = 0x20000
BUFFERS = 0x40000

INDIRECT, EVENT_IDX, PACKED = 1 << 28, 1 << 29, 1 << 34
NEXT, WRITE, TABLE = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15

Descriptor = tuple[int, int, int, int]
"""Address, length, flags, next (split) or id (packed)."""


class Memory:
    """A guest's memory at address 0: the guest's own space, and the device's."""

    def __init__(self, size: int = SIZE, *, borders: Sequence[int] = ()) -> None:
        """`borders`: where regions of the device's space meet, page multiples."""
        self.fd = create_memfd("guest", size)
        self.size = size
        self.guest = AddressSpace()
        self.guest.map(0, size, self.fd)
        self.device = AddressSpace()
        edges = [0, *borders, size]
        for low, high in pairwise(edges):
            self.device.map(low, high - low, self.fd, low)

    def close(self) -> None:
        self.guest.close()
        self.device.close()
        os.close(self.fd)

    def put(self, form: str, address: int, *values: int) -> None:
        self.guest.write(address, struct.pack("<" + form, *values))

    def get(self, form: str, address: int) -> tuple[int, ...]:
        data = self.guest.read(address, struct.calcsize("<" + form))
        return struct.unpack("<" + form, data)


class RawRing:
    """What split and packed rings have in common for a hostile hand."""

    features = 0

    def __init__(
        self, size: int, features: int = 0, memory: Memory | None = None
    ) -> None:
        self.memory = memory or Memory()
        self.size = size
        self.features |= features
        self.at = RingAddresses(RING, RING + 16 * size, RING + 0x8000)
        self.next = 0

    def queue(self, state: QueueState | None = None) -> VirtQueue:
        return VirtQueue(self.memory.device, self.size, self.at, self.features, state)

    def table(self, descriptors: Sequence[Descriptor], at: int = TABLES) -> int:
        """Write an indirect table; its length."""
        for nth, (addr, size, flags, last) in enumerate(descriptors):
            rest = (last, flags) if self.features & PACKED else (flags, last)
            self.memory.put("QIHH", at + 16 * nth, addr, size, *rest)
        return 16 * len(descriptors)


class SplitRing(RawRing):
    """Section 2.7."""

    def describe(self, index: int, descriptor: Descriptor) -> None:
        self.memory.put("QIHH", self.at.desc + 16 * index, *descriptor)

    def offer(self, head: int) -> None:
        """Put a head into the available ring, and move its index."""
        self.memory.put("H", self.at.driver + 4 + 2 * (self.next % self.size), head)
        self.next = self.next + 1 & 0xFFFF
        self.set_index(self.next)

    def set_index(self, index: int) -> None:
        self.memory.put("H", self.at.driver + 2, index)

    def chain(self, *descriptors: Descriptor, first: int = 0) -> None:
        """Offer descriptors as they are, from table entry `first` on."""
        for nth, each in enumerate(descriptors):
            self.describe(first + nth, each)
        self.offer(first)

    def used(self) -> list[tuple[int, int]]:
        """All used elements so far (fewer than the ring has): id, length."""
        (index,) = self.memory.get("H", self.at.device + 2)
        return [
            (each[0], each[1])
            for n in range(index)
            for each in [self.memory.get("II", self.at.device + 4 + 8 * n)]
        ]


class PackedRing(RawRing):
    """Section 2.8."""

    features = PACKED

    def __init__(
        self, size: int, features: int = 0, memory: Memory | None = None
    ) -> None:
        super().__init__(size, features, memory)
        self.wrap = True

    def chain(self, *descriptors: Descriptor) -> None:
        """Make descriptors available as they are, the first flags last."""
        begin = None
        for addr, size, flags, ident in descriptors:
            at = self.at.desc + 16 * self.next
            flags |= AVAIL if self.wrap else USED
            self.memory.put("QIH", at, addr, size, ident)
            if begin is None:
                begin = at + 14, flags
            else:
                self.memory.put("H", at + 14, flags)
            self.next += 1
            if self.next == self.size:
                self.next, self.wrap = 0, not self.wrap
        if begin is not None:
            self.memory.put("H", *begin)

    def used(self, at: int, wrap: bool) -> tuple[int, int] | None:
        """Give id and length if the descriptor is used on that lap."""
        _, size, ident, flags = self.memory.get("QIHH", self.at.desc + 16 * at)
        marks = AVAIL | USED if wrap else 0
        return (ident, size) if flags & (AVAIL | USED) == marks else None
