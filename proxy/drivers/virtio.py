"""The driver of type "virtio": asks the device what it is, and drives that.

Each kind has its own class, which brings it up and connects it to something: a TAP, an
NBD socket or device, a pseudo-terminal, the kernel's pool of entropy.
"""

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec

from proxy.device import DeviceProxy
from proxy.drivers.virtio_blk import BlkDriver
from proxy.drivers.virtio_console import ConsoleDriver
from proxy.drivers.virtio_net import NetDriver
from proxy.drivers.virtio_rng import RngDriver
from proxy.virtio.adapter import BusTransport
from proxy.virtio.device import VirtioDevice
from vbus.errors import InvalidError, NoDeviceError
from vbus.virtio.common import DeviceId


class KindDriver(Protocol):
    """Drives a device of one kind."""

    async def run(self, started: Callable[[str], None]) -> None:
        """As Driver.run; the device is open."""

    def statistics(self) -> object:
        """Give a frozen dataclass of counters."""


KindDriverClass = Callable[[VirtioDevice, Mapping[str, object]], KindDriver]

KINDS: Final[Mapping[int, KindDriverClass]] = {
    DeviceId.NET: NetDriver,
    DeviceId.BLOCK: BlkDriver,
    DeviceId.CONSOLE: ConsoleDriver,
    DeviceId.ENTROPY: RngDriver,
}


class VirtioDriver:
    """Drives one virtio device behind the bridge."""

    def __init__(self, device: DeviceProxy, options: Mapping[str, object]) -> None:
        """Take options, which the kind's driver checks."""
        self.device = device
        self.options = options
        self.kind: KindDriver | None = None

    async def run(self, started: Callable[[str], None]) -> None:
        """Find out what it is and drive it.

        Raises NoDeviceError for a kind without a driver, InvalidError for options that
        the kind does not have.
        """
        async with self.device.opened():
            transport = BusTransport(self.device)
            await transport.watch_config()
            identity = await transport.identify()
            found = KINDS.get(identity.device_id)
            if found is None:
                raise NoDeviceError(
                    f"no driver for virtio devices of kind {identity.device_id}"
                )
            try:
                self.kind = found(VirtioDevice(transport, identity), self.options)
            except msgspec.ValidationError as error:
                raise InvalidError(f"{self.device.name}: {error}") from error
            await self.kind.run(started)

    def statistics(self) -> object:
        """What the kind's driver counts."""
        return self.kind.statistics() if self.kind is not None else {}
