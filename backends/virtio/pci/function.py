"""A virtio device as a PCI function of its own: BARs of windows, interrupts, doorbells.

`VirtioFunction` is what all layouts are made with; a layout is a list of areas and
capabilities (see `layouts`). The model's own task (`device.run`) is its owner's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from backends.virtio.constants import DeviceId
from backends.virtio.device import VirtioDevice
from backends.virtio.pci.access import ConfigAccess
from backends.virtio.pci.registers import Window
from backends.virtio.pci.transport import PciStatistics, PciTransport
from shm import AddressSpace, Doorbell
from vbus.pci.config_space import Bar, ConfigSpace, Identity, Msix, Vendor
from vbus.pci.constants import MSIX_ENTRY_SIZE, Irq, Region
from vbus.pci.function import ConfiguredFunction, IoEventFd, Pending

VENDOR: Final = 0x1AF4
MODERN_BASE: Final = 0x1040
_PAGE: Final = 4096
_KICK_SIZE: Final = 2

TRANSITIONAL_IDS: Final = {
    DeviceId.NET: 0x1000,
    DeviceId.BLOCK: 0x1001,
    DeviceId.BALLOON: 0x1002,
    DeviceId.CONSOLE: 0x1003,
    DeviceId.SCSI: 0x1004,
    DeviceId.ENTROPY: 0x1005,
    DeviceId.NINEP: 0x1009,
}
"""4.1.2.1; what legacy drivers bind to."""

_CLASSES: Final = {
    DeviceId.NET: 0x020000,
    DeviceId.BLOCK: 0x018000,
    DeviceId.CONSOLE: 0x078000,
    DeviceId.SCSI: 0x010000,
    DeviceId.NINEP: 0x018000,
}
_OTHER_CLASS: Final = 0x00FF00


def identity(device_id: DeviceId, *, modern: bool) -> Identity:
    """Give the ids: revision 1 is modern only, 0 may be driven as legacy (4.1.2)."""
    return Identity(
        vendor=VENDOR,
        device=MODERN_BASE + device_id if modern else TRANSITIONAL_IDS[device_id],
        class_code=_CLASSES.get(device_id, _OTHER_CLASS),
        revision=int(modern),
        subsystem_vendor=VENDOR,
        subsystem=device_id,
    )


def msix_for(device: VirtioDevice, bar: int) -> tuple[Msix, Bar]:
    """Give MSI-X with a vector for each queue and one for the configuration."""
    vectors = len(device.queues) + 1
    table = vectors * MSIX_ENTRY_SIZE
    pending = -(-vectors // 64) * 8
    size = max(_PAGE, 1 << (table + pending - 1).bit_length())
    return Msix(vectors, bar, table), Bar(size)


@dataclass(frozen=True, slots=True)
class Area:
    """Where a window is: `size` bytes at `offset` of a BAR.

    `kicks`: where in it a write of two bytes notifies queue 0, with `stride` from one
    queue to the next, or 0 where the value says which.
    """

    bar: int
    offset: int
    size: int
    window: Window
    kicks: int | None = None
    stride: int = 0

    def covers(self, offset: int, size: int) -> bool:
        """Is an access all within it?"""
        return self.offset <= offset and offset + size <= self.offset + self.size


class VirtioFunction(ConfiguredFunction):
    """One device's function, after its layout gave it areas by `show`."""

    def __init__(
        self,
        device: VirtioDevice,
        config: ConfigSpace,
        *,
        features: int = 0,
        access: Vendor | None = None,
    ) -> None:
        """`features` are the transport's own; `access` is the capability through which
        configuration space reaches the BARs. Raises InvalidError: shown elsewhere.
        """
        super().__init__(config, AddressSpace())
        vectors = config.msix.vectors if config.msix is not None else 0
        self.transport = PciTransport(
            device, self.memory, self, vectors=vectors, features=features
        )
        self._access = ConfigAccess(config, access, self) if access else None
        self._areas: dict[int, list[Area]] = {}
        self._bells: dict[int, Doorbell] = {}
        self._nursery: trio.Nursery | None = None

    def show(self, areas: Sequence[Area]) -> None:
        """Add what its BARs show."""
        for area in areas:
            self._areas.setdefault(area.bar, []).append(area)

    # Wires

    @property
    def msix_enabled(self) -> bool:
        return self.config.msix_enabled

    def message(self, vector: int) -> object:
        return self._interrupts is not None and self._interrupts.trigger(
            Irq.MSIX, vector
        )

    def line(self) -> object:
        if self._interrupts is None or not self.line_asserted():
            return False
        return self._interrupts.trigger(Irq.INTX, 0)

    def line_asserted(self) -> bool:
        return bool(
            self.transport.isr
            and not self.config.intx_disabled
            and not self.config.msix_enabled
        )

    # BARs

    def bar_read(self, bar: int, offset: int, size: int) -> bytes:
        for area in self._areas.get(bar, ()):
            if area.covers(offset, size):
                return area.window.read(offset - area.offset, size)
        return bytes(size)

    def bar_write(self, bar: int, offset: int, data: bytes) -> None:
        for area in self._areas.get(bar, ()):
            if area.covers(offset, len(data)):
                area.window.write(offset - area.offset, data)
                return

    # Configuration space

    def read(self, region: int, offset: int, size: int) -> bytes | Pending:
        if self._access is not None and region == Region.CONFIG:
            self._access.before_read(offset, size)
        return super().read(region, offset, size)

    def _config_write(self, offset: int, data: bytes) -> None:
        stood = self.line_asserted()
        super()._config_write(offset, data)
        if not stood:
            self.line()
        if self._access is not None:
            self._access.after_write(offset, len(data))

    # Life

    def bus_master_changed(self, enabled: bool) -> None:
        if not enabled:
            self.transport.bus_master_lost()

    def detach(self) -> None:
        for bell in self._bells.values():
            bell.close()
        self._bells.clear()
        super().detach()

    def reset(self) -> None:
        super().reset()
        self.transport.reset()

    def close(self) -> None:
        """Let the device go, to be shown elsewhere."""
        self.transport.close()

    def statistics(self) -> PciStatistics:
        """A snapshot of the transport's counters."""
        return self.transport.statistics()

    # Doorbells

    def io_eventfds(self, region: int, limit: int) -> list[IoEventFd]:
        """Offer an eventfd for each queue's notification, while `run` serves them."""
        found = []
        for area in self._areas.get(region, ()):
            if area.kicks is None or self._nursery is None:
                continue
            for queue in self.transport.device.queues:
                at = area.offset + area.kicks + queue.index * area.stride
                match = None if area.stride else queue.index
                fd = self._bell(queue.index, self._nursery).fileno()
                found.append(IoEventFd(at, _KICK_SIZE, fd, match))
        return found[:limit]

    async def run(self) -> None:
        """Hand eventfds' rings on to the device, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def _bell(self, index: int, nursery: trio.Nursery) -> Doorbell:
        bell = self._bells.get(index)
        if bell is None:
            bell = self._bells[index] = Doorbell()
            nursery.start_soon(self._watch, index, bell)
        return bell

    async def _watch(self, index: int, bell: Doorbell) -> None:
        try:
            while True:
                await bell.wait()
                self.transport.kick(index)
        except trio.ClosedResourceError:
            return  # the client that had it is gone
