"""The driver of type "virtio": asks the device what it is, and drives that.

Each kind has its own class, which brings it up and connects it to something: a TAP, an
NBD socket or device, a pseudo-terminal, the kernel's pool of entropy.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Final, Protocol

import msgspec

from proxy.device import DeviceProxy
from proxy.drivers.virtio_blk import BlkDriver
from proxy.drivers.virtio_console import ConsoleDriver
from proxy.drivers.virtio_net import NetDriver
from proxy.drivers.virtio_rng import RngDriver
from proxy.virtio.adapter import BusTransport
from proxy.virtio.device import VirtioDevice
from vbus.abi import QUEUE_LIMIT
from vbus.errors import InvalidError, NoDeviceError
from vbus.virtio.common import DeviceId

PRIO: Final = "prio"
Priority = Annotated[int, msgspec.Meta(ge=0, lt=QUEUE_LIMIT)]


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
        """Take options: `prio`, that of its events; the kind's driver checks the rest.

        Raises InvalidError.
        """
        self.device = device
        self.options = {key: at for key, at in options.items() if key != PRIO}
        try:
            self.prio = msgspec.convert(options.get(PRIO, 0), Priority, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidError(f"{device.name}: {PRIO}: {error}") from error
        self.kind: KindDriver | None = None

    async def run(self, started: Callable[[str], None]) -> None:
        """Find out what it is and drive it.

        Raises NoDeviceError for a kind without a driver, InvalidError for options that
        the kind does not have.
        """
        async with self.device.opened():
            transport = BusTransport(self.device, self.prio)
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
