"""Where a VirtioNet is plugged in: a port of a switch, or a TAP of its own."""

from backends.venet.switch import Port, Switch
from backends.venet.tap import pump
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


class TapPort:
    """A TAP with nothing else on it, owned from here on; `unplug` closes it."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self._net: VirtioNet | None = None

    def plug(self, net: VirtioNet) -> None:
        """Connect the device."""
        self._net = net

    def unplug(self) -> None:
        """Disconnect it."""
        self._net = None
        self.tap.close()

    def forward(self, batch: FrameBatch) -> None:
        """Send the driver's frames on (NetBackend)."""
        if self._net is not None:
            self.tap.end.deliver(batch, 0, len(batch))

    def set_mac(self, mac: MacAddress) -> None:
        """Any address will do (NetBackend)."""

    async def run(self) -> None:
        """Hand on what the kernel sends, until cancelled or unplugged.

        When somebody else removes the interface the driver sees its cable pulled.
        """
        try:
            await pump(self.tap, self._deliver)
        except NoDeviceError:
            if self._net is not None:
                self._net.set_link(False)

    def _deliver(self, batch: FrameBatch) -> None:
        if self._net is not None:
            self._net.deliver(batch, 0, len(batch))
            self._net.flush()
