"""Rings for two processes: memory and doorbells that a child gets as fds."""

import os
from dataclasses import dataclass

from ioq import Ring, ring_size
from shm import AddressSpace, Doorbell, Locality, create_memfd

BATCH = 32
_MEMORY_SIZE = 64 << 20
_RING_SPACING = 0x20000
_SLOTS_AT, _SLOTS_SPACING = 0x200000, 16 << 20


@dataclass(frozen=True)
class RingFiles:
    """The fds of `count` rings in one memory: memory, then two doorbells for each."""

    fds: tuple[int, ...]
    slots: int

    @classmethod
    def create(cls, count: int, slots: int) -> "RingFiles":
        """Make and format them; `close` when both processes have started."""
        bells = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2 * count)]
        files = cls((create_memfd("bench", _MEMORY_SIZE), *bells), slots)
        space = files.map()
        for nth in range(count):
            view = space.view(nth * _RING_SPACING, ring_size(slots))
            Ring.format(view, slots)
        space.close()
        return files

    def words(self) -> tuple[str, str]:
        """Give what `parse` takes, for a command line."""
        return ",".join(map(str, self.fds)), str(self.slots)

    @classmethod
    def parse(cls, fds: str, slots: str) -> "RingFiles":
        return cls(tuple(map(int, fds.split(","))), int(slots))

    def map(self) -> AddressSpace:
        space = AddressSpace()
        space.map(0, _MEMORY_SIZE, self.fds[0])
        return space

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class RingEnd:
    """One side of ring `nth`; `bell` wakes us, north's buffers lie at `slots_at`."""

    def __init__(
        self, files: RingFiles, space: AddressSpace, nth: int, locality: Locality
    ) -> None:
        south, north = files.fds[1 + 2 * nth : 3 + 2 * nth]
        mine, theirs = (south, north) if locality is Locality.SOUTH else (north, south)
        self.bell = Doorbell.adopt(mine)
        peer = Doorbell.adopt(theirs)
        view = space.view(nth * _RING_SPACING, ring_size(files.slots))
        self.ring = Ring(view, space, locality, peer.ring)
        self.slots_at = _SLOTS_AT + nth * _SLOTS_SPACING

    def post_buffers(self, size: int) -> None:
        """As north: hand all buffers, empty, to a ring that south fills."""
        count = self.ring.count
        entries = [(0, self.slots_at + nth * size, size) for nth in range(count)]
        if self.ring.push(entries) != count:
            raise RuntimeError("the ring was not fresh")
