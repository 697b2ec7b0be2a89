"""Class "venet": a guest's network device that is a port of a switch."""

from backends.venet.base import VenetBase
from backends.venet.switch import Port, Switch
from vbus.device import Device, Host, attribute
from vbus.errors import InvalidError
from vbus.net import FrameBatch, MacAddress


def find_switch(device: Device, name: str) -> Switch:
    """Look up the switch a device names. Raises NotFoundError, InvalidError."""
    switch = device.host.device(name)
    if not isinstance(switch, Switch):
        raise InvalidError(f"{device.name}: {name} is not a switch")
    return switch


class _GuestPort(Port):
    """The switch's view of a Venet."""

    def __init__(self, venet: "Venet") -> None:
        super().__init__(venet.name)
        self._venet = venet

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        self._venet.deliver(batch, first, count)

    def flush(self) -> None:
        self._venet.flush()


class Venet(VenetBase):
    """A port of a switch; its address stays reserved while no guest is there."""

    switch = attribute(str, doc="name of the switch")

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        super().__init__(name, host, **attributes)
        self._port = _GuestPort(self)
        self._mac = self.mac
        self._switch: Switch | None = None

    def setup(self) -> None:
        switch = find_switch(self, self.switch)
        switch.attach(self._port, self._mac)
        self._switch = switch

    def teardown(self) -> None:
        if self._switch is not None:
            self._switch.detach(self._port)
            self._switch = None

    def attribute_changed(self, name: str) -> None:
        super().attribute_changed(name)
        if name == "client_mac" and self._switch is not None:
            new = MacAddress.parse(self.client_mac)
            self._switch.set_mac(self._port, self._mac, new)
            self._mac = new

    def forward(self, batch: FrameBatch) -> None:
        if self._switch is not None:
            self._switch.forward(self._port, batch)
