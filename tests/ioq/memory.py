"""Two address spaces over one memory file: a guest's, and the device's view of it."""

import os
from collections.abc import Callable

from ioq import Ring, ring_size
from shm import AddressSpace, Locality, View, create_memfd

SIZE = 1 << 20
RING = 0x10000
BUFFERS = 0x40000


class Guest:
    """Memory at guest address 0, a ring in it, both ends attached on demand."""

    def __init__(self, count: int, *, size: int = SIZE) -> None:
        self.count = count
        self.fd = create_memfd("guest", size)
        self.size = size
        self.spaces = {me: AddressSpace() for me in Locality}
        for space in self.spaces.values():
            space.map(0, size, self.fd)
        self.notified = dict.fromkeys(Locality, 0)
        self.view = self.spaces[Locality.NORTH].view(RING, ring_size(count))
        Ring.format(self.view, count)

    def notify(self, me: Locality) -> Callable[[], None]:
        """A counter of notifications towards `me`."""

        def count() -> None:
            self.notified[me] += 1

        return count

    def end(
        self,
        me: Locality,
        notify: Callable[[], object] | None = None,
        limit: int = 2048,
    ) -> Ring:
        """Attach one side."""
        space = self.spaces[me]
        view = space.view(RING, ring_size(self.count))
        told = notify or self.notify(Locality(1 - me))
        return Ring(view, space, me, told, limit=limit)

    def ring_view(self) -> View:
        """The ring's memory, to look at and to spoil."""
        return self.view

    def close(self) -> None:
        """Unmap and close."""
        for space in self.spaces.values():
            space.close()
        os.close(self.fd)
