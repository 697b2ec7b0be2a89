"""The registers of the proposals of 2012, before virtio 1.0 took capabilities.

Nothing says in them how features are agreed on or how a queue is notified: FEATURES_OK
is as in virtio 1.x, and the notification stays legacy's register, in either mode.
"""

from typing import Final

from backends.virtio.constants import Ring
from backends.virtio.pci.legacy import (
    CONFIG_WITH_MSIX,
    PAGE,
    VECTORS,
    LegacyRegisters,
    place_ring,
    show_area,
)
from backends.virtio.pci.registers import (
    DeviceConfig,
    Register,
    RegisterSet,
    SelectedFeatures,
    halves,
)
from backends.virtio.pci.transport import Mode, PciTransport
from vbus.errors import InvalidError

_WORD: Final = 0xFFFF_FFFF
_ABSENT: Final = (1 << 64) - 1

SEPARATE_CONFIG: Final = 31
"""The feature bit that takes the configuration out of the mirrored layout's BAR 0."""
COMMAND_READ: Final = 1
COMMAND_WRITE: Final = 2


class ProposedRegisters(SelectedFeatures):
    """The new registers of R21, and the common set of R23.

    `queue_address` takes effect with its upper half: 0 ends the queue's use. All ones
    say that there is no such queue.
    """

    TABLE = (
        Register("device_feature_select", 4),
        Register("device_feature", 4, "r"),
        Register("driver_feature_select", 4),
        Register("driver_feature", 4),
        Register("generation_and_latch", 4),
        Register("config_vector", 2),
        Register("status", 1),
        Register("pad", 1, ""),
        Register("queue_select", 2),
        Register("queue_align", 2),
        Register("queue_size", 2),
        Register("queue_vector", 2),
        *halves("queue_address"),
    )
    mode = Mode.MODERN

    @property
    def generation_and_latch(self) -> int:
        """Reads the generation; any write commits what was written (R25)."""
        return self.device.device.config.generation

    @generation_and_latch.setter
    def generation_and_latch(self, _value: int) -> None:
        self.device.device.commit_config()

    @property
    def queue_align(self) -> int:
        return self.device.kept.get("align", PAGE)

    @queue_align.setter
    def queue_align(self, value: int) -> None:
        self.device.kept["align"] = value

    @property
    def queue_size(self) -> int:
        return self.device.of_queue(lambda queue: queue.setup.size)

    @queue_size.setter
    def queue_size(self, size: int) -> None:
        self.device.selected.set_up(size=size)

    @property
    def queue_address_lo(self) -> int:
        return self.device.of_queue(show_area, _ABSENT) & _WORD

    @queue_address_lo.setter
    def queue_address_lo(self, value: int) -> None:
        self.device.kept["address_lo"] = value

    @property
    def queue_address_hi(self) -> int:
        return self.device.of_queue(show_area, _ABSENT) >> 32

    @queue_address_hi.setter
    def queue_address_hi(self, value: int) -> None:
        address = value << 32 | self.device.kept.pop("address_lo", 0)
        place_ring(self.device, address, self.queue_align)


class MirroredRegisters(LegacyRegisters, SelectedFeatures):
    """R22: legacy's, with the vectors always there, and what legacy lacks behind them.

    There is one set for all drivers: who accepts VERSION_1 is no legacy driver.
    """

    TABLE = (
        Register("host_features", 4, "r"),
        Register("guest_features", 4),
        *LegacyRegisters.TABLE[2:],
        Register("device_feature_select", 4),
        Register("driver_feature_select", 4),
        Register("queue_pfn_hi", 4),
    )
    mode = None

    @property
    def host_features(self) -> int:
        return self.device_feature

    @property
    def guest_features(self) -> int:
        return self.driver_feature

    @guest_features.setter
    def guest_features(self, word: int) -> None:
        self.driver_feature = word
        if self.device.accepted(0) >> SEPARATE_CONFIG & 1:
            self.device.kept["separate"] = 1

    @property
    def queue_pfn_hi(self) -> int:
        return self.device.of_queue(show_area) // PAGE >> 32

    @queue_pfn_hi.setter
    def queue_pfn_hi(self, page: int) -> None:
        self.device.kept["pfn_hi"] = page

    @property
    def queue_pfn(self) -> int:
        return self.device.of_queue(show_area) // PAGE

    @queue_pfn.setter
    def queue_pfn(self, page: int) -> None:
        page |= self.device.kept.pop("pfn_hi", 0) << 32
        place_ring(self.device, page * PAGE)

    @property
    def status(self) -> int:
        return self.device.status

    @status.setter
    def status(self, value: int) -> None:
        device = self.device.device
        device.legacy = not device.accepted >> Ring.VERSION_1 & 1
        self.device.status = value


class MirroredPorts:
    """R22's BAR 0: the configuration lies over the registers from 20 or 24 on, until
    a driver accepts that it is elsewhere."""

    def __init__(self, device: PciTransport) -> None:
        self._device = device
        self._registers = MirroredRegisters(device)
        self._config = DeviceConfig(device)

    def read(self, offset: int, size: int) -> bytes:
        at = self._config_offset
        if offset >= at:
            return self._config.read(offset - at, size)
        return self._registers.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        at = self._config_offset
        if offset >= at:
            self._config.write(offset - at, data)
        else:
            self._registers.write(offset, data)

    @property
    def _config_offset(self) -> int:
        if "separate" in self._device.kept:
            return MirroredRegisters.length
        return CONFIG_WITH_MSIX if self._device.msix_enabled else VECTORS


class ConfigCommands(RegisterSet):
    """The command register for the configuration (R25): a whole access in one go.

    The driver writes offset and length, then 1 to have that part of the configuration
    in the buffer, or 2 to have the buffer's bytes written there.
    """

    TABLE = (
        Register("config_offset", 4),
        Register("config_length", 4),
        Register("command", 4, "w"),
    )
    mode = Mode.MODERN
    BUFFER: Final = 256

    def __init__(self, device: PciTransport) -> None:
        super().__init__(device)
        self._buffer = bytearray(self.BUFFER)

    def read(self, offset: int, size: int) -> bytes:
        if offset < self.length:
            return super().read(offset, size)
        at = offset - self.length
        return bytes(self._buffer[at : at + size]).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        if offset < self.length:
            super().write(offset, data)
            return
        at = offset - self.length
        room = self.BUFFER - at
        self._buffer[at : at + len(data)] = data[: max(0, room)]

    @property
    def config_offset(self) -> int:
        return self.device.kept.get("config_offset", 0)

    @config_offset.setter
    def config_offset(self, value: int) -> None:
        self.device.kept["config_offset"] = value

    @property
    def config_length(self) -> int:
        return self.device.kept.get("config_length", 0)

    @config_length.setter
    def config_length(self, value: int) -> None:
        self.device.kept["config_length"] = value

    def _do(self, what: int) -> None:
        device = self.device.device
        offset, length = self.config_offset, self.config_length
        if length > self.BUFFER:
            raise InvalidError(f"a buffer of {self.BUFFER} bytes has no {length}")
        if what == COMMAND_READ:
            self._buffer[:length] = device.read_config(offset, length)
        elif what == COMMAND_WRITE:
            device.write_config(offset, bytes(self._buffer[:length]))
            device.commit_config()
        else:
            raise InvalidError(f"no command {what}")

    command = property(None, _do)
