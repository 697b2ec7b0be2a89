"""Guest memory: memory files, the address space they are mapped into, and views of it.

An `AddressSpace` reaches what was mapped into it and nothing else. It does not
allocate guest memory, and does not look into it.
"""

import fcntl
import os
import stat
from dataclasses import dataclass

from shm import _core
from shm._core import View
from shm.errors import InvalidError, PermissionDeniedError
from shm.statistics import Gauge

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NO_MEMORY = -1


def create_memfd(name: str, size: int, *, huge: bool = False) -> int:
    """Create a memory file that nobody can resize; the caller owns the fd."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge else 0)
    fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


@dataclass(frozen=True)
class Region:
    """A mapped range of guest addresses; without memory behind it if not `backed`."""

    addr: int
    size: int
    writable: bool
    backed: bool


@dataclass(frozen=True)
class SpaceStatistics:
    """Counters of an address space; `faults` counts refused look-ups."""

    regions: Gauge
    mapped_bytes: Gauge
    generation: int
    faults: int


class AddressSpace(_core.Space):
    """The guest's memory as its function sees it: a table of mapped regions.

    `read`, `write` and `read_into` cross borders between regions, and copy all or
    nothing: they raise `FaultError` if a single byte is not memory of the guest.
    `unmap` removes the regions inside a range, returns their number, and refuses
    with `InvalidError` to cut one. One thread owns a space and its views.
    """

    def map(
        self,
        addr: int,
        size: int,
        fd: int | None,
        offset: int = 0,
        *,
        writable: bool = True,
        allow_truncatable: bool = False,
    ) -> None:
        """Map a range of guest addresses onto a file, or onto nothing (`fd` None).

        The fd stays the caller's. Raises `InvalidError` (empty or wrapping range,
        offset off a page border, file too short), `ExistsError` (overlap),
        `PermissionDeniedError` (the file could shrink under us and end this process
        by SIGBUS, or forbids the mapping), `NoSpaceError` (out of mappings).
        """
        if fd is None:
            self._map(addr, size, _NO_MEMORY, 0, writable)
            return
        _check_file(fd, offset + size, allow_truncatable)
        self._map(addr, size, fd, offset, writable)

    def view(self, addr: int, size: int, *, writable: bool = True) -> View:
        """Open a range as one piece, for repeated use until a part is unmapped.

        Raises `FaultError` if a byte is not (writable) memory, `InvalidError` if the
        range is empty, or its regions do not meet on page borders.
        """
        return View(self, addr, size, writable)

    def regions(self) -> list[Region]:
        """All regions by address."""
        return [Region(*each) for each in self._regions()]

    def statistics(self) -> SpaceStatistics:
        """A snapshot of the counters."""
        return SpaceStatistics(*self._counters())

    def close(self) -> None:
        """Unmap everything; every view is dead from here on."""
        self.clear()


def _check_file(fd: int, end: int, allow_truncatable: bool) -> None:
    """Refuse a file that is no memory file, too short, or could become so."""
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        raise InvalidError("memory must be a regular file or memfd")
    if about.st_size < end:
        raise InvalidError(
            f"the memory file ends at {about.st_size:#x}, the mapping at {end:#x}"
        )
    if not allow_truncatable and not _seals(fd) & fcntl.F_SEAL_SHRINK:
        raise PermissionDeniedError(
            "the memory file could be truncated while it is mapped; seal it against "
            "shrinking (QEMU: -object memory-backend-memfd,share=on,seal=on)"
        )


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # a file of a kind that cannot be sealed
        return 0
