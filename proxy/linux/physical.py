"""DMA memory without an IOMMU: huge pages at the physical addresses they have.

A huge page stays where it is, so that its address can be told to a device. Pages that
follow each other both in the file and in memory are one range.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from proxy.memory import HUGE_PAGE_SIZE, LINE_SIZE, Allocator, DmaMemory
from shm import AddressSpace, create_memfd
from vbus.errors import InvalidError, NoSpaceError, PermissionDeniedError

_PAGE_SIZE = 4096
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_MEMINFO = Path("/proc/meminfo")
_ATTEMPTS = 3

Range = tuple[int, int]
"""Physical address and size of what is one piece."""


class PhysicalMemory(DmaMemory):
    """Huge pages of this machine, for a function which no IOMMU stands before."""

    def __init__(self, size: int) -> None:
        """Take huge pages, reserving what is missing, for at least `size` bytes.

        Raises InvalidError, PermissionDeniedError, and NoSpaceError with the command
        that reserves them.
        """
        if size <= 0:
            raise InvalidError(f"guest memory of {size} bytes")
        pages = -(-size // HUGE_PAGE_SIZE)
        reserve(pages)
        self.size = pages * HUGE_PAGE_SIZE
        self.space = AddressSpace()
        self.fd, ranges = _take(self.size)
        self.base = min(start for start, _ in ranges)
        self._allocator = RangesAllocator(ranges)
        try:
            at = 0
            for start, length in ranges:
                self.space.map(start, length, self.fd, at)
                at += length
        except BaseException:
            self.close()
            raise


class RangesAllocator(Allocator):
    """First fit over several ranges; no buffer crosses from one into another."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        # The largest last: small buffers shall not cut it.
        self._parts = [
            Allocator(start, size)
            for start, size in sorted(ranges, key=lambda each: each[1])
        ]
        self._owners: dict[int, Allocator] = {}

    def allocate(self, size: int, alignment: int = LINE_SIZE) -> int:
        for part in self._parts:
            with suppress(NoSpaceError):
                address = part.allocate(size, alignment)
                self._owners[address] = part
                return address
        raise NoSpaceError(
            f"no {size} bytes of guest memory are free in one piece, the largest piece"
            f" has {self.largest_hole}"
        )

    def free(self, address: int) -> None:
        part = self._owners.pop(address, None)
        if part is None:
            raise InvalidError(f"nothing is allocated at {address:#x}")
        part.free(address)

    @property
    def allocations(self) -> int:
        return len(self._owners)

    @property
    def used(self) -> int:
        return sum(part.used for part in self._parts)

    @property
    def largest_hole(self) -> int:
        return max(part.largest_hole for part in self._parts)


def reserve(pages: int, pool: Path = _POOL, meminfo: Path = _MEMINFO) -> None:
    """Have at least `pages` huge pages free, or leave all as it was.

    They are taken only where an eighth of what is available stays: the kernel would
    kill others for more. Raises NoSpaceError.
    """
    count = pool / "nr_hugepages"
    try:
        total = int(count.read_text())
        free = int((pool / "free_hugepages").read_text())
    except OSError:
        raise NoSpaceError("this kernel has no huge pages of 2 MiB") from None
    if free >= pages:
        return
    wanted = total + pages - free
    if (pages - free) * HUGE_PAGE_SIZE <= _available(meminfo) * 7 // 8:
        with suppress(OSError):  # the count below tells what came of it
            count.write_text(str(wanted))
            if int((pool / "free_hugepages").read_text()) >= pages:
                return
            count.write_text(str(total))
    raise NoSpaceError(
        f"{pages} huge pages of 2 MiB are needed and {free} are free; give the"
        f" machine memory for them and run: sysctl vm.nr_hugepages={wanted}"
    )


def _available(meminfo: Path) -> int:
    """Bytes that can be had without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def merge(frames: Sequence[int]) -> list[Range]:
    """Join the pages at these addresses where the next page follows."""
    ranges: list[Range] = []
    for address in frames:
        if ranges and sum(ranges[-1]) == address:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + HUGE_PAGE_SIZE)
        else:
            ranges.append((address, HUGE_PAGE_SIZE))
    return ranges


def _take(size: int) -> tuple[int, list[Range]]:
    """Make a file of huge pages that lie well: its fd and the ranges, in its order.

    The kernel may hand pages out downwards, which makes every page a range of its own;
    given back, they come the other way round.
    """
    for _ in range(_ATTEMPTS - 1):
        fd, ranges = _fill(size)
        if 2 * max(length for _, length in ranges) >= size:
            return fd, ranges
        os.close(fd)
    return _fill(size)


def _fill(size: int) -> tuple[int, list[Range]]:
    """Make a file, have all of its pages, and see where they are."""
    fd = create_memfd("vbus-dma", size, huge=True)
    try:
        with mmap.mmap(fd, size) as memory:
            for at in range(0, size, HUGE_PAGE_SIZE):
                memory[at] = 0
            first = ctypes.c_char.from_buffer(memory)
            start = ctypes.addressof(first)
            del first  # or the mapping could not be closed
            frames = _physical(range(start, start + size, HUGE_PAGE_SIZE))
    except BaseException:
        os.close(fd)
        raise
    return fd, merge(frames)


def _physical(addresses: Sequence[int]) -> list[int]:
    """Translate addresses of this process (Documentation/admin-guide/mm/pagemap)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = [
            int.from_bytes(
                os.pread(pagemap.fileno(), 8, at // _PAGE_SIZE * 8), "little"
            )
            for at in addresses
        ]
    frames = [entry & _FRAME if entry & _PRESENT else 0 for entry in entries]
    if not all(frames):
        raise PermissionDeniedError(
            "the physical addresses of memory are root's alone to see: run this as root"
        )
    return [frame * _PAGE_SIZE for frame in frames]
