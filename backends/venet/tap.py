"""Classes "switch-tap" and "venet-tap": where frames of the bus meet the host's kernel.

Both own a TAP in the network namespace of this process, made when the device is set up
and gone with it.
"""

from collections.abc import Callable
from typing import Protocol

import trio

from backends.venet.base import VenetBase, parse_mac, parse_mtu
from backends.venet.flag import Flag
from backends.venet.port import find_switch
from backends.venet.session import SPIN_US, parse_spin, spin
from backends.venet.switch import Port, Switch
from vbus.device import Device, Host, attribute
from vbus.errors import NoDeviceError
from vbus.net import FrameBatch, MacAddress, Tap, TapStatistics
from vbus.net.interface import check_name, parse_address

DISABLED = "<disabled>"


def parse_ifname(value: object) -> str:
    """Take a name for an interface, or none. Raises InvalidError."""
    return check_name(str(value)) if value else ""


def parse_tap_address(value: object) -> str:
    """Take an address with its prefix, or none. Raises InvalidError."""
    return str(parse_address(str(value))) if value else ""


class TapHolder(Protocol):
    """The attributes of a device that say how its TAP is."""

    @property
    def host_mac(self) -> str: ...
    @property
    def mtu(self) -> int: ...
    @property
    def address(self) -> str: ...
    @property
    def spin_us(self) -> int: ...


def open_tap(device: TapHolder, ifname: str, *, up: bool) -> Tap:
    """Make the TAP of a device. Raises NoDeviceError, PermissionDeniedError."""
    try:
        tap = Tap(ifname or "vbus%d", spin=spin(device.spin_us))
    except OSError as error:
        raise NoDeviceError(f"cannot make a TAP {ifname}: {error.strerror}") from None
    try:
        tap.configure(
            mac=MacAddress.parse(device.host_mac),
            mtu=device.mtu,
            address=parse_address(device.address) if device.address else None,
            up=up or None,
        )
    except BaseException as error:
        tap.close()
        if isinstance(error, OSError):
            message = f"cannot configure {tap.name}: {error.strerror}"
            raise NoDeviceError(message) from None
        raise
    return tap


async def pump(tap: Tap, forward: Callable[[FrameBatch], None]) -> None:
    """Hand on what the kernel sends, until the TAP is closed.

    Raises NoDeviceError when somebody else removed the interface.
    """
    batch = FrameBatch()
    try:
        while True:
            if tap.end.collect(batch):
                forward(batch)
                await trio.lowlevel.checkpoint()
            else:
                await tap.wait()
    except trio.ClosedResourceError:
        await trio.lowlevel.checkpoint()
    except OSError as error:
        raise NoDeviceError(f"{tap.name} is gone: {error.strerror}") from None


class _TapPort(Port):
    """The switch's view of a TAP."""

    def __init__(self, name: str, tap: Tap) -> None:
        super().__init__(name)
        self.tap = tap

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        self.tap.end.deliver(batch, first, count)


class SwitchTap(Device):
    """An uplink of a switch: a TAP through which the host is on the switch too."""

    switch = attribute(str, doc="name of the switch")
    ifname = attribute(
        parse_ifname, default="", doc="the TAP's name; vbusN if not given"
    )
    address = attribute(parse_tap_address, default="", doc="IPv4 address with prefix")
    host_mac = attribute(parse_mac, default="", doc="the TAP's hardware address")
    mtu = attribute(parse_mtu, default=1500, doc="without the Ethernet header")
    spin_us = attribute(parse_spin, default=SPIN_US, doc="see class venet")

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        super().__init__(name, host, **attributes)
        if not self.host_mac:
            self.host_mac = str(MacAddress.from_name(f"{name}/host"))
        self._port: _TapPort | None = None
        self._switch: Switch | None = None

    def setup(self) -> None:
        switch = find_switch(self, self.switch)
        tap = open_tap(self, self.ifname, up=True)
        try:
            port = _TapPort(self.name, tap)
            switch.attach(port, MacAddress.parse(self.host_mac))
        except BaseException:
            tap.close()
            raise
        self.ifname = tap.name
        self._port, self._switch = port, switch

    def teardown(self) -> None:
        if self._port is not None and self._switch is not None:
            self._switch.detach(self._port)
            self._port.tap.close()
            self._port = self._switch = None

    async def serve(self) -> None:
        port, switch = self._port, self._switch
        assert port is not None
        assert switch is not None
        await pump(port.tap, lambda batch: switch.forward(port, batch))

    def statistics(self) -> TapStatistics | dict[str, int]:
        """A snapshot of the counters."""
        return self._port.tap.statistics() if self._port is not None else {}


class VenetTap(VenetBase):
    """A venet whose other side is a TAP of the host, without a switch."""

    ifname = attribute(
        parse_ifname, default="", doc="the TAP's name; vbusN if not given"
    )
    address = attribute(parse_tap_address, default="", doc="IPv4 address with prefix")
    host_mac = attribute(parse_mac, default="", doc="the TAP's hardware address")
    enabled = attribute(
        bool, default=True, writable=True, doc="is the TAP there? The guest is told not"
    )

    def __init__(self, name: str, host: Host, /, **attributes: object) -> None:
        super().__init__(name, host, **attributes)
        if not self.host_mac:
            self.host_mac = str(MacAddress.from_name(f"{name}/host"))
        self._wanted = self.ifname
        self.ifname = DISABLED
        self._tap: Tap | None = None
        self._there = Flag()

    def setup(self) -> None:
        if self.enabled:
            self._enable()

    def teardown(self) -> None:
        self._disable()

    def _enable(self) -> None:
        self._tap = open_tap(self, self._wanted, up=bool(self.address))
        self._tap.set_carrier(self.statistics().link_up)
        self.ifname = self._tap.name
        self._there.set(True)

    def _disable(self) -> None:
        self._there.set(False)
        self.ifname = DISABLED
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def attribute_changed(self, name: str) -> None:
        super().attribute_changed(name)
        if name == "enabled" and self.enabled != self._there.value:
            if self.enabled:
                self._enable()
            else:
                self._disable()

    def link_changed(self, up: bool) -> None:
        if self._tap is not None:
            self._tap.set_carrier(up)

    def forward(self, batch: FrameBatch) -> None:
        if self._tap is not None:
            self._tap.end.deliver(batch, 0, len(batch))

    async def serve(self) -> None:
        while True:
            await self._there.wait(True)
            assert self._tap is not None
            await pump(self._tap, self._deliver_all)

    def _deliver_all(self, batch: FrameBatch) -> None:
        self.deliver(batch, 0, len(batch))
        self.flush()
