"""The legacy registers (R20; virtio 1.2, 4.1.4.10): ports, with the configuration
behind them at 20, or at 24 while MSI-X is enabled.

    0 host_features    4 guest_features   8 queue_pfn   12 queue_size   14 queue_sel
    16 queue_notify   18 status   19 isr   [20 msi_config_vector   22 msi_queue_vector]

A ring is one area that the driver gives as a page number; the device names its size.
"""

from typing import ClassVar

from backends.virtio.device import DeviceQueue
from backends.virtio.pci.registers import DeviceConfig, Register, RegisterSet
from backends.virtio.pci.transport import Mode, PciTransport
from backends.virtio.queue import RingAddresses

PAGE = 4096
NOTIFY = 16
ISR = 19
VECTORS = 20
CONFIG_WITH_MSIX = 24


def show_area(queue: DeviceQueue) -> int:
    """Give the address of a ring that is in use, else 0."""
    return queue.setup.desc if queue.enabled else 0


def place_ring(device: PciTransport, address: int, alignment: int = PAGE) -> None:
    """Use a ring at an address, or end its use: 0. Raises VbusError."""
    queue = device.selected
    if not address:
        device.reset_queue()
        return
    ring = RingAddresses.contiguous(address, queue.setup.size, alignment)
    queue.set_up(desc=ring.desc, driver=ring.driver, device=ring.device)
    device.device.enable_queue(queue.index)


class LegacyRegisters(RegisterSet):
    """The legacy header."""

    TABLE: ClassVar[tuple[Register, ...]] = (
        Register("host_features", 4, "r"),
        Register("guest_features", 4),
        Register("queue_pfn", 4),
        Register("queue_size", 2, "r"),
        Register("queue_select", 2),
        Register("queue_notify", 2, "w", shared=True),
        Register("status", 1),
        Register("isr", 1, "r", shared=True),
        Register("config_vector", 2),
        Register("queue_vector", 2),
    )
    mode: ClassVar[Mode | None] = Mode.LEGACY

    @property
    def host_features(self) -> int:
        return self.device.offered(0)

    @property
    def guest_features(self) -> int:
        return self.device.accepted(0)

    @guest_features.setter
    def guest_features(self, word: int) -> None:
        self.device.accept(0, word)

    @property
    def queue_pfn(self) -> int:
        return self.device.of_queue(show_area) // PAGE

    @queue_pfn.setter
    def queue_pfn(self, page: int) -> None:
        place_ring(self.device, page * PAGE)

    @property
    def queue_size(self) -> int:
        return self.device.of_queue(lambda queue: queue.max_size)


class LegacyPorts:
    """BAR 0: the header with the configuration behind it."""

    def __init__(self, device: PciTransport) -> None:
        self._device = device
        self._registers = LegacyRegisters(device)
        self._config = DeviceConfig(device, Mode.LEGACY)

    @property
    def config_offset(self) -> int:
        """Where the configuration is now."""
        return CONFIG_WITH_MSIX if self._device.msix_enabled else VECTORS

    def read(self, offset: int, size: int) -> bytes:
        at = self.config_offset
        if offset >= at:
            return self._config.read(offset - at, size)
        return self._registers.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        at = self.config_offset
        if offset >= at:
            self._config.write(offset - at, data)
        else:
            self._registers.write(offset, data)
