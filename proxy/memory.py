"""The memory of a guest: a sealed memory file at addresses which we choose.

Drivers allocate here what they share with a device, as a kernel does by its DMA API.
The device reaches all of it and nothing else: the host maps the file of a process that
is a guest, an IOMMU maps the huge pages of one inside of a virtual machine.
"""

from bisect import bisect_left
from dataclasses import dataclass
from os import close
from types import TracebackType
from typing import Self

from shm import AddressSpace, View, create_memfd
from vbus.errors import InvalidError, NoSpaceError

BASE_ADDRESS = 1 << 20
"""Where the memory begins: address 0 never is a buffer."""
PAGE_SIZE = 4096
HUGE_PAGE_SIZE = 2 << 20
LINE_SIZE = 64
"""Least alignment, so that no two buffers share a cache line."""


@dataclass(frozen=True)
class MemoryStatistics:
    """Sizes in bytes; `allocations` are those not freed."""

    size: int
    used: int
    allocations: int
    largest_free: int


class Allocator:
    """First fit over one range of addresses; holes next to each other are one hole."""

    def __init__(self, start: int, size: int) -> None:
        self._holes = [(start, start + size)]
        self._used: dict[int, int] = {}

    def allocate(self, size: int, alignment: int = LINE_SIZE) -> int:
        """Give the address of `size` free bytes. Raises InvalidError, NoSpaceError."""
        if size <= 0 or alignment <= 0 or alignment & (alignment - 1):
            raise InvalidError(f"{size} bytes with alignment {alignment}")
        for index, (start, end) in enumerate(self._holes):
            at = -(-start // alignment) * alignment
            if at + size <= end:
                rest = [(start, at), (at + size, end)]
                self._holes[index : index + 1] = filter(_length, rest)
                self._used[at] = size
                return at
        raise NoSpaceError(
            f"no {size} bytes of guest memory are free in one piece, the largest piece"
            f" has {self.largest_hole}"
        )

    def free(self, address: int) -> None:
        """Take back what `allocate` gave. Raises InvalidError."""
        size = self._used.pop(address, None)
        if size is None:
            raise InvalidError(f"nothing is allocated at {address:#x}")
        start, end = address, address + size
        index = bisect_left(self._holes, (start, end))
        first, last = index, index
        if index < len(self._holes) and self._holes[index][0] == end:
            end = self._holes[index][1]
            last += 1
        if index and self._holes[index - 1][1] == start:
            start = self._holes[index - 1][0]
            first -= 1
        self._holes[first:last] = [(start, end)]

    @property
    def allocations(self) -> int:
        return len(self._used)

    @property
    def used(self) -> int:
        return sum(self._used.values())

    @property
    def largest_hole(self) -> int:
        return max(map(_length, self._holes), default=0)


def _length(hole: tuple[int, int]) -> int:
    return hole[1] - hole[0]


class DmaBuffer:
    """A piece of guest memory: its address for the device, its `view` for us."""

    def __init__(self, memory: "DmaMemory", addr: int, size: int) -> None:
        self.addr = addr
        self.size = size
        self.view: View = memory.space.view(addr, size)
        self._memory: DmaMemory | None = memory

    def __repr__(self) -> str:
        return f"<DmaBuffer {self.addr:#x}, {self.size} bytes>"

    def close(self) -> None:
        """Free it; the device must have let go of it before. Idempotent."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.view.close()
            memory._free(self.addr)


class DmaMemory:
    """All memory of the guest; `fd` is the file, `space` the addresses."""

    def __init__(
        self, size: int, *, base: int = BASE_ADDRESS, huge: bool = False
    ) -> None:
        """Make the memory, of huge pages if so wanted: there must be enough of them.

        Raises InvalidError unless `size` is whole pages.
        """
        if size <= 0 or size % (HUGE_PAGE_SIZE if huge else PAGE_SIZE):
            raise InvalidError(f"guest memory of {size} bytes is not whole pages")
        self.base = base
        self.size = size
        self.space = AddressSpace()
        self.fd = create_memfd("vbus-guest", size, huge=huge)
        self._allocator = Allocator(base, size)
        try:
            self.space.map(base, size, self.fd)
        except BaseException:
            self.close()
            raise

    def allocate(self, size: int, *, alignment: int = LINE_SIZE) -> DmaBuffer:
        """Allocate `size` bytes; what they hold is undefined.

        Raises NoSpaceError, and InvalidError for a size of 0 or an alignment that is
        not a power of two.
        """
        addr = self._allocator.allocate(size, alignment)
        try:
            return DmaBuffer(self, addr, size)
        except BaseException:
            self._allocator.free(addr)
            raise

    def _free(self, addr: int) -> None:
        self._allocator.free(addr)

    def statistics(self) -> MemoryStatistics:
        """A snapshot of how full it is."""
        allocator = self._allocator
        return MemoryStatistics(
            self.size, allocator.used, allocator.allocations, allocator.largest_hole
        )

    def close(self) -> None:
        """Unmap and close everything; every view is dead from here on. Idempotent."""
        self.space.close()
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
