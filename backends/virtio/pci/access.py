"""BARs through configuration space (virtio 1.2, 4.1.4.9), for who cannot map them.

The driver writes BAR, offset and length (1, 2 or 4) into the capability; from then on
its last four bytes are that place: reading them reads it, writing them writes it.
"""

import struct
from typing import Final, Protocol

from vbus.pci.config_space import ConfigSpace, Vendor

_PLACE: Final = struct.Struct("<B3xII")
_PLACE_AT: Final = 4
_DATA_AT: Final = 16
_DATA_SIZE: Final = 4


class Bars(Protocol):
    """Who has the BARs."""

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        """Read within a BAR."""
        ...

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        """Write within a BAR."""
        ...


class ConfigAccess:
    """The capability's behaviour; its bytes are in the configuration space."""

    def __init__(self, config: ConfigSpace, capability: Vendor, bars: Bars) -> None:
        self._config = config
        self._at = config.offset_of(capability)
        self._bars = bars

    def before_read(self, offset: int, size: int) -> None:
        """Fetch the data if they are about to be read."""
        place = self._place(offset, size)
        if place is not None:
            data = self._bars.bar_read(*place)
            self._config.write(self._at + _DATA_AT, data)

    def after_write(self, offset: int, size: int) -> None:
        """Carry out what was written to the data."""
        place = self._place(offset, size)
        if place is not None:
            bar, at, length = place
            data = self._config.read(self._at + _DATA_AT, length)
            self._bars.bar_write(bar, at, data)

    def _place(self, offset: int, size: int) -> tuple[int, int, int] | None:
        """Give BAR, offset and length if an access touches the data and they fit."""
        data = self._at + _DATA_AT
        if offset >= data + _DATA_SIZE or offset + size <= data:
            return None
        head = self._config.read(self._at + _PLACE_AT, _PLACE.size)
        bar, at, length = _PLACE.unpack(head)
        msix = self._config.msix
        known = bar in self._config.bars and (msix is None or bar != msix.bar)
        if not known or length not in (1, 2, 4) or at % length:
            return None
        if at + length > self._config.bars[bar].size:
            return None
        return bar, at, length
