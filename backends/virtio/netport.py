"""Where a VirtioNet is plugged in: a port of a switch, or a TAP of its own."""

from dataclasses import dataclass, field

import trio

from backends.venet.switch import Port, Switch
from backends.virtio.net import VirtioNet
from vbus.errors import NoDeviceError
from vbus.net import FrameBatch, MacAddress, Tap


class SwitchPort(Port):
    """A port of a switch; the address is reserved from `plug` to `unplug`."""

    def __init__(self, name: str, switch: Switch) -> None:
        super().__init__(name)
        self._switch = switch
        self._net: VirtioNet | None = None
        self._mac: MacAddress | None = None

    def plug(self, net: VirtioNet) -> None:
        """Connect the device. Raises ExistsError if its address is taken."""
        self._switch.attach(self, net.mac)
        self._net, self._mac = net, net.mac

    def unplug(self) -> None:
        """Disconnect it."""
        self._switch.detach(self)
        self._net = None

    def forward(self, batch: FrameBatch) -> None:
        """Send the driver's frames on (NetBackend)."""
        self._switch.forward(self, batch)

    def set_mac(self, mac: MacAddress) -> None:
        """Reserve another address (NetBackend). Raises ExistsError."""
        if self._mac is not None:
            self._switch.set_mac(self, self._mac, mac)
            self._mac = mac

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        if self._net is not None:
            self._net.deliver(batch, first, count)

    def flush(self) -> None:
        if self._net is not None:
            self._net.flush()


@dataclass
class TapPort:
    """A TAP with nothing else on it; the TAP stays the caller's to close."""

    tap: Tap
    net: VirtioNet | None = field(default=None)

    def forward(self, batch: FrameBatch) -> None:
        """Send the driver's frames on (NetBackend)."""
        self.tap.end.deliver(batch, 0, len(batch))

    def set_mac(self, mac: MacAddress) -> None:
        """Any address will do (NetBackend)."""

    async def run(self) -> None:
        """Hand on what the kernel sends, until cancelled or the TAP is closed.

        Raises NoDeviceError when somebody else removed the interface.
        """
        batch = FrameBatch()
        try:
            while True:
                if self.tap.end.collect(batch):
                    if self.net is not None:
                        self.net.deliver(batch, 0, len(batch))
                        self.net.flush()
                    await trio.lowlevel.checkpoint()
                else:
                    await self.tap.wait()
        except trio.ClosedResourceError:
            await trio.lowlevel.checkpoint()
        except OSError as error:
            message = f"{self.tap.name} is gone: {error.strerror}"
            raise NoDeviceError(message) from None
