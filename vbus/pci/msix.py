"""The MSI-X vector table and pending bits as memory in a BAR.

The table is storage only: a vfio-user client delivers interrupts by eventfds and keeps
masks itself, so nothing is ever pending here.
"""

import struct

from vbus.pci.config_space import Msix
from vbus.pci.constants import MSIX_ENTRY_MASKED, MSIX_ENTRY_SIZE

_ENTRY = struct.Struct("<IIII")
_ENTRY_WRITABLE = _ENTRY.pack(0xFFFFFFFC, 0xFFFFFFFF, 0xFFFFFFFF, MSIX_ENTRY_MASKED)
_ENTRY_AT_RESET = _ENTRY.pack(0, 0, 0, MSIX_ENTRY_MASKED)


class MsixTable:
    """Vector table at the start of its BAR; everything else there reads as zero."""

    def __init__(self, capability: Msix) -> None:
        self.bar = capability.bar
        self._vectors = capability.vectors
        self._writable = _ENTRY_WRITABLE * capability.vectors
        self.reset()

    def reset(self) -> None:
        """Mask every vector and forget its message."""
        self._table = bytearray(_ENTRY_AT_RESET * self._vectors)

    def save(self) -> bytes:
        """Give the table, for `resume`."""
        return bytes(self._table)

    def resume(self, saved: bytes) -> None:
        """Take the table of another one."""
        self.reset()
        self.write(0, saved)

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes; the pending bits and the unused rest are zero."""
        return bytes(self._table[offset : offset + size]).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Store what is writable: message address and data, and the mask bit."""
        limit = self._vectors * MSIX_ENTRY_SIZE
        for at, value in enumerate(data[: max(0, limit - offset)], offset):
            mask = self._writable[at]
            self._table[at] = (self._table[at] & ~mask) | (value & mask)
